"""metrics.jsonl of a run of version 0.1, and one with damaged lines."""

import json
from pathlib import Path

import pytest

from launch.sweep_search import read_history
from trainer.metrics.jsonl import MetricsFile, read_events, read_metrics

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


def test_lines_that_are_no_records_are_dropped_and_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged = b'{"step": 2, "loss": \xff}\n' + b"7\n[]\n" + b'{"loss": 1}\n\0\0\0'
    content = b'{"step": 1, "loss": 2.0}\n' + damaged
    path.write_bytes(content)
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}] and not read_events(path)
    assert read_history(path, "loss", 1) == [2.0]
    lines: list[str] = []
    MetricsFile(path, 1, lines.append).close()
    assert path.read_bytes() == b'{"step": 1, "loss": 2.0}\n'
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content
    assert len(lines) == 1 and "4 lines of" in lines[0] and "damaged" in lines[0]

    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')  # torn by a crash
    MetricsFile(path, 1, lines.append).close()
    assert path.read_bytes() == b'{"step": 1, "loss": 2.0}\n' and len(lines) == 1


NEW_EVENT = {
    "spike_step": 3,
    "reason": "a spike",
    "restored_step": 2,
    "skipped_batch": None,
    "anticipation_end": None,
    "stop_reason": None,
}


@pytest.mark.parametrize(
    "record",
    [
        {"loss": "2.0"},
        {"layers": 3},
        {"layers": {"expert_load_max": 1.0}},
        {"groups": {"update_rms": 1.0}},
        {"epochs": {"words": "1"}},
        {"validation_by_source": []},
        {"event": None},
        {"event": {}},
        {"event": NEW_EVENT | {"reason": None}},
        {"event": NEW_EVENT | {"restored_step": None}},
        {"event": NEW_EVENT | {"skipped_batch": "2"}},
    ],
)
def test_values_of_other_types_are_no_records(tmp_path: Path, record: dict) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [{"step": 1, "loss": None, "epochs": {"words": 0.5}}, {"step": 1, "event": NEW_EVENT}]
    lines = [json.dumps(line) + "\n" for line in (*good, {"step": 2, **record})]
    path.write_text("".join(lines))
    assert read_metrics(path) == good[:1] and read_events(path) == [(1, NEW_EVENT)]
    logged: list[str] = []
    MetricsFile(path, 9, logged.append).close()
    assert path.read_text() == "".join(lines[:2])
    assert len(logged) == 1 and "1 lines of" in logged[0]
