"""What a sweep's trials have in common, and the folder that is made for it."""

import json
import re
import secrets
from pathlib import Path

from data.errors import DataError
from data.files import write_atomically
from data.lease import Lease
from data.manifest import Manifest
from launch.sweep_file import Sweep
from launch.sweep_study import JOURNAL, create_study
from trainer.config import ConfigError, RunConfig, differences, load_config


def prepare_folder(sweep: Sweep, folder: Path, seed: int) -> str:
    """Makes the folder of a sweep with its definition and its study, or checks that they fit.

    Returns the name that the sweep has below a `checkpoint.folder`, where two sweeps may have
    folders of the same name. Raises ConfigError where the folder holds another sweep.
    """
    if (folder / JOURNAL).is_file():
        return check_same(sweep, folder, seed)
    # The same `launch` for all: of processes that start together, the others wait for the first.
    with Lease(folder, "v4 sweep", launch="prepare"):
        name = check_same(sweep, folder, seed)
        create_study(sweep, folder)
    return name


def check_same(sweep: Sweep, folder: Path, seed: int) -> str:
    """Writes the definition into the folder, or checks that it equals the one written before.

    The config of the first trial stands for the config file, whose other values all trials share.
    Returns the name of `prepare_folder`. Raises ConfigError.
    """
    path = folder / "definition.json"
    file, overrides = sweep.config_arguments(next(sweep.samples()))
    config = load_config(file, overrides).to_dict()
    shards = _shards_of(load_config(file, overrides))
    ours = {"seed": seed, **sweep.model_dump(mode="json")}
    try:
        saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else dict(ours)
        saved_config = saved.pop("config", config)  # not in those before version 0.2
        saved_shards = dict(saved.pop("shards", {})) or shards  # likewise, or not prepared by then
        name = saved.pop("checkpoints", None) or _new_name(folder)
    except (ValueError, AttributeError, TypeError):
        raise ConfigError(f"{path}: is damaged; choose another folder with --out") from None
    if saved != ours:
        raise ConfigError(
            f"{folder}: holds a sweep with another definition or seed; choose another folder with "
            "--out"
        )
    for key, old, new in differences(saved_config, config):
        if key != "run_dir" and not key.startswith("metrics.wandb."):
            raise ConfigError(
                f"{file}: {key} is {new!r}, and was {old!r} in the trials of {folder}; restore it, "
                "or choose another folder with --out"
            )
    for what, now in shards.items():
        if (then := saved_shards.get(what)) != now:
            raise ConfigError(
                f"{config['data']['shards']}: has another {what} ({now[:16]}…) than when the "
                f"trials of {folder} began ({str(then)[:16]}…); restore it, or choose another "
                "folder with --out"
            )
    record = {**saved, "config": saved_config, "shards": saved_shards, "checkpoints": name}
    text = json.dumps(record, indent=1)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
    return str(name)


def _new_name(folder: Path) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', folder.absolute().name)}-{secrets.token_hex(4)}"


def _shards_of(config: RunConfig) -> dict[str, str]:
    """Returns what identifies the text of all trials; nothing where it is not prepared yet."""
    try:
        manifest = Manifest.load(config.data.shards)
    except DataError:
        return {}
    return {"text": manifest.digest, "tokenizer": manifest.tokenizer_hash}
