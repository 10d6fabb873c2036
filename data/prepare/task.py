"""Units of work that any process of any host may do, and do again: what engines run.

The result of a task is files in the folder of the preparation, which all hosts share: they are
complete or absent, and equal whoever made them. A task travels as JSON.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig, Section
from data.prepare.work_item import WorkItem
from data.text import Tokenizer


@dataclass(frozen=True)
class Preparation:
    """What all tasks of a preparation share.

    Attributes:
        config: of the data.
        folder: where results are until the shards are published.
        items: all work items, in order.
        tokenizer: opened once in each process.
    """

    config: DataConfig
    folder: Path
    items: tuple[WorkItem, ...]
    tokenizer: Tokenizer


class Task(Section):
    """A unit of work; its name is unique in its stage and names its log.

    `size` is the bytes that it processes, for the progress.
    """

    name: str
    size: int

    @abstractmethod
    def is_done(self, folder: Path) -> bool:
        """Whether the result is complete."""

    @abstractmethod
    def run(self, preparation: Preparation, advance: Callable[[int], None]) -> None:
        """Leaves the result in the folder; calls `advance` with the bytes processed.

        Raises DataError for what cannot be read and OSError for what cannot be written.
        """
