"""The lines about memory at the start of a run."""

import os

import torch

from trainer.config import RunConfig
from trainer.device import available_memory
from trainer.formatting import gib
from trainer.planning.dry_run import count_memory
from trainer.planning.static_memory import memory_parts, snapshot_memory


def expected_memory_report(config: RunConfig, world_size: int) -> str:
    """Returns a line about the memory that the fullest process holds throughout the run.

    It is the closed form, which costs milliseconds and builds no model; activations, which
    `v4 plan --dry-run` counts, are not included. Raises ConfigError as `RunConfig.degrees`.
    """
    if config.engine != "native":
        return f"memory: no estimate before the run with engine = {config.engine}"
    parts = memory_parts(config, config.degrees(world_size))
    listing = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
    return (
        f"memory: {gib(sum(parts.values()))} expected throughout the run on the fullest process: "
        f"{listing}; v4 plan --dry-run adds activations"
    )


def host_memory_warning(config: RunConfig, device: torch.device) -> str | None:
    """Returns a warning where a run on CPUs needs more memory than this host has available.

    On a GPU such a run ends with an error; on a host the kernel kills it. The count of activations
    takes seconds, so it is made only where a rough estimate comes near. Called by one process,
    before there is a process group.
    """
    if device.type != "cpu" or config.engine != "native":
        return None
    world, available = int(os.environ.get("WORLD_SIZE", "1")), available_memory(device)
    degrees = config.degrees(world)
    lasting = sum(memory_parts(config, degrees).values()) + snapshot_memory(config, degrees)
    if lasting + 2 * rough_activations(config) < available:
        return None
    fullest = count_memory(config, world).fullest
    needed = fullest.total + fullest.offloaded + snapshot_memory(config, degrees)
    if needed < available:
        return None
    return (
        f"the run takes about {gib(needed)} on the fullest process, while {gib(available)} of this "
        "host's memory are available to it: the kernel may kill it; use a smaller "
        f"data.micro_batch_size (now {config.data.micro_batch_size}) or data.seq_len (now "
        f"{config.data.seq_len}), or parallel.recompute"
    )


def rough_activations(config: RunConfig) -> int:
    """Returns bytes of a microbatch's activations, 1 to 3 times those that a dry run counts."""
    model = config.model
    tokens = max(p.rows.micro_batch_size * p.rows.seq_len for p in config.segment.phases)
    streams = model.hc_mult * model.hidden_size
    heads = model.num_attention_heads * model.head_dim
    experts = model.moe_intermediate_size * (model.num_experts_per_tok + 1)
    mtp = model.num_nextn_predict_layers
    layers = 6 * (model.num_hidden_layers + mtp) * (streams + heads + experts)
    selection = 2 * tokens  # the indexers compare all queries with all entries
    return 4 * tokens * (layers + selection + 2 * (1 + mtp) * model.vocab_size)
