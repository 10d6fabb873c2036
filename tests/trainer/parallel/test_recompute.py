"""Recomputation changes no bit of any gradient, and keeps less."""

from __future__ import annotations

import gc
import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import IGNORE_INDEX, SampleLayout, V4Model
from model.execution import BlockPart, Execution
from tests.model.tiny import random_model, random_tokens, tiny_config
from trainer.config import load_config
from trainer.parallel import offload as offloading
from trainer.parallel import recompute
from trainer.parallel.offload import HostOffload
from trainer.parallel.recompute import ActivationCheckpointing
from trainer.planning.dry_run import count_memory

TOKENS = 96
CONFIG = tiny_config(hidden_size=64)
STREAM_BYTES = TOKENS * CONFIG.hc_mult * CONFIG.hidden_size * 4
BLOCKS = CONFIG.num_hidden_layers + 1


def loss_of(model: V4Model) -> Tensor:
    tokens = random_tokens(CONFIG, 1, TOKENS)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    return model(tokens, SampleLayout.from_lengths([[40, 56]]), targets).loss


def run(
    parts: tuple[BlockPart, ...],
    dtype: torch.dtype = torch.float32,
    offload: tuple[BlockPart, ...] = (),
) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients, and bytes that forward leaves for backward."""
    execution = Execution(call_part=ActivationCheckpointing(parts, offload))
    model = random_model(CONFIG, dtype=dtype, execution=execution)
    with Storages(model) as storages:
        loss = loss_of(model)
    kept = storages.alive()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss), grads, kept


class Storages(TorchDispatchMode):
    """Weak references to every storage but the model's that operations return while active."""

    def __init__(self, model: V4Model) -> None:
        super().__init__()
        self.own = {p.untyped_storage()._cdata for p in model.parameters()}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.own:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        """Bytes of those that something still holds."""
        gc.collect()
        return sum(size for reference, size in self.made.values() if not reference.expired())


@pytest.fixture(scope="module")
def plain() -> tuple[float, dict[str, Tensor], int]:
    return run(())


@pytest.mark.parametrize(
    ("parts", "saved"),
    [
        # Of each block the streams in the middle, and of each norm its output.
        (("streams",), BLOCKS * STREAM_BYTES),
        (("norms",), BLOCKS * 2 * STREAM_BYTES // CONFIG.hc_mult),
        (("streams", "norms"), BLOCKS * STREAM_BYTES * (1 + 2 / CONFIG.hc_mult)),
        (("attention",), BLOCKS * STREAM_BYTES),
        (("attention", "norms", "streams"), 2 * BLOCKS * STREAM_BYTES),
        (("block",), 4 * BLOCKS * STREAM_BYTES),
        (("block", "attention"), 4 * BLOCKS * STREAM_BYTES),
    ],
)
def test_same_gradients_with_less_kept(
    plain: tuple[float, dict[str, Tensor], int], parts: tuple[BlockPart, ...], saved: float
) -> None:
    loss, grads, kept = run(parts)
    assert loss == plain[0]
    assert grads.keys() == plain[1].keys()
    different = [name for name in grads if not torch.equal(grads[name], plain[1][name])]
    assert not different
    assert plain[2] - kept >= saved, (plain[2], kept)


def test_norms_keep_no_outputs_either() -> None:
    """In bf16: of each of a block's two norms the output in 2 bytes; wide copies are never kept."""
    plain, less = run((), torch.bfloat16), run(("norms",), torch.bfloat16)
    assert less[0] == plain[0]
    assert all(torch.equal(less[1][name], grad) for name, grad in plain[1].items())
    narrow = STREAM_BYTES // CONFIG.hc_mult // 2
    assert plain[2] - less[2] >= 2 * BLOCKS * narrow


def test_nothing_stays_after_backward() -> None:
    for parts in ((), ("streams", "norms"), ("attention",), ("block",)):
        execution = Execution(call_part=ActivationCheckpointing(parts))  # type: ignore[arg-type]
        model = random_model(CONFIG, execution=execution)
        with Storages(model) as storages:
            loss = loss_of(model)
            loss.backward()
        grads = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        del loss
        assert storages.alive() <= grads + 10_000  # frequencies and the like


class Host(HostOffload):
    """A host with other memory than the device: `Storages` does not count numpy's arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def to_host(self, tensor: Tensor) -> Any:
        self._leaving.append((tensor, torch.cpu.Event()))
        self.sizes.append(tensor.nbytes)
        return tensor.numpy().copy()

    def to_device(self, tensor: Any, device: torch.device) -> tuple[Tensor, Any]:
        return torch.from_numpy(tensor), torch.cpu.Event()


@pytest.mark.parametrize(
    ("parts", "offload", "moved"),
    [
        # Of each block the streams, of attention its input of one stream's width.
        (("block",), ("block",), BLOCKS * STREAM_BYTES),
        (("attention",), ("attention",), BLOCKS * STREAM_BYTES // CONFIG.hc_mult),
    ],
)
def test_inputs_wait_on_the_host(
    plain: tuple[float, dict[str, Tensor], int],
    parts: tuple[BlockPart, ...],
    offload: tuple[BlockPart, ...],
    moved: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No bit of loss and gradients changes, and what is kept is less by what was moved."""
    kept = run(parts)[2]
    copied = run(parts, offload=offload)
    host = Host()
    monkeypatch.setattr(recompute, "HostOffload", lambda: host)
    on_host = run(parts, offload=offload)
    for loss, grads, _ in (copied, on_host):
        assert loss == plain[0]
        assert all(torch.equal(grads[name], grad) for name, grad in plain[1].items())
    assert sum(host.sizes) == moved
    assert kept - on_host[2] == moved - moved // BLOCKS  # the last one may still be on its way


def test_the_dry_run_counts_what_was_moved(tiny: Path) -> None:
    """Streams of every layer and of the MTP block, but for those from another stage.

    And for those of one layer, which are on their way back while the next one is in backward.
    """
    for stages in (1, 2):
        words = [f"parallel.pipeline={stages}", "parallel.recompute=[block]"]
        words += ["parallel.pipeline_layers_per_stage=[2, 1]"] if stages > 1 else []
        held, on_host = [], []
        for more in ([], ["parallel.offload=[block]"]):
            config = load_config(tiny, [*words, *more])
            ranks = count_memory(config, stages).ranks
            held.append([rank.stages[0].activations for rank in ranks])
            on_host.append([rank.offloaded / rank.stages[0].in_flight for rank in ranks])
        model, data = config.model, config.data
        tokens = data.micro_batch_size * data.seq_len
        streams = 4 * tokens * model.hc_mult * model.hidden_size
        moved = [(a - b) / streams for a, b in zip(*held, strict=True)]
        assert moved == ([model.num_hidden_layers] if stages == 1 else [1, 0])
        locked = 2 ** math.ceil(math.log2(streams))
        assert on_host == [[0] * stages, [locked * n for n in ([4] if stages == 1 else [2, 2])]]


class Device:
    """In place of `torch.cuda`: writes down what streams are asked to do, in the host's order."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.copies = 0

    def Stream(self) -> Device:
        return self

    def current_stream(self) -> None:
        pass

    def stream(self, stream: Device) -> AbstractContextManager[None]:
        return nullcontext()

    def wait_stream(self, other: None) -> None:
        self.log.append(("copy", self.copies))

    def Event(self) -> Any:
        self.copies += 1
        return SimpleNamespace(record=lambda: None, wait=partial(self._wait, self.copies - 1))

    def _wait(self, number: int) -> None:
        self.log.append(("wait for", number))


def test_copies_run_beside_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy is started a part before it is waited for, and never waited for by the host."""
    device = Device()
    monkeypatch.setattr(offloading.torch, "get_device_module", lambda name: device)
    call = ActivationCheckpointing(["block"], ["block"])

    def part(number: int, x: Tensor, microbatch: object) -> Tensor:
        device.log.append(("compute", number))
        return (x * number).sin()

    x = torch.ones(3, requires_grad=True)
    microbatch = object()
    for number in (1, 2, 3):
        x = call("block", partial(part, number), x, microbatch)
    forward, device.log = device.log, []
    x.sum().backward()
    of_parts = [[("copy", n), ("compute", n + 1)] for n in range(3)]
    assert forward == [*of_parts[0], ("wait for", 0), *of_parts[1], ("wait for", 1), *of_parts[2]]
    assert device.log == [
        *[("wait for", 2), ("copy", 3), ("wait for", 3)],  # the last part's: out, and back at once
        *[("copy", 4), ("compute", 3), ("wait for", 4)],
        *[("copy", 5), ("compute", 2), ("wait for", 5), ("compute", 1)],
    ]


def test_another_microbatch_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines have several in flight: the first part of one follows the last of another."""
    device = Device()
    monkeypatch.setattr(offloading.torch, "get_device_module", lambda name: device)
    call = ActivationCheckpointing(["block"], ["block"])
    inputs = [torch.ones(3, requires_grad=True) for _ in range(2)]
    outs = [call("block", lambda x, _: x.sin(), x, object()) for x in inputs]
    device.log.clear()
    outs[1].sum().backward()
    assert [what for what, _ in device.log].count("copy") == 1
    outs[0].sum().backward()
    assert [what for what, _ in device.log].count("copy") == 2
