"""Recomputation changes no bit of any gradient, and keeps less."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import IGNORE_INDEX, SampleLayout, V4Model
from model.execution import BlockPart, Execution
from tests.model.tiny import random_model, random_tokens, tiny_config
from trainer.config import load_config
from trainer.parallel import recompute
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


def test_norms_keep_no_wide_copies_either() -> None:
    """In bf16: of each norm the output in 2 bytes and the input in 4."""
    plain, less = run((), torch.bfloat16), run(("norms",), torch.bfloat16)
    assert less[0] == plain[0]
    assert all(torch.equal(less[1][name], grad) for name, grad in plain[1].items())
    narrow = STREAM_BYTES // CONFIG.hc_mult // 2
    assert plain[2] - less[2] >= 2 * BLOCKS * 3 * narrow


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


class Host:
    """In place of `save_on_cpu`, which leaves tensors of a CPU where they are: copies as bytes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, pin_memory: bool) -> saved_tensors_hooks:
        assert not pin_memory  # wants a GPU

        def pack(saved: Tensor) -> tuple[bytes, torch.dtype, torch.Size]:
            self.sizes.append(saved.nbytes)
            return saved.detach().contiguous().numpy().tobytes(), saved.dtype, saved.shape

        def unpack(kept: tuple[bytes, torch.dtype, torch.Size]) -> Tensor:
            return torch.frombuffer(bytearray(kept[0]), dtype=kept[1]).view(kept[2])

        return saved_tensors_hooks(pack, unpack)


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
    through_torch = run(parts, offload=offload)
    host = Host()
    monkeypatch.setattr(recompute, "save_on_cpu", host)
    on_host = run(parts, offload=offload)
    for loss, grads, _ in (through_torch, on_host):
        assert loss == plain[0]
        assert all(torch.equal(grads[name], grad) for name, grad in plain[1].items())
    assert sum(host.sizes) == moved + (BLOCKS * TOKENS * 8 if "block" in parts else 0)  # token ids
    assert kept - on_host[2] == moved


def test_the_dry_run_counts_what_was_moved(tiny: Path) -> None:
    """Streams of every layer and of the MTP block, but for those that a stage got from another."""
    for stages in (1, 2):
        words = [f"parallel.pipeline={stages}", "parallel.recompute=[block]"]
        words += ["parallel.pipeline_layers_per_stage=[2, 1]"] if stages > 1 else []
        held = []
        for more in ([], ["parallel.offload=[block]"]):
            config = load_config(tiny, [*words, *more])
            ranks = count_memory(config, stages).ranks
            held.append([rank.stages[0].activations for rank in ranks])
        model, data = config.model, config.data
        tokens = data.micro_batch_size * data.seq_len
        streams = 4 * tokens * model.hc_mult * model.hidden_size
        moved = [(a - b) / streams for a, b in zip(*held, strict=True)]
        assert moved == ([model.num_hidden_layers + 1] if stages == 1 else [2, 1])
