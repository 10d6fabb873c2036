"""The same losses at any number of ranks and any size of microbatch."""

from pathlib import Path

import pytest
import torch

from tests.trainer.conftest import COMPARED
from tests.trainer.tiny import column, train
from trainer.parallel.gradients import Gradients

COLUMNS = ("loss", "lm_loss", "mtp_loss", "balance_loss", "grad_norm", "expert_load_max")


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone")
    train(tiny, run_dir, *COMPARED)
    return run_dir


def same_curves(one: Path, other: Path) -> None:
    for name in COLUMNS:
        assert column(one, name) == pytest.approx(column(other, name), rel=1e-5), name
    assert column(one, "tokens") == column(other, "tokens")
    last = [column_of_last(run) for run in (one, other)]
    assert last[0] == pytest.approx(last[1], rel=1e-5)


def column_of_last(run: Path) -> float:
    from trainer.metrics.jsonl import read_metrics

    return float(read_metrics(run / "metrics.jsonl")[-1]["validation_loss"])


def test_two_ranks_same_curves_also_where_they_do_not_divide_the_rows(
    alone: Path, on_two_ranks: Path
) -> None:
    """5 rows: the sixth only fills up the second rank and counts nothing."""
    same_curves(alone, on_two_ranks / "compared")


def test_accumulation_equals_one_microbatch(alone: Path, tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, *COMPARED, "data.micro_batch_size=5")
    same_curves(alone, tmp_path)


def test_another_seed_gives_another_curve(alone: Path, tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, *COMPARED, "seed=4")
    with pytest.raises(AssertionError):
        same_curves(alone, tmp_path)


def test_gradients_are_gathered_in_fp32_in_place_and_frozen_ones_are_none() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16)) for _ in range(3)]
    unused, frozen = torch.nn.Parameter(torch.ones(5)), parameters.pop()
    frozen.requires_grad_(False)
    gradients = Gradients([*parameters, unused, frozen])
    places = set()
    for _ in range(2):
        gradients.zero_()
        for value in (1.0, 2**-9):  # lost if added in bf16
            sum((p * value).sum() for p in (*parameters, frozen)).backward()  # type: ignore[union-attr]
        places.add(tuple(p.grad.data_ptr() for p in (*parameters, unused)))
    assert len(places) == 1, "memory is taken once"
    assert all((p.grad == 1.0 + 2**-9).all() for p in parameters)
    assert unused.grad is not None and unused.grad.abs().sum() == 0
    assert frozen.grad is None
    frozen.requires_grad_(True)
    gradients.zero_()
    assert frozen.grad is not None
    frozen.requires_grad_(False)
    gradients.zero_()
    assert frozen.grad is None
