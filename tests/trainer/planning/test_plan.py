"""`v4 plan`: its tables, its measured balance, and its refusals."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from model.flops import flops_per_layer
from tests.trainer.config.test_recipe import phased
from tests.trainer.parallel.topologies import MODEL
from trainer.config import ConfigError, RunConfig, load_config
from trainer.formatting import gib, span
from trainer.parallel.degrees import Degrees
from trainer.parallel.stage_plan import balance_layers
from trainer.planning.layer_times import Times, measure_layers, take_times
from trainer.planning.plan import degrees_table, describe_plan, stage_shares
from trainer.planning.static_memory import memory_parts
from trainer.planning.traffic import GradientReduction, Work, step_traffic
from trainer.planning.traffic_tables import traffic_of

CONFIGS = Path(__file__).parents[3] / "configs"


def printed(parts: object) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in parts:  # type: ignore[attr-defined]
        console.print(part)
    return console.export_text()


def row(text: str, name: str) -> list[str]:
    """The other cells of the one line whose first cell begins with `name`."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    rows = [cells[1:] for cells in lines if cells and cells[0].startswith(name)]
    assert len(rows) == 1, (name, text)
    return rows[0]


def test_flash_on_256() -> None:
    config = load_config(CONFIGS / "flash.yaml")
    at = printed([degrees_table(config, 256)])
    assert row(at, "3")[:5] == ["sparse 64K", "2 x 8 x 2 x 8", "1 x 32 x 1 x 8", "block", "576"]
    assert row(at, "5")[:5] == [
        "sparse 1M, decay",
        "2 x 64 x 1 x 2",
        "1 x 128 x 1 x 2",
        "block",
        "72",
    ]
    text = printed(describe_plan(config, 256, phase=3))
    assert row(text, "parameters") == ["290,942,278,866"]
    assert row(text, "33") == ["1", "0", "0", "1", "0", "1", "0"]  # who is where
    assert "│     7 │             7 │     42 │ 1 csa, heads" in text
    assert row(text, "total without activations") == ["20.49 GiB"]
    assert row(text, "host memory: snapshots") == ["19.28 GiB"], "page-locked masters and states"


def test_the_phases_of_flash() -> None:
    config = load_config(CONFIGS / "flash.yaml", ["metrics.peak_tflops=1000"])
    text = printed(describe_plan(config, 256))
    name, steps, tokens, until, rows, rates, mtp, time = row(text, "phase 3")
    assert (name, tokens, until, rows) == ("sparse 64K", "27.8T", "28.8T", "1,152 x 64K")
    assert int(steps.replace(",", "")) == pytest.approx(27.8e12 / 75.5e6, rel=1e-3)
    assert (rates, mtp) == ("0.00027", "0.3")
    # Six operations a parameter and token and a little for attention, at 40% of the peak.
    seconds = 27.8e12 * 6 * 13.3e9 * 1.3 / (0.4 * 256e15)
    assert float(time.removesuffix(" days")) == pytest.approx(seconds / 86400, rel=0.15)
    assert "Times at 40% of metrics.peak_tflops = 1000 on 256 processes" in text
    assert row(text, "phase 2")[5] == "0.001" and row(text, "phase 0")[4].startswith("4,608 to")


def test_every_phase_is_planned_at_its_degrees(tiny: Path, tmp_path: Path) -> None:
    dense = {"attention": "dense", "micro_batch_size": 1, "global_batch_size": 8}
    phases = [
        dense | {"until_tokens": 4000},
        dense | {"until_tokens": 8000, "parallel": {"tensor": 2, "recompute": ["block"]}},
        dense | {"until_tokens": 12000, "seq_len": 96, "parallel": {"pipeline": 2}},
    ]
    config = load_config(phased(tiny, tmp_path, phases), ["data.micro_batch_size=1"])
    text, table = printed(describe_plan(config, 4)), printed([degrees_table(config, 4)])
    for number, degrees in enumerate(("1 x 1 x 4 x 1", "2 x 1 x 2 x 1", "1 x 1 x 2 x 2")):
        name, dense_axes, _, recomputed, microbatches, memory, sent = row(table, str(number))
        assert (dense_axes, recomputed) == (degrees, "block" * (number == 1))
        at = config.at_step(config.recipe.phases[number].first)
        assert microbatches == str(8 // at.degrees(4).data)
        parts = memory_parts(at, at.degrees(4))
        assert memory == gib(sum(parts.values())) and name in text
        assert float(sent.removesuffix(" MiB")) > 0
    assert text.count("memory of the fullest process") == 3 and text.count("stages\n") <= 1
    only = printed(describe_plan(config, 4, phase=1))
    assert only.count("memory of the fullest process") == 1 and "phase 2," not in only
    with pytest.raises(ConfigError, match=r"phases\.1\.parallel: .* does not divide the 3 pro"):
        list(describe_plan(config, 3))


def test_traffic_is_that_of_the_rank_that_sends_most(tiny: Path) -> None:
    config = load_config(tiny, [*MODEL, "parallel.pipeline=2", "parallel.expert=2"])
    degrees, rows = config.degrees(4), config.data
    microbatches = rows.global_batch_size // degrees.data // rows.micro_batch_size
    work = Work.whole_rows(rows.seq_len, rows.micro_batch_size, microbatches, "fp32")
    stages = config.parallel.stages(config.model, rows.seq_len)
    reduction = GradientReduction(max_padding=config.parallel.max_optimizer_padding)
    sent = {
        rank: step_traffic(config.model, degrees, stages, rank, work, config.optim, reduction)
        for rank in (0, 2)
    }
    rank = max(sent, key=lambda rank: sum(sent[rank].values()))
    text = printed([traffic_of(config, degrees)])
    assert f"sent by rank {rank} per step" in text
    *_, total = row(text, "total")
    assert float(total) == pytest.approx(sum(sent[rank].values()) / 2**20, abs=0.01)
    expert = sum(size for (axis, _), size in sent[rank].items() if axis == "expert_all_to_all")
    assert float(row(text, "expert_all_to_all")[-1]) == pytest.approx(expert / 2**20, abs=0.01)


def test_the_table_of_parameters_on_demand(tiny: Path) -> None:
    config = load_config(tiny, MODEL)
    without, table = (printed(describe_plan(config, 1, parameters=flag)) for flag in (False, True))
    assert "layers.*.attn.wkv.weight" in table and "layers.*" not in without


def test_a_plan_needs_no_torch() -> None:
    code = "import sys, trainer.planning.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_shares_of_stages_sum_to_one() -> None:
    config = load_config(CONFIGS / "flash.yaml")
    stages = config.parallel.stages(config.model, 4096)
    costs, tail = flops_per_layer(config.model, 4096)
    shares = stage_shares(stages, costs, tail)
    assert sum(shares) == pytest.approx(1)
    assert shares[-1] == pytest.approx((costs[-1] + tail) / (sum(costs) + tail))


def test_memory_falls_with_every_axis_that_divides_it(tiny: Path) -> None:
    config = load_config(tiny, [*MODEL, "precision=bf16"])

    def total(**degrees: int) -> int:
        overrides = [f"parallel.{name}={degree}" for name, degree in degrees.items()]
        changed = load_config(tiny, [*MODEL, "precision=bf16", *overrides])
        return sum(memory_parts(changed, Degrees(2, **degrees)).values())

    alone = sum(memory_parts(config, Degrees(2)).values())
    for axis in ("tensor", "expert", "expert_tensor", "pipeline"):
        assert total(**{axis: 2}) < alone, axis
    assert total(context=2) == alone


def test_the_whole_command(tiny: Path) -> None:
    """Degrees without a number of processes: the fewest they need; tables on stdout only."""
    command = [sys.executable, "-m", "launch", "plan", str(tiny), *MODEL]
    arguments = ["parallel.pipeline=2", "parallel.expert=2", "--dry-run"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, "processes") == ["4"]
    _, table = done.stdout.split("memory of a process")
    layers, parameters, *memory = row(table, "3")
    assert layers == "3" and int(parameters.replace(",", "")) > 10_000
    assert memory[5] == "1"  # the last stage holds one microbatch
    assert float(memory[-1]) > sum(map(float, memory[:4]))
    assert "All processes together hold" in done.stdout
    assert "dry run: counting ranks\n" in done.stderr
    done = subprocess.run(
        [*command, "parallel.pipeline=2", "--nproc=3"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("v4: error: ")


def test_a_dry_run_reports_what_the_table_leaves_out(tiny: Path) -> None:
    parts = [*MODEL, "precision=bf16", "data.seq_len=4096", "parallel.recompute=[block]"]
    text, offloaded = (
        " ".join(printed(describe_plan(load_config(tiny, words), 1, dry=True)).split())
        for words in (parts, [*parts, "parallel.offload=[block]"])
    )
    assert re.search(r"Where Triton's attention runs, its backward takes [1-9]\S+ MiB more", text)
    assert "page-locked" not in text
    assert re.search(r"Offloaded activations take [1-9]\S+ MiB of page-locked host", offloaded)


def test_measured_times_balance_the_stages(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(tiny, [*MODEL, "parallel.pipeline=2"])
    layers = {"window": 1.0, "csa": 9.0, "hca": 1.0}
    times = Times(torch.device("cpu"), 48, layers, 1.0, 1.0)  # type: ignore[arg-type]
    monkeypatch.setattr("trainer.planning.layer_times.take_times", lambda *_: times)
    table, override = measure_layers(config, 2)
    assert isinstance(table, Table)
    # window 1, csa 9, hca 1 | csa 9, head and MTP 2
    assert override == "parallel.pipeline_layers_per_stage=[3,1]"
    assert balance_layers(times.of_layers(config.model), times.tail, 2) == (3, 1)
    again = load_config(tiny, [*MODEL, "parallel.pipeline=2", str(override)])
    assert again.parallel.pipeline_layers_per_stage == (3, 1)
    text = printed([table])
    assert row(text, "csa layer")[:3] == ["2", "9000.0", "81.82%"]
    assert row(text, "head, and MTP block")[:3] == ["1", "2000.0", "9.09%"]


def test_every_part_is_timed(tiny: Path) -> None:
    config: RunConfig = load_config(tiny, MODEL)
    times = take_times(config, torch.device("cpu"), repeats=1)
    assert set(times.layers) == {"window", "csa", "hca"}
    assert times.tokens == 48
    assert all(0 < seconds < 60 for seconds in (*times.layers.values(), times.mtp, times.head))
    assert times.mtp > times.head


def test_a_world_that_does_not_fit_is_refused(tiny: Path) -> None:
    config = load_config(tiny, [*MODEL, "parallel.tensor=2"])
    with pytest.raises(ConfigError, match="does not divide the 3 processes"):
        list(describe_plan(config, 3))
    with pytest.raises(ConfigError, match="does not divide the 3 processes"):
        list(measure_layers(config, 3))


def test_span() -> None:
    assert [span([]), span([4]), span(range(3, 8))] == ["", "4", "3-7"]
