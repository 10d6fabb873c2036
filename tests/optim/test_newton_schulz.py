"""Newton–Schulz against the singular value decomposition."""

import pytest
import torch
from torch import Tensor

from optim.newton_schulz import newton_schulz

SHAPES = [
    (64, 192),
    (192, 64),
    (33, 77),
    (77, 33),
    (1, 9),
    (9, 1),
    (24, 1024),
    (3, 65, 40),
    (5, 40, 65),
]


def gaussian(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_in_fp32(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(newton_schulz(gaussian(shape)).double())
    assert values.min() >= 0.999 and values.max() <= 1.001


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_in_bf16(shape: tuple[int, ...]) -> None:
    result = newton_schulz(gaussian(shape), dtype=torch.bfloat16)
    assert result.dtype == torch.bfloat16
    values = torch.linalg.svdvals(result.double())
    assert values.min() >= 0.993 and values.max() <= 1.007


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (4, 31, 57)])
def test_it_is_the_orthogonal_factor(shape: tuple[int, ...]) -> None:
    matrices = gaussian(shape)
    u, _, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    torch.testing.assert_close(newton_schulz(matrices).double(), u @ vh, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_the_scale_does_not_matter(scale: float) -> None:
    matrices = gaussian((20, 30))
    torch.testing.assert_close(
        newton_schulz(matrices * scale), newton_schulz(matrices), rtol=0, atol=1e-4
    )


def test_a_batch_equals_its_matrices_one_by_one() -> None:
    matrices = gaussian((7, 24, 40)) * torch.logspace(-3, 3, 7)[:, None, None]
    alone = torch.stack([newton_schulz(matrix) for matrix in matrices])
    torch.testing.assert_close(newton_schulz(matrices), alone, rtol=0, atol=1e-5)


def test_stacked_matrices_are_not_one_matrix() -> None:
    matrices = gaussian((4, 24, 40))
    as_one = newton_schulz(matrices.view(96, 40)).view(4, 24, 40)
    assert (newton_schulz(matrices) - as_one).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero_in_a_batch(dtype: torch.dtype) -> None:
    matrices = gaussian((3, 8, 12))
    matrices[1] = 0
    result = newton_schulz(matrices, dtype=dtype)
    assert torch.isfinite(result).all()
    assert result[1].abs().max() == 0
    torch.testing.assert_close(
        result[2], newton_schulz(matrices[2], dtype=dtype), rtol=0, atol=1e-2
    )


def test_transposing_commutes() -> None:
    matrices = gaussian((2, 16, 48))
    torch.testing.assert_close(
        newton_schulz(matrices.mT), newton_schulz(matrices).mT, rtol=0, atol=1e-5
    )


def test_the_input_is_left_alone() -> None:
    matrices = gaussian((2, 16, 48))
    copy = matrices.clone()
    newton_schulz(matrices)
    assert torch.equal(matrices, copy)
