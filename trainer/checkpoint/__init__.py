"""Checkpoints: logical tensors in safetensors, saved and loaded at any topology.

`run` saves and restores a run, `periodic` decides when, `folder` is what all ranks do together,
`store` publishes, `layout` plans who writes what, `background` writes beside training.
Names are loaded on first use: torch.distributed.checkpoint takes a second to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, the names of _MODULES
    from trainer.checkpoint.all_ranks import UNFINISHED, new_folder, on_all_ranks
    from trainer.checkpoint.concurrent import read_newest
    from trainer.checkpoint.folder import (
        CheckpointFolder,
        checkpoints_in,
        find_mismatch,
        folder_name,
        step_of,
    )
    from trainer.checkpoint.linked_folder import claim_checkpoints
    from trainer.checkpoint.logical_tensors import (
        Boxes,
        TensorBox,
        is_routing,
        is_state,
        routing_name,
    )
    from trainer.checkpoint.manifest import check_sizes
    from trainer.checkpoint.next_step import at_next_step
    from trainer.checkpoint.periodic import PeriodicCheckpoints
    from trainer.checkpoint.reader import CheckpointReader
    from trainer.checkpoint.run import (
        RunCheckpoint,
        SavedOptimizer,
        newest_of,
        other_shards,
    )
    from trainer.checkpoint.store import put_back
    from trainer.checkpoint.unsaved import unsaved_progress

_MODULES = {
    "Boxes": "logical_tensors",
    "CheckpointFolder": "folder",
    "CheckpointReader": "reader",
    "PeriodicCheckpoints": "periodic",
    "RunCheckpoint": "run",
    "TensorBox": "logical_tensors",
    "UNFINISHED": "all_ranks",
    "SavedOptimizer": "run",
    "at_next_step": "next_step",
    "check_sizes": "manifest",
    "checkpoints_in": "folder",
    "claim_checkpoints": "linked_folder",
    "find_mismatch": "folder",
    "folder_name": "folder",
    "is_routing": "logical_tensors",
    "is_state": "logical_tensors",
    "new_folder": "all_ranks",
    "newest_of": "run",
    "on_all_ranks": "all_ranks",
    "other_shards": "run",
    "put_back": "store",
    "read_newest": "concurrent",
    "routing_name": "logical_tensors",
    "step_of": "folder",
    "unsaved_progress": "unsaved",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
