"""A packed row is its samples run one by one, and samples never touch."""

from __future__ import annotations

import pytest
import torch

from model import IGNORE_INDEX, SampleLayout, TokenCounts
from tests.model.tiny import gradient_scale, random_model, random_tokens, tiny_config

LENGTHS = [1, 3, 4, 5, 127, 128, 129, 500]
# Real compression ratios, and a top-k that binds from position 128 on.
CONFIG = {"hca_compress_ratio": 128, "sliding_window": 128, "index_topk": 32}


def _targets(tokens):
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    return targets


def _gradients(model):
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("pad", [0, 7])
def test_packed_row_equals_samples_one_by_one(pad):
    config = tiny_config(**CONFIG)
    model = random_model(config)
    samples = [random_tokens(config, 1, n, seed=n) for n in LENGTHS]
    padding = torch.full((1, pad), config.pad_token_id)
    row = torch.cat([*samples, padding], dim=1)
    targets = torch.cat(
        [*[_targets(s) for s in samples], torch.full((1, pad), IGNORE_INDEX)], dim=1
    )
    layout = SampleLayout.from_lengths([LENGTHS], seq_len=row.shape[1])

    logits = model(row, layout).logits
    packed = model(row, layout, targets)
    packed.loss.backward()
    packed_grads = _gradients(model)

    counts = TokenCounts.of(layout, targets)
    assert counts == TokenCounts(
        lm=sum(n - 1 for n in LENGTHS), mtp=sum(max(n - 2, 0) for n in LENGTHS), routed=sum(LENGTHS)
    )
    start, total = 0, 0.0
    for sample in samples:
        n = sample.shape[1]
        alone = model(sample).logits
        torch.testing.assert_close(logits[:, start : start + n], alone, rtol=1e-5, atol=1e-5)
        output = model(sample, targets=_targets(sample), counts=counts)
        output.loss.backward()
        total += float(output.loss.detach())
        start += n
    torch.testing.assert_close(float(packed.loss.detach()), total, rtol=1e-6, atol=0)
    alone_grads = _gradients(model)
    assert packed_grads.keys() == alone_grads.keys()
    for name, grad in packed_grads.items():
        scale = gradient_scale(name, alone_grads)
        assert float((grad - alone_grads[name]).abs().max()) <= 1e-5 * scale, name


def test_two_rows_equal_one_by_one():
    config = tiny_config(**CONFIG)
    model = random_model(config)
    lengths = [[3, 297], [129, 171]]
    tokens = random_tokens(config, 2, 300)
    together = model(tokens, SampleLayout.from_lengths(lengths)).logits
    for row in range(2):
        layout = SampleLayout.from_lengths([lengths[row]])
        alone = model(tokens[row : row + 1], layout).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_changing_one_sample_changes_no_bit_of_another(changed):
    config = tiny_config(**CONFIG)
    model = random_model(config)
    row = random_tokens(config, 1, sum(LENGTHS))
    layout = SampleLayout.from_lengths([LENGTHS])
    other = row.clone()
    start = sum(LENGTHS[:changed])
    inside = slice(start, start + LENGTHS[changed])
    other[:, inside] = (other[:, inside] - 3 + 11) % (config.vocab_size - 3) + 3
    with torch.no_grad():
        before, after = model(row, layout).logits, model(other, layout).logits
    assert not torch.equal(before[:, inside], after[:, inside])
    before[:, inside] = after[:, inside] = 0
    assert torch.equal(before, after)


def test_a_token_sees_only_the_past():
    config = tiny_config(**CONFIG)
    model = random_model(config)
    tokens = random_tokens(config, 1, 300)
    future = tokens.clone()
    future[:, 200:] = random_tokens(config, 1, 100, seed=9)
    with torch.no_grad():
        before, after = model(tokens).logits, model(future).logits
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before[:, 200:], after[:, 200:])


def test_layout_refuses_bad_lengths():
    with pytest.raises(ValueError, match="row 0 holds 5 tokens of samples but is 4 long"):
        SampleLayout.from_lengths([[2, 3]], seq_len=4)
    with pytest.raises(ValueError, match="below 1"):
        SampleLayout.from_lengths([[2, 0]])
    with pytest.raises(ValueError, match="at least one row"):
        SampleLayout.from_lengths([])
