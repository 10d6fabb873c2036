"""Compares the facts that an imported Hugging Face folder and the run's config both have.

Ids of special tokens, sizes and the vocabulary may be in several files. If two of them contradict
each other, a run would train on ids or sizes that the folder's weights do not have.
"""

from typing import Any

from data import Tokenizer
from data.storage import AnyPath
from data.text import BOS, EOS, HF_FILE, MODEL_FILE
from model import ModelConfig
from trainer.export.hf_folder import CONFIG_JSON, read_object
from trainer.process.errors import ExportError

TOKENIZER_CONFIG = "tokenizer_config.json"
_LONGEST_LIST = 5


def check_sizes(config: ModelConfig, imported: ModelConfig, source: AnyPath) -> None:
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


def check_generation(config: ModelConfig, source: AnyPath) -> None:
    """Raises ExportError if generation_config.json has other ids than config.json, or unknown ones.

    A list of ids that end a text may have more than config.json's.
    """
    path = source / "generation_config.json"
    settings = read_object(path) or {}
    for name in ("bos_token_id", "eos_token_id"):
        value, expected = settings.get(name), getattr(config, name)
        if value is not None and expected not in (value if isinstance(value, list) else [value]):
            raise ExportError(
                f"{path}: {name} = {value} should be {expected}, as in config.json next to it"
            )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = settings.get(name)
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(i in range(config.vocab_size) for i in ids):
            raise ExportError(
                f"{path}: {name} = {value} should be below the vocab_size = {config.vocab_size} of "
                "config.json next to it"
            )


def check_tokenizer(tokenizer: Tokenizer, source: AnyPath) -> None:
    """Raises ExportError if a tokenizer file of the folder is not that of the run.

    Others read tokenizer.json where there is a tokenizer.model as well, and the special tokens of
    tokenizer_config.json.
    """
    files = [path for name in (MODEL_FILE, HF_FILE) if (path := source / name).is_file()]
    for path in files:
        if difference := tokenizer.difference(Tokenizer(path)):
            raise ExportError(
                f"{path}: is another tokenizer than data.tokenizer.path = {tokenizer.path}: "
                f"{difference}; set data.tokenizer.path to a folder with the one that the weights "
                "were trained with"
            )
    path = source / TOKENIZER_CONFIG
    settings = (read_object(path) if files else None) or {}
    for name, expected in (("bos", BOS), ("eos", EOS), ("pad", None)):
        value = settings.get(f"{name}_token")
        token = value.get("content") if isinstance(value, dict) else value
        if token is not None and (token not in tokenizer.special or expected not in (None, token)):
            wanted = "a special token of the tokenizer" if expected is None else repr(expected)
            raise ExportError(f"{path}: {name}_token = {token!r} should be {wanted}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
