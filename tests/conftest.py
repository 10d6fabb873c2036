"""Every process of the suite computes on one thread: `make test` runs two of them side by side.

A test marked `gpu` is skipped where torch finds no GPU, or one below the `capability` it asks for;
`make bench-gpu` runs all of them.
"""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

HERE = Path(__file__).parent
LONG = (HERE / "trainer", HERE / "launch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the folders with the longest files first: the last files should be short.

    Two processes take file by file, and while one works on a long last file the other is idle.
    """
    items.sort(key=lambda item: not any(item.path.is_relative_to(folder) for folder in LONG))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests whose GPU this machine lacks, with the reason."""
    for mark in item.iter_markers("gpu"):
        needed = mark.kwargs.get("capability", (0, 0))
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU, and torch.cuda.is_available() is False")
        elif (capability := torch.cuda.get_device_capability()) < needed:
            pytest.skip(f"needs a GPU of capability {needed}, and this one has {capability}")
