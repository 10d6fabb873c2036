"""The config that a run folder keeps."""

from pathlib import Path

from data.files import write_atomically
from trainer.config.run import CONFIG_FILE, RunConfig
from trainer.config.source import ConfigError, dump_yaml, parse_yaml

_SECTIONS = {"run_dir", "seed", "checkpoint", "metrics"}
"""Some of the keys that every resolved config has."""


def save_config(config: RunConfig) -> Path | None:
    """Writes the resolved config into the run folder.

    A config.yaml that somebody wrote there keeps its comments, its `base:` and its few keys, in
    config.input.yaml or the next free name; returns where, None if there is none.
    """
    path = config.run_dir / CONFIG_FILE
    copy = None
    if path.is_file() and not _is_resolved(written := path.read_bytes()):
        number, copy = 1, path.with_name("config.input.yaml")
        while copy.exists() and copy.read_bytes() != written:
            number += 1
            copy = path.with_name(f"config.input-{number}.yaml")
        write_atomically(copy, written)
    write_atomically(path, config.with_absolute_paths().to_yaml())
    return copy


def _is_resolved(content: bytes) -> bool:
    """Whether a file is as `save_config` writes it, by this version or an earlier one."""
    text = content.decode(errors="replace")
    try:
        values = parse_yaml(text, CONFIG_FILE)
    except ConfigError:
        return False
    return isinstance(values, dict) and values.keys() >= _SECTIONS and dump_yaml(values) == text
