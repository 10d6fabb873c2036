"""The sizes of a run at which its kernels are checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import V4Model
from model.kernel_cases import Sizes
from model.kernel_cases.attention import attention_cases
from model.kernel_cases.case import visible_entries
from model.kernel_cases.fp8 import linears_of
from model.linear import Linear
from model.rope import layer_frequencies, rotation
from tests.model.tiny import tiny_config
from trainer.config import load_config
from trainer.kernels import problem
from trainer.kernels.examine import Bench, cases_of, sizes_of
from trainer.kernels.problem import problem_of
from trainer.kernels.verdict import Problem

CONFIGS = Path(__file__).parents[3] / "configs"
CPU = torch.device("cpu")
BENCH = Bench(CPU, lambda call: [], lambda variants: None, lambda calls: [], 0, samples=(3, 2))


def test_samples_of_the_checked_microbatch_are_as_long_as_rows():
    """nano.yaml: four rows of 4096 tokens; the model itself reads up to a million."""
    ragged, large = sizes_of(problem_of(load_config(CONFIGS / "nano.yaml"), CPU), BENCH)
    assert ragged.samples == (3, 2) and ragged.dense
    assert large.samples == (4096, 4096) and not large.dense


@pytest.mark.parametrize(
    ("settings", "tokens"), [([], 8192), (["parallel.context=16"], 4096)], ids=["one", "context"]
)
def test_queries_of_a_long_row_see_its_entries_wherever_the_row_is_cut(settings, tokens):
    """Rows of 64K: a rank's tokens, or the most that are checked, are the row's last."""
    rows = ["data.seq_len=65536", "data.micro_batch_size=1", "precision=bf16"]
    checked = problem_of(load_config(CONFIGS / "nano.yaml", [*rows, *settings]), CPU)
    _, large = sizes_of(checked, BENCH)
    ratio, kinds = large.config.csa_compress_ratio, set(large.config.layer_types)
    assert large.samples == (tokens,) and large.earlier == 65536 - tokens
    assert large.entries("csa") == 65536 // ratio > large.config.index_topk
    visible = visible_entries(large, "csa")
    assert visible[0] == (65536 - tokens + 1) // ratio and visible[-1] == 65536 // ratio
    assert {make.args[1] for make in attention_cases(large)} == kinds | {"window"}
    selected = [make.args[2] for make in attention_cases(large) if make.args[1] == "csa"]
    assert selected == [large.config.index_topk]
    assert torch.equal(large.rotation("csa")[-1:], last_rotation(large))


def last_rotation(sizes: Sizes) -> Tensor:
    """The rotation of the row's last token."""
    position_T = torch.tensor([65535])
    return rotation(position_T, layer_frequencies(sizes.config, compressed=True))


def leaves_of(operation: str, checked: Problem) -> dict[str, list[Tensor]]:
    """Returns the inputs of the ragged cases by the case's name."""
    ragged, _ = sizes_of(checked, BENCH)
    cases = [make() for make in cases_of(operation, checked, ragged)]
    return {case.name: list(case.leaves.values()) for case in cases}


def test_experts_are_as_wide_as_those_of_a_rank():
    """The shared expert is split over tensor ranks, routed ones over expert-tensor ranks."""
    config = load_config(
        CONFIGS / "nano.yaml", ["parallel={tensor: 2, expert_tensor: 4}", "precision=bf16"]
    )
    inner = config.model.moe_intermediate_size
    checked = problem_of(config, CPU)
    swiglu = leaves_of("swiglu", checked)
    assert swiglu["routed experts"][0].shape[1] == inner // 4
    assert swiglu["shared expert"][0].shape[1] == inner // 2
    experts = leaves_of("grouped_mm", checked)
    assert experts["experts, w1"][1].shape[1] == inner // 4
    assert experts["experts, w2"][1].shape[2] == inner // 4


@pytest.mark.parametrize(
    ("muon", "dtype"),
    [([], torch.bfloat16), (["optim.muon.newton_schulz_precision=fp32"], torch.float32)],
)
def test_the_symmetric_matmul_has_the_optimizers_dtype(monkeypatch, muon, dtype):
    """On a GPU it is bf16 by default, whatever the run's precision."""
    monkeypatch.setattr(problem, "unsupported_operations", lambda config, device: {})
    config = load_config(CONFIGS / "nano.yaml", ["precision=fp32", *muon])
    checked = problem_of(config, torch.device("cuda", 0))
    assert checked.dtype == "float32"
    leaves = leaves_of("syrk", checked)
    assert {x.dtype for some in leaves.values() for x in some} == {dtype}


def test_every_width_of_an_operation_is_checked():
    config = load_config(CONFIGS / "nano.yaml", ["precision=fp8"])
    model, checked = config.model, problem_of(config, CPU)
    norms = {(some[0].shape[1], some[0].dtype) for some in leaves_of("norms", checked).values()}
    assert (model.q_lora_rank, torch.bfloat16) in norms
    assert (model.index_head_dim, torch.float32) in norms
    pooled = leaves_of("compressor", checked)
    assert pooled["indexer"][0].shape[1] == 2 * model.index_head_dim


def test_every_linear_of_a_model_is_checked_in_fp8():
    """The calls of a built model, with the weights of its layers."""
    config = tiny_config(num_nextn_predict_layers=1)
    sizes = Sizes(config, (2, 3), torch.float32, CPU, dense=True)
    linears = linears_of(sizes)
    model = V4Model(config, torch.float32)
    expected: dict[tuple[int, int, int], float] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            outputs, inputs = module.weight.shape
            groups = config.o_groups if name.endswith("wo_a") else 1
            shape = (groups, inputs, outputs // groups)
            expected[shape] = expected.get(shape, 0) + 1
    assert linears == expected
