"""The report's section on loss spikes."""

from trainer.config import RunConfig, load_config
from trainer.report.layers import events_section

CONFIG = "configs/debug.yaml"
EVENT = {
    "spike_step": 3,
    "reason": "the loss is 9",
    "restored_step": 1,
    "rollbacks": 1,
    "skipped_batch": None,
    "anticipation_end": None,
    "stop_reason": None,
}


def test_steps_without_a_finite_loss_are_not_skipped_batches() -> None:
    config: RunConfig = load_config(CONFIG)
    finite = {"step": 1, "loss": 3.0, "tokens_per_second": 100.0}
    not_finite = {"step": 2, "tokens_per_second": 100.0}
    skipped = {"step": 3, "tokens_per_second": 0.0}
    page = events_section(config, [finite, not_finite, skipped], [EVENT])
    assert "Skipped batches: 1." in page
