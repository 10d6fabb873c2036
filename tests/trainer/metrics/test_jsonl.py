"""metrics.jsonl of a run of version 0.1 is read with the keys of today."""

import json
from pathlib import Path

from trainer.metrics.jsonl import read_events, read_metrics

STEP = {
    "step": 2,
    "loss": 1.5,
    "heldout_loss": 1.25,
    "heldout_by_source": {"a": 1.0},
    "stage": 1,
    "anticipates": True,
    "layers": {"experts_dead": [0.0], "comb_departure": [0.5], "clamped": [0.25], "sink": [1.0]},
}
EVENT = {
    "seen_at": 3,
    "what": "the loss",
    "back_to": 1,
    "left_out": None,
    "anticipation_until": 5,
    "stopped": None,
}


def test_earlier_keys_are_renamed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = (STEP, {"step": 1, "event": EVENT})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (record,) = read_metrics(path)
    assert record == {
        "step": 2,
        "loss": 1.5,
        "validation_loss": 1.25,
        "validation_by_source": {"a": 1.0},
        "phase": 1,
        "anticipatory_routing": True,
        "layers": {
            "dead_expert_share": [0.0],
            "comb_sum_error": [0.5],
            "swiglu_clamped_share": [0.25],
            "sink": [1.0],
        },
    }
    assert read_events(path) == [
        (
            1,
            {
                "spike_step": 3,
                "reason": "the loss",
                "restored_step": 1,
                "skipped_batch": None,
                "anticipation_end": 5,
                "stop_reason": None,
            },
        )
    ]
