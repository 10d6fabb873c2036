"""A bf16 model compared with an fp32 model of the same weights: losses, gradients, logits."""

from __future__ import annotations

import torch

from model import IGNORE_INDEX, SampleLayout, V4Model
from tests.model.tiny import random_model, random_tokens, tiny_config


def pair_of_models() -> tuple[V4Model, V4Model]:
    """All experts and all entries are chosen: a choice that rounding flips would be no error."""
    config = tiny_config(
        n_routed_experts=4, num_experts_per_tok=4, index_topk=512, initializer_range=0.05
    )
    low = random_model(config, dtype=torch.bfloat16)
    high = V4Model(config)
    high.load_hf_state_dict(low.hf_state_dict())
    return low, high


def losses_and_gradients(model: V4Model):
    tokens = random_tokens(model.config, 2, 90)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    layout = SampleLayout.from_lengths([[7, 83], [50, 39]], seq_len=90)
    output = model(tokens, layout, targets)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters()}


def test_losses_and_gradients_are_close_and_of_the_right_type():
    low, high = pair_of_models()
    ours, grads = losses_and_gradients(low)
    exact, exact_grads = losses_and_gradients(high)
    assert ours.loss.dtype == torch.float32
    for name in ("loss", "lm_loss", "mtp_loss", "balance_loss"):
        value, reference = getattr(ours, name).item(), getattr(exact, name).item()
        assert abs(value - reference) < 5e-3 * abs(reference), name
    compared = 0
    for name, parameter in low.named_parameters():
        if exact_grads[name] is None:
            assert grads[name] is None and ".indexer." in name
            continue
        assert grads[name].dtype == parameter.dtype and grads[name].isfinite().all(), name
        value, reference = grads[name].flatten().double(), exact_grads[name].flatten().double()
        # The few factors and biases are sums over all tokens that nearly cancel.
        if len(reference) > 100:
            error = float((value - reference).norm() / reference.norm())
            assert error < (0.1 if "hc_head" in name else 0.03), f"{name}: {error:.3f}"
            compared += 1
    assert compared > 60


def test_logits_are_close():
    low, high = pair_of_models()
    tokens = random_tokens(low.config, 1, 90)
    with torch.no_grad():
        ours, exact = low(tokens).logits, high(tokens).logits
    assert ours.dtype == torch.bfloat16
    assert float((ours.float() - exact).norm() / exact.norm()) < 0.03
