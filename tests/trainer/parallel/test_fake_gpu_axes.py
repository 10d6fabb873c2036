"""The real Trainer on one rank of every parallel axis, on a fake GPU over fake collectives."""

from __future__ import annotations

import pytest

from tests.trainer.fake_gpu_run import (
    ANTICIPATION,
    COUNTS,
    OFFLOAD,
    by_function,
    faults,
    needs_compiler,
    phases,
    train_on_fake_gpu,
)

pytestmark = needs_compiler
PIPELINE = ("data.global_batch_size=4", "model.num_hidden_layers=4", "parallel.pipeline=2")
PIPELINE += ("model.layer_types=[window, csa, hca, csa]",)
SCHEDULES = ("interleaved_1f1b", "zero_bubble_v", "dual_pipe_v")
AXES = {
    "data": (2, ()),
    "tensor": (2, ("parallel.tensor=2",)),
    "context": (2, ("parallel.context=2",)),
    "expert": (2, ("parallel.expert=2",)),
    "expert_tensor": (2, ("parallel.expert_tensor=2",)),
    "1f1b": (2, PIPELINE),
    **{
        schedule: (2, (*PIPELINE, f"parallel.pipeline_schedule={schedule}"))
        for schedule in SCHEDULES
    },
    "tensor x expert": (4, ("parallel.tensor=2", "parallel.expert=4")),
}
QUICK = ("data", "tensor", "context", "expert", "zero_bubble_v")
LAYERS = 4  # with MTP
MATMULS_OF_SHARED_EXPERT = 3

axes = pytest.mark.parametrize(
    "axis", [pytest.param(a, marks=() if a in QUICK else pytest.mark.slow) for a in AXES]
)


@axes
def test_axes(axis, tiny, tmp_path):
    """Steps, an evaluation, the stats of the layers, and a checkpoint of this rank's part."""
    world, overrides = AXES[axis]
    parts = train_on_fake_gpu(tiny, tmp_path, *overrides, world=world)
    has_expert_ranks = "expert" in axis
    assert faults(parts, has_expert_ranks) == {}
    assert by_function(parts.steps[0].waits).get(COUNTS, 0) == LAYERS * has_expert_ranks
    if has_expert_ranks:
        queued = [n for where, n in parts.steps[0].queued.items() if COUNTS.split()[0] in where]
        assert len(queued) == 1 and queued[0] > MATMULS_OF_SHARED_EXPERT, "the device does not idle"
    assert parts.save.operations["copy between devices"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("axis", [axis for axis in AXES if axis not in SCHEDULES])
def test_every_mode_on_every_axis(axis, tiny, tmp_path):
    """All attention modes, anticipation, blocks recomputed from host memory, in one run."""
    world, overrides = AXES[axis]
    modes = (*phases(192 if "parallel.pipeline=2" in overrides else 96), *ANTICIPATION, *OFFLOAD)
    parts = train_on_fake_gpu(tiny, tmp_path, *overrides, *modes, world=world)
    assert len(parts.steps) == 3
    assert faults(parts, "expert" in axis) == {}
