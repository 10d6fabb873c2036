"""The real Trainer on one rank of every parallel axis, on a fake GPU over fake collectives."""

from __future__ import annotations

import pytest

from tests.trainer.fake_gpu_run import (
    COUNTS,
    by_function,
    faults,
    needs_compiler,
    train_on_fake_gpu,
)

pytestmark = needs_compiler
PIPELINE = ("data.global_batch_size=4", "model.num_hidden_layers=4", "parallel.pipeline=2")
PIPELINE += ("model.layer_types=[window, csa, hca, csa]",)
AXES = {
    "data": (2, ()),
    "tensor": (2, ("parallel.tensor=2",)),
    "context": (2, ("parallel.context=2",)),
    "expert": (2, ("parallel.expert=2",)),
    "expert_tensor": (2, ("parallel.expert_tensor=2",)),
    "1f1b": (2, PIPELINE),
    **{
        schedule: (2, (*PIPELINE, f"parallel.pipeline_schedule={schedule}"))
        for schedule in ("interleaved_1f1b", "zero_bubble_v", "dual_pipe_v")
    },
    "tensor x expert": (4, ("parallel.tensor=2", "parallel.expert=4")),
}
QUICK = ("data", "tensor", "context", "expert", "zero_bubble_v")
LAYERS = 4  # with MTP


@pytest.mark.parametrize(
    "axis", [pytest.param(a, marks=() if a in QUICK else pytest.mark.slow) for a in AXES]
)
def test_axes(axis, tiny, tmp_path):
    """A checkpoint is not saved: the other ranks' parts of it do not exist."""
    world, overrides = AXES[axis]
    parts = train_on_fake_gpu(tiny, tmp_path, *overrides, world=world, saves=False)
    has_expert_ranks = "expert" in axis
    assert faults(parts, has_expert_ranks) == {}
    assert by_function(parts.steps[0].waits).get(COUNTS, 0) == LAYERS * has_expert_ranks
