"""Checkpoints: logical tensors in safetensors, published atomically.

    checkpoints/step-00000020/
        shard-00001-model-00001-of-00001.safetensors   what rank 0 wrote: files of at most 1 GiB,
        shard-00001-model-00002-of-00001.safetensors   or one tensor; and so on for each rank
        state.json      step, tokens, seed, digests, the model's config
        manifest.json   size and SHA-256 of every other file

torch.distributed.checkpoint plans who writes what and opens the result at any topology: a tensor
that ranks split stands in their files in pieces, with the place of each in the file's header. Its
safetensors storage writes no metadata file of its own: the reader builds it from the safetensors
headers, so nothing from the disk is ever unpickled. All ranks need to see the same folder.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import fsync_folder
from trainer.checkpoint import manifest
from trainer.checkpoint.all_ranks import on_all_ranks
from trainer.checkpoint.logical_tensors import Boxes, TensorBox, is_routing
from trainer.errors import CheckpointError, SaveError
from trainer.files import remove_folder, write_synced
from trainer.parallel.collectives import gather_objects, sum_
from trainer.parallel.grid import Grid
from trainer.parallel.placement import Shape

FORMAT = 1
_NAME = re.compile(r"^step-(\d{8,})$")

# Fields of the model's config that change neither what a tensor holds nor how it is used: a run
# may go on with another value.
FREE_FIELDS = frozenset(
    {"mtp_loss_weight", "balance_loss_weight", "initializer_range", "max_position_embeddings"}
)
_FREE_PREFIX = "hc_init_"


def folder_name(step: int) -> str:
    """`step-%08d`."""
    return f"step-{step:08d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first; temporary folders are not among them."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.match(p.name))]
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The step in the name of a published checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def model_digest(model: dict[str, Any]) -> str:
    """SHA-256 of a model's config, in hexadecimal."""
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()


class CheckpointFolder:
    """The `checkpoints/` folder of a run, seen by all ranks of a grid."""

    def __init__(self, folder: Path, grid: Grid, keep: int = 0) -> None:
        self.folder = folder
        self.grid = grid
        self.keep = keep

    def save(
        self,
        step: int,
        tensors: Mapping[str, list[TensorBox] | Tensor],
        state: dict[str, Any],
        last: bool = False,
    ) -> Path:
        """Write one checkpoint and prune old ones; every rank calls it.

        `tensors` are what this rank holds, by name; a plain tensor is whole. `state` is what
        `state.json` holds. Returns the published folder. Raises SaveError on all ranks when any
        of them could not write, with nothing left behind and nothing else touched. With `last`,
        one of this step that is there stays, and those of later steps are removed.
        """
        target = self.folder / folder_name(step)
        aside = target.with_name(f".{target.name}.tmp")
        parts, world = _parts(tensors), self.grid.world
        if last and all(on_all_ranks(target.is_dir, world)):
            self._remove_later(step)
            return target
        document = {"format": FORMAT, **state}
        try:
            on_all_ranks(lambda: self._prepare(aside), world)
            on_all_ranks(lambda: self._write_shards(aside, parts), world)
            files = on_all_ranks(lambda: self._record_share(aside), world)
            on_all_ranks(lambda: self._publish(aside, target, files, document), world)
        except OSError as error:
            if self.grid.is_first:
                shutil.rmtree(aside, ignore_errors=True)
            reason = error.strerror or type(error).__name__
            raise SaveError(
                f"{target}: the checkpoint could not be written: {reason}{self._left()}"
            ) from None
        if last:
            self._remove_later(step)
        if self.grid.is_first and self.keep:
            for old in checkpoints_in(self.folder)[: -self.keep]:
                remove_folder(old)
        return target

    def _remove_later(self, step: int) -> None:
        if self.grid.is_first:
            for path in checkpoints_in(self.folder):
                if step_of(path) > step:
                    remove_folder(path)

    def _prepare(self, aside: Path) -> None:
        if self.grid.is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def _write_shards(self, aside: Path, parts: Boxes) -> None:
        from trainer.checkpoint.dcp_planners import save_boxes  # takes a second to import

        save_boxes(aside, parts, self.grid.world.group)

    def _record_share(self, aside: Path) -> dict[str, manifest.FileRecord]:
        names = [path.name for path in aside.glob("*.safetensors")]
        return manifest.record(
            aside, manifest.share_of(names, self.grid.rank, self.grid.world_size)
        )

    def _publish(
        self,
        aside: Path,
        target: Path,
        shards: list[dict[str, manifest.FileRecord]],
        state: dict[str, Any],
    ) -> None:
        if not self.grid.is_first:
            return
        write_synced(aside / "state.json", json.dumps(state, indent=1) + "\n")
        files = manifest.record(aside, ["state.json"])
        for part in shards:
            files |= part
        manifest.write(aside, files)
        fsync_folder(aside)
        aside.rename(target)
        fsync_folder(target.parent)

    def _left(self) -> str:
        whole = checkpoints_in(self.folder)
        return f"; the newest whole one is {whole[-1]}" if whole else "; there is none before it"

    def newest(self, before: int | None = None) -> Path | None:
        """The newest checkpoint, verified byte by byte by all ranks together, or None.

        With `before`, the newest of those with a lower step.
        Raises CheckpointError when it is damaged, naming the previous whole one.
        """
        found = checkpoints_in(self.folder)
        if before is not None:
            found = [path for path in found if step_of(path) < before]
        if not found:
            return None
        problem = self._problem(found[-1], self.grid.rank, self.grid.world_size)
        problems = [text for text in gather_objects(problem, self.grid.world) if text]
        if not problems:
            return found[-1]
        raise CheckpointError(
            f"{found[-1]} is damaged: {problems[0]}; {self._previous(found[:-1])}"
        )

    def _previous(self, older: Iterable[Path]) -> str:
        for path in reversed(list(older)):
            if self._problem(path, 0, 1) is None:
                return (
                    f"the previous whole checkpoint is {path}: remove the damaged folder to "
                    "resume from there"
                )
        return "there is no whole checkpoint before it"

    @staticmethod
    def _problem(path: Path, rank: int, world_size: int) -> str | None:
        files, broken = manifest.read(path)
        if broken:
            return broken
        return manifest.problem(path, files, manifest.share_of(list(files), rank, world_size))

    def load(self, path: Path, tensors: Mapping[str, list[TensorBox] | Tensor]) -> None:
        """Copy a verified checkpoint into live tensors, at any topology; every rank calls it.

        `tensors` are what this rank holds, by name; it reads no more than that. Raises
        CheckpointError on all ranks, naming the first tensor that is missing, of another shape,
        or held by no rank.
        """
        from trainer.checkpoint.dcp_planners import load_boxes  # takes a second to import
        from trainer.checkpoint.reader import CheckpointReader

        parts = _parts(tensors)
        shapes = CheckpointReader(path).shapes
        problems = gather_objects(misfit(shapes, parts), self.grid.world)
        problem = next(filter(None, problems), None) or self._unclaimed(shapes, parts)
        if problem:
            raise CheckpointError(f"{path}: {problem}")
        load_boxes(path, parts, self.grid.world.group)

    def _unclaimed(self, shapes: Mapping[str, Shape], parts: Boxes) -> str | None:
        """What the checkpoint holds and no rank has; the same answer on all ranks."""
        names = sorted(name for name in shapes if not is_routing(name))
        held = torch.tensor([name in parts for name in names], dtype=torch.int32)
        holders = sum_(held, self.grid.world).tolist()
        extra = [name for name, count in zip(names, holders, strict=True) if count == 0]
        return f"holds {extra[0]}, which this run's model does not have" if extra else None


def _parts(tensors: Mapping[str, list[TensorBox] | Tensor]) -> Boxes:
    return {n: [TensorBox.whole(t)] if isinstance(t, Tensor) else t for n, t in tensors.items()}


def misfit(shapes: Mapping[str, Shape], parts: Boxes) -> str | None:
    """What a checkpoint with tensors of these whole shapes lacks for the parts, or None."""
    for name, some in parts.items():
        if name not in shapes:
            return f"holds no tensor {name}, which this run needs"
        if some and shapes[name] != some[0].shape:
            return (
                f"{name} has the shape {list(shapes[name])}, while this run's model has "
                f"{list(some[0].shape)}"
            )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a whole checkpoint. Raises CheckpointError for another format."""
    state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: has checkpoint format {state.get('format')!r}, this version reads {FORMAT}"
        )
    return state


def check_model(path: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise CheckpointError naming the first field in which the two model configs differ."""
    for field in ours:
        if field not in saved or field in FREE_FIELDS or field.startswith(_FREE_PREFIX):
            continue
        if saved[field] != ours[field]:
            raise CheckpointError(
                f"{path}: is of another model: model.{field} is {saved[field]!r} there and "
                f"{ours[field]!r} in this run's config"
            )
