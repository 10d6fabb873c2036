"""Pooling of windows against loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import SampleLayout
from model.kernels.compressor import pool_windows
from tests.model.kernels.compare import assert_same, rand

DIM = 6


def reference(
    values: Tensor, gates: Tensor, ape: Tensor, lengths: list[int], overlap: bool, dim: int = DIM
):
    """Entry i of each sample, channel weights by softmax over 2m or m slots."""
    m, start, out = len(ape), 0, []
    for n in lengths:
        for i in range(n // m):
            own = range(start + i * m, start + (i + 1) * m)
            if not overlap:
                slots = [(values[t], gates[t] + ape[t - own[0]]) for t in own]
            else:
                slots = [(values[t][dim:], (gates[t] + ape[t - own[0]])[dim:]) for t in own]
                if i > 0:
                    slots += [
                        (values[t - m][:dim], (gates[t - m] + ape[t - own[0]])[:dim]) for t in own
                    ]
            value, gate = torch.stack([v for v, _ in slots]), torch.stack([g for _, g in slots])
            weight = gate.exp() / gate.exp().sum(0)
            out.append((weight * value).sum(0))
        start += n
    return torch.stack(out) if out else values.new_zeros(0, dim) + 0 * values.sum()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("lengths", "m"),
    [([16], 4), ([19], 4), ([1, 2, 3, 4, 5, 8, 30], 4), ([127, 128, 129, 300], 128), ([3, 2], 4)],
)
def test_equals_loops(lengths, m, overlap):
    entries = SampleLayout.from_lengths([lengths]).entries(m)
    width = 2 * DIM if overlap else DIM
    tokens = sum(lengths)

    def kernel(values: Tensor, gates: Tensor, ape: Tensor) -> Tensor:
        return pool_windows(
            values, gates, ape, entries.first_token_C, entries.has_previous_C, overlap
        )

    inputs = [rand(tokens, width, seed=1), rand(tokens, width, seed=2), rand(m, width, seed=3)]
    assert_same(kernel, lambda *x: reference(*x, lengths, overlap), inputs, rtol=1e-5)


def test_bf16_inputs_are_pooled_in_fp32():
    entries = SampleLayout.from_lengths([[23]]).entries(4)
    values, gates = rand(23, 2 * DIM, seed=1).bfloat16(), rand(23, 2 * DIM, seed=2).bfloat16()
    ape = rand(4, 2 * DIM, seed=3)
    where = (entries.first_token_C, entries.has_previous_C, True)
    pooled = pool_windows(values, gates, ape, *where)
    assert pooled.dtype == torch.float32
    expected = reference(values.double(), gates.double(), ape.double(), [23], True)
    torch.testing.assert_close(pooled.double(), expected, rtol=0, atol=1e-5)


def test_tokens_behind_the_last_whole_window_have_no_part():
    entries = SampleLayout.from_lengths([[6, 5]]).entries(4)
    values = rand(11, DIM, seed=1).requires_grad_()
    pool_windows(
        values,
        rand(11, DIM, seed=2),
        rand(4, DIM, seed=3),
        entries.first_token_C,
        entries.has_previous_C,
        False,
    ).sum().backward()
    unused = [4, 5, 10]
    assert values.grad[unused].abs().max() == 0
    assert (values.grad[[t for t in range(11) if t not in unused]] > 0).all()
