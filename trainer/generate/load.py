"""Opens the model of a run, or of a Hugging Face folder, with its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data import Tokenizer
from data.storage import AnyPath, as_path
from model import ModelConfig, V4Model
from model.config import AttentionMode
from model.kernels.operations import ALL_EAGER, Kernels
from model.qat import fake_quantised_layers, round_experts_
from trainer.build import DTYPES
from trainer.config import CONFIG_FILE, Quantisation, RunConfig, load_run
from trainer.export import read_hf_config, read_hf_weights, read_run_weights, read_trained_with
from trainer.generate.generate import attention_of
from trainer.generate.ranks import ALONE, Ranks, shared_degrees
from trainer.generate.stored import StoredModel, StoredWeights, copy_weights
from trainer.kernels import kernels_without_check
from trainer.parallel.grid import Grid, open_grid
from trainer.parallel.plan import build_local_model
from trainer.parallel.stage_plan import StagePlan
from trainer.process.errors import CheckpointError, ExportError
from trainer.process.local_device import local_device
from trainer.run_tokenizer import open_tokenizer


@dataclass(frozen=True)
class OpenedModel:
    """A model that can continue text.

    Attributes:
        step: of the run's checkpoint; None for a Hugging Face folder.
        quantisation: with which it was trained; its experts' weights are rounded accordingly.
        attention: of CSA layers.
    """

    model: V4Model
    tokenizer: Tokenizer
    step: int | None
    quantisation: Quantisation
    attention: AttentionMode = "select"
    ranks: Ranks = ALONE

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads the user's input and prints."""
        return self.ranks.grid is None or self.ranks.grid.is_first

    @contextmanager
    def rounding(self) -> Iterator[None]:
        """Context in which a quantised model rounds keys and entries as in its training."""
        if self.quantisation == "none":
            yield
            return
        with fake_quantised_layers(self.model, kv=self.quantisation == "mxfp4"):
            yield


def open_model(folder: str | Path, ranks: Ranks = ALONE) -> OpenedModel:
    """Opens a run folder's newest checkpoint, or a Hugging Face folder, which may be a URL.

    Each of `ranks` keeps its part of the model, and temporarily has all weights on its host.

    Raises ExportError for a folder that is neither; the errors of reading it otherwise.
    """
    place = _place(folder)
    if isinstance(place, Path) and (place / CONFIG_FILE).is_file():
        return _open_run(place, ranks)
    _require_hf(place)
    return _open_hf(place, ranks)


@contextmanager
def open_shared(folder: str | Path) -> Iterator[OpenedModel]:
    """Opens a model on all processes that torchrun's environment describes; see `open_model`.

    Raises ConfigError where the model does not divide among them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield open_model(folder)
        return
    place = _place(folder)
    if isinstance(place, Path) and (place / CONFIG_FILE).is_file():
        run = load_run(place)
        config, device = run.model, local_device(run.device)
    else:
        _require_hf(place)
        config, device = read_hf_config(place), local_device("auto")
    with open_grid(device, lambda world: shared_degrees(config, world)) as grid:
        yield open_model(folder, Ranks(grid))


def _place(folder: str | Path) -> AnyPath:
    try:
        return as_path(folder)
    except ValueError as error:
        raise ExportError(f"the folder {error}") from None


def _require_hf(folder: AnyPath) -> None:
    if not (folder / "config.json").is_file():
        raise ExportError(
            f"{folder}: is neither a run folder, with {CONFIG_FILE}, nor a Hugging Face folder, "
            "with config.json"
        )


def read_model(folder: str | Path) -> StoredModel:
    """Opens the tokenizer and the config of what `open_model` opens, and reads no weights yet.

    Raises as `open_model`.
    """
    place = _place(folder)
    if isinstance(place, Path) and (place / CONFIG_FILE).is_file():
        run = load_run(place)
        if not run.has_begun:
            raise CheckpointError(f"{place}: holds no checkpoint yet; train the run first")
        return StoredModel(run.model, open_tokenizer(run), partial(_read_run, run))
    _require_hf(place)
    config = read_hf_config(place)
    tokenizer = Tokenizer(place)
    if tokenizer.vocab_size > config.vocab_size:
        raise ExportError(
            f"{place}: its tokenizer has {tokenizer.vocab_size} ids, its model {config.vocab_size}"
        )
    return StoredModel(config, tokenizer, partial(_read_hf, place))


def _read_run(config: RunConfig) -> StoredWeights:
    step, tensors = read_run_weights(config)
    phase = config.recipe.at(max(step - 1, 0))
    attention = attention_of(phase.attention)
    return StoredWeights(tensors, step, phase.quantisation, not phase.quantised, attention)


def _read_hf(folder: AnyPath) -> StoredWeights:
    trained_with, experts_in_fp4 = read_trained_with(folder)
    is_rounded = trained_with.quantisation == "none" or experts_in_fp4
    attention = attention_of(trained_with.attention)
    tensors = read_hf_weights(folder)
    return StoredWeights(tensors, None, trained_with.quantisation, is_rounded, attention)


def _open_run(folder: Path, ranks: Ranks) -> OpenedModel:
    config = load_run(folder)
    device = local_device(config.device)
    kernels, fp8 = kernels_without_check(config, device), config.precision == "fp8"
    stored = read_model(folder)
    weights = stored.read()
    dtype = DTYPES[config.precision]
    model = _make(stored.config, weights.tensors, dtype, device, kernels, fp8, ranks)
    return _opened(model, stored, weights, ranks)


def _open_hf(folder: AnyPath, ranks: Ranks) -> OpenedModel:
    stored = read_model(str(folder))
    weights, config = stored.read(), stored.config
    if not any(name.startswith("mtp.") for name in weights.tensors):
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    embeddings = [x for name, x in weights.tensors.items() if name.endswith("embed.weight")]
    dtypes = {weight.dtype for weight in embeddings}
    dtype = torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32
    device = local_device("auto")
    model = _make(config, weights.tensors, dtype, device, ALL_EAGER, False, ranks)
    return _opened(model, stored, weights, ranks)


def _opened(
    model: V4Model, stored: StoredModel, weights: StoredWeights, ranks: Ranks
) -> OpenedModel:
    if not weights.experts_are_rounded:
        round_experts_(model)
    quantisation, attention = weights.quantisation, weights.attention
    return OpenedModel(model, stored.tokenizer, weights.step, quantisation, attention, ranks)


def _make(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    fp8: bool,
    ranks: Ranks,
) -> V4Model:
    """Builds this rank's part of the model, and copies its shards of the weights.

    Raises ModelConfigError unless these are the weights of the whole model.
    """
    with torch.device("meta"):
        whole = V4Model(config, dtype)
    whole.load_hf_state_dict({name: tensor.to("meta") for name, tensor in weights.items()})
    stages = StagePlan("1f1b", (config.num_hidden_layers,), 1)
    grid = ranks.grid or Grid.single(device)
    local = build_local_model(config, dtype, grid, stages, fp8=fp8, kernels=kernels)
    local.model.to_empty(device=device)
    copy_weights(local, weights)
    return local.model.eval()
