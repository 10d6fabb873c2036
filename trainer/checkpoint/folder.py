"""Checkpoints: logical tensors in safetensors, published atomically on any storage.

    checkpoints/step-00000020/
        shard-00001-model-00001-of-00001.safetensors   what rank 0 wrote: files of at most 1 GiB,
        shard-00001-model-00002-of-00001.safetensors   or one tensor
        state.json      step, tokens, seed, digests, the model's config
        manifest.json   size and SHA-256 of every other file

A sharded tensor is in the files of several ranks, with the offset of each shard in the file's
header (layout.py): torch.distributed.checkpoint opens the result at any topology. Its metadata is
built from the safetensors headers, so nothing from the disk is ever unpickled. All ranks need to
see the same folder, or the same place in object storage (store.py).
"""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from data.activity import Activity
from data.held_lease import HeldLease, require_leases
from data.storage import AnyPath
from trainer.checkpoint import manifest
from trainer.checkpoint.all_ranks import on_all_ranks
from trainer.checkpoint.dcp_planners import load_boxes
from trainer.checkpoint.layout import LocalTensors, WritePlanner
from trainer.checkpoint.logical_tensors import Boxes, TensorBox, is_routing
from trainer.checkpoint.object_reader import read_entries
from trainer.checkpoint.rank_files import NewCheckpoint, publish, remove_later, write_file
from trainer.checkpoint.reader import CheckpointReader, open_reader, weight_files
from trainer.checkpoint.store import STATE_FILE, open_store
from trainer.config import Rule, rule_of
from trainer.config.published import folder_name, is_published, published, step_of
from trainer.parallel.collectives import all_gather_objects, all_reduce_
from trainer.parallel.grid import Grid
from trainer.parallel.placement import Shape
from trainer.process.errors import CheckpointError, SaveError

FORMAT = 1


def checkpoints_in(folder: AnyPath) -> list[AnyPath]:
    """Returns the published checkpoints, oldest first, without temporary folders.

    Raises CheckpointError for a link to nothing, as one to a disk that is not mounted.
    """
    if isinstance(folder, Path) and folder.is_symlink() and not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a link to {os.readlink(folder)}, where there is no folder; make it, or "
            "mount its disk"
        )
    return published(folder)


def model_digest(model: dict[str, Any]) -> str:
    """Returns the SHA-256 of a model's config, in hexadecimal."""
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()


class CheckpointFolder:
    """The `checkpoints/` folder of a run, which all ranks of a grid see.

    `keep` is how many checkpoints are kept; 0 keeps all. Methods that publish or remove raise
    LeaseError on the first rank where another process has taken over one of its `leases`.
    """

    def __init__(
        self, folder: AnyPath, grid: Grid, keep: int = 0, leases: Sequence[HeldLease] = ()
    ) -> None:
        self.folder = folder
        self.store = open_store(folder)
        self.grid = grid
        self.keep = keep
        self.leases = leases
        self.planner = WritePlanner(grid.world)
        self._may_prune = True

    def save(
        self,
        step: int,
        tensors: Mapping[str, list[TensorBox] | Tensor],
        state: dict[str, Any],
        reuse: bool = False,
    ) -> AnyPath:
        """Writes one checkpoint and returns its folder; every rank calls it.

        Checkpoints of later steps, which were undone, are removed once it is published; older ones
        stay until `prune`. Raises SaveError on all ranks if one of them cannot write; the temporary
        folder is then removed and other checkpoints are unchanged.

        Args:
            step: optimizer steps done.
            tensors: boxes of this rank by name; a plain tensor is not sharded.
            state: the contents of `state.json`.
            reuse: keeps a checkpoint of this step that exists, instead of replacing it.
        """
        target, boxes, world = self.path_of(step), as_boxes(tensors), self.grid.world
        try:
            if not (reuse and all(on_all_ranks(lambda: is_published(target), world))):
                with Activity(f"saving {target}", visible=self.grid.is_first):
                    self._save(step, boxes, as_document(state))
            on_all_ranks(lambda: self._remove_later(step), world)
        except OSError as error:
            raise SaveError(self.save_problem(target, error)) from None
        return target

    def _save(self, step: int, boxes: Boxes, document: dict[str, Any]) -> None:
        """Writes and publishes while all ranks wait. Raises OSError on all ranks."""
        files, tensors, world = self.planner.plan(boxes), LocalTensors(boxes), self.grid.world
        new = self.begin(step)

        def write() -> dict[str, manifest.FileRecord]:
            return {
                (path := new.path(f.name)).name: write_file(path, f.header, tensors.data(f))
                for f in files
            }

        try:
            written = on_all_ranks(write, world)
            records = {name: record for of_rank in written for name, record in of_rank.items()}
            on_all_ranks(lambda: self._publish(new, records, document), world)
        except OSError as error:
            self.abandon(step, new.token, error)
            raise

    def path_of(self, step: int) -> AnyPath:
        """Returns the folder of the checkpoint of a step, whether it exists or not."""
        return self.folder / folder_name(step)

    def begin(self, step: int, action: Callable[[], None] = lambda: None) -> NewCheckpoint:
        """Returns where all ranks write the files of a step; every rank calls it.

        Each rank's `action` is done as well. Raises OSError on all ranks if one of them fails.
        """
        self._may_prune = True
        token = secrets.token_hex(4)

        def begin() -> NewCheckpoint | None:
            new = None
            if self.grid.is_first:
                require_leases(self.leases)  # before it removes what looks like leftovers
                new = NewCheckpoint(step, self.store.begin(step, token), token)
            action()
            return new

        try:
            new = on_all_ranks(begin, self.grid.world)[0]
        except OSError as error:
            self.abandon(step, token, error)
            raise
        assert new is not None
        return new

    def abandon(self, step: int, token: str, error: OSError) -> None:
        """Removes what was written for a step, unless there is no storage to ask now."""
        if self.grid.is_first and error.errno != errno.EREMOTEIO:
            self.store.abandon(step, token)

    def save_problem(self, target: AnyPath, error: OSError) -> str:
        """Returns a sentence about a checkpoint that could not be written."""
        problem = f"{target}: the checkpoint could not be written: "
        problem += error.strerror or str(error) or type(error).__name__
        if error.errno == errno.EREMOTEIO:
            return problem
        paths = checkpoints_in(self.folder)
        newest = f"the newest complete one is {paths[-1]}" if paths else "there is none before it"
        return f"{problem}; {newest}"

    def prune(self) -> str | None:
        """Removes all but the newest `keep`; returns the reason where that is not possible.

        The caller knows that the newest is sound: one that was saved after an update that ruined
        the weights must not replace a good one.
        """
        if not (self._may_prune and self.grid.is_first and self.keep):
            return None
        self._may_prune = False
        old = self.folder
        try:
            require_leases(self.leases)
            for old in checkpoints_in(self.folder)[: -self.keep]:
                self.store.remove(old)
        except OSError as error:
            return f"{old}: could not be removed: {error.strerror or type(error).__name__}"
        return None

    def remove(self, checkpoint: AnyPath) -> str | None:
        """Removes a checkpoint that is not sound; returns the reason where that is not possible.

        Every rank calls it, and none returns before it is gone.
        """

        def remove() -> None:
            if self.grid.is_first:
                require_leases(self.leases)
                self.store.remove(checkpoint)

        try:
            on_all_ranks(remove, self.grid.world)
        except OSError as error:
            return f"{checkpoint}: could not be removed: {error.strerror or type(error).__name__}"
        return None

    def _remove_later(self, step: int) -> None:
        if self.grid.is_first:
            remove_later(self.folder, self.store, self.leases, step)

    def _publish(
        self, new: NewCheckpoint, files: dict[str, manifest.FileRecord], state: dict[str, Any]
    ) -> None:
        if self.grid.is_first:
            publish(new, self.store, self.leases, files, state)

    def newest(self, before: int | None = None) -> AnyPath | None:
        """Returns the newest checkpoint, verified by all ranks together, or None without any.

        With `before`, the newest of those with a lower step. Raises CheckpointError when it is
        damaged, naming the previous complete one.
        """
        # Of the first rank: a training may publish or remove one between two ranks' looks.
        looks = self.grid.is_first or isinstance(self.folder, Path)
        world = self.grid.world
        paths = on_all_ranks(lambda: checkpoints_in(self.folder) if looks else [], world)[0]
        if before is not None:
            paths = [path for path in paths if step_of(path) < before]
        if not paths:
            return None
        with Activity(f"verifying {paths[-1]}", visible=self.grid.is_first):
            problem = self._problem(paths[-1], self.grid.rank, self.grid.world_size)
        problems = [text for text in all_gather_objects(problem, self.grid.world) if text]
        if not problems:
            return paths[-1]
        raise CheckpointError(
            f"{paths[-1]} is damaged: {problems[0]}; {self._previous(paths[:-1])}"
        )

    def _previous(self, older: Iterable[AnyPath]) -> str:
        for path in reversed(list(older)):
            if self._problem(path, 0, 1) is None:
                return (
                    f"the previous complete checkpoint is {path}: remove the damaged folder to "
                    "resume from there"
                )
        return "there is no complete checkpoint before it"

    @staticmethod
    def _problem(path: AnyPath, rank: int, world_size: int) -> str | None:
        files, broken = manifest.read(path)
        if broken:
            return broken
        return manifest.problem(path, files, manifest.share_of(list(files), rank, world_size))

    def load(self, path: AnyPath, tensors: Mapping[str, list[TensorBox] | Tensor]) -> None:
        """Copies a verified checkpoint into live tensors, at any topology; every rank calls it.

        `tensors` are the boxes of this rank by name; it reads only these. Raises CheckpointError on
        all ranks, naming the first tensor that is missing, of another shape, or on no rank.
        """
        boxes = as_boxes(tensors)
        reader = self._reader(path)
        shapes = CheckpointReader(path, reader).shapes
        problems = all_gather_objects(find_mismatch(shapes, boxes), self.grid.world)
        problem = next(filter(None, problems), None) or self._unknown_tensor(shapes, boxes)
        if problem:
            raise CheckpointError(f"{path}: {problem}")
        with Activity(f"loading {path}", visible=self.grid.is_first):
            load_boxes(reader, boxes, self.grid.world.group)

    def _reader(self, path: AnyPath) -> HuggingFaceStorageReader:
        """Returns torch's reader; in object storage, each rank reads a share of the headers."""
        if isinstance(path, Path):
            return open_reader(path)
        world = self.grid.world
        share = weight_files(path)[world.rank :: world.size]
        entries = on_all_ranks(lambda: read_entries(path, share), world)
        return open_reader(path, [entry for some in entries for entry in some])

    def _unknown_tensor(self, shapes: Mapping[str, Shape], boxes: Boxes) -> str | None:
        """Returns a clause about a tensor of the checkpoint that no rank has, or None."""
        names = sorted(name for name in shapes if not is_routing(name))
        is_local = torch.tensor([name in boxes for name in names], dtype=torch.int32)
        counts = all_reduce_(is_local, self.grid.world).tolist()
        unknown = [name for name, count in zip(names, counts, strict=True) if count == 0]
        return f"holds {unknown[0]}, which this run's model does not have" if unknown else None


def as_boxes(tensors: Mapping[str, list[TensorBox] | Tensor]) -> Boxes:
    """Returns a rank's boxes; a plain tensor is not sharded."""
    return {n: [TensorBox.unsharded(t)] if isinstance(t, Tensor) else t for n, t in tensors.items()}


def as_document(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of `state.json`."""
    return {"format": FORMAT, **state}


def find_mismatch(shapes: Mapping[str, Shape], boxes: Boxes) -> str | None:
    """Returns why a checkpoint with these unsharded shapes does not fit the boxes, or None."""
    for name, some in boxes.items():
        if name not in shapes:
            return f"holds no tensor {name}, which this run needs"
        if some and shapes[name] != some[0].shape:
            return (
                f"{name} has the shape {list(shapes[name])}, while this run's model has "
                f"{list(some[0].shape)}"
            )
    return None


def read_state(path: AnyPath) -> dict[str, Any]:
    """Reads `state.json` of a complete checkpoint, whose name may begin with an attempt's token.

    Raises CheckpointError for another format.
    """
    names = manifest.read(path)[0]
    name = next((name for name in names if name.endswith(STATE_FILE)), STATE_FILE)
    state: dict[str, Any] = json.loads((path / name).read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: has checkpoint format {state.get('format')!r}, this version reads {FORMAT}"
        )
    return state


def check_model(path: AnyPath, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises CheckpointError naming the first field in which the two model configs differ."""
    for field in ours:
        if field not in saved or rule_of(f"model.{field}") is not Rule.SAME:
            continue
        if saved[field] != ours[field]:
            raise CheckpointError(
                f"{path}: is of another model: model.{field} is {saved[field]!r} there and "
                f"{ours[field]!r} in this run's config"
            )
