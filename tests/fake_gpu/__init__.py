"""A GPU of shapes: the trainer's own code runs, and what a real GPU would not forgive is counted.

`run(function, ...)` runs a function of a test module in a process with a fake GPU. It finds
tensors of different devices in one operation, numbers that are read back, copies that block,
collectives that NCCL refuses, grids that cannot be launched, and how many variants of a kernel are
compiled. It finds no wrong values, no races, and nothing about the order of streams.
"""

from tests.fake_gpu.process import Server, run
from tests.fake_gpu.report import Report

__all__ = ["Report", "Server", "run"]
