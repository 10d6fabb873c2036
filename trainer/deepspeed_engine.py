"""Training through DeepSpeed: ZeRO 0 to 3 and offload to the host, fp32, AdamW throughout.

Rows, losses, schedules and metrics are those of every engine. DeepSpeed gets one stage that is the
whole model, gradients that it averages over ranks (so the loss is multiplied by their number: ours
are sums), and a learning rate for each step. Its own checkpoints are pickles; ours are made from
whole tensors, gathered one after another to the host of every rank.
"""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.block import Block
from optim import Assignment, gradient_norm
from trainer.config import ConfigError, RunConfig
from trainer.config_deepspeed import resolve, zero_stage
from trainer.engine import Engine, Microbatches
from trainer.parallel.grid import Grid
from trainer.parallel.pipeline import Feed, Stage, Tally
from trainer.parallel.plan import LocalModel

ABOUT = "engine deepspeed: splits only data; fp32, AdamW on every parameter, no Muon"
_KINDS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine(Engine):
    """A DeepSpeed engine over this rank's copy of the model, and the optimizer inside it.

    Raises ConfigError where the block does not fit the number of processes.
    """

    def __init__(
        self, config: RunConfig, local: LocalModel, grid: Grid, table: list[Assignment]
    ) -> None:
        super().__init__(local, grid)
        self.step_count = 0
        self.world = grid.data.size
        self.stage = zero_stage(config.deepspeed or {})
        self.parameters = dict(local.model.named_parameters())
        self.feed = Feed()
        stage = Stage(local.model, local.stages, 0, self.feed)
        self._pending = False
        self._copies: dict[str, Tensor] = {}
        try:
            resolved = resolve(config, self.world)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.engine = _initialize(stage, self._groups(table), resolved, grid)

    def _groups(self, table: list[Assignment]) -> list[dict[str, Any]]:
        """Parameter groups by weight decay."""
        groups: dict[float, list[Tensor]] = {}
        for entry in table:
            groups.setdefault(entry.weight_decay, []).append(self.parameters[entry.name])
        return [{"params": group, "weight_decay": decay} for decay, group in groups.items()]

    def compute(self, microbatches: Microbatches, tally: Tally, backward: bool) -> None:
        """As in Engine; DeepSpeed reduces with the last microbatch.

        Raises RuntimeError where no step followed the last backward: ZeRO keeps its gradient.
        """
        if backward and self._pending:
            raise RuntimeError("engine deepspeed: every backward should be followed by a step")
        self.feed.microbatches, self.feed.tally = microbatches, tally
        nothing, last = torch.empty(0), len(microbatches) - 1
        for index in torch.arange(len(microbatches)):
            if backward:
                self.engine.set_gradient_accumulation_boundary(int(index) == last)
            loss = self.engine(nothing, index)
            if backward:
                self.engine.backward(loss.sum() * self.world, scale_wrt_gas=False)
        self._pending = self._pending or backward
        self.feed.microbatches, self.feed.tally = (), None

    def make_gradients(self) -> None:
        """As in Engine, but DeepSpeed has made room for all once for ever."""
        raise ConfigError("engine deepspeed trains every parameter all the time")

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """As in Engine; NaN where DeepSpeed calls the norm invalid."""
        zero = self.engine.optimizer
        if self.stage == 0:
            return gradient_norm(self.parameters.values())
        if self.stage < 3:
            norm = zero.scaled_global_norm()
        else:
            norm = torch.stack([torch.as_tensor(n) for n in zero._get_norm_groups()])
            norm = torch.where((norm < 0).any(), torch.nan, torch.linalg.vector_norm(norm))
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.grid.device)
        return torch.where(norm < 0, torch.nan, norm)

    def where_not_finite(self) -> str:
        """As in Engine, but nobody knows."""
        return "and engine deepspeed does not tell in which gradient"

    def step(self, learning_rate: float, norm: Tensor) -> None:
        """As in Engine; DeepSpeed takes the norm again and clips itself."""
        self._copies.clear()
        for group in self._inner.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        self._pending = False
        self.step_count += 1

    @property
    def _inner(self) -> Any:
        """The torch optimizer, inside of ZeRO's wrapper where there is one."""
        outer = self.engine.optimizer
        return getattr(outer, "optimizer", outer)

    def state_tensors(self) -> dict[str, Tensor]:
        """As optim.Optimizer, but whole copies on the host, master weights among them."""
        self._make_state()
        copies: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            copies[f"master.{name}"] = self._read(parameter, None)
            for kind in _KINDS:
                copies[f"{kind}.{name}"] = self._read(parameter, kind)
            copies[f"step.{name}"] = torch.full((1,), float(self.step_count))
        self._copies = copies
        return dict(copies)

    @torch.no_grad()
    def write_parameters(self) -> None:
        """Put what was copied into the last `state_tensors` into weights and state."""
        steps = 0.0
        for name, parameter in self.parameters.items():
            self._write(parameter, self._copies[f"master.{name}"], None)
            for kind in _KINDS:
                self._write(parameter, self._copies[f"{kind}.{name}"], kind)
            steps = max(steps, float(self._copies[f"step.{name}"]))
        for state in self._inner.state.values():
            if "step" in state:
                number = state["step"]
                state["step"] = torch.full_like(number, steps) if _is(number) else int(steps)
        self._copies.clear()
        self._round_parameters()

    @torch.no_grad()
    def _make_state(self) -> None:
        """DeepSpeed and torch make their state in the first step; one without effect makes it."""
        if self.step_count > 0 or (self._inner.state and self.stage == 3):
            return
        inner = self._inner
        rates = [group["lr"] for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = 0.0
        if self.stage == 3:
            self._make_state_3()
        else:
            parameters = [p for group in inner.param_groups for p in group["params"]]
            held = [p.grad for p in parameters]
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            inner.step()
            for parameter, gradient in zip(parameters, held, strict=True):
                parameter.grad = gradient
            if self.stage > 0:
                self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate
        for state in inner.state.values():
            if "step" in state:
                state["step"] = state["step"] * 0

    def _make_state_3(self) -> None:
        zero = self.engine.optimizer
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            held = flat.grad
            flat.grad = torch.zeros_like(flat)
            zero._optimizer_step(number)
            flat.grad = held

    def _read(self, parameter: Tensor, kind: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._is_plain(parameter):
            found = parameter if kind is None else self._inner.state[parameter][kind]
        elif kind is None:
            found = safe_get_full_fp32_param(parameter)
        else:
            found = safe_get_full_optimizer_state(parameter, kind)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return found.detach().to("cpu", torch.float32, copy=True).view(shape)

    def _write(self, parameter: Tensor, value: Tensor, kind: str | None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(self.grid.device)
        if hasattr(parameter, "ds_id"):
            self._write_part(parameter, value, kind)
        elif self._is_plain(parameter):
            (parameter if kind is None else self._inner.state[parameter][kind]).copy_(value)
        elif kind is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def _write_part(self, parameter: Any, value: Tensor, kind: str | None) -> None:
        """ZeRO 3: this rank's part, padded; DeepSpeed's setter of whole values cannot pad."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.ds_numel
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self.world - value.numel()))
        part = padded[size * self.grid.data.rank :][:size]
        if kind is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, kind)

    def _is_plain(self, parameter: Tensor) -> bool:
        """Whether torch's optimizer holds the parameter itself: ZeRO 0 in fp32."""
        return not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping")

    def _round_parameters(self) -> None:
        """Bring the weights that are computed with up to the masters."""
        zero = self.engine.optimizer
        if self.stage == 3:
            for number in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(number)
        elif hasattr(zero, "update_lp_params"):
            zero.update_lp_params()


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def _initialize(
    stage: Stage, groups: list[dict[str, Any]], block: Mapping[str, Any], grid: Grid
) -> Any:
    """`deepspeed.initialize` on a process group that exists; one process gets its own."""
    if grid.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed wants, though nobody launched us
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.utils import logger, set_z3_leaf_modules

    logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that newer torch deprecates, several times a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if block.get("zero_optimization", {}).get("stage") == 3:
        set_z3_leaf_modules(stage, [Block])  # a block's weights are gathered together
    if grid.is_first:
        print(ABOUT, flush=True)
    engine, *_ = deepspeed.initialize(
        model=stage, model_parameters=groups, config=dict(block), dist_init_required=False
    )
    return engine
