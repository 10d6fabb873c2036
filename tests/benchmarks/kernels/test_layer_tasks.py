"""The benchmark's task of the head where there is no GPU: what stands side by side is the same."""

from __future__ import annotations

from tests.model.kernels.interpreter import interpreted
from tests.model.tiny import tiny_config


@interpreted
def test_every_head_gives_the_same_gradient():
    from benchmarks.kernels import attention_tasks, layer_tasks

    old = attention_tasks.DEVICE
    attention_tasks.DEVICE = layer_tasks.DEVICE = "cpu"
    try:
        task = layer_tasks.head_task(tiny_config(), 61)
    finally:
        attention_tasks.DEVICE = layer_tasks.DEVICE = old
    assert set(task.implementations) == {"triton", "eager", "torch, whole logits"}
    assert task.forward.flops > 0 and task.forward.bytes > 0 and task.backward is None
    leaves = [leaf.float() for leaf in task.leaves]  # the interpreter cuts bits of bf16 off
    expected = task.implementations["torch, whole logits"](*leaves).double()
    for name, function in task.implementations.items():
        computed = function(*leaves).double()
        assert (computed - expected).norm() <= 1e-5 * expected.norm() > 0, name
