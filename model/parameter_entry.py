"""Entries of the table of parameters, and the kinds that occur several times. Imports no torch.

Letters of shapes, for one layer:

    D  hidden size              H  query heads              K  head dim
    Q  rank of the queries      G  groups of the output     O  rank of each group's output
    E  routed experts           A  active experts           F  inner size of an expert
    S  inner size of the shared expert                      V  vocabulary
    I  index heads              J  index head dim           N  residual streams
    M  tokens in a compression window                       X  2 where windows overlap, else 1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from model.config import LayerType, ModelConfig

Shape = tuple[int, ...]
Scope = Literal["model", "block", "mtp"]
DType = Literal["weights", "fp32", "int64"]
InitialValues = Literal["normal", "ones", "zeros", "hc_scale", "hc_base", "balanced_table"]
SplitBy = Literal["tensor", "expert"]


class Letters(NamedTuple):
    """Sizes of one layer under the letters of the module's docstring."""

    D: int
    H: int
    K: int
    Q: int
    G: int
    O: int
    E: int
    A: int
    F: int
    S: int
    V: int
    I: int
    J: int
    N: int
    M: int
    X: int

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
            S=config.moe_intermediate_size * config.n_shared_experts,
            V=config.vocab_size,
            I=config.index_n_heads,
            J=config.index_head_dim,
            N=config.hc_mult,
            M=config.compress_ratio(kind),
            X=2 if kind == "csa" else 1,
        )


@dataclass(frozen=True)
class Entry:
    """A parameter or buffer of every layer, of the MTP block, or of the model as a whole.

    Attributes:
        name: in memory, within its scope.
        group: the group that optimizer settings name; None for a buffer, which no gradient trains.
        shape: the whole shape, as on one rank.
        transformers: its name in ``transformers``, within the layer. Entries that share one are
            concatenated there along their second dimension, in the order of the table. None: it
            has no such tensor.
        scope: "block" entries are every layer's and the MTP block's.
        official: its name in DeepSeek's release, on disk, and in seeds, where it is not ``name``.
        dtype: "weights" follows the precision of the run.
        initial: see model/init.py.
        split: the ranks that divide it, and along which dimension. "expert" tensors are divided
            along their first dimension by expert ranks, and along this one by expert-tensor ranks.
            None: every rank of its pipeline stage has the whole tensor.
        matrices: how many independent matrices are stacked along the first dimension, for Muon;
            None for AdamW.
        per_head: their number where the settings give every query head a matrix.
        stacked: one matrix for each index of the first of three dimensions, each initialised and
            stored separately: experts.
        multiplies: whether a token is multiplied with it in a matrix product, as all that Muon
            trains is.
        layers, router: the kinds of layer and of router that have it; None means all.
    """

    name: str
    group: str | None
    shape: Callable[[Letters], Shape]
    transformers: str | None = None
    scope: Scope = "block"
    official: str | None = None
    dtype: DType = "weights"
    initial: InitialValues = "normal"
    split: tuple[SplitBy, int] | None = None
    matrices: Callable[[Letters], int] | None = None
    per_head: Callable[[Letters], int] | None = None
    stacked: bool = False
    multiplies: bool = False
    layers: tuple[LayerType, ...] | None = None
    router: Literal["hashed", "learned"] | None = None

    def exists(self, kind: LayerType, hashed: bool) -> bool:
        """Whether a layer with this attention and router has it."""
        if self.router is not None and hashed != (self.router == "hashed"):
            return False
        return self.layers is None or kind in self.layers


def one(sizes: Letters) -> int:
    """The number of matrices of a parameter that is a single one."""
    return 1


def matrix(
    name: str, group: str, shape: Callable[[Letters], Shape], transformers: str | None, **more: Any
) -> Entry:
    """An entry for ``name.weight``; ``more`` are its other attributes."""
    theirs = transformers and f"{transformers}.weight"
    return Entry(f"{name}.weight", group, shape, theirs, **({"matrices": one} | more))


def norm(
    name: str, width: Callable[[Letters], int], transformers: str | None, **more: Any
) -> Entry:
    """An entry for the weight of an RMSNorm."""
    more |= {"matrices": None, "dtype": "fp32", "initial": "ones"}
    return matrix(name, "norms", lambda s: (width(s),), transformers, **more)


def hyper_connection(
    name: str, rows: Callable[[Letters], int], scales: int, transformers: str | None, **more: Any
) -> tuple[Entry, ...]:
    """Entries for fn, base and scale of a hyper-connection or of a head of the streams."""

    def entry(leaf: str, shape: Callable[[Letters], Shape], initial: str, **muon: Any) -> Entry:
        rest: dict[str, Any] = {"initial": initial, "dtype": "fp32", **muon, **more}
        theirs = transformers and f"{transformers}{leaf}"
        official = f"{name}_{leaf}"
        return Entry(
            f"{name}.{leaf}", "hyper_connections", shape, theirs, official=official, **rest
        )

    return (
        entry("fn", lambda s: (rows(s), s.N * s.D), "normal", matrices=one),
        entry("base", lambda s: (rows(s),), "hc_base"),
        entry("scale", lambda s: (scales,), "hc_scale"),
    )


def compressor(
    name: str, group: str, width: Callable[[Letters], int], theirs: str, layers: tuple[str, ...]
) -> tuple[Entry, ...]:
    """Entries for a compressor with entries of this width."""

    def projection(leaf: str, their_leaf: str) -> Entry:
        shape = lambda s: (s.X * width(s), s.D)  # noqa: E731
        more: dict[str, Any] = {"matrices": lambda s: s.X, "layers": layers}
        return matrix(f"{name}.{leaf}", group, shape, f"{theirs}.{their_leaf}", **more)

    gate_bias = lambda s: (s.M, s.X * width(s))  # noqa: E731
    zeros: dict[str, Any] = {"dtype": "fp32", "initial": "zeros", "layers": layers}
    return (
        Entry(f"{name}.ape", group, gate_bias, f"{theirs}.position_bias", **zeros),
        projection("wkv", "kv_proj"),
        projection("wgate", "gate_proj"),
        norm(f"{name}.norm", width, f"{theirs}.kv_norm", layers=layers),
    )


def expert_stack(
    leaf: str, shape: Callable[[Letters], Shape], split_dim: int, theirs: str
) -> Entry:
    """An entry for one matrix of all routed experts."""
    return Entry(
        f"ffn.experts.{leaf}",
        "experts",
        lambda s: (s.E, *shape(s)),
        f"mlp.experts.{theirs}",
        split=("expert", split_dim),
        matrices=one,
        stacked=True,
    )


def shared_expert(
    leaf: str, shape: Callable[[Letters], Shape], split_dim: int, theirs: str
) -> Entry:
    """An entry for one matrix of the shared expert."""
    split = ("tensor", split_dim)
    theirs = f"mlp.shared_experts.{theirs}"
    return matrix(f"ffn.shared_experts.{leaf}", "shared_experts", shape, theirs, split=split)
