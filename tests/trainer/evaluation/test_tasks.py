"""Tasks that cannot be evaluated: one sentence each, before a model is there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from data import Tokenizer
from tests.trainer.evaluation.tasks import write_tasks
from tests.trainer.tiny import train
from trainer.commands import main
from trainer.config import ConfigError, EvaluationConfig, load_config
from trainer.evaluation import Tasks
from trainer.evaluation.harness import HarnessModel
from trainer.evaluation.scoring import Continuation, Score
from trainer.evaluation.task_files import read_task_file
from trainer.parallel.grid import Grid
from trainer.process.errors import TaskError


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))["choice"]


def variant(choice: Path, *lines: str, without: str = "\0") -> Path:
    """Returns a copy of the task with more lines, and without those that have a text."""
    kept = [line for line in choice.read_text().splitlines() if without not in line]
    path = choice.with_name("variant.yaml")
    path.write_text("\n".join([*kept, *lines]) + "\n")
    return path


def test_data_files_are_beside_the_task_file(choice: Path) -> None:
    files = read_task_file(choice)["dataset_kwargs"]["data_files"]
    assert files == {"test": str(choice.parent / "questions.jsonl")}
    outer = choice.with_name("outer.yaml")
    outer.write_text("include: choice.yaml\ntask: outer\n")
    assert read_task_file(outer)["task"] == "outer"
    assert read_task_file(outer)["dataset_kwargs"]["data_files"] == files


@pytest.mark.parametrize(
    ("lines", "without", "sentence"),
    [
        (["process_docs: !function mine.f"], "\0", r"line \d+: a tag such as !function would run"),
        (["custom_dataset: mine.f"], "\0", "custom_dataset would run code"),
        (["dataset_path: pandas"], "dataset_path", "dataset_path = pandas reads pickles"),
        ([], "dataset_kwargs", "dataset_path = json needs the files of its data"),
        (
            ["dataset_kwargs: {data_files: other.jsonl}"],
            "dataset_kwargs",
            r"its data file .*/other\.jsonl is not there",
        ),
        ([], "task:", "has no key 'task'"),
        (["include: variant.yaml"], "\0", "includes itself"),
        (["a: [b"], "\0", "is no YAML"),
        (["group: g", "task: [{task: a, use_prompt: x}]"], "task:", "has a task in itself"),
    ],
)
def test_task_files_that_are_refused(
    choice: Path, lines: list[str], without: str, sentence: str
) -> None:
    path = variant(choice, *lines, without=without)
    with pytest.raises(TaskError, match=sentence) as caught:
        read_task_file(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_task_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"none\.yaml: this task file is not there"):
        Tasks(EvaluationConfig(tasks=(str(tmp_path / "none.yaml"),)), Grid.single())


def test_two_tasks_of_one_name(choice: Path) -> None:
    paths = (str(choice), str(variant(choice)))
    with pytest.raises(TaskError, match="task: choice names two tasks"):
        Tasks(EvaluationConfig(tasks=paths), Grid.single())


@pytest.mark.parametrize("score", [0.0, float("nan")])
def test_a_context_of_spaces_begins_with_bos(tiny: Path, score: float) -> None:
    """It is empty for lm-eval. A score that is no number is no score."""
    items: list[Continuation] = []

    def call(more: list[Continuation]) -> list[Score]:
        items.extend(more)
        return [Score(score, True)]

    tokenizer = Tokenizer(load_config(tiny).data.tokenizer.path)
    model = HarnessModel(call, tokenizer, max_length=8, bos=False)
    if score != score:
        with pytest.raises(TaskError, match="logits are not finite"):
            model._scores([([], [5])])
        return
    assert model._scores([([], [5])]) == [Score(score, True)]
    assert items == [Continuation([tokenizer.bos_id, 5], 1)]


def test_a_metric_that_would_run_code_of_the_hub(choice: Path) -> None:
    line = "metric_list: [{metric: accuracy, aggregation: mean, higher_is_better: true}]"
    path = variant(choice, line, without="metric_list")
    with pytest.raises(TaskError, match="metric accuracy is none of lm-eval's own"):
        Tasks(EvaluationConfig(tasks=(str(path),)), Grid.single())


def test_templates_cannot_reach_python(choice: Path, tmp_path: Path) -> None:
    """In Jinja's plain environment this one writes a file."""
    target = tmp_path / "written"
    code = "cycler.__init__.__globals__.os.mkdir('" + str(target) + "')"
    path = variant(choice, 'doc_to_text: "{{' + code + '}}"', without="doc_to_text")
    with pytest.raises(TaskError, match=r"cannot be opened: .*unsafe"):
        Tasks(EvaluationConfig(tasks=(str(path),)), Grid.single())
    assert not target.exists()


def test_code_runs_where_it_is_allowed(choice: Path) -> None:
    choice.with_name("mine.py").write_text("def f(docs):\n    return docs.select(range(2))\n")
    path = variant(choice, "process_docs: !function mine.f")
    settings = EvaluationConfig(tasks=(str(path),), task_code=True)
    tasks = Tasks(settings.with_absolute_paths(), Grid.single())
    assert len(tasks._opened["tasks"]["choice"].eval_docs) == 2


@pytest.mark.slow
def test_an_unknown_name_has_the_nearest_one() -> None:
    with pytest.raises(TaskError, match=r"hellaswg: is no task of lm-eval .* is hellaswag, and"):
        Tasks(EvaluationConfig(tasks=("hellaswg",)), Grid.single())


def test_lm_eval_that_is_not_installed(choice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Any = importlib.util.find_spec
    absent = lambda name, *more: None if name == "lm_eval" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(TaskError, match=r"pip install 'v4-pretrain\[eval\]'"):
        Tasks(EvaluationConfig(tasks=(str(choice),)), Grid.single())


def test_a_pipeline_scores_but_does_not_continue(choice: Path) -> None:
    Tasks(EvaluationConfig(tasks=(str(choice),)), Grid.single(), stages=2)
    settings = EvaluationConfig(tasks=(str(choice.with_name("until.yaml")),))
    with pytest.raises(TaskError, match=r"until: .* needs parallel\.pipeline = 1, and it is 2"):
        Tasks(settings, Grid.single(), stages=2)


def test_the_config_refuses_what_cannot_evaluate_tasks(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="tasks are not supported with engine = deepspeed"):
        load_config(tiny, ["evaluation.tasks=[hellaswag]", "engine=deepspeed"])
    paths = load_config(tiny, ["evaluation.tasks=[hellaswag, my.yaml]"]).with_absolute_paths()
    assert paths.evaluation.tasks == ("hellaswag", str(Path("my.yaml").absolute()))


def test_the_command_ends_with_exit_code_2(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train(tiny, tmp_path / "run", "steps=1")
    capsys.readouterr()
    assert main(["eval", str(config.run_dir), f"--tasks={tmp_path}/none.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "none.yaml: this task file is not there" in error
