"""Keys of earlier versions; each is refused with one sentence that names the current key."""

from typing import Any

from trainer.config.source import Key

_RENAMED = {
    "compile": "kernels",
    "fit_device": "fit_to_memory",
    "stages": "phases",
    "data.row_length": "seq_len",
    "data.batch_rows": "global_batch_size",
    "data.micro_rows": "micro_batch_size",
    "data.heldout_fraction": "validation_fraction",
    "data.weights": "source_weights",
    "data.quarantine_share": "max_bad_record_fraction",
    "data.transforms.fim_spm": "fim_spm_rate",
    "data.transforms.split_share": "punctuation_split_rate",
    "data.filters.max_garbled": "max_garbled_fraction",
    "data.filters.generated": "generated_code",
    "data.filters.quality": "quality_rules",
    "data.filters.exact": "exact_duplicates",
    "data.filters.near": "near_duplicate_similarity",
    "data.filters.template": "template_similarity",
    "data.filters.template_group": "template_min_documents",
    "optim.muon.batch_bytes": "max_batch_bytes",
    "parallel.gradients": "grad_reduce_dtype",
    "parallel.expert_gradients": "expert_grad_reduce_dtype",
    "parallel.optimizer_padding": "max_optimizer_padding",
    "parallel.pipeline_chunks": "pipeline_stages_per_rank",
    "parallel.pipeline_layers": "pipeline_layers_per_stage",
    "phases.until": "until_tokens",
    "phases.row_length": "seq_len",
    "phases.batch_rows": "global_batch_size",
    "phases.micro_rows": "micro_batch_size",
    "phases.ramp_from": "initial_batch_size",
    "phases.ramp_tokens": "rampup_tokens",
    "phases.weights": "source_weights",
    "stability.anticipation": "anticipatory_routing",
    "stability.anticipatory_routing.lead": "lag_steps",
    "stability.anticipatory_routing.steps": "active_steps",
    "stability.spikes.recent": "median_window",
    "stability.spikes.window": "deviation_window",
    "stability.spikes.least_history": "min_history",
    "stability.spikes.loss_floor": "min_loss_deviation",
    "stability.spikes.norm_floor": "min_grad_norm_deviation",
    "stability.spikes.router_floor": "min_router_deviation",
    "stability.spikes.collapse": "router_collapse_share",
    "stability.spikes.rollback": "min_rollback_steps",
    "stability.spikes.leave_out": "skip_bad_batches",
    "metrics.layers_every": "layer_stats_every",
    "evaluation.rows": "max_rows",
    "evaluation.by_source": "per_source",
}
"""The current name by the earlier dotted key, without numbers of list items."""

_REMOVED = {
    "optim.muon.qk_clip": "V4 normalises queries and keys, so its attention logits are bounded",
}

_UNSET = {"compile": False}
"""Earlier keys with the value that asked for nothing, which the config of a run folder may have."""

_VALUES = {("data.sources.split", "heldout"): "validation"}


def _dotted(key: Key) -> str:
    return ".".join(part for part in key if isinstance(part, str))


def drop_unset(values: dict[str, Any]) -> None:
    """Removes keys of earlier versions whose value asked for nothing."""
    for key, value in _UNSET.items():
        if key in values and values[key] is value:
            del values[key]


def replaced_key(key: Key) -> str | None:
    """Returns the remedy for an unknown key that an earlier version had, or None for any other."""
    dotted = _dotted(key)
    if (name := _RENAMED.get(dotted)) is not None:
        return f"is now '{'.'.join(str(part) for part in (*key[:-1], name))}'"
    if (reason := _REMOVED.get(dotted)) is not None:
        return f"has been removed, since {reason}; omit it"
    return None


def replaced_value(key: Key, value: object) -> str | None:
    """Returns the current value for one that an earlier version had, or None for any other."""
    return _VALUES.get((_dotted(key), value)) if isinstance(value, str) else None
