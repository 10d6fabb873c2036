"""The benchmark's matmuls in FP8 without a GPU: what is timed as one thing is one."""

from __future__ import annotations

from tests.model.kernels.interpreter import interpreted
from tests.model.tiny import tiny_config

ROW = 61
TORCH_ON_A_GPU = "torch scaled_mm"


@interpreted
def test_what_stands_side_by_side_computes_the_same():
    from benchmarks.kernels import attention_tasks, fp8_tasks

    old = attention_tasks.DEVICE
    attention_tasks.DEVICE = fp8_tasks.DEVICE = "cpu"
    try:
        made = [make() for make in fp8_tasks.tasks(tiny_config(n_routed_experts=16), ROW)]
    finally:
        attention_tasks.DEVICE = fp8_tasks.DEVICE = old
    assert [task.name for task in made] == [
        "FP8 linear",
        "FP8 matmul of a linear",
        "rounding to FP8",
        "FP8 experts",
    ]
    for task in made:
        expected = task.implementations["eager"](*task.leaves).double()
        assert task.forward.flops > 0 and task.forward.bytes > 0
        for name, function in task.implementations.items():
            if name == TORCH_ON_A_GPU or "compiled" in name or "codes" in name:
                continue
            computed = function(*task.leaves).double()
            # The 4 bits of a factor, and what the interpreter cuts off of bf16.
            allowed = 0.1 if name == "torch in bf16" else 2.0**-7
            assert (computed - expected).norm() <= allowed * expected.norm(), (task.name, name)
