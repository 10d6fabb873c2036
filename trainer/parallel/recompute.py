"""Activations that backward computes again instead of keeping, chosen part by part."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from model import V4Model
from model.block import Block

Part = Literal["streams", "norms", "attention", "block"]


class Recompute:
    """Placeholder until the parts are defined."""

    def __init__(self, parts: Collection[Part]) -> None:
        self.parts = frozenset(parts)

    def apply(self, model: V4Model) -> None:
        """Wrap."""
        for module in model.modules():
            if isinstance(module, Block):
                pass
