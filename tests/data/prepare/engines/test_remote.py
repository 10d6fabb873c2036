"""What every engine on other hosts does with jobs, reports and failures, in this process."""

from collections import deque
from collections.abc import Iterable
from pathlib import Path

import pytest

from data.config import DataConfig
from data.errors import DataError
from data.prepare.corpus import Corpus
from data.prepare.dedup import stages
from data.prepare.engines import kinds
from data.prepare.engines.remote import NOBODYS_FAULT, Job, RemoteEngine, open_preparation, run_job
from data.prepare.engines.worker import Failure, Report
from data.prepare.filter_pass import FilterTask
from data.prepare.task import Preparation, Task
from data.prepare.work_item import work_items
from data.prepare.write_part import WritePartTask
from data.text import Tokenizer
from tests.data.prepare.engines.corpora import PROCESS_BYTES, some_parts


class Engine(RemoteEngine):
    """Runs jobs in this process; `ends` are how the first ones end instead."""

    def __init__(self, preparation: Preparation, ends: Iterable[tuple[int, str]] = ()) -> None:
        super().__init__(preparation, False)
        self.ends, self.jobs = deque(ends), 0

    def _submit(self, waiting: deque[Task], running: int) -> Iterable[Job]:
        job = self._job(list(waiting))
        waiting.clear()
        self.jobs += 1
        return [job]

    def _wait(self, running: dict[str, Job]) -> dict[str, str]:
        (job,) = running.values()
        if not self.ends:
            run_job(self.files, job.name, open_preparation(self.files))
            return {job.name: "COMPLETED"}
        position, end = self.ends.popleft()
        if position >= 0:  # it ran those before it
            opened = open_preparation(self.files)
            for task in job.tasks[:position]:
                task.run(opened, lambda _: None)
            self._report(job.name).write_text(Report(position=position).model_dump_json())
        return {job.name: end}


@pytest.fixture
def preparation(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Preparation:
    some = some_parts(config, tmp_path, monkeypatch)
    folder = tmp_path / "shards" / ".unfinished-0"
    folder.mkdir(parents=True)
    items = tuple(work_items(Corpus(some.sources[0])))
    return Preparation(some, folder, items, lambda: Tokenizer(some.tokenizer.path))


def tasks_of(preparation: Preparation) -> list[Task]:
    return [
        FilterTask(name=item.name, size=PROCESS_BYTES, group="code", item=i)
        for i, item in enumerate(preparation.items)
    ]


def test_a_job_that_dies_costs_an_attempt_at_the_task_that_it_ran(
    preparation: Preparation, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Engine(preparation, [(2, "died"), (-1, "never began"), (0, NOBODYS_FAULT)])
    assert engine.run(tasks_of(preparation), "filter") == {}
    assert engine.jobs == 4
    lines = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert lines == [
        "v4: code-00002 failed (died), attempt 1 of 3",
        "v4: code-00002 failed (never began), attempt 2 of 3",
    ]
    assert all(task.is_done(preparation.folder) for task in tasks_of(preparation))


def test_a_job_that_dies_each_time(preparation: Preparation) -> None:
    engine = Engine(preparation, [(1, "died"), (0, "died"), (0, "died")])
    with pytest.raises(DataError, match=r"code-00001: died, in 3 attempts \(logged in .*logs\)"):
        engine.run(tasks_of(preparation), "filter")
    assert (preparation.folder / "code-00000.filter.json").exists()


def test_failures_of_tasks(preparation: Preparation, capsys: pytest.CaptureFixture[str]) -> None:
    """A file system's error is attempted again; bad input ends the work at once."""
    blocked = preparation.folder / "code-00001.filter.bin" / "x"
    blocked.mkdir(parents=True)
    engine = Engine(preparation)
    with pytest.raises(OSError, match=r"code-00001: .*, in 3 attempts"):
        engine.run(tasks_of(preparation), "filter")
    assert engine.jobs == 3
    assert len(list(preparation.folder.glob("*.filter.json"))) == 5
    log = (preparation.folder / "logs" / "code-00001.log").read_text()
    assert (
        3
        == log.count(": begins\n")
        == log.count("failed after")
        == log.count("\nIsADirectoryError")
    )
    Path(str(preparation.items[1].pieces[0].path)).write_text('{"text": 3}\n')
    blocked.rmdir()
    blocked.parent.rmdir()
    with pytest.raises(DataError, match=r"line 1 of .*1\.jsonl has a number instead of a string"):
        engine.run(tasks_of(preparation), "filter")
    assert engine.jobs == 4


def test_errors_travel(preparation: Preparation) -> None:
    def raised(error: Exception, cause: Exception | None = None) -> Exception:
        error.__cause__ = cause
        return Failure.of(0, tasks_of(preparation)[0], error).error()

    full = raised(OSError(28, "No space left on device", "file"))
    assert isinstance(full, OSError) and (full.errno, full.strerror) == (
        28,
        "No space left on device",
    )
    unread = raised(DataError("cannot read x."), OSError(5, "Input/output error"))
    assert isinstance(unread, DataError) and isinstance(unread.__cause__, OSError)
    bad = raised(DataError("line 1 is bad."), UnicodeError())
    assert isinstance(bad, DataError) and bad.__cause__ is None and str(bad) == "line 1 is bad."
    mistake = raised(KeyError("x"))
    assert str(mistake) == "code-00000 failed with KeyError: 'x'"


def test_tasks_and_what_they_share_travel_as_json(preparation: Preparation, tmp_path: Path) -> None:
    engine = Engine(preparation)
    engine.run(tasks_of(preparation), "filter")
    filters = preparation.config.filters
    assert filters is not None
    tasks = tasks_of(preparation)
    for stage in stages(preparation.items, preparation.folder, filters, 10**9):
        tasks += stage
        for task in stage:
            task.run(preparation, lambda _: None)
    tasks.append(WritePartTask(name="code-00000", size=1, item=0))
    kinds.write_tasks(tmp_path / "tasks.json", tasks)
    assert kinds.read_tasks(tmp_path / "tasks.json") == tasks
    opened = open_preparation(engine.files)
    assert (opened.config, opened.items) == (preparation.config, preparation.items)
    assert opened.folder == preparation.folder and opened.tokenizer is opened.tokenizer
    (tmp_path / "tasks.json").write_text('[{"kind": "os.system", "name": "x", "size": 1}]')
    with pytest.raises(DataError, match=r"tasks\.json is damaged"):
        kinds.read_tasks(tmp_path / "tasks.json")


def test_the_folder_of_unfinished_shards(config: DataConfig) -> None:
    """What is made for a URL needs a folder that all hosts share."""

    def changed(**fields: object) -> DataConfig:
        return DataConfig.model_validate(config.model_dump() | fields)

    url = {"shards": "s3://bucket/shards"}
    with pytest.raises(ValueError, match=r"engine = ray needs `work_folder`, a folder that all"):
        changed(engine="ray", **url)
    with pytest.raises(ValueError, match=r"work_folder is for shards at a URL"):
        changed(work_folder="/shared")
    assert changed(engine="ray", work_folder="/shared", **url).work_folder == "/shared"
