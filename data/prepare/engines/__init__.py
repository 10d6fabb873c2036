"""Engines: what runs the tasks of a preparation, on one machine or on many."""

from data.prepare.engines.engine import Engine
from data.prepare.engines.local import LocalEngine
from data.prepare.engines.remote import remove_engine_files
from data.prepare.task import Preparation

__all__ = ["Engine", "open_engine", "remove_engine_files"]


def open_engine(preparation: Preparation, visible: bool) -> Engine:
    """The engine of `data.engine`; `visible` shows the progress on stderr.

    Raises DataError where it is not installed.
    """
    if preparation.config.engine == "slurm":
        from data.prepare.engines.slurm import SlurmEngine

        return SlurmEngine(preparation, visible)
    if preparation.config.engine == "ray":
        from data.prepare.engines.ray import RayEngine

        return RayEngine(preparation, visible)
    return LocalEngine(preparation, visible)
