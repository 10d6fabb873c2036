"""The quantised model against one whose weights are rounded naively."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model import IGNORE_INDEX, SampleLayout, V4Model
from model import indexer as indexer_module
from model.block import Block
from model.exchange import LocalExchange
from model.execution import Execution
from model.kernels.hadamard import hadamard, naive_hadamard
from model.kernels.indexer import IndexerInputs
from model.kernels.mxfp4 import fits_fp8, from_fp8, naive_quantise_dequantise, quantise, to_fp8
from model.positions import Positions
from model.qat import fake_quantised, rounded_weights
from tests.model.kernels.fp8.test_kv import reference as naive_kv
from tests.model.tiny import random_model, random_tokens, tiny_config
from trainer.parallel.recompute import ActivationCheckpointing

SIZES = {"moe_intermediate_size": 64, "index_head_dim": 32}
ALL_SEEN = {"index_topk": 512}  # nothing to choose: the indexer is idle


def rounded_copy(model: V4Model) -> V4Model:
    """A plain model whose routed experts, and nothing else, are rounded naively."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".ffn.experts." in name:
                parameter.copy_(naive_quantise_dequantise(parameter))
    return twin


def losses(model: V4Model) -> Tensor:
    """The loss of two packed rows; leaves gradients in the model."""
    tokens = random_tokens(model.config, 2, 48)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    loss = model(tokens, SampleLayout.from_lengths([[48], [13, 35]]), targets).loss
    loss.backward()
    return loss.detach()


def gradients(model: V4Model) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_the_rounded_weights(dtype: torch.dtype) -> None:
    model = random_model(tiny_config(**SIZES, **ALL_SEEN), dtype=dtype)
    twin, before = rounded_copy(model), copy.deepcopy(model.state_dict())
    with fake_quantised(model, kv=False):
        found = losses(model)
    assert torch.equal(found, losses(twin))
    ours, theirs = gradients(model), gradients(twin)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert any(".mtp." in f".{name}" and ".experts." in name for name in ours)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()), "masters stay"


def test_outside_nothing_has_changed() -> None:
    model = random_model(tiny_config(**SIZES))
    plain = losses(model)
    with pytest.raises(RuntimeError, match="broken"), fake_quantised(model):
        assert not torch.equal(losses(model), plain)
        raise RuntimeError("broken")
    assert torch.equal(losses(model), plain) and not rounded_weights(model)


def test_recomputation_sees_the_same_weights() -> None:
    grads = []
    for parts in ((), ("block",)):
        execution = Execution(call_part=ActivationCheckpointing(parts))
        model = random_model(tiny_config(**SIZES), execution=execution)
        with fake_quantised(model):
            losses(model)
        grads.append(gradients(model))
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_weights_are_rounded_once() -> None:
    model = random_model(tiny_config(**SIZES))
    experts = [block.ffn.experts for block in model.modules() if isinstance(block, Block)]
    with fake_quantised(model):
        held = rounded_weights(model)
        assert len(held) == 3 * len(experts) == 3 * (4 + 1)
        losses(model), losses(model)
        assert all(one is other for one, other in zip(held, rounded_weights(model), strict=True))


def test_fp8_holds_the_experts_without_loss() -> None:
    model = random_model(tiny_config(**SIZES))
    with fake_quantised(model):
        for stack in rounded_weights(model):
            for matrix in stack:
                packed = quantise(matrix)
                assert fits_fp8(packed).all()
                numbers, scales = to_fp8(packed)
                assert numbers.dtype == torch.float8_e4m3fn
                assert torch.equal(from_fp8(numbers, scales), matrix)


def test_only_the_index_sees_rotated_and_rounded_queries_and_keys() -> None:
    model = random_model(tiny_config(**SIZES))
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def select(inputs: IndexerInputs, *more: Any) -> Tensor:
        calls.append((inputs.q_TIJ, inputs.keys_CJ, inputs.weights_TI))
        return select_topk(inputs, *more)

    select_topk = indexer_module.select_topk
    with patch.object(indexer_module, "select_topk", select):
        losses(rounded_copy(model))
        with fake_quantised(model, kv=False):
            losses(model)
    # Of the first CSA layer: what comes after it differs by what the indexer selected.
    plain, found = calls[0], calls[len(calls) // 2]
    for before, after in zip(plain[:2], found[:2], strict=True):
        turned = naive_hadamard(before.double())
        expected = naive_quantise_dequantise(turned.float())
        close = (turned - expected.double()).abs() + 1e-5 < (turned - after.double()).abs()
        assert not close.any(), "not the nearest"
        assert (after != expected).float().mean() < 1e-3  # where rounding in fp32 meets a tie
        assert torch.equal(naive_quantise_dequantise(after), after)
    assert torch.equal(plain[2], found[2]), "the heads' weights stay"


def test_the_index_learns_straight_through() -> None:
    model = random_model(tiny_config(**SIZES))
    index = model.attentions()[1].indexer
    assert index is not None
    layout = SampleLayout.from_lengths([[48], [13, 35]])
    x = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    positions = Positions.of_microbatch(model.config, layout)
    inputs = x, torch.randn(96, model.config.q_lora_rank), positions, LocalExchange()
    upstream = torch.randn(96, 16, 32), torch.randn(48 // 4 + 13 // 4 + 35 // 4, 32)

    def grads(turn: Callable[[Tensor], Tensor]) -> list[Tensor]:
        found = index(*inputs)
        parts = zip((found.q_TIJ, found.keys_CJ), upstream, strict=True)
        total = sum((turn(part) * up).sum() for part, up in parts)
        weights = index.wq_b.weight, index.compressor.wkv.weight, index.compressor.ape
        return list(torch.autograd.grad(total, weights))

    plain = grads(hadamard)
    with fake_quantised(model):
        ours = grads(lambda part: part)
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_entries_are_rounded_as_inference_stores_them(dtype: torch.dtype) -> None:
    """Of window, CSA, HCA and MTP layers; not the index, which has a rounding of its own."""
    config = tiny_config(**SIZES, head_dim=80, qk_rope_head_dim=8)  # blocks of 64 and of 8
    model = random_model(config, dtype=dtype)
    layout = SampleLayout.from_lengths([[48], [13, 35]])
    positions, exchange = Positions.of_microbatch(config, layout), LocalExchange()
    x = torch.randn(96, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    kinds = set()
    for attention in model.attentions().values():
        _, plain = attention._inputs(x, positions, exchange)
        with fake_quantised(model):
            _, rounded = attention._inputs(x, positions, exchange)
        with fake_quantised(model, kv=False):
            _, unrounded = attention._inputs(x, positions, exchange)
        assert torch.equal(rounded.q_THK, plain.q_THK)
        for before, after, other in zip(plain[1:], rounded[1:], unrounded[1:], strict=True):
            if before is None:
                assert attention.kind == "window" and after is None and other is None
                continue
            assert torch.equal(after.double(), naive_kv(before, 8)) and torch.equal(before, other)
        kinds.add(attention.kind)
    assert kinds == {"window", "csa", "hca"} and len(model.attentions()) == 5


def test_the_kv_learns_straight_through() -> None:
    config = tiny_config(**SIZES)
    model = random_model(config)
    positions = Positions.of_microbatch(config, SampleLayout.from_lengths([[96]]))
    attention = model.attentions()[2]
    weights = attention.wkv.weight, attention.compressor.wkv.weight, attention.compressor.ape
    x = torch.randn(96, 32)
    upstream = torch.randn(96, 16), torch.randn(6, 16)

    def grads() -> tuple[Tensor, ...]:
        _, inputs = attention._inputs(x, positions, LocalExchange())
        parts = zip((inputs.kv_TK, inputs.entries_CK), upstream, strict=True)
        return torch.autograd.grad(sum((part * up).sum() for part, up in parts), weights)

    plain = grads()
    with fake_quantised(model):
        ours = grads()
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))
