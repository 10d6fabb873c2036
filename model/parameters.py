"""The table of parameters: names, shapes, precision, initial values, sharding, optimizer, exports.

Adding a parameter touches the module that has it and this table, nothing else: initialisation
(model/init.py), names on disk (model/hf.py), sharding over ranks
(trainer/parallel/placement.py) and the optimizer's table (optim/partition.py) are read from here.

A line gives a parameter's name (in memory, within its layer), optimizer group, shape and name in
``transformers``; attributes of ``ParameterSpec`` other than the defaults follow. The defaults
are a parameter in the run's precision, normally initialised, replicated over ranks and trained by
AdamW; `matrix()` appends `.weight` and makes it a single Muon matrix.
The letters of the shapes are those of model/parameter_spec.py. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from model.config import LayerType, ModelConfig
from model.parameter_spec import (
    FP32,
    Letters,
    ParameterSpec,
    Shape,
    compressor,
    expert_stack,
    hyper_connection,
    matrix,
    norm,
    shared_expert,
)

Shapes = dict[str, Shape]

_FP32_ZEROS: dict[str, Any] = {**FP32, "initial": "zeros"}
_FP8: dict[str, Any] = {"released": "fp8"}
_VOCABULARY: dict[str, Any] = {"scope": "model", "matrices": None, "sharded": ("tensor", 0)}
_SHARD_DIM_0: dict[str, Any] = {"sharded": ("tensor", 0)}
_SHARD_DIM_1: dict[str, Any] = {"sharded": ("tensor", 1)}
_CSA: dict[str, Any] = {"layers": ("csa",)}

_BEFORE_LAYERS = (
    *hyper_connection("hc_head", lambda s: s.N, 1, "model.hc_head.hc_", scope="model"),
    matrix("embed", "embedding", lambda s: (s.V, s.D), "model.embed_tokens", **_VOCABULARY),
)
_AFTER_LAYERS = (
    norm("norm", lambda s: s.D, "model.norm", scope="model"),
    matrix("head", "head", lambda s: (s.V, s.D), "lm_head", counts_as_active=True, **_VOCABULARY),
)
_ATTENTION = (
    ParameterSpec(
        "attn.attn_sink",
        "attention",
        lambda s: (s.H,),
        "self_attn.sinks",
        **_FP32_ZEROS | _SHARD_DIM_0,
    ),
    matrix("attn.wq_a", "attention", lambda s: (s.Q, s.D), "self_attn.q_a_proj", **_FP8),
    norm("attn.q_norm", lambda s: s.Q, "self_attn.q_a_norm"),
    matrix(
        "attn.wq_b",
        "attention",
        lambda s: (s.H * s.K, s.Q),
        "self_attn.q_b_proj",
        **_FP8 | _SHARD_DIM_0 | {"per_head": lambda s: s.H},
    ),
    matrix("attn.wkv", "attention", lambda s: (s.K, s.D), "self_attn.kv_proj", **_FP8),
    norm("attn.kv_norm", lambda s: s.K, "self_attn.kv_norm"),
    matrix(
        "attn.wo_a",
        "attention",
        lambda s: (s.G * s.O, s.H * s.K // s.G),
        "self_attn.o_a_proj",
        **_FP8 | _SHARD_DIM_0 | {"matrices": lambda s: s.G},
    ),
    matrix(
        "attn.wo_b",
        "attention",
        lambda s: (s.D, s.G * s.O),
        "self_attn.o_b_proj",
        **_FP8 | _SHARD_DIM_1,
    ),
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
        **_FP8 | _CSA | {"per_head": lambda s: s.I},
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
    ParameterSpec(
        "ffn.gate.bias",
        None,
        lambda s: (s.E,),
        "mlp.gate.e_score_correction_bias",
        **_FP32_ZEROS | {"router": "learned"},
    ),
    ParameterSpec(
        "ffn.gate.tid2eid",
        None,
        lambda s: (s.V, s.A),
        "mlp.gate.tid2eid",
        dtype="int64",
        released="int64",
        initial="balanced_table",
        router="hashed",
    ),
    expert_stack("w1", lambda s: (s.F, s.D), 1, "gate_up_proj"),
    expert_stack("w2", lambda s: (s.D, s.F), 2, "down_proj"),
    expert_stack("w3", lambda s: (s.F, s.D), 1, "gate_up_proj"),
    shared_expert("w1", lambda s: (s.F, s.D), 0, "gate_proj"),
    shared_expert("w2", lambda s: (s.D, s.F), 1, "down_proj"),
    shared_expert("w3", lambda s: (s.F, s.D), 0, "up_proj"),
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
# Every block's, with what the MTP block adds; ``transformers`` has no MTP.
_BLOCK_AND_MTP = (
    *_HYPER_CONNECTIONS,
    *hyper_connection("hc_head", lambda s: s.N, 1, None, scope="mtp"),
    *_SUBLAYERS,
    matrix("e_proj", "mtp", lambda s: (s.D, s.D), None, scope="mtp", **_FP8),
    matrix("h_proj", "mtp", lambda s: (s.D, s.D), None, scope="mtp", **_FP8),
    *(norm(name, lambda s: s.D, None, scope="mtp") for name in ("enorm", "hnorm", "norm")),
)

TABLE: tuple[ParameterSpec, ...] = (*_BEFORE_LAYERS, *_AFTER_LAYERS, *_BLOCK_AND_MTP)

_PREFIX = re.compile(r"((?:layers|mtp)\.\d+\.)?(.*)")
_OFFICIAL_EXPERT = re.compile(r"(.*)\.(\d+)\.([^.]*)\.weight")


def _in_scope(spec: ParameterSpec, prefix: str) -> bool:
    if not prefix:
        return spec.scope == "model"
    return spec.scope == "block" or (spec.scope == "mtp" and prefix.startswith("mtp."))


def split_name(name: str) -> tuple[str, str]:
    """Returns ``layers.3.`` or ``mtp.0.`` or nothing, and the name within that scope."""
    match = _PREFIX.fullmatch(name)
    assert match is not None
    return match[1] or "", match[2]


def spec_of(name: str) -> ParameterSpec:
    """Returns the spec of a parameter or buffer by its full name in memory.

    Raises KeyError for a name that no V4 model has.
    """
    prefix, rest = split_name(name)
    for spec in TABLE:
        if spec.name == rest and _in_scope(spec, prefix):
            return spec
    raise KeyError(name)


def official_name(name: str) -> str:
    """Returns the name under which a tensor is stored and seeded, from its name in memory.

    Hyper-connections are modules in memory and flat names in the release (`layers.0.hc_attn.fn`
    and `layers.0.hc_attn_fn`). Experts stay stacked; see ``expert_name``.
    """
    return split_name(name)[0] + (spec_of(name).official or spec_of(name).name)


def expert_name(stack: str, expert: int) -> str:
    """Returns the official name of one expert's matrix: `ffn.experts.w1` gives `...3.w1.weight`."""
    experts, _, matrix = stack.rpartition(".")
    return f"{experts}.{expert}.{matrix}.weight"


def memory_name(official: str) -> tuple[str, int | None]:
    """Returns the name in memory, and the expert's number if it is one matrix of a stack.

    Names that are not V4 weights are returned unchanged.
    """
    prefix, rest = split_name(official)
    for spec in TABLE:
        if not _in_scope(spec, prefix):
            continue
        if rest == (spec.official or spec.name):
            return prefix + spec.name, None
        match = _OFFICIAL_EXPERT.fullmatch(rest) if spec.stacked else None
        if match is not None and f"{match[1]}.{match[3]}" == spec.name:
            return prefix + spec.name, int(match[2])
    return official, None


def transformers_name(name: str) -> str | None:
    """Returns the in-memory name in ``transformers``, or None if it has no such tensor."""
    prefix, _ = split_name(name)
    hf_name = spec_of(name).transformers
    if hf_name is None or prefix.startswith("mtp."):
        return None
    return f"model.{prefix}{hf_name}" if prefix else hf_name


def always_fp32(name: str) -> bool:
    """Whether a parameter or buffer is in fp32 in a model of any precision."""
    return spec_of(name).dtype == "fp32"


def group_of(name: str) -> str:
    """Returns the optimizer parameter group, as the config names it."""
    group = spec_of(name).group
    if group is None:
        raise KeyError(name)
    return group


@dataclass(frozen=True)
class Parameter:
    """A spec in one model: the parameter or buffer ``name`` of a layer with these sizes."""

    name: str
    spec: ParameterSpec
    letters: Letters

    @property
    def shape(self) -> Shape:
        """The global shape."""
        return self.spec.shape(self.letters)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def group(self) -> str:
        """The optimizer parameter group, as the config names it."""
        assert self.spec.group is not None
        return self.spec.group

    @property
    def stacked(self) -> bool:
        """Whether it is one matrix per expert, stacked along the first of three dimensions."""
        return self.spec.stacked

    @property
    def matrices(self) -> int | None:
        """Number of independent Muon matrices along the rows; None for AdamW.

        A stacked parameter has one per expert, whatever the number.
        """
        count = self.spec.matrices
        return None if count is None else count(self.letters)

    @property
    def matrices_if_per_head(self) -> int | None:
        """Number of Muon matrices if every query head is one; else ``matrices``."""
        count = self.spec.per_head or self.spec.matrices
        return None if count is None else count(self.letters)

    @property
    def active_numel(self) -> int:
        """Number of elements that take part in one token's matmuls (A of E experts)."""
        if self.spec.matrices is None and not self.spec.counts_as_active:
            return 0
        if self.spec.stacked:
            return self.numel // self.letters.E * self.letters.A
        return self.numel


def tensors_of(config: ModelConfig) -> Iterator[Parameter]:
    """Yields every parameter and buffer of ``V4Model(config)``.

    Parameters come in the order of ``named_parameters()``, on which the optimizer's layout depends.
    """

    def scope(prefix: str, kind: LayerType = "window", hashed: bool = False) -> Iterator[Parameter]:
        letters = Letters.of(config, kind)
        for spec in TABLE:
            if _in_scope(spec, prefix) and spec.exists(kind, hashed):
                yield Parameter(prefix + spec.name, spec, letters)

    model = list(scope(""))
    yield from (line for line in model if line.spec not in _AFTER_LAYERS)
    for row, kind in enumerate(config.layer_types):
        yield from scope(f"layers.{row}.", kind, row < config.num_hash_layers)
    yield from (line for line in model if line.spec in _AFTER_LAYERS)
    for number in range(config.num_nextn_predict_layers):
        yield from scope(f"mtp.{number}.")


def parameter_table(config: ModelConfig) -> dict[str, Parameter]:
    """Returns the trained parameters by name in memory, those of ``named_parameters()``."""
    return {line.name: line for line in tensors_of(config) if line.spec.group is not None}


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Returns the shapes of the trained parameters by name."""
    return {name: line.shape for name, line in parameter_table(config).items()}


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of trained parameters; router biases and hash tables are not among them.

    Attributes:
        main: all of the model but MTP.
        mtp: what the MTP block adds. Embedding and head are the main model's.
        active: parameters used in one token's matmuls in the main model: A of the E
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
    """Returns parameter counts as V4's report states them: 284B and 13B active for Flash."""
    lines = parameter_table(config).values()
    main = [line for line in lines if not line.name.startswith("mtp.")]
    total = sum(line.numel for line in lines)
    size = sum(line.numel for line in main)
    return ParameterCounts(size, total - size, sum(line.active_numel for line in main))
