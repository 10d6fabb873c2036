"""The verdicts on the documents of each work item."""

import os
import secrets
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.files import fsync_file
from data.prepare.dedup.plan import Plan, SignatureFiles
from data.prepare.dedup.scatter import Output, read_part
from data.prepare.filters import EXACT, NEAR, TEMPLATE
from data.prepare.task import Preparation, Task

VERDICT = np.dtype([("reason", "u1"), ("item", "<i4"), ("document", "<i8")])
_REASONS = {"exact": EXACT, "near": NEAR, "template": TEMPLATE}


class VerdictsTask(Task):
    """Writes the verdicts on some work items that follow each other: `names`, from number `first`.

    `dropped` has the outputs of the stages that are named like filters: rows (document, the earlier
    one that it repeats), by range.
    """

    kind: Literal["dedup-verdicts"] = "dedup-verdicts"
    plan: Plan
    first: int
    names: tuple[str, ...]
    dropped: tuple[Output, ...]

    def is_done(self, folder: Path) -> bool:
        """Whether all files are there."""
        return all(verdict_file(name, folder).exists() for name in self.names)

    def run(self, preparation: Preparation, advance: Callable[[int], None]) -> None:
        """Writes one file after another, from the ranges that it lies in."""
        files = SignatureFiles(preparation)
        of_range = lru_cache(maxsize=1)(lambda number: self._verdicts(files, number))
        for item, name in enumerate(self.names, self.first):
            path = verdict_file(name, preparation.folder)
            start, stop = files.first[item : item + 2].tolist()
            partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            try:
                with partial.open("wb") as stream:
                    _write_header(stream, stop - start)
                    while start < stop:
                        begin, end = self.plan.bounds(start // self.plan.range_size)
                        verdicts = of_range(start // self.plan.range_size)
                        stream.write(verdicts[start - begin : stop - begin].tobytes())
                        start = end
                fsync_file(partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)  # no longer there once renamed
        advance(self.size)

    def _verdicts(self, files: SignatureFiles, number: int) -> NDArray[Any]:
        """The VERDICT of each document of a range."""
        start, stop = self.plan.bounds(number)
        verdicts = np.zeros(stop - start, dtype=VERDICT)
        verdicts["item"] = verdicts["document"] = -1
        for begin, records in files.blocks(start, stop):
            verdicts["reason"][begin - start :][: len(records)] = records["reason"]
        for output in self.dropped:
            for rows in read_part(files.folder, [output], number, 2):
                document, original = rows[:, 0] - start, rows[:, 1]
                item = np.searchsorted(files.first, original, side="right") - 1
                verdicts["reason"][document] = _REASONS[output.stage]
                verdicts["item"][document] = item
                verdicts["document"][document] = original - files.first[item]
        return verdicts


def verdict_file(name: str, folder: Path) -> Path:
    """The VERDICT of each document of a work item, as an array file."""
    return folder / f"{name}.verdicts.npy"


def _write_header(stream: Any, count: int) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(VERDICT),
        "fortran_order": False,
        "shape": (count,),
    }
    np.lib.format.write_array_header_1_0(stream, header)
