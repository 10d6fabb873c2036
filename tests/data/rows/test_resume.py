"""A resume reads every row once, or is refused, or logs what it reads twice or leaves out."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig, DataPhase
from data.errors import DataError
from data.manifest import Manifest
from data.prepare.run import prepare
from data.rows.audit import pieces
from data.rows.loader import Loader
from data.rows.resume import DataRecord
from tests.data.test_indexed import shards_of

Position = tuple[int, int, int]
"""Epoch, document, and position inside it."""


def positions(loader: Loader, steps: Iterable[int]) -> Counter[Position]:
    return Counter(
        (piece.epoch, piece.document, piece.start + i)
        for step in steps
        for piece in pieces(loader, step)
        for i in range(len(piece.inputs))
    )


def rows(loader: Loader, steps: Iterable[int]) -> list[list[int]]:
    return [batch.tokens[0].tolist() for step in steps for batch in loader.all_rows(step)]


def changed(config: DataConfig, **update: Any) -> DataConfig:
    return DataConfig.model_validate(config.model_dump() | update)


@pytest.fixture
def small(config: DataConfig) -> DataConfig:
    """Several windows in an epoch."""
    return changed(config, packing_window=60)


@pytest.mark.parametrize("step", [1, 7, 20])
@pytest.mark.parametrize("size", [8, 20, 24])
def test_another_batch_size_goes_on_with_the_next_row(
    small: DataConfig, step: int, size: int
) -> None:
    before = Loader(small, seed=3)
    saved = DataRecord(before).save(step)
    loader = Loader(changed(small, global_batch_size=size), seed=3)
    (line,) = DataRecord(loader).resume(saved, step)
    assert line == (
        f"data.global_batch_size is {size} and was 12; "
        "reading continues with the row after the last"
    )
    count = 3 * before.plans[0].rows
    ours, theirs = range(step, step + count // size), range(step, step + count // 12)
    expected, actual = rows(before, theirs), rows(loader, ours)
    length = min(len(expected), len(actual))
    assert length > 2 * before.plans[0].rows and actual[:length] == expected[:length]
    again = Loader(changed(small, global_batch_size=size), seed=3)
    assert DataRecord(again).resume(DataRecord(loader).save(step + 2), step + 2) == []
    assert rows(again, ours[2:]) == rows(loader, ours[2:])


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"seq_len": 96}, "data.seq_len is 96 in this run and 64 in the checkpoint of step 7"),
    ({"packing": "concatenate"}, "data.packing is 'concatenate' in this run and 'best_fit'"),
    ({"packing_window": 70}, "data.packing_window is 70 in this run and 60"),
    ({"packing_fill": 0.9}, "data.packing_fill is 0.9 in this run and 0.9995"),
    ({"transforms": {"fim_rate": 0.2}}, "data.transforms.fim_rate is 0.2 in this run and 0.1"),
    ({"source_weights": {"text": 2.0}}, r"data.source_weights is {'text': 2.0} in this run and {}"),
    ({"seq_len": 96, "packing_fill": 0.9}, r"\(and 1 more\), so that rows would be read twice"),
]


@pytest.mark.parametrize(("update", "message"), CHANGES)
def test_other_rows_are_refused_and_can_be_accepted_at_one_step(
    small: DataConfig, update: dict[str, Any], message: str
) -> None:
    before = Loader(small, seed=3)
    saved = DataRecord(before).save(7)
    for accepted in (None, 6):
        loader = Loader(changed(small, **update, accept_change_at=accepted), seed=3)
        with pytest.raises(DataError, match=message):
            DataRecord(loader).resume(saved, 7)
    loader = Loader(changed(small, **update, accept_change_at=7), seed=3)
    lines = DataRecord(loader).resume(saved, 7)
    assert f"{saved['rows_left']} rows of 64 tokens, the rest of a packing window" in lines[-1]
    old, new = positions(before, range(7)), positions(loader, range(7, 20))
    assert not old & new, "read twice"
    # The windows before the place, up to the rows that are left out, are read whole.
    window = before.plans[0].rows
    rest = 7 * 12 % window
    assert saved["rows_left"] == (window - rest) % window


def test_the_rest_of_the_window_is_all_that_is_left_out(small: DataConfig) -> None:
    before = Loader(small, seed=3)
    saved = DataRecord(before).save(7)
    update = {"seq_len": 32, "global_batch_size": 24, "accept_change_at": 7}
    loader = Loader(changed(small, **update), seed=3)
    DataRecord(loader).resume(saved, 7)
    read = positions(before, range(7))
    step = 7
    while min(read.values()) == 1 and not any(epoch for epoch, _, _ in read):
        read += positions(loader, [step])
        step += 1
    first = {position for position in read if position[0] == 0}
    total = before.num_targets
    assert total - len(first) <= saved["rows_left"] * 64
    assert total - len(first) >= (saved["rows_left"] - 1) * 64 * 0.99


def test_a_change_is_kept_by_later_resumes(small: DataConfig) -> None:
    saved = DataRecord(Loader(small, seed=3)).save(7)
    config = changed(small, seq_len=96, accept_change_at=7)
    loader = Loader(config, seed=3)
    DataRecord(loader).resume(saved, 7)
    again = Loader(config, seed=3)
    assert DataRecord(again).resume(DataRecord(loader).save(11), 11) == []
    assert rows(again, range(11, 15)) == rows(loader, range(11, 15))
    with pytest.raises(DataError, match=r"step 6 cannot be trained again: .* at step 7"):
        again.at(6)


def test_a_rollback_to_before_an_accepted_change_goes_on_with_it(small: DataConfig) -> None:
    """A spike soon after a resume restores a checkpoint of the data before the change."""
    before = Loader(small, seed=3)
    saved = {step: DataRecord(before).save(step) for step in (5, 7)}
    config = changed(small, seq_len=96, accept_change_at=7)
    loader = Loader(config, seed=3)
    record = DataRecord(loader)
    record.resume(saved[7], 7)
    loader.at(7)
    lines = record.resume(saved[5], 5)
    assert lines[0] == "data.seq_len is 96 and was 64"
    old, new = positions(before, range(5)), positions(loader, range(5, 16))
    assert not old & new and max(new.values()) == 1
    direct = Loader(changed(config, accept_change_at=5), seed=3)
    DataRecord(direct).resume(saved[5], 5)
    assert rows(loader, range(5, 16)) == rows(direct, range(5, 16))
    with pytest.raises(DataError, match="in the checkpoint of step 5"):  # at another start
        DataRecord(Loader(config, seed=3)).resume(saved[5], 5)


def phases(*sizes: tuple[int, int, int]) -> list[DataPhase]:
    """Phases of (steps, row length, batch size)."""
    return [DataPhase(steps=n, seq_len=s, global_batch_size=b) for n, s, b in sizes]


def test_phases_that_have_not_begun_are_free(small: DataConfig) -> None:
    before = Loader(small, seed=3, phases=phases((5, 64, 12), (9, 128, 6)))
    record = DataRecord(before)
    later = phases((5, 64, 12), (9, 128, 8), (4, 256, 4))
    for step in (3, 5):
        loader = Loader(small, seed=3, phases=later)
        assert DataRecord(loader).resume(record.save(step), step) == []
    assert rows(loader, range(5)) == rows(before, range(5))
    for step, other, key in (
        (3, phases((5, 64, 8), (9, 128, 6)), "phases.0.global_batch_size is 8"),
        (6, phases((4, 64, 12), (9, 128, 6)), "phases.0.until_tokens, in steps, is 4"),
        (6, phases((5, 64, 12), (9, 160, 6)), "phases.1.seq_len is 160"),
        (3, phases((4, 64, 12), (9, 128, 6)), "the number of rows of phases.0 is 48"),
    ):
        loader = Loader(small, seed=3, phases=other)
        with pytest.raises(DataError, match=key):
            DataRecord(loader).resume(record.save(step), step)


def test_a_phase_cannot_end_before_the_rows_that_were_read(small: DataConfig) -> None:
    """Neither inside a packing window nor where one ends."""
    size = Loader(small, seed=3).plans[0].rows
    step = size // math.gcd(size, 12)
    before = Loader(small, seed=3, phases=phases((step + 2, 64, 12), (9, 128, 6)))
    saved = DataRecord(before).save(step)
    assert saved["place"]["row"] % size == 0
    shorter = Loader(small, seed=3, phases=phases((step - 1, 64, 12), (9, 128, 6)))
    with pytest.raises(DataError, match=r"the number of rows of phases\.0"):
        DataRecord(shorter).resume(saved, step)
    longer = Loader(small, seed=3, phases=phases((step + 9, 64, 12), (9, 128, 6)))
    assert DataRecord(longer).resume(saved, step) == []


def test_shards_that_were_prepared_again(small: DataConfig, tmp_path: Path) -> None:
    """More text in a source: its documents are in another order, and a new epoch begins."""
    saved = DataRecord(Loader(small, seed=3)).save(7)
    text = Path(small.sources[0].paths[0]).read_text() + '{"text": "One more document."}\n' * 9
    (tmp_path / "text.jsonl").write_text(text)
    source = small.sources[0].model_copy(update={"paths": (str(tmp_path / "text.jsonl"),)})
    update = {"sources": [source.model_dump()], "shards": str(tmp_path / "shards")}
    config = changed(small, **update, accept_change_at=7)
    prepare(config, progress=False)
    with pytest.raises(DataError, match=r"the preparation in data.shards = .*shards is '"):
        DataRecord(Loader(changed(small, **update), seed=3)).resume(saved, 7)
    loader = Loader(config, seed=3)
    lines = DataRecord(loader).resume(saved, 7)
    assert "documents and had" in lines[-1] and "from the beginning of epoch 2" in lines[-1]
    assert {epoch for epoch, _, _ in positions(loader, range(7, 9))} == {1}


def test_settings_that_the_shards_were_not_made_with(config: DataConfig, tmp_path: Path) -> None:
    """A stale preparation is refused where rows are read, and made again by `prepare`."""
    config = changed(config, shards=str(tmp_path / "shards"))
    prepare(config, progress=False)
    source = config.sources[0].model_dump()
    for update, message in (
        ({"validation_fraction": 0.3}, "data.validation_fraction is 0.3, and .* with 0.2; restore"),
        ({"filters": {}}, "data.filters is 'a section', and .* with 'null'"),
        ({"sources": [source | {"domain": "code"}]}, "data.sources.0.domain is 'code', and"),
        ({"sources": [source, source | {"name": "b"}]}, r"data.sources is \['text', 'b'\], and"),
        ({"sources": [source | {"paths": ["a.jsonl"]}]}, r"data.sources.0.paths is \['a.jsonl'"),
    ):
        with pytest.raises(DataError, match=message):
            Loader(changed(config, **update), seed=3)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(source["paths"][0]).read_bytes())
    config = changed(config, sources=[source | {"paths": [str(moved)]}])
    digest = Manifest.load(config.shards).digest
    assert prepare(config, progress=False).digest == digest
    Loader(config, seed=3)
    Loader(changed(config, sources=[source | {"paths": ["moved.jsonl"]}]), seed=3)


def test_a_checkpoint_without_a_record(small: DataConfig) -> None:
    (line,) = DataRecord(Loader(small, seed=3)).resume(None, 7)
    assert "does not record its data" in line


def test_shards_of_other_tools_are_compared_by_their_documents(
    config: DataConfig, tmp_path: Path
) -> None:
    """A manifest that somebody wrote may always have the same digest."""
    documents = [[[5] * length] for length in range(10, 40)]
    first = Loader(shards_of(config, tmp_path / "a", documents), seed=0)
    saved = DataRecord(first).save(1)
    copy = Loader(shards_of(config, tmp_path / "b", documents), seed=0)
    assert DataRecord(copy).resume(saved, 1) == []
    other = Loader(shards_of(config, tmp_path / "c", documents[::-1]), seed=0)
    assert other.manifest.digest == first.manifest.digest
    with pytest.raises(DataError, match=r"the preparation in data\.shards"):
        DataRecord(other).resume(saved, 1)
    before = saved | {"shards": first.manifest.digest}  # as earlier versions saved it
    assert DataRecord(copy).resume(before, 1) == []
