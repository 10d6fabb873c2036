"""Multi-token prediction against a dense float64 reference that runs one sample at a time."""

from __future__ import annotations

import pytest
import torch

from model import IGNORE_INDEX, SampleLayout, TokenCounts, V4Model
from tests.model.dense_reference import mtp_nll
from tests.model.tiny import random_model, random_tokens, relative_error, tiny_config

CONFIG = {"num_hidden_layers": 2, "layer_types": ("csa", "window"), "balance_loss_weight": 0.0}
# Whole rows; packed rows with samples too short to predict anything; padding after them.
CASES = {
    "one row": [[21]],
    "two rows": [[13], [13]],
    "packed": [[1, 2, 3, 9, 20], [17, 18]],
    "padded": [[4, 12], [19]],
}
Captured = dict[str, torch.Tensor]


def run_model(model: V4Model, tokens, layout, targets, weight: float) -> tuple[Captured, object]:
    """Gradients with the streams cut off the main model, so that only the heads' share remains."""
    cut = {}

    def detach(module, inputs, output):
        cut["streams"] = output[0].detach().requires_grad_()
        return cut["streams"], output[1]

    hook = model.layers[-1].register_forward_hook(detach)
    model.zero_grad()
    output = model(tokens, layout, targets, mtp_loss_weight=weight)
    output.loss.backward()
    hook.remove()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return grads | {"streams": cut["streams"].grad, "streams value": cut["streams"]}, output


def run_reference(model, streams, lengths, layout, tokens, targets, cross_samples=False):
    """Loss and the gradients of the MTP block, embedding, head and streams."""
    p = {
        n.removeprefix("mtp.0."): t.detach().double().requires_grad_()
        for n, t in model.mtp[0].named_parameters()
    }
    p["ffn.gate.bias"] = model.mtp[0].ffn.gate.bias.double()
    p["embed"] = model.embed.weight.detach().double().requires_grad_()
    p["head"] = model.head.weight.detach().double().requires_grad_()
    leaf = streams.detach().double().requires_grad_()
    tokens_T, targets_T = tokens.flatten(), targets.flatten()
    if cross_samples:
        lengths = [[sum(row)] for row in lengths]
    total, count = 0.0, 0
    for row, samples in enumerate(lengths):
        start = row * layout.seq_len
        for n in samples:
            # At i the block knows t_0..t_{i+1} and predicts t_{i+2}, the main target of i + 1.
            at = [i for i in range(start, start + n - 1) if targets_T[i + 1] != IGNORE_INDEX]
            if at:
                first, last = at[0], at[-1]
                assert at == list(range(first, last + 1)) and first == start
                following = slice(first + 1, last + 2)
                total = total + mtp_nll(
                    p,
                    leaf[first : last + 1],
                    tokens_T[following],
                    targets_T[following],
                    model.config,
                )
                count += len(at)
            start += n
    (total / count).backward()
    grads = {f"mtp.0.{n}": t.grad for n, t in p.items() if n not in ("embed", "head")}
    grads |= {"embed.weight": p["embed"].grad, "head.weight": p["head"].grad, "streams": leaf.grad}
    return float(total.detach()) / count, count, grads


def make_case(name: str, last_target_known: bool):
    config = tiny_config(**CONFIG)
    model = random_model(config, seed=3)
    lengths = CASES[name]
    seq_len = max(sum(row) for row in lengths) + 2 * (name == "padded")
    layout = SampleLayout.from_lengths(lengths, seq_len=seq_len)
    tokens = random_tokens(config, len(lengths), seq_len)
    targets = tokens.roll(-1, 1)
    targets.view(-1)[layout.padding_T] = IGNORE_INDEX
    for row, samples in enumerate(lengths):
        end = 0
        for n in samples:
            end += n
            # A document cut at the row's end knows its next token; one that ends there does not.
            targets[row, end - 1] = 50 if last_target_known else IGNORE_INDEX
    return model, lengths, layout, tokens, targets


@pytest.mark.parametrize("last_target_known", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_dense_reference(name, last_target_known):
    model, lengths, layout, tokens, targets = make_case(name, last_target_known)
    grads, output = run_model(model, tokens, layout, targets, weight=1.0)
    without, _ = run_model(model, tokens, layout, targets, weight=0.0)
    loss, count, expected = run_reference(
        model, grads["streams value"], lengths, layout, tokens, targets
    )
    assert TokenCounts.of(layout, targets).mtp == count
    assert float(output.mtp_loss) == pytest.approx(loss, rel=1e-6)
    assert {n for n in expected if n.startswith("mtp.")} == {
        n for n, _ in model.named_parameters() if n.startswith("mtp.")
    } | {"mtp.0.ffn.gate.bias"}
    for key, reference in expected.items():
        if reference is None:
            assert key == "mtp.0.ffn.gate.bias"
            continue
        ours = grads[key] - without[key] if key in without else grads[key]
        assert relative_error(ours.double(), reference) < 1e-4, key
        if key.startswith("mtp.") and key in without:
            assert without[key].abs().max() == 0, f"{key} is trained by another loss"


def test_shifts_across_samples_would_be_detected():
    """The negative control: one long sample instead of packed ones is another loss."""
    model, lengths, layout, tokens, targets = make_case("packed", last_target_known=True)
    grads, output = run_model(model, tokens, layout, targets, weight=1.0)
    loss, _, _ = run_reference(
        model, grads["streams value"], lengths, layout, tokens, targets, cross_samples=True
    )
    assert abs(float(output.mtp_loss) - loss) > 1e-3


def test_weight_multiplies_the_loss_and_samples_of_two_tokens_predict_once():
    model, _, layout, tokens, targets = make_case("packed", last_target_known=False)
    plain = model(tokens, layout, targets)
    assert plain.loss.item() == pytest.approx(float(plain.lm_loss + 0.3 * plain.mtp_loss), rel=1e-6)
    lower = model(tokens, layout, targets, mtp_loss_weight=0.1)
    assert lower.loss.item() == pytest.approx(float(plain.lm_loss + 0.1 * plain.mtp_loss), rel=1e-6)
    # n tokens whose last target is unknown make n - 2 predictions, never fewer than none.
    counts = TokenCounts.of(layout, targets)
    assert counts.mtp == sum(max(n - 2, 0) for n in (1, 2, 3, 9, 20, 17, 18))
    assert counts.lm == sum(n - 1 for n in (1, 2, 3, 9, 20, 17, 18))


def test_no_prediction_gives_no_loss_and_no_nan():
    model, _, _, tokens, _ = make_case("one row", last_target_known=False)
    layout = SampleLayout.from_lengths([[1] * 21])
    output = model(tokens, layout, torch.full_like(tokens, IGNORE_INDEX))
    output.loss.backward()
    assert float(output.lm_loss) == float(output.mtp_loss) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
