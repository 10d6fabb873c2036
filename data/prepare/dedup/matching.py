"""The candidates for duplicates: documents with a key of an earlier one.

Keys are scattered by band and hash, so that all documents of a key meet in one part.
"""

from typing import Literal

import numpy as np

from data.prepare.dedup.kernels import FirstDocuments
from data.prepare.dedup.plan import (
    DedupTask,
    Field,
    SignatureFiles,
    is_kept,
    kept_mask,
    keys_of,
    pairs,
)
from data.prepare.dedup.scatter import Output, ScatterWriter, read_part
from data.prepare.task import Preparation


class KeysTask(DedupTask):
    """Writes rows (key, document) of a range, for each band of those that are still kept.

    Part band * key_parts + hash has a share of the keys of one band.
    """

    kind: Literal["dedup-keys"] = "dedup-keys"
    field: Field
    dropped: tuple[Output, ...]

    def write(self, preparation: Preparation) -> None:
        """Reads the signatures of the range once."""
        plan, bands = self.plan, self.plan.bands(self.field)
        start, stop = plan.bounds(self.number)
        kept = kept_mask(preparation, plan, self.dropped, self.number)
        path = self.output(preparation.folder)
        with ScatterWriter(path, bands * plan.key_parts, plan.memory) as writer:
            for first, records in SignatureFiles(preparation).blocks(start, stop):
                in_block = kept[first - start :][: len(records)] & is_kept(records)
                rows = np.flatnonzero(in_block)
                keys = keys_of(records[rows], self.field)
                part = keys % np.uint64(plan.key_parts)
                part += np.arange(bands, dtype=np.uint64) * np.uint64(plan.key_parts)
                documents = np.repeat(rows + first, bands)
                writer.add(part.ravel(), pairs(keys.view(np.int64).ravel(), documents))


class MatchTask(DedupTask):
    """Writes rows (document, first document with the same key), by the document's range.

    For signatures, also rows (that first document, the document's range), in parts R + its range:
    the signatures that are needed to compare the pair.
    """

    kind: Literal["dedup-match"] = "dedup-match"
    field: Field
    start: int
    stop: int
    keys: Output

    def write(self, preparation: Preparation) -> None:
        """Reads the parts of the keys from `start` to `stop`, each in the order of documents."""
        plan, ranges = self.plan, self.plan.ranges
        has_signature = self.field != "exact"
        parts = ranges * (1 + has_signature)
        with ScatterWriter(self.output(preparation.folder), parts, plan.memory) as writer:
            for part in range(self.start, self.stop):
                table = FirstDocuments(plan.documents // plan.key_parts)
                for rows in read_part(preparation.folder, [self.keys], part, 2):
                    documents, first = table.repeats(rows)
                    of_document = plan.range_of(documents)
                    writer.add(of_document, pairs(documents, first))
                    if has_signature:
                        writer.add(ranges + plan.range_of(first), pairs(first, of_document))
