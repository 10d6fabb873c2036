"""A quantised run: resumed, exported, imported, refused."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest

from model import qat as quantised_module
from model.kernels.mxfp4 import quantise_dequantise
from model.qat import fake_quantised
from tests.trainer.tiny import assert_same_run, column, train
from trainer.commands import main
from trainer.config import ConfigError, RunConfig, load_config
from trainer.engine import NativeEngine
from trainer.evaluation import Validation
from trainer.export.export import export_run
from trainer.export.import_run import import_hf_folder, open_run
from trainer.metrics.jsonl import read_metrics
from trainer.parallel.degrees import Degrees
from trainer.parallel.grid import Grid
from trainer.planning.dry_run import count_memory
from trainer.planning.static_memory import memory_parts

SIZES = [
    "model.hidden_size=32",
    "model.moe_intermediate_size=64",
    "model.index_head_dim=32",
    "model.initializer_range=0.2",
]
DEEPSPEED = [
    "optim.matrix_optimizer=adamw",
    "optim.max_skipped_steps=0",
    "deepspeed.optimizer.type=AdamW",
]
PHASE = "phases=[{until_tokens: 768, attention: dense, quantisation: mxfp4}]"
QAT = [*SIZES, "quantisation=mxfp4"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_four_steps_are_two_and_two(tiny: Path, tmp_path: Path, precision: str) -> None:
    common = ["steps=4", f"precision={precision}"]
    train(tiny, tmp_path / "straight", *QAT, *common)
    train(tiny, tmp_path / "halves", *QAT, *common, stop_at=2)
    train(tiny, tmp_path / "halves", *QAT, *common)
    assert_same_run(tmp_path / "straight", tmp_path / "halves", 4)
    train(tiny, tmp_path / "plain", *SIZES, *common)
    assert column(tmp_path / "plain", "loss") != column(tmp_path / "straight", "loss")


def test_weights_are_rounded_once_a_step(tiny: Path, tmp_path: Path) -> None:
    with patch.object(
        quantised_module, "quantise_dequantise", wraps=quantise_dequantise
    ) as counted:
        train(
            tiny,
            tmp_path / "run",
            *QAT,
            "steps=2",
            "data.micro_batch_size=1",
            "evaluation.max_rows=1",
        )
    # With the MTP block; two steps, the look at every layer after the last, and an evaluation.
    layers, passes = 3 + 1, 2 + 1 + 1
    assert counted.call_count == 3 * layers * passes


def validation(config: RunConfig, experts_only: bool = False) -> float:
    """Validation loss of the newest checkpoint; or with experts as they are saved, and only the
    index in MXFP4."""
    grid = Grid.single()
    local, _ = open_run(config, grid)
    engine = NativeEngine(local, grid)
    if not experts_only:
        engine.quantisation = config.quantisation
        return Validation(config, grid).evaluate(engine).loss
    with fake_quantised(local.model):
        for block in [*local.model.layers, *local.model.mtp]:
            block.ffn.experts.rounded = None
        return Validation(config, grid).evaluate(engine).loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_packed_export_has_exactly_the_loss_of_training(
    tiny: Path, tmp_path: Path, precision: str
) -> None:
    common = [*QAT, f"precision={precision}", "evaluation.max_rows=null"]
    config = train(tiny, tmp_path / "run", *common)
    trained = read_metrics(config.run_dir / "metrics.jsonl")[-1]["validation_loss"]
    assert validation(config) == trained
    assert validation(config, experts_only=True) != trained, "masters are not rounded"
    export_run(config, tmp_path / "packed", weights="mxfp4_experts")
    again = load_config(tiny, [f"run_dir={tmp_path / 'again'}", *common])
    import_hf_folder(again, tmp_path / "packed")
    assert validation(again, experts_only=True) == trained, "the unpacked numbers as they are"
    assert validation(again) == trained, "rounding them once more changes nothing"


def test_a_phase_is_quantised_alone(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def phases(kind: str) -> list[str]:
        """Two steps of 4 rows of 48, and two more."""
        later = f"{{until_tokens: 768, attention: dense, quantisation: {kind}}}"
        common = [*SIZES, "steps=4", "evaluation.max_rows=null"]
        return [*common, f"phases=[{{until_tokens: 384, attention: dense}}, {later}]"]

    plain, config = (train(tiny, tmp_path / kind, *phases(kind)) for kind in ("none", "mxfp4"))
    ours, theirs = column(config.run_dir, "loss"), column(plain.run_dir, "loss")
    assert ours[:2] == theirs[:2] and ours[2] != theirs[2]
    train(tiny, tmp_path / "halves", *phases("mxfp4"), stop_at=2)
    train(tiny, tmp_path / "halves", *phases("mxfp4"))
    assert_same_run(config.run_dir, tmp_path / "halves", 4)
    capsys.readouterr()
    assert main(["eval", str(config.run_dir)]) == 0
    actual = json.loads(capsys.readouterr().out.splitlines()[-1])["validation_loss"]
    assert actual == read_metrics(config.run_dir / "metrics.jsonl")[-1]["validation_loss"]
    assert actual != read_metrics(plain.run_dir / "metrics.jsonl")[-1]["validation_loss"]


def test_memory_counts_the_rounded_experts(tiny: Path, tmp_path: Path) -> None:
    config = load_config(tiny, [*QAT, "precision=bf16"])
    parts = memory_parts(config, Degrees(1))
    assert parts["quantised experts"] == 2 * 4 * 4 * 3 * 64 * 32
    assert count_memory(config, 1).fullest.resident == parts
    plain = memory_parts(load_config(tiny, [*SIZES, "precision=bf16"]), Degrees(1))
    assert parts == plain | {"quantised experts": parts["quantised experts"]}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.hidden_size=40"], r"model\.hidden_size = 40 .* a multiple of 32 .*quantisation"),
        (["model.moe_intermediate_size=48"], r"model\.moe_intermediate_size = 48 .*multiple of 32"),
        (["parallel.expert_tensor=4"], r"parallel\.expert_tensor = 4 .* it should divide 2"),
        (
            ["model.index_head_dim=16"],
            r"model\.index_head_dim = 16 .* power of two and at least 32",
        ),
        (
            ["model.index_head_dim=96"],
            r"model\.index_head_dim = 96 .* power of two and at least 32",
        ),
        (
            ["engine=deepspeed", *DEEPSPEED],
            "quantisation = mxfp4 is not supported with engine = deepspeed",
        ),
        (["quantisation=fp4"], "quantisation = 'fp4'"),
        (
            ["quantisation=none", "model.hidden_size=40", "steps=4", PHASE],
            r"model\.hidden_size = 40 .* 32 for phases\.0\.quantisation = mxfp4",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    tiny: Path, overrides: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(tiny, [*QAT, *overrides])
    assert main(["plan", str(tiny), *QAT, *overrides]) == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1


def test_without_csa_layers_the_index_may_have_any_size(tiny: Path) -> None:
    load_config(tiny, [*QAT, "model.index_head_dim=8", "model.layer_types=[window, hca, hca]"])
