"""How a run is spread over processes, and the checks against model, data and processes.

Imports no torch, so that a login node can refuse a config before anything starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from data.config import DataPhase
from model.config import ModelConfig
from trainer.config.section import Section
from trainer.parallel.degrees import Degrees
from trainer.parallel.stage_plan import V_SHAPED, ScheduleName, StagePlan, plan_stages

RecomputedPart = Literal["streams", "norms", "attention", "block"]
OffloadedPart = Literal["attention", "block"]


class ParallelConfig(Section):
    """Degrees of parallelism; data parallelism takes the remaining factor of the processes.

    tensor x context x pipeline must divide the number of processes, and so must
    expert_tensor x expert x pipeline: experts are divided over the same ranks on axes of their own,
    so expert and tensor degrees are independent. See docs/parallelism.md.
    """

    tensor: PositiveInt = 1
    """Ranks that split heads, output groups, vocabulary and the shared expert. [ranks]"""
    expert: PositiveInt = 1
    """Ranks that routed experts are divided over. [ranks]"""
    pipeline: PositiveInt = 1
    """Ranks that layers are divided over. [ranks]"""
    context: PositiveInt = 1
    """Ranks that every row is divided over. [ranks]"""
    expert_tensor: PositiveInt = 1
    """Ranks that split every routed expert's inner dimension. [ranks]"""
    pipeline_schedule: ScheduleName = "1f1b"
    """Order of forward and backward; the V-shaped schedules have two stages per rank."""
    pipeline_stages_per_rank: PositiveInt | None = None
    """Stages per rank in `interleaved_1f1b`, 2 if null; other schedules determine it. [stages]"""
    pipeline_layers_per_stage: tuple[NonNegativeInt, ...] | None = None
    """Layers of each stage; null balances stages by FLOPs (`v4 plan` shows them). [layers]"""
    recompute: tuple[RecomputedPart, ...] = ()
    """Activations that backward recomputes: residual streams inside a block, outputs of norms,
    attention, or whole blocks."""
    offload: tuple[OffloadedPart, ...] = ()
    """Parts of `recompute` whose inputs are kept in the host's memory until backward."""
    grad_reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which gradients are sent to their owners; they are always summed in fp32."""
    expert_grad_reduce_dtype: Literal["fp32", "bf16", "bf16_stochastic"] = "fp32"
    """The same for gradients of routed experts; `bf16_stochastic` rounds without bias."""
    max_optimizer_padding: NonNegativeFloat = 0.1
    """Maximum padding of an optimizer buffer, as a share of its contents: where there are too few
    matrices for that, fewer ranks own them and the others repeat the update."""
    timeout_seconds: Annotated[float, Field(gt=0, le=1e7)] | None = None
    """Timeout of collectives; null is torch's default. [seconds]"""

    @property
    def collective_timeout(self) -> float:
        """The timeout of collectives, in seconds.

        torch's default of 600 s is that of NCCL alone, and not where gloo is there as well.
        """
        return 1800.0 if self.timeout_seconds is None else self.timeout_seconds

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages of each rank."""
        if self.pipeline == 1:
            return 1
        if self.pipeline_schedule == "interleaved_1f1b":
            return self.pipeline_stages_per_rank or 2
        return 2 if self.pipeline_schedule in V_SHAPED else 1

    def stages(self, model: ModelConfig, seq_len: int) -> StagePlan:
        """Returns the layers of each stage; valid only for a checked config."""
        return plan_stages(
            model,
            seq_len,
            self.pipeline,
            self.pipeline_schedule,
            self.stages_per_rank,
            self.pipeline_layers_per_stage if self.pipeline > 1 else None,
        )

    def degrees(self, world: int) -> Degrees:
        """Returns the degrees. Raises ValueError if they do not divide the processes."""
        return Degrees(
            world, self.tensor, self.expert, self.pipeline, self.context, self.expert_tensor
        )

    @property
    def min_world(self) -> int:
        """The smallest number of processes that these degrees divide."""
        dense = self.tensor * self.context * self.pipeline
        return math.lcm(dense, self.expert_tensor * self.expert * self.pipeline)

    def problems(self, model: ModelConfig) -> Iterator[str]:
        """Yields what does not fit the model, at any number of processes.

        - `parallel.tensor` divides `model.num_attention_heads`, `model.o_groups`,
          `model.vocab_size` and `model.moe_intermediate_size`.
        - `parallel.expert` divides `model.n_routed_experts`.
        - `parallel.expert_tensor` splits `model.moe_intermediate_size` into multiples of 8.
        - `parallel.offload` has only parts of `parallel.recompute`.
        """
        yield from self._split_problems(
            "tensor",
            {
                "model.num_attention_heads": model.num_attention_heads,
                "model.o_groups": model.o_groups,
                "model.vocab_size": model.vocab_size,
                "model.moe_intermediate_size": model.moe_intermediate_size,
            },
        )
        yield from self._split_problems(
            "expert", {"model.n_routed_experts": model.n_routed_experts}
        )
        inner = model.moe_intermediate_size
        if inner % self.expert_tensor or inner // self.expert_tensor % 8:
            yield (
                f"model.moe_intermediate_size = {inner} does not split over "
                f"parallel.expert_tensor = {self.expert_tensor} in multiples of 8; "
                f"parallel.expert_tensor should be {nearest(self.expert_tensor, inner // 8)}"
            )
        for part in self.offload:
            if part not in self.recompute:
                yield (
                    f"parallel.offload = [{', '.join(self.offload)}] moves the input of a "
                    "recomputed part, so parallel.recompute = "
                    f"[{', '.join(self.recompute)}] should have {part} as well"
                )
        yield from self._pipeline_problems(model)

    def row_problems(self, length: int, where: str) -> Iterator[str]:
        """Yields what does not fit the row length of the section `where` of the config.

        - `parallel.context` x `parallel.tensor` divides `data.seq_len` and `phases.seq_len`.
        """
        runs = self.tensor * self.context
        if length % runs:
            near = [n for n in (length // runs * runs, -(-length // runs) * runs) if n]
            yield (
                f"{where}.seq_len = {length} does not divide into parallel.context = "
                f"{self.context} x parallel.tensor = {self.tensor} equal runs; {where}.seq_len "
                f"should be {' or '.join(str(n) for n in dict.fromkeys(near))}"
            )

    def _split_problems(self, axis: str, fields: dict[str, int]) -> Iterator[str]:
        degree = getattr(self, axis)
        for field, value in fields.items():
            if value % degree:
                yield (
                    f"{field} = {value} does not split over parallel.{axis} = {degree}; "
                    f"parallel.{axis} should be {nearest(degree, math.gcd(*fields.values()))}"
                )

    def _pipeline_problems(self, model: ModelConfig) -> Iterator[str]:
        """Yields what does not fit the model's layers.

        - `parallel.pipeline_stages_per_rank` is null, or as `parallel.pipeline_schedule` has it.
        - `parallel.pipeline` x stages per rank is at most `model.num_hidden_layers` + 1.
        - `parallel.pipeline_layers_per_stage` has one number per stage, which sum to
          `model.num_hidden_layers`, with none but the last 0.
        """
        schedule, layers = self.pipeline_schedule, model.num_hidden_layers
        if self.pipeline_stages_per_rank not in (None, self.stages_per_rank):
            yield (
                f"parallel.pipeline_stages_per_rank = {self.pipeline_stages_per_rank} does not fit "
                f"parallel.pipeline_schedule = {schedule} on parallel.pipeline = {self.pipeline}; "
                f"it should be {self.stages_per_rank} or null"
            )
        stages = self.pipeline * self.stages_per_rank
        if stages - 1 > layers:
            max_pipeline = (layers + 1) // self.stages_per_rank
            yield (
                f"parallel.pipeline = {self.pipeline} with {schedule} makes {stages} stages, but "
                f"model.num_hidden_layers = {layers}; parallel.pipeline should be at most "
                f"{max_pipeline}"
            )
        sizes = self.pipeline_layers_per_stage
        if sizes is None or self.pipeline == 1:
            return
        if len(sizes) != stages or sum(sizes) != layers or 0 in sizes[:-1]:
            yield (
                f"parallel.pipeline_layers_per_stage = {list(sizes)} should have one number "
                f"for each of the {stages} stages, which sum to model.num_hidden_layers = "
                f"{layers}, with none but the last 0"
            )

    def world_problems(self, world: int) -> Iterator[str]:
        """Yields what does not fit a number of processes.

        - `parallel.tensor` x `parallel.context` x `parallel.pipeline` divides the number of
          processes.
        - `parallel.expert_tensor` x `parallel.expert` x `parallel.pipeline` divides the number of
          processes.
        """
        for product, fields in (
            (self.tensor * self.context * self.pipeline, "tensor x context x pipeline"),
            (self.expert_tensor * self.expert * self.pipeline, "expert_tensor x expert x pipeline"),
        ):
            if world % product:
                near = [n for n in (world // product * product, (world // product + 1) * product)]
                yield (
                    f"parallel.{fields} = {product} does not divide the {world} processes; start "
                    f"{' or '.join(str(n) for n in near if n)} processes, or change these degrees"
                )
                return

    def step_problems(self, world: int, data: DataPhase, where: str) -> Iterator[str]:
        """Yields what does not fit a step's rows, those of a ramp included, on these processes.

        `where` is the section of the config with these rows.

        - `data.global_batch_size`, `phases.global_batch_size` and `phases.initial_batch_size` are
          at least the number of data-parallel ranks.
        """
        data_ranks = self.degrees(world).data
        for rows in data.sizes:
            name = (
                f"{where}.global_batch_size"
                if rows == data.global_batch_size
                else f"rows of {where}'s ramp"
            )
            if rows < data_ranks:
                yield (
                    f"{name} = {rows} should be at least the number of data-parallel ranks, "
                    f"{data_ranks}"
                )
            elif self.pipeline > 1:
                yield from self._microbatch_problems(
                    data_ranks, rows, data.micro_batch_size, name, where
                )

    def _microbatch_problems(
        self, data_ranks: int, rows: int, micro: int, name: str, where: str
    ) -> Iterator[str]:
        """Yields why a pipeline has no equal microbatches, or too few for its schedule.

        - With `parallel.pipeline`, rows per data-parallel rank are a multiple of
          `data.micro_batch_size` or `phases.micro_batch_size`, with as many microbatches as
          `parallel.pipeline_schedule` needs.
        """
        per_rank = -(-rows // data_ranks)
        count, rest = divmod(per_rank, micro)
        if rest:
            yield (
                f"{name} = {rows} over {data_ranks} data-parallel ranks is {per_rank} rows, which "
                f"is no whole number of microbatches of {where}.micro_batch_size = {micro}; {name} "
                f"should be {count * micro * data_ranks or micro * data_ranks} or "
                f"{(count + 1) * micro * data_ranks}"
            )
            return
        stages = self.pipeline * self.stages_per_rank
        need = stages if self.pipeline_schedule in ("1f1b", "dual_pipe_v") else self.pipeline
        if count < need:
            yield (
                f"{count} microbatches per step are fewer than the {need} that "
                f"parallel.pipeline_schedule = {self.pipeline_schedule} needs with "
                f"parallel.pipeline = {self.pipeline}; {name} should be at least "
                f"{need * micro * data_ranks}, or {where}.micro_batch_size smaller"
            )
        elif self.pipeline_schedule == "interleaved_1f1b" and count % (count // self.pipeline):
            rounds = count // self.pipeline
            # The nearest numbers that the schedule takes: multiples of `pipeline` among them.
            fits = [n for n in range(self.pipeline, 2 * count + 1) if n % (n // self.pipeline) == 0]
            near = (max(n for n in fits if n < count), min(n for n in fits if n > count))
            fitting = [str(n * micro * data_ranks) for n in near]
            yield (
                f"{count} microbatches per step do not divide into the {rounds} rounds of "
                f"interleaved_1f1b with parallel.pipeline = {self.pipeline}; {name} should be "
                f"{' or '.join(fitting)}"
            )


def nearest(degree: int, value: int) -> str:
    """Returns the divisors of `value` next to `degree`, below and above, as text."""
    below = max((n for n in range(1, min(degree, value) + 1) if value % n == 0), default=1)
    above = next((n for n in range(degree + 1, value + 1) if value % n == 0), None)
    return f"{below}" if above is None or below == degree else f"{below} or {above}"
