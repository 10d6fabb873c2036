"""How frequent each id is among the inputs of a run, by which hash-routed layers are balanced.

Letters: V vocabulary.
"""

import numpy as np
from numpy.typing import NDArray

from data.rows.loader import Loader
from data.token_counts import read_counts


def token_frequencies(loader: Loader) -> NDArray[np.float64] | None:
    """Each id's share [V] of the inputs of all phases, before the transforms.

    Every source has its share of a phase's tokens, and every phase its tokens; without an end, the
    last phase alone counts. None where the shards were made without counts; DataError where these
    are damaged.
    """
    counts = read_counts(loader.config.shards, loader.manifest)
    if counts is None:
        return None
    phases = loader.schedule.phases
    sizes = [phase.rows_before(phase.steps or 0) * phase.seq_len for phase in phases]
    if phases[-1].steps is None:
        sizes = [*[0] * (len(phases) - 1), 1]
    frequencies = np.zeros(loader.manifest.vocab_size)
    for index, size in enumerate(sizes):
        for source, share in loader.configured_shares(index).items():
            inputs = counts[source]
            frequencies += size / sum(sizes) * share * inputs / max(1, inputs.sum())
    return frequencies
