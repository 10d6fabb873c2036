"""Engines: what runs the tasks of a preparation, on one machine or on many."""

from data.prepare.engines.engine import Engine
from data.prepare.engines.local import LocalEngine
from data.prepare.task import Preparation

__all__ = ["Engine", "open_engine"]


def open_engine(preparation: Preparation, visible: bool) -> Engine:
    """The engine of `data.engine`; `visible` shows the progress on stderr."""
    return LocalEngine(preparation, visible)
