"""The tokenizer of a run: a copy in the run folder, made at the start.

Without it the ids of a model have no meaning, while `data.tokenizer.path` may get another tokenizer
before the run is resumed, evaluated or exported. From its first checkpoint on, a run uses its copy.
"""

from pathlib import Path

from data import Tokenizer
from data.config import DataConfig
from data.errors import DataError
from data.files import sha256_of
from data.storage import AnyPath, as_path
from data.text import tokenizer_file
from trainer.config import ConfigError, RunConfig

FOLDER = "tokenizer"


def run_data(config: RunConfig) -> DataConfig:
    """Returns `config.data` with the run's tokenizer: its copy, where there are checkpoints of it.

    Runs of earlier versions have no copy until they are resumed.
    """
    copy = config.run_dir / FOLDER
    if _file_in(copy) is None or not config.has_begun:
        return config.data
    tokenizer = config.data.tokenizer.model_copy(update={"path": str(copy)})
    return config.data.model_copy(update={"tokenizer": tokenizer})


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """Opens the run's tokenizer.

    Raises ConfigError if its ids are not those of the model, DataError if it is damaged or, before
    the run has begun, of another size than the config has.
    """
    data = run_data(config)
    tokenizer = Tokenizer(data.tokenizer.path)
    if data is config.data:  # the run has not begun
        tokenizer.check_vocab_size(data.tokenizer.vocab_size)
    config.check_token_ids(tokenizer, f"the tokenizer in {tokenizer.path}")
    return tokenizer


def keep_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Copies the tokenizer into the run folder, unless it is there.

    Raises ConfigError where another one is there, which shards and other runs may depend on.
    """
    copy = config.run_dir / FOLDER
    existing = _file_in(copy)
    if existing is None:
        tokenizer.copy_to(copy)
    elif sha256_of(existing) != tokenizer.hash:
        raise ConfigError(
            f"{existing} is another tokenizer than {tokenizer.path}, and a run keeps a copy of its "
            f"own there; name another run_dir, or move {copy}"
        )


def check_replaceable(folder: Path) -> None:
    """Raises ConfigError for a tokenizer that is the copy of a run which has checkpoints."""
    run_dir = folder.resolve().parent
    is_copy = folder.resolve().name == FOLDER and _file_in(folder) is not None
    checkpoints = run_dir / "checkpoints"  # or elsewhere, by checkpoint.folder
    has_begun = any(checkpoints.glob("step-*")) or (run_dir / "metrics.jsonl").is_file()
    if is_copy and has_begun:
        raise ConfigError(
            f"{folder} is the tokenizer of the run in {run_dir}, whose checkpoints are of no use "
            "without it; set another data.tokenizer.path"
        )


def other_tokenizer(config: RunConfig) -> str:
    """Returns a sentence where `data.tokenizer.path` and the run's copy differ, else nothing."""
    used = as_path(run_data(config).tokenizer.path)
    named = _file_in(as_path(config.data.tokenizer.path))
    if named is None or sha256_of(named) == sha256_of(tokenizer_file(used)):
        return ""
    return f"{named} is not the tokenizer that the run was started with; its copy in {used} is used"


def _file_in(folder: AnyPath) -> AnyPath | None:
    try:
        return tokenizer_file(folder)
    except DataError:
        return None
