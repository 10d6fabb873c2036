"""Settings of anticipatory routing and spike detection. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.config.section import Section


class AnticipatoryRoutingConfig(Section):
    """Experts selected with the weights of some steps earlier (report §4.2.3)."""

    when: Literal["never", "after_spikes", "always"] = "after_spikes"
    """`after_spikes`: for `active_steps` steps after a spike, where `stability.spikes` is set;
    `always`: from the first step to the last."""
    lag_steps: Annotated[int, Field(ge=0, le=1000)] = 3
    """Age of the weights that select the experts; unpublished. It affects the memory of pending
    selections, not the time; with 0 the results are those of plain training. [steps]"""
    active_steps: PositiveInt = 100
    """Duration after a spike; unpublished. [steps]"""


class SpikeConfig(Section):
    """Detection of loss spikes, and rollback. The report (§4.2.3) has no numbers; these are
    choices."""

    median_window: PositiveInt = 16
    """A step is compared with the median of this many steps before it. [steps]"""
    deviation_window: PositiveInt = 128
    """Number of past steps whose distances from the medians before them define the usual deviation.
    [steps]"""
    min_history: PositiveInt = 32
    """Minimum number of such steps before loss, gradient norm or routers' top-1 shares can be
    outliers; a collapsed router needs `median_window` steps. [steps]"""
    threshold: PositiveFloat = 6.0
    """Minimum distance of a spike from the median, in robust standard deviations."""
    min_loss_deviation: PositiveFloat = 0.05
    """Lower bound of the loss's deviation. [nats]"""
    min_grad_norm_deviation: PositiveFloat = 0.25
    """Lower bound of the deviation of the gradient norm's logarithm."""
    min_router_deviation: PositiveFloat = 0.02
    """Lower bound of the deviation of a router's mean top-1 weight share."""
    router_collapse_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """A router has collapsed if one expert of a learned layer gets at least this share of a step's
    tokens, unless the median of the largest such share over the steps before was more than half of
    this setting."""
    snapshot_every: NonNegativeInt = 20
    """Interval of copies of weights and optimizer in the host's memory; 0 rolls back to checkpoints
    only. [steps]"""
    min_rollback_steps: PositiveInt = 5
    """Minimum length of a rollback. [steps]"""
    max_rollbacks: NonNegativeInt = 10
    """Maximum rollbacks of a run; one more spike ends it. [rollbacks]"""
    skip_bad_batches: bool = True
    """Skip a batch whose step was a spike twice. A spike that does not recur, such as one from a
    hardware fault, costs no data."""

    @property
    def snapshots(self) -> int:
        """Maximum copies in memory: the newest one old enough for a rollback, and later ones."""
        return 1 + -(-self.min_rollback_steps // self.snapshot_every) if self.snapshot_every else 0


class StabilityConfig(Section):
    """Anticipatory routing, and rollback after loss spikes; see docs/stability.md."""

    anticipatory_routing: AnticipatoryRoutingConfig = AnticipatoryRoutingConfig()
    spikes: SpikeConfig | None = None
    """Null only skips steps that are not finite; `{}` detects spikes with the defaults, and keeps
    copies of weights and optimizer in the host's memory."""
