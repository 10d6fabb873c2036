"""A resume with another config: refused, kept in its place in the data, or logged."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.trainer.tiny import assert_same_run, column, train
from trainer.__main__ import main
from trainer.config import RunConfig, rule_of
from trainer.config.resume import RULES, changed_fields
from trainer.config.section import section_in

DOCS = Path(__file__).parents[3] / "docs" / "resume.md"


@pytest.fixture(scope="module")
def stopped(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps, stopped after three."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(tiny, folder, "steps=8", stop_at=3)
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.seq_len=40", "data.seq_len is 40 in this run and 48 in the checkpoint of step 3"),
        ("data.packing=concatenate", "data.packing is 'concatenate' in this run and 'best_fit'"),
        ("data.packing_window=50", "data.packing_window is 50 in this run and 100000 in the"),
        ("data.transforms.fim_spm_rate=0.5", "data.transforms.fim_spm_rate is 0.5"),
        ("data.source_weights={words: 1.0}", "data.source_weights is {'words': 1.0} in this run"),
        ("seed=4", "was trained with seed = 3, and this run's config has seed = 4"),
        ("model.swiglu_limit=3.0", "model.swiglu_limit is 10.0 there and 3.0"),
        ("data.sources.0.domain=code", "data.sources.0.domain is 'code', and the shards"),
        ("data.filters={}", "data.filters is 'a section', and the shards"),
        ("data.validation_fraction=0.2", "data.validation_fraction is 0.2, and the shards"),
    ],
)
def test_what_would_train_on_other_rows_is_refused(
    run: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    assert main([str(run), override]) == 2
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if not line.startswith("v4: opening ")]  # on a busy machine
    assert error.startswith("v4: error: ") and message in error
    before.pop(run, None)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_batch_size_keeps_its_place_in_later_resumes_too(
    tiny: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Changed at step 3 and trained on, or stopped once more and resumed: the same run."""
    straight = Path(shutil.copytree(run, tmp_path / "straight"))
    assert main([str(straight), "data.global_batch_size=6"]) == 0
    out = capsys.readouterr().out
    assert "data.global_batch_size is 6 and was 4; reading continues with the row after" in out
    train(tiny, run, "steps=8", "data.global_batch_size=6", stop_at=5)
    assert main([str(run)]) == 0
    assert "data.global_batch_size is 6 and was" not in capsys.readouterr().out.split("resumed")[-1]
    assert_same_run(straight, run, 8)


def test_an_accepted_change_is_logged_and_free_fields_too(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "data.seq_len=40", "data.accept_change_at=2"]) == 2
    words = ["data.seq_len=40", "data.accept_change_at=3", "optim.learning_rate=1e-3", "steps=5"]
    assert main([str(run), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "data.seq_len is 40 and was 48" in lines
    assert any("the rest of a packing window, are left out" in line for line in lines)
    assert "optim.learning_rate is 0.001 and was 0.003 in the checkpoint" in lines
    assert "steps is 5 and was 8 in the checkpoint" in lines
    assert not any("run_dir is" in line for line in lines)
    assert column(run, "step") == [1, 2, 3, 4, 5]
    assert main([str(run), "steps=6"]) == 0  # from config.yaml, which has the new length
    assert column(run, "step")[-1] == 6


def test_rows_that_only_the_validation_text_has_are_logged() -> None:
    saved = {"data": {"seq_len": 48, "micro_batch_size": 1}, "phases": []}
    ours = {"data": {"seq_len": 96, "micro_batch_size": 1}, "phases": []}
    assert changed_fields(saved, ours) == []  # compared with the rows, and refused
    in_phases = [{**config, "phases": [{"seq_len": 48}]} for config in (saved, ours)]
    assert changed_fields(*in_phases) == ["data.seq_len is 96 and was 48 in the checkpoint"]


def test_a_smaller_packing_window_that_is_accepted(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest of the old window, which held all documents, is left out, and that is logged."""
    assert main([str(run), "data.packing_window=50", "data.accept_change_at=3", "steps=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "data.packing_window is 50 and was 100000" in lines
    assert any("the rest of a packing window, are left out" in line for line in lines)
    assert column(run, "step") == [1, 2, 3, 4, 5]
    assert main([str(run), "data.packing_window=60", "steps=6"]) == 2


def test_a_checkpoint_of_before_opens(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the record of the data, nothing can be compared, and that is logged."""
    from trainer.checkpoint import manifest

    folder = run / "checkpoints/step-00000003"
    state = json.loads((folder / "state.json").read_text())
    del state["data"], state["config"]
    (folder / "state.json").write_text(json.dumps(state))
    files, _ = manifest.read(folder)
    manifest.write(folder, files | manifest.record(folder, ["state.json"]))
    assert main([str(run), "steps=4"]) == 0
    assert "the checkpoint does not record its data" in capsys.readouterr().out


def leaves(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Dotted keys of all fields that are no section."""
    for name, field in model.model_fields.items():
        section = section_in(field.annotation)
        if section is None:
            yield f"{above}{name}"
        else:
            yield from leaves(section, f"{above}{name}.")


def test_every_field_has_a_rule_and_every_rule_a_field() -> None:
    """A new field of `data`, `phases` or the top needs a decision; other sections have theirs."""
    keys = list(leaves(RunConfig))
    for key in keys:
        rule_of(key)
        section, _, rest = key.partition(".")
        if section == "data" or not rest:
            assert any(key == rule or key.startswith(f"{rule}.") for rule in RULES), key
    for rule in RULES:
        assert any(key == rule or key.startswith(f"{rule}.") for key in keys), rule


def test_the_table_in_the_docs() -> None:
    text = DOCS.read_text()
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    written = {key.strip(" `"): rule.strip() for keys, rule in rows for key in keys.split(",")}
    assert written == {key: rule.value for key, rule in RULES.items()}


def test_another_optimizer_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its states are not in the checkpoint."""
    assert main([str(run), "optim.matrix_optimizer=adamw"]) == 2
    error = capsys.readouterr().err
    assert (
        "was trained with optim.matrix_optimizer = 'muon', and this run's config has 'adamw'"
        in error
    )
    assert error.count("\n") == 1
