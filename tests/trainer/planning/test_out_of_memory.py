"""The message at the end of a run whose device is full."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from trainer.config import load_config
from trainer.parallel.grid import Grid
from trainer.planning.out_of_memory import advise_on_out_of_memory, candidates, compare, estimate
from trainer.process.errors import run_or_explain
from trainer.process.exit_codes import USER_ERROR

CONFIG = Path(__file__).parents[3] / "configs" / "debug.yaml"


def fail(*overrides: str) -> None:
    config = load_config(CONFIG, overrides)
    with advise_on_out_of_memory(config, Grid.single(torch.device("cpu"))):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a")


def test_three_settings_with_estimates_the_best_first(capsys):
    assert run_or_explain(lambda: fail("data.micro_batch_size=8")) == USER_ERROR
    output = capsys.readouterr().err
    start = "v4: error: cpu: CUDA out of memory; Tried to allocate 2.00 GiB; the run takes about "
    assert output.startswith(start)
    assert len(output.strip().splitlines()) == 1
    settings = re.findall(r"([a-z_.]+)=\S+ \(about ([\d.]+) MiB\)", output)
    sizes = [float(size) for _, size in settings]
    now = float(re.search(r"takes about ([\d.]+) MiB", output).group(1))
    assert len(settings) == 3 and sizes == sorted(sizes) and sizes[-1] < now
    assert {name for name, _ in settings} <= {
        "data.micro_batch_size",
        "data.seq_len",
        "parallel.recompute",
    }


def test_what_is_set_already_is_not_advised():
    overrides = ["data.micro_batch_size=1", "parallel.recompute=[block]"]
    assert candidates(load_config(CONFIG, overrides)) == [
        "parallel.offload=[block]",
        "data.seq_len=256",
    ]
    config = load_config(CONFIG, [*overrides, "parallel.offload=[block]"])
    assert candidates(config) == ["data.seq_len=256"]


def test_a_phase_s_own_row_length_is_advised():
    phases = "phases=[{until_tokens: 1e6, attention: dense, seq_len: 1024}]"
    config = load_config(CONFIG, [phases, "steps=0", "data.micro_batch_size=1"])
    assert candidates(config)[-1] == "phases.0.seq_len=512"


def test_a_phase_s_own_microbatch_is_advised():
    """That of `data` does not count in the phase with the most memory."""
    phases = (
        "phases=[{until_tokens: 1e6, attention: dense}, {until_tokens: 2e6, attention: dense, "
        "micro_batch_size: 4}]"
    )
    config = load_config(CONFIG, [phases, "steps=0", "data.micro_batch_size=2"])
    assert candidates(config)[0] == "phases.1.micro_batch_size=2"
    smaller = [phases.replace("4}", "2}"), "steps=0", "data.micro_batch_size=2"]
    assert estimate(load_config(CONFIG, smaller), 1) < estimate(config, 1)
    config = load_config(CONFIG, [phases.replace("4}", "1}"), "steps=0", "data.micro_batch_size=2"])
    assert candidates(config)[0] == "data.micro_batch_size=1"


def test_nothing_that_helps_is_no_empty_list(monkeypatch):
    monkeypatch.setattr("trainer.planning.out_of_memory.estimate", lambda *_: 2**30)
    assert compare(str(CONFIG), 1, 0).endswith("takes less; use more processes")


def test_other_errors_pass():
    inside = advise_on_out_of_memory(load_config(CONFIG), Grid.single(torch.device("cpu")))
    with pytest.raises(RuntimeError, match="of another kind"), inside:
        raise RuntimeError("of another kind")
