"""A training run: the loop over optimizer steps, and the periodic hooks after each of them.

Letters: L layers (+ MTP), E routed experts.
"""

import socket
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from data import Batch, DataRecord, Loader, Prefetcher
from data.activity import Activity
from data.lease import LeaseError
from data.rows import matching_manifest, token_frequencies
from model.kernel_choices import describe
from model.kernels import host
from trainer.build import build_engine
from trainer.checkpoint import PeriodicCheckpoints, RunCheckpoint, unsaved_progress
from trainer.config import Phase, RunConfig, save_config
from trainer.device import peak_memory_report
from trainer.engine import RankMessage, StepLosses
from trainer.evaluation import Evaluations, EvaluationStopped
from trainer.garbage import collection_by_steps
from trainer.generate.stored import ModelReader
from trainer.kernels import AgreedKernels, run_operations, unchecked
from trainer.metrics import Metrics, UpdateStats, collect_stats, compute_layer_stats, describe_event
from trainer.parallel.collectives import all_gather_objects
from trainer.parallel.grid import Grid
from trainer.post import open_own_samples
from trainer.process.command_line import resume_command, v4
from trainer.process.errors import CheckpointError, DivergedError
from trainer.process.heartbeat import Heartbeat, Task
from trainer.process.lease import RunLeases
from trainer.process.signals import ProfileRequest, StopRequest
from trainer.profiling import Profiler
from trainer.run_tokenizer import keep_tokenizer, open_tokenizer, run_data
from trainer.stability import Anticipation, Stability
from trainer.start_log import start_notices
from trainer.start_weights import start_from
from trainer.state import TrainState
from trainer.step import RolledBack, StepResult
from trainer.to_host import to_host

Hook = Callable[[TrainState, StepResult], None]


class Trainer:
    """Trains `config` on the processes of `grid`; the first logs `messages` at the start.

    `leases` are checked after every step, before anything is written, and before a checkpoint is
    published; one that is lost ends the run.
    `kernels` are what all ranks agreed on; by default, those that the config names without
    a check of the GPU. `async_saves`: whether checkpoints are written beside training; by default
    as the config wants, without a check of the host's memory. `heartbeat` gets what the loop does,
    for a watchdog; `profile` asks for profiles. `read_model` opens the models that `post` names.

    Raises the errors of trainer.process.errors.USER_ERRORS for input that cannot be trained on.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: Grid,
        stop: StopRequest | None = None,
        messages: Sequence[str] = (),
        leases: RunLeases | None = None,
        kernels: AgreedKernels | None = None,
        async_saves: bool | None = None,
        heartbeat: Heartbeat | None = None,
        profile: ProfileRequest | None = None,
        read_model: ModelReader | None = None,
    ) -> None:
        config.check_world(grid.world_size)
        data = run_data(config)
        self.tokenizer = open_tokenizer(config)
        self.config = config
        self.grid = grid
        self.stop = stop or StopRequest()
        self.messages = messages
        self.leases = leases or RunLeases()
        self.heartbeat = heartbeat or Heartbeat()
        self.profile = profile or ProfileRequest()
        self.profiler = Profiler(config, grid, self.profile, self._log)
        self.work_seconds = 0.0  # of this rank in the last step
        self.state = TrainState()
        self.recipe = config.recipe
        self.kernels = kernels or unchecked(config, grid.device)
        phases = [phase.rows for phase in self.recipe.phases]
        config.check_token_ids(matching_manifest(data), f"the manifest in {data.shards}")
        self.loader = Loader(data, config.seed, grid.data.rank, grid.data.size, phases=phases)
        pin = grid.device.type == "cuda"
        self.batches = Prefetcher(self.loader.at, config.data.prefetch, self.recipe.steps, pin)
        has_text = bool(self.loader.manifest.of_split("validation"))
        self.evaluations = Evaluations(
            config, grid, self.tokenizer, self.stop, self.heartbeat, has_text, self._log
        )
        frequencies = token_frequencies(self.loader) if config.model.num_hash_layers else None
        self.are_ids_counted = frequencies is not None
        counts = None if frequencies is None else frequencies.tolist()
        self.local, self.engine, self.optimizer = build_engine(
            config, grid, counts, self.kernels.kernels
        )
        self.model = self.local.model
        self.start = self.local, self.optimizer, self.tokenizer, read_model  # of `start_from`
        self.own = open_own_samples(
            config, grid, self.tokenizer, self.heartbeat, self.kernels.kernels, read_model
        )
        routing = config.stability.anticipatory_routing
        self.anticipation = Anticipation(
            self.engine, grid, self.loader, self.batches.at, routing, self.recipe, config.segment
        )
        self.checkpoint = RunCheckpoint(
            config,
            grid,
            self.model,
            self.optimizer,
            self.tokenizer.hash,
            self.local.placements,
            self.anticipation,
            DataRecord(self.loader),
            self.leases.held,
        )
        self.stability = Stability(config, self.state, self.checkpoint, self.anticipation)
        self.metrics: Metrics | None = None  # on the first rank, once the run has begun
        self.phase: Phase | None = None
        self.has_logged_memory = self.has_evaluated = False
        self.async_saves = config.may_save_async if async_saves is None else async_saves
        checkpoints = PeriodicCheckpoints(config, self.checkpoint, self._log)
        self.periodic: list[Hook] = [
            self._write_metrics,
            self._during("saving", checkpoints.before_evaluation),
            self._during("evaluation", self._evaluate),
            self._during("metrics", self._publish_metrics),
            self._log_memory,
            self._during("saving", checkpoints.after_evaluation),
        ]

    def run(self) -> TrainState:
        """Trains from the newest checkpoint, or from the start, until these processes have to end.

        They do after the last step of the run, after a signal, and where the next step has other
        degrees: `state.starts_again`. A checkpoint is saved in each case.
        """
        is_complete = False
        try:
            self._begin()
            self.profiler.begin(self.state.step + 1)
            with collection_by_steps() as collect_garbage:
                self._train(collect_garbage)
            self._agree_on_next()
            is_complete = True
        except LeaseError:
            raise  # another run writes into the folder by now
        except Exception:
            self.checkpoint.wait_at_end()
            raise
        finally:
            self.batches.close()
            self.profiler.close()
            self.checkpoint.close()
            if self.metrics is not None:
                self.metrics.close(0 if is_complete else 1)
        return self.state

    def _train(self, collect_garbage: Callable[[int], None]) -> None:
        first, waits = self.state.step, self.grid.traffic.waits
        while self._is_in_segment() and not self.state.stopping:
            start = time.perf_counter()
            waits.is_step = True
            self.heartbeat.enter("reading data", self.state.step + 1)
            self.stability.before_step()
            self.profiler.before_step(self.state.step + 1)
            self._enter_phase()
            is_first = self.grid.is_first and self.state.step == first
            with Activity("first step", visible=is_first):  # may compile
                result = self.step(self._batches(self.state.step))
            if is_first and (report := host.compilation.report()):
                self._log(f"kernels: the first step {report}")
            if isinstance(result, RolledBack):
                if not self._is_in_segment():
                    self.checkpoint.save(self.state)  # for processes with that step's degrees
                continue  # from the step that was restored
            result.seconds = time.perf_counter() - start
            waits.is_step = False
            self.work_seconds = max(result.seconds - waits.take_seconds(), 0.0)
            self.heartbeat.step_ended(result.seconds)
            self.heartbeat.enter("metrics")  # and profiles, which may take minutes to write
            self.leases.check()
            self.state.step += 1
            self.state.tokens += result.tokens
            self.profiler.after_step(self.state.step)
            result.epochs = (self.own or self.loader).epochs_of(self.state.step)
            result.post = None if self.own is None else self.own.measures(result.seconds)
            for hook in self.periodic:
                hook(self.state, result)
            collect_garbage(self.state.step)

    def _is_in_segment(self) -> bool:
        segment = self.config.segment
        return segment.first <= self.state.step < segment.end

    def _agree_on_next(self) -> None:
        """Sets `starts_again` where the next step has other degrees; a stop meanwhile wins."""
        state = self.state
        if self._is_in_segment() or state.step == self.recipe.steps or state.stopping:
            return
        next_one = self.recipe.segment_at(state.step)
        of_next = next_one.parallel.degrees(self.grid.world_size)
        where = f"phase {next_one.phases[0].number} trains with other degrees, {of_next.text}"
        state.stopping = any(all_gather_objects(self.stop.requested, self.grid.world))
        state.starts_again = not state.stopping
        if state.starts_again:
            self._log(f"after step {state.step}, {where}: the processes start again")
        else:
            resume = resume_command(self.config.run_dir)
            self._log(f"stopped after step {state.step}, before {where}; resume: {resume}")

    def _batches(self, step: int) -> list[Batch]:
        """Returns this rank's microbatches of the step that trains now."""
        if self.own is not None:
            return self.own.at(step, self.engine, self.recipe.at(step))
        return self.anticipation.batches(step)

    def step(self, batches: list[Batch]) -> StepResult | RolledBack:
        """Takes one optimizer step on this rank's microbatches of a global batch.

        If loss or gradients are not finite, weights and router biases stay as they are. If the step
        is a spike, the run rolls back.
        """
        phase = self._enter_phase()
        self.heartbeat.enter("forward and backward")
        experts = self.anticipation.select(self.state, batches)
        if self.state.step in self.state.skipped_batches:
            return self._skip_batch(phase)
        mtp_loss_weight = self.recipe.mtp_loss_weight(self.state.step)
        message = RankMessage(self.stop.requested, self.profile.requested, self.work_seconds)
        objective = None if self.own is None else self.own.objective
        losses = self.engine.forward_backward(batches, mtp_loss_weight, message, experts, objective)
        self.state.stopping = losses.messages.stop
        if losses.messages.profile:
            self.profiler.agreed(self.state.step + 1)
        norm = self.engine.gradient_norm()
        # Waits for the device; so does dispatch over expert ranks, for its counts.
        learning_rate = self.recipe.learning_rate(self.state.step)
        result = to_host(self.config.model, losses, norm, learning_rate, phase.number)
        if result.is_finite:
            problem = self.stability.problem(result)
        else:
            problem = self._skip_update(result)
        if problem is not None:
            return self._roll_back(problem)
        with_stats = self._is_due(self.config.metrics.layer_stats_every, self.state.step + 1)
        self.heartbeat.enter("update")
        if result.is_finite:
            self._update(result, losses, norm, phase, with_stats)
        if with_stats:
            self.heartbeat.enter("layer stats")
            with collect_stats(self.model) as collector:
                self.engine.evaluate(batches[:1])
            hook_stats = collector.to_host()
            result.layers = compute_layer_stats(
                self.model, losses.expert_load, self.grid, hook_stats
            )
        return result

    def _enter_phase(self) -> Phase:
        """Returns the phase of the current step; sets up the engine where the phase has changed."""
        phase = self.recipe.at(self.state.step)
        if self.state.step == phase.first:
            self.state.history.clear()  # the jump at the start of a phase is no spike
        if self.phase is not phase:
            self.phase = phase
            self.heartbeat.new_phase()
            self.engine.set_attention(phase.attention)
            self.engine.quantisation = phase.quantisation
            if phase.name:
                self._log(f"step {self.state.step + 1}: phase {phase.number}, {phase.name}")
        return phase

    def _update(
        self, result: StepResult, losses: StepLosses, norm: Tensor, phase: Phase, with_stats: bool
    ) -> None:
        """Updates weights and router biases."""
        self.state.consecutive_skips, self.state.skipping_since = 0, None
        update_stats = UpdateStats(self.local, self.grid) if with_stats else None
        self.engine.step(result.learning_rate, norm)
        self.model.update_router_bias(losses.expert_load, phase.router_bias_speed)
        if update_stats is not None:
            result.groups = update_stats.after_update()

    def _skip_update(self, result: StepResult) -> str | None:
        """Counts a step without an update; returns a reason to roll back after too many in a row.

        Raises DivergedError where the config has no rollback.
        """
        state = self.state
        state.skipped_steps += 1
        state.consecutive_skips += 1
        if state.skipping_since is None:
            state.skipping_since = state.step
        where = self.engine.where_not_finite()
        problem = f"the loss is {result.loss}, the gradient norm {result.grad_norm}, {where}"
        limit = self.config.optim.max_skipped_steps
        if state.consecutive_skips > limit:
            problem += f"; more than optim.max_skipped_steps = {limit} in a row"
            if self.config.stability.spikes is not None:
                return problem
            newest = self.checkpoint.newest_before(state.skipping_since + 1)
            raise DivergedError(
                f"step {state.step + 1}: {problem}; {newest}; try a lower optim.learning_rate"
            )
        self.engine.skip()
        self._log(f"step {state.step + 1}: {problem}; the update is skipped")
        return None

    def _roll_back(self, problem: str) -> RolledBack:
        """Undoes the last steps. Raises DivergedError where that ends the run."""
        self.heartbeat.enter("rolling back")
        self.engine.skip()
        event = self.stability.roll_back(problem)
        if self.metrics is not None:
            self.metrics.log_event(self.state, event)
        if event["stop_reason"] is not None:
            raise DivergedError(describe_event(event))
        self._log(describe_event(event))
        if event["save_problem"] is not None:
            self._log(f"warning: {event['save_problem']}; training continues")
        self.state.stopping = False  # a run that was asked to stop saves after its next step
        return RolledBack(problem, self.state.step)

    def _skip_batch(self, phase: Phase) -> StepResult:
        """Returns the result of a step that does not train."""
        self._log(f"step {self.state.step + 1}: the batch is skipped")
        return StepResult(self.recipe.learning_rate(self.state.step), phase.number)

    def _is_due(self, every: int, step: int) -> bool:
        """Whether `step` is a multiple of `every` (0: never) or the last step."""
        return step == self.recipe.steps or (every > 0 and step % every == 0)

    def _begin(self) -> None:
        """Resumes, then opens the run folder's files on the first rank."""
        resumed = self.checkpoint.load(self.state)
        start = None if resumed else start_from(self.config, *self.start)
        self.anticipation.configure(self.state)
        hosts = all_gather_objects(socket.gethostname(), self.grid.world)
        saves = (start, *self._save_beside_training())
        if not self.grid.is_first:
            return
        unsaved_steps = 0 if resumed else unsaved_progress(self.config)
        self.checkpoint.record_newest(resumed)
        keep_tokenizer(self.config, self.tokenizer)
        handwritten = save_config(self.config)
        self.metrics = Metrics(self.config, self.state, self.grid, hosts)
        if handwritten is not None:
            self._log(f"config.yaml is now the resolved config; as it was, it is {handwritten}")
        self.kernels.pinned.write(self.config.run_dir)
        self._log(describe(self.kernels.kernels, run_operations(self.config)))
        for line in self.kernels.lines:
            self._log(line)
        if resumed is not None:
            self._log(f"resumed from {resumed}")
            for change in self.checkpoint.changes:
                self._log(change)
        elif unsaved_steps:
            self._log(
                f"no checkpoint was saved in {unsaved_steps} steps before: training starts from "
                "step 0, and metrics.jsonl as well"
            )
        needs_counts = bool(self.config.model.num_hash_layers) and not self.are_ids_counted
        notices = start_notices(self.config, self.kernels, needs_counts and not resumed)
        for message in filter(None, (*notices, *self.messages, *saves, *self.recipe.warnings())):
            self._log(message)
        if self.evaluations.validation is None:
            self._log(f"{self.config.data.shards} has no validation text: there is no such loss")

    def _save_beside_training(self) -> list[str]:
        """Prepares for checkpoints beside training; returns a line where that is not possible.

        Nothing is needed where only the last checkpoint is saved. Raises CheckpointError where the
        config demands it.
        """
        every, end = self.config.checkpoint.every, self.config.segment.end
        if not (self.async_saves and every and (self.state.step // every + 1) * every < end):
            return []
        try:
            self.checkpoint.save_beside_training()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            problem = f"the memory for saving beside training could not be allocated: {reason}"
            if self.config.checkpoint.mode == "async":
                raise CheckpointError(f"checkpoint.mode = async: {problem}") from None
            return [f"{problem}; steps stop while a checkpoint is written"]
        return []

    def _evaluate(self, state: TrainState, result: StepResult) -> None:
        """Adds what is due after this step to the result; every rank takes part."""
        if not self.evaluations.are_due(state.step):
            return
        if not self.has_evaluated:
            # It may need more memory than training, and the kernel would kill it at every restart.
            self.checkpoint.finish()
            self.has_evaluated = True
        assert self.phase is not None  # of the step that was trained
        try:
            self.evaluations.run(self.engine, self.phase, state.step, result)
        except EvaluationStopped as stopped:
            state.stopping = True
            self._log(
                f"the evaluation after step {state.step} was stopped {stopped}; "
                f"{v4('eval', self.config.run_dir)} repeats it once a checkpoint is saved"
            )

    def _write_metrics(self, state: TrainState, result: StepResult) -> None:
        if self.metrics is not None:
            self.metrics.write(state, result)

    def _publish_metrics(self, state: TrainState, result: StepResult) -> None:
        if self.metrics is not None:
            self.metrics.publish(state, result)

    def _log_memory(self, state: TrainState, result: StepResult) -> None:
        """Logs peak memory after the first evaluation and at the end; every rank takes part."""
        is_first = not self.has_logged_memory
        is_first &= self._is_due(self.config.evaluation.every, state.step)
        if is_first or state.stopping or state.step == self.config.segment.end:
            self.has_logged_memory = True
            self._log(peak_memory_report(self.grid))

    def _during(self, task: Task, hook: Hook) -> Hook:
        """Returns a hook that reports its task first."""

        def run(state: TrainState, result: StepResult) -> None:
            self.heartbeat.enter(task)
            hook(state, result)

        return run

    def _log(self, message: str) -> None:
        if self.metrics is not None:
            self.metrics.log(message)
