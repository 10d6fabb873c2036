"""What a checkpoint records about a run's data, and how a resume compares it.

The rows of a step are a function of (seed, step) for one config and one preparation of the shards.
With others, the same steps would read rows that earlier steps have read, and never read others. So
a resume with other rows is refused, with two exceptions:

- In a run without phases, `data.global_batch_size` may change: the next step begins with the row
  after the last one read.
- `data.accept_change_at` accepts any change at one step: rows go on after the packing window in
  progress, the rest of which is left out. If the run then rolls back to a checkpoint from before
  that step, the change holds from there.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from data.config import DataPhase
from data.errors import DataError
from data.rows.loader import Loader, Place

Saved = dict[str, Any]

_SETTINGS = ("packing", "packing_window", "packing_fill", "transforms")
_BATCH_SIZE = "global_batch_size"
_CONFIG_KEYS = {"steps": "until_tokens, in steps,", "rampup_steps": "rampup_tokens, in steps,"}
"""Keys of the config behind the fields of DataPhase."""
_ROW_KEYS = ("seq_len", _BATCH_SIZE, "initial_batch_size", "rampup_steps", "source_weights")

Change = tuple[str, Any, Any]
"""Dotted key of the config, and its value in the checkpoint and in this run."""


class DataRecord:
    """The part of a checkpoint about the data that `loader` reads."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._has_accepted = False

    def save(self, step: int) -> Saved:
        """Returns what the checkpoint before a step records, JSON-ready."""
        loader = self.loader
        index, numbers = loader.schedule.rows_of(step)
        after_window, rows_left = loader.after_window(step)
        return {
            "shards": loader.digest,
            "settings": _settings(loader),
            "phases": _phases(loader),
            "phase": index,
            "rows_in_phase": loader.schedule.rows_in(index),
            "begun": numbers.start > 0,
            "start": asdict(loader.start),
            "place": asdict(loader.place_of(step)),
            "after_window": asdict(after_window),
            "rows_left": rows_left,
            "sources": {s.name: [s.documents, s.positions] for s in loader.sources},
        }

    def resume(self, saved: Saved | None, step: int) -> list[str]:
        """Sets the loader to the place of a checkpoint; returns lines to log.

        Raises DataError naming the first field with another value, and both values.
        """
        if saved is None:
            return ["the checkpoint does not record its data: whether it is the same is not known"]
        if (start := Place(**saved["start"])) != self.loader.start:
            self.loader.start_at(start)
        changes = list(self._changes(saved, step))
        if not changes:
            return []
        key, old, new = changes[0]
        keys = {change[0] for change in changes}
        if keys == {f"data.{_BATCH_SIZE}"}:
            self.loader.start_at(Place(**saved["place"]))
            return [f"{key} is {new} and was {old}; reading continues with the row after the last"]
        if not self._has_accepted and self.loader.config.accept_change_at != step:
            more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
            raise DataError(
                f"{key} is {new!r} in this run and {old!r} in the checkpoint of step {step}{more}, "
                "so that rows would be read twice or never; restore it, or set "
                f"data.accept_change_at={step} to leave out the rest of a packing window and go on "
                "after it."
            )
        self._has_accepted = True
        return [f"{key} is {new!r} and was {old!r}" for key, old, new in changes] + self._go_on(
            saved, step
        )

    def _go_on(self, saved: Saved, step: int) -> list[str]:
        """Begins after the window in progress; returns what is left out and what is read twice."""
        place = Place(**saved["after_window"])
        offsets, lines = {}, []
        if saved["rows_left"]:
            seq_len = saved["phases"][saved["phase"]]["seq_len"]
            lines.append(
                f"{saved['rows_left']:,} rows of {seq_len:,} tokens, the rest of a packing window, "
                "are left out"
            )
        for source in self.loader.sources:
            name, here = source.name, [source.documents, source.positions]
            known = saved["sources"].get(name)
            offset = place.offsets.get(name, 0)
            if known is None:
                lines.append(f"source {name} is new: it is read from its beginning")
            elif known != here:
                epoch, inside = divmod(offset, known[1])
                offset = -(-offset // known[1]) * source.positions
                lines.append(
                    f"source {name} has {here[0]:,} documents and had {known[0]:,}: it is read "
                    f"from the beginning of epoch {-(-place.offsets[name] // known[1]) + 1}; "
                    f"{inside:,} tokens that epoch {epoch + 1} has read are read again there, "
                    "where they are still part of it"
                )
            offsets[name] = offset
        for name in saved["sources"].keys() - offsets.keys():
            lines.append(f"source {name} is no longer read")
        index = self.loader.schedule.phase_of(step)
        group = self.loader.schedule.phases[index].global_batch_size
        self.loader.start_at(replace(place, step=step, offsets=offsets, group=group))
        return lines

    def _changes(self, saved: Saved, step: int) -> Iterator[Change]:
        """Yields what decides which rows were read up to a step, and has another value now."""
        loader = self.loader
        settings = _settings(loader)
        for key, old in saved["settings"].items():
            if settings.get(key) != old:
                yield key, old, settings.get(key)
        yield from self._phase_changes(saved, step)
        if not loader.has_shards(saved["shards"]):
            where = f"the preparation in data.shards = {loader.config.shards}"
            yield where, saved["shards"][:16], loader.digest[:16]

    def _phase_changes(self, saved: Saved, step: int) -> Iterator[Change]:
        """Yields changes of the phases that have begun; later ones are free."""
        begun, phases = saved["phase"], _phases(self.loader)
        for number, old in enumerate(saved["phases"][: begun + saved["begun"]]):
            if number >= len(phases):
                yield "the number of phases", len(saved["phases"]), len(phases)
                return
            keys = (*_ROW_KEYS, "steps") if number < begun else _ROW_KEYS
            above = "data" if phases[number]["steps"] is None else f"phases.{number}"
            for key in keys:
                if old[key] != phases[number][key]:
                    yield f"{above}.{_CONFIG_KEYS.get(key, key)}", old[key], phases[number][key]
        if saved["begun"] and begun < len(phases):
            yield from self._end_of_window(saved, begun)

    def _end_of_window(self, saved: Saved, index: int) -> Iterator[Change]:
        """Yields the end of a phase where another one cuts the window in progress differently."""
        loader, old = self.loader, saved["rows_in_phase"]
        new, size = loader.schedule.rows_in(index), loader.plans[index].rows
        row = saved["place"]["row"]
        end = -(-row // size) * size
        is_cut = row % size and old != new and min(n for n in (old, new) if n is not None) < end
        if is_cut or (new is not None and new < row):
            yield f"the number of rows of phases.{index}", old, new


def _settings(loader: Loader) -> dict[str, Any]:
    """The settings that all phases share, by dotted key."""
    settings = loader.config.model_dump(mode="json", include=set(_SETTINGS))
    flat = {f"data.{key}": settings[key] for key in _SETTINGS if key != "transforms"}
    return flat | {f"data.transforms.{key}": x for key, x in settings["transforms"].items()}


def _phases(loader: Loader) -> list[dict[str, Any]]:
    """The rows of all phases, with the weights that are in effect."""

    def values(phase: DataPhase, weights: dict[str, float]) -> dict[str, Any]:
        return {**phase.model_dump(mode="json"), "source_weights": weights}

    pairs = zip(loader.schedule.phases, loader.weights, strict=True)
    return [values(phase, weights) for phase, weights in pairs]
