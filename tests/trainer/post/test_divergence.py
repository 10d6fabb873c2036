"""Reverse KL over the whole vocabulary against a few lines in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.kernels import cross_entropy
from tests.distributed import spawn
from tests.model.test_memory import peak_memory
from trainer.parallel.degrees import Degrees
from trainer.parallel.grid import Grid
from trainer.post import reverse_kl
from trainer.process.errors import PostTrainingError

VOCAB, WIDTH, TEACHER_WIDTH, TOKENS = 24, 8, 6, 21
ALONE = Grid.single().tensor


def inputs(
    dtype: torch.dtype = torch.float32, scale: float = 1.0, shift: float = 0.0
) -> dict[str, Tensor]:
    """Random states and heads; `shift` is added to all logits."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "hidden": (TOKENS, WIDTH),
        "weight": (VOCAB, WIDTH),
        "teacher_hidden": (TOKENS, TEACHER_WIDTH),
        "teacher_weight": (VOCAB, TEACHER_WIDTH),
    }
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        for name, shape in shapes.items()
    }
    for name in shapes if shift else ():
        tensors[name][:, 0] = shift**0.5
    weights = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    tensors["token_weight"] = weights * (torch.arange(TOKENS) % 3 > 0)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def naive(x: dict[str, Tensor], denominator: float) -> Tensor:
    log_p = (x["hidden"] @ x["weight"].t()).log_softmax(-1)
    log_q = (x["teacher_hidden"] @ x["teacher_weight"].t()).log_softmax(-1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * x["token_weight"]).sum() / denominator


def value_and_gradients(function: Any, x: dict[str, Tensor], *args: Any) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in x.items()}
    leaves["token_weight"].requires_grad_(False)
    value = function(leaves, *args)
    value.backward()
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"value": value.detach(), **grads}


def ours(x: dict[str, Tensor], denominator: float, axis: Any = ALONE) -> Tensor:
    return reverse_kl(*x.values(), denominator, axis)


def sharded(rank: int, world_size: int, x: dict[str, Tensor], denominator: float) -> Any:
    cross_entropy.CPU_LOGITS = 5 * VOCAB // world_size  # 5 chunks
    axis = Grid.build(Degrees(world_size, tensor=world_size), torch.device("cpu")).tensor
    rows = slice(rank * VOCAB // world_size, (rank + 1) * VOCAB // world_size)
    parts = {n: t[rows] if n.endswith("weight") and t.dim() == 2 else t for n, t in x.items()}
    return value_and_gradients(ours, parts, denominator, axis)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name in ("value", "hidden", "weight"):
        difference = (got[name].double() - expected[name]).abs().max()
        assert difference <= tolerance * expected[name].abs().max(), name
    assert not any(name.startswith("teacher") for name in got)


@pytest.mark.parametrize(
    "dtype, shift, tolerance",
    [(torch.float32, 0.0, 2e-6), (torch.float32, 400.0, 2e-4), (torch.bfloat16, 0.0, 2e-2)],
)
def test_value_and_gradients(
    dtype: torch.dtype, shift: float, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, in 5 chunks; exp of logits above 89 is infinite in fp32."""
    monkeypatch.setattr(cross_entropy, "CPU_LOGITS", 5 * VOCAB)
    x = inputs(dtype, shift=shift)
    expected = value_and_gradients(naive, {n: t.double() for n, t in x.items()}, 7.0)
    got = value_and_gradients(ours, x, 7.0)
    assert got["value"].dtype == torch.float32
    assert_close(got, expected, tolerance)


def test_distributions_far_apart() -> None:
    """Logits of thousands: all but one probability underflow."""
    x = inputs(scale=30.0)
    expected = naive({n: t.double() for n, t in x.items()}, 7.0)
    got = value_and_gradients(ours, x, 7.0)
    assert all(tensor.isfinite().all() for tensor in got.values())
    assert abs(got["value"] - expected) < 1e-5 * expected


@pytest.mark.parametrize("world_size", [2])
def test_vocabulary_parallel(world_size: int) -> None:
    x = inputs()
    expected = value_and_gradients(naive, {n: t.double() for n, t in x.items()}, 7.0)
    ranks = spawn(sharded, world_size, x, 7.0)
    whole = {
        "value": ranks[0]["value"],
        "hidden": sum(rank["hidden"] for rank in ranks),
        "weight": torch.cat([rank["weight"] for rank in ranks]),
    }
    assert all(torch.equal(rank["value"], ranks[0]["value"]) for rank in ranks)
    assert_close(whole, expected, 3e-6)


def test_finite_differences() -> None:
    x = inputs(torch.float64)
    rest = (x["teacher_hidden"], x["teacher_weight"], x["token_weight"], 7.0, ALONE)
    leaves = (x["hidden"].requires_grad_(), x["weight"].requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: reverse_kl(h, w, *rest), leaves)


def test_the_teacher_itself_has_no_loss_and_no_gradient() -> None:
    x = inputs(scale=10.0)
    x["teacher_hidden"], x["teacher_weight"] = x["hidden"].clone(), x["weight"].clone()
    got = value_and_gradients(ours, x, 7.0)
    assert got["value"] == 0
    assert not got["hidden"].any() and not got["weight"].any()


def test_tokens_without_weight_do_not_count() -> None:
    x = inputs()
    changed = dict(x, hidden=x["hidden"].clone())
    changed["hidden"][x["token_weight"] == 0] += 5
    first, second = (value_and_gradients(ours, part, 7.0) for part in (x, changed))
    assert torch.equal(first["value"], second["value"])
    assert torch.equal(first["weight"], second["weight"])
    assert not second["hidden"][x["token_weight"] == 0].any()


def test_another_vocabulary_is_refused() -> None:
    x = inputs()
    x["teacher_weight"] = x["teacher_weight"][:-1]
    with pytest.raises(PostTrainingError, match="vocabulary has 23 tokens, the student's 24"):
        ours(x, 7.0)


def peak(tokens: int, logits: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cross_entropy, "CPU_LOGITS", logits)
    vocab, width = 4096, 16
    hidden, teacher = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    weight, other = torch.randn(vocab, width, requires_grad=True), torch.randn(vocab, width)
    ones = torch.ones(tokens)
    return peak_memory(lambda: reverse_kl(hidden, weight, teacher, other, ones, 1.0, ALONE))


def test_memory_is_linear_in_tokens_and_not_in_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 16 * 4096  # 16 tokens
    few, many = peak(512, chunk, monkeypatch), peak(2048, chunk, monkeypatch)
    assert many - few < 1536 * 16 * 4 * 2  # hidden states' gradient of 1,536 tokens; logits: 25 MB
    wider = peak(512, 4 * chunk, monkeypatch)
    assert 2.5 * 3 * chunk * 4 < wider - few < 5 * 3 * chunk * 4  # three arrays of logits
