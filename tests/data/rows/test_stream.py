"""Mixture, transforms and phases over the produced stream: nothing lost, nothing twice."""

import json
import math
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from data.config import DataConfig, DataPhase
from data.errors import DataError
from data.manifest import Manifest
from data.prepare.run import prepare
from data.rows.loader import Loader
from data.rows.mixture import Schedule, balanced_order
from data.rows.packing import pack_into
from data.rows.permutation import hashes
from data.rows.stream import SourceStream
from data.rows.transforms import NONE, fim_ids, split_table, transform
from data.text.tokenizer import Tokenizer
from tests.data.rows.made_up import documents_of


@pytest.fixture(scope="module")
def mixed(config: DataConfig, documents: list[str], tmp_path_factory: pytest.TempPathFactory):
    """Two sources, one of code, over the tokenizer of `config`."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, texts in (("code", documents[:-200]), ("prose", documents[-200:])):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    sources = [
        {"name": name, "paths": [str(folder / f"{name}.jsonl")], "domain": name}
        for name in ("code", "prose")
    ]
    fields = {"sources": sources, "shards": str(folder / "shards"), "validation_fraction": 0.0}
    variant = DataConfig.model_validate(config.model_dump() | fields)
    prepare(variant, progress=False)
    return variant


def changed(config: DataConfig, **fields: object) -> DataConfig:
    return DataConfig.model_validate(config.model_dump() | fields)


def stream(loader: Loader, steps: int) -> dict[tuple[str, int, int], list[int]]:
    """The tokens of every (source, epoch, document) of the first steps, put together by place."""
    pieces_of_documents: dict[tuple[str, int, int], dict[int, list[int]]] = defaultdict(dict)
    for step in range(steps):
        _, numbers = loader.schedule.rows_of(step)
        for place, batch in zip(range(len(numbers)), loader.all_rows(step), strict=True):
            at = loader.packed_row(step, place)
            assert at is not None
            window, row = at
            position = 0
            for which, start, length in window.packed.row(row):
                name = loader.sources[window.source[which]].name
                key = (name, int(window.epoch[which]), int(window.document[which]))
                piece = slice(position, position + length)
                inputs = batch.tokens[0, piece].tolist()
                outputs = batch.targets[0, piece].tolist()
                assert inputs[1:] == outputs[:-1]
                assert start not in pieces_of_documents[key]  # nothing twice
                pieces_of_documents[key][start] = [*inputs, outputs[-1]]
                position += length
    whole = {}
    for key, pieces in pieces_of_documents.items():
        tokens: list[int] = []
        for start in sorted(pieces):
            if start != max(len(tokens) - 1, 0):
                break  # continues after these steps, or began before them
            tokens = tokens[:start] + pieces[start]
        whole[key] = tokens
    return whole


def restored(tokens: list[int], fim: list[int]) -> list[int]:
    """Inverse of PSM and SPM, in a few lines."""
    begin, hole, end = fim
    if tokens[1] != begin:
        return tokens
    i, j = tokens.index(hole), tokens.index(end)
    prefix, suffix, middle = tokens[2:i], tokens[i + 1 : j], tokens[j + 1 : -1]
    return [tokens[0], *prefix, *middle, *suffix, tokens[-1]]


def merges_to(tokens: list[int], original: list[int], table: np.ndarray) -> int | None:
    """How many tokens of `original` are split in `tokens`; None where they differ otherwise."""
    place = splits = 0
    for token in original:
        if tokens[place] == token:
            place += 1
        elif tokens[place : place + 2] == table[token].tolist():
            place, splits = place + 2, splits + 1
        else:
            return None
    return splits if place == len(tokens) else None


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
@pytest.mark.parametrize("spm", [0.0, 1.0])
def test_every_document_comes_back(mixed: DataConfig, packing: str, spm: float) -> None:
    transforms = {"fim_rate": 0.5, "fim_spm_rate": spm, "punctuation_split_rate": 0.5}
    loader = Loader(changed(mixed, transforms=transforms, packing=packing), seed=4)
    tokenizer = Tokenizer(mixed.tokenizer.path)
    table, ids = split_table(tokenizer), fim_ids(tokenizer).tolist()
    assert (table[:, 0] >= 0).any()
    for left, right in table[table[:, 0] >= 0].tolist():
        text = tokenizer.decode([left, right])
        assert text == tokenizer.decode([left]) + tokenizer.decode([right]) and "\n" in text
    whole = stream(loader, loader.num_steps)
    fims, splits, able = Counter(), Counter(), Counter()
    suffix_first = 0
    for source in loader.sources:
        numbers = {number for name, epoch, number in whole if (name, epoch) == (source.name, 0)}
        assert numbers == set(range(source.documents))
        for number in numbers:
            tokens = whole[source.name, 0, number]
            original = source.tokens_of(number).tolist()
            fims[source.name] += tokens[1] == ids[0]
            suffix_first += tokens[1:3] == ids[:2]
            count = merges_to(restored(tokens, ids), original, table)
            assert count is not None
            assert tokenizer.decode(restored(tokens, ids)) == tokenizer.decode(original)
            splits[source.name] += count
            able[source.name] += int((table[original, 0] >= 0).sum())
    assert fims["prose"] == 0
    assert 0.2 < fims["code"] / loader.sources[0].documents < 0.8
    # A prefix may be empty, seldom.
    assert suffix_first == fims["code"] if spm else suffix_first < fims["code"] / 4
    for name in ("code", "prose"):
        assert splits[name] / able[name] == pytest.approx(0.5, abs=0.03), name


def test_what_chance_lengthens_fits_into_full_windows(mixed: DataConfig) -> None:
    """Windows without room to spare: some documents stay as they are, and none is lost."""
    transforms = {"fim_rate": 0.5, "punctuation_split_rate": 0.5}
    fields = {"packing_fill": 1.0, "packing_window": 40, "packing": "concatenate"}
    loader = Loader(changed(mixed, transforms=transforms, **fields), seed=4)
    whole = stream(loader, 2 * loader.num_steps)
    for source in loader.sources:
        assert {n for name, e, n in whole if (name, e) == (source.name, 0)} == set(
            range(source.documents)
        )


def test_any_token_may_be_split() -> None:
    table = np.full((8, 2), -1)
    table[5] = 6, 7
    raw = np.array([0, *[5] * 20, 1], dtype=np.uint16)
    raw.flags.writeable = False  # as a shard's are
    splits = np.zeros(20)
    for number in range(1000):
        key = hashes(np.array([number]), 3)[0]
        tokens = transform(raw, table, 5, NONE, np.zeros(3, dtype=np.int64), key)
        splits += tokens[1:-1][tokens[1:-1] != 7] == 6
    assert splits.sum() == 5000
    assert np.abs(splits / 1000 - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 1000)


def code_and_all(loader: Loader, step: int) -> tuple[int, int]:
    """Tokens of the source `code` in a step, and all."""
    tokens = Counter()
    for place in range(len(loader.schedule.rows_of(step)[1])):
        at = loader.packed_row(step, place)
        assert at is not None
        for which, _, length in at[0].packed.row(at[1]):
            tokens[loader.sources[at[0].source[which]].name] += length
    return tokens["code"], tokens.total()


def test_shares_follow_the_weights(mixed: DataConfig) -> None:
    weights = {"code": 0.3, "prose": 0.7}
    loader = Loader(changed(mixed, source_weights=weights, packing_window=2000), seed=0)
    ends = np.cumsum([(0, 0)] + [code_and_all(loader, step) for step in range(200)], axis=0)
    off = ends[:, 0] - 0.3 * ends[:, 1]
    assert off.max() - off.min() <= 2 * 64  # any run of steps is right to two rows
    epochs = loader.epochs_of(200)
    assert epochs["prose"] > 1 and epochs["code"] > 0


def test_weights_change_at_a_step(mixed: DataConfig) -> None:
    rows = {"seq_len": 64, "global_batch_size": 12}
    phases = [
        DataPhase(steps=40, source_weights={"code": 0.8, "prose": 0.2}, **rows),
        DataPhase(source_weights={"code": 0.1, "prose": 0.9}, **rows),
    ]
    loader = Loader(changed(mixed, packing_window=2000), seed=0, phases=phases)
    for steps, share in ((range(40), 0.8), (range(40, 80), 0.1)):
        code, tokens = np.sum([code_and_all(loader, step) for step in steps], axis=0)
        assert abs(code - share * tokens) <= 2 * 64


def test_phases_continue_where_the_last_ended(mixed: DataConfig) -> None:
    phases = [
        {
            "steps": 7,
            "seq_len": 64,
            "global_batch_size": 12,
            "initial_batch_size": 4,
            "rampup_steps": 5,
        },
        {
            "steps": 3,
            "seq_len": 256,
            "global_batch_size": 4,
            "source_weights": {"code": 1, "prose": 1},
        },
        {"seq_len": 128, "global_batch_size": 8, "micro_batch_size": 2},
    ]
    loader = Loader(mixed, seed=1, phases=[DataPhase(**phase) for phase in phases])
    assert [len(loader.schedule.rows_of(step)[1]) for step in range(8)] == [
        *(4, 4, 4, 8, 8, 12, 12, 4)
    ]
    assert [tuple(b.tokens.shape) for b in loader.at(10)] == [(2, 128)] * 4
    whole = stream(loader, 12)
    for source in loader.sources:
        for number in range(source.documents):
            tokens = whole.get((source.name, 0, number), [])
            if tokens and tokens[-1] == loader.manifest.eos_id and tokens[1] < 900:
                assert tokens == source.tokens_of(number).tolist()
    starts = [loader._stream_offsets(i, loader.schedule.rows_in(i) or 0) for i in (0, 1)]
    assert starts == loader._offsets[1:]
    epochs = [loader.epochs_of(step)["code"] for step in range(12)]
    assert epochs[0] == 0 and epochs == sorted(set(epochs))


@pytest.mark.parametrize(("first", "last", "ramp"), [(1, 10, 4), (6, 4, 3), (96, 1152, 10_000)])
def test_schedule_counts_rows(first: int, last: int, ramp: int) -> None:
    """Rows of consecutive steps follow each other without gap, in multiples of what divides all."""
    phase = DataPhase(
        steps=ramp + 1,
        seq_len=8,
        global_batch_size=last,
        initial_batch_size=first,
        rampup_steps=ramp,
    )
    schedule = Schedule([phase, phase])
    rows = [schedule.rows_of(step)[1] for step in range(min(ramp + 1, 300))]
    assert [r.start for r in rows[1:]] == [r.stop for r in rows[:-1]]
    multiple = math.gcd(first, last)
    levels = (last - first) // multiple
    expected = [first + multiple * (levels * i // ramp) for i in range(ramp)] + [last]
    assert [len(r) for r in rows] == expected[: len(rows)]
    assert schedule.rows_in(0) == sum(expected)
    assert set(expected) <= set(phase.sizes) and phase.sizes[-1] == last
    with pytest.raises(DataError, match="needs `steps`"):
        Schedule([phase.model_copy(update={"steps": None}), phase])


@pytest.mark.parametrize("seed", range(20))
def test_pack_into_loses_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    length = rng.integers(6, 9, 50)  # best fit wastes a third
    rows = -(-int(length.sum()) // 12)
    document, start = np.arange(50), np.zeros(50, dtype=np.int64)
    packed = pack_into(document, start, length, 12, rows)
    used = [sum(p[2] for p in packed.row(r)) for r in range(rows)]
    assert max(used) <= 12 and sum(used) == length.sum()
    covered = [
        (d, p)
        for d, s, n in zip(packed.document, packed.start, packed.length, strict=True)
        for p in range(s, s + n)
    ]
    assert sorted(covered) == [(d, p) for d in range(50) for p in range(length[d])]


def test_balanced_order_is_an_order_and_balances() -> None:
    rng = np.random.default_rng(0)
    first = rng.choice([0, 100, 30, 55], 4000, p=[0.4, 0.4, 0.1, 0.1])
    tokens = np.stack([first, 100 - first], axis=1)
    order = balanced_order(tokens, 1, 8)
    assert sorted(order) == list(range(4000))
    off = np.cumsum(tokens[order, 0] - tokens[:, 0].mean())
    assert np.abs(off).max() <= 100
    plain = np.cumsum(tokens[:, 0] - tokens[:, 0].mean())
    assert np.abs(plain).max() > 300


def test_epochs_differ_in_their_transforms(mixed: DataConfig) -> None:
    loader = Loader(changed(mixed, transforms={"fim_rate": 0.5}), seed=4)
    whole = stream(loader, 2 * loader.num_steps - 1)
    both = [n for s, e, n in whole if s == "code" and e == 1 and ("code", 0, n) in whole]
    begin = loader.fim_ids[0]
    pairs = [(whole["code", 0, n], whole["code", 1, n]) for n in both]
    assert any((a[1] == begin) != (b[1] == begin) for a, b in pairs)  # which are FIM
    cut = [(a, b) for a, b in pairs if a[1] == b[1] == begin and len(a) == len(b)]
    assert cut and all(a != b for a, b in cut)  # and where


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source_weights": {"code": -1.0}}, "at least 0"),
        ({"source_weights": {"code": float("nan")}}, "finite number"),
        ({"source_weights": {"code": 0.0, "prose": 0.0}}, "sum to 0"),
        ({"source_weights": {"cod": 1.0}}, "the sources are code, prose"),
    ],
)
def test_refused(mixed: DataConfig, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        changed(mixed, **fields)


def test_a_source_of_which_the_shards_hold_nothing(mixed: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(mixed.shards, tmp_path, dirs_exist_ok=True)
    manifest = Manifest.load(tmp_path)
    code = tuple(shard for shard in manifest.shards if shard.source == "code")
    manifest.model_copy(update={"shards": code}).save(tmp_path)
    weights = {"code": 0.3, "prose": 0.7}
    with pytest.raises(DataError, match=r"no document of source 'prose', whose weight is 0\.7"):
        Loader(changed(mixed, shards=str(tmp_path), source_weights=weights), seed=0)
    loader = Loader(
        changed(mixed, shards=str(tmp_path), source_weights={"code": 1.0, "prose": 0.0}), seed=0
    )
    assert [source.name for source in loader.sources] == ["code"]


def test_a_ramp_needs_both_of_its_fields() -> None:
    with pytest.raises(ValidationError, match="a ramp needs both"):
        DataPhase(seq_len=8, global_batch_size=2, rampup_steps=2)


def test_damaged_counts_and_tables_are_made_again(mixed: DataConfig) -> None:
    config = changed(mixed, transforms={"punctuation_split_rate": 0.5})
    first = Loader(config, seed=0).at(3)[0]
    files = [*Path(config.shards).rglob("*.splittable.npz")]
    files += Path(config.shards).rglob("transforms.npz")
    assert len(files) == 3
    for file in files:
        file.write_bytes(file.read_bytes()[:50])
    assert (Loader(config, seed=0).at(3)[0].tokens == first.tokens).all()


def test_a_shared_corpus_may_be_read_only(
    mixed: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise DataError(f"cannot write {path}: Permission denied")

    monkeypatch.setattr("data.rows.transforms.write_atomically", refuse)
    config = changed(mixed, transforms={"punctuation_split_rate": 0.5})
    assert Loader(config, seed=0).at(0)


def test_caches_of_other_shards_are_made_again(mixed: DataConfig) -> None:
    """As where another tool makes its shards again in place, with another tokenizer."""
    config = changed(mixed, transforms={"punctuation_split_rate": 0.5})
    first = Loader(config, seed=0)
    root = Path(config.shards) / first.manifest.folder
    for file in [root / "transforms.npz", *root.glob("*.splittable.npz")]:
        with np.load(file) as arrays:
            wrong = {name: values * 0 for name, values in arrays.items() if name != "key"}
        np.savez(file, **wrong, key=np.array("of another tokenizer"))
    again = Loader(config, seed=0)
    assert (again.split_table == first.split_table).all() and (first.split_table >= 0).any()
    for one, other in zip(first._counts, again._counts, strict=True):
        assert (one == other).all() and one.any()


def test_a_padded_vocabulary_is_never_split(mixed: DataConfig) -> None:
    config = changed(mixed, transforms={"punctuation_split_rate": 0.5})
    manifest = Manifest.load(config.shards)
    unpadded = Loader(config, seed=0).split_table
    manifest.model_copy(update={"vocab_size": manifest.vocab_size + 9}).save(Path(config.shards))
    for file in Path(config.shards).rglob("transforms.npz"):
        file.unlink()
    table = Loader(config, seed=0).split_table
    assert len(table) == len(unpadded) + 9 and (table[len(unpadded) :] == -1).all()


@pytest.mark.parametrize("blocks", [1 << 19, 7])
def test_a_line_is_its_documents_and_windows_end_between_pieces(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.documents.MAX_BLOCKS", blocks)
    lengths = np.random.default_rng(0).integers(2, 40, 50)
    source = SourceStream("a", documents_of(lengths, "code"), 5)
    line = [  # every position of the first two epochs
        (e, d, p)
        for e, d, first, last, _ in zip(
            *vars(source.between(0, 2 * source.positions)).values(), strict=True
        )
        for p in range(first, last)
    ]
    expected = [(e, d, p) for e in (0, 1) for d in range(50) for p in range(lengths[d] - 1)]
    assert len(line) == len(expected) and set(line) == set(expected)
    orders = [[d for e, d, p in line if (e, p) == (epoch, 0)] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    for place in range(2 * source.positions):
        snapped = source.snap(place, 16, 16)
        assert snapped == place - line[place][2] % 16
        assert source.snap(place, 16, 0) in (place, snapped)
