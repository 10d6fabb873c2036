"""Training through DeepSpeed: ZeRO 0 to 3 and offload, with AdamW throughout or with its own Muon.

Rows, losses, schedules and metrics are the same with every engine. DeepSpeed gets the model as one
stage, a loss multiplied by the number of ranks (it averages gradients, ours are sums), and a
learning rate for each step. DeepSpeed's checkpoints are pickles; ours are made from unsharded
tensors, gathered one after another to the host of every rank.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.activity import print_line
from model.block import Block
from optim import Assignment, StateSlice, gradient_norm
from trainer.config import ConfigError, RunConfig
from trainer.config.deepspeed import resolve, zero_stage
from trainer.deepspeed.stage import DeepSpeedStage
from trainer.engine import Engine
from trainer.microbatches import Microbatches
from trainer.parallel.grid import Grid, start_process_group
from trainer.parallel.pipeline_stage import CurrentStep, StepAccumulator
from trainer.parallel.plan import LocalModel

ABOUT = "engine deepspeed: splits only data; "
ADAMW = "AdamW on every parameter"
MUON = (
    "DeepSpeed's Muon (5 Newton–Schulz steps with DeepSpeed's coefficients); in ZeRO 1 and 2, "
    "grad_norm is the norm of its updates"
)
MOMENTUM = "momentum_buffer"
SHARED_MEMORY_SUM = "deepspeed_shm_comm"
_ADAM = ("exp_avg", "exp_avg_sq")


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
        self.current = CurrentStep()
        stage = DeepSpeedStage(
            # In ZeRO 3 DeepSpeed fills the gradients of leaf modules itself.
            local.model,
            local.stages,
            self.current,
            fills_gradients=self.stage < 3,
        )
        self.beta = config.optim.muon.momentum
        self._pending = self._has_state = False
        self._copies: dict[str, Tensor] = {}
        try:
            resolved = resolve(config, self.world)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._check_bucket(resolved)
        self.kinds = {
            entry.name: ("momentum",) if entry.optimizer == "muon" else _ADAM for entry in table
        }
        make = partial(make_optimizer, self.parameters, table, config)
        self.engine = _initialize(stage, make, resolved, grid)
        if grid.is_first:
            print_line(ABOUT + (MUON if self.has_muon else ADAMW))

    def _check_bucket(self, resolved: Mapping[str, Any]) -> None:
        """Raises ConfigError for a gradient that ZeRO 3 keeps to the update: DeepSpeed fails then.

        It hands the gradient to a stream, which a CPU has not.
        """
        size = resolved.get("zero_optimization", {}).get("reduce_bucket_size")
        largest = max(parameter.numel() for parameter in self.parameters.values())
        is_fatal = self.stage == 3 and self.grid.device.type == "cpu"
        if is_fatal and size is not None and size < largest:
            raise ConfigError(
                f"deepspeed.zero_optimization.reduce_bucket_size is {size}, and a parameter of "
                f"this model has {largest} elements; stage 3 on a CPU needs at least as many"
            )

    @property
    def has_muon(self) -> bool:
        """Whether DeepSpeed's Muon updates any parameter."""
        return any(kinds == ("momentum",) for kinds in self.kinds.values())

    def compute(
        self, microbatches: Microbatches, accumulator: StepAccumulator, backward: bool
    ) -> None:
        """Runs the microbatches; DeepSpeed reduces gradients in the backward of the last one.

        Raises RuntimeError where neither `step` nor `skip` followed the last backward: ZeRO keeps
        its gradient.
        """
        if backward and self._pending:
            raise RuntimeError(
                "engine deepspeed: every backward should be followed by a step or a skip"
            )
        self.current.microbatches, self.current.accumulator = microbatches, accumulator
        nothing, last = torch.empty(0), len(microbatches) - 1
        for index in torch.arange(len(microbatches)):
            if backward:
                self.engine.set_gradient_accumulation_boundary(int(index) == last)
            loss = self.engine(nothing, index)
            if backward:
                self.engine.backward(loss.sum() * self.world, scale_wrt_gas=False)
        self._pending = self._pending or backward
        self.current.microbatches, self.current.accumulator = (), None

    def make_gradients(self) -> None:
        """Raises ConfigError: DeepSpeed allocates the gradients of all parameters once."""
        raise ConfigError("engine deepspeed cannot freeze parameters")

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Returns the norm of the whole model's gradient; NaN where DeepSpeed calls it invalid."""
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
        return "and engine deepspeed does not report in which gradient"

    def step(self, learning_rate: float, norm: Tensor) -> None:
        """Updates the weights; DeepSpeed computes the norm again and clips."""
        self._copies.clear()
        for group in self._inner.param_groups:
            group["lr"] = learning_rate * group["factor"]
        self.engine.step()
        self._pending = False
        self.step_count += 1

    def skip(self) -> None:
        """Drops the gradient as DeepSpeed does after an overflow."""
        zero = self.engine.optimizer
        if self.stage == 0:
            zero.zero_grad()
        elif self.stage == 3:
            zero._pre_step()
            zero._partition_all_parameters()
            zero._overflow_clean_up(zero.loss_scale)
        else:
            checked, zero.check_grad_overflow = zero.check_grad_overflow, True
            zero.check_overflow = lambda *_, **__: setattr(zero, "overflow", True)
            zero.step()
            del zero.check_overflow
            zero.check_grad_overflow = checked
        self._pending = False

    @property
    def _inner(self) -> Any:
        """The torch optimizer, unwrapped from ZeRO's."""
        outer = self.engine.optimizer
        return getattr(outer, "optimizer", outer)

    def states(self) -> Iterator[StateSlice]:
        """Yields copies on the host: unsharded ones, but of Muon's momentum this rank's part.

        To restore, copy into the tensors of the last call, then call `restored`.
        """
        self._make_state()
        if self.stage in (1, 2):
            # DeepSpeed links states after the first group's step, when only Muon's exist.
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        copies: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            copies[f"master.{name}"] = self._read(parameter, None)
            if self.kinds[name] == _ADAM:
                for kind in _ADAM:
                    copies[f"{kind}.{name}"] = self._read(parameter, kind)
                copies[f"step.{name}"] = torch.full((1,), float(self.step_count))
        starts = {}
        for name, start, live in self._momenta():
            # DeepSpeed adds (1 - beta) of each gradient to the momentum, we all of it.
            copies[f"momentum.{name}"] = live.to("cpu", torch.float32, copy=True) / (1 - self.beta)
            starts[name] = start
        self._copies = copies
        for label, tensor in copies.items():
            kind, _, name = label.partition(".")
            yield StateSlice(kind, name, tensor, starts[name] if kind == "momentum" else 0)

    @torch.no_grad()
    def restored(self) -> None:
        """Copies the tensors of the last `states` into weights and states."""
        steps = 0.0
        for name, parameter in self.parameters.items():
            self._write(parameter, self._copies[f"master.{name}"], None)
            if self.kinds[name] == _ADAM:
                for kind in _ADAM:
                    self._write(parameter, self._copies[f"{kind}.{name}"], kind)
                steps = max(steps, float(self._copies[f"step.{name}"]))
        for name, _, live in self._momenta():
            live.copy_(self._copies[f"momentum.{name}"] * (1 - self.beta))
        for state in self._inner.state.values():
            if "step" in state:
                number = state["step"]
                is_tensor = isinstance(number, Tensor)
                state["step"] = torch.full_like(number, steps) if is_tensor else int(steps)
        self._copies.clear()
        self._round_parameters()

    def _momenta(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yields name, first element and live momentum, flattened, of this rank's parameters."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        zero, state = self.engine.optimizer, self._inner.state
        if self.stage == 0:
            for name, parameter in self.parameters.items():
                if self.kinds[name] == ("momentum",):
                    yield name, 0, state[parameter][MOMENTUM].view(-1)
        elif self.stage < 3:
            for number, owned in enumerate(zero.params_in_partition):
                if not owned or self.kinds[names[id(owned[0])]] == _ADAM:
                    continue
                flat = zero._muon_momentum_buffer(owned, number, torch.float32, self.grid.device)
                momenta = flat.split([p.numel() for p in owned])
                for parameter, momentum in zip(owned, momenta, strict=True):
                    yield names[id(parameter)], 0, momentum
        else:
            yield from self._sharded_momenta(names)

    def _sharded_momenta(self, names: Mapping[int, str]) -> Iterator[tuple[str, int, Tensor]]:
        """Yields this rank's shard of every matrix, without padding, in ZeRO 3."""
        zero = self.engine.optimizer
        for number, group in enumerate(zero.fp16_groups):
            if self.kinds[names[id(group[0])]] == _ADAM:
                continue
            flat, first = self._inner.state[zero.fp32_partitioned_groups_flat[number]][MOMENTUM], 0
            for parameter in group:
                size = parameter.partition_numel()
                start = size * self.grid.data.rank
                used = max(0, min(size, parameter.ds_numel - start))
                if used:
                    yield names[id(parameter)], start, flat[first : first + used]
                first += size

    @torch.no_grad()
    def _make_state(self) -> None:
        """Takes a step of learning rate 0, in which DeepSpeed and torch allocate their states."""
        if self.step_count > 0 or self._has_state:
            return
        self._has_state = True
        inner = self._inner
        rates = [group["lr"] for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = 0.0
        if self.stage == 3:
            self._make_sharded_state()
        else:
            parameters = [p for group in inner.param_groups for p in group["params"]]
            gradients = [p.grad for p in parameters]
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            inner.step()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate
        for state in inner.state.values():
            if "step" in state:
                state["step"] = state["step"] * 0

    def _make_sharded_state(self) -> None:
        zero = self.engine.optimizer
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            gradient = flat.grad
            flat.grad = torch.zeros_like(flat)
            zero._optimizer_step(number)
            flat.grad = gradient

    def _read(self, parameter: Tensor, kind: str | None) -> Tensor:
        """Returns a state, or the master where `kind` is None, unsharded, fp32 on the host."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._is_plain(parameter):
            value = parameter if kind is None else self._inner.state[parameter][kind]
        elif kind is None:
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, kind)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return value.detach().to("cpu", torch.float32, copy=True).view(shape)

    def _write(self, parameter: Tensor, value: Tensor, kind: str | None) -> None:
        """Sets a state, or the master where `kind` is None, from its unsharded value."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(self.grid.device)
        if hasattr(parameter, "ds_id"):
            self._write_shard(parameter, value, kind)
        elif self._is_plain(parameter):
            (parameter if kind is None else self._inner.state[parameter][kind]).copy_(value)
        elif kind is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def _write_shard(self, parameter: Any, value: Tensor, kind: str | None) -> None:
        """Sets this rank's shard in ZeRO 3; DeepSpeed's setter of unsharded values cannot pad."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.ds_numel
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self.world - value.numel()))
        shard = padded[size * self.grid.data.rank :][:size]
        if kind is None:
            safe_set_local_fp32_param(parameter, shard)
        else:
            safe_set_local_optimizer_state(parameter, shard, kind)

    def _is_plain(self, parameter: Tensor) -> bool:
        """Whether torch's optimizer has the parameter, and no master of it: ZeRO 0 in fp32."""
        return not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping")

    def _round_parameters(self) -> None:
        """Rounds the masters into the weights that forward and backward use."""
        zero = self.engine.optimizer
        if self.stage == 3:
            for number in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(number)
        elif hasattr(zero, "update_lp_params"):
            zero.update_lp_params()


def make_optimizer(
    parameters: Mapping[str, Tensor], table: Sequence[Assignment], config: RunConfig
) -> Any:
    """Returns torch's AdamW, or DeepSpeed's Muon with AdamW inside, with a group for each setting.

    DeepSpeed's update of a matrix of R rows and C columns has an RMS of 1/sqrt(C): a separate
    learning rate for each C gives it V4's RMS.
    """
    optim = config.optim
    rms = optim.muon.update_rms
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in table:
        factor, decay = entry.learning_rate_factor, entry.weight_decay
        is_muon = entry.matrices is not None
        if entry.matrices is not None:
            count, _, columns = entry.matrices
            factor, decay = factor * rms * columns**0.5, decay / (rms * columns**0.5)
        parameter: Any = parameters[entry.name]
        parameter.use_muon = is_muon
        parameter.is_expert_group = is_muon and len(entry.shape) == 3
        stacked = is_muon and len(entry.shape) == 2 and count > 1
        parameter.muon_num_heads = count if stacked else None
        group: dict[str, Any] = {
            "use_muon": is_muon,
            "factor": factor,
            "weight_decay": decay,
            "lr": 0.0,
        }
        if is_muon:
            params = (config.deepspeed or {}).get("optimizer", {}).get("params", {})
            group |= {"momentum": optim.muon.momentum, "ns_method": params.get("ns_method", "gram")}
        else:
            group |= {"betas": optim.adamw.betas, "eps": optim.adamw.eps}
        # A flat group has one dtype.
        key = (is_muon, factor, decay, parameter.dtype)
        groups.setdefault(key, {**group, "params": []})["params"].append(parameter)
    if not any(group["use_muon"] for group in groups.values()):
        return torch.optim.AdamW(list(groups.values()))
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam(list(groups.values()))


def _initialize(
    stage: nn.Module, make: Callable[[], Any], block: Mapping[str, Any], grid: Grid
) -> Any:
    """Calls `deepspeed.initialize`; makes a process group where there is one process."""
    if not dist.is_initialized():
        start_process_group(grid.device, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it, without torchrun as well
    deepspeed = import_deepspeed(grid.device)
    if block.get("zero_optimization", {}).get("stage") == 3:
        # Gathers a block's weights together.
        deepspeed.utils.set_z3_leaf_modules(stage, [Block])
    engine, *_ = deepspeed.initialize(
        model=stage, optimizer=make(), config=dict(block), dist_init_required=False
    )
    return engine


def import_deepspeed(device: torch.device) -> Any:
    """Imports deepspeed for training on `device`; its logger reports warnings and errors only."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that newer torch deprecates, several times a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # On CPUs it would compile, for minutes, a sum for inference that training never calls; if it is
    # killed meanwhile, torch's lock on the build makes every later start wait indefinitely.
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_SUM] = False
    return deepspeed
