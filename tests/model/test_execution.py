"""A model computes through what its Execution holds, and through nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from model import IGNORE_INDEX
from model.dispatch import Dispatched, PendingRows
from model.execution import LOCAL, Execution, local_execution
from model.kernel_choices import operations_of
from model.kernels.backend import UnsupportedError
from model.kernels.operations import Choice, Kernels
from model.linear import UNQUANTISED, Matmuls
from model.router import Routing
from tests.model.tiny import random_model, random_tokens, tiny_config

CONFIG = tiny_config()
BLOCKS = CONFIG.num_hidden_layers + CONFIG.num_nextn_predict_layers


def counted(calls: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    return call


class CountedDispatch:
    def __init__(self, calls: Counter[str]) -> None:
        self.calls = calls

    def begin(self, x_TD: torch.Tensor, routing: Routing, num_experts: int) -> PendingRows:
        self.calls["dispatch"] += 1
        return LOCAL.dispatch.begin(x_TD, routing, num_experts)

    def combine(self, y_PD: torch.Tensor, dispatched: Dispatched, num_tokens: int) -> torch.Tensor:
        self.calls["combine"] += 1
        return LOCAL.dispatch.combine(y_PD, dispatched, num_tokens)


def counting_execution(calls: Counter[str]) -> Execution:
    def wrapped(table: Any) -> dict[str, Any]:
        return {f.name: counted(calls, f.name, getattr(table, f.name)) for f in fields(table)}

    def call_part(part: str, function: Callable[..., Any], *inputs: Any) -> Any:
        calls[part] += 1
        return function(*inputs)

    return Execution(
        matmuls=Matmuls(**wrapped(UNQUANTISED)),
        call_part=call_part,
        dispatch=CountedDispatch(calls),
        place_tokens=counted(calls, "place_tokens", LOCAL.place_tokens),
        cross_entropy=counted(calls, "cross_entropy", LOCAL.cross_entropy),
    )


def test_every_part_of_an_execution_is_used_where_it_should_be() -> None:
    tokens = random_tokens(CONFIG, 1, 64)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    calls: Counter[str] = Counter()
    model = random_model(CONFIG, execution=counting_execution(calls))
    assert torch.equal(
        model(tokens, targets=targets).loss, random_model(CONFIG)(tokens, targets=targets).loss
    )
    assert calls == {
        "place_tokens": 1,
        "cross_entropy": 2,  # the main head's and the MTP head's
        "block": BLOCKS,
        "attention": BLOCKS,
        "streams": BLOCKS,
        "norms": 2 * BLOCKS,
        "dispatch": BLOCKS,
        "combine": BLOCKS,
        # wq_a, wq_b, wkv and wo_b of attention and three of the shared expert; e_proj and h_proj;
        # the indexer's wq_b.
        "linear": 7 * BLOCKS + 2 + CONFIG.layer_types.count("csa"),
        "batched": BLOCKS,  # wo_a, by output group
        "grouped": BLOCKS,
        "grouped_pair": BLOCKS,
    }


@pytest.mark.parametrize("operation", operations_of(CONFIG, in_fp8=True))
def test_every_kernel_of_an_execution_is_used(operation: str) -> None:
    """On a CPU the chosen Triton kernel says that it cannot run; eager would run."""
    tokens = random_tokens(CONFIG, 1, 64)
    assert 64 // CONFIG.compress_ratio("csa") > CONFIG.index_topk  # the indexer selects
    execution = local_execution(Kernels(**{operation: Choice("triton")}), operation == "fp8")
    model = random_model(CONFIG, dtype=torch.bfloat16, execution=execution)
    with pytest.raises(UnsupportedError, match=f"^{operation}: Triton runs on a GPU"):
        model(tokens, targets=tokens, attention="sparse").loss.backward()


def test_an_operation_has_only_its_own_implementations() -> None:
    with pytest.raises(ValueError, match="attention has no implementation 'compile'; it has eager"):
        Kernels(attention=Choice("compile"))


def test_an_execution_cannot_be_changed_once_a_model_has_it() -> None:
    changed = replace(LOCAL, matmuls=UNQUANTISED)
    for name in (field.name for field in fields(Execution)):
        try:
            setattr(changed, name, None)
        except AttributeError:
            continue
        raise AssertionError(f"{name} was set")
