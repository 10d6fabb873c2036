"""Checks and completion of a DeepSpeed block. Imports no torch.

The block is in DeepSpeed's own format. What the rest of the config decides (batch, precision,
clipping, learning rate, optimizer settings) is filled in; a block that has it as well must have the
same value or `auto`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from optim.config import OptimConfig
from trainer.config.parallel import ParallelConfig
from trainer.config.settings import RunSettings

Block = dict[str, Any]
AUTO = "auto"
NS_METHODS = ("gram", "standard")
STAGES = (0, 1, 2, 3)
_SECTIONS = ("zero_optimization", "optimizer", "bf16")
_KNOWN = {
    *_SECTIONS,
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "wall_clock_breakdown",
}
_OFFLOADS = ("offload_optimizer", "offload_param")
_KNOWN_OFFLOAD = {"device", "pin_memory"}
_KNOWN_ZERO = {"stage", *_OFFLOADS}
_ELEMENTS = ("reduce_bucket_size", "allgather_bucket_size", "sub_group_size")
_KNOWN_ZERO |= {*_ELEMENTS}
_FOREIGN = {
    "scheduler": "optim.schedule",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "tensor_parallel": "parallel.tensor",
    "sequence_parallel_size": "parallel.context",
    "pipeline": "parallel.pipeline",
    "curriculum_learning": "data",
    "data_efficiency": "data",
}
_DEGREES = ("tensor", "expert", "pipeline", "context", "expert_tensor")


def zero_stage(block: Mapping[str, Any]) -> int:
    """Returns the block's ZeRO stage, 0 if it has none or one that is no number."""
    stage = block.get("zero_optimization", {}).get("stage", 0)
    return stage if isinstance(stage, int) else 0  # `_zero` reports what is not supported


def deepspeed_problems(config: RunSettings) -> Iterator[str]:
    """Yields the settings that are incompatible with the engine DeepSpeed or its block.

    - `deepspeed` needs `engine` = deepspeed, and agrees with `data`, `precision` and `optim`.
    - `fit_to_memory` needs `engine` = native.
    - `precision` = bf16 needs ZeRO stage 1 or 2 in `deepspeed`.
    - `optim.matrix_optimizer` = adamw needs an optimizer of type AdamW in `deepspeed`, and muon one
      of type Muon.
    """
    block: Block | None = config.deepspeed
    if config.engine != "deepspeed":
        if block is not None:
            yield "a deepspeed block needs engine = deepspeed; engine is native"
        return
    block = block or {}
    for section in _SECTIONS:
        if section in block and not isinstance(block[section], dict):
            yield f"deepspeed.{section} should be a mapping, not {block[section]!r}"
            return
    yield from _degrees(config.parallel)
    if config.fit_to_memory:
        yield (
            "fit_to_memory = true is not supported with engine = deepspeed, whose memory is not "
            "counted; use false"
        )
    if config.precision == "bf16" and zero_stage(block) not in (1, 2):
        yield (
            f"precision = bf16 with deepspeed.zero_optimization.stage = {zero_stage(block)}: only "
            "stages 1 and 2 keep in fp32 what V4 computes in fp32; use one of them, or fp32"
        )
    yield from _unknown(block)
    yield from _values(config, block)
    yield from _zero(block.get("zero_optimization", {}))
    yield from _optimizer(config, block.get("optimizer", {}))


def _degrees(parallel: ParallelConfig) -> Iterator[str]:
    """Yields parallelism that only the native engine supports.

    - `parallel.tensor`, `parallel.expert`, `parallel.pipeline`, `parallel.context` and
      `parallel.expert_tensor` are 1 with `engine` = deepspeed.
    - `parallel.grad_reduce_dtype` and `parallel.expert_grad_reduce_dtype` are fp32 with `engine` =
      deepspeed.
    - `parallel.recompute` is empty with `engine` = deepspeed.
    """
    for axis in _DEGREES:
        if (degree := getattr(parallel, axis)) != 1:
            yield (
                f"parallel.{axis} = {degree} is not supported with engine = deepspeed, which has "
                "only data parallelism; use 1"
            )
    for field in ("grad_reduce_dtype", "expert_grad_reduce_dtype"):
        if (value := getattr(parallel, field)) != "fp32":
            yield (
                f"parallel.{field} = {value} is not supported with engine = deepspeed, which sends "
                "gradients in the model's precision; use fp32"
            )
    if parallel.recompute:
        yield "parallel.recompute is not supported with engine = deepspeed; leave it empty"


def _unknown(block: Block) -> Iterator[str]:
    for field in block:
        if field in _FOREIGN:
            decides = _FOREIGN[field]
            yield f"deepspeed.{field} is not allowed, since {decides} decides it; omit it"
        elif field not in _KNOWN:
            yield f"deepspeed.{field} is not supported; omit it"
    for field in block.get("zero_optimization", {}):
        if field not in _KNOWN_ZERO:
            yield f"deepspeed.zero_optimization.{field} is not supported; omit it"


def _values(config: RunSettings, block: Block) -> Iterator[str]:
    data = config.data
    bf16 = block.get("bf16", {}).get("enabled", AUTO)
    decided = {
        "train_batch_size": ("data.global_batch_size", data.global_batch_size),
        "train_micro_batch_size_per_gpu": ("data.micro_batch_size", data.micro_batch_size),
        "gradient_clipping": ("optim.clip_norm", config.optim.clip_norm or 0.0),
    }
    for field, (name, wanted) in decided.items():
        theirs = block.get(field, AUTO)
        if theirs not in (AUTO, wanted):
            yield f"deepspeed.{field} = {theirs!r} contradicts {name} = {wanted}; omit it"
    if bf16 not in (AUTO, config.precision == "bf16"):
        yield (
            f"deepspeed.bf16.enabled = {bf16!r} contradicts precision = {config.precision}; omit it"
        )


def _zero(zero: Block) -> Iterator[str]:
    stage = zero.get("stage", 0)
    if stage not in STAGES:
        yield f"deepspeed.zero_optimization.stage = {stage!r} should be 0, 1, 2 or 3"
    for field in _ELEMENTS:
        value = zero.get(field, AUTO)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value != AUTO and not (is_number and 1 <= value <= 1e15 and value == int(value)):
            name = f"deepspeed.zero_optimization.{field}"
            yield f"{name} = {value!r} should be a whole number of elements, at least 1"
    for field in _OFFLOADS:
        section = zero.get(field, {})
        name = f"deepspeed.zero_optimization.{field}"
        if not isinstance(section, dict):
            yield f"{name} should be a mapping, not {section!r}"
            return
        device = section.get("device", "none")
        if device == "nvme":
            yield (
                f"{name}.device = 'nvme' is not supported: its optimizer does not update as AdamW "
                "does; use cpu"
            )
        elif device not in ("none", "cpu"):
            yield f"{name}.device = {device!r} should be cpu or none"
        elif device != "none" and stage != 3:
            yield f"{name} needs deepspeed.zero_optimization.stage = 3; it is {stage}"
        for unknown in sorted(set(section) - _KNOWN_OFFLOAD):
            yield f"{name}.{unknown} is not supported; omit it"


def _optimizer(config: RunSettings, section: Block) -> Iterator[str]:
    kind, optim = section.get("type"), config.optim
    wanted = {"adamw": "AdamW", "muon": "Muon"}[optim.matrix_optimizer]
    if kind != wanted:
        shown = "missing" if kind is None else repr(kind)
        yield (
            f"deepspeed.optimizer.type is {shown} and should be {wanted}, as in "
            f"optim.matrix_optimizer = {optim.matrix_optimizer}"
        )
    decided = {
        "lr": ("optim.learning_rate", optim.learning_rate),
        "betas": ("optim.adamw.betas", list(optim.adamw.betas)),
        "eps": ("optim.adamw.eps", optim.adamw.eps),
        "weight_decay": ("optim.adamw.weight_decay", optim.adamw.weight_decay),
    }
    if kind == "Muon":
        yield from _muon(optim, zero_stage(config.deepspeed or {}))
        decided["momentum"] = ("optim.muon.momentum", optim.muon.momentum)
    for field, theirs in section.get("params", {}).items():
        if kind == "Muon" and field == "ns_method":
            if theirs not in NS_METHODS:
                name = "deepspeed.optimizer.params.ns_method"
                yield f"{name} = {theirs!r} should be gram or standard"
        elif field not in decided:
            yield f"deepspeed.optimizer.params.{field} is not supported; omit it"
        elif theirs not in (AUTO, decided[field][1]):
            name, ours = decided[field]
            yield f"deepspeed.optimizer.params.{field} = {theirs!r} contradicts {name} = {ours}"


def _muon(optim: OptimConfig, stage: int) -> Iterator[str]:
    """Yields settings that DeepSpeed's Muon does not support.

    - `optim.clip_norm` is null with DeepSpeed's Muon.
    - `optim.muon.momentum_warmup_steps` is 0 with DeepSpeed's Muon.
    - `deepspeed` has ZeRO stage 1, 2 or 3 with DeepSpeed's Muon.
    """
    if optim.clip_norm is not None:
        yield (
            f"optim.clip_norm = {optim.clip_norm:g} is not supported with DeepSpeed's Muon, which "
            "would clip the updates instead of the gradients; use null"
        )
    if optim.muon.momentum_warmup_steps:
        yield (
            f"optim.muon.momentum_warmup_steps = {optim.muon.momentum_warmup_steps} is not "
            "supported with DeepSpeed's Muon; use 0"
        )
    if stage == 0:
        yield (
            "deepspeed.zero_optimization.stage = 0 is not supported with DeepSpeed's Muon, which "
            "treats a stack of matrices as one matrix there; use 1, 2 or 3"
        )


def resolve(config: RunSettings, world: int) -> Block:
    """Returns the block with everything filled in, for `deepspeed.initialize`.

    Raises ValueError where gradient_accumulation_steps does not fit the number of processes.
    """
    block: Block = dict(config.deepspeed or {})
    micro = min(config.data.micro_batch_size, -(-config.data.global_batch_size // world))
    steps = -(-config.data.global_batch_size // (micro * world))
    theirs = block.get("gradient_accumulation_steps", AUTO)
    if theirs not in (AUTO, steps):
        raise ValueError(
            f"deepspeed.gradient_accumulation_steps = {theirs!r} should be {steps} for "
            f"data.global_batch_size = {config.data.global_batch_size}, data.micro_batch_size = "
            f"{config.data.micro_batch_size} and {world} processes"
        )
    block.pop("optimizer", None)  # the engine makes it, from the table
    if config.optim.matrix_optimizer == "muon" and zero_stage(block) == 3:
        block["zero_optimization"] = {**block["zero_optimization"], "reduce_scatter": False}
    # The engine marks the accumulation boundary itself, and backward does not divide by the number
    # of microbatches (scale_wrt_gas=False): DeepSpeed only accumulates gradients.
    block.update(
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=steps,
        train_batch_size=micro * steps * world,
        gradient_clipping=config.optim.clip_norm or 0.0,
        bf16={"enabled": config.precision == "bf16"},
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    block.setdefault("steps_per_print", 2**62)
    return block
