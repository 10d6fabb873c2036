"""Negative controls: what a GPU would not forgive, put back on purpose, is found."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fake_gpu import Report, run
from tests.trainer.fake_gpu_run import needs_compiler

pytestmark = needs_compiler


def fault(gpu: Any, name: str) -> Report:
    import torch
    import torch.distributed as dist

    x = torch.ones(8, 4, device="cuda")
    host = torch.ones(8, 4)
    report = Report()
    with gpu.reporting(report):
        if name == "none":
            y = host.pin_memory().to("cuda", non_blocking=True)
            y[-1:] = 0.0
            (x * y + 1.0).sum().sqrt()
            dist.all_reduce(y)
        elif name == "one element set":
            same = x[:, 0] == 1
            same[-1] = False
        elif name == "number read":
            float(x.sum())
        elif name == "list read":
            x[0].tolist()
        elif name == "mask":
            x[x[:, 0] > 0]
        elif name == "unpinned copy":
            host.to("cuda", non_blocking=True)
        elif name == "blocking copy":
            host.pin_memory().to("cuda")
        elif name == "offload":
            torch.empty(8, 4, pin_memory=True).copy_(x)
        elif name == "dtype":
            dist.all_reduce(x.to(torch.int16))
        elif name == "layout":
            dist.all_reduce(x.t())
        elif name == "grid":
            launch_nothing(x)
    return report


def launch_nothing(x: Any) -> None:
    from model.kernels.permute import unpermute_triton

    unpermute_triton._unpermute[(0,)](x, x, x, 1, 1, CHOICES=1, COLUMNS=16)


def both_devices(gpu: Any) -> None:
    import torch

    torch.ones(3, device="cuda") + torch.ones(3)


@pytest.mark.parametrize(
    "name", ["one element set", "unpinned copy", "blocking copy", "dtype", "layout", "grid"]
)
def test_fault_is_found(name):
    assert run(fault, name, world=2).problems


@pytest.mark.parametrize("name", ["number read", "list read", "mask", "offload"])
def test_wait_is_counted(name):
    report = run(fault, name, world=2)
    assert report.waits.total() == 1 and not report.problems


def test_nothing_is_found_where_nothing_is_wrong():
    report = run(fault, "none", world=2)
    assert not report.waits and not report.problems


def test_mixed_devices_raise():
    with pytest.raises(AssertionError, match="device"):
        run(both_devices)
