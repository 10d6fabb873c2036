"""The fast transform against the matrix itself, in float64."""

import pytest
import torch

from model.kernels.hadamard import hadamard, naive_hadamard
from tests.model.kernels.compare import assert_same, rand


@pytest.mark.parametrize("size", [1, 2, 32, 128])
def test_equals_the_matrix(size: int) -> None:
    x = rand(5, 3, size)
    # A sum of 128 numbers of size 1 in fp32, divided by 11.
    assert_same(hadamard, naive_hadamard, [x], rtol=1e-6)
    assert torch.equal(hadamard(x[2:3]), hadamard(x)[2:3]), "a row depends on no other"
    assert hadamard(x.bfloat16()).dtype == torch.bfloat16


def test_the_matrix_is_orthogonal_and_symmetric() -> None:
    matrix = naive_hadamard(torch.eye(32, dtype=torch.float64))
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(32, dtype=torch.float64))


def test_other_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="a power of two, got 48"):
        hadamard(torch.zeros(2, 48))
