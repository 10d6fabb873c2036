"""The timeline of each rank of a pipeline, from torch's schedules."""

from __future__ import annotations

from typing import Any

from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

Slot = tuple[float, float, str, int, int]
"""Start, length, kind (F, I, W), stage and microbatch."""


def timeline(schedule: str, ranks: int, microbatches: int, chunks: int) -> list[list[Slot]]:
    """Returns the slots of each rank: torch's order, each action as soon as its inputs are ready.

    Forward of a rank's layers takes 1, backward of inputs 1 and of weights 1; one of several
    stages of a rank takes its share of that. Communication takes no time.
    """
    orders = get_schedule_ops(schedule, ranks, microbatches, chunks if chunks > 1 else None)
    waiting = [[part for action in order for part in parts_of(action)] for order in orders]
    if chunks == 1:
        waiting = [from_zero(queue) for queue in waiting]
    unit, last = 1 / chunks, ranks * chunks - 1
    done: dict[tuple[str, int, int], float] = {}
    lines: list[list[Slot]] = [[] for _ in range(ranks)]
    free = [0.0] * ranks
    while any(waiting):
        moved = False
        for rank, queue in enumerate(waiting):
            while queue:
                kind, stage, micro = queue[0]
                needs = [needed(kind, stage, micro, last)] if kind != "W" else []
                needs = [need for need in needs if need]
                if any(need not in done for need in needs):
                    break
                begin = max([free[rank], *(done[need] for need in needs)])
                for part in {"B": ("I", "W")}.get(kind, (kind,)):
                    lines[rank].append((begin, unit, part, stage, micro))
                    begin += unit
                free[rank] = begin
                done["I" if kind == "B" else kind, stage, micro] = begin
                queue.pop(0)
                moved = True
        assert moved, "deadlock in the schedule"
    return lines


def parts_of(action: Any) -> list[tuple[str, int, int]]:
    """Returns the F, I, W or undivided B parts of one of torch's actions, in order."""
    if action is None:
        return []
    if action.sub_actions:
        return [part for sub in action.sub_actions for part in parts_of(sub)]
    kinds = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "B"}
    kind = kinds.get(action.computation_type.name)
    if kind is None:
        return []
    return [(kind, action.stage_index, action.microbatch_index)]


def from_zero(queue: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Renumbers microbatches: torch 2.13 lists the last rank's forwards of 1F1B as 1 to n."""
    first = min(micro for kind, _, micro in queue if kind == "F")
    return [(kind, stage, micro - first * (kind == "F")) for kind, stage, micro in queue]


def needed(kind: str, stage: int, micro: int, last: int) -> tuple[str, int, int] | None:
    """Returns what must be done first: by the previous stage, or for gradients by the next one."""
    if kind == "F":
        return ("F", stage - 1, micro) if stage else None
    return ("I", stage + 1, micro) if stage < last else ("F", stage, micro)
