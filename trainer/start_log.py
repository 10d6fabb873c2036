"""What a run logs about its config when it starts."""

from collections.abc import Iterator

from trainer.config import RunConfig
from trainer.kernels import AgreedKernels
from trainer.run_tokenizer import other_tokenizer


def start_notices(config: RunConfig, kernels: AgreedKernels, needs_counts: bool) -> Iterator[str]:
    """Yields lines about what may not be as the user expects.

    `needs_counts`: whether hash-routed layers lack the counts of ids.
    """
    if needs_counts:
        yield (
            f"{config.data.shards} has no counts of ids (v4 data prepare counts them): "
            "hash-routed layers take all ids for equally frequent"
        )
    if notice := other_tokenizer(config):
        yield f"warning: {notice}"
    if config.precision == "fp8" and kernels.kernels.fp8.name == "eager":
        yield (
            "precision = fp8: no FP8 kernel is used; operands are rounded to FP8 and "
            "multiplied in bf16, with no gain in speed"
        )
    choices = kernels.kernels.by_operation()
    if compiled := [name for name, choice in choices.items() if choice.name == "compile"]:
        yield (
            f"kernels: the first step compiles {', '.join(compiled)}, or loads them from "
            "torch's cache"
        )
