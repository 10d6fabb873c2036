"""Runs that the trainer's tests share."""

from pathlib import Path

import pytest
import torch

from tests.distributed import spawn
from tests.trainer.tiny import Job, train_jobs

COMPARED = [
    "steps=8",
    "data.global_batch_size=5",
    "data.micro_batch_size=1",
    "evaluation.max_rows=null",
]
TWO_RANKS: list[Job] = [
    ("straight", ["steps=20"], 0),
    ("halves", ["steps=20"], 10),
    ("halves", ["steps=20"], 0),
    ("compared", COMPARED, 0),
    ("moved", ["steps=3"], 0),
]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def on_two_ranks(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs of TWO_RANKS, each trained on two processes."""
    folder = tmp_path_factory.mktemp("two")
    spawn(train_jobs, 2, tiny, folder, TWO_RANKS)
    return folder
