"""Grouped matmuls: MKL's one call, and torch's own, against a loop over groups in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.grouped_mm import eager as module
from model.kernels.grouped_mm import grouped_mm, grouped_mm_pair, row_alignment
from tests.model.kernels.compare import assert_same, rand


def naive(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    starts = [0, *ends.tolist()[:-1]]
    parts = [x[a:b] @ w.T for a, b, w in zip(starts, ends.tolist(), weight, strict=True)]
    return torch.cat(parts)


@pytest.mark.parametrize("sizes", [[16, 32, 16], [0, 16, 0, 48, 0], [3, 1, 7], [0, 0], [5]])
@pytest.mark.parametrize("mkl", [True, False])
def test_every_group_has_its_own_matrix(sizes, mkl, monkeypatch):
    if not mkl:
        monkeypatch.setattr(module, "_batch_function", lambda: None)
    elif module._batch_function() is None:
        pytest.skip("this torch has no MKL")
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    rows = int(ends[-1])

    inputs = [rand(rows + 5, 24, seed=1), *(rand(len(sizes), 40, 24, seed=s) for s in (2, 3))]
    assert_same(
        lambda x, w, _: grouped_mm(x[:rows], w, ends)[:rows],
        lambda x, w, _: naive(x[:rows], w, ends),
        inputs,
        rtol=1e-5,
    )
    assert_same(
        lambda x, v, w: grouped_mm_pair(x[:rows], v, w, ends),
        lambda x, v, w: (naive(x[:rows], v, ends), naive(x[:rows], w, ends)),
        inputs,
        rtol=1e-5,
    )


@pytest.mark.parametrize(("columns", "width"), [(64, 512), (512, 64), (40, 24)])
def test_a_row_does_not_depend_on_its_group_s_size(columns, width):
    """To the bit, at every size that dispatching pads groups to."""
    x, weight = rand(64, width, seed=1), rand(3, columns, width, seed=2)
    step = row_alignment(x)
    whole = [x @ w.T for w in weight]
    for size in range(step, 64 - step, step):
        ends = torch.tensor([size, size, 64], dtype=torch.int32)  # the second group is empty
        out = grouped_mm(x, weight, ends)
        assert torch.equal(out[:size], whole[0][:size])
        assert torch.equal(out[size:], whole[2][size:])


def test_transposed_and_sliced_inputs():
    ends = torch.tensor([4, 9], dtype=torch.int32)
    x, weight = rand(24, 9, seed=1), rand(24, 40, 2, seed=2)
    assert_same(
        lambda x, w: grouped_mm(x.t(), w.permute(2, 1, 0), ends),
        lambda x, w: naive(x.t(), w.permute(2, 1, 0), ends),
        [x, weight],
        rtol=1e-5,
    )


def test_rows_after_the_last_end_are_not_read():
    ends = torch.tensor([4, 9], dtype=torch.int32)
    x, weight = rand(12, 24, seed=1), rand(2, 40, 24, seed=2)
    x[9:] = float("nan")
    leaf = weight.clone().requires_grad_()
    out = grouped_mm(x, leaf, ends)
    torch.testing.assert_close(out[:9], naive(x[:9], weight, ends).detach())
    out[:9].sum().backward()
    assert leaf.grad.isfinite().all()
