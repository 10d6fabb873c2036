"""Opens the model of a run, or of a Hugging Face folder, with its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import Tokenizer
from model import ModelConfig, V4Model
from model.config import AttentionMode
from model.execution import local_execution
from model.kernels.operations import ALL_EAGER, Kernels
from model.qat import fake_quantised_layers, round_experts_
from trainer.build import DTYPES
from trainer.config import CONFIG_FILE, Quantisation, load_run
from trainer.export import read_hf_config, read_hf_weights, read_run_weights, read_trained_with
from trainer.generate.generate import attention_of
from trainer.kernels import kernels_without_check
from trainer.process.errors import ExportError
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

    @contextmanager
    def rounding(self) -> Iterator[None]:
        """Context in which a quantised model rounds keys and entries as in its training."""
        if self.quantisation == "none":
            yield
            return
        with fake_quantised_layers(self.model, kv=self.quantisation == "mxfp4"):
            yield


def open_model(folder: Path) -> OpenedModel:
    """Opens a run folder's newest checkpoint, or a Hugging Face folder.

    Raises ExportError for a folder that is neither; the errors of reading it otherwise.
    """
    if (folder / CONFIG_FILE).is_file():
        return _open_run(folder)
    if (folder / "config.json").is_file():
        return _open_hf(folder)
    raise ExportError(
        f"{folder}: is neither a run folder, with {CONFIG_FILE}, nor a Hugging Face folder, with "
        "config.json"
    )


def _open_run(folder: Path) -> OpenedModel:
    config = load_run(folder)
    tokenizer = open_tokenizer(config)
    step, weights = read_run_weights(config)
    phase = config.recipe.at(max(step - 1, 0))
    device = local_device(config.device)
    dtype, kernels = DTYPES[config.precision], kernels_without_check(config, device)
    model = _make(config.model, weights, dtype, device, kernels, config.precision == "fp8")
    if phase.quantised:
        round_experts_(model)
    return OpenedModel(model, tokenizer, step, phase.quantisation, attention_of(phase.attention))


def _open_hf(folder: Path) -> OpenedModel:
    config = read_hf_config(folder)
    tokenizer = Tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ExportError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, its model {config.vocab_size}"
        )
    weights = read_hf_weights(folder)
    if not any(name.startswith("mtp.") for name in weights):
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    trained_with, experts_in_fp4 = read_trained_with(folder)
    dtypes = {weight.dtype for name, weight in weights.items() if name.endswith("embed.weight")}
    dtype = torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32
    model = _make(config, weights, dtype, local_device("auto"), ALL_EAGER, False)
    if trained_with.quantisation != "none" and not experts_in_fp4:
        round_experts_(model)
    attention = attention_of(trained_with.attention)
    return OpenedModel(model, tokenizer, None, trained_with.quantisation, attention)


def _make(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    fp8: bool,
) -> V4Model:
    with torch.device("meta"):
        model = V4Model(config, dtype, local_execution(kernels, fp8))
    model.to_empty(device=device)
    model.load_hf_state_dict(weights)
    return model.eval()
