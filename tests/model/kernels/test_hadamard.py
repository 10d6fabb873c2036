"""The fast transform beside the matrix itself, in float64."""

import functools

import pytest
import torch

from model.kernels.hadamard import hadamard


@pytest.mark.parametrize("size", [1, 2, 32, 128])
def test_equals_the_matrix(size: int) -> None:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    matrix = functools.reduce(torch.kron, [two] * (size.bit_length() - 1), one) / size**0.5
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    x = torch.randn(5, 3, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y, upstream = hadamard(x), torch.randn(5, 3, size)
    y.backward(upstream)
    # A sum of 128 numbers of size 1 in fp32, divided by 11.
    torch.testing.assert_close(y.double(), x.detach().double() @ matrix, rtol=0, atol=2e-6)
    torch.testing.assert_close(x.grad.double(), upstream.double() @ matrix, rtol=0, atol=2e-6)
    assert torch.equal(hadamard(x[2:3]), y[2:3]), "a row depends on no other"
    assert hadamard(x.bfloat16()).dtype == torch.bfloat16


def test_other_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="a power of two columns, not 48"):
        hadamard(torch.zeros(2, 48))
