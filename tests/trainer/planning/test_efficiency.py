"""The figures of the report's Figure 1, from the released configs, and their parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model import ModelConfig, V4Model
from model.cache import Cache
from model.parameters import parameter_counts
from trainer.commands import main
from trainer.config import load_run
from trainer.planning.decode_rate import GPUS, Gpu, cache_bytes_read, decode_rate
from trainer.planning.efficiency import (
    EQUIVALENT_FP8,
    PLAIN,
    gqa_cache_bytes,
    v4_cache_bytes,
    v4_operations,
    v32_cache_bytes,
    v32_operations,
)

CONFIGS = Path(__file__).parents[3] / "configs"
MILLION = 1 << 20


def model_of(name: str) -> ModelConfig:
    return load_run(str(CONFIGS / f"{name}.yaml"), []).model


@pytest.mark.parametrize(("name", "operations", "cache"), [("pro", 27, 10), ("flash", 10, 7)])
def test_percentages_of_the_report(name: str, operations: int, cache: int) -> None:
    config = model_of(name)
    share = v4_operations(config, MILLION).total() / v32_operations(MILLION).total()
    assert round(100 * share) == operations
    assert round(100 * v4_cache_bytes(config, MILLION) / v32_cache_bytes(MILLION)) == cache


@pytest.mark.parametrize(("name", "ratio"), [("pro", 34), ("flash", 49)])
def test_cache_of_grouped_query_attention(name: str, ratio: int) -> None:
    """34x and 49x are met with 42 layers of 8 heads of 128; both models have more."""
    baseline = MILLION * 42 * 2 * 8 * 128 * 2
    assert round(baseline / v4_cache_bytes(model_of(name), MILLION)) == ratio
    assert gqa_cache_bytes(model_of("flash"), MILLION) == baseline // 42 * 43


@pytest.mark.parametrize("name", ("pro", "flash", "nano"))
def test_every_active_parameter_is_multiplied_once(name: str) -> None:
    """At one token of context FLOPs are two per active weight, but for attention to itself."""
    config = model_of(name)
    operations = v4_operations(config, 1)
    attention = operations.by_part["attention", "bf16"]
    counts = parameter_counts(config)
    assert operations.total(PLAIN) - attention == pytest.approx(2 * counts.active, rel=2e-3)


def test_v32_has_37_billion_active_parameters() -> None:
    assert v32_operations(1).total(PLAIN) / 2 == pytest.approx(37e9, rel=0.02)


@pytest.mark.parametrize("name", ("pro", "flash"))
def test_cache_of_a_million_tokens_in_shapes(name: str) -> None:
    """The formula against the tensors that a sequence of 1,048,576 tokens would take."""
    config = model_of(name)
    layers = dict(enumerate(config.layer_types))
    meta = torch.device("meta")
    cache = Cache(config, layers, 1, MILLION, torch.bfloat16, meta, packed=True)
    assert sum(cache.bytes_by_part().values()) == v4_cache_bytes(config, MILLION)


def test_operations_are_those_of_the_modules() -> None:
    """Weights of the modules on the meta device, in place of the table of parameters."""
    config = model_of("nano")
    with torch.device("meta"):
        model = V4Model(config)
    layer = model.layers[config.layer_types.index("csa")]
    linears = sum(
        parameter.numel()
        for name, parameter in layer.attn.named_parameters()
        if parameter.ndim == 2 and not name.endswith("ape")
    )
    one_layer = config.model_copy(update={"layer_types": ("csa",), "num_hidden_layers": 1})
    parts = v4_operations(one_layer, 1)
    counted = sum(
        flops / 2
        for (part, _), flops in parts.by_part.items()
        if part in ("projections", "compressors", "indexer")
    )
    assert counted == linears


def test_the_rate_is_that_of_reading_or_computing() -> None:
    """By hand: a GPU that holds many sequences, which reads all experts but no MTP block."""
    config = model_of("flash")
    slow_memory, slow_compute = Gpu(2000, 0.001, 1e9), Gpu(2000, 1e9, 0.001)
    expert_bytes = 43 * 256 * 3 * 4096 * 2048 * 4.25 / 8
    counts = parameter_counts(config)
    others = counts.main - 43 * 256 * 3 * 4096 * 2048
    rate = decode_rate(config, slow_memory, 4096)
    assert rate.bound == "memory" and rate.gpus == 1
    room = 0.9 * 2000e9 - expert_bytes - others
    assert rate.sequences == int(room // v4_cache_bytes(config, 4096)) > 1000
    read = others - 129280 * 4096 + expert_bytes
    read += rate.sequences * cache_bytes_read(config, 4096)
    assert rate.tokens_per_second == pytest.approx(rate.sequences * 1e9 / read, rel=1e-6)
    computed = decode_rate(config, slow_compute, 4096)
    assert computed.bound == "compute"
    flops = v4_operations(config, 4096).total(EQUIVALENT_FP8)
    assert computed.tokens_per_second == pytest.approx(1e9 / flops)


def test_without_fp8_every_operation_counts_once() -> None:
    """The rate of the data sheet is bf16's there."""
    config = model_of("flash")
    rates = [
        decode_rate(config, Gpu(2000, 1e9, 1.0, has_fp8), 1 << 20).tokens_per_second
        for has_fp8 in (False, True)
    ]
    operations = v4_operations(config, 1 << 20)
    assert rates[0] * operations.total(PLAIN) == pytest.approx(rates[1] * operations.total())
    assert [name for name, gpu in GPUS.items() if not gpu.has_fp8] == ["a100"]


def test_a_model_of_short_contexts_has_a_table_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(CONFIGS / "nano.yaml"), "--efficiency", "--gpu=h200"]
    plot = tmp_path / "efficiency.png"
    short = "model.max_position_embeddings=3000"
    assert main([*arguments, f"--plot={plot}", short, "data.seq_len=1024"]) == 0
    assert "3,000" in capsys.readouterr().out and plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--gpu=h200"], "--gpu needs --efficiency"),
        (["--plot=x.png"], "--plot needs --efficiency"),
        (["--efficiency", "--dry-run"], "--dry-run has no meaning with --efficiency"),
        (["--efficiency", "--phase=0"], "--phase has no meaning with --efficiency"),
    ],
)
def test_options_without_effect_are_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    assert main(["plan", str(CONFIGS / "nano.yaml"), *options]) == 2
    assert problem in capsys.readouterr().err
