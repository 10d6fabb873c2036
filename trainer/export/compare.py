"""Compares the facts that an imported Hugging Face folder and the run's config both have.

Ids of special tokens, sizes and the vocabulary may be in several files. If two of them contradict
each other, a run would train on ids or sizes that the folder's weights do not have.
"""

from pathlib import Path
from typing import Any

from data import DataError, Tokenizer
from data.text import tokenizer_file
from model import ModelConfig
from trainer.errors import ExportError
from trainer.export.hf_folder import CONFIG_JSON, read_object

_LONGEST_LIST = 5


def check_sizes(config: ModelConfig, imported: ModelConfig, source: Path) -> None:
    """Raises ExportError if fields of the run's model have another value in the folder."""
    wrong = [
        f"model.{name} = {_short(getattr(config, name))} should be "
        f"{_short(getattr(imported, name))}"
        for name in ModelConfig.model_fields
        if getattr(config, name) != getattr(imported, name)
    ]
    if wrong:
        more = len(wrong) - _LONGEST_LIST
        listed = ", ".join(wrong[:_LONGEST_LIST]) + (f" (and {more} more)" if more > 0 else "")
        raise ExportError(
            f"{source / CONFIG_JSON}: the run's config contradicts it: {listed}; leave out of "
            "`model` what the folder determines"
        )


def check_generation(config: ModelConfig, source: Path) -> None:
    """Raises ExportError if generation_config.json has other ids than config.json."""
    path = source / "generation_config.json"
    settings = read_object(path) or {}
    for name in ("bos_token_id", "eos_token_id"):
        value, expected = settings.get(name), getattr(config, name)
        if value is not None and expected not in (value if isinstance(value, list) else [value]):
            raise ExportError(
                f"{path}: {name} = {value} should be {expected}, as in config.json next to it"
            )


def check_tokenizer(tokenizer: Tokenizer, source: Path) -> None:
    """Raises ExportError if the folder has a tokenizer, and it is not that of the run."""
    try:
        tokenizer_file(source)
    except DataError:
        return  # the folder has none
    if difference := tokenizer.difference(Tokenizer(source)):
        raise ExportError(
            f"{source}: its tokenizer is another one than data.tokenizer.path = {tokenizer.path}: "
            f"{difference}; set data.tokenizer.path to {source}"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
