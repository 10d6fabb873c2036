"""A run small enough to train in a second, on shards of invented text."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from data.prepare import prepare, train_tokenizer
from trainer.config import RunConfig, load_config
from trainer.generate.load import read_model
from trainer.metrics.jsonl import read_metrics
from trainer.parallel.grid import Grid
from trainer.process.signals import StopRequest
from trainer.trainer import Trainer

TINY = """
run_dir: {folder}/run
steps: 6
seed: 3
model:
  vocab_size: 400
  hidden_size: 24
  num_hidden_layers: 3
  max_position_embeddings: 4096
  num_attention_heads: 2
  head_dim: 16
  qk_rope_head_dim: 8
  q_lora_rank: 12
  o_groups: 2
  o_lora_rank: 8
  sliding_window: 8
  layer_types: [window, csa, hca]
  csa_compress_ratio: 4
  hca_compress_ratio: 16
  index_n_heads: 2
  index_head_dim: 8
  index_topk: 4
  rope_theta: 10000.0
  compress_rope_theta: 160000.0
  rope_scaling: null
  num_hash_layers: 1
  n_routed_experts: 4
  num_experts_per_tok: 2
  moe_intermediate_size: 16
  routed_scaling_factor: 1.5
  hc_mult: 2
  initializer_range: 0.05
data:
  sources: [{{name: words, paths: ["{folder}/words.jsonl"]}}]
  tokenizer: {{path: "{folder}/tokenizer", vocab_size: 400}}
  shards: {folder}/shards
  seq_len: 48
  global_batch_size: 4
  micro_batch_size: 2
  validation_fraction: 0.1
optim: {{learning_rate: 3e-3, schedule: {{warmup_steps: 2}}}}
checkpoint: {{every: 0}}
metrics: {{wandb: {{mode: disabled}}}}
evaluation: {{max_rows: 8}}
"""


def make_tiny(folder: Path) -> Path:
    """Corpus, tokenizer, shards and config in `folder`; returns the config file."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 6))) for _ in range(120)]
    lines = [" ".join(chance.choices(words, k=chance.randint(3, 60))) for _ in range(200)]
    text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (folder / "words.jsonl").write_text(text)
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(folder=folder))
    config = load_config(path)
    train_tokenizer(config.data)
    prepare(config.data, progress=False)
    return path


def train(
    path: Path, run_dir: Path, *overrides: str, stop_at: int = 0, crash_at: int = 0
) -> RunConfig:
    """Train in this process, over the default process group where there is one.

    `stop_at` asks rank 0 to stop during that step; `crash_at` raises after it, before anything is
    saved.
    """
    config = load_config(path, [f"run_dir={run_dir}", *overrides])
    grid = Grid.single()
    if dist.is_initialized():
        grid = Grid.build(config.degrees(dist.get_world_size()), torch.device("cpu"))
    stop = StopRequest()
    trainer = Trainer(config, grid, stop, read_model=read_model)
    if stop_at and grid.is_first:
        trainer.periodic.append(lambda state, _: state.step == stop_at - 1 and stop.request())
    if crash_at:
        trainer.periodic.insert(1, lambda state, _: crash(state.step == crash_at))
    trainer.run()
    return config


def crash(now: bool) -> None:
    if now:
        raise RuntimeError("crash")


Job = tuple[str, list[str], int]
"""Name of the run folder, overrides, and the step to stop at (0: none)."""


def train_jobs(rank: int, world_size: int, path: Path, folder: Path, jobs: list[Job]) -> None:
    """Several runs one after another, as a worker of tests.distributed.spawn."""
    for name, overrides, stop_at in jobs:
        train(path, folder / name, *overrides, stop_at=stop_at)


def column(run_dir: Path, name: str) -> list[Any]:
    """A column of metrics.jsonl, by step."""
    return [record[name] for record in read_metrics(run_dir / "metrics.jsonl")]


def steps_in_file(run_dir: Path) -> list[int]:
    """The step of every line of metrics.jsonl, as they stand there."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def saved_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every whole tensor of a checkpoint, put together with nothing but safetensors."""
    boxes: dict[str, list[tuple[list[int], Tensor]]] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            info = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118
                box = info[name]["saved_offsets"], file.get_tensor(name)
                boxes.setdefault(name, []).append(box)
    tensors: dict[str, Tensor] = {}
    for name, actual in boxes.items():
        ends = [[o + n for o, n in zip(offset, t.shape, strict=True)] for offset, t in actual]
        whole = torch.zeros([max(column) for column in zip(*ends, strict=True)])
        whole = whole.to(actual[0][1].dtype)
        for offset, tensor in actual:
            spans = zip(offset, tensor.shape, strict=True)
            whole[tuple(slice(start, start + size) for start, size in spans)] = tensor
        assert whole.numel() == sum(tensor.numel() for _, tensor in actual), name
        tensors[name] = whole
    return tensors


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Losses of all steps, and weights and optimizer state at `step`, equal bit for bit."""
    for name in ("loss", "lm_loss", "mtp_loss", "balance_loss", "grad_norm", "tokens"):
        assert column(one, name) == column(other, name), name
    ours, theirs = (saved_tensors(run / "checkpoints" / f"step-{step:08d}") for run in (one, other))
    assert ours.keys() == theirs.keys() and len(ours) > 100
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
