"""Leaving out what the screening found, counted by reason, with examples."""

from dataclasses import dataclass
from pathlib import Path

from data.config import FiltersConfig
from data.errors import DataError
from data.manifest import MAX_EXAMPLES, Example, Loss
from data.prepare.corpus import Document
from data.prepare.filters import KEPT, REASONS, Rules
from data.prepare.screening import verdicts_of
from data.prepare.work_item import Unit

_SHOWN = 300  # characters of an example


@dataclass(frozen=True)
class Filtered:
    """The filters, and the names of all units in order, of which verdicts speak by number."""

    filters: FiltersConfig
    names: tuple[str, ...]


class Sieve:
    """The documents of a unit that stay; what does not is counted.

    Raises DataError where the unit holds other documents than when it was screened.
    """

    def __init__(self, filtered: Filtered, unit: Unit, folder: Path) -> None:
        self.unit, self.names = unit, filtered.names
        self.rules = Rules(filtered.filters, unit.source)
        self.verdicts = verdicts_of(unit, folder)
        self.place = 0
        self.losses: dict[str, Loss] = {}

    def kept(self, documents: list[Document]) -> list[Document]:
        """The next documents, without those that the filters leave out."""
        mine = self.verdicts[self.place : self.place + len(documents)]
        self.place += len(documents)
        if len(mine) != len(documents):
            raise self._changed()
        found = []
        for document, verdict in zip(documents, mine, strict=True):
            if verdict["reason"] == KEPT:
                found.append(document)
            else:
                self._count(document, verdict)
        return found

    def _count(self, document: Document, verdict: tuple[int, int, int]) -> None:
        number, unit, original = map(int, verdict)
        reason = REASONS[number]
        before = self.losses.get(reason, Loss())
        examples: tuple[Example, ...] = ()
        if len(before.examples) < MAX_EXAMPLES:
            detail = self.rules.judge(document)[1]
            if unit >= 0:
                detail = f"like document {original} of {self.names[unit]}"
            examples = (Example(text=document.text[:_SHOWN], detail=detail),)
        loss = Loss(documents=1, bytes=len(document.text.encode()), examples=examples)
        self.losses[reason] = before.plus(loss)

    def close(self) -> dict[str, Loss]:
        """The losses, in the order of the filters."""
        if self.place != len(self.verdicts):
            raise self._changed()
        return {reason: self.losses[reason] for reason in REASONS if reason in self.losses}

    def _changed(self) -> DataError:
        return DataError(
            f"{self.unit.name} holds other documents than when it was screened; its files changed "
            "while they were read, run the command again."
        )
