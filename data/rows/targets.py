"""Inputs and targets of a row, written piece by piece, and what their distribution is.

Letters: S tokens of a row, L of a piece of a document.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from data.compiled import compiled
from data.config import DataConfig
from data.text import Answers, Tokenizer

IGNORE_INDEX = torch.nn.CrossEntropyLoss().ignore_index
"""Target of a position at which nothing is predicted: -100, as PyTorch has it."""


@compiled
def fill(
    ids: NDArray[Any],
    start: int,
    length: int,
    tokens_S: NDArray[Any],
    targets_S: NDArray[Any],
    at: int,
) -> None:
    """Writes the piece of a document from `start` on to the positions from `at` on."""
    for i in range(length):
        tokens_S[at + i] = ids[start + i]
        targets_S[at + i] = ids[start + i + 1]


class AssistantLoss:
    """Removes the targets that are not the assistant's, in sources of `assistant_only_loss`.

    Attributes:
        applies: whether it does, by source.

    Raises DataError where the tokenizer lacks a special token of conversations.
    """

    def __init__(self, config: DataConfig, sources: Sequence[str]) -> None:
        self.applies = [name in config.assistant_only_loss for name in sources]
        self._answers = Answers(Tokenizer(config.tokenizer.path)) if any(self.applies) else None

    def mask(self, ids: NDArray[Any], start: int, targets_L: NDArray[Any]) -> None:
        """Masks the targets of the piece from `start` on of the document `ids`, all of it."""
        assert self._answers is not None
        is_predicted_L = self._answers.mask(ids)[start + 1 : start + 1 + len(targets_L)]
        targets_L[~is_predicted_L] = IGNORE_INDEX


def unigram_entropy(targets: Iterable[Tensor]) -> float:
    """Entropy of the distribution of all targets taken together, in nats per target.

    The loss of the best model that ignores the context. Entries of IGNORE_INDEX do not count; 0.0
    where there are no others.
    """
    counts = torch.zeros(0, dtype=torch.int64)
    for part in targets:
        total = torch.bincount(part[part != IGNORE_INDEX].flatten(), minlength=len(counts))
        total[: len(counts)] += counts
        counts = total
    nonzero = counts[counts > 0].double()
    if not len(nonzero):
        return 0.0
    share = nonzero / nonzero.sum()
    return float(-(share * share.log()).sum())
