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
        items: all work items, in order; tasks refer to them by number.
        open_tokenizer: returns the tokenizer, the same one in each call.
    """

    config: DataConfig
    folder: Path
    items: tuple[WorkItem, ...]
    open_tokenizer: Callable[[], Tokenizer]

    @property
    def tokenizer(self) -> Tokenizer:
        """Opened where a task first needs it, which takes seconds."""
        return self.open_tokenizer()


class Task(Section):
    """A unit of work; its name is unique in its stage and names its log.

    `size` is the bytes that it processes, for the progress; `group` names the bar of the progress
    that it counts in: a source, or nothing.
    """

    name: str
    size: int
    group: str = ""

    @abstractmethod
    def is_done(self, folder: Path) -> bool:
        """Whether the result is complete."""

    @abstractmethod
    def run(self, preparation: Preparation, advance: Callable[[int], None]) -> None:
        """Leaves the result in the folder; calls `advance` with the bytes processed.

        Raises DataError for what cannot be read and OSError for what cannot be written.
        """
