"""How a run is kept stable: anticipatory routing and spikes. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.config.section import Section


class AnticipatoryRoutingConfig(Section):
    """Experts chosen with the weights of some steps ago (REP 4.2.3)."""

    when: Literal["never", "after_spikes", "always"] = "after_spikes"
    """`after_spikes`: for `active_steps` steps after a spike, where `stability.spikes` is set;
    `always`: from the first step to the last."""
    lag_steps: NonNegativeInt = 3
    """By how many steps; unpublished (L). What it costs does not depend on it, but for the memory
    of the choices that wait. 0 chooses with the present weights, as plain training does."""
    active_steps: PositiveInt = 100
    """For how long after a spike; unpublished (L)."""


class SpikeConfig(Section):
    """What counts as a spike and what is done about it. REP says no more than that there is a
    detector and a short rollback: all numbers here are our choice."""

    median_window: PositiveInt = 16
    """Steps whose median a step is compared with."""
    deviation_window: PositiveInt = 128
    """Steps whose distances from their own recent medians say what is usual."""
    min_history: PositiveInt = 32
    """How many of them there have to be before a step is judged."""
    threshold: PositiveFloat = 6.0
    """From how many robust deviations on a step is a spike."""
    min_loss_deviation: PositiveFloat = 0.05
    """Least deviation of the loss, in nats."""
    min_grad_norm_deviation: PositiveFloat = 0.25
    """Least deviation of the gradient norm's logarithm."""
    min_router_deviation: PositiveFloat = 0.02
    """Least deviation of a router's mean share of the first choice."""
    router_collapse_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Share of a step's tokens that go to one expert of a learned layer from which its router has
    collapsed, unless half as many went there all along."""
    snapshot_every: NonNegativeInt = 20
    """Steps between copies of weights and optimizer on the host; 0 turns back to checkpoints
    only."""
    min_rollback_steps: PositiveInt = 5
    """Least number of steps that a run turns back."""
    max_rollbacks: NonNegativeInt = 10
    """Rollbacks of a whole run; one more spike ends it."""
    skip_bad_batches: bool = True
    """Pass over a batch at whose step a spike was seen twice: what comes once, such as a fault of
    the machine, is not the batch's, and costs no data."""

    @property
    def snapshots(self) -> int:
        """Copies held at most: the newest that is old enough to turn back to, and later ones."""
        return 1 + -(-self.min_rollback_steps // self.snapshot_every) if self.snapshot_every else 0


class StabilityConfig(Section):
    """See docs/stability.md."""

    anticipatory_routing: AnticipatoryRoutingConfig = AnticipatoryRoutingConfig()
    spikes: SpikeConfig | None = None
    """Null, the default, only skips steps that are not finite: a run that turns back by itself
    holds copies of all its states, and is for recipes to ask for."""
