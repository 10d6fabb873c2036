"""`v4 export`: a run's newest checkpoint as a Hugging Face folder, one shard at a time.

The tensors go from the checkpoint's files to the folder's without a model or an optimizer: each is
assembled from its chunks just before its shard is written, so that only one shard has to fit into
memory. The shards are divided among the processes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from data import Tokenizer
from data.storage import AnyPath
from data.text import OWN_PROMPTS, Prompts
from model import V4Model
from model.hf import named_tensors, to_official
from trainer.build import DTYPES
from trainer.checkpoint import (
    CheckpointFolder,
    CheckpointReader,
    TensorBox,
    find_mismatch,
    is_state,
    newest_of,
    read_newest,
)
from trainer.config import RunConfig
from trainer.export.hf_folder import SHARD_BYTES, require_empty, require_finite, write_hf_folder
from trainer.export.packed_weights import (
    WeightFormat,
    config_keys,
    packed_outline,
    packed_read,
    require_blocks,
)
from trainer.export.trained_with import trained_with
from trainer.parallel.grid import Grid
from trainer.process.errors import CheckpointError
from trainer.run_tokenizer import open_tokenizer
from trainer.state import TrainState


def export_run(
    config: RunConfig,
    out: AnyPath,
    grid: Grid | None = None,
    shard_bytes: int = SHARD_BYTES,
    weights: WeightFormat = "as_trained",
    prompts: Prompts = OWN_PROMPTS,
) -> str:
    """Writes the newest checkpoint as a Hugging Face folder and returns a sentence about it.

    All ranks of `grid` call it together. `prompts` are those of the chat template. Raises, on all
    of them, CheckpointError when there is no checkpoint or none that fits the config, and
    ExportError when `out` cannot be written or the model's sizes do not fit the blocks of the
    format.
    """
    grid = grid or Grid.single()
    require_empty(out, grid.world)
    require_blocks(config.model, weights)
    folder = CheckpointFolder(config.checkpoints, grid)
    return read_newest(folder, lambda: _export(config, out, folder, shard_bytes, weights, prompts))


def _export(
    config: RunConfig,
    out: AnyPath,
    folder: CheckpointFolder,
    shard_bytes: int,
    weights: WeightFormat,
    prompts: Prompts,
) -> str:
    tokenizer = open_tokenizer(config)
    path, saved = _newest(config, folder, tokenizer)
    outline = _outline(config, DTYPES[config.precision])
    stored = CheckpointReader(path)
    _check(path, stored, outline)

    def read(shard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return stored.read({name: tensor.dtype for name, tensor in shard.items()})

    state = TrainState()
    state.restore(saved)
    phase = config.recipe.at(max(state.step - 1, 0))
    dtype = torch.bfloat16 if weights == "released" else DTYPES[config.precision]
    write_hf_folder(
        out,
        config.model,
        packed_outline(outline, weights),
        tokenizer,
        str(dtype).removeprefix("torch."),
        shard_bytes,
        packed_read(read, outline, weights),
        folder.grid,
        config_keys(config.model, weights) | trained_with(phase),
        prompts,
    )
    doubt = state.doubt()
    notes = [note for note in (doubt, untrained_indexers(config, state.step)) if note]
    return "; ".join([f"wrote step {state.step} of {config.run_dir} to {out}", *notes])


def read_run_weights(config: RunConfig) -> tuple[int, dict[str, Tensor]]:
    """Returns the step of a run's newest checkpoint and its weights under official names.

    Raises CheckpointError when there is no checkpoint or none that fits the config, and ExportError
    for weights that are not finite.
    """
    folder = CheckpointFolder(config.checkpoints, Grid.single())

    def read() -> tuple[int, dict[str, Tensor]]:
        path, saved = _newest(config, folder, open_tokenizer(config))
        outline = _outline(config, DTYPES[config.precision])
        stored = CheckpointReader(path)
        _check(path, stored, outline)
        state = TrainState()
        state.restore(saved)
        weights = stored.read({name: x.dtype for name, x in outline.items()})
        require_finite(weights, path)
        return state.step, weights

    return read_newest(folder, read)


def untrained_indexers(config: RunConfig, step: int) -> str:
    """Returns a clause where transformers will select entries with untrained indexers, or ""."""
    phases = config.recipe.phases
    now = config.recipe.at(max(step - 1, 0)).attention
    learnt = any(p.attention in ("warmup", "sparse") and p.first < step for p in phases)
    if "csa" not in config.model.layer_types or (learnt and now != "dense"):
        return ""
    return (
        f"the run has not trained its indexers (attention = {now}), and transformers selects "
        "entries with them"
        if not learnt
        else "its last phase has attention = dense, and transformers selects entries with the "
        "indexers of an earlier one"
    )


def _newest(
    config: RunConfig, folder: CheckpointFolder, tokenizer: Tokenizer
) -> tuple[AnyPath, dict[str, Any]]:
    newest = newest_of(config, folder, tokenizer.hash)
    if newest is None:
        raise CheckpointError(f"{config.run_dir}: holds no checkpoint yet; train the run first")
    return newest


def _outline(config: RunConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the model's tensors under official names, in its order, on the meta device."""
    with torch.device("meta"):
        model = V4Model(config.model, dtype)
    return dict(to_official(named_tensors(model).items()))


def _check(path: AnyPath, stored: CheckpointReader, weights: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless the checkpoint has these weights and no others."""
    problem = find_mismatch(
        stored.shapes, {n: [TensorBox.unsharded(tensor)] for n, tensor in weights.items()}
    )
    extra = [name for name in stored.shapes if not is_state(name) and name not in weights]
    if problem is None and extra:
        problem = f"holds {extra[0]}, which this run's model does not have"
    if problem:
        raise CheckpointError(f"{path}: {problem}")
