"""A training run: build, resume, step after step, with what is due in between."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data import Batch, Loader, Prefetcher, Tokenizer
from model.kernel_choices import describe, kernel_choices
from trainer.build import DTYPES, open_engine
from trainer.checkpoint.run import RunCheckpoint
from trainer.config import RunConfig
from trainer.config.recipe import Phase, Recipe
from trainer.device import peak_memory_report
from trainer.engine import StepLosses
from trainer.errors import DivergedError, SaveError
from trainer.evaluate import Validation
from trainer.files import write_whole
from trainer.metrics.layer_hooks import watched
from trainer.metrics.layer_stats import layer_numbers
from trainer.metrics.metrics import Metrics, describe_event
from trainer.metrics.update_stats import GroupWatch
from trainer.parallel.grid import Grid
from trainer.signals import StopRequest
from trainer.stability.anticipation import Anticipation
from trainer.stability.rollback import Stability
from trainer.state import TrainState
from trainer.step import StepResult

Hook = Callable[[TrainState, StepResult], None]


class Trainer:
    """Trains as `config` says on the processes of `grid`; the first says `notes` at the start.

    Raises the errors of trainer.errors.USER_ERRORS for input that cannot be trained on.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: Grid,
        stop: StopRequest | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        config.check_world(grid.world_size)
        self.config = config
        self.grid = grid
        self.stop = stop or StopRequest()
        self.notes = notes
        self.state = TrainState()
        self.recipe = Recipe(config)
        tokenizer = Tokenizer(config.data.tokenizer.path)
        config.check_vocabulary(tokenizer.vocab_size)
        rows = [phase.rows for phase in self.recipe.phases]
        self.loader = Loader(config.data, config.seed, grid.data.rank, grid.data.size, phases=rows)
        pin = grid.device.type == "cuda"
        self.batches = Prefetcher(self.loader.at, config.data.prefetch, config.steps, pin)
        self.validation: Validation | None = None
        if self.loader.manifest.of_split("validation"):
            self.validation = Validation(config, grid, config.evaluation.max_rows)
        local, self.engine, self.optimizer = open_engine(config, grid)
        self.local, self.model = local, local.model
        self.anticipation = Anticipation(
            self.engine,
            grid,
            self.loader,
            self.batches.at,
            config.stability.anticipatory_routing,
            self.recipe,
        )
        self.checkpoint = RunCheckpoint(
            config,
            grid,
            self.model,
            self.optimizer,
            tokenizer.hash,
            local.placements,
            self.anticipation,
        )
        self.stability = Stability(config, self.state, self.checkpoint, self.anticipation)
        self.metrics: Metrics | None = None
        self.phase: Phase | None = None
        self.memory_told = False
        self.periodic: list[Hook] = [self._evaluate, self._report, self._tell_memory, self._save]

    def run(self) -> TrainState:
        """Train from the newest checkpoint, or from the start, to the last step or a signal."""
        self._open()
        while self.state.step < self.config.steps and not self.state.stopping:
            start = time.perf_counter()
            self.stability.before_step()
            result = self.step(self.anticipation.batches(self.state.step))
            if result is None:  # turned back
                continue
            result.seconds = time.perf_counter() - start
            self.state.step += 1
            self.state.tokens += result.tokens
            for due in self.periodic:  # evaluation, metrics, memory, checkpoint
                due(self.state, result)
        self.batches.close()
        if self.metrics is not None:
            self.metrics.close()
        return self.state

    def step(self, batches: list[Batch]) -> StepResult | None:
        """One optimizer step on this rank's microbatches of a global batch.

        Without finite loss and gradients it leaves weights and router biases alone, and counts.
        None where it was a spike and the run has turned back.
        """
        phase = self._enter()
        chosen = self.anticipation.look_ahead(self.state, batches)
        if self.state.step in self.state.left_out:
            return self._leave_out(phase)
        weight = self.recipe.mtp_loss_weight(self.state.step)
        losses = self.engine.forward_backward(batches, weight, self.stop.made, chosen)
        self.state.stopping = losses.stop
        norm = self.engine.gradient_norm()
        result = self._on_host(phase, losses, norm)  # the only wait for the device in a step
        problem = self.stability.problem(result) if result.is_finite else self._skip(result)
        if problem is not None:
            self._turn_back(problem)
            return None
        look = self._is_due(self.config.metrics.layer_stats_every, self.state.step + 1)
        if result.is_finite:
            self._update(result, losses, norm, phase, look)
        if look:
            with watched(self.model) as notes:
                self.engine.evaluate(batches[:1])
            seen = notes.seen()
            result.layers = layer_numbers(self.model, losses.expert_load, self.grid, seen)
        return result

    def _enter(self) -> Phase:
        """The present step's phase, told where it begins."""
        phase = self.recipe.at(self.state.step)
        if self.state.step == phase.first:
            self.state.history.clear()  # what a phase begins with is no spike
        if self.phase is not phase:
            self.phase = phase
            self.engine.attend(phase.attention)
            self.engine.quantised = phase.quantised
            if phase.name:
                self._note(f"step {self.state.step + 1}: phase {phase.number}, {phase.name}")
        return phase

    def _update(
        self, result: StepResult, losses: StepLosses, norm: Tensor, phase: Phase, look: bool
    ) -> None:
        """Update weights and router biases; with `look`, also see how far the weights moved."""
        self.state.skipped_in_row = 0
        groups = GroupWatch(self.local, self.grid) if look else None
        self.engine.step(result.learning_rate, norm)
        self.model.update_router_bias(losses.expert_load, phase.router_bias_speed)
        result.groups = None if groups is None else groups.after()

    def _skip(self, result: StepResult) -> str | None:
        """Count and tell a step without an update; None, or why the run has to turn back.

        It has to after too many in a row. Raises DivergedError where it does not by itself.
        """
        self.state.skipped_steps += 1
        self.state.skipped_in_row += 1
        where = self.engine.where_not_finite()
        what = f"the loss is {result.loss}, the gradient norm {result.grad_norm}, {where}"
        most = self.config.optim.max_skipped_steps
        if self.state.skipped_in_row > most:
            what += f"; more than optim.max_skipped_steps = {most} in a row"
            if self.config.stability.spikes is not None:
                return what
            raise DivergedError(
                f"step {self.state.step + 1}: {what}; {self.checkpoint.where_to_go_on()}, with a "
                "lower optim.learning_rate perhaps"
            )
        self.engine.skip()
        self._note(f"step {self.state.step + 1}: {what}; the step is skipped")
        return None

    def _turn_back(self, problem: str) -> None:
        """Undo the last steps, and tell. Raises DivergedError where that is the end of the run."""
        self.engine.skip()
        event = self.stability.turn_back(problem)
        if self.metrics is not None:
            self.metrics.event(self.state, event)
        if event["stopped"] is not None:
            raise DivergedError(describe_event(event))
        self._note(describe_event(event))
        self.state.stopping = False  # a run that was asked to stop saves after its next step

    def _leave_out(self, phase: Phase) -> StepResult:
        """Pass over a step's batch."""
        self._note(f"step {self.state.step + 1}: the batch is left out")
        return StepResult(self.recipe.learning_rate(self.state.step), phase.number)

    def _is_due(self, every: int, step: int) -> bool:
        """Whether what is done every so many steps, and after the last one, is due after `step`."""
        return step == self.config.steps or (every > 0 and step % every == 0)

    def _on_host(self, phase: Phase, losses: StepLosses, norm: Tensor) -> StepResult:
        """The step's numbers, finite or not."""
        share = losses.expert_load / losses.expert_load.mean(dim=1, keepdim=True).clamp(min=1.0)
        busiest = share[self.config.model.num_hash_layers :].max()
        whole = (losses.loss, losses.lm, losses.mtp, losses.balance, losses.indexer, norm)
        numbers = (*whole, share.max(), busiest, share.min(), *losses.first_share)
        packed = torch.stack([n.double() for n in numbers]).tolist()
        loss, lm, mtp, balance, indexer, grad_norm, most, busiest, least, *first = packed
        model = self.config.model
        return StepResult(
            learning_rate=self.recipe.learning_rate(self.state.step),
            phase=phase.number,
            loss=loss,
            lm_loss=lm,
            mtp_loss=mtp,
            balance_loss=balance,
            indexer_loss=indexer,
            grad_norm=grad_norm,
            expert_load_max=most,
            expert_load_min=least,
            first_share=first[model.num_hash_layers :],
            busiest_share=busiest * model.num_experts_per_tok / model.n_routed_experts,
            tokens=losses.counts.routed,
            flops=losses.flops,
        )

    def _open(self) -> None:
        """Resume, then open the run folder's files on the first rank."""
        resumed = self.checkpoint.load(self.state)
        self.anticipation.begin(self.state)
        if not self.grid.is_first:
            return
        self.config.run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(self.config.run_dir / "config.yaml", self.config.to_yaml())
        self.metrics = Metrics(self.config, self.state, self.grid)
        dtype, in_fp8 = DTYPES[self.config.precision], self.config.precision == "fp8"
        kernels = kernel_choices(self.config.model, self.grid.device, dtype, in_fp8)
        self._note(describe(kernels))
        if resumed is not None:
            self._note(f"resumed from {resumed}")
        if in_fp8 and kernels["fp8"].name == "eager":
            self._note("precision: factors rounded to FP8 are multiplied in bf16, at its speed")
        if self.config.compile:
            self._note(
                "compile: the first step makes programs for norms, experts and residual streams, "
                "or finds them in torch's cache"
            )
        for note in (*self.notes, *self.recipe.notes()):
            self._note(note)
        if self.validation is None:
            self._note(f"{self.config.data.shards} holds no validation text: nothing is evaluated")

    def _evaluate(self, state: TrainState, result: StepResult) -> None:
        """Validation loss, where it is due; every rank takes part."""
        due = self._is_due(self.config.evaluation.every, state.step)
        stopped = state.stopping and state.step < self.config.steps
        if due and not stopped and self.validation is not None:
            result.validation_loss = self.validation.evaluate(self.engine).loss
            result.validation_by_source = self.validation.by_source(self.engine)

    def _report(self, state: TrainState, result: StepResult) -> None:
        if self.metrics is not None:
            self.metrics(state, result)

    def _tell_memory(self, state: TrainState, result: StepResult) -> None:
        """Memory used, after the first evaluation and at the end; every rank takes part."""
        first = not self.memory_told and self._is_due(self.config.evaluation.every, state.step)
        if first or state.stopping or state.step == self.config.steps:
            self.memory_told = True
            words = peak_memory_report(self.grid)
            self._note(words)

    def _save(self, state: TrainState, result: StepResult) -> None:
        """Checkpoint, where it is due. A full disk ends only a run that would end anyway."""
        every = self.config.checkpoint.every
        ends = state.stopping or state.step == self.config.steps
        if not ends and not (every and state.step % every == 0):
            return
        try:
            path = self.checkpoint.save(state)
        except SaveError as error:
            if ends:
                raise
            self._note(f"warning: {error}; training goes on")
            return
        if state.stopping and state.step < self.config.steps:
            again = self.config.run_dir / "config.yaml"
            self._note(f"stopped after step {state.step}, saved {path}; resume: v4 train {again}")

    def _note(self, text: str) -> None:
        if self.metrics is not None:
            self.metrics.progress.note(text)
