"""Kernels are compiled for GPUs that are not there, and refused where they would not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from model.kernel_cases import CASES, Sizes
from model.kernels.operations import Choice
from tests.model.kernels.interpreter import compiled
from tests.model.tiny import tiny_config
from tests.trainer.kernels.target import target
from trainer.kernels.compare import results
from trainer.kernels.examine import Bench, Examination
from trainer.kernels.fit import DeviceLimits, Needs, Variant, exceeded, misfit, record_variants
from trainer.kernels.syrk_cases import syrk_cases

CONFIG = tiny_config(head_dim=64, qk_rope_head_dim=16)


def variants_of(operation: str) -> list[Variant]:
    """What the operation's cases would compile, for the target in force."""
    sizes = Sizes(CONFIG, (1, 2, 37), torch.bfloat16, torch.device("cpu"), dense=True)
    variants: dict[str, Variant] = {}
    for make in CASES[operation].cases(sizes):
        case = make()
        call = partial(results, case, case.function(Choice("triton")))
        variants |= {variant.key: variant for variant in record_variants(call)}
    return list(variants.values())


def test_limits_are_named():
    limits = DeviceLimits(120, 101_376)
    assert exceeded("norm._forward", Needs(101_376, 512), limits) is None
    assert exceeded("norm._forward", Needs(101_377, 0), limits) == (
        "norm._forward needs 101,377 bytes of shared memory, this GPU has 101,376"
    )
    assert exceeded("norm._forward", Needs(0, 513), limits) == (
        "norm._forward needs 513 columns of tensor memory, this GPU has 512"
    )


@compiled
def test_every_kernel_of_forward_and_backward_is_recorded():
    with target(90):
        variants = variants_of("norms")
    names = [variant.name for variant in variants]
    assert {"norm._forward", "norm._backward"} == set(names)
    # hidden states, low-rank queries, keys, and fp32 entries of two widths
    assert names.count("norm._backward") == 5
    assert all(variant.options["num_warps"] == 8 for variant in variants)


@compiled
def test_a_kernel_that_does_not_compile_is_a_misfit():
    """E4M3 is a type from compute capability 8.9 on."""
    with target(80) as limits:
        variants = [v for v in variants_of("fp8") if v.name == "quantise._quantise_weight"]
        reason = misfit(variants[:1], limits)
    assert reason is not None
    assert reason.startswith("quantise._quantise_weight does not compile for it: ")
    assert "\n" not in reason


@compiled
def test_a_block_size_that_does_not_fit_is_refused_and_another_remains():
    """Of two sizes of tiles of the symmetric matmul, one is too large for consumer Blackwell."""
    large, small = {"block": 128, "block_k": 256}, {"block": 128, "block_k": 32}
    sizes = Sizes(CONFIG, (1,), torch.bfloat16, torch.device("cpu"))
    remaining = {}
    for capability in (90, 120):
        with target(capability) as limits:
            fits = partial(misfit, limits=limits)
            bench = Bench(torch.device("cpu"), record_variants, fits, no_clock, 0)
            examination = Examination([Choice("triton", large), Choice("triton", small)])
            examination.fit(list(syrk_cases(sizes, ((128, 256),)))[:1], bench)
        remaining[capability] = [choice.blocks for _, choice in examination.remaining]
    assert remaining == {90: [large, small], 120: [small]}
    assert examination.refused[0] == (
        "syrk._syrk needs 131,072 bytes of shared memory, this GPU has 101,376"
    )


def no_clock(calls: Sequence[Callable[[], object]]) -> list[float]:
    raise AssertionError("nothing is timed")
