"""The metrics of a run: `metrics.jsonl`, wandb, TensorBoard, a progress line; on rank 0."""

import time
from collections.abc import Sequence

from trainer.config import RunConfig
from trainer.device import DeviceInfo
from trainer.metrics.jsonl import Event, MetricsFile, Record
from trainer.metrics.progress import Progress
from trainer.metrics.rank_times import RankTimes
from trainer.metrics.tensorboard_log import TensorBoardLog
from trainer.metrics.wandb_log import WandbLog
from trainer.parallel.grid import Grid
from trainer.state import TrainState
from trainer.step import StepResult

_WHERE_DUE = (
    *("validation_loss", "validation_bits_per_byte", "validation_by_source"),
    *("validation_bits_per_byte_by_source", "samples", "tasks", "post", "layers", "groups"),
)
"""Fields of a result that few steps have."""


def describe_event(event: Event) -> str:
    """Returns a line about a rollback."""
    parts = []
    if event["restored_step"] is not None:
        parts.append(f"rolled back to the state after step {event['restored_step']}")
    if event["anticipation_end"] is not None:
        parts.append(f"anticipatory routing to step {event['anticipation_end']}")
    if event["skipped_batch"] is not None:
        parts.append("this batch will be skipped")
    if event["stop_reason"] is not None:
        parts.append(f"the run ends, since {event['stop_reason']}")
    return f"step {event['spike_step']}: {event['reason']}; {', '.join(parts)}"


class Metrics:
    """Writes a record for every step. Lives on the first rank only."""

    def __init__(
        self, config: RunConfig, state: TrainState, grid: Grid, hosts: Sequence[str] = ("",)
    ) -> None:
        """Opens the file and the services; `hosts` are those of all ranks."""
        self.config = config
        self.world_size = grid.world_size
        self.peak_tflops = config.metrics.peak_tflops
        if self.peak_tflops is None and config.precision != "fp32":
            self.peak_tflops = DeviceInfo.of(grid.device).peak_tflops
        self.progress = Progress(config.recipe.steps, state.step, config.metrics.every)
        self.file = MetricsFile(config.run_dir / "metrics.jsonl", state.step, self.log)
        self.wandb = WandbLog(config, self.log)
        self.tensorboard: TensorBoardLog | None = None
        if config.metrics.tensorboard:
            self.tensorboard = TensorBoardLog(config.run_dir, state.step, self.log)
        self.rank_times = RankTimes(hosts, grid.pipeline.size, self.log)
        self._of_ranks: Record = {}

    def write(self, state: TrainState, result: StepResult) -> None:
        """Writes a step's record into the file, before an evaluation that may fail."""
        self.rank_times.add(state.step, result.work_seconds)
        self._of_ranks = self.rank_times.take() if self._is_due(state.step) else {}
        self.file.write(self.record(state, result))

    def publish(self, state: TrainState, result: StepResult) -> None:
        """Adds the results of an evaluation to the record; sends it to wandb, and shows it."""
        record = self.record(state, result)
        if is_evaluated := result.validation_loss is not None or result.tasks is not None:
            self.file.write(record, replaces_last=True)
        if self._is_due(state.step) or is_evaluated or "layers" in record:
            self.wandb.log(record)
            if self.tensorboard is not None:
                self.tensorboard.log(record)
        self.progress.update(record)

    def _is_due(self, step: int) -> bool:
        return step % self.config.metrics.every == 0

    def log(self, message: str) -> None:
        """Prints a line."""
        self.progress.log(message)

    def log_event(self, state: TrainState, event: Event) -> None:
        """Writes at once that the run has rolled back to `state.step`."""
        self.file.write({"step": state.step, "event": event})
        self.wandb.log({"step": state.step, "rollbacks": state.rollbacks, "event": event["reason"]})

    def record(self, state: TrainState, result: StepResult) -> Record:
        """Returns the step's object; metrics.jsonl has null for a number that is not finite."""
        record: Record = {
            "step": state.step,
            "tokens": state.tokens,
            "epochs": result.epochs,
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
        for name in _WHERE_DUE:
            if (value := getattr(result, name)) is not None:
                record[name] = value
        record |= self._of_ranks
        record["skipped_steps"] = state.skipped_steps
        record["failed_saves"] = state.failed_saves
        record["rollbacks"] = state.rollbacks
        record["anticipatory_routing"] = state.anticipatory_routing_at(state.step - 1)
        return record

    def close(self, exit_code: int) -> None:
        """Flushes the file and ends the progress line and the wandb run."""
        self.progress.close()
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        self.wandb.close(exit_code)
