"""Hugging Face folders out and in: config.json, sharded safetensors, tokenizer files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data import Tokenizer
from data.activity import Activity
from data.files import check_inside, fsync_file
from data.storage import AnyPath, StoragePath
from data.text import OWN_PROMPTS, Prompts, export_chat_template
from model import ModelConfig
from trainer.checkpoint import UNFINISHED, new_folder, on_all_ranks
from trainer.export.packed_weights import dequantised
from trainer.files import local_copy, local_original, write_synced
from trainer.parallel.grid import Axis, Grid
from trainer.process.errors import ExportError

Read = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG_JSON = "config.json"
SHARD_BYTES = 5 * 10**9
_SAVED_BY_TRANSFORMERS = re.compile(r"^model\.layers\.\d+\.(attn|ffn)\.")


def write_hf_folder(
    folder: AnyPath,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
    read: Read | None = None,
    grid: Grid | None = None,
    more: Mapping[str, Any] | None = None,
    prompts: Prompts = OWN_PROMPTS,
) -> None:
    """Writes a folder for vLLM, SGLang and transformers atomically.

    `weights` carry official names. They may be on the meta device: `read` then returns the tensors
    of a shard, on the host, just before it is written; they are freed afterwards. The shards are
    divided among the ranks of `grid`. `more` is added to config.json: `trained_with`, and of
    quantised weights `expert_dtype` and `quantization_config`. `prompts` are the
    prompt texts of the chat template. Raises ExportError on all ranks when `folder` exists and is
    not empty, or when it cannot be written.
    """
    world = (grid or Grid.single()).world
    require_empty(folder, world)
    shards = _Shards.plan(weights, shard_bytes)
    generation = {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
    }

    def write(aside: AnyPath) -> None:
        shards.write(aside, read or _storable, world)
        if world.is_first:
            _write_json(aside / "generation_config.json", generation)
            tokenizer.export_hf(aside, config.max_position_embeddings)
            export_chat_template(tokenizer, aside, prompts)
            shards.write_index(aside)

    def complete(aside: AnyPath) -> None:
        """Writes what every reader opens first."""
        if world.is_first:
            keys = {**config.to_hf(), "torch_dtype": dtype, **(more or {})}
            _write_json(aside / CONFIG_JSON, keys)

    try:
        with new_folder(folder, world) as aside:
            on_all_ranks(lambda: write(aside), world)
            on_all_ranks(lambda: complete(aside), world)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written: {error.strerror or error}") from None


def require_empty(folder: AnyPath, world: Axis) -> None:
    """Raises ExportError, on all ranks, unless `folder` is new or an empty folder."""
    try:
        full = on_all_ranks(lambda: _is_full(folder), world)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be read: {error.strerror}") from None
    if any(full):
        raise ExportError(f"{folder}: already exists; name a folder that is new or empty")


def _is_full(folder: AnyPath) -> bool:
    if isinstance(folder, StoragePath):
        names = folder.names()
        return bool(names) and UNFINISHED not in names
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


@dataclass(frozen=True)
class _Shards:
    """The file of each tensor: a function of names, shapes and dtypes alone."""

    files: Mapping[str, Mapping[str, Tensor]]

    @classmethod
    def plan(cls, weights: Mapping[str, Tensor], shard_bytes: int) -> _Shards:
        """Makes one file, or numbered ones of at most `shard_bytes` (or one tensor)."""
        shards: list[dict[str, Tensor]] = [{}]
        size = 0
        for name, tensor in weights.items():
            if shards[-1] and size + tensor.nbytes > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = tensor
            size += tensor.nbytes
        if len(shards) == 1:
            return cls({SINGLE: shards[0]})
        names = (f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n, _ in enumerate(shards, 1))
        return cls(dict(zip(names, shards, strict=True)))

    def write(self, folder: AnyPath, read: Read, world: Axis) -> None:
        """Writes this rank's share of the files, one after another. Raises OSError."""
        share = list(self.files)[world.rank :: world.size]
        with Activity("writing weights", len(share), "files", world.is_first) as activity:
            for file in share:
                with local_original(folder / file) as path:
                    try:
                        save_file(read(self.files[file]), path, metadata={"format": "pt"})
                    except SafetensorError as error:
                        raise OSError(0, str(error)) from None
                    if isinstance(folder, Path):
                        # safetensors writes files that only their owner can read.
                        path.chmod(folder.stat().st_mode & 0o666)
                        fsync_file(path)
                activity.advance()

    def write_index(self, folder: AnyPath) -> None:
        """Writes the index of the tensors' files, if there are several files."""
        if len(self.files) == 1:
            return
        total = sum(tensor.nbytes for shard in self.files.values() for tensor in shard.values())
        weight_map = {name: file for file, shard in self.files.items() for name in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors to the host without shared storage: experts are views of their stack."""
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _write_json(path: AnyPath, value: dict[str, Any]) -> None:
    write_synced(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_hf_config(folder: AnyPath, **training: Any) -> ModelConfig:
    """Reads the model config of a Hugging Face folder; `training` sets fields that it lacks.

    Raises ExportError without a readable config.json, ModelConfigError for another architecture.
    """
    values = read_object(folder / CONFIG_JSON)
    if values is None:
        raise ExportError(f"{folder}: not a Hugging Face folder, no config.json")
    return ModelConfig.from_hf(values, **training)


def read_object(path: AnyPath) -> dict[str, Any] | None:
    """Reads a JSON file with an object; None: there is no file. Raises ExportError for others."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise ExportError(f"{path}: is not valid JSON") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path}: should hold a JSON object, not a {type(value).__name__}")
    return value


def read_hf_weights(folder: AnyPath) -> dict[str, Tensor]:
    """Reads all tensors of a folder's safetensors files, in official or transformers' names.

    FP4 and FP8 weights are dequantised. Raises ExportError for missing or damaged files, for
    files that hold other tensors than the index has, and for values that are not finite.
    """
    weights: dict[str, Tensor] = {}
    listed = _weight_files(folder)
    with Activity("reading weights", len(listed), "files") as activity:
        for path, names in listed.items():
            with _opened(path, names) as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    weights[name] = file.get_tensor(name)
            activity.advance()
    weights = dequantised(weights, str(folder))
    require_finite(weights, folder)
    if any(_SAVED_BY_TRANSFORMERS.match(name) for name in weights):
        return {_official(name): tensor for name, tensor in weights.items()}
    return weights


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's dtype, in the words of safetensors, and shape."""

    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: AnyPath) -> dict[str, TensorHeader]:
    """Returns dtype and shape of all tensors of a folder. Raises as `read_hf_weights`."""
    headers: dict[str, TensorHeader] = {}
    for path, names in _weight_files(folder).items():
        with _opened(path, names) as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                tensor = file.get_slice(name)
                headers[name] = TensorHeader(tensor.get_dtype(), tuple(tensor.get_shape()))
    return headers


@contextmanager
def _opened(path: AnyPath, names: set[str] | None) -> Iterator[Any]:
    """Opens a file of weights that should have these tensors. Raises ExportError."""
    try:
        with local_copy(path) as copy, safe_open(copy, framework="pt") as file:
            _compare_names(path, {*file.keys()}, names)
            yield file
    except FileNotFoundError:
        raise ExportError(f"{path}: is missing, though {INDEX} names it") from None
    except SafetensorError as error:
        raise ExportError(f"{path}: is truncated or no safetensors file: {error}") from None


def require_finite(weights: Mapping[str, Tensor], place: AnyPath) -> None:
    """Raises ExportError where a weight is not finite."""
    for name, weight in weights.items():
        # One pass and no copy, since NaN and infinities reach the extrema.
        if weight.is_floating_point() and weight.numel() and not _is_finite(weight):
            raise ExportError(f"{place}: {name} has values that are NaN or infinite")


def _is_finite(weight: Tensor) -> bool:
    low, high = torch.aminmax(weight)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _official(name: str) -> str:
    """Returns the official name of a tensor that transformers' `save_pretrained` has written.

    It reverts its renaming only in part (5.23.0): the prefix `model.` and a few leaves stay.
    """
    name = name.removeprefix("model.")
    name = re.sub(r"^embed_tokens\.", "embed.", name)
    name = re.sub(r"^hc_head\.hc_", "hc_head_", name)
    return re.sub(r"^(layers\.\d+\.attn)\.norm\.", r"\1.kv_norm.", name)


def _weight_files(folder: AnyPath) -> dict[AnyPath, set[str] | None]:
    """Returns the folder's files, each with the names that the index has; None: without index."""
    index = read_object(folder / INDEX)
    has_single = (folder / SINGLE).is_file()
    if index is None:
        if not has_single:
            raise ExportError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
        return {folder / SINGLE: None}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not {*map(type, weight_map.values())} <= {str}:
        raise ExportError(f"{folder / INDEX}: is not an index of safetensors files")
    try:
        for file in sorted({*weight_map.values()}):
            check_inside(file)
    except ValueError as error:
        raise ExportError(f"{folder / INDEX}: weight_map: {error}") from None
    files: dict[AnyPath, set[str] | None] = {
        folder / file: {name for name, place in weight_map.items() if place == file}
        for file in sorted({*weight_map.values()})
    }
    if has_single and folder / SINGLE not in files:
        raise ExportError(
            f"{folder}: holds both {SINGLE} and {INDEX}, which does not name it; delete one"
        )
    return files


def _compare_names(path: AnyPath, names: set[str], listed: set[str] | None) -> None:
    """Raises ExportError unless a file has exactly the tensors that are listed for it."""
    if listed is None or names == listed:
        return
    name = min(names ^ listed)
    fault = "lacks" if name in listed else "holds"
    raise ExportError(f"{path}: {fault} {name}, contrary to {INDEX}")
