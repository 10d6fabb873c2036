"""The table of parameters: names, shapes, precision, initial values, division, optimizer, exports.

Adding a parameter touches the module that has it and this table, nothing else: initialisation
(model/init.py), names on disk (model/hf.py), the division over ranks
(trainer/parallel/placement.py) and the optimizer's table (optim/partition.py) are read from here.

A line gives a parameter's name (in memory, within its layer), optimizer group, shape and name in
``transformers``; attributes of ``Entry`` that are not the usual ones follow. The usual parameter is
a matrix of the run's precision with normal initial values, whole on every rank, and one matrix for
Muon. The letters of the shapes are those of model/parameter_entry.py. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from model.config import LayerType, ModelConfig
from model.parameter_entry import (
    Entry,
    Letters,
    Shape,
    compressor,
    expert_stack,
    hyper_connection,
    matrix,
    norm,
    shared_expert,
)

Shapes = dict[str, Shape]

_FP32_ZEROS: dict[str, Any] = {"dtype": "fp32", "initial": "zeros"}
_VOCABULARY: dict[str, Any] = {"scope": "model", "matrices": None, "split": ("tensor", 0)}
_ROWS: dict[str, Any] = {"split": ("tensor", 0)}
_COLUMNS: dict[str, Any] = {"split": ("tensor", 1)}
_CSA: dict[str, Any] = {"layers": ("csa",)}

_BEFORE_LAYERS = (
    *hyper_connection("hc_head", lambda s: s.N, 1, "model.hc_head.hc_", scope="model"),
    matrix("embed", "embedding", lambda s: (s.V, s.D), "model.embed_tokens", **_VOCABULARY),
)
_AFTER_LAYERS = (
    norm("norm", lambda s: s.D, "model.norm", scope="model"),
    matrix("head", "head", lambda s: (s.V, s.D), "lm_head", multiplies=True, **_VOCABULARY),
)
_ATTENTION = (
    Entry(
        "attn.attn_sink",
        "attention",
        lambda s: (s.H,),
        "self_attn.sinks",
        **_FP32_ZEROS | _ROWS,
    ),
    matrix("attn.wq_a", "attention", lambda s: (s.Q, s.D), "self_attn.q_a_proj"),
    norm("attn.q_norm", lambda s: s.Q, "self_attn.q_a_norm"),
    matrix(
        "attn.wq_b",
        "attention",
        lambda s: (s.H * s.K, s.Q),
        "self_attn.q_b_proj",
        **_ROWS | {"per_head": lambda s: s.H},
    ),
    matrix("attn.wkv", "attention", lambda s: (s.K, s.D), "self_attn.kv_proj"),
    norm("attn.kv_norm", lambda s: s.K, "self_attn.kv_norm"),
    matrix(
        "attn.wo_a",
        "attention",
        lambda s: (s.G * s.O, s.H * s.K // s.G),
        "self_attn.o_a_proj",
        **_ROWS | {"matrices": lambda s: s.G},
    ),
    matrix("attn.wo_b", "attention", lambda s: (s.D, s.G * s.O), "self_attn.o_b_proj", **_COLUMNS),
    *compressor(
        "attn.compressor",
        "compressor",
        lambda s: s.K,
        "self_attn.compressor",
        layers=("csa", "hca"),
    ),
    matrix(
        "attn.indexer.wq_b",
        "indexer",
        lambda s: (s.I * s.J, s.Q),
        "self_attn.compressor.indexer.q_b_proj",
        **_CSA | {"per_head": lambda s: s.I},
    ),
    matrix(
        "attn.indexer.weights_proj",
        "indexer",
        lambda s: (s.I, s.D),
        "self_attn.compressor.indexer.scorer.weights_proj",
        **_CSA,
    ),
    *compressor(
        "attn.indexer.compressor",
        "indexer",
        lambda s: s.J,
        "self_attn.compressor.indexer",
        layers=("csa",),
    ),
)
_EXPERTS = (
    matrix("ffn.gate", "router", lambda s: (s.E, s.D), "mlp.gate"),
    Entry(
        "ffn.gate.bias",
        None,
        lambda s: (s.E,),
        "mlp.gate.e_score_correction_bias",
        **_FP32_ZEROS | {"router": "learned"},
    ),
    Entry(
        "ffn.gate.tid2eid",
        None,
        lambda s: (s.V, s.A),
        "mlp.gate.tid2eid",
        dtype="int64",
        initial="balanced_table",
        router="hashed",
    ),
    expert_stack("w1", lambda s: (s.F, s.D), 1, "gate_up_proj"),
    expert_stack("w2", lambda s: (s.D, s.F), 2, "down_proj"),
    expert_stack("w3", lambda s: (s.F, s.D), 1, "gate_up_proj"),
    shared_expert("w1", lambda s: (s.S, s.D), 0, "gate_proj"),
    shared_expert("w2", lambda s: (s.D, s.S), 1, "down_proj"),
    shared_expert("w3", lambda s: (s.S, s.D), 0, "up_proj"),
)
_HYPER_CONNECTIONS = (
    *hyper_connection("hc_attn", lambda s: (2 + s.N) * s.N, 3, "attn_hc."),
    *hyper_connection("hc_ffn", lambda s: (2 + s.N) * s.N, 3, "ffn_hc."),
)
_SUBLAYERS = (
    norm("attn_norm", lambda s: s.D, "input_layernorm"),
    norm("ffn_norm", lambda s: s.D, "post_attention_layernorm"),
    *_ATTENTION,
    *_EXPERTS,
)
# Every block, with what the MTP block adds; ``transformers`` has no MTP.
_MTP_BLOCK = (
    *_HYPER_CONNECTIONS,
    *hyper_connection("hc_head", lambda s: s.N, 1, None, scope="mtp"),
    *_SUBLAYERS,
    *(matrix(n, "mtp", lambda s: (s.D, s.D), None, scope="mtp") for n in ("e_proj", "h_proj")),
    *(norm(name, lambda s: s.D, None, scope="mtp") for name in ("enorm", "hnorm", "norm")),
)

TABLE: tuple[Entry, ...] = (*_BEFORE_LAYERS, *_AFTER_LAYERS, *_MTP_BLOCK)

_PREFIX = re.compile(r"((?:layers|mtp)\.\d+\.)?(.*)")
_OFFICIAL_EXPERT = re.compile(r"(.*)\.(\d+)\.([^.]*)\.weight")


def _in_scope(entry: Entry, prefix: str) -> bool:
    if not prefix:
        return entry.scope == "model"
    return entry.scope == "block" or (entry.scope == "mtp" and prefix.startswith("mtp."))


def split_name(name: str) -> tuple[str, str]:
    """Returns ``layers.3.`` or ``mtp.0.`` or nothing, and the name within that scope."""
    match = _PREFIX.fullmatch(name)
    assert match is not None
    return match[1] or "", match[2]


def entry_of(name: str) -> Entry:
    """Returns the entry of a parameter or buffer by its whole name in memory.

    Raises KeyError for a name that no V4 model has.
    """
    prefix, rest = split_name(name)
    for entry in TABLE:
        if entry.name == rest and _in_scope(entry, prefix):
            return entry
    raise KeyError(name)


def official_name(name: str) -> str:
    """Returns the name under which a tensor is stored and seeded, from its name in memory.

    Hyper-connections are modules in memory and flat names in the release (`layers.0.hc_attn.fn`
    and `layers.0.hc_attn_fn`). Experts stay stacked; see ``expert_name``.
    """
    return split_name(name)[0] + (entry_of(name).official or entry_of(name).name)


def expert_name(stack: str, expert: int) -> str:
    """Returns the official name of one expert's matrix: `ffn.experts.w1` gives `...3.w1.weight`."""
    experts, _, matrix = stack.rpartition(".")
    return f"{experts}.{expert}.{matrix}.weight"


def memory_name(official: str) -> tuple[str, int | None]:
    """Returns the name in memory, and the expert's number if it is one matrix of a stack.

    A name of no V4 weight comes back as it is.
    """
    prefix, rest = split_name(official)
    for entry in TABLE:
        if not _in_scope(entry, prefix):
            continue
        if rest == (entry.official or entry.name):
            return prefix + entry.name, None
        match = _OFFICIAL_EXPERT.fullmatch(rest) if entry.stacked else None
        if match is not None and f"{match[1]}.{match[3]}" == entry.name:
            return prefix + entry.name, int(match[2])
    return official, None


def transformers_name(name: str) -> str | None:
    """Returns the name in ``transformers``' memory; None where it has no such tensor."""
    prefix, _ = split_name(name)
    theirs = entry_of(name).transformers
    if theirs is None or prefix.startswith("mtp."):
        return None
    return f"model.{prefix}{theirs}" if prefix else theirs


def always_fp32(name: str) -> bool:
    """Whether a parameter or buffer is in fp32 in a model of any precision."""
    return entry_of(name).dtype == "fp32"


def group_of(name: str) -> str:
    """Returns the group of a parameter that optimizer settings name."""
    group = entry_of(name).group
    if group is None:
        raise KeyError(name)
    return group


@dataclass(frozen=True)
class Parameter:
    """An entry in one model: the parameter or buffer ``name`` of a layer with these sizes."""

    name: str
    entry: Entry
    letters: Letters

    @property
    def shape(self) -> Shape:
        """The whole shape."""
        return self.entry.shape(self.letters)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def group(self) -> str:
        """The group that optimizer settings name."""
        assert self.entry.group is not None
        return self.entry.group

    @property
    def stacked(self) -> bool:
        """Whether each index of the first of three dimensions is a matrix."""
        return self.entry.stacked

    @property
    def matrices(self) -> int | None:
        """How many independent matrices are stacked along the rows; None for AdamW."""
        count = self.entry.matrices
        return None if count is None else count(self.letters)

    @property
    def matrices_per_head(self) -> int | None:
        """The same where every query head is a matrix."""
        count = self.entry.per_head or self.entry.matrices
        return None if count is None else count(self.letters)

    @property
    def multiplied(self) -> int:
        """The number of elements that one token is multiplied with."""
        if self.entry.matrices is None and not self.entry.multiplies:
            return 0
        if self.entry.stacked:
            return self.numel // self.letters.E * self.letters.A
        return self.numel


def tensors_of(config: ModelConfig) -> Iterator[Parameter]:
    """Yields every parameter and buffer of ``V4Model(config)``.

    Parameters come in the order of ``named_parameters()``, on which the optimizer's layout depends.
    """

    def scope(prefix: str, kind: LayerType = "window", hashed: bool = False) -> Iterator[Parameter]:
        letters = Letters.of(config, kind)
        for entry in TABLE:
            if _in_scope(entry, prefix) and entry.exists(kind, hashed):
                yield Parameter(prefix + entry.name, entry, letters)

    model = list(scope(""))
    yield from (line for line in model if line.entry not in _AFTER_LAYERS)
    for row, kind in enumerate(config.layer_types):
        yield from scope(f"layers.{row}.", kind, row < config.num_hash_layers)
    yield from (line for line in model if line.entry in _AFTER_LAYERS)
    for number in range(config.num_nextn_predict_layers):
        yield from scope(f"mtp.{number}.")


def parameter_table(config: ModelConfig) -> dict[str, Parameter]:
    """Returns the trained parameters by name in memory, those of ``named_parameters()``."""
    return {line.name: line for line in tensors_of(config) if line.entry.group is not None}


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Returns the shapes of the trained parameters by name."""
    return {name: line.shape for name, line in parameter_table(config).items()}


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of trained parameters; router biases and hash tables are not among them.

    Attributes:
        main: all of the model but MTP.
        mtp: what the MTP block adds. Embedding and head are the main model's.
        active: what one token multiplies with in matrix products of the main model: A of the E
            routed experts, the shared one, projections, routers, hyper-connections and the output
            head. The embedding, which is looked up, and vectors and tables that act element by
            element (norms, sinks, positional gate biases) are not counted.
    """

    main: int
    mtp: int
    active: int

    @property
    def total(self) -> int:
        """All trained parameters."""
        return self.main + self.mtp


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Returns the sizes that V4's report and release print: 284B and 13B active for Flash."""
    lines = parameter_table(config).values()
    main = [line for line in lines if not line.name.startswith("mtp.")]
    total = sum(line.numel for line in lines)
    size = sum(line.numel for line in main)
    return ParameterCounts(size, total - size, sum(line.multiplied for line in main))
