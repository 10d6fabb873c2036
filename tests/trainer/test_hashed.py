"""A model whose layers are all hash-routed, without MTP: no router learns."""

from pathlib import Path

from tests.trainer.tiny import train
from trainer.metrics.jsonl import read_metrics

HASHED = ["model.num_hash_layers=3", "model.num_nextn_predict_layers=0"]


def test_it_trains_with_stats_spikes_and_a_report(tiny: Path, tmp_path: Path) -> None:
    train(
        tiny,
        tmp_path,
        *HASHED,
        "steps=3",
        "metrics.layer_stats_every=1",
        "stability.spikes={median_window: 1, min_history: 1}",
    )
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[-1]["layers"]["router_bias_max"] == [None] * 3
    assert records[-1]["expert_load_max"] >= 1.0
