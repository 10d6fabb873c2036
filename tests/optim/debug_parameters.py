"""Names and shapes of a small model with every kind of layer, written by hand for the tests."""

from optim.partition import MatrixSizes

D, H, K, Q, G, O, N, E, F, V, I, J = 48, 4, 16, 24, 2, 8, 4, 6, 20, 96, 2, 8
SIZES = MatrixSizes(o_groups=G, num_attention_heads=H, head_dim=K, index_head_dim=J)
Shapes = dict[str, tuple[int, ...]]


def shapes() -> Shapes:
    """Layers: window, CSA, HCA; then the MTP block."""
    found: Shapes = {"embed.weight": (V, D), "head.weight": (V, D), "norm.weight": (D,)}
    found |= _hc_head("")
    for index, kind in enumerate(["window", "csa", "hca"]):
        found |= _block(f"layers.{index}.", kind)
    found |= _block("mtp.0.", "window") | _hc_head("mtp.0.")
    found |= {f"mtp.0.{name}.weight": (D, D) for name in ("e_proj", "h_proj")}
    found |= {f"mtp.0.{name}.weight": (D,) for name in ("enorm", "hnorm", "norm")}
    return found


def _hc_head(prefix: str) -> Shapes:
    return {
        f"{prefix}hc_head_fn": (N, N * D),
        f"{prefix}hc_head_base": (N,),
        f"{prefix}hc_head_scale": (1,),
    }


def _block(prefix: str, kind: str) -> Shapes:
    rows = (2 + N) * N
    attn = {
        "wq_a.weight": (Q, D),
        "q_norm.weight": (Q,),
        "wq_b.weight": (H * K, Q),
        "wkv.weight": (K, D),
        "kv_norm.weight": (K,),
        "wo_a.weight": (G * O, H * K // G),
        "wo_b.weight": (D, G * O),
        "attn_sink": (H,),
    }
    if kind != "window":
        attn |= _compressor("compressor.", K, 4 if kind == "csa" else 128)
    if kind == "csa":
        attn |= {"indexer.wq_b.weight": (I * J, Q), "indexer.weights_proj.weight": (I, D)}
        attn |= _compressor("indexer.compressor.", J, 4)
    found: Shapes = {f"{prefix}attn.{name}": shape for name, shape in attn.items()}
    for part in ("attn", "ffn"):
        found[f"{prefix}{part}_norm.weight"] = (D,)
        found[f"{prefix}hc_{part}_fn"] = (rows, N * D)
        found[f"{prefix}hc_{part}_base"] = (rows,)
        found[f"{prefix}hc_{part}_scale"] = (3,)
    found[f"{prefix}ffn.gate.weight"] = (E, D)
    for name, shape in {"w1": (F, D), "w2": (D, F), "w3": (F, D)}.items():
        found[f"{prefix}ffn.experts.{name}"] = (E, *shape)
        found[f"{prefix}ffn.shared_experts.{name}.weight"] = shape
    return found


def _compressor(prefix: str, width: int, window: int) -> Shapes:
    rows = 2 * width if window == 4 else width
    return {
        f"{prefix}wkv.weight": (rows, D),
        f"{prefix}wgate.weight": (rows, D),
        f"{prefix}ape": (window, rows),
        f"{prefix}norm.weight": (width,),
    }
