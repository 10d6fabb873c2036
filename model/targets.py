"""Global token counts, targets and their shifts.

Letters: B rows, S tokens of a row, T = B·S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from model.layout import SampleLayout

IGNORE_INDEX = nn.CrossEntropyLoss().ignore_index
"""Target of a position at which nothing is predicted: -100, as PyTorch has it."""


@dataclass(frozen=True)
class TokenCounts:
    """Global denominators of the losses.

    ``lm`` and ``mtp`` are the numbers of tokens that the main and the MTP head predict; ``routed``
    is the number of non-padding tokens, the denominator of the balance loss and of the indexers'
    objective. They are summed over all microbatches and ranks first, so that every loss is a token
    mean over the global batch at any topology.
    """

    lm: int
    mtp: int
    routed: int

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(self.lm + other.lm, self.mtp + other.mtp, self.routed + other.routed)

    @classmethod
    def of(cls, layout: SampleLayout, targets_BS: Tensor) -> TokenCounts:
        """Returns the counts of one microbatch."""
        targets_T = targets_BS.flatten()
        return cls(
            lm=int((targets_T != IGNORE_INDEX).sum()),
            mtp=int((mtp_targets(layout, targets_T) != IGNORE_INDEX).sum()),
            routed=int((~layout.padding_T).sum()),
        )


def next_in_sample(layout: SampleLayout, values_T: Tensor, fill: Tensor | int) -> Tensor:
    """Returns values[t + 1] where t + 1 belongs to the same sample, else ``fill``."""

    def has_next() -> Tensor:
        same = layout.sample_T.roll(-1) == layout.sample_T
        same[-1:] = (
            False  # as a slice: one element is a copy from the host, which waits for the GPU
        )
        return same

    return values_T.roll(-1).where(layout.derived("has next", has_next), fill)


def mtp_targets(layout: SampleLayout, targets_T: Tensor) -> Tensor:
    """Returns the MTP head's targets: the main head's, shifted by one more in each sample."""
    return next_in_sample(layout, targets_T, IGNORE_INDEX)
