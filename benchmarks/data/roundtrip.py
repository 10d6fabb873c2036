"""Documents restored from the rows, and the recipe counted in them; see __main__.py."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from benchmarks.data.loader import WEIGHTS
from data.config import DataConfig
from data.manifest import Manifest, Split
from data.prepare.corpus import Corpus
from data.rows.audit import audit_mixture, pieces
from data.rows.loader import Loader
from data.rows.transforms import fim_ids, split_table
from data.text import Tokenizer
from tests.megatron_shards import indexed_module

RECIPE = {"fim_rate": 0.1, "fim_domains": ("code",), "punctuation_split_rate": 0.1}


def recipe(config: DataConfig) -> None:
    """Prints counted and configured values over 16 million tokens."""
    update = {"source_weights": WEIGHTS, "transforms": RECIPE}
    loader = Loader(DataConfig.model_validate(config.model_dump() | update), seed=1)
    audit = audit_mixture(loader, 60)
    print(f"{audit.tokens:,} tokens of {audit.steps} steps; runs of {audit.span_tokens:,} tokens")
    for name, counts in audit.sources.items():
        print(
            f"{name:5} share {counts.tokens / audit.tokens:.4%} (configured {WEIGHTS[name]:.2%}), "
            f"off by at most {audit.max_deviation[name]:.4%} in any run; "
            f"FIM {counts.fim / counts.documents:.2%} of {counts.documents:,} documents; "
            f"split {counts.split / max(1, counts.splittable):.2%} of {counts.splittable:,}"
        )


def restored(tokens: list[int], fim: list[int]) -> list[int]:
    """The original of a PSM document."""
    if tokens[1] != fim[0]:
        return tokens
    i, j = tokens.index(fim[1]), tokens.index(fim[2])
    return [tokens[0], *tokens[2:i], *tokens[j + 1 : -1], *tokens[i + 1 : j], tokens[-1]]


def splits_of(tokens: list[int], original: list[int], table: np.ndarray) -> bool:
    """True where `tokens` is `original` with some tokens split."""
    place = 0
    for token in original:
        if tokens[place] == token:
            place += 1
        elif tokens[place : place + 2] == table[token].tolist():
            place += 2
        else:
            return False
    return place == len(tokens)


def epoch(config: DataConfig, split: Split) -> dict[tuple[str, int], list[int]]:
    """The tokens of every document of an epoch, assembled from its pieces."""
    loader = Loader(config, seed=3, split=split)
    pieces_of: dict[tuple[str, int], dict[int, list[int]]] = defaultdict(dict)
    for step in range(loader.num_steps):
        for piece in pieces(loader, step):
            if piece.epoch:
                continue  # the last step continues with the next epoch
            parts = pieces_of[loader.sources[piece.source].name, piece.document]
            assert piece.start not in parts, "a piece came twice"
            assert (piece.inputs[1:] == piece.targets[:-1]).all()
            parts[piece.start] = [*piece.inputs.tolist(), int(piece.targets[-1])]
    whole = {}
    for key, parts in pieces_of.items():
        tokens = parts[0][:1]
        for start in sorted(parts):
            assert start == len(tokens) - 1, "a piece is missing"
            tokens += parts[start][1:]
        whole[key] = tokens
    return whole


def roundtrip(config: DataConfig) -> None:
    """Compares the documents of an epoch with the texts of the sources, encoded again."""
    tokenizer = Tokenizer(config.tokenizer.path)
    table, fim = split_table(tokenizer), fim_ids(tokenizer).tolist()
    expected: Counter[tuple[int, ...]] = Counter()
    last, size = {}, 0
    for source in config.sources:
        texts = [document.text for document in Corpus(source)]
        size += sum(len(text.encode()) for text in texts)
        for first in range(0, len(texts), 500):
            for ids in tokenizer.encode_batch(texts[first : first + 500]):
                expected[(tokenizer.bos_id, *ids, tokenizer.eos_id)] += 1
        last[source.name] = (tokenizer.bos_id, *tokenizer.encode(texts[-1]), tokenizer.eos_id)
    tokens = sum(len(ids) * count for ids, count in expected.items())
    print(f"{expected.total():,} documents, {size / 1e6:.1f} MB, {tokens:,} tokens")
    for title, transforms in (
        ("plain", {"fim_rate": 0.0}),
        ("FIM 0.5 and splits 0.5", RECIPE | {"fim_rate": 0.5, "punctuation_split_rate": 0.5}),
    ):
        variant = DataConfig.model_validate(config.model_dump() | {"transforms": transforms})
        shards = _shards(variant)
        actual: Counter[tuple[int, ...]] = Counter()
        changed = 0
        for split in ("train", "validation"):
            for (name, number), ids in epoch(variant, split).items():  # type: ignore[arg-type]
                original = shards[name, split][number]
                back = restored(ids, fim)
                changed += ids != list(original)
                actual[original if splits_of(back, list(original), table) else tuple(back)] += 1
        lost = (expected - actual).total() + (actual - expected).total()
        arrived = sum(ids in actual for ids in last.values())
        print(
            f"{title}: {changed:,} documents transformed; lost, repeated or different after "
            f"restoring: {lost}; last documents restored: {arrived} of {len(last)}",
            flush=True,
        )


def _shards(config: DataConfig) -> dict[tuple[str, str], list[tuple[int, ...]]]:
    """The documents as Megatron reads them, by source and split."""
    manifest = Manifest.load(config.shards)
    documents: dict[tuple[str, str], list[tuple[int, ...]]] = defaultdict(list)
    for shard in manifest.shards:
        path = Path(config.shards) / manifest.folder / shard.name
        dataset = indexed_module().IndexedDataset(str(path))
        documents[shard.source, shard.split] += [tuple(ids.tolist()) for ids in dataset]
    return documents
