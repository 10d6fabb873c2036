"""DeepSpeed's ZeRO stages against the native engine, with AdamW on every parameter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import spawn
from tests.trainer.tiny import column, make_tiny, saved_tensors, train
from trainer.config import ConfigError, load_config
from trainer.config_deepspeed import resolve
from trainer.export import export_run
from trainer.hf_folder import read_hf_weights
from trainer.plan import plan

OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
ZERO = {"0": {}, "1": {}, "2": {}, "3": {}, "3_offload": OFFLOAD}
# A larger eps, so that gradients that are nothing but rounding move nothing.
STEPS = ["steps=8", "evaluation.rows=4", "data.micro_rows=1", "optim.adamw.eps=1e-6"]
ADAMW = 'deepspeed={"optimizer": {"type": "AdamW"}'


def block(stage: int, **more) -> list[str]:
    zero = {"stage": stage, **more}
    value = {"optimizer": {"type": "AdamW"}, "zero_optimization": zero}
    return ["engine=deepspeed", f"deepspeed={json.dumps(value)}"]


def runs(rank: int, world_size: int, path: Path, folder: Path, names: list[str]) -> None:
    """The native run in one go, and every ZeRO run stopped after four steps and resumed."""
    train(path, folder / "native", *STEPS)
    for name in names:
        overrides = [*STEPS, *block(int(name[0]), **ZERO[name])]
        train(path, folder / name, *overrides, stop_at=4)
        train(path, folder / name, *overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    path = make_tiny(folder)
    optim = "optim: {matrix_optimizer: adamw, max_skipped_steps: 0, "
    path.write_text(path.read_text().replace("optim: {", optim))
    return folder


@pytest.mark.timeout(400)  # DeepSpeed compiles its shared memory operation once
def test_every_stage_follows_the_native_engine_over_a_resume(folder: Path) -> None:
    spawn(runs, 2, folder / "tiny.yaml", folder, list(ZERO), timeout=390)
    native = saved_tensors(folder / "native/checkpoints/step-00000008")
    exported = export(folder / "native")
    for name in ZERO:
        for number in ("loss", "grad_norm"):
            ours, theirs = (column(folder / run, number) for run in (name, "native"))
            assert len(ours) == 8
            assert ours == pytest.approx(theirs, abs=2e-6), (name, number)
        assert_close(saved_tensors(folder / name / "checkpoints/step-00000008"), native)
        assert_close(export(folder / name), exported)


@pytest.mark.timeout(400)
def test_v4_train(folder: Path, tmp_path: Path) -> None:
    for processes in ("1", "2"):
        command = [sys.executable, "-m", "launch.cli", "train", str(folder / "tiny.yaml")]
        command += ["engine=deepspeed", ADAMW + "}", f"run_dir={tmp_path / processes}", "steps=2"]
        command += ["evaluation.rows=4", f"--nproc-per-node={processes}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=190)
        assert done.returncode == 0, done.stderr
    one, two = (column(tmp_path / processes, "loss") for processes in ("1", "2"))
    assert one == pytest.approx(two, abs=1e-5)


def export(run_dir: Path) -> dict[str, torch.Tensor]:
    config = load_config(run_dir / "config.yaml")
    export_run(config, run_dir / "hf")
    return read_hf_weights(run_dir / "hf")


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ([ADAMW + ', "train_batch_size": 7}'], "deepspeed.train_batch_size = 7"),
        ([ADAMW + ', "train_micro_batch_size_per_gpu": 7}'], "data.micro_rows = 2"),
        ([ADAMW + ', "gradient_clipping": 0.5}'], "deepspeed.gradient_clipping = 0.5"),
        ([ADAMW + ', "bf16": {"enabled": true}}'], "deepspeed.bf16.enabled = True"),
        ([ADAMW + ', "fp16": {"enabled": true}}'], "deepspeed.fp16"),
        ([ADAMW + ', "compression_training": {}}'], "deepspeed.compression_training"),
        ([ADAMW + ', "zero_optimization": 3}'], "deepspeed.zero_optimization should be a map"),
        ([ADAMW + ', "zero_optimization": {"stage": 4}}'], "deepspeed.zero_optimization.stage = 4"),
        (
            [ADAMW + ', "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}'],
            "offload_param.device = 'nvme' should be cpu",
        ),
        (
            [
                ADAMW
                + ', "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}'
            ],
            "deepspeed.zero_optimization.stage = 3; it is 2",
        ),
        (
            [ADAMW + ', "zero_optimization": {"zero_quantized_weights": true}}'],
            "deepspeed.zero_optimization.zero_quantized_weights",
        ),
        (['deepspeed={"optimizer": {"type": "Muon"}}'], "deepspeed.optimizer.type is 'Muon'"),
        (['deepspeed={"optimizer": {"type": "AdamW", "params": {"lr": 1}}}'], "params.lr = 1 "),
        ([], "deepspeed.optimizer.type is missing"),
        ([ADAMW + "}", "precision=bf16"], "precision = bf16"),
        ([ADAMW + "}", "optim.matrix_optimizer=muon"], "optim.matrix_optimizer = muon"),
        ([ADAMW + "}", "optim.max_skipped_steps=3"], "optim.max_skipped_steps = 3"),
        ([ADAMW + "}", "optim.learning_rate_factors={norms: 2.0}"], "optim.learning_rate_factors"),
        ([ADAMW + "}", "parallel.tensor=2"], "parallel.tensor = 2"),
        (["engine=native", "deepspeed={}"], "deepspeed block"),
    ],
)
def test_what_it_cannot_names_the_field(folder: Path, overrides: list[str], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        load_config(folder / "tiny.yaml", ["engine=deepspeed", *overrides])


def test_accumulation_must_fit_the_processes(folder: Path) -> None:
    overrides = ["engine=deepspeed", ADAMW + ', "gradient_accumulation_steps": 3}']
    with pytest.raises(ValueError, match=r"should be 1 for data\.batch_rows = 4"):
        resolve(load_config(folder / "tiny.yaml", overrides), 2)


def test_a_plan_is_refused(folder: Path) -> None:
    config = load_config(folder / "tiny.yaml", ["engine=deepspeed", ADAMW + "}"])
    with pytest.raises(ConfigError, match="engine = deepspeed"):
        list(plan(config, 2))
