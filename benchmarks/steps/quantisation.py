"""The cost of MXFP4 and of an FP8 KV: rounding after training, and quantisation-aware training.

    python -m benchmarks.steps.quantisation configs/debug.yaml FOLDER --before 60 --phase 20
    python -m benchmarks.steps.quantisation configs/debug.yaml FOLDER --time [key=value]

The first trains `before` steps, then from that checkpoint, on the same rows, `phase` steps with
each value of `quantisation`. It prints validation losses, how much of the experts FP8 represents
exactly, and whether the packed export has the loss of training. If it is killed, the same arguments
resume it. The second times a step with each value, alternating.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from data import Loader
from model.kernels.block_sizes import MXFP4_BLOCK
from model.kernels.mxfp4 import fits_fp8, from_fp8, quantise, quantise_dequantise, to_fp8
from trainer.build import build_native
from trainer.checkpoint import checkpoints_in
from trainer.config import RunConfig, load_config
from trainer.config.phases import Quantisation
from trainer.engine import NativeEngine
from trainer.evaluation import Validation
from trainer.export import export_run, import_hf_folder, open_run
from trainer.parallel.grid import Grid
from trainer.process.local_device import local_device
from trainer.process.signals import StopRequest
from trainer.trainer import Trainer

QAT = "quantisation=mxfp4"
EXPERTS = "quantisation=mxfp4_without_kv"


def train(config: RunConfig, last: int) -> None:
    """Trains to step `last`, or resumes."""
    saved = checkpoints_in(config.run_dir / "checkpoints")
    if saved and int(saved[-1].name.removeprefix("step-")) >= last:
        return
    stop = StopRequest()
    trainer = Trainer(config, Grid.single(local_device("auto")), stop)
    trainer.periodic.append(lambda state, _: stop.request() if state.step == last - 1 else None)
    trainer.run()


def validation(config: RunConfig) -> float:
    """Returns the validation loss of the newest checkpoint, rounded if the config says so."""
    grid = Grid.single(local_device("auto"))
    local, _ = open_run(config, grid)
    engine = NativeEngine(local, grid)
    engine.quantisation = config.quantisation
    return Validation(config, grid).evaluate(engine).loss


def expert_matrices(config: RunConfig) -> list[Tensor]:
    """Returns all matrices of all routed experts."""
    local, _ = open_run(config, Grid.single(local_device("auto")))
    named = local.model.named_parameters()
    stacks = [p.detach() for name, p in named if ".ffn.experts." in name]
    return [matrix for stack in stacks for matrix in stack]


def fp8(config: RunConfig) -> tuple[int, int, int, bool]:
    """Returns how many blocks of 128 x 128 there are and fit FP8, the largest range of scales in a
    matrix (an exponent of two), and whether FP8 returns the FP4 numbers of those that fit."""
    blocks = fitting = span = 0
    lossless = True
    for matrix in expert_matrices(config):
        packed = quantise(matrix)
        fits = fits_fp8(packed)
        blocks, fitting = blocks + fits.numel(), fitting + int(fits.sum())
        is_nonzero = matrix.unflatten(1, (-1, MXFP4_BLOCK)).any(-1)
        exponents = packed.scales.view(torch.uint8).int()[is_nonzero]
        span = max(span, int(exponents.max() - exponents.min()))
        if fits.all():
            lossless &= torch.equal(from_fp8(*to_fp8(packed)), quantise_dequantise(matrix))
    return blocks, fitting, span, lossless


def compare(path: Path, folder: Path, before: int, phase: int, overrides: list[str]) -> None:
    """Trains, and prints the table."""
    common = [*overrides, f"steps={before + phase}", "evaluation.every=0", "checkpoint.every=10"]

    def config(name: str, *more: str) -> RunConfig:
        return load_config(path, [*common, f"run_dir={folder / name}", *more])

    train(config("base"), before)
    for name, more in (("plain", []), ("experts", [EXPERTS]), ("qat", [QAT])):
        if not (folder / name).exists():
            shutil.copytree(folder / "base", folder / f"{name}.part", dirs_exist_ok=True)
            (folder / f"{name}.part").rename(folder / name)
        train(config(name, *more), before + phase)
    plain, qat = config("plain"), config("qat", QAT)
    print("\n| weights | validation loss, nats | minus unquantised |\n|---|---:|---:|")
    for step, name in ((before, "base"), (before + phase, "plain")):
        unquantised = validation(config(name))
        print(f"| step {step} | {unquantised:.4f} | |")
        rows = [
            ("experts and index rounded", validation(config(name, EXPERTS))),
            ("KV rounded, too", validation(config(name, QAT))),
        ]
        if step > before:
            without_kv = validation(config("experts", EXPERTS))
            rows.append((f"the last {phase} with experts and index rounded", without_kv))
            rows.append((f"the last {phase} with the KV rounded, too", validation(qat)))
        for label, loss in rows:
            print(f"| step {step}, {label} | {loss:.4f} | {loss - unquantised:+.4f} |")
    for name, run in (("unquantised", plain), ("quantised", qat)):
        blocks, fitting, span, lossless = fp8(run)
        print(
            f"{name}: {fitting} of {blocks} blocks of 128 x 128 fit FP8; scales inside a matrix "
            f"differ by at most 2^{span}; lossless: {lossless}"
        )
    imported = config("imported", QAT)
    for old in (folder / "packed", folder / "imported"):
        shutil.rmtree(old, ignore_errors=True)
    export_run(qat, folder / "packed", weights="mxfp4_experts")
    import_hf_folder(imported, folder / "packed")
    print(f"exported packed and imported: {validation(imported)} and {validation(qat)}")


def take_times(path: Path, overrides: list[str], repeats: int = 5) -> None:
    """Times forward and backward of a step with each quantisation in turn, by the CPU's clock."""
    config = load_config(path, overrides)
    grid = Grid.single(local_device("auto"))
    local, _ = build_native(config, grid)
    engine = NativeEngine(local, grid)
    batches = Loader(config.data, config.seed, 0, 1).at(0)
    seconds: dict[Quantisation, list[float]] = {"none": [], "mxfp4_without_kv": [], "mxfp4": []}
    for repeat in range(repeats + 1):
        for quantisation in seconds:
            engine.quantisation = quantisation
            start = time.process_time()
            engine.forward_backward(batches)
            if repeat:  # the first is a warm-up
                seconds[quantisation].append(time.process_time() - start)
    plain = min(seconds["none"])
    print(f"{len(batches)} microbatches")
    for quantisation, times in seconds.items():
        print(f"quantisation = {quantisation}: {min(times):.3f} s, ratio {min(times) / plain:.3f}")


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--before", type=int, default=60)
    parser.add_argument("--phase", type=int, default=20)
    parser.add_argument("--time", action="store_true")
    options, overrides = parser.parse_known_args()
    if options.time:
        take_times(options.config, overrides)
    else:
        compare(options.config, options.folder, options.before, options.phase, overrides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
