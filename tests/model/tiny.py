"""Tiny models and their transformers twins, shared by the model's tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model import ModelConfig, V4Model
from model.execution import LOCAL, Execution

if TYPE_CHECKING:
    from transformers import DeepseekV4ForCausalLM

YARN = {"factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}


def tiny_config(**changes: Any) -> ModelConfig:
    """A V4 model of a few thousand parameters with every layer type."""
    fields: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 24,
        "o_groups": 2,
        "o_lora_rank": 12,
        "sliding_window": 8,
        "layer_types": ("window", "csa", "hca", "csa"),
        "csa_compress_ratio": 4,
        "hca_compress_ratio": 16,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 6,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": YARN,
        "num_hash_layers": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "routed_scaling_factor": 1.5,
        "num_nextn_predict_layers": 1,
        "initializer_range": 0.1,
    }
    return ModelConfig(**(fields | changes))


def random_model(
    config: ModelConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    execution: Execution = LOCAL,
) -> V4Model:
    """A model in which nothing is at a special value: sinks, ape, biases and norms are random."""
    model = V4Model(config, dtype, execution)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor, scale: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * scale

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(noise(parameter, 0.2))
            elif name.endswith(("attn_sink", "ape", ".base")):
                parameter.add_(noise(parameter, 0.7))
            elif name.endswith(".scale"):
                parameter.copy_(0.5 + noise(parameter, 0.3))
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.copy_(noise(buffer, 0.1))
    return model


def transformers_twin(model: V4Model) -> DeepseekV4ForCausalLM:
    """The transformers model with the same weights; fails if a name is missing or unexpected."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM  # takes seconds

    config = DeepseekV4Config(**model.config.to_hf())
    config._attn_implementation = "eager"
    twin = DeepseekV4ForCausalLM(config).float()
    state = {n: t for n, t in model.hf_state_dict().items() if not n.startswith("mtp.")}
    twin.load_state_dict(state, strict=True)
    return twin.train()


def random_tokens(config: ModelConfig, rows: int, length: int, seed: int = 0) -> Tensor:
    """Token ids without the special ones (transformers gives its padding id no gradient)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(3, config.vocab_size, (rows, length), generator=generator)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max |value - reference| over the largest reference value."""
    value, reference = value.detach(), reference.detach()
    return float((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30))


def gradient_scale(name: str, grads: Mapping[str, Tensor]) -> float:
    """What the rounding of a gradient is measured against: its largest element.

    A gating factor of a hyper-connection is one number, whose gradient sums terms of both signs
    over all tokens and can come out far smaller than its terms; its rounding does not. It is
    measured against all gradients of its connection, which sum the same terms. The same
    holds for the biases of a head's connection, one number a stream, next to the gradient of fn:
    those of MTP's head sum terms of 4e-3 in total to 7e-5, with fn's at 4e-4.
    """
    family = [name]
    if name.endswith("hc_head.base"):
        family.append(name.removesuffix("base") + "fn")
    if name.endswith("scale"):
        family = [name.removesuffix("scale") + part for part in ("fn", "base", "scale")]
    return max(float(grads[member].abs().max()) for member in family)
