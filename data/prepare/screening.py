"""The filters' part of `prepare`: every unit is screened, then all are compared with each other.

Screening reads a unit once, before it is tokenised, and leaves `NAME.screen.bin` (a SIGNATURE per
document) and last `NAME.screen.json`. When all units have one, `decide` compares them and leaves
`NAME.verdicts.npy`: a function of the sources and the filters, not of the processes. All are
removed when the shards are whole.
"""

import os
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from data.config import FiltersConfig
from data.errors import DataError
from data.files import fsync_file, write_atomically
from data.prepare.corpus import BadRecord, Corpus
from data.prepare.duplicates import Signed, find_duplicates
from data.prepare.filters import KEPT, Rules
from data.prepare.signatures import SIGNATURE, signatures
from data.prepare.work_item import Unit, batches
from data.text import Tokenizer

VERDICT = np.dtype([("reason", "u1"), ("unit", "<i4"), ("document", "<i8")])
_ENDINGS = ("screen.bin", "screen.json", "verdicts.npy")


class _Screened(BaseModel):
    """That a unit is screened."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int


def is_screened(unit: Unit, folder: Path) -> bool:
    """True where the unit's signatures are whole."""
    try:
        record = _Screened.model_validate_json((folder / f"{unit.name}.screen.json").read_bytes())
        size = (folder / f"{unit.name}.screen.bin").stat().st_size
    except (OSError, ValidationError):
        return False
    return size == record.documents * SIGNATURE.itemsize


def screen_unit(
    unit: Unit,
    _tokenizer: Tokenizer,
    folder: Path,
    filters: FiltersConfig,
    tolerant: bool,
    advance: Callable[[int], None],
) -> None:
    """Judge every document of a unit by itself, and sign those that stay.

    `advance` is told the UTF-8 bytes of the documents as they are done.
    """
    rules = Rules(filters, unit.source)
    aside = folder / f".{unit.name}.screen.{os.getpid()}"
    bad: list[BadRecord] | None = [] if tolerant else None
    count = 0
    try:
        with aside.open("wb") as stream:
            for batch in batches(Corpus(unit.source, unit.files).documents(bad)):
                reasons = np.array([rules.judge(document)[0] for document in batch], dtype=np.uint8)
                found = np.zeros(len(batch), dtype=SIGNATURE)
                good = np.flatnonzero(reasons == KEPT)
                found[good] = signatures([batch[i].text for i in good])
                found["reason"] = reasons
                stream.write(found.tobytes())
                count += len(batch)
                advance(sum(len(document.text.encode()) for document in batch))
        fsync_file(aside)
        os.replace(aside, folder / f"{unit.name}.screen.bin")
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    record = _Screened(documents=count)
    write_atomically(folder / f"{unit.name}.screen.json", record.model_dump_json().encode())


def decide(units: Sequence[Unit], folder: Path, filters: FiltersConfig) -> None:
    """Write every unit's verdicts, from the signatures of all."""
    signed = Signed([_signatures_of(unit, folder) for unit in units])
    find_duplicates(signed, filters)
    for number, unit in enumerate(units):
        mine = slice(signed.first[number], signed.first[number + 1])
        verdicts = np.zeros(mine.stop - mine.start, dtype=VERDICT)
        verdicts["reason"] = signed.reason[mine]
        like = signed.like[mine]
        verdicts["unit"] = np.searchsorted(signed.first, like, side="right") - 1
        verdicts["document"] = like - np.where(like < 0, 0, signed.first[verdicts["unit"]])
        stream = BytesIO()
        np.save(stream, verdicts, allow_pickle=False)
        write_atomically(folder / f"{unit.name}.verdicts.npy", stream.getvalue())


def _signatures_of(unit: Unit, folder: Path) -> NDArray[Any]:
    file = folder / f"{unit.name}.screen.bin"
    if not file.stat().st_size:  # nothing to map
        return np.zeros(0, dtype=SIGNATURE)
    return np.memmap(file, dtype=SIGNATURE, mode="r")


def verdicts_of(unit: Unit, folder: Path) -> NDArray[Any]:
    """[documents] of VERDICT; DataError where they cannot be read."""
    file = folder / f"{unit.name}.verdicts.npy"
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}; delete it and run again.") from error


def remove_screening(folder: Path) -> None:
    """Drop what only the making of the shards needs."""
    for ending in _ENDINGS:
        for file in folder.glob(f"*.{ending}"):
            file.unlink()
