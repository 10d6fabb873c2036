"""Near duplicates of this project and of datatrove's MinHash at equal settings.

    python -m benchmarks.data.dedup_datatrove [--pairs 3000]

Both take word 5-grams, 16 bands of 8 values, and the same words (datatrove's normalisation of
numbers and accents is off). Each pair of made-up documents has from all to few of its words in
common. Prints, by the pair's true Jaccard similarity, which share of the pairs each finds: this
project with its comparison of whole signatures at 0.8, this project where an equal band is enough,
and datatrove; then whether they keep the first document.
"""

import argparse
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.config import FiltersConfig, SourceConfig
from data.prepare.dedup import remove_dedup_files, signature_file, stages, verdict_file
from data.prepare.filters import KEPT
from data.prepare.filters.quality import word_splitter
from data.prepare.signatures import NEAR_ROWS, NEAR_SLOTS, signatures
from data.prepare.task import Preparation
from data.prepare.work_item import WorkItem

_WORDS, _VOCABULARY, _GRAM = 300, 20_000, 5
_ANY_BAND = NEAR_ROWS / NEAR_SLOTS  # what signatures with an equal band share at least


def made_pairs(count: int) -> tuple[list[str], NDArray[np.float64]]:
    """Texts, of which each odd one is a changed copy of the one before; Jaccard of each pair."""
    rng = np.random.default_rng(1)
    texts, similarity = [], []
    for _ in range(count):
        words = rng.integers(0, _VOCABULARY, _WORDS)
        copy = words.copy()
        changed = rng.permutation(_WORDS)[: rng.integers(0, 41)]
        copy[changed] = rng.integers(0, _VOCABULARY, len(changed))
        texts += [" ".join(f"w{word}" for word in words) for words in (words, copy)]
        one, other = (
            {tuple(words[i : i + _GRAM]) for i in range(_WORDS - _GRAM + 1)}
            for words in (words.tolist(), copy.tolist())
        )
        similarity.append(len(one & other) / len(one | other))
    return texts, np.array(similarity)


def by_this_project(texts: list[str], threshold: float) -> NDArray[np.bool_]:
    """True where a text is dropped."""
    filters = FiltersConfig(
        exact_duplicates=False, near_duplicate_similarity=threshold, template_similarity=None
    )
    item = WorkItem(source=SourceConfig(name="made", paths=("x",)), number=0, pieces=())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        signature_file(item.name, folder).write_bytes(signatures(texts).tobytes())
        nothing: Any = None
        preparation = Preparation(nothing, folder, (item,), lambda: nothing)
        for tasks in stages([item], folder, filters, 1 << 30):
            for task in tasks:
                task.run(preparation, lambda _size: None)
        remove_dedup_files(folder)
        return np.asarray(np.load(verdict_file(item.name, folder))["reason"] != KEPT)


def by_datatrove(texts: list[str]) -> NDArray[np.bool_]:
    """True where a text is dropped."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import minhash
    from datatrove.utils.logging import logger
    from datatrove.utils.text import TextNormConfig

    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    config = minhash.MinhashConfig(
        n_grams=_GRAM,
        num_buckets=NEAR_SLOTS // NEAR_ROWS,
        hashes_per_bucket=NEAR_ROWS,
        norm_config=TextNormConfig(norm_unicode_diacritics=False, norm_numbers=False),
    )
    minhash.load_word_tokenizer = lambda _language: word_splitter()  # its own need large packages
    documents = (Document(text=text, id=str(i)) for i, text in enumerate(texts))
    with tempfile.TemporaryDirectory() as folder:
        minhash.MinhashDedupSignature(f"{folder}/s", config).run(documents)
        for bucket in range(config.num_buckets):
            buckets = minhash.MinhashDedupBuckets(f"{folder}/s", f"{folder}/b", config=config)
            buckets.run(None, bucket, config.num_buckets)
        minhash.MinhashDedupCluster(f"{folder}/b", f"{folder}/c", config).run()
        removed = np.fromfile(f"{folder}/c/000000.remove", dtype="<u4")
    dropped = np.zeros(len(texts), dtype=np.bool_)
    dropped[removed] = True
    return dropped


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.data.dedup_datatrove")
    parser.add_argument("--pairs", type=int, default=3000)
    texts, similarity = made_pairs(parser.parse_args().pairs)
    dropped = [by_this_project(texts, 0.8), by_this_project(texts, _ANY_BAND), by_datatrove(texts)]
    # A pair is found where one of its documents is dropped; no other documents are alike.
    found = [result.reshape(-1, 2).any(axis=1) for result in dropped]
    print("similarity    pairs  ours at 0.8  ours, any band  datatrove  1-(1-s^8)^16")
    bounds = np.linspace(0.3, 1.0, 15)
    for low, high in pairwise(bounds):
        inside = (similarity >= low) & (similarity < high + (high == 1.0))
        if inside.any():
            shares = [share[inside].mean() for share in found]
            expected = (1 - (1 - similarity[inside] ** 8) ** 16).mean()
            columns = f"{shares[0]:11.3f}  {shares[1]:14.3f}  {shares[2]:9.3f}  {expected:12.3f}"
            print(f"{low:.2f} to {high:.2f}  {inside.sum():5}  {columns}")
    for name, result in zip(("ours", "ours, any band", "datatrove"), dropped, strict=True):
        pairs = result.reshape(-1, 2)
        print(f"{name}: dropped {pairs.sum()}, the first of the pair in {pairs[:, 0].sum()}")


if __name__ == "__main__":
    main()
