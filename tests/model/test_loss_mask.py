"""Tokens without loss: gradients are those of the others alone; what follows them has none."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from model import IGNORE_INDEX, SampleLayout, TokenCounts
from tests.model.tiny import gradient_scale, random_model, random_tokens, tiny_config

ROW = 60
LAYOUTS = {"one sample": [[ROW], [ROW]], "packed": [[25, 35], [11, 40]]}
ANSWERS = [[(6, 14), (30, 41)], [(3, 9), (20, 33)]]
"""Positions with a target, by row."""


def masked_targets(tokens: torch.Tensor) -> torch.Tensor:
    targets = torch.full_like(tokens, IGNORE_INDEX)
    for row, spans in enumerate(ANSWERS):
        for first, stop in spans:
            targets[row, first:stop] = tokens[row, first + 1 : stop + 1]
    return targets


def gradients_of(model) -> dict[str, torch.Tensor]:
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_answers_alone(layout: str) -> None:
    config = tiny_config(num_nextn_predict_layers=0, balance_loss_weight=0.0)
    model = random_model(config)
    tokens = random_tokens(config, 2, ROW)
    samples = SampleLayout.from_lengths(LAYOUTS[layout], seq_len=ROW)
    model(tokens, samples, masked_targets(tokens)).loss.backward()
    ours = gradients_of(model)

    logits = model(tokens, samples).logits
    spans = [(row, *span) for row, some in enumerate(ANSWERS) for span in some]
    of_answers = torch.cat([logits[row, first:stop] for row, first, stop in spans])
    answers = torch.cat([tokens[row, first + 1 : stop + 1] for row, first, stop in spans])
    cross_entropy(of_answers, answers).backward()
    reference = gradients_of(model)
    assert ours.keys() == reference.keys() and len(ours) > 30
    for name, whole in reference.items():
        limit = 2e-5 * gradient_scale(name, reference)
        assert float((ours[name] - whole).abs().max()) <= limit, name


@pytest.mark.parametrize("mtp", [0, 1])
def test_text_after_the_last_answer_moves_nothing(mtp: int) -> None:
    """Bit for bit, though those tokens are computed; without the balance loss, which is of all."""
    config = tiny_config(num_nextn_predict_layers=mtp, balance_loss_weight=0.0)
    model = random_model(config)
    tokens = random_tokens(config, 2, ROW)
    samples = SampleLayout.from_lengths(LAYOUTS["one sample"], seq_len=ROW)
    targets = masked_targets(tokens)
    model(tokens, samples, targets).loss.backward()
    before = gradients_of(model)
    for row, spans in enumerate(ANSWERS):
        last = spans[-1][1]
        tokens[row, last + 1 :] = random_tokens(config, 1, ROW, seed=9)[0, last + 1 :]
    model(tokens, samples, targets).loss.backward()
    after = gradients_of(model)
    different = [name for name in before if not torch.equal(before[name], after[name])]
    assert not different


def test_counts_are_of_targets_and_routed_tokens_of_all() -> None:
    config = tiny_config()
    targets = masked_targets(random_tokens(config, 2, ROW))
    samples = SampleLayout.from_lengths(LAYOUTS["packed"], seq_len=ROW)
    counts = TokenCounts.of(samples, targets)
    lengths = [stop - first for some in ANSWERS for first, stop in some]
    assert counts == TokenCounts(lm=sum(lengths), mtp=counts.mtp, routed=25 + 35 + 11 + 40)
    assert counts.mtp == counts.lm  # the same tokens, one position earlier in the sample
