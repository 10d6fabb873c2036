"""What a run reports: `metrics.jsonl`, wandb, and a progress line on the first rank."""

import math
import time

from trainer.config import RunConfig
from trainer.device import DeviceInfo
from trainer.metrics.jsonl import Event, MetricsFile, Record
from trainer.metrics.progress import Progress
from trainer.metrics.wandb_log import WandbLog
from trainer.parallel.grid import Grid
from trainer.state import TrainState
from trainer.step import StepResult


def describe_event(event: Event) -> str:
    """A line about it."""
    parts = []
    if event["back_to"] is not None:
        parts.append(f"back to the state after step {event['back_to']}")
    if event["anticipation_until"] is not None:
        parts.append(f"anticipatory routing to step {event['anticipation_until']}")
    if event["left_out"] is not None:
        parts.append("this batch will be left out")
    if event["stopped"] is not None:
        parts.append(f"the run ends, since {event['stopped']}")
    return f"step {event['seen_at']}: {event['what']}; {', '.join(parts)}"


class Metrics:
    """Periodic hook that turns a step's result into one record. Lives on the first rank only."""

    def __init__(self, config: RunConfig, state: TrainState, grid: Grid) -> None:
        self.config = config
        self.world_size = grid.world_size
        self.peak_tflops = config.metrics.peak_tflops
        if self.peak_tflops is None and config.precision != "fp32":
            self.peak_tflops = DeviceInfo.of(grid.device).peak_tflops
        self.file = MetricsFile(config.run_dir / "metrics.jsonl", state.step)
        self.wandb = WandbLog(config)
        self.progress = Progress(config.steps, state.step, config.metrics.every)

    def __call__(self, state: TrainState, result: StepResult) -> None:
        record = self.record(state, result)
        self.file.write(record)
        due = state.step % self.config.metrics.every == 0
        if due or "validation_loss" in record or "layers" in record:
            self.wandb.log(record)
        self.progress.update(record)

    def event(self, state: TrainState, event: Event) -> None:
        """Tell at once that the run has turned back to `state.step`."""
        self.file.write({"step": state.step, "event": event})
        self.wandb.log({"step": state.step, "rollbacks": state.rollbacks, "event": event["what"]})

    def record(self, state: TrainState, result: StepResult) -> Record:
        """The step's object, JSON-ready; numbers that are not finite are left out."""
        record: Record = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": result.loss,
            "lm_loss": result.lm_loss,
            "mtp_loss": result.mtp_loss,
            "balance_loss": result.balance_loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "expert_load_max": result.expert_load_max,
            "expert_load_min": result.expert_load_min,
            "seconds": result.seconds,
            "tokens_per_second": result.tokens / result.seconds,
            "tflops_per_second": result.flops / result.seconds / 1e12,
            "time": time.time(),
        }
        if self.peak_tflops is not None:
            record["mfu"] = record["tflops_per_second"] / (self.peak_tflops * self.world_size)
        if self.config.phases:
            record["phase"] = result.phase
            record["indexer_loss"] = result.indexer_loss
        if result.validation_loss is not None:
            record["validation_loss"] = result.validation_loss
        if result.validation_by_source is not None:
            record["validation_by_source"] = result.validation_by_source
        if result.layers is not None:
            record["layers"] = result.layers
        if result.groups is not None:
            record["groups"] = result.groups
        record["skipped_steps"] = state.skipped_steps
        record["rollbacks"] = state.rollbacks
        record["anticipates"] = state.anticipates(state.step - 1)
        # A skipped step may have numbers that JSON has no word for.
        return {
            key: value
            for key, value in record.items()
            if not isinstance(value, float) or math.isfinite(value)
        }

    def close(self) -> None:
        """Flush the file, end the progress line and the wandb run."""
        self.progress.close()
        self.file.close()
        self.wandb.close()
