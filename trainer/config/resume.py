"""What may change when a run resumes: the one table, by key of the config. Imports no torch.

The table is in docs/resume.md, too; a test keeps the two and the config's fields together.
"""

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any


class Rule(Enum):
    """What a resume does with a field that has another value than in the checkpoint."""

    FREE = "may change"
    """From the next step on, the new value counts; the change is logged."""
    ROWS = "rows"
    """Decides which rows a step reads: refused, or the place in the data is kept; see
    data/rows/resume.py."""
    CONTENT = "content"
    """Names or made files; what is compared is their content."""
    SAME = "must stay"
    """Refused, naming both values."""


RULES: dict[str, Rule] = {
    "run_dir": Rule.FREE,
    "steps": Rule.FREE,
    "seed": Rule.SAME,
    "precision": Rule.FREE,
    "engine": Rule.FREE,
    "deepspeed": Rule.FREE,
    "mtp_loss_weight_in_decay": Rule.FREE,
    "router_bias_speed": Rule.FREE,
    "quantisation": Rule.FREE,
    "kernels": Rule.FREE,
    "fit_to_memory": Rule.FREE,
    "device": Rule.FREE,
    "deterministic": Rule.FREE,
    "start_from": Rule.FREE,
    "model": Rule.SAME,
    "model.balance_loss_weight": Rule.FREE,
    "model.mtp_loss_weight": Rule.FREE,
    "model.initializer_range": Rule.FREE,
    "model.max_position_embeddings": Rule.FREE,
    "model.bos_token_id": Rule.FREE,
    "model.eos_token_id": Rule.FREE,
    "model.pad_token_id": Rule.FREE,
    "model.hc_init_scale": Rule.FREE,
    "model.hc_init_own_read": Rule.FREE,
    "model.hc_init_comb_diagonal": Rule.FREE,
    "data.sources": Rule.CONTENT,
    "data.tokenizer": Rule.CONTENT,
    "data.shards": Rule.CONTENT,
    "data.validation_fraction": Rule.CONTENT,
    "data.max_bad_record_fraction": Rule.CONTENT,
    "data.filters": Rule.CONTENT,
    "data.seq_len": Rule.ROWS,
    "data.global_batch_size": Rule.ROWS,
    "data.packing": Rule.ROWS,
    "data.packing_window": Rule.ROWS,
    "data.packing_fill": Rule.ROWS,
    "data.source_weights": Rule.ROWS,
    "data.transforms": Rule.ROWS,
    "data.assistant_only_loss": Rule.FREE,
    "data.micro_batch_size": Rule.FREE,
    "data.accept_change_at": Rule.FREE,
    "data.prefetch": Rule.FREE,
    "data.cache": Rule.FREE,
    "data.prepare_workers": Rule.FREE,
    "data.dedup_memory": Rule.FREE,
    "data.engine": Rule.FREE,
    "data.slurm": Rule.FREE,
    "data.ray": Rule.FREE,
    "data.task_attempts": Rule.FREE,
    "data.failed_tasks": Rule.FREE,
    "data.work_folder": Rule.FREE,
    "optim": Rule.FREE,
    "optim.matrix_optimizer": Rule.SAME,
    "parallel": Rule.FREE,
    "phases": Rule.FREE,
    "phases.until_tokens": Rule.ROWS,
    "phases.seq_len": Rule.ROWS,
    "phases.global_batch_size": Rule.ROWS,
    "phases.initial_batch_size": Rule.ROWS,
    "phases.rampup_tokens": Rule.ROWS,
    "phases.source_weights": Rule.ROWS,
    "post": Rule.FREE,
    "stability": Rule.FREE,
    "checkpoint": Rule.FREE,
    "metrics": Rule.FREE,
    "evaluation": Rule.FREE,
    "watchdog": Rule.FREE,
    "profile": Rule.FREE,
}
"""By the dotted key of a field, or of a section for all its fields without a rule of their own."""

_VALIDATION_ROWS = ("data.seq_len", "data.global_batch_size", "data.source_weights")
_MISSING = object()


def rule_of(key: str) -> Rule:
    """Returns the rule for a dotted key, whose list items may be numbered."""
    names = [name for name in key.split(".") if not name.isdecimal()]
    while ".".join(names) not in RULES:
        names.pop()
    return RULES[".".join(names)]


def changed_fields(saved: Mapping[str, Any] | None, ours: Mapping[str, Any]) -> list[str]:
    """Returns a line about each free field that a checkpoint's config has otherwise.

    In a run with phases those of `_VALIDATION_ROWS` are free: only the validation text has them.
    Fields with another rule are compared where they are used. `saved` is None in checkpoints that
    have no config.
    """
    if saved is None:
        return []
    free = _VALIDATION_ROWS if ours.get("phases") else ()
    return [
        f"{key} is {_short(new)} and was {_short(old)} in the checkpoint"
        for key, old, new in differences(saved, ours)
        if key != "run_dir" and (rule_of(key) is Rule.FREE or key in free)
    ]


def replaced_optimizer(saved: Mapping[str, Any] | None, ours: Mapping[str, Any]) -> str:
    """Returns a clause where a checkpoint has the states of another optimizer, else nothing.

    `saved` is None in checkpoints that have no config.
    """
    key = "matrix_optimizer"
    before = (saved or {}).get("optim", {}).get(key, ours["optim"][key])
    if before == ours["optim"][key]:
        return ""
    return (
        f"was trained with optim.{key} = {before!r}, and this run's config has "
        f"{ours['optim'][key]!r}"
    )


def _short(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)


def differences(saved: Any, ours: Any, above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields dotted key, saved value and ours of all fields in both that differ."""
    if isinstance(saved, Mapping) and isinstance(ours, Mapping):
        pairs = [(name, saved.get(name, _MISSING), ours[name]) for name in ours]
    elif isinstance(saved, list) and isinstance(ours, list) and len(saved) == len(ours):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(saved, ours, strict=True))]
    else:
        if saved != ours:
            yield above, saved, ours
        return
    for name, old, new in pairs:
        if old is not _MISSING:
            yield from differences(old, new, f"{above}.{name}" if above else name)
