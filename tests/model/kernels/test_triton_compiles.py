"""Every kernel compiles for Hopper at V4's widths, without a GPU, and fits into one."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.model.kernels.interpreter import compiled

SHARED_BYTES = 232_448
"""What a program may have of a Hopper multiprocessor's shared memory."""
STACK_BYTES = 512
"""More per thread would be registers spilled inside a loop, not around it."""

TYPES = {
    "*bf16": "q keys entries out q_and_grad grad_q grad_out logits x grad_x streams read y "
    "grad_streams grad_y grad_read gate up grad_gate grad_up",
    "*fp32": "sink cos_sin lse lse2 rstd delta norm_term grad mass pairs weights values gates ape "
    "pooled grad_values grad_gates grad_pooled grad_ape loss total grad_weights grad_scores "
    "grad_pairs weight grad_weight fn part_w part_square base scale grad_scale w pre post comb "
    "grad_pre grad_post grad_comb divisors grad_w grad_base grad_fn a_scales b_scales row_scales "
    "column_scales",
    "*i32": "key_start key_end entry_start entry_end start_T end_T query_start query_end "
    "bounds selected first_token has_previous ends before tile_group tile_first tile_end",
    "*i64": "order strip row_of_pair target",
    "*fp8e4nv": "a b row_codes column_codes",
    "i32": "tokens heads num_selected rows count begin width k span parts dim columns "
    "groups blocks tiles right stride shift vocab ignore_index",
    "fp32": "eps scale_log2 softmax_scale sign norm_eps hc_eps limit inverse_denominator",
}
OTHERWISE = {
    "_grad_selected": {"first_token": "i32"},
    "_select": {"first_token": "i32"},
}
LOSS = {"HEADS": 64, "DIM": 128, "BLOCK_N": 64}
WIDE = {"DIM": 512, "ROTARY": 64}
NARROW = {"DIM": 128, "ROTARY": 32}


def launches() -> dict[str, tuple[Any, dict[str, Any], dict[str, int]]]:
    """Kernel, sizes and options as the public functions choose them."""
    from model.kernels.attention import forward_triton, pairs_triton, probability_mass_triton
    from model.kernels.attention import key_gradient_triton as key_gradient
    from model.kernels.attention import query_gradient_triton as query_gradient
    from model.kernels.attention.parts_triton import blocks_for
    from model.kernels.compressor import pool_triton
    from model.kernels.indexer import loss_kernels_triton as loss_kernels
    from model.kernels.indexer import select_triton

    out: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {}
    for name, sizes, heads in (("V4", WIDE, 64), ("nano", WIDE, 16), ("narrow", NARROW, 16)):
        b = blocks_for(sizes["DIM"])
        options = b.options
        dim = {"DIM": sizes["DIM"]}

        def block(most: int, mode: int, heads: int = heads) -> dict[str, int]:
            heads = min(heads, most)
            return {"BLOCK_T": 1 if mode == 2 else most // heads, "BLOCK_H": heads, "MODE": mode}

        for mode in (0, 1, 2):
            forward = sizes | block(b.rows, mode) | {"BLOCK_N": b.keys}
            backward = sizes | block(b.dq_rows, mode) | {"BLOCK_N": b.dq_keys}
            out[f"{name} forward {mode}"] = (forward_triton._forward, forward, options)
            out[f"{name} queries {mode}"] = (query_gradient._grad_queries, backward, options)
            if mode:
                out[f"{name} mass {mode}"] = (probability_mass_triton._mass, forward, options)
        tile = dim | {"ROWS": b.dk_rows, "BLOCK_N": b.dk_keys}
        out[f"{name} keys"] = (key_gradient._grad_keys, tile, options)
        for atomic in (False, True):
            kernel = (key_gradient._grad_selected, tile | {"ATOMIC": atomic}, options)
            out[f"{name} selected, atomic {atomic}"] = kernel
        few = {"num_warps": 4}
        out[f"{name} prepare"] = (query_gradient._prepare, sizes | {"ROWS": 16}, few)
        out[f"{name} sum"] = (pairs_triton._sum_pairs, dim | {"BLOCK": 16}, few)
    choice = {"HEADS": 64, "DIM": 128, "BLOCK_T": 2, "BLOCK_N": 64}
    for k in (512, 1024):
        out[f"select {k}"] = (select_triton._select, choice | {"BEST": k}, {"num_warps": 8})
    eight = {"num_warps": 8, "num_stages": 2}
    for is_selected in (False, True):
        loss = LOSS | {"BLOCK_T": 1 if is_selected else 2, "SELECTED": is_selected}
        out[f"loss forward {is_selected}"] = (loss_kernels.forward, loss, eight)
        out[f"loss queries {is_selected}"] = (loss_kernels.grad_queries, loss, eight)
    out["loss keys"] = (loss_kernels.grad_keys, LOSS | {"BLOCK_T": 2}, eight)
    for m, block_c, overlap in ((128, 1, False), (4, 16, True)):
        pool = {"DIM": 512, "M": m, "BLOCK_C": block_c, "BLOCK_X": 64, "OVERLAP": overlap}
        for part in ("_forward", "_backward"):
            kernel = getattr(pool_triton, part)
            out[f"pool {m} {part}"] = (kernel, pool, {"num_warps": 8})
    return out | other_launches() | fp8_launches()


def other_launches() -> dict[str, tuple[Any, dict[str, Any], dict[str, int]]]:
    """The same of what is not attention."""
    from model.kernels.cross_entropy import softmax_triton
    from model.kernels.hyper_connection import coefficients_triton as coefficients
    from model.kernels.hyper_connection import mix_triton as mix
    from model.kernels.hyper_connection import project_triton as project
    from model.kernels.norm import norm_triton
    from model.kernels.permute import unpermute_triton
    from model.kernels.swiglu import swiglu_triton

    four, out = {"num_warps": 4}, {}
    for dim, rotary in ((4096, 0), (7168, 0), (512, 64), (128, 64)):
        block = 1 << (dim - 1).bit_length()
        norm = {"DIM": dim, "BLOCK": block, "ROWS": 8192 // block, "ROTARY": rotary}
        eight = {"num_warps": 8}
        out[f"norm {dim}"] = (norm_triton._forward, norm | {"NORM": dim != 128}, eight)
        out[f"norm {dim} back"] = (norm_triton._backward, norm, eight)
    for head, rows in ((False, 24), (True, 4)):
        n = {"N": 4, "OUT": rows}
        wide = {"BLOCK_W": 32 if rows == 24 else 16}
        tile = {"BLOCK_T": project._TOKENS, "BLOCK_X": project._COLUMNS} | wide
        back = {"BLOCK_T": project._BACKWARD_TOKENS}
        few = {"N": 4, "BLOCK_T": mix._BLOCK_T, "BLOCK_D": mix._BLOCK_D}
        launch = n | {"BLOCK_T": coefficients._TOKENS, "STEPS": 19, "HEAD": head}
        for kernel, constants, options in (
            (project._project, tile | {"OUT": rows}, {"num_warps": 8, "num_stages": 3}),
            (project._project_backward, n | tile | back, four | {"num_stages": 2}),
            (coefficients._coefficients, launch | wide, {"num_warps": 2}),
            (coefficients._coefficients_backward, launch, {"num_warps": 2}),
            *((kernel, few, four) for kernel in (mix._mix, mix._mix_backward)),
            *((kernel, few, four) for kernel in (mix._write, mix._write_backward)),
        ):
            out[f"streams {head} {kernel.__name__}"] = (kernel, constants, options)
    tile = {"WEIGHTED": True, "ROWS": swiglu_triton._ROWS, "COLUMNS": swiglu_triton._COLUMNS}
    for name in ("_forward", "_backward"):
        out[f"experts {name}"] = (getattr(swiglu_triton, name), tile, four)
    rows = {"CHOICES": 6, "COLUMNS": unpermute_triton._COLUMNS}
    for gradient in (False, True):
        softmax = {"GRADIENT": gradient, "BLOCK": softmax_triton._BLOCK}
        options = {"num_warps": softmax_triton._WARPS}
        out[f"softmax {gradient}"] = (softmax_triton._softmax, softmax, options)
    out["experts _unpermute"] = (unpermute_triton._unpermute, rows, four)
    return out


def fp8_launches() -> dict[str, tuple[Any, dict[str, Any], dict[str, int]]]:
    """The same for matmuls in FP8."""
    from model.kernels.fp8 import matmul_triton
    from model.kernels.fp8 import quantise_triton as quantise

    tile, eight = {"BLOCK": matmul_triton.BLOCK}, {"num_warps": 8}
    matmul = eight | {"num_stages": 4}
    band = tile | {"BAND": matmul_triton._BAND}
    out = {
        "fp8 matmul": (matmul_triton._matmul, band, matmul),
        "fp8 weight gradient": (matmul_triton._weight_gradient, tile, matmul),
        "fp8 tiles": (quantise._tiles, tile | {"GROUPS": 512}, {"num_warps": 1}),
    }
    for rows, columns in ((True, False), (False, True), (True, True)):
        sizes = tile | {"ROWS": rows, "COLUMNS": columns}
        out[f"fp8 rows {rows}, columns {columns}"] = (quantise._quantise, sizes, eight)
    for transposed in (False, True):
        sizes = tile | {"TRANSPOSED": transposed}
        out[f"fp8 weight, transposed {transposed}"] = (quantise._quantise_weight, sizes, eight)
    return out


def built(kernel: Any, sizes: dict[str, Any], options: dict[str, int]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: kind for kind, names in TYPES.items() for name in names.split()}
    types |= OTHERWISE.get(kernel.__name__, {})
    names = kernel.arg_names
    signature = {name: "constexpr" if name in sizes else types[name] for name in names}
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in sizes.items()},
        attrs={(i,): aligned for i, name in enumerate(names) if signature[name][0] == "*"},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def stack_bytes(binary: bytes) -> int:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(usage.split("STACK:")[1].split()[0])


def check(group: str) -> None:
    chosen = {name: launch for name, launch in launches().items() if name.startswith(group)}
    assert chosen
    for name, launch in chosen.items():
        kernel = built(*launch)
        assert kernel.metadata.shared <= SHARED_BYTES, f"{name}: {kernel.metadata.shared} bytes"
        stack = stack_bytes(kernel.asm["cubin"])
        assert stack <= STACK_BYTES, f"{name}: {stack} bytes of stack"


# Half a second to three seconds each; the larger ones take up to fifteen.
QUICK = [
    *(f"narrow {part}" for part in ("forward", "queries", "mass", "keys", "selected")),
    *("narrow prepare", "narrow sum", "norm", "experts", "softmax"),
]
SLOW = [
    *(f"{name} {part}" for name in ("V4", "nano") for part in ("forward", "queries", "mass")),
    # The others do not depend on the number of heads.
    *(f"V4 {part}" for part in ("keys", "selected", "prepare", "sum")),
    *("select", "loss", "pool", "streams False", "streams True", "fp8"),
]


@pytest.mark.parametrize(
    "group", [*QUICK, *(pytest.param(group, marks=pytest.mark.slow) for group in SLOW)]
)
@compiled
def test_fits_a_hopper_gpu(group, tmp_path):
    import triton

    triton.knobs.cache.dir = str(tmp_path)
    check(group)


@pytest.mark.slow
@compiled
def test_a_tile_too_large_is_detected(tmp_path):
    """The negative control: twice the keys do not fit."""
    import triton

    triton.knobs.cache.dir = str(tmp_path)
    kernel, sizes, options = launches()["V4 forward 1"]
    binary = built(kernel, sizes | {"BLOCK_N": 128}, options)
    assert binary.metadata.shared > SHARED_BYTES
