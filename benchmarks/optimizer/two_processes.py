"""The optimizer's step on two processes compared with DeepSpeed's Muon in ZeRO-2: time and bytes.

A step is the backward of a weighted sum (whose gradients are its weights), the reduction, the
update, and the gather of the parameters. All candidates alternate in the same two processes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.table import Table
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.optimizer.tasks import RATE, Matrices, interleaved, parameters_of, ratio
from optim import MuonConfig
from optim.zero import Precision
from trainer.deepspeed.engine import import_deepspeed
from trainer.parallel.degrees import Degrees
from trainer.parallel.grid import Grid

THEIR_STEPS = MuonConfig(coarse_steps=5, fine_steps=0, gram=True)


class Sent(TorchDispatchMode):
    """Counts the bytes that torch.distributed sends, by operator; collectives count as rings."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        boxed = next(a for a in args if isinstance(a, torch.ScriptObject))
        n = dist.ProcessGroup.unbox(boxed).size()
        if name == "allreduce_":
            size = 2 * (n - 1) / n * _nbytes(args[0])
        elif name in ("reduce_", "_reduce_scatter_base_", "broadcast_"):
            size = (n - 1) / n * _nbytes(args[0] if name != "_reduce_scatter_base_" else args[1])
        elif name in ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_"):
            size = (n - 1) * _nbytes(args[1])
        elif name == "alltoall_base_":
            size = (n - 1) / n * _nbytes(args[1])
        elif name == "barrier":
            size = 0
        else:
            raise ValueError(f"no formula for the bytes of {name}")
        self.bytes[name.strip("_")] += round(size)


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_nbytes(item) for item in value)


class WeightedSum(nn.Module):
    """A module whose parameters get the gradients that it is called with."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = nn.ParameterList([Parameter(value) for value in values.values()])

    def forward(self, gradients: list[Tensor]) -> Tensor:
        """Returns the scalar whose gradients these are."""
        return weighted_sum(list(self.values), gradients)


def weighted_sum(parameters: list[Parameter], gradients: list[Tensor]) -> Tensor:
    """Returns a scalar with these gradients."""
    pairs = zip(parameters, gradients, strict=True)
    return torch.stack([(p * g).sum() for p, g in pairs]).sum()


def measure(rank: int, folder: str, path: str, experts: int, rounds: int) -> None:
    """Times all candidates on one of two processes; the first process saves the results."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # required by DeepSpeed
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    matrices = Matrices(path, experts)
    gradients = list(matrices.values(rank + 1).values())
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    calls: dict[str, Callable[[], object]] = {
        "ours": our_step(matrices, gradients, MuonConfig()),
        "ours, experts' gradients in bf16": our_step(matrices, gradients, MuonConfig(), "bf16"),
        "ours, five steps, gram": our_step(matrices, gradients, THEIR_STEPS),
        "DeepSpeed's Muon, ZeRO-2: five steps, gram": deepspeed_step(matrices, gradients),
        "plain all-reduce of gradients alone": lambda: dist.all_reduce(flat),
    }
    seconds = interleaved(calls, rounds, dist.barrier)
    sent = {}
    for name, call in calls.items():
        with Sent() as counted:
            call()
        sent[name] = dict(counted.bytes)
    if rank == 0:
        torch.save((seconds, sent), f"{folder}/results.pt")
    dist.destroy_process_group()


def our_step(
    matrices: Matrices, gradients: list[Tensor], muon: MuonConfig, experts: Precision = "fp32"
) -> Callable[[], object]:
    """Returns a step of ours, which sends parts of the buffer during backward."""
    zero = matrices.zero(Grid.build(Degrees(2), torch.device("cpu")), muon, experts)
    named = parameters_of(zero)
    parameters = [named[name] for name in matrices.shapes]

    def step() -> None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        zero.expect(dict.fromkeys(matrices.shapes, 1))
        weighted_sum(parameters, gradients).backward()
        zero.reduce()
        zero.step(RATE)

    return step


def deepspeed_step(matrices: Matrices, gradients: list[Tensor]) -> Callable[[], object]:
    """Returns a step of DeepSpeed's Muon with its defaults; the first step compiles it."""
    warnings.simplefilter("ignore", FutureWarning)  # of the compiler, about torch itself
    deepspeed = import_deepspeed(torch.device("cpu"))
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    module = WeightedSum(matrices.values(0))
    for parameter in module.values:
        parameter.use_muon = True
        parameter.is_expert_group = parameter.dim() == 3
    settings = {"lr": RATE, "momentum": 0.95, "weight_decay": 0.1, "use_muon": True}
    optimizer = MuonWithAuxAdam([{"params": list(module.values), "ns_method": "gram", **settings}])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )

    def step() -> None:
        engine.backward(engine(gradients))
        engine.step()

    return step


def two_process_table(path: str, experts: int, rounds: int) -> Table:
    """Measures two processes of one thread each: time and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder, path, experts, rounds), nprocs=2)
        seconds, sent = torch.load(f"{folder}/results.pt", weights_only=True)
    size = 4 * Matrices(path, experts).elements
    table = Table(
        title=f"the same matrices on two processes of one thread: {size / 4e6:.1f}M elements P; "
        "backward, reduction, update and gather of the parameters",
        caption="bytes: sent by a process in a step, counted; ours recomputes Gram matrices every "
        "second step, DeepSpeed once in five",
    )
    for column in ("", "ms", "over ours", "MB sent", "over 4P", "by collective, over 4P"):
        table.add_column(
            column, justify="left" if column in ("", "by collective, over 4P") else "right"
        )
    for name, times in seconds.items():
        kinds = ", ".join(f"{kind} {b / size:.2f}" for kind, b in sent[name].items() if b)
        table.add_row(
            name,
            f"{statistics.median(times) * 1e3:,.0f}",
            f"{ratio(seconds, name, 'ours'):.2f}x",
            f"{sum(sent[name].values()) / 1e6:,.1f}",
            f"{sum(sent[name].values()) / size:.2f}",
            kinds,
        )
    return table
