"""Core attention against whole masks in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from model import SampleLayout
from model.kernels.attention import (
    AttentionInputs,
    attention_with_lse2,
    entry_probability_mass,
)
from model.kernels.attention.naive import naive_attention, naive_probabilities, naive_selection_mask
from model.positions import Positions
from tests.model.kernels.compare import assert_same, rand
from tests.model.tiny import tiny_config

EPS, THETA, ROTARY = 1e-2, 10000.0, 4
"""An eps far larger than V4's, so that a forgotten one shows."""
Lengths = list[list[int]]


class Case:
    """Samples, window and compression of one call, with whole masks for the naive version."""

    def __init__(
        self,
        lengths: Lengths,
        window: int,
        ratio: int | None,
        heads: int,
        dim: int,
        rotary: int = ROTARY,
        device: str = "cpu",
    ):
        self.window, self.ratio, self.heads, self.dim = window, ratio, heads, dim
        self.rotary = rotary
        self.samples = list(itertools.chain(*lengths))
        self.tokens = sum(self.samples)
        config = tiny_config(
            sliding_window=window,
            csa_compress_ratio=ratio or 4,
            head_dim=max(dim, 16),
            index_head_dim=max(rotary, 16),
            qk_rope_head_dim=rotary,
            rope_theta=THETA,
            compress_rope_theta=THETA,
            rope_scaling=None,
        )
        positions = Positions.of_microbatch(
            config, SampleLayout.from_lengths(lengths, device=device)
        )
        kind = "window" if ratio is None else "csa"
        self.ranges, self.rotation = positions.ranges(kind), positions.rotation(kind)
        self._write_masks()
        self.sees_token, self.sees_entry = self.sees_token.to(device), self.sees_entry.to(device)
        self.position = self.position.to(device)

    def _write_masks(self) -> None:
        rows, entry_rows, position, start = [], [], [], 0
        entries = sum(n // self.ratio for n in self.samples) if self.ratio else 0
        first_entry = 0
        for n in self.samples:
            for t in range(n):
                row = torch.zeros(self.tokens, dtype=torch.bool)
                row[start + max(0, t - self.window + 1) : start + t + 1] = True
                sees_entry = torch.zeros(entries, dtype=torch.bool)
                if self.ratio:
                    sees_entry[first_entry : first_entry + (t + 1) // self.ratio] = True
                rows.append(row)
                entry_rows.append(sees_entry)
                position.append(t)
            start += n
            first_entry += n // self.ratio if self.ratio else 0
        self.sees_token = torch.stack(rows)
        self.sees_entry = torch.stack(entry_rows)
        self.position = torch.tensor(position, dtype=torch.float64)
        self.entries = entries

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """q, kv, entries (where there are any), sink."""
        out = [
            rand(self.tokens, self.heads, self.dim, seed=1).to(dtype),
            rand(self.tokens, self.dim, seed=2).to(dtype),
        ]
        if self.ratio:
            out.append(rand(self.entries, self.dim, seed=3).to(dtype))
        return [*out, rand(self.heads, seed=4)]

    def select(self, k: int) -> Tensor:
        """Random choices [T, k] in random order, then -1; all where a query sees at most k."""
        generator = torch.Generator().manual_seed(5)
        selected = torch.full((self.tokens, k), -1, dtype=torch.int32)
        for t, row in enumerate(self.sees_entry.cpu()):
            visible = row.nonzero()[:, 0]
            order = torch.randperm(len(visible), generator=generator)[:k]
            selected[t, : len(order)] = visible[order].to(torch.int32)
        return selected.to(self.sees_entry.device)

    def arguments(self, *inputs: Tensor, selected: Tensor | None = None) -> AttentionInputs:
        q, kv, *entries, sink = inputs
        return AttentionInputs(
            q,
            kv,
            entries[0] if entries else None,
            sink,
            self.rotation,
            self.ranges,
            selected,
            window=self.window,
            norm_eps=EPS,
        )

    def run(self, *inputs: Tensor, selected: Tensor | None = None) -> Tensor:
        return attention_with_lse2(self.arguments(*inputs, selected=selected))[0]

    def naive(self, *inputs: Tensor, selected: Tensor | None = None) -> Tensor:
        return naive_attention(*self._whole(inputs, selected))

    def probabilities(self, *inputs: Tensor, selected: Tensor | None = None) -> Tensor:
        """[T, H, S]: of tokens, then of entries; the sink has the rest."""
        return naive_probabilities(*self._whole(inputs, selected))

    def _whole(self, inputs: tuple[Tensor, ...], selected: Tensor | None) -> tuple[Any, ...]:
        q, kv, *entries, sink = inputs
        steps = THETA ** (-torch.arange(0, self.rotary, 2, dtype=torch.float64) / self.rotary)
        angle = self.position[:, None] * steps.to(q.device)
        rotation = torch.polar(torch.ones_like(angle), angle)
        sees = self.sees_entry
        if selected is not None:
            sees = sees & naive_selection_mask(selected, self.entries)
        entries_CK = entries[0] if entries else None
        return q, kv, entries_CK, sink, rotation, self.sees_token, sees, EPS


CASES = {
    "window only, odd length": Case([[37]], 8, None, 3, 12),
    "window not a multiple of four": Case([[61]], 7, 4, 2, 8),
    "window of one": Case([[19]], 1, 4, 2, 8),
    "window longer than everything": Case([[50]], 128, 4, 2, 8),
    "shorter than a band": Case([[3]], 128, 4, 2, 8),
    "one token": Case([[1]], 8, 4, 2, 8),
    "no complete window anywhere": Case([[3, 1, 2]], 8, 4, 2, 8),
    "samples of 1 to 1000 tokens": Case([[1, 2, 3, 4, 5, 1000, 31]], 32, 4, 2, 8),
    "long samples between ones without entries": Case([[15, 130, 3], [7, 100, 41]], 16, 16, 4, 8),
    "many heads, several chunks": Case([[300, 57]], 24, 8, 16, 8),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_whole_masks(name):
    case = CASES[name]
    assert_same(case.run, case.naive, case.inputs(), rtol=2e-5)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.ratio])
def test_selection_equals_whole_masks(name, k):
    case = CASES[name]
    selected = case.select(k)
    if case.tokens > 4 * (k + 1):
        assert (selected == -1).any()
    assert_same(
        lambda *x: case.run(*x, selected=selected),
        lambda *x: case.naive(*x, selected=selected),
        case.inputs(),
        rtol=2e-5,
    )


def test_a_large_selection_changes_nothing():
    case = CASES["many heads, several chunks"]
    inputs = case.inputs()
    everything = case.run(*inputs, selected=case.select(case.entries))
    torch.testing.assert_close(case.run(*inputs), everything, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("name", ["window only, odd length", "samples of 1 to 1000 tokens"])
def test_bf16(name, k):
    case = CASES[name]
    selected = case.select(k) if k and case.ratio else None
    inputs = case.inputs(torch.bfloat16)
    assert case.run(*inputs, selected=selected).dtype == torch.bfloat16
    assert_same(
        lambda *x: case.run(*x, selected=selected),
        lambda *x: case.naive(*x, selected=selected),
        inputs,
        rtol=2e-2,
    )


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_extreme_logits_stay_finite(size):
    """Queries are normed, so that only keys and sinks can be large; one key then has it all."""
    case = CASES["window not a multiple of four"]
    q, kv, entries, sink = case.inputs()
    leaves = [x.requires_grad_() for x in (q, kv * size, entries * size, sink * size)]
    for leaf in leaves:
        leaf.retain_grad()
    out = case.run(*leaves)
    out.sum().backward()
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in leaves)
    largest = max(kv.abs().max(), entries.abs().max())
    assert float(out.detach().abs().max()) <= 2 * size * float(largest)


def test_queries_of_zero_have_finite_gradients():
    case = CASES["one token"]
    q, kv, entries, sink = case.inputs()
    q = torch.zeros_like(q).requires_grad_()
    case.run(q, kv, entries, sink).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("fault", ["sink", "window", "entry", "rotation"])
def test_a_small_fault_is_detected(fault):
    """The negative control: each mask and term of the naive version matters at this tolerance."""
    case = Case([[61]], 7, 4, 2, 8)
    inputs = case.inputs()
    if fault == "window":
        case.sees_token[40, 33] = True
    elif fault == "entry":
        case.sees_entry[40, 10] = True
    elif fault == "rotation":
        case.position[40] += 0.01
    moved = 1e-3 if fault == "sink" else 0.0
    with pytest.raises(AssertionError, match="result 0"):
        assert_same(case.run, lambda *x: case.naive(*x[:-1], x[-1] + moved), inputs, 2e-5)


@pytest.mark.parametrize("k", [None, 5])
def test_probability_mass_of_entries_equals_whole_masks(k):
    """Probabilities of one softmax with window and sink, summed over heads, by blocks or lists."""
    case = CASES["samples of 1 to 1000 tokens"]
    inputs = case.inputs()
    selected = case.select(k) if k else None
    arguments = case.arguments(*inputs, selected=selected)
    _, lse2 = attention_with_lse2(arguments)
    exact = case.probabilities(*[x.double() for x in inputs], selected=selected)
    expected = exact[..., case.tokens :].sum(1)
    if selected is None:
        halves = [
            entry_probability_mass(arguments, lse2, start=start, stop=stop)
            for start, stop in ((0, 99), (99, None))
        ]
        mass = torch.cat(halves, 1)
    else:
        selected_mass = entry_probability_mass(arguments, lse2)
        rows = (selected >= 0).nonzero()[:, 0]
        mass = torch.zeros(expected.shape)
        mass[rows, selected[selected >= 0].long()] = selected_mass[selected >= 0]
        assert (selected_mass[selected < 0] == 0).all()
    torch.testing.assert_close(mass.double(), expected, rtol=0, atol=2e-5)


def test_strided_queries_give_the_same():
    case = Case([[37]], 8, 4, heads=3, dim=8)
    q = rand(case.dim, case.heads, case.tokens, seed=1)
    kv, sink = rand(case.tokens, case.dim, seed=2), rand(case.heads, seed=3)
    results = []
    for queries in (q.permute(2, 1, 0), q.permute(2, 1, 0).contiguous()):
        results.append(case.run(queries.float(), kv.float(), sink.float()))
    assert torch.equal(*results)
