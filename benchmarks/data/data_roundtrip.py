"""Every document back from the rows, and the recipe as the rows show it; see benchmarks/data/data.py."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from benchmarks.data.data_loader import WEIGHTS
from data.config import DataConfig
from data.manifest import Manifest, Split
from data.prepare.corpus import Corpus
from data.rows.audit import audit_recipe, pieces
from data.rows.loader import Loader
from data.rows.transforms import fim_ids, split_table
from data.text.tokenizer import Tokenizer

RECIPE = {"fim_rate": 0.1, "fim_domains": ("code",), "punctuation_split_rate": 0.1}


def recipe(config: DataConfig) -> None:
    """Measured beside configured, over 16 million tokens."""
    update = {"source_weights": WEIGHTS, "transforms": RECIPE}
    loader = Loader(DataConfig.model_validate(config.model_dump() | update), seed=1)
    found = audit_recipe(loader, 60)
    print(f"{found.tokens:,} tokens of {found.steps} steps; runs of {found.span_tokens:,} tokens")
    for name, counted in found.sources.items():
        print(
            f"{name:5} share {counted.tokens / found.tokens:.4%} (wanted {WEIGHTS[name]:.2%}), "
            f"off by at most {found.max_deviation[name]:.4%} in any run; "
            f"FIM {counted.fim / counted.documents:.2%} of {counted.documents:,} documents; "
            f"split {counted.split / max(1, counted.splittable):.2%} of {counted.splittable:,}"
        )


def restored(tokens: list[int], fim: list[int]) -> list[int]:
    """The document that was made a FIM document, PSM."""
    if tokens[1] != fim[0]:
        return tokens
    i, j = tokens.index(fim[1]), tokens.index(fim[2])
    return [tokens[0], *tokens[2:i], *tokens[j + 1 : -1], *tokens[i + 1 : j], tokens[-1]]


def joined(tokens: list[int], original: list[int], table: np.ndarray) -> bool:
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
    """The tokens of every document of an epoch, put together from its pieces."""
    loader = Loader(config, seed=3, split=split)
    found: dict[tuple[str, int], dict[int, list[int]]] = defaultdict(dict)
    for step in range(loader.num_steps):
        for piece in pieces(loader, step):
            if piece.epoch:
                continue  # the last step goes on with the next epoch
            parts = found[loader.sources[piece.source].name, piece.document]
            assert piece.start not in parts, "a piece came twice"
            assert (piece.inputs[1:] == piece.targets[:-1]).all()
            parts[piece.start] = [*piece.inputs.tolist(), int(piece.targets[-1])]
    whole = {}
    for key, parts in found.items():
        tokens = parts[0][:1]
        for start in sorted(parts):
            assert start == len(tokens) - 1, "a piece is missing"
            tokens += parts[start][1:]
        whole[key] = tokens
    return whole


def roundtrip(config: DataConfig) -> None:
    """Compare an epoch's documents with the source's own texts, encoded anew."""
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
        mine = DataConfig.model_validate(config.model_dump() | {"transforms": transforms})
        shards = _shards(mine)
        found: Counter[tuple[int, ...]] = Counter()
        changed = 0
        for split in ("train", "validation"):
            for (name, number), ids in epoch(mine, split).items():  # type: ignore[arg-type]
                original = shards[name, split][number]
                back = restored(ids, fim)
                changed += ids != list(original)
                found[original if joined(back, list(original), table) else tuple(back)] += 1
        lost = (expected - found).total() + (found - expected).total()
        arrived = sum(ids in found for ids in last.values())
        print(
            f"{title}: {changed:,} documents changed on the way; lost, twice or other after the "
            f"way back: {lost}; last documents that arrived: {arrived} of {len(last)}",
            flush=True,
        )


def _shards(config: DataConfig) -> dict[tuple[str, str], list[tuple[int, ...]]]:
    """The documents as Megatron reads them, by source and split."""
    from data.indexed import indexed_module

    manifest = Manifest.load(config.shards)
    found: dict[tuple[str, str], list[tuple[int, ...]]] = defaultdict(list)
    for shard in manifest.shards:
        path = Path(config.shards) / manifest.folder / shard.name
        dataset = indexed_module().IndexedDataset(str(path))
        found[shard.source, shard.split] += [tuple(ids.tolist()) for ids in dataset]
    return found
