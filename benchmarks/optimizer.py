"""Time of the optimizer's step and bytes that it sends, beside others, in one run.

The matrices are those of one layer of a model, with random gradients. On one process: ours (ten
Newton–Schulz steps in fp32) beside the bare matrix products of the same batches, which are the
floor, and beside torch.optim.Muon (five steps in bf16, its time times two for equal work); small
matrices in batches and one by one. On two processes of one thread each: backward of a plain sum,
reduction, update and parameters back, beside DeepSpeed's Muon in ZeRO-2 with its five steps, not
compiled. The best of some rounds counts; ours before and after the others, since a machine's speed
drifts.

    python -m benchmarks.optimizer [CONFIG] [--small configs/debug.yaml] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from model import ModelConfig
from model.shapes import Shapes, parameter_shapes
from optim import HybridZero, OptimConfig, build_table
from optim.config import MuonConfig
from optim.zero_plan import newton_schulz_cost
from trainer.parallel.grid import Grid
from trainer.parallel.placement import place_all
from trainer.parallel.sizes import Sizes
from trainer.parallel.zero import make_zero
from trainer.trainer import matrix_sizes

LAYER = "layers.2."
ROUNDS = 5
PAIR_EXPERTS = 4


def read_model(path: str) -> ModelConfig:
    """The model of a config file that stands by itself."""
    return ModelConfig(**yaml.safe_load(Path(path).read_text())["model"])


def muon_shapes(model: ModelConfig, experts: int | None = None) -> Shapes:
    """The matrices of one layer with an indexer; at most some of its experts."""
    shapes = {n: s for n, s in parameter_shapes(model).items() if n.startswith(LAYER)}
    table = build_table(shapes, matrix_sizes(model), OptimConfig())
    found = {entry.name: entry.shape for entry in table if entry.matrices is not None}
    return {
        name: (min(experts, shape[0]), *shape[1:]) if experts and len(shape) == 3 else shape
        for name, shape in found.items()
    }


def tensors(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Random values by name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def make_ours(model: ModelConfig, shapes: Shapes, grid: Grid, muon: MuonConfig) -> HybridZero:
    """Hybrid ZeRO over new parameters."""
    config = OptimConfig(muon=muon, clip_norm=None)
    parameters = {name: Parameter(value) for name, value in tensors(shapes, 0).items()}
    placements = place_all(shapes, grid.sizes, grid.rank)
    table = build_table(shapes, matrix_sizes(model), config)
    return make_zero(parameters, placements, table, config, grid)


def parameters_of(zero: HybridZero) -> dict[str, Parameter]:
    """All parameters by name."""
    return {name: p for bucket in zero.buckets for name, p in bucket.group.parameters.items()}


def best(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Seconds of the quickest call, after one that does not count unless it is the only one."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:] or seconds)


def our_step(model: ModelConfig, shapes: Shapes, muon: MuonConfig) -> Callable[[], None]:
    """A step on one process, gradients given."""
    zero = make_ours(model, shapes, Grid.single(), muon)
    gradients = tensors(shapes, 1)
    for name, parameter in parameters_of(zero).items():
        parameter.grad = gradients[name]

    def step() -> None:
        zero.reduce()
        zero.step(1e-4)

    return step


def batches_of(model: ModelConfig, shapes: Shapes, muon: MuonConfig) -> list[tuple[int, int, int]]:
    """Sizes of the batches that our step makes."""
    inner = make_ours(model, shapes, Grid.single(), muon)._inner
    return [
        (sum(p.last - p.first for p in batch), *sorted(batch[0].entry.matrices[1:]))  # type: ignore
        for batch in inner._batches(inner._muon)
    ]


def bare_products(batches: Sequence[tuple[int, int, int]], steps: int) -> Callable[[], None]:
    """Newton–Schulz's products over the same batches, and nothing else."""
    buffers = [
        (torch.randn(n, r, c), torch.empty(n, r, r), torch.empty(n, r, r), torch.empty(n, r, c))
        for n, r, c in batches
    ]

    def run() -> None:
        for x_NRC, gram_NRR, square_NRR, out_NRC in buffers:
            for _ in range(steps):
                torch.bmm(x_NRC, x_NRC.mT, out=gram_NRR)
                torch.bmm(gram_NRR, gram_NRR, out=square_NRR)
                torch.bmm(square_NRR, x_NRC, out=out_NRC)

    return run


def torch_step(model: ModelConfig, shapes: Shapes) -> Callable[[], object]:
    """torch.optim.Muon over the same matrices, each a parameter."""
    table = build_table(shapes, matrix_sizes(model), OptimConfig())
    gradients = tensors(shapes, 1)
    parameters = []
    for entry in table:
        for matrix in gradients[entry.name].view(entry.matrices):  # type: ignore[arg-type]
            parameter = Parameter(torch.randn(matrix.shape))
            parameter.grad = matrix.contiguous()
            parameters.append(parameter)
    return torch.optim.Muon(parameters, lr=1e-4, adjust_lr_fn="match_rms_adamw").step


def work(model: ModelConfig, shapes: Shapes) -> float:
    """Operations of one step's products."""
    table = build_table(shapes, matrix_sizes(model), OptimConfig())
    return float(
        sum(
            entry.matrices[0] * newton_schulz_cost(*entry.matrices[1:], MuonConfig())
            for entry in table
            if entry.matrices is not None
        )
    )


def alone(name: str, model: ModelConfig, shapes: Shapes) -> Table:
    """One process: ours, the floor, torch's, and one matrix after another."""
    muon, operations = MuonConfig(), work(model, shapes)
    steps = muon.coarse_steps + muon.fine_steps
    ours = our_step(model, shapes, muon)
    seconds = {"ours": best(ours)}
    seconds["floor"] = best(bare_products(batches_of(model, shapes, muon), steps))
    seconds["one"] = best(our_step(model, shapes, MuonConfig(batch_bytes=1)), 2)
    seconds["torch"] = best(torch_step(model, shapes), 0)  # slow: bf16 on a CPU
    seconds["ours"] = min(seconds["ours"], best(ours))
    count = sum(b[0] for b in batches_of(model, shapes, muon))
    table = Table(title=f"{name}: {count} matrices, {operations / 1e9:,.0f} GFLOP a step")
    for column in ("", "ms", "GFLOP/s", "ours is faster by"):
        table.add_column(column, justify="right" if column else "left")
    for key, label, factor in (
        ("ours", "ours", 1.0),
        ("floor", "bare products of the same batches", 1.0),
        ("one", "ours, one matrix after another", 1.0),
        ("torch", "torch.optim.Muon, times 2 for equal work", steps / 5),
    ):
        time_ = seconds[key] * factor
        table.add_row(
            label,
            f"{time_ * 1e3:,.1f}",
            f"{operations / time_ / 1e9:,.0f}",
            "" if key == "ours" else f"{time_ / seconds['ours']:.2f}x",
        )
    table.caption = f"share of the floor's rate: {seconds['floor'] / seconds['ours']:.0%}"
    return table


class Sent(TorchDispatchMode):
    """Bytes that torch.distributed is told to send, as a ring sends them, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._see(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _see(self, name: str, args: Any) -> None:
        boxed = next(a for a in args if isinstance(a, torch.ScriptObject))
        n = dist.ProcessGroup.unbox(boxed).size()
        if name == "allreduce_":
            size = 2 * (n - 1) / n * _nbytes(args[0])
        elif name in ("reduce_", "_reduce_scatter_base_", "broadcast_"):
            size = (n - 1) / n * _nbytes(args[0] if name != "_reduce_scatter_base_" else args[1])
        elif name in ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_"):
            size = (n - 1) * _nbytes(args[1])
        elif name == "barrier":
            size = 0
        else:
            raise ValueError(f"nobody has said how to count {name}")
        self.bytes[name] += round(size)


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_nbytes(item) for item in value)


class Holder(nn.Module):
    """Parameters whose gradients are what is given."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = nn.ParameterList([Parameter(value) for value in values.values()])

    def forward(self, gradients: list[Tensor]) -> Tensor:
        """The sum of all products."""
        pairs = zip(self.values, gradients, strict=True)
        return torch.stack([(p * g).sum() for p, g in pairs]).sum()


def pair(rank: int, folder: str, path: str) -> None:
    """Worker: both optimizers on two processes; the first writes what was measured."""
    torch.set_num_threads(1)
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank), LOCAL_SIZE="2")
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # DeepSpeed's Muon, for minutes on a CPU
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = read_model(path)
    shapes = muon_shapes(model, PAIR_EXPERTS)
    gradients = list(tensors(shapes, rank + 1).values())
    found = {}
    for name, make in (("ours", _our_pair), ("deepspeed", _deepspeed_pair), ("ours", _our_pair)):
        step = make(model, shapes, gradients)
        dist.barrier()
        seconds = best(step, 3)
        with Sent() as sent:
            step()
        before = found.get(name, (seconds, {}))[0]
        found[name] = (min(seconds, before), dict(sent.bytes))
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with Sent() as sent:
        dist.all_reduce(flat)
    found["all-reduce"] = (0.0, dict(sent.bytes))
    if rank == 0:
        elements = sum(gradient.numel() for gradient in gradients)
        torch.save((found, elements, work(model, shapes)), f"{folder}/found.pt")
    dist.destroy_process_group()


def _our_pair(model: ModelConfig, shapes: Shapes, gradients: list[Tensor]) -> Callable[[], None]:
    zero = make_ours(model, shapes, Grid.build(Sizes(2), torch.device("cpu")), MuonConfig())
    parameters = [parameters_of(zero)[name] for name in shapes]

    def step() -> None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        zero.expect(dict.fromkeys(shapes, 1))
        pairs = zip(parameters, gradients, strict=True)
        torch.stack([(p * g).sum() for p, g in pairs]).sum().backward()
        zero.reduce()
        zero.step(1e-4)

    return step


def _deepspeed_pair(
    model: ModelConfig, shapes: Shapes, gradients: list[Tensor]
) -> Callable[[], None]:
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    holder = Holder(tensors(shapes, 0))
    for parameter in holder.values:
        parameter.use_muon = True
        parameter.is_expert_group = parameter.dim() == 3
    settings = {"lr": 1e-4, "momentum": 0.95, "weight_decay": 0.1, "use_muon": True}
    optimizer = MuonWithAuxAdam([{"params": list(holder.values), "ns_method": "gram", **settings}])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    engine, *_ = deepspeed.initialize(
        model=holder, optimizer=optimizer, config=config, dist_init_required=False
    )

    def step() -> None:
        engine.backward(engine(gradients))
        engine.step()

    return step


def pair_table(path: str) -> Table:
    """Two processes: time and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(pair, (folder, path), nprocs=2)
        found, elements, operations = torch.load(f"{folder}/found.pt", weights_only=True)
    table = Table(
        title=f"two processes of one thread: {elements / 1e6:.1f}M elements, "
        f"{operations / 1e9:,.0f} GFLOP in our ten steps"
    )
    for column in ("", "ms", "bytes sent, over 4P", "of which"):
        table.add_column(column, justify="left" if column in ("", "of which") else "right")
    for name, (seconds, sent) in found.items():
        by_kind = ", ".join(f"{kind} {size / 4 / elements:.2f}" for kind, size in sent.items())
        table.add_row(
            name,
            f"{seconds * 1e3:,.0f}" if seconds else "",
            f"{sum(sent.values()) / 4 / elements:.2f}",
            by_kind,
        )
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/nano.yaml")
    parser.add_argument("--small", default="configs/debug.yaml")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", type=int, default=PAIR_EXPERTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=140)
    console.print(f"{arguments.threads} threads of {platform.machine()}, torch {torch.__version__}")
    for path in (arguments.config, arguments.small):
        model = read_model(path)
        console.print(alone(path, model, muon_shapes(model, arguments.experts)))
    console.print(pair_table(arguments.config))


if __name__ == "__main__":
    main()
