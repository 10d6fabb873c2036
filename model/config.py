"""Sizes and constants of a DeepSeek-V4 model.

Imports nothing heavier than pydantic, so that a configuration can be read on a login node.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from model.errors import ModelConfigError
from model.hf_config import fields_from_hf, fields_to_hf

LayerType = Literal["window", "csa", "hca"]
AttentionMode = Literal["select", "dense", "warmup", "sparse"]
"""Which entries CSA layers attend to, and what their indexers learn (report §2.3.1, §4.2; V3.2).

- dense: all entries; the indexer is not used.
- warmup: all entries; the indexer learns from the attention to them, everything else is frozen.
- sparse: the entries that the indexer selects; it learns from the attention to these.
- select: as sparse, but without the indexer's loss: evaluation, and runs without phases.
"""


Size = Annotated[int, Field(ge=1, le=10**9)]
Factor = Annotated[float, Field(gt=0, le=1e4)]
LossWeight = Annotated[float, Field(ge=0, le=1e4)]
Epsilon = Annotated[float, Field(ge=1e-12, le=1)]
"""An addend under a root or in a denominator, in fp32, where gradients divide by its powers."""
YarnFactor = Annotated[float, Field(gt=0, le=1e6)]
RopeBase = Annotated[float, Field(gt=1, le=1e12)]
"""With a base of 1 all pairs of dims would rotate alike, and YaRN would divide by its logarithm."""


class Section(BaseModel):
    """A part of a config: unknown keys, NaN and infinity are refused, and values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class Yarn(Section):
    """YaRN "by parts" in the layers with a compressor; the attention factor (mscale) is 1."""

    factor: YarnFactor
    """Context extension factor: extended length / original length."""
    original_max_position_embeddings: Size
    """Length before the extension. [tokens]"""
    beta_fast: YarnFactor
    """Dims with more rotations than this over the original length keep their frequency."""
    beta_slow: YarnFactor
    """Dims with fewer rotations than this have their frequency divided by `factor`."""


class ModelConfig(Section):
    """Everything that determines the mathematics of a V4 model; see docs/architecture-v4.md.

    Names follow the official ``config.json`` where one exists. Widths, ranks, numbers
    of layers and rope bases have no defaults: a silently assumed one trains the wrong model.
    """

    vocab_size: Size
    """V: vocabulary size. [tokens]"""
    hidden_size: Size
    """D: width of a residual stream. [dims]"""
    num_hidden_layers: Size
    """Number of layers, the MTP block excluded. [layers]"""
    max_position_embeddings: Size
    """Maximum row length. [tokens]"""

    # Attention (report §2.3)
    num_attention_heads: Size
    """H: query heads; they share one key-value head. [heads]"""
    head_dim: Size
    """K: width of a head. [dims]"""
    qk_rope_head_dim: Size
    """R: number of trailing dims of each query and key that RoPE rotates. [dims]"""
    q_lora_rank: Size
    """Q: rank of the queries' low-rank projection. [dims]"""
    o_groups: Size
    """G: groups of heads that have an output projection each. [groups]"""
    o_lora_rank: Size
    """O: rank of a group's output projection. [dims]"""
    sliding_window: Size
    """W: tokens that every layer attends to uncompressed. [tokens]"""
    layer_types: tuple[LayerType, ...]
    """Kind of each layer's attention: `window` alone, or window and compressed entries: `csa` those
    that the indexer selects, `hca` all."""
    csa_compress_ratio: Size = 4
    """m: tokens per compressed entry in CSA layers. [tokens]"""
    hca_compress_ratio: Size = 128
    """m: tokens per compressed entry in HCA layers. [tokens]"""
    index_n_heads: Size
    """I: heads of the indexer. [heads]"""
    index_head_dim: Size
    """J: width of an indexer head. [dims]"""
    index_topk: Size
    """Entries that the indexer selects for a query. [entries]"""
    rope_theta: RopeBase
    """Base of RoPE in window layers."""
    compress_rope_theta: RopeBase
    """Base of RoPE in CSA and HCA layers."""
    rope_scaling: Yarn | None
    """YaRN in CSA and HCA layers; null: none."""

    # Mixture of experts (report §2.1)
    num_hash_layers: NonNegativeInt
    """Number of leading layers that route by a hash table of token ids instead of a learned router.
    [layers]"""
    n_routed_experts: Size
    """E: routed experts of a layer. [experts]"""
    num_experts_per_tok: Size
    """A: routed experts of a token. [experts]"""
    n_shared_experts: Literal[1] = 1
    """Experts that every token goes through: one of the width of a routed one, as transformers and
    the official code build it. [experts]"""
    moe_intermediate_size: Size
    """F: inner width of an expert. [dims]"""
    routed_scaling_factor: Factor
    """Factor of the routed experts' normalised weights."""
    swiglu_limit: Factor = 10.0
    """Clamp of SwiGLU: the gate from above, the up projection to [-limit, limit]."""
    balance_loss_weight: LossWeight = 1e-4
    """Weight of the sequence-wise balance loss; 0 turns it off."""

    # Manifold-constrained hyper-connections (report §2.2)
    hc_mult: Size = 4
    """N: residual streams. [streams]"""
    hc_sinkhorn_iters: int = Field(default=20, ge=1, le=1000)
    """Sinkhorn iterations that normalise the mixing of streams. [iterations]"""
    hc_eps: Epsilon = 1e-6
    """Epsilon of hyper-connections: added to coefficients and to Sinkhorn's sums."""
    hc_init_scale: float = Field(default=0.01, ge=-100, le=100)
    """Initial gating factors (mHC paper)."""
    hc_init_own_read: float = Field(default=0.85, gt=0, lt=1)
    """Initial pre weight of the stream that a sub-layer mainly reads, n mod N in sub-layer n; the
    others share the rest. Unpublished: chosen so that streams stay distinguishable."""
    hc_init_comb_diagonal: float = Field(default=4.0, ge=-80, le=80)
    """Initial diagonal of comb's logits; the other logits start at 0. Unpublished: close to a plain
    residual."""

    # Multi-token prediction
    num_nextn_predict_layers: int = Field(default=1, ge=0, le=1)
    """MTP blocks, which predict one token further. [blocks]"""
    mtp_loss_weight: LossWeight = 0.3
    """Weight of the MTP loss (V3 §2.2) before the learning rate decays."""

    rms_norm_eps: Epsilon = 1e-6
    """Epsilon of RMSNorm."""
    initializer_range: float = Field(default=0.006, gt=0, le=10)
    """Standard deviation of initial weights."""
    bos_token_id: NonNegativeInt = 0
    """Id of the token that begins a document."""
    eos_token_id: NonNegativeInt = 1
    """Id of the token that ends a document."""
    pad_token_id: NonNegativeInt = 2
    """Id of the token at positions that packing leaves empty."""

    @model_validator(mode="after")
    def _has_a_type_per_layer(self) -> Self:
        """One entry of `layer_types` per layer of `num_hidden_layers`."""
        _require(
            len(self.layer_types) == self.num_hidden_layers,
            f"layer_types has {len(self.layer_types)} entries but num_hidden_layers is "
            f"{self.num_hidden_layers}; give one entry per layer",
        )
        return self

    @model_validator(mode="after")
    def _divides_heads_into_groups(self) -> Self:
        """`o_groups` divides `num_attention_heads`."""
        _require(
            self.num_attention_heads % self.o_groups == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of o_groups "
            f"({self.o_groups})",
        )
        return self

    @model_validator(mode="after")
    def _rotates_dims_of_a_head(self) -> Self:
        """`qk_rope_head_dim` is even and at most `head_dim`."""
        _require(
            self.qk_rope_head_dim % 2 == 0 and self.qk_rope_head_dim <= self.head_dim,
            f"qk_rope_head_dim ({self.qk_rope_head_dim}) must be even and at most head_dim "
            f"({self.head_dim})",
        )
        return self

    @model_validator(mode="after")
    def _rotates_dims_of_an_indexer_head(self) -> Self:
        """With CSA layers, `qk_rope_head_dim` is at most `index_head_dim`."""
        _require(
            "csa" not in self.layer_types or self.qk_rope_head_dim <= self.index_head_dim,
            f"qk_rope_head_dim ({self.qk_rope_head_dim}) must be at most index_head_dim "
            f"({self.index_head_dim}): the indexer rotates that many dims of its keys",
        )
        return self

    @model_validator(mode="after")
    def _has_even_heads(self) -> Self:
        """`head_dim` and `index_head_dim` are even."""
        _require(
            self.head_dim % 2 == 0 and self.index_head_dim % 2 == 0,
            f"head_dim ({self.head_dim}) and index_head_dim ({self.index_head_dim}) must be even",
        )
        return self

    @model_validator(mode="after")
    def _fits_grouped_matmuls(self) -> Self:
        """`hidden_size` and `moe_intermediate_size` are multiples of 8."""
        _require(
            self.hidden_size % 8 == 0 and self.moe_intermediate_size % 8 == 0,
            f"hidden_size ({self.hidden_size}) and moe_intermediate_size "
            f"({self.moe_intermediate_size}) must be multiples of 8: grouped matmuls need row "
            "strides that are multiples of 16 bytes",
        )
        return self

    @model_validator(mode="after")
    def _has_experts_for_a_token(self) -> Self:
        """`num_experts_per_tok` is at most `n_routed_experts`."""
        _require(
            self.num_experts_per_tok <= self.n_routed_experts,
            f"num_experts_per_tok ({self.num_experts_per_tok}) must be at most n_routed_experts "
            f"({self.n_routed_experts})",
        )
        return self

    @model_validator(mode="after")
    def _has_layers_to_hash(self) -> Self:
        """`num_hash_layers` is at most `num_hidden_layers`."""
        _require(
            self.num_hash_layers <= self.num_hidden_layers,
            f"num_hash_layers ({self.num_hash_layers}) must be at most num_hidden_layers "
            f"({self.num_hidden_layers})",
        )
        return self

    @model_validator(mode="after")
    def _has_special_tokens(self) -> Self:
        """Ids of special tokens are less than `vocab_size`."""
        special = max(self.bos_token_id, self.eos_token_id, self.pad_token_id)
        _require(
            special < self.vocab_size,
            f"vocab_size ({self.vocab_size}) must exceed bos_token_id, eos_token_id and "
            f"pad_token_id (largest is {special})",
        )
        return self

    def compress_ratio(self, layer_type: LayerType) -> int:
        """Returns the tokens per compressed entry in a layer of this type, 0 for none."""
        return {
            "window": 0,
            "csa": self.csa_compress_ratio,
            "hca": self.hca_compress_ratio,
        }[layer_type]

    @classmethod
    def from_hf(cls, config: dict[str, Any], **training: Any) -> ModelConfig:
        """Reads an official ``config.json``, or a ``to_dict()`` or ``config.json`` of transformers.

        ``training`` sets fields that such files do not carry (``balance_loss_weight``, ...), and
        takes precedence.

        Raises:
            ModelConfigError: a needed key is missing, or has an unsupported value.
        """
        fields = fields_from_hf(config)
        try:
            return cls(**(fields | training))
        except ValidationError as error:
            raise ModelConfigError(f"config.json: {_first_problem(error)}") from None

    def to_hf(self) -> dict[str, Any]:
        """Returns the official ``config.json``, which servers and ``transformers`` read."""
        return fields_to_hf(self.model_dump())


def _require(ok: bool, problem: str) -> None:
    if not ok:
        raise ModelConfigError(problem)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    if isinstance(reason := problem.get("ctx", {}).get("error"), ModelConfigError):
        return str(reason)
    name = ".".join(str(part) for part in problem["loc"])
    return f"{name} = {problem['input']!r}: {problem['msg']}"
