"""ParameterSpec, a row of the parameter table, and helpers that build recurring specs. No torch.

Letters of shapes, for one layer:

    D  hidden size              H  query heads              K  head dim
    Q  rank of the queries      G  groups of the output     O  rank of each group's output
    E  routed experts           A  active experts           F  inner size of an expert
    I  index heads              J  index head dim           N  residual streams
    V  vocabulary               m  tokens in a compression window
    w  windows that an entry pools: 2 where they overlap, else 1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from model.config import LayerType, ModelConfig

Shape = tuple[int, ...]
FP32: dict[str, Any] = {"dtype": "fp32", "released": "fp32"}
Scope = Literal["model", "block", "mtp"]
DType = Literal["weights", "fp32", "int64"]
InitialValues = Literal["normal", "ones", "zeros", "hc_scale", "hc_base", "balanced_table"]
ShardedBy = Literal["tensor", "expert"]
ReleasedFormat = Literal["bf16", "fp32", "int64", "fp8", "mxfp4"]


class Letters(NamedTuple):
    """Sizes of one layer, named by the shape letters above."""

    D: int
    H: int
    K: int
    Q: int
    G: int
    O: int
    E: int
    A: int
    F: int
    V: int
    I: int
    J: int
    N: int
    m: int
    w: int

    @classmethod
    def of(cls, config: ModelConfig, kind: LayerType) -> Letters:
        """Returns the sizes of a layer with this kind of attention."""
        return cls(
            D=config.hidden_size,
            H=config.num_attention_heads,
            K=config.head_dim,
            Q=config.q_lora_rank,
            G=config.o_groups,
            O=config.o_lora_rank,
            E=config.n_routed_experts,
            A=config.num_experts_per_tok,
            F=config.moe_intermediate_size,
            V=config.vocab_size,
            I=config.index_n_heads,
            J=config.index_head_dim,
            N=config.hc_mult,
            m=config.compress_ratio(kind),
            w=2 if kind == "csa" else 1,
        )


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter or buffer of every layer, of the MTP block, or of the model as a whole.

    Attributes:
        name: in memory, within its scope.
        group: the optimizer parameter group, as the config names it; None for buffers, which are
            not trained.
        shape: the global shape.
        transformers: its name in ``transformers``, within the layer. Those that share one are
            concatenated there along their second dimension, in the order of the table. None: it
            has no such tensor.
        scope: "block" specs are every layer's and the MTP block's.
        official: its name in DeepSeek's release, used on disk and for seeding; None if it is
            ``name``.
        dtype: "weights" follows the precision of the run.
        released: how the released files store it: "fp8" is E4M3 with a scale for each block of
            128 x 128, "mxfp4" is E2M1 with one for 32 numbers of a row.
        initial: see model/init.py.
        sharded: ("tensor", d): sharded over tensor ranks along dim d. ("expert", d): over expert
            ranks along dim 0, and over expert-tensor ranks along d. None: replicated within a
            pipeline stage.
        matrices: number of independent Muon matrices stacked along dim 0; None for AdamW. If
            ``stacked``, there is one per expert, whatever the number.
        per_head: the same number with optim.muon.query_matrices = per_head, which makes each head
            of the attention's or the indexer's queries a matrix; None: as in ``matrices``.
        stacked: [E, rows, columns], one matrix per expert, each initialised and stored separately.
        counts_as_active: counts towards active parameters although AdamW trains it (the output
            head); whatever Muon trains counts in any case.
        layers, router: the kinds of layer and of router that have it; None means all.
    """

    name: str
    group: str | None
    shape: Callable[[Letters], Shape]
    transformers: str | None = None
    scope: Scope = "block"
    official: str | None = None
    dtype: DType = "weights"
    released: ReleasedFormat = "bf16"
    initial: InitialValues = "normal"
    sharded: tuple[ShardedBy, int] | None = None
    matrices: Callable[[Letters], int] | None = None
    per_head: Callable[[Letters], int] | None = None
    stacked: bool = False
    counts_as_active: bool = False
    layers: tuple[LayerType, ...] | None = None
    router: Literal["hashed", "learned"] | None = None

    def exists(self, kind: LayerType, hashed: bool) -> bool:
        """Whether a layer with this attention and router has it."""
        if self.router is not None and hashed != (self.router == "hashed"):
            return False
        return self.layers is None or kind in self.layers


def single_matrix(sizes: Letters) -> int:
    """Returns 1: the parameter is one Muon matrix."""
    return 1


def matrix(
    name: str, group: str, shape: Callable[[Letters], Shape], transformers: str | None, **more: Any
) -> ParameterSpec:
    """Returns the spec of ``name.weight``; ``more`` are its other attributes."""
    hf_name = transformers and f"{transformers}.weight"
    return ParameterSpec(
        f"{name}.weight", group, shape, hf_name, **({"matrices": single_matrix} | more)
    )


def norm(
    name: str, width: Callable[[Letters], int], transformers: str | None, **more: Any
) -> ParameterSpec:
    """Returns the spec of an RMSNorm's weight."""
    more |= {"matrices": None, "dtype": "fp32", "initial": "ones"}
    return matrix(name, "norms", lambda s: (width(s),), transformers, **more)


def hyper_connection(
    name: str, rows: Callable[[Letters], int], scales: int, transformers: str | None, **more: Any
) -> tuple[ParameterSpec, ...]:
    """Returns the specs of fn, base and scale of a hyper-connection or hyper-connection head."""

    def spec(
        leaf: str, shape: Callable[[Letters], Shape], initial: str, **extra: Any
    ) -> ParameterSpec:
        rest: dict[str, Any] = {"initial": initial, **FP32, **extra, **more}
        hf_name = transformers and f"{transformers}{leaf}"
        official = f"{name}_{leaf}"
        return ParameterSpec(
            f"{name}.{leaf}", "hyper_connections", shape, hf_name, official=official, **rest
        )

    return (
        spec("fn", lambda s: (rows(s), s.N * s.D), "normal", matrices=single_matrix),
        spec("base", lambda s: (rows(s),), "hc_base"),
        spec("scale", lambda s: (scales,), "hc_scale"),
    )


def compressor(
    name: str, group: str, width: Callable[[Letters], int], hf_name: str, layers: tuple[str, ...]
) -> tuple[ParameterSpec, ...]:
    """Returns the specs of a compressor whose compressed entries have this width."""

    def projection(leaf: str, hf_leaf: str) -> ParameterSpec:
        shape = lambda s: (s.w * width(s), s.D)  # noqa: E731
        more: dict[str, Any] = {"matrices": lambda s: s.w, "layers": layers}
        return matrix(f"{name}.{leaf}", group, shape, f"{hf_name}.{hf_leaf}", **more)

    gate_bias = lambda s: (s.m, s.w * width(s))  # noqa: E731
    zeros: dict[str, Any] = {**FP32, "initial": "zeros", "layers": layers}
    return (
        ParameterSpec(f"{name}.ape", group, gate_bias, f"{hf_name}.position_bias", **zeros),
        projection("wkv", "kv_proj"),
        projection("wgate", "gate_proj"),
        norm(f"{name}.norm", width, f"{hf_name}.kv_norm", layers=layers),
    )


def expert_stack(
    leaf: str, shape: Callable[[Letters], Shape], sharded_dim: int, hf_name: str
) -> ParameterSpec:
    """Returns the spec of one matrix of all routed experts."""
    return ParameterSpec(
        f"ffn.experts.{leaf}",
        "experts",
        lambda s: (s.E, *shape(s)),
        f"mlp.experts.{hf_name}",
        released="mxfp4",
        sharded=("expert", sharded_dim),
        matrices=single_matrix,
        stacked=True,
    )


def shared_expert(
    leaf: str, shape: Callable[[Letters], Shape], sharded_dim: int, hf_name: str
) -> ParameterSpec:
    """Returns the spec of one matrix of the shared expert."""
    more: dict[str, Any] = {"released": "fp8", "sharded": ("tensor", sharded_dim)}
    hf_name = f"mlp.shared_experts.{hf_name}"
    return matrix(f"ffn.shared_experts.{leaf}", "shared_experts", shape, hf_name, **more)
