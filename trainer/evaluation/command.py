"""`v4 eval`: the loss of a run's newest checkpoint on validation text, or the scores of tasks."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data.activity import Activity, print_line
from trainer.checkpoint import CheckpointFolder, at_next_step, other_shards, read_newest
from trainer.config import ConfigError, EvaluationConfig, ParallelConfig, RunConfig
from trainer.engine import NativeEngine
from trainer.evaluation.arguments import task_settings
from trainer.evaluation.scoring import RowSizes
from trainer.evaluation.shared_model import SharedModel
from trainer.evaluation.tasks import Tasks
from trainer.evaluation.validation import Validation
from trainer.export import open_run
from trainer.generate.generate import attention_of
from trainer.generate.load import open_model
from trainer.metrics import finite
from trainer.parallel.grid import Grid, connect_store, open_grid
from trainer.parallel.plan import LocalModel
from trainer.process.local_device import local_device
from trainer.run_tokenizer import open_tokenizer, other_tokenizer
from trainer.state import TrainState

FOLDER_ROWS = RowSizes(seq_len=2048, rows=1)
"""How continuations are packed for a Hugging Face folder, which has no rows of its own."""


def evaluate_run(config: RunConfig, options: argparse.Namespace) -> None:
    """Evaluates the newest checkpoint of a run.

    With the rows of `evaluation`, and the attention and the quantisation of the last step's phase.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        config = config.alone()  # checkpoints open at any topology
    store = connect_store()
    config = at_next_step(config, store)
    with open_grid(local_device(config.device), config.degrees, store=store) as grid:
        if grid.is_first and (notice := other_tokenizer(config)):
            print_line(f"v4: warning: {notice}", sys.stderr)
        if options.tasks is None:
            _evaluate_loss(config, grid)
        else:
            _evaluate_tasks(config, grid, options)


def _evaluate_loss(config: RunConfig, grid: Grid) -> None:
    validation = Validation(config, grid)
    folder = CheckpointFolder(config.checkpoints, grid)
    (local, state), notice = read_newest(
        folder, lambda: (open_run(config, grid), other_shards(config, validation.loader))
    )
    if grid.is_first and notice:
        print_line(f"v4: warning: {notice}", sys.stderr)
    engine = _engine_of(config, local, state, grid)
    evaluation, by_source = validation.evaluate(engine), validation.by_source(engine)
    if not grid.is_first:
        return
    result: dict[str, Any] = {
        "step": state.step,
        "tokens": state.tokens,
        "validation_loss": evaluation.loss,
        "validation_bits_per_byte": evaluation.bits_per_byte,
        "validation_tokens": evaluation.tokens,
        "validation_bytes": evaluation.bytes,
        "unigram_entropy": validation.unigram_entropy(),
    }
    if by_source is not None:
        result["validation_by_source"] = by_source.losses
        result["validation_bits_per_byte_by_source"] = by_source.bits_per_byte
    print(json.dumps(finite(result)))


def _evaluate_tasks(config: RunConfig, grid: Grid, options: argparse.Namespace) -> None:
    settings = task_settings(config.evaluation, options)
    with Activity("opening tasks", visible=grid.is_first):
        tasks = Tasks(settings, grid, grid.pipeline.size)
    folder = CheckpointFolder(config.checkpoints, grid)
    local, state = read_newest(folder, lambda: open_run(config, grid))
    engine = _engine_of(config, local, state, grid)
    attention = attention_of(config.recipe.at(max(state.step - 1, 0)).attention)
    sizes = RowSizes(config.data.seq_len, config.data.micro_batch_size)
    model = SharedModel(engine, open_tokenizer(config), attention, sizes)
    with Activity("evaluating tasks", visible=grid.is_first):
        scores = tasks.evaluate(model)
    if grid.is_first:
        _show({"step": state.step, "tokens": state.tokens}, scores, options.json)


def _engine_of(config: RunConfig, local: LocalModel, state: TrainState, grid: Grid) -> NativeEngine:
    """Returns an engine in the phase of the last step; warns where the weights are in doubt."""
    if grid.is_first and (doubt := state.doubt()):
        print_line(f"warning: {doubt}", sys.stderr)
    engine = NativeEngine(local, grid)
    phase = config.recipe.at(max(state.step - 1, 0))
    engine.set_attention(phase.attention)
    engine.quantisation = phase.quantisation
    return engine


def evaluate_folder(options: argparse.Namespace) -> None:
    """Evaluates tasks with the model of a Hugging Face folder, on one process."""
    folder, grid = Path(options.config), Grid.single()
    if options.tasks is None:
        raise ConfigError(f"{folder}: has no validation text; name tasks, as --tasks hellaswag")
    if options.overrides:
        raise ConfigError(f"command line: {options.overrides[0]}: {folder} is no run with a config")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{folder}: a Hugging Face folder is evaluated on one process")
    with Activity("opening tasks"):
        tasks = Tasks(task_settings(EvaluationConfig(), options), grid)
    with Activity("loading the model"):
        opened = open_model(folder)
    stages = ParallelConfig().stages(opened.model.config, FOLDER_ROWS.seq_len)
    engine = NativeEngine(LocalModel(opened.model, {}, stages), grid)
    engine.quantisation, engine.attention = opened.quantisation, opened.attention
    model = SharedModel(engine, opened.tokenizer, opened.attention, FOLDER_ROWS)
    with Activity("evaluating tasks"):
        scores = tasks.evaluate(model)
    _show({}, scores, options.json)


def _show(about: dict[str, Any], scores: dict[str, float], as_json: bool) -> None:
    """Prints scores by task/metric, means with their standard errors."""
    if as_json:
        print(json.dumps(finite({**about, "tasks": scores})))
        return
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(title=f"step {about['step']:,}" if about else None, title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("score", justify="right")
    for name, value in scores.items():
        if name.endswith("_stderr"):
            continue
        task, _, metric = name.rpartition("/")
        error = scores.get(f"{name}_stderr")
        table.add_row(task, metric, f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
    console.print(table)
