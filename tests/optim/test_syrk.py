"""Symmetric products: both implementations against float64, and where each of them runs."""

from __future__ import annotations

import pytest
import torch

from optim import syrk
from optim.newton_schulz import newton_schulz
from tests.model.kernels.compare import rand
from tests.model.kernels.interpreter import interpreted, last_program_first

SHAPES = [(1, 1, 1), (3, 5, 7), (2, 40, 13), (2, 65, 70)]


def products(shape: tuple[int, int, int], seed: int = 0):
    """A, a symmetric C, and βC + αA·Aᵀ in float64."""
    a = rand(*shape, seed=10 * seed + 1)
    c = rand(shape[0], shape[1], shape[1], seed=10 * seed + 2)
    c = c + c.mT
    return a, c, 0.5 * c.double() - 2.0 * a.double() @ a.double().mT


@pytest.mark.parametrize("shape", SHAPES)
def test_reference(shape):
    a, c, expected = products(shape)
    out = syrk.syrk_(torch.full_like(c, torch.nan), a, c, 0.5, -2.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    plain = syrk.syrk_(torch.full_like(c, torch.nan), a)
    torch.testing.assert_close(plain, a @ a.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@interpreted
def test_triton_equals_float64_and_is_symmetric(shape, seed):
    from optim import syrk_triton

    a, c, expected = products(shape, seed)
    small = {"block": 16, "block_k": 16}
    out = syrk_triton.syrk_(torch.full_like(c, torch.nan), a, c, 0.5, -2.0, **small)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(out, out.mT)
    with last_program_first():
        again = syrk_triton.syrk_(torch.full_like(c, torch.nan), a, c, 0.5, -2.0, **small)
    assert torch.equal(out, again)
    tall = a.mT.contiguous().mT  # strides of their own
    plain = syrk_triton.syrk_(torch.full_like(c, torch.nan), tall, None, 0.0, 1.0, **small)
    torch.testing.assert_close(plain.double(), a.double() @ a.double().mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("error", [-0.1, 0.1])
@interpreted
def test_every_pair_of_blocks_is_found(error):
    """A pair's row comes from its number by a root, which a GPU rounds; here it is off by one."""
    import triton.language as tl

    from optim import syrk_triton

    a = rand(1, 90, 5)
    exact = tl.sqrt
    tl.sqrt = lambda x: exact(x) * (1 + error)
    try:
        out = syrk_triton.syrk_(
            torch.full((1, 90, 90), torch.nan), a, None, 0.0, 1.0, block=16, block_k=16
        )
    finally:
        tl.sqrt = exact
    torch.testing.assert_close(out, a @ a.mT, rtol=1e-5, atol=1e-5)


@interpreted
def test_newton_schulz_uses_the_syrk_that_it_is_given():
    from optim import syrk_triton

    a = rand(2, 40, 70)
    plain, ours = newton_schulz(a), newton_schulz(a, syrk=syrk_triton.syrk_)
    assert not torch.equal(ours, plain), "the sums are in another order"
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


@pytest.mark.gpu(capability=(9, 0))
@pytest.mark.parametrize("shape", [(3, 2048, 4096), (2, 1000, 1000), (5, 130, 77)])
def test_on_a_gpu(shape):
    from optim import syrk_triton

    a = rand(*shape).to("cuda", torch.bfloat16) * shape[2] ** -0.5
    c = rand(shape[0], shape[1], shape[1], seed=1).to("cuda", torch.bfloat16)
    c = c + c.mT
    out = syrk_triton.syrk_(torch.full_like(c, torch.nan), a, c, 0.5, -2.0).double()
    expected = 0.5 * c.double() - 2.0 * a.double() @ a.double().mT
    assert float((out - expected).norm() / expected.norm()) < 4e-3
    assert torch.equal(out, out.mT)
    update = newton_schulz(a, dtype=torch.bfloat16, syrk=syrk_triton.syrk_)
    values = torch.linalg.svdvals(update.float())
    assert float(values.max()) < 1.02
