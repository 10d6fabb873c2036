"""Verdicts in the user's cache, a file for everything that could change them. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data.files import sha256_of, write_atomically
from model.kernels.operations import IMPLEMENTATIONS
from trainer.kernels.gpu import Platform
from trainer.kernels.verdict import Problem, Verdict

SOURCES = (
    "model/kernels",
    "model/kernel_cases",
    "trainer/kernels",
    "optim/syrk_triton.py",
    "optim/syrk_quack.py",
)
"""What decides a verdict: the kernels, and how they are checked."""


@dataclass(frozen=True)
class Key:
    """Everything that could change the verdicts on a GPU.

    Attributes:
        sources: SHA-256 of the kernels' sources and of the check's.
    """

    platform: Platform
    problem: Problem
    sources: str

    @classmethod
    def of(cls, platform: Platform, problem: Problem) -> Key:
        """Returns the key for a problem on this code."""
        return cls(platform, problem, source_digest(Path(__file__).resolve().parents[2]))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as a file has them."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def digest(self) -> str:
        """SHA-256 of all values, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


class _Saved(BaseModel):
    """The contents of a file."""

    model_config = ConfigDict(extra="forbid")

    key: dict[str, Any]
    verdicts: tuple[Verdict, ...]


def cache_folder(fallback: Path | None = None) -> Path:
    """Returns where verdicts are kept: the user's cache, or `fallback` if that cannot be written.

    Of several processes of a user, all get the same.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    existing = folder = base / "v4-pretrain" / "kernels"
    while not existing.exists():
        existing = existing.parent
    is_writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return folder if is_writable or fallback is None else fallback


def source_digest(root: Path) -> str:
    """Returns the SHA-256 of names and contents of SOURCES below `root`."""
    digest = hashlib.sha256()
    for name in SOURCES:
        for path in sorted([root / name, *(root / name).rglob("*.py")]):
            if path.is_file():
                digest.update(f"{path.relative_to(root).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def path_of(folder: Path, key: Key) -> Path:
    """Returns the file for a key."""
    return folder / f"{key.digest}.json"


def write_verdicts(folder: Path, key: Key, verdicts: Iterable[Verdict]) -> None:
    """Writes the file, whole. Raises DataError where that is not possible."""
    content = {"key": key.to_dict(), "verdicts": [asdict(verdict) for verdict in verdicts]}
    write_atomically(path_of(folder, key), json.dumps(content, indent=1) + "\n")


def replace_verdict(folder: Path, key: Key, verdict: Verdict) -> None:
    """Puts one verdict into the file. Raises DataError where that is not possible."""
    verdicts = read_verdicts(folder, key) or {}
    write_verdicts(folder, key, (verdicts | {verdict.operation: verdict}).values())


def read_verdicts(
    folder: Path, key: Key, log: Callable[[str], None] = lambda line: None
) -> dict[str, Verdict] | None:
    """Returns the verdicts by operation; None where there are none for this key.

    A check that was ended leaves fewer than the key's operations. A file that is damaged, or that
    is another key's under this one's name, counts as none, and `log` gets a line about it.
    """
    path = path_of(folder, key)
    try:
        saved = _Saved.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError):
        log(f"{path} is damaged; the kernels are checked again")
        return None
    verdicts = {verdict.operation: verdict for verdict in saved.verdicts}
    if any(
        verdict.choice not in IMPLEMENTATIONS.get(name, ()) for name, verdict in verdicts.items()
    ):
        log(f"{path} is damaged; the kernels are checked again")
        return None
    if saved.key != key.to_dict() or verdicts.keys() - {*key.problem.operations}:
        log(f"{path} is about another GPU, software or model; the kernels are checked again")
        return None
    return verdicts


def to_check(
    folder: Path, key: Key, started: float, log: Callable[[str], None] = lambda line: None
) -> tuple[dict[str, Verdict], tuple[str, ...]]:
    """Returns the verdicts of the file, and the operations to check in this start of a job.

    Those without a verdict, and those whose kernel failed for a temporary cause before `started`,
    in seconds since 1970.
    """
    verdicts = read_verdicts(folder, key, log) or {}
    again = {name for name, verdict in verdicts.items() if verdict.is_temporary}
    with suppress(FileNotFoundError):
        if path_of(folder, key).stat().st_mtime >= started:
            again = set()
    names = key.problem.operations
    return verdicts, tuple(name for name in names if name not in verdicts or name in again)


def saved_verdicts(folder: Path) -> Iterator[tuple[dict[str, Any], tuple[Verdict, ...]]]:
    """Yields keys and verdicts of all readable files of a folder, the newest first."""
    files = [(path.stat().st_mtime, path) for path in folder.glob("*.json")]
    for _, path in sorted(files, reverse=True):
        try:
            saved = _Saved.model_validate_json(path.read_bytes())
        except (ValidationError, OSError):
            continue
        yield saved.key, saved.verdicts
