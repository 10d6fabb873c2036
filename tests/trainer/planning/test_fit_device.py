"""Settings for the memory of a device: which are chosen, and that they fit and train the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from model.kernels.workspaces import attention_bytes, objective_bytes
from tests.trainer.config.test_recipe import phased
from tests.trainer.test_phase_runs import STAGES
from tests.trainer.tiny import column
from trainer.__main__ import main
from trainer.config import ConfigError, RunConfig, load_config
from trainer.device import DeviceInfo
from trainer.formatting import GIB
from trainer.planning.dry_run import count_memory
from trainer.planning.fit_device import (
    MEMORY_FRACTION,
    RECOMPUTATION,
    Count,
    fit,
    micro_batch_sizes,
)
from trainer.planning.static_memory import snapshot_memory, triton_workspace

CONFIG = Path(__file__).parents[3] / "configs" / "debug.yaml"
# Of a row, by what is computed again; 10 GiB are there all the time.
GIB_OF_ROW = {(): 8.0, ("norms", "streams"): 6, ("attention", "norms", "streams"): 4, ("block",): 2}


def count(config: RunConfig) -> int:
    of_row = GIB_OF_ROW[config.parallel.recompute] / (1 + bool(config.parallel.offload))
    return int((10 + config.data.micro_batch_size * of_row) * GIB)


def settings(memory: float, *overrides: str, world: int = 1) -> tuple[int, tuple[str, ...], bool]:
    config = load_config(
        CONFIG, ["data.global_batch_size=12", "data.micro_batch_size=1", *overrides]
    )
    # Room is a share of whole GiB; what is over does not count.
    device = DeviceInfo("a device", math.ceil(memory / MEMORY_FRACTION) * GIB + GIB - 1)
    chosen, message = fit(config, world, device, count)
    assert count(chosen) <= MEMORY_FRACTION * device.memory
    assert (
        f"data.micro_batch_size = {chosen.data.micro_batch_size}, " in message
        and "a device" in message
    )
    return chosen.data.micro_batch_size, chosen.parallel.recompute, bool(chosen.parallel.offload)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (106, (12, (), False)),
        (105, (6, (), False)),
        (58, (6, (), False)),
        (34, (3, (), False)),
        (18, (1, (), False)),
        (16, (1, ("norms", "streams"), False)),
        (14, (1, ("attention", "norms", "streams"), False)),
        (12, (1, ("block",), False)),
        (11, (1, ("block",), True)),
    ],
)
def test_least_recomputation_then_the_longest_microbatch(memory, expected):
    assert settings(memory) == expected


def test_what_is_written_does_not_matter():
    assert settings(58, "parallel.recompute=[block]", "data.micro_batch_size=12") == (6, (), False)


def test_the_degrees_of_a_phase_stay(tiny: Path, tmp_path: Path) -> None:
    """What was chosen for a segment is that of the run, and no phase asks for something else."""
    stages = [stage | {"attention": "dense"} for stage in STAGES[:2]]
    stages[1] |= {"parallel": {"context": 2, "recompute": ["block"], "offload": ["block"]}}
    config = load_config(phased(tiny, tmp_path, stages))
    config = config.at_step(config.recipe.steps - 1)
    chosen, message = fit(config, 2, DeviceInfo("a device", 100 * GIB), lambda config: GIB)
    assert chosen.segment.phases[0].number == 1 and chosen.segment.parallel.context == 2
    assert chosen.segment.parallel.recompute == chosen.segment.parallel.offload == ()
    assert "parallel.recompute = []" in message
    assert chosen.phases[1].parallel is not None and chosen.phases[1].parallel.recompute is None


def test_nothing_fits():
    with pytest.raises(
        ConfigError,
        match=r"smallest settings take about 11.00 GiB per process, and 90% .* is 10.80",
    ):
        settings(10)


def test_microbatches_have_no_filler_rows_and_end_at_32768_tokens():
    overrides = ["data.global_batch_size=96", "data.micro_batch_size=1"]
    rows = micro_batch_sizes(load_config(CONFIG, overrides), 1)
    assert rows == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48] and 64 * 512 == 32_768
    assert micro_batch_sizes(load_config(CONFIG, overrides), 2) == [
        1,
        2,
        3,
        4,
        6,
        8,
        12,
        16,
        24,
        48,
    ]
    assert micro_batch_sizes(load_config(CONFIG, [*overrides, "data.seq_len=16384"]), 1) == [1, 2]
    pipeline = [*overrides, "parallel.pipeline=2", "data.micro_batch_size=4"]
    assert micro_batch_sizes(load_config(CONFIG, pipeline), 2) == [4]


def test_a_step_that_other_rows_do_not_divide_is_left_alone():
    phases = "phases=[{until_tokens: 49152, attention: dense, global_batch_size: 8}, "
    phases += "{until_tokens: 98304, attention: dense}]"
    rows, *_ = settings(1000, phases, "steps=0")
    assert rows == 4  # of 12 and of 8


def test_what_is_chosen_fits_by_the_dry_run_and_more_does_not():
    config = load_config(CONFIG, ["data.global_batch_size=16"])
    size = Count(1, on_host=False, log=False)
    chosen, _ = fit(config, 1, DeviceInfo("a device", GIB), size)
    assert size(chosen) <= MEMORY_FRACTION * GIB
    assert chosen.parallel.recompute == () and 1 <= chosen.data.micro_batch_size < 16
    overrides = [
        "data.global_batch_size=16",
        f"data.micro_batch_size={2 * chosen.data.micro_batch_size}",
    ]
    assert size(load_config(CONFIG, overrides)) > MEMORY_FRACTION * GIB


def test_snapshots_on_the_host_count_where_it_trains():
    config = load_config(CONFIG, ["stability.spikes={}"])
    there, here = (Count(1, on_host, log=False)(config) for on_host in (False, True))
    assert here - there == snapshot_memory(config, config.degrees(1)) > 0


def test_every_rung_needs_less_than_the_one_before():
    """On rows long enough for attention to count; as many as a GPU holds of a larger model."""
    config = load_config(CONFIG, ["data.seq_len=4096", "data.micro_batch_size=4"])
    sizes = []
    for again in RECOMPUTATION:
        parallel = config.parallel.model_copy(update=again)
        with_it = config.model_copy(update={"parallel": parallel})
        sizes.append(count_memory(with_it, 1).fullest.total)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


def test_a_run_fits_itself_to_this_machine_and_trains_the_same(
    tiny: Path, tmp_path, capsys
) -> None:
    losses = {}
    for name, overrides in (
        ("fitted", ["fit_to_memory=true"]),
        ("plain", ["data.micro_batch_size=1"]),
    ):
        folder = tmp_path / name
        assert main([str(tiny), f"run_dir={folder}", *overrides]) == 0
        losses[name] = column(folder, "loss")
    output = capsys.readouterr()
    assert (
        "fit_to_memory: data.micro_batch_size = 4, parallel.recompute = []"
        in output.out + output.err
    )
    assert load_config(tmp_path / "fitted" / "config.yaml").data.micro_batch_size == 4
    # Rounding alone: sums in another order, over six updates.
    torch.testing.assert_close(losses["fitted"], losses["plain"], rtol=1e-5, atol=0)


def test_the_memory_of_deepspeed_is_not_known():
    with pytest.raises(
        ConfigError, match="fit_to_memory = true is not supported with engine = deepspeed"
    ):
        load_config(CONFIG, ["engine=deepspeed", "fit_to_memory=true"])


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("CPU", None),
    ],
)
def test_peaks_of_data_sheets(name, peak):
    assert DeviceInfo(name, GIB).peak_tflops == peak


def test_a_gpu_needs_room_for_tritons_attention(tiny: Path) -> None:
    """Queries and the output's gradient side by side, of a rank's heads; and their keys' sums."""
    bf16 = ["precision=bf16", "data.micro_batch_size=1"]
    config = load_config(tiny, bf16)
    model, tokens = config.model, config.data.seq_len
    heads, selected = model.num_attention_heads, model.index_topk
    expected = attention_bytes(tokens, heads, model.head_dim, selected)
    assert expected > 2 * 2 * tokens * heads * model.head_dim
    counts = [Count(1, on_host=on_host, log=False)(config) for on_host in (False, True)]
    assert counts[0] - counts[1] == expected == triton_workspace(config, config.degrees(1))
    for other in (
        ["kernels={attention: eager, indexer: eager, indexer_loss: eager}"],
        ["device=cpu"],
        ["precision=fp32"],
    ):
        assert triton_workspace(load_config(tiny, [*bf16, *other]), config.degrees(1)) == 0


def test_workspaces_of_selected_entries_are_counted(tiny: Path) -> None:
    """Ordered pairs of (query, entry), and the candidates of a selection of 512."""
    sizes = {"index_topk": 512, "head_dim": 512, "max_position_embeddings": 16384}
    more = [f"model.{name}={value}" for name, value in sizes.items()]
    more += ["precision=bf16", "data.micro_batch_size=1", "data.seq_len=16384"]
    config = load_config(tiny, more)
    rows = 2 * 2 * 16384 * config.model.num_attention_heads * 512
    assert triton_workspace(config, config.degrees(1)) == rows + 2**30
    config = load_config(tiny, [*more, "kernels={attention: eager, indexer_loss: eager}"])
    assert triton_workspace(config, config.degrees(1)) == 16384 * 2 * 512 * 8  # 134 MB
    eager = "kernels={attention: eager, indexer: eager, indexer_loss: eager}"
    config = load_config(tiny, [*more, eager])
    assert triton_workspace(config, config.degrees(1)) == 0


def test_workspaces_of_the_indexers_objective_are_counted(tiny: Path) -> None:
    """Of a block: a gradient of the key of every selected pair, or a number for each pair."""
    more = ["precision=bf16", "data.micro_batch_size=1", "data.seq_len=16384"]
    more += ["model.index_topk=512", "model.max_position_embeddings=16384"]
    more.append("kernels={attention: eager, indexer: eager}")
    width, entries = load_config(tiny, more).model.index_head_dim, 16384 // 4
    assert objective_bytes(16384, entries, width, 512) == 2**28 + 2**28 // width
    expected = {"dense": 0, "warmup": 8 * 16384 * entries + 4 * width * (entries + 264 * 64)}
    for attention, size in expected.items():
        phase = f"phases=[{{until_tokens: 1048576, attention: {attention}}}]"
        config = load_config(tiny, [*more, "steps=0", phase])
        assert triton_workspace(config, config.degrees(1)) == size, attention
