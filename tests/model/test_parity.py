"""The mathematics against transformers' implementation, in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.model.tiny import (
    gradient_scale,
    random_model,
    random_tokens,
    relative_error,
    tiny_config,
    transformers_twin,
)

# Logits and gradients are sums of a few thousand fp32 products taken in another order.
LOGITS_RTOL, GRADS_RTOL = 2e-5, 1e-4

CONFIGURATIONS = {
    "window only": ({"num_hidden_layers": 2, "layer_types": ("window", "window")}, 1, 37),
    "csa, more entries than top-k": ({"num_hidden_layers": 1, "layer_types": ("csa",)}, 2, 61),
    "csa, top-k never binds": (
        {"num_hidden_layers": 2, "layer_types": ("csa", "csa"), "index_topk": 512},
        1,
        75,
    ),
    "hca": ({"num_hidden_layers": 2, "layer_types": ("hca", "hca")}, 2, 83),
    "all types, learned": ({"num_hash_layers": 0}, 1, 131),
    "all types, hash and learned": ({"num_hash_layers": 2}, 2, 67),
    "shorter than one csa window": ({}, 2, 3),
    "one token": ({}, 1, 1),
    "odd sizes, one group, three streams": (
        {
            "hidden_size": 40,
            "num_attention_heads": 3,
            "head_dim": 22,
            "qk_rope_head_dim": 6,
            "q_lora_rank": 13,
            "o_groups": 1,
            "o_lora_rank": 9,
            "sliding_window": 5,
            "index_head_dim": 10,
            "moe_intermediate_size": 8,
            "n_routed_experts": 7,
            "hc_mult": 3,
        },
        2,
        45,
    ),
    "real ratios and window": (
        {"hca_compress_ratio": 128, "sliding_window": 128, "index_topk": 32},
        1,
        389,
    ),
    "tight clamp, two experts": (
        {"swiglu_limit": 0.05, "num_experts_per_tok": 2, "n_routed_experts": 4},
        1,
        50,
    ),
    "no yarn, full rotary": ({"rope_scaling": None, "qk_rope_head_dim": 16}, 1, 50),
}


def run_both(changes, rows, length, break_ours=None):
    """Worst relative errors of logits and gradients, and the parameters compared."""
    config = tiny_config(**changes)
    model = random_model(config)
    twin = transformers_twin(model)
    if break_ours is not None:
        with torch.no_grad():
            break_ours(model)
    tokens = random_tokens(config, rows, length)
    weight = torch.randn(
        rows, length, config.vocab_size, generator=torch.Generator().manual_seed(5)
    )
    ours = model(tokens).logits
    (ours * weight).sum().backward()
    theirs = twin(tokens, use_cache=False).logits
    (theirs * weight).sum().backward()
    grads = model.hf_state_dict(grads=True)
    their_grads = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    errors = {}
    for name, parameter in twin.named_parameters():
        if parameter.grad is None:
            assert name not in grads, f"{name} has a gradient here and none there"
        elif parameter.grad.abs().max() == 0:
            assert grads.get(name) is None or grads[name].abs().max() == 0, name
        else:
            difference = float((grads[name] - parameter.grad).abs().max())
            errors[name] = difference / gradient_scale(name, their_grads)
    return relative_error(ours, theirs), errors


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_and_gradients_equal_transformers(name):
    logits_error, gradient_errors = run_both(*CONFIGURATIONS[name])
    assert logits_error < LOGITS_RTOL
    assert len(gradient_errors) > 10
    worst = max(gradient_errors, key=gradient_errors.get)
    assert gradient_errors[worst] < GRADS_RTOL, f"{worst}: {gradient_errors[worst]:.2e}"


def _transpose_comb(model):
    rows = model.layers[1].hc_attn.base[8:].view(4, 4)
    rows.copy_(rows.t().clone())


@pytest.mark.parametrize(
    "break_ours",
    [
        _transpose_comb,
        lambda model: model.layers[0].attn.attn_sink.add_(0.01),
        lambda model: model.layers[2].attn.compressor.ape[3].add_(0.05),
        lambda model: model.layers[3].ffn.experts.w3[2].mul_(1.01),
    ],
    ids=["comb transposed", "sink moved", "ape moved", "one expert scaled"],
)
def test_a_small_fault_is_detected(break_ours):
    """The negative control: faults far smaller than a wrong formula exceed the tolerance."""
    logits_error, _ = run_both({}, 1, 67, break_ours)
    assert logits_error > 10 * LOGITS_RTOL


def test_cross_entropy_loss_equals_transformers():
    config = tiny_config(num_nextn_predict_layers=0, balance_loss_weight=0.0)
    model = random_model(config)
    twin = transformers_twin(model)
    tokens = random_tokens(config, 2, 67)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    loss = model(tokens, targets=targets).loss
    logits = twin(tokens, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    expected.backward()
    assert abs(float((loss - expected).detach())) < 1e-5
    grads = model.hf_state_dict(grads=True)
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            assert relative_error(grads[name], parameter.grad) < GRADS_RTOL, name
