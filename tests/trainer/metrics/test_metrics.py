"""metrics.jsonl, wandb, the progress line, the evaluation and the report."""

import json
import math
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from data import Loader
from data.errors import DataError
from tests.full_disk import full_disk
from tests.trainer.tiny import column, steps_in_file, train
from trainer.config import RunConfig, load_config
from trainer.engine import NativeEngine
from trainer.evaluation import Validation
from trainer.export.import_run import open_run
from trainer.metrics.jsonl import MetricsFile, read_metrics
from trainer.metrics.progress import Progress, describe
from trainer.parallel.grid import Grid
from trainer.process.errors import DivergedError, ReportError
from trainer.report import write_report
from trainer.report.plots import CHARTS, MAX_POINTS, lines_of, picture, points, smooth
from trainer.trainer import Trainer

COLUMNS = {
    "step",
    "tokens",
    "epochs",
    "loss",
    "lm_loss",
    "mtp_loss",
    "balance_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "tflops_per_second",
    "expert_load_max",
    "expert_load_min",
}


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return train(
        tiny,
        tmp_path_factory.mktemp("run"),
        "steps=6",
        "evaluation={every: 2, max_rows: null}",
        "metrics.peak_tflops=0.1",
        "optim.schedule={warmup_steps: 2, decay_start: 4}",
    )


def test_every_step_has_all_numbers(run: RunConfig) -> None:
    records = read_metrics(run.run_dir / "metrics.jsonl")
    assert all(record.keys() >= COLUMNS | {"mfu"} for record in records)
    assert [record["step"] for record in records if "validation_loss" in record] == [2, 4, 6]
    last = records[-1]
    assert last["mfu"] == pytest.approx(last["tflops_per_second"] / 0.1)
    assert 0 < last["expert_load_min"] <= 1 <= last["expert_load_max"]


def test_every_step_has_the_epochs_of_each_source(run: RunConfig) -> None:
    records = read_metrics(run.run_dir / "metrics.jsonl")
    loader = Loader(run.data, run.seed, phases=[phase.rows for phase in run.recipe.phases])
    sizes = {source.name: source.positions for source in loader.sources}
    assert [set(record["epochs"]) for record in records] == [set(sizes)] * 6
    read = sum(records[-1]["epochs"][name] * size for name, size in sizes.items())
    assert read == pytest.approx(records[-1]["tokens"], rel=0.05)


def test_the_mtp_weight_falls_with_the_learning_rate(run: RunConfig) -> None:
    for record in read_metrics(run.run_dir / "metrics.jsonl"):
        weight = 0.1 if record["step"] > 4 else 0.3
        parts = record["lm_loss"] + weight * record["mtp_loss"] + record["balance_loss"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5)


def test_validation_loss_is_the_mean_over_all_targets(run: RunConfig) -> None:
    local, _ = open_run(run, Grid.single())
    engine = NativeEngine(local, Grid.single())
    validation = Validation(run, Grid.single())
    result = validation.evaluate(engine)
    total = count = 0.0
    for step in range(validation.loader.num_steps):
        for batch in validation.loader.at(step):
            for tokens, targets, lengths in zip(
                batch.tokens, batch.targets, batch.lengths, strict=True
            ):
                start = 0
                for length in lengths:
                    span = slice(start, start + length)
                    with torch.no_grad():
                        logits = local.model(tokens[None, span]).logits[0]
                    expected = targets[span]
                    losses = torch.nn.functional.cross_entropy(logits, expected, reduction="none")
                    total += float(losses.double().sum())
                    count += length
                    start += length
    assert result.tokens == count == validation.loader.num_targets
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.loss == pytest.approx(
        read_metrics(run.run_dir / "metrics.jsonl")[-1]["validation_loss"], rel=1e-6
    )
    manifest = validation.loader.manifest
    text = sum(shard.bytes for shard in manifest.shards if shard.split == "validation")
    assert result.bytes == text, "no first token of a document is text"
    bits = result.loss * count / text / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits)
    last = read_metrics(run.run_dir / "metrics.jsonl")[-1]
    assert last["validation_bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    one_row = run.evaluation.model_copy(update={"max_rows": 1})
    less = run.model_copy(update={"evaluation": one_row})
    assert Validation(less, Grid.single()).evaluate(engine).tokens < count


def test_lines_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write({"step": 1})
    with full_disk(17):
        file.write({"step": 2, "x": "y" * 100})
        assert path.read_text() == '{"step": 1}\n'
    file.write({"step": 3})
    file.close()
    assert steps_in_file(tmp_path) == [1, 2, 3]


def test_a_full_disk_is_logged_once_and_what_is_lost_at_the_end(tmp_path: Path) -> None:
    lines: list[str] = []
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, lines.append)
    with full_disk(17):
        for step in range(1, 4):
            file.write({"step": step, "x": "y" * 100})
    assert lines == [f"warning: {path} cannot be written: File too large; its lines wait in memory"]
    file.write({"step": 4})
    assert lines[1:] == [f"{path} can be written again, and is complete"]
    with full_disk(17):
        file.write({"step": 5})
        file.write({"step": 6})
        file.close()
    last = f"warning: {path} lacks the last 2 lines, which cannot be written: File too large"
    assert lines[-1] == last
    assert steps_in_file(tmp_path) == [1, 2, 3, 4]


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    """Also in a file of before, which a resume writes again."""
    nan, infinity = float("nan"), float("inf")
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "layers": {"sink_max": [NaN, 1.0]}}\n')
    file = MetricsFile(path, 1)
    file.write({"step": 2, "loss": nan, "layers": {"sink_max": [infinity, 2.0, None]}})
    file.write({"step": 2, "event": {"scores": [[-infinity], "NaN"]}})
    file.close()
    assert path.read_text().splitlines() == [
        '{"step": 1, "layers": {"sink_max": [null, 1.0]}}',
        '{"step": 2, "loss": null, "layers": {"sink_max": [null, 2.0, null]}}',
        '{"step": 2, "event": {"scores": [[null], "NaN"]}}',
    ]


def test_the_losses_of_the_progress_line_are_the_same_quantity() -> None:
    record = {"step": 1, "loss": 3.0, "lm_loss": 2.0, "tokens_per_second": 1500.0}
    left = timedelta(seconds=9)
    line = describe(record | {"validation_loss": 2.5}, left)
    assert line == "loss 2.0000  validation 2.5000  1 500 tokens/s  ETA 0:00:09"
    nan = float("nan")
    line = describe(record | {"lm_loss": nan, "validation_loss": nan}, left)
    assert line.startswith("loss not finite  validation not finite  1 500")
    skipped = describe(record | {"lm_loss": nan, "tokens_per_second": 0.0}, left)
    assert skipped.startswith("batch skipped  0")


def test_a_report_of_steps_that_are_not_finite(run: RunConfig, tmp_path: Path) -> None:
    copy = load_config(run.run_dir / "config.yaml", [f"run_dir={tmp_path}"])
    records = read_metrics(run.run_dir / "metrics.jsonl")
    last = dict(records[-1])
    for name in ("loss", "lm_loss", "validation_loss", "grad_norm"):
        last[name] = float("nan")
    last["groups"] = {
        name: dict.fromkeys(values, float("nan")) for name, values in last["groups"].items()
    }
    last["layers"] = {
        name: [float("nan") for _ in values] for name, values in last["layers"].items()
    }
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for record in (*records[:-1], last):
        file.write(record)
    file.close()
    html = write_report(copy).read_text(encoding="utf-8")
    assert "<b>not finite</b><span>last training loss</span>" in html
    validation = f"<b>{records[3]['validation_loss']:.4f}</b><span>last validation loss</span>"
    assert validation in html


def test_opening_keeps_steps_up_to_the_resumed_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {s}, "n": {n}}}\n' for n, s in enumerate([1, 2, 2, 3])))
    MetricsFile(path, 2).close()
    assert read_metrics(path) == [{"step": 1, "n": 0}, {"step": 2, "n": 2}]


def test_a_full_disk_at_a_resume_keeps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    content = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 9))
    path.write_text(content)
    with full_disk(17), pytest.raises(DataError, match="File too large"):
        MetricsFile(path, last_step=8)
    assert path.read_text() == content and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_divergence_stops_before_the_update(tiny: Path, tmp_path: Path) -> None:
    settings = [f"run_dir={tmp_path}", "optim.max_skipped_steps=0"]
    trainer = Trainer(load_config(tiny, settings), Grid.single())
    with torch.no_grad():
        trainer.model.norm.weight[0] = float("inf")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(DivergedError, match=r"step 1: the loss is nan.*no checkpoint yet"):
        trainer.run()
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_flops_count_samples_not_rows(tiny: Path, tmp_path: Path) -> None:
    from model.flops import training_flops

    trainer = Trainer(load_config(tiny, [f"run_dir={tmp_path}"]), Grid.single())
    batches = trainer.loader.at(0)
    losses = trainer.engine.forward_backward(batches)
    lengths = [sample for batch in batches for row in batch.lengths for sample in row]
    assert losses.flops == pytest.approx(training_flops(trainer.config.model, lengths))
    assert losses.counts.routed == sum(lengths)


def test_wandb_offline_keeps_its_id_and_no_key(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    for steps in (1, 2):
        train(tiny, tmp_path, f"steps={steps}", "metrics.wandb.mode=offline")
    run_id = (tmp_path / "wandb/run-id").read_text().splitlines()[0]
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    # Two runs in one second share a time, and wandb then numbers the second folder's name.
    logs = [path for path in files if path.suffix == ".wandb"]
    assert len(logs) == 2 and all(path.name == f"run-{run_id}.wandb" for path in logs)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and key in _text(path)]


def _text(path: Path) -> str:
    return path.read_bytes().decode("latin-1")


def test_plain_progress_lines(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, tmp_path, "steps=5", "metrics.every=2")
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(0).startswith("kernels: attention, indexer, indexer_loss, compressor")
    assert re.match(r"memory: peak [\d.,]+ [MG]iB", lines.pop())
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    assert re.search(
        r"loss \d+\.\d{4}  validation \d+\.\d{4}  [\d ]+ tokens/s  ETA 0:00:0", lines[-1]
    )


def test_a_log_that_cannot_be_written_does_not_end_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "log").open("w") as log, full_disk(10):
        monkeypatch.setattr("sys.stdout", log)
        progress = Progress(2, 0, 1)
        for step in (1, 2):
            progress.log("a line that is longer than the disk")
            progress.update({"step": step, "lm_loss": 1.0, "tokens_per_second": 1.0})
        progress.close()
        monkeypatch.undo()
        assert (tmp_path / "log").stat().st_size <= 10
    assert "step 2/2  loss 1.0000" in (tmp_path / "log").read_text(), "once there is room"


def test_the_time_left_counts_steps_that_came_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds a step, also when a run rolls back to before its start."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("trainer.metrics.progress.time.monotonic", lambda: next(clock))
    progress = Progress(20, 10, 1)
    for step in (11, 12, 9, 10, 11):
        progress.update({"step": step, "lm_loss": 1.0, "tokens_per_second": 1.0})
    left = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert left == ["0:01:30", "0:01:20", "0:01:50", "0:01:40", "0:01:30"]


def test_the_report_has_every_curve_and_needs_nothing_else(run: RunConfig) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    for chart in CHARTS:  # a run without phases trains no indexer
        assert (f'aria-label="{chart.title}"' in html) == ("Indexer" not in chart.title)
    assert html.count("<svg") == len(CHARTS) + 1, "two maps: SwiGLU's clamp never acts"
    for label in ("training", "validation", "most loaded expert", "least loaded expert"):
        assert f">{label}</text>" in html
    assert f"{column(run.run_dir, 'tokens')[-1]:,}" in html
    links = re.findall(r'(?:src|href)="([^"#]+)', html)
    assert not [link for link in links if not link.startswith(("#", "data:image/png;base64,"))]
    assert "@import" not in html and "url(http" not in html and "<script" not in html


def test_a_run_without_metrics_has_no_report(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="nothing to draw"):
        write_report(load_config(tiny, [f"run_dir={tmp_path}"]))


def test_damaged_lines_do_not_end_the_report(run: RunConfig, tmp_path: Path) -> None:
    copy = run.model_copy(update={"run_dir": tmp_path})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ReportError, match="nothing to draw"):
        write_report(copy)
    more = (
        '{"step": 7}',
        '{"step": 1, "event": {}}',
        '{"step": 2, "layers": 3}',
        '{"step": 3, "loss": ""}',
    )
    content = (run.run_dir / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(content + "\n".join(more) + "\n")
    assert f"step {column(run.run_dir, 'step')[-1]} of" in write_report(copy).read_text("utf-8")


def test_names_of_phases_do_not_overlap() -> None:
    assert lines_of([0, 35, 84, 123, 147], 177) == [0, 0, 0, 0, 0]
    assert lines_of([0, 2002, 2051, 2090], 2100) == [0, 0, 1, 2]
    assert lines_of([0, 5, 10, 15, 24], 100) == [0, 1, 0, 1, 0]
    wide = next(chart for chart in CHARTS if chart.wide)
    marks = [(0, "dense"), (90, "warmup"), (95, "sparse")]
    (axes,) = picture(wide, [{"step": 1}, {"step": 100}], marks).axes
    dense, warmup, sparse = (text.get_position()[1] for text in axes.texts)
    assert dense == warmup < sparse


def test_points_and_smoothing() -> None:
    records = [{"step": s, "x": float(s)} for s in range(1, 3001)]
    steps, values = points(records, "x")
    assert len(steps) <= MAX_POINTS and steps[-1] == 3000
    assert sum(values) / len(values) == pytest.approx(1500.5, rel=1e-3)
    assert smooth([0.0, 3.0, 0.0, 3.0], 1) == [0.0, 1.0, 2.0, 3.0]
    assert json.dumps(points([], "x")) == "[[], []]"
