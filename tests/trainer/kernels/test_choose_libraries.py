"""Optional libraries among the candidates of a check, and where a config names them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.kernels.operations import Choice
from tests.model.tiny import tiny_config
from tests.stand_ins import importable
from tests.trainer.kernels.test_agree import H100
from tests.trainer.kernels.test_examine import BENCH
from trainer.config import load_config
from trainer.kernels import unchecked
from trainer.kernels.choose import choose_kernels, settings_without_effect
from trainer.kernels.examine import Examination, candidates_of
from trainer.kernels.gpu import installed_libraries
from trainer.kernels.table import describe_verdicts
from trainer.kernels.verdict import Verdict
from trainer.process.errors import PreflightError

SMALL, LARGE = {"rows": 32}, {"rows": 64}
CANDIDATES = [Choice(name, blocks) for name in ("triton", "flash_mla") for blocks in (SMALL, LARGE)]


def examination(times: list[float], refused: dict[int, str]) -> Examination:
    """One in which everything that was not refused is right."""
    one = Examination(CANDIDATES)
    one.times, one.refused, one.eager_time = dict(enumerate(times)), refused, 10.0
    one.errors = dict.fromkeys(range(len(CANDIDATES)), (1e-3, 1e-3))
    return one


def test_flash_mla_runs_with_the_block_sizes_of_the_fastest_triton_kernels():
    verdict = examination([6.0, 5.0, 2.0, 3.0], {}).verdict("attention")
    assert (verdict.choice, verdict.blocks, verdict.passed) == ("flash_mla", LARGE, True)
    assert verdict.milliseconds == {"eager": 10.0, "triton": 5.0, "flash_mla": 3.0}
    assert verdict.refused == {}


def test_without_its_backward_flash_mla_is_refused():
    reason = {"flash_mla": "fails with the block sizes of the Triton kernels, its backward"}
    for refused in ({3: "wrong"}, {0: "wrong", 1: "wrong"}):
        verdict = examination([6.0, 5.0, 2.0, 3.0], refused).verdict("attention")
        assert verdict.choice == ("triton" if 3 in refused else "eager")
        assert verdict.refused == reason


def test_a_library_that_is_missing_is_refused_without_a_call():
    one = Examination(candidates_of("syrk", tiny_config()))
    one.fit([], BENCH)
    quack = one.candidates.index(Choice("quack"))
    assert one.refused == {quack: "it is not installed"}
    with importable("quack"):
        two = Examination(one.candidates)
        two.fit([], BENCH)
    assert two.refused == {}


def test_the_table_has_the_reason():
    verdict = Verdict("syrk", True, "", "eager", refused={"quack": "it is not installed"})
    key = {
        "platform": {"name": "GPU", "driver": "1", "torch_version": "2", "triton": "3"},
        "problem": {
            "dtype": "bfloat16",
            "micro_tokens": 1,
            "model": {"hidden_size": 64, "head_dim": 16},
        },
    }
    *_, line = describe_verdicts(key, [verdict])
    assert line == "syrk: quack is not used on this GPU: it is not installed"


def refusal(tiny: Path) -> str:
    config = load_config(tiny, ["kernels={syrk: quack}"])
    with pytest.raises(PreflightError) as caught:
        choose_kernels(config, torch.device("cpu"), {})
    return str(caught.value)


def test_a_library_that_a_config_names_has_to_be_there(tiny: Path):
    advice = "; set kernels.syrk to auto or eager"
    assert refusal(tiny) == "kernels.syrk = quack: quack is not installed" + advice
    with importable("quack"):
        assert refusal(tiny) == "kernels.syrk = quack: quack runs on a GPU, not on cpu" + advice


def test_hosts_with_other_libraries_are_another_kind():
    assert installed_libraries() == []
    with importable():
        assert installed_libraries() == ["flash_mla none", "tile_kernels none", "quack none"]
    assert H100.label.endswith("triton 3.7.1")
    assert replace(H100, libraries="quack 0.6.4").label == f"{H100.label}, quack 0.6.4"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["kernels={cross_entropy: triton}", "parallel.tensor=2"], "megatron-core's loss"),
        (["kernels={fp8: triton}", "precision=bf16"], "as precision is bf16"),
    ],
)
def test_a_setting_without_effect_has_a_line(tiny: Path, settings: list[str], line: str):
    (notice,) = settings_without_effect(load_config(tiny, settings))
    assert notice.startswith("kernels.") and "has no effect" in notice and line in notice
    config = load_config(tiny, settings)
    cpu = torch.device("cpu")
    assert unchecked(config, cpu).lines == (notice,)
    assert settings_without_effect(load_config(tiny, ["kernels=compile"])) == []


def test_what_replaces_a_failed_kernel_has_its_own_reason(tiny: Path):
    verdict = Verdict(
        "norms", False, "wrong", "compile", milliseconds={"eager": 3.0, "compile": 2.0}
    )
    assert verdict.why == "compile is 1.50 times as fast as eager; triton is refused: wrong"
    assert replace(verdict, choice="eager").why == "wrong"
    assert verdict.notice == "norms runs with compile, as its Triton kernel is refused: wrong"
    assert replace(verdict, choice="eager").notice == "norms runs eagerly: wrong"
