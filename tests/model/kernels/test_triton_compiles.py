"""Every kernel compiles at V4's widths for every kind of GPU, without one, and fits into it.

The variants are those that the cases of the operations would launch (model/kernel_cases), so that a
new kernel or argument is compiled without a word here.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from model import ModelConfig
from model.kernel_cases import CASES, Sizes
from model.kernels.operations import Choice
from tests.model.kernels.compiled_code import CompiledCode
from tests.model.kernels.interpreter import compiled
from tests.model.tiny import tiny_config
from tests.trainer.kernels.target import target
from trainer.config import load_config
from trainer.kernels.compare import results
from trainer.kernels.fit import (
    DeviceLimits,
    Variant,
    compiled_for,
    exceeded,
    needs_of,
    record_variants,
)

STACK_BYTES = 512
"""More per thread would be registers spilled inside a loop, not around it. Of Hopper's kernels."""
SAMPLES = (1, 2, 129, 70)
CONFIGS = Path(__file__).parents[3] / "configs"
OTHERS = (80, 100, 120)
"""Compute capabilities other than Hopper's: A100, B200, RTX 50."""


def model_of(name: str) -> ModelConfig:
    """Widths of a shipped model, or narrow ones; the vocabulary only decides how often to loop."""
    if name == "narrow":
        sizes = {"head_dim": 128, "qk_rope_head_dim": 32, "num_attention_heads": 16}
        return tiny_config(**sizes, index_head_dim=64, vocab_size=4097)
    return load_config(CONFIGS / f"{name}.yaml").model.model_copy(update={"vocab_size": 4097})


def variants_of(
    operation: str, config: ModelConfig, choice: Choice, samples: tuple[int, ...] = SAMPLES
) -> list[Variant]:
    """What the operation's cases would compile, for the target in force."""
    sizes = Sizes(config, samples, torch.bfloat16, torch.device("cpu"), dense=True)
    variants: dict[str, Variant] = {}
    for make in CASES[operation].cases(sizes):
        case = make()
        call = partial(results, case, case.function(choice))
        variants |= {variant.key: variant for variant in record_variants(call)}
    return list(variants.values())


def assert_fits(variants: list[Variant], limits: DeviceLimits) -> list[CompiledCode]:
    assert variants
    compiled_codes = []
    for variant in variants:
        binary = compiled_for(variant, limits)
        assert exceeded(variant.name, needs_of(binary), limits) is None
        code = CompiledCode.of(binary)
        spills = limits.capability == 90 and code.stack_bytes > STACK_BYTES
        assert not spills, f"{variant.name}: {code.stack_bytes} bytes"
        compiled_codes.append(code)
    return compiled_codes


def quick_or_slow() -> list[Any]:
    """Operations by model and GPU; unmarked are those that take a few seconds."""
    quick = ("attention", "norms", "swiglu", "permute", "cross_entropy")
    slow = pytest.mark.slow
    out = [("narrow", operation, 90) for operation in quick]
    out += [
        pytest.param("flash", operation, capability, marks=slow)
        for operation in CASES
        for capability in (90, *OTHERS)
        # The 512-wide heads of attention have tests of their own; E4M3 needs 8.9.
        if operation != "attention" and (operation, capability) != ("fp8", 80)
    ]
    out += [pytest.param("narrow", "attention", capability, marks=slow) for capability in OTHERS]
    out += [pytest.param("pro", name, 90, marks=slow) for name in ("norms", "indexer")]
    return out


@pytest.mark.parametrize(("name", "operation", "capability"), quick_or_slow())
@compiled
def test_fits(name, operation, capability, tmp_path):
    import triton

    triton.knobs.cache.dir = str(tmp_path)
    with target(capability) as limits:
        assert_fits(variants_of(operation, model_of(name), Choice("triton")), limits)


@pytest.mark.parametrize("operation", [name for name in CASES if name not in ("fp8", "syrk")])
@compiled
def test_lengths_that_change_with_every_packing_compile_nothing_again(operation):
    """Triton compiles again where an integer turns 1, or a multiple of 16, unless asked not to."""
    config = model_of("narrow")
    with target(90):
        variants = [
            {variant.key for variant in variants_of(operation, config, Choice("triton"), samples)}
            for samples in ((1, 2, 129, 70), (63, 129), (3, 129, 72, 4), (129,))
        ]
    assert variants[0] and all(other <= variants[0] for other in variants)


FITTING = {90: 0, 100: 3, 80: 4, 120: 7}
"""Block sizes for 512-wide heads that are meant for a compute capability, by their place."""
WIDE = 2
PARTS = ("_forward", "_grad_queries", "_grad_keys", "_grad_selected", "_mass")
PENDING = {90: (2, 1, 5, 3, 2), 80: (1, 1, 5, 3, 1)}
"""The least number of copies that these kernels have under way while earlier ones are used."""


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("name", "capability"), [*(("flash", capability) for capability in FITTING), ("nano", 90)]
)
@compiled
def test_attention_of_v4_s_width_fits_with_some_block_sizes(part, name, capability, tmp_path):
    import triton

    triton.knobs.cache.dir = str(tmp_path)
    config = model_of(name)
    blocks = CASES["attention"].block_choices(config)[FITTING[capability]]
    with target(capability) as limits:
        variants = variants_of("attention", config, Choice("triton", blocks))
        codes = assert_fits([v for v in variants if v.name.endswith(f".{part}")], limits)
    pending = PENDING.get(capability, (0,) * len(PARTS))[PARTS.index(part)]
    assert min(code.pending_copies for code in codes) >= pending


@compiled
def test_streams_are_mixed_without_exchanges_between_threads():
    with target(90) as limits:
        variants = variants_of("hyper_connections", model_of("narrow"), Choice("triton"))
        codes = {
            v.name: CompiledCode.of(compiled_for(v, limits)) for v in variants if "mix." in v.name
        }
    assert len(codes) == 4
    for name in ("mix._mix", "mix._write"):
        assert codes[name].exchanges == codes[name].shared_bytes == 0
    # Backward exchanges a few sums after its loop. 128 registers leave room for four programs.
    assert all(code.shared_bytes <= 256 for code in codes.values())
    assert all(code.registers <= 128 and not code.stack_bytes for code in codes.values())


@compiled
def test_the_selection_copies_keys_ahead_and_leaves_room_for_two_programs():
    with target(90) as limits:
        variants = variants_of("indexer", model_of("flash"), Choice("triton"))
        codes = [CompiledCode.of(compiled_for(variant, limits)) for variant in variants]
    for code in codes:
        assert code.pending_copies == 1 and code.registers <= 128 and code.stack_bytes <= 32
        assert 2 * code.shared_bytes <= limits.shared_bytes


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 120])
@compiled
def test_wide_block_sizes_do_not_fit_smaller_gpus(capability, tmp_path):
    """The negative control, and the reason for the others; Blackwell's 10.0 has room as well."""
    import triton

    triton.knobs.cache.dir = str(tmp_path)
    part = "_grad_queries" if capability == 80 else "_grad_keys"
    config = model_of("flash")
    wide = CASES["attention"].block_choices(config)[WIDE]
    with target(capability) as limits:
        variants = variants_of("attention", config, Choice("triton", wide))
        variant = next(v for v in variants if v.name.endswith(part))
        reason = exceeded(variant.name, needs_of(compiled_for(variant, limits)), limits)
    assert "bytes of shared memory, this GPU has" in str(reason)
