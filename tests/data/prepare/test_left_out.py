"""Work items that fail in every attempt: the run ends, or continues without them."""

from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from data.errors import DataError
from data.manifest import Manifest
from data.prepare import filter_pass, write_part
from data.prepare.run import prepare
from data.prepare.work_item import WorkItem
from tests.data.prepare.engines.corpora import contents, elsewhere, some_parts


def break_item(patch: pytest.MonkeyPatch, work: str, name: str) -> None:
    """The file system fails whenever `work` writes the results of a work item."""
    module = filter_pass if work == "filter_item" else write_part
    plain = getattr(module, work)

    def fail(item: WorkItem, *arguments: Any) -> Any:
        if item.name == name:
            raise OSError(5, "Input/output error")
        return plain(item, *arguments)

    patch.setattr(module, work, fail)


@pytest.fixture
def whole(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """A corpus of six work items, and its complete shards."""
    whole = some_parts(config, tmp_path, monkeypatch)
    prepare(whole, progress=False)
    return whole


def test_the_run_ends_and_what_is_done_stays(
    whole: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = elsewhere(whole, "other")
    with monkeypatch.context() as patch:
        break_item(patch, "write_part", "code-00003")
        with pytest.raises(DataError, match=r"code-00003: Input/output error, in 3 attempts; the"):
            prepare(other, progress=False)
    assert capsys.readouterr().err.count("v4: code-00003 failed (") == 2
    done = list(Path(other.shards).glob(".unfinished-*/code-0000?.json"))
    assert len(done) == 5
    times = [path.stat().st_ino for path in done]
    prepare(other, progress=False)
    assert contents(other) == contents(whole)
    published = Path(other.shards) / Manifest.load(other.shards).folder
    assert times == [(published / path.name).stat().st_ino for path in done]


def test_parts_of_other_verdicts_are_made_again(
    whole: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that leaves out a work item is killed while it tokenises; the next one has it."""
    whole = elsewhere(whole, "whole", filters={"min_characters": 0, "quality_rules": []})
    complete = prepare(whole, progress=False)
    assert any("exact" in dropped for dropped in complete.dropped.values()), "others repeat it"
    other = elsewhere(whole, "other", failed_tasks="quarantine", task_attempts=1)
    plain = write_part.write_part

    def stop(item: WorkItem, *arguments: Any) -> Any:
        if item.name == "code-00003":
            raise KeyboardInterrupt
        return plain(item, *arguments)

    with monkeypatch.context() as patch:
        break_item(patch, "filter_item", "code-00000")
        patch.setattr(write_part, "write_part", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(other, progress=False)
    assert list(Path(other.shards).glob(".unfinished-*/code-0000?.json"))
    assert prepare(other, progress=False) == complete
    assert contents(other) == contents(whole)


@pytest.mark.parametrize(
    ("filters", "work"), [(None, "write_part"), ({}, "write_part"), ({}, "filter_item")]
)
def test_shards_without_a_work_item(
    whole: DataConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    filters: object,
    work: str,
) -> None:
    """They have a digest of their own, and are made complete from what was done."""
    whole = elsewhere(whole, "whole", filters=filters)
    complete = prepare(whole, progress=False)
    other = elsewhere(whole, "other", failed_tasks="quarantine", task_attempts=2)
    with monkeypatch.context() as patch:
        break_item(patch, work, "code-00003")
        manifest = prepare(other, progress=False)
    assert "v4: code-00003 failed (Input/output error) and is left out" in capsys.readouterr().err
    assert manifest.left_out == {"code-00003": "Input/output error"}
    assert manifest.digest != complete.digest and manifest.complete_digest == complete.digest
    assert "code-00003 is left out: Input/output error (" in "".join(manifest.skipped())
    assert Manifest.load(other.shards) == manifest
    assert not any("00003" in shard.name for shard in manifest.shards)
    assert len({shard.name for shard in manifest.shards}) >= 5
    with pytest.raises(DataError, match=r"holds shards without code-00003, which failed when"):
        prepare(other, progress=False)
    pattern = "*.filter.json" if filters is not None else "code-0000?.json"
    done = list(Path(other.shards).glob(f".unfinished-*/{pattern}"))
    assert len(done) == 5 + (work == "write_part" and filters is not None)
    assert prepare(other, progress=False, overwrite=True) == complete
    assert contents(other) == contents(whole)
