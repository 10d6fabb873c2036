"""MXFP4 against transformers' unpacking, a search over all 16 values, and FP8."""

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from model.kernels.block_sizes import FP8_BLOCK
from model.kernels.mxfp4 import (
    Packed,
    dequantise,
    fake_quantise,
    fits_fp8,
    from_fp8,
    naive_quantise_dequantise,
    quantise,
    quantise_dequantise,
    to_fp8,
)

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Normal numbers whose blocks differ by up to 2^12 in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    size = torch.randint(-6, 7, (rows, columns // 32), generator=generator)
    return torch.ldexp(x, size.repeat_interleave(32, 1)) * 0.02


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("seed", range(3))
def test_rounds_to_the_nearest_of_all_values(seed: int) -> None:
    x = weights(3, 96, seed)
    assert same_bits(dequantise(quantise(x)), naive_quantise_dequantise(x))
    assert same_bits(quantise_dequantise(x), naive_quantise_dequantise(x))


def test_ties_scales_and_small_numbers() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(4)
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]).repeat(4)
    rows = torch.stack([ties, -ties * 2**20, torch.zeros(32), ties * 2.0**-140])
    computed = dequantise(quantise(rows))
    assert same_bits(computed, naive_quantise_dequantise(rows))
    assert torch.equal(computed[0], expected) and torch.equal(computed[1], -expected * 2**20)
    assert not computed[2].any() and computed[3].abs().max() <= 6 * 2.0**-126
    just_above = torch.full((32,), 6.0)
    just_above[0] = torch.nextafter(torch.tensor(6.0), torch.tensor(7.0))
    assert quantise(just_above).scales.float().item() == 2.0, "nothing saturates"
    assert quantise(torch.full((32,), 6.0)).scales.float().item() == 1.0


def test_transformers_reads_the_layout() -> None:
    packed = quantise(weights(48, 64))
    assert packed.codes.dtype == torch.int8 and packed.codes.shape == (48, 32)
    assert packed.scales.shape == (48, 2)
    theirs = Fp8Dequantize(None)._dequantize_one(packed.codes, packed.scales, torch.float32)
    assert same_bits(dequantise(packed), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_sees_exactly_the_dequantised_weights(dtype: torch.dtype) -> None:
    x = weights(2 * 16, 64).view(2, 16, 64).to(dtype).requires_grad_()
    y = fake_quantise(x)
    assert y.dtype == dtype and torch.equal(y, dequantise(quantise(x.detach()), dtype))
    assert torch.equal(dequantise(quantise(y.detach()), dtype), y), "quantising twice is once"
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream), "straight through"


def test_not_finite_blocks_stay_visible() -> None:
    x = torch.ones(1, 96)
    x[0, 3], x[0, 40] = float("nan"), float("inf")
    computed = dequantise(quantise(x)).view(3, 32)
    assert computed[:2].isnan().all() and torch.equal(computed[2], torch.ones(32))


@pytest.mark.parametrize("shape", [(256, 256), (130, 160), (5, 32)])
def test_fp8_holds_fp4_where_the_scales_are_close(shape: tuple[int, int]) -> None:
    x = weights(*shape)
    x[0, :32] = -0.0  # zeros fit any scale
    packed = quantise(x)
    tiles = tuple(-(-size // FP8_BLOCK) for size in shape)
    assert fits_fp8(packed).shape == tiles and fits_fp8(packed).all()
    numbers, scales = to_fp8(packed)
    assert numbers.dtype == torch.float8_e4m3fn and scales.shape == tiles
    assert torch.equal(from_fp8(numbers, scales), dequantise(packed))


@pytest.mark.parametrize(("apart", "lossless"), [(14, True), (15, False)])
def test_the_condition_is_sharp(apart: int, lossless: bool) -> None:
    block = torch.tensor(VALUES).repeat(4)
    packed = quantise(torch.cat([block, block * 2.0**-apart])[None])
    assert fits_fp8(packed).item() == lossless
    numbers, scales = to_fp8(packed)
    assert torch.equal(from_fp8(numbers, scales), dequantise(packed)) == lossless


def test_scales_of_zeros_do_not_matter() -> None:
    x = torch.ones(2, 64)
    x[:, 32:] = 0
    packed = quantise(x)
    packed.scales.view(torch.uint8)[:, 1] = 200
    assert fits_fp8(packed).all()
    assert torch.equal(from_fp8(*to_fp8(packed)), x)


def test_columns_must_fill_blocks() -> None:
    with pytest.raises(ValueError, match="multiple of 32 columns, got 33"):
        quantise(torch.zeros(2, 33))


def test_packed_is_a_tuple_of_two() -> None:
    codes, scales = Packed(*quantise(torch.ones(1, 32)))
    assert codes.shape == (1, 16) and scales.dtype == torch.float8_e8m0fnu
