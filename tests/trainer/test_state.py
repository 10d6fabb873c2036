"""The progress in a checkpoint, also in one whose fields had earlier names."""

from trainer.state import TrainState

EARLIER = {
    "step": 7,
    "tokens": 90,
    "skipped_steps": 2,
    "skipped_in_row": 1,
    "anticipation_since": 3,
    "anticipation_until": 9,
    "rollbacks": 1,
    "suspects": [4],
    "left_out": [5],
    "history": {"loss": [1.0], "busiest": [0.5], "busiest'": [0.25]},
}


def test_a_checkpoint_of_version_0_1_gives_every_field() -> None:
    state = TrainState()
    state.restore(EARLIER)
    assert state == TrainState(
        step=7,
        tokens=90,
        skipped_steps=2,
        consecutive_skips=1,
        skipping_since=6,
        anticipation_start=3,
        anticipation_end=9,
        rollbacks=1,
        spike_steps=[4],
        skipped_batches=[5],
        history={"loss": [1.0], "max_expert_share": [0.5], "max_expert_share'": [0.25]},
    )


def test_what_is_saved_is_restored() -> None:
    state, copy = TrainState(step=3, spike_steps=[1], history={"loss": [2.0]}), TrainState()
    copy.restore(state.to_dict())
    assert copy == state
