"""The same losses at any number of ranks and any size of microbatch."""

from pathlib import Path

import pytest
import torch

from tests.trainer.conftest import COMPARED
from tests.trainer.tiny import column, train
from trainer.parallel.collectives import FlatGradients

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
    from trainer.metrics_file import read_metrics

    return float(read_metrics(run / "metrics.jsonl")[-1]["heldout_loss"])


def test_two_ranks_same_curves_also_where_they_do_not_divide_the_rows(
    alone: Path, on_two_ranks: Path
) -> None:
    """5 rows: the sixth only fills up the second rank and counts nothing."""
    same_curves(alone, on_two_ranks / "compared")


def test_accumulation_equals_one_microbatch(alone: Path, tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, *COMPARED, "data.micro_rows=5")
    same_curves(alone, tmp_path)


def test_another_seed_gives_another_curve(alone: Path, tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, *COMPARED, "seed=4")
    with pytest.raises(AssertionError):
        same_curves(alone, tmp_path)


def test_flat_gradients_are_summed_in_fp32_in_place() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16)) for _ in range(3)]
    unused = torch.nn.Parameter(torch.ones(5))
    flat = FlatGradients([*parameters, unused], bucket_elements=7)
    assert [bucket.numel() for bucket in flat.buckets] == [6, 6, 6, 5]
    for _ in range(2):
        flat.zero_()
        for value in (1.0, 2**-9):  # lost if added in bf16
            sum((parameter * value).sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    for parameter, bucket in zip([*parameters, unused], flat.buckets, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.data_ptr() == bucket.data_ptr()
    assert flat.buckets[0].tolist() == [1.0 + 2**-9] * 6
    assert unused.grad is not None and unused.grad.abs().sum() == 0
