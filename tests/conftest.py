"""Every process of the suite computes on one thread: `make test` runs two of them side by side.

GPUs are hidden from the suite and from the processes that it starts: two processes would need two,
and a rank on a CPU is compared with it to the bit. Tests marked `gpu` run where they are asked for,
with `-m gpu` as in `make bench-gpu`; then those are skipped whose `capability` the GPU lacks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.s3 import S3Server

torch.set_num_threads(1)

HERE = Path(__file__).parent
LONGEST_FIRST = ("trainer/deepspeed", "trainer/parallel", "launch", "trainer")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config file of a run whose tokenizer and shards are ready."""
    from tests.trainer.tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """An S3 server on loopback, to which the environment leads."""
    from tests.s3 import start_server

    with start_server() as server:
        yield server


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs, before any test makes torch look for them, unless the mark `gpu` is selected."""
    if not re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first.

    Two processes take file by file, and while one works on a long last file the other is idle.
    """
    places = [HERE / place for place in LONGEST_FIRST]

    def order(item: pytest.Item) -> int:
        found = (at for at, place in enumerate(places) if item.path.is_relative_to(place))
        return next(found, len(places))

    items.sort(key=order)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests whose GPU this machine lacks, with the reason."""
    for mark in item.iter_markers("gpu"):
        needed = mark.kwargs.get("capability", (0, 0))
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU that torch can use, and the option -m gpu")
        elif (capability := torch.cuda.get_device_capability()) < needed:
            pytest.skip(f"needs a GPU of capability {needed}, and this one has {capability}")
