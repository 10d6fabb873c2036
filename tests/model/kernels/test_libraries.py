"""Optional libraries: what they are called with, on stand-ins, and why they are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from model import ModelConfig
from model.kernel_cases import CASES, Case, Sizes
from model.kernel_cases.attention import attention_case
from model.kernels.backend import UnsupportedError
from model.kernels.operations import LIBRARIES, Choice
from tests.model.kernels.interpreter import interpreted
from tests.model.tiny import tiny_config
from tests.stand_ins import importable
from trainer.kernels.compare import fault_of, reference_of
from trainer.kernels.syrk_cases import syrk_case


def sizes(**changes: int) -> Sizes:
    config: ModelConfig = tiny_config(hc_mult=4, hc_sinkhorn_iters=3, hidden_size=64, **changes)
    return Sizes(config, (9, 3), torch.bfloat16, torch.device("cpu"), dense=True)


@contextlib.contextmanager
def flash_mla_in_fp16() -> Iterator[None]:
    """FlashMLA takes bf16 alone, whose matmuls Triton's interpreter does not compute."""
    from model.kernels.attention import flash_mla_triton

    with importable("flash_mla"), patch.object(flash_mla_triton, "_DTYPE", torch.float16):
        yield


def wide_sizes() -> Sizes:
    """V4's widths of attention, which FlashMLA is built for."""
    wide = {"num_attention_heads": 64, "head_dim": 512, "qk_rope_head_dim": 16}
    return replace(sizes(**wide, o_groups=8), samples=(13, 2), dtype=torch.float16)


def fault(case: Case, name: str) -> str | None:
    """What the check of kernels finds, against the truth in float64, gradients included."""
    return fault_of(case, case.function(Choice(name)), reference_of(case))[0]


@pytest.mark.parametrize("name", LIBRARIES)
def test_no_library_is_installed_or_required(name):
    with pytest.raises(UnsupportedError, match=f"{name} is not installed"):
        from model.kernels import backend

        backend.library(name)


@interpreted
def test_attention_to_selected_entries_through_flash_mla():
    with flash_mla_in_fp16():
        assert fault(attention_case(wide_sizes(), "csa", 2), "flash_mla") is None


@interpreted
def test_a_log_sum_exp_with_the_sink_in_it_would_be_found():
    def with_sink(*arguments, attn_sink, **others):
        out, top, lse = plain(*arguments, attn_sink=attn_sink, **others)
        return out, top, torch.logaddexp(lse, attn_sink)

    with flash_mla_in_fp16():
        import flash_mla

        plain = flash_mla.flash_mla_sparse_fwd
        flash_mla.flash_mla_sparse_fwd = with_sink
        reason = fault(attention_case(wide_sizes(), "csa", 2), "flash_mla")
    assert reason is not None and reason.startswith("gradient of ")


@interpreted
def test_flash_mla_says_what_it_does_not_take():
    with importable("flash_mla"):
        case = attention_case(sizes(head_dim=64, qk_rope_head_dim=16), "csa", 2)
        with pytest.raises(UnsupportedError, match="64 or 128 heads of width 512, not"):
            fault(case, "flash_mla")
        with pytest.raises(UnsupportedError, match=r"takes torch\.bfloat16, not torch\.float16"):
            fault(attention_case(wide_sizes(), "csa", 2), "flash_mla")


@pytest.mark.parametrize("number", range(3))
def test_streams_through_tile_kernels(number):
    with importable("tile_kernels"):
        cases = [make() for make in CASES["hyper_connections"].cases(sizes())]
        assert len(cases) == 3
        assert fault(cases[number], "tile_kernels") is None


def test_tile_kernels_takes_four_streams():
    with importable("tile_kernels"):
        two = replace(sizes(), config=tiny_config(hc_mult=2))
        case = next(CASES["hyper_connections"].cases(two))()
        with pytest.raises(UnsupportedError, match="4 streams, not 2"):
            fault(case, "tile_kernels")


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 129, 203)])
def test_symmetric_matmuls_through_quack(shape, adds):
    with importable("quack"):
        assert fault(syrk_case(sizes(), shape, adds), "quack") is None
