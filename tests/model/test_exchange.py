"""On one process nothing is exchanged."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from model.exchange import Exchange, LocalExchange
from trainer.parallel.context import SequenceExchange

METHODS = [name for name in vars(Exchange) if not name.startswith("_")]


def test_every_exchange_has_the_methods_of_the_protocol() -> None:
    assert len(METHODS) == 12
    for kind in (LocalExchange, SequenceExchange):
        for name in METHODS:
            expected = inspect.signature(getattr(Exchange, name))
            assert inspect.signature(getattr(kind, name)) == expected, (kind, name)


def test_local_exchange_returns_its_arguments() -> None:
    x, mass = torch.ones(3, 2), object()
    arguments: dict[str, tuple[Any, ...]] = {
        "prepend_halo": ("csa", x, x + 1),
        "gather_entries": ("csa", x),
        "attended_entries": (x, "csa", None),
        "sum_mass": ("csa", mass, True),
    }
    exchange = LocalExchange()
    assert exchange.of_layer(3) is exchange
    for name in set(METHODS) - {"of_layer"}:
        results = getattr(exchange, name)(*arguments.get(name, (x,)))
        if name == "prepend_halo":
            assert torch.equal(results[0], x) and torch.equal(results[1], x + 1)
        else:
            assert results is (mass if name == "sum_mass" else x), name
