"""A model computes through what its Execution holds, and through nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from model import IGNORE_INDEX
from model.dispatch import Dispatched
from model.execution import LOCAL, Execution
from model.linear import UNQUANTISED, Matmuls
from model.pointwise import EAGER_OR_TRITON, PointwiseOps
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

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, num_experts: int) -> Dispatched:
        self.calls["dispatch"] += 1
        return LOCAL.dispatch.dispatch(x_TD, routing, num_experts)

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
        pointwise=PointwiseOps(**wrapped(EAGER_OR_TRITON)),
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
        "grouped": 3 * BLOCKS,
        "clamped_swiglu": 2 * BLOCKS,
        "read_streams": 2 * BLOCKS,
        "write_streams": 2 * BLOCKS,
        "collapse_streams": 2,
        "rms_norm": calls["rms_norm"],  # block norms, those inside attention, enorm and hnorm
    }
    assert calls["rms_norm"] > 4 * BLOCKS


def test_an_execution_cannot_be_changed_once_a_model_has_it() -> None:
    changed = replace(LOCAL, matmuls=UNQUANTISED)
    for name in (field.name for field in fields(Execution)):
        try:
            setattr(changed, name, None)
        except AttributeError:
            continue
        raise AssertionError(f"{name} was set")
