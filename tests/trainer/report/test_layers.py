"""The report's sections on loss spikes and on the layers."""

from trainer.config import RunConfig, load_config
from trainer.report.layers import events_section
from trainer.report.plots import draw_layers

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


def test_a_map_of_one_sampled_step() -> None:
    page = draw_layers([{"step": 5, "layers": {"sink": [0.1, 0.2]}}, {"step": 6}], "sink", "t", "")
    assert page.count("<svg") == 1
    assert ">1<" in page and ">0.5<" not in page  # layers have whole numbers
