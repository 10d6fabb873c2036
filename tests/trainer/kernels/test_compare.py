"""What the comparison notices: single wrong rows, unwritten and foreign memory, other bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.kernel_cases import Case, Selection, Sizes
from model.kernel_cases.layers import compressor_case
from tests.model.tiny import tiny_config
from trainer.kernels.compare import Distance, Reference, _fault, fault_of, reference_of

LEAVES = {
    "x": torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "w": torch.randn(64, generator=torch.Generator().manual_seed(1)),
}


def product(x: Tensor, w: Tensor) -> Tensor:
    return (x.to(w.dtype) * w).square().to(x.dtype)


def case_of(function: Callable[..., Tensor], **changes: object) -> Case:
    """The function is Triton's; the eager one is right."""
    defaults = {"naive": lambda x, w: (x * w).square()}
    return Case(
        "a product",
        LEAVES,
        lambda choice: function if choice.name == "triton" else product,
        **(defaults | changes),
    )


def fault(function: Callable[..., Tensor], **changes: object) -> str | None:
    case = case_of(function, **changes)
    return fault_of(case, function, reference_of(case))[0]


def test_a_right_function_has_no_fault():
    case = case_of(product)
    reference = reference_of(case)
    assert reference.names == ["output", "gradient of x", "gradient of w"]
    reason, errors = fault_of(case, product, reference)
    assert reason is None
    assert errors == reference.errors and max(errors) < 4e-3


def test_a_little_wrong_everywhere():
    assert "output has an error of" in str(fault(lambda x, w: 1.01 * product(x, w)))


def test_the_norm_of_few_numbers_may_fluctuate():
    """Limits of 16 numbers are twice those of many; those of one, a loss, are not wider."""
    eager = Distance(3e-3, 0.0, 1.0, 0)
    for numbers, limit in ((1, 6e-3), (16, 1.2e-2), (1 << 40, 6e-3)):
        assert _fault(Distance(0.99 * limit, 0.0, 1.0, numbers), eager, 4e-3) is None
        assert _fault(Distance(1.01 * limit, 0.0, 1.0, numbers), eager, 4e-3) is not None


def test_chance_refuses_no_result_of_few_numbers():
    """Of pairs that are equally good, none is refused; with the limits of many, some would be."""
    draws = torch.randn(2, 20_000, 16, generator=torch.Generator().manual_seed(0))
    ours, eager = (1e-2 * draws.square().mean(-1).sqrt()).tolist()
    faults = [
        sum(
            _fault(Distance(a, 0.0, 1.0, numbers), Distance(b, 0.0, 1.0, numbers), 4e-3) is not None
            for a, b in zip(ours, eager, strict=True)
        )
        for numbers in (16, 1 << 40)
    ]
    assert faults[0] == 0 and 40 < faults[1] < 140  # 0.43% by the F distribution


def test_a_wrong_gradient_alone():
    def wrong(x: Tensor, w: Tensor) -> Tensor:
        out = product(x, w)
        return out + 0.1 * (out - out.detach())

    assert "gradient of x has an error of" in str(fault(wrong))


def test_one_wrong_row_of_thousands():
    def wrong(x: Tensor, w: Tensor) -> Tensor:
        scale = torch.ones(len(x), 1)
        scale[-1] = 0.95
        return (product(x, w) * scale).to(x.dtype)

    assert "has a row with an error of" in str(fault(wrong))


def test_what_is_left_unwritten():
    def wrong(x: Tensor, w: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[:-1] = product(x, w)[:-1]
        return out

    assert "output is not finite" in str(fault(wrong))


def test_what_lies_after_an_input_is_not_read():
    def wrong(x: Tensor, w: Tensor) -> Tensor:
        beyond = x.detach().as_strided((1,), (1,), x.storage_offset() + x.numel())
        return product(x, w) + beyond

    assert "output is not finite" in str(fault(wrong))


@pytest.mark.parametrize("offset", [-1, 0, 64 * 2000])
def test_inputs_and_what_lies_next_to_them_are_not_written(offset):
    def wrong(x: Tensor, w: Tensor) -> Tensor:
        x.detach().as_strided((1,), (1,), x.storage_offset() + offset).fill_(7.0)
        return product(x.detach(), w)

    with pytest.raises(RuntimeError, match="x, an input, or memory next to it was written"):
        fault(wrong)


def test_other_bits_at_a_second_run():
    calls: list[int] = []

    def noisy(x: Tensor, w: Tensor) -> Tensor:
        calls.append(0)
        return product(x, w) * (1.0 + 2.0**-20 * len(calls))

    leaves = {name: x.float() for name, x in LEAVES.items()}
    case = Case("a product", leaves, lambda choice: product)
    assert fault_of(case, noisy, reference_of(case))[0] == "output has other bits at a second run"
    case = Case("a product", leaves, lambda choice: product, repeatable=False)
    assert fault_of(case, noisy, reference_of(case))[0] is None


def test_bits_where_they_are_promised():
    def codes(x: Tensor, w: Tensor) -> Tensor:
        return product(x, w)

    def other(x: Tensor, w: Tensor) -> Tensor:
        out = product(x, w).clone()
        out[3, 3] = -out[3, 3]
        return out

    changes = {"exact": True, "differentiable": False, "naive": None}
    assert fault(codes, **changes) is None
    assert fault(other, **changes) == "output differs"


def selection_case() -> Case:
    """Two of four entries, of which the first query sees one; entry 0 scores highest."""
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 3)
    leaves = {"queries": torch.ones(3, 1), "keys": torch.ones(4, 1)}
    ends = torch.tensor([1, 2, 4])
    selection = Selection(lambda x, rows: scores[rows].double(), torch.zeros_like(ends), ends)
    changes = {"outputs": ("selection",), "differentiable": False, "selection": selection}
    return Case("a selection", leaves, lambda choice: lambda q, keys: None, **changes)


def selection_fault(*answers: list[list[int]]) -> str | None:
    """Checks a function whose calls give these answers, the last one from then on."""
    case, remaining = selection_case(), list(answers)

    def select(q: Tensor, keys: Tensor) -> Tensor:
        return torch.tensor(remaining.pop(0) if len(remaining) > 1 else remaining[0])

    return fault_of(case, select, Reference(["selection"], [], []))[0]


def test_a_selection_has_its_entries_first():
    """Attention reads as many of the first columns as there are entries."""
    assert selection_fault([[0, -1], [0, 1], [1, 0]]) is None
    assert selection_fault([[-1, 0], [0, 1], [0, 1]]) == (
        "has an entry after a -1, where all -1 come last"
    )


def test_other_bits_of_a_selection_at_a_second_run():
    first, second = [[0, -1], [0, 1], [0, 1]], [[0, -1], [0, 1], [1, 0]]
    assert selection_fault(first, second) == "selection has other bits at a second run"


def test_other_bits_of_exact_results_at_a_second_run():
    calls: list[int] = []

    def codes(x: Tensor, w: Tensor) -> Tensor:
        calls.append(0)
        return product(x, w) * (1 if len(calls) == 1 else -1)

    case = case_of(codes, exact=True, differentiable=False, naive=None)
    assert fault_of(case, codes, reference_of(case))[0] == "output has other bits at a second run"


def test_fp32_results_are_as_exact_as_fp32_sums():
    """A compressor's kernel, in fp32 in every run, whose results are bf16 numbers."""
    sizes = Sizes(tiny_config(), (37, 3), torch.bfloat16, torch.device("cpu"), dense=True)
    case = compressor_case(sizes, "csa")

    def rounded(*x: Tensor) -> Tensor:
        return case.eager(*x).bfloat16().float()

    reference = reference_of(case)
    assert "output has an error of" in str(fault_of(case, rounded, reference)[0])
    assert fault_of(case, case.eager, reference)[0] is None


def test_fp32_results_of_operands_rounded_within():
    leaves = {"x": LEAVES["x"], "y": LEAVES["x"].flip(0).clone()}
    case = Case(
        "dots",
        leaves,
        lambda choice: lambda x, y: (x.float() * y.float()).sum(1),
        naive=lambda x, y: (x * y).sum(1),
        differentiable=False,
    )

    def rounded(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).float().sum(1)

    reference = reference_of(case)
    assert "output has an error of" in str(fault_of(case, rounded, reference)[0])
    assert fault_of(replace(case, rounds_within=True), rounded, reference)[0] is None
