"""Models for the stability benchmarks, trained on the demo's text in this process.

`small` has every part of configs/debug.yaml at a fraction of the width and 512 tokens a step;
`demo` is the dense phase of configs/recipe-long.yaml, with 9.7M parameters and 4,096 tokens a
step. `v4 demo` prepares the text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from trainer.config import RunConfig, load_config
from trainer.parallel.grid import Grid
from trainer.process.local_device import local_device
from trainer.trainer import Trainer

Size = Literal["small", "demo"]

_SMALL = (
    "precision=fp32",
    "model.hidden_size=32",
    "model.num_hidden_layers=3",
    "model.num_hash_layers=1",
    "model.layer_types=[window, csa, hca]",
    "model.num_attention_heads=2",
    "model.head_dim=16",
    "model.q_lora_rank=16",
    "model.o_lora_rank=8",
    "model.sliding_window=16",
    "model.index_n_heads=2",
    "model.index_head_dim=16",
    "model.index_topk=4",
    "model.hca_compress_ratio=16",
    "model.n_routed_experts=8",
    "model.moe_intermediate_size=16",
    "model.hc_mult=2",
    "data.seq_len=64",
    "data.global_batch_size=8",
    "data.micro_batch_size=8",
    "evaluation.every=0",
    "evaluation.max_rows=64",
    "checkpoint.every=0",
    "metrics.wandb.mode=disabled",
    "metrics.every=100",
    "metrics.layer_stats_every=0",
)

_DEMO = (
    "evaluation.every=0",
    "checkpoint.every=0",
    "metrics.wandb.mode=disabled",
    "metrics.layer_stats_every=0",
    "stability.spikes=null",
)


def config_of(size: Size, folder: Path, name: str, steps: int, *settings: str) -> RunConfig:
    """Returns the config of a run of `steps` steps in `folder`."""
    overrides = [f"run_dir={folder / name}", *settings]
    if size == "demo":
        demo = load_config("configs/recipe-long.yaml")
        tokens = steps * demo.data.seq_len * demo.data.global_batch_size
        phases = f"phases=[{{until_tokens: {tokens}, attention: dense}}]"
        return load_config("configs/recipe-long.yaml", [*_DEMO, phases, *overrides])
    overrides = [*_SMALL, f"steps={steps}", *overrides]
    return load_config("configs/debug.yaml", overrides)


def trainer_of(config: RunConfig) -> Trainer:
    """Returns the run's trainer, on one thread because the matrices are small."""
    torch.set_num_threads(1)
    return Trainer(config, Grid.single(local_device("auto")))
