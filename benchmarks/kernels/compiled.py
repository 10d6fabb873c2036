"""Prints what Triton's compiler shows of an operation's kernels, for any GPU and without one.

    python -m benchmarks.kernels.compiled configs/flash.yaml attention --capability 80

The rows are those that docs/performance.md quotes: shared memory, registers and stack, copies under
way while earlier ones are used, and exchanges between threads; a line for each of the operation's
choices of block sizes.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from model.kernel_cases import CASES, Sizes
from model.kernels.operations import Choice
from tests.model.kernels.compiled_code import CompiledCode
from tests.trainer.kernels.target import LIMITS, target
from trainer.config import load_config
from trainer.kernels.compare import results
from trainer.kernels.fit import compiled_for, exceeded, needs_of, record_variants

SAMPLES = (1, 2, 129, 70)


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("operation", choices=sorted(CASES))
    parser.add_argument("--capability", type=int, choices=sorted(LIMITS), default=90)
    parser.add_argument("--kernel", default="", help="only kernels whose names contain this")
    arguments = parser.parse_args()
    # The vocabulary only decides how often a kernel loops.
    config = load_config(arguments.config).model.model_copy(update={"vocab_size": 4097})
    operation = CASES[arguments.operation]
    sizes = Sizes(config, SAMPLES, torch.bfloat16, torch.device("cpu"), dense=True)
    with target(arguments.capability) as limits:
        for blocks in operation.block_choices(config):
            print(", ".join(f"{name} {size}" for name, size in blocks.items()) or "own sizes")
            variants = {}
            for make in operation.cases(sizes):
                case = make()
                call = partial(results, case, case.function(Choice("triton", blocks)))
                variants |= {variant.key: variant for variant in record_variants(call)}
            for variant in variants.values():
                if arguments.kernel not in variant.name:
                    continue
                binary = compiled_for(variant, limits)
                code = CompiledCode.of(binary)
                print(
                    f"  {variant.name:32} shared {code.shared_bytes:7,}, {code.registers:3} "
                    f"registers, stack {code.stack_bytes:3}, {code.pending_copies} copies pending, "
                    f"{code.exchanges:2} exchanges"
                    + ("; does not fit" * (exceeded("", needs_of(binary), limits) is not None))
                )


if __name__ == "__main__":
    main()
