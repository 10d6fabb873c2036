"""`kernels` of a config: what it may be, and the sentence about anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.kernels.operations import OPERATIONS
from trainer.config import ConfigError, load_config

DEBUG = Path(__file__).parents[3] / "configs" / "debug.yaml"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "kernels={atention: triton}",
            "kernels: there is no operation 'atention'; did you mean 'attention'?",
        ),
        ("kernels.hyper_conections=eager", "did you mean 'hyper_connections'?"),
        ("kernels={xyz: eager}", f"operation 'xyz'; the operations are {', '.join(OPERATIONS)}"),
        (
            "kernels=tritn",
            "kernels: 'tritn' should be auto, eager, compile or triton, or a section",
        ),
        (
            "kernels.attention=compile",
            "attention = 'compile' should be auto, eager, triton or flash_mla",
        ),
        ("kernels.norms=true", "norms = True should be auto, eager, compile or triton"),
        ("kernels=3", "kernels: 3 should be auto, eager, compile or triton"),
        ("compile=true", "the key 'compile' is now 'kernels'"),
    ],
)
def test_anything_else_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEBUG, [override])
    text = str(caught.value)
    assert text.startswith("command line: ") and sentence in text and "\n" not in text


def test_what_a_setting_means_for_an_operation() -> None:
    def settings(*overrides: str) -> set[str]:
        config = load_config(DEBUG, overrides)
        return {f"{name} {config.kernel_setting(name)}" for name in OPERATIONS}

    assert settings() == {f"{name} auto" for name in OPERATIONS}
    assert settings("kernels=triton") == {f"{name} triton" for name in OPERATIONS}
    compiled = ("norms", "hyper_connections", "swiglu")
    assert settings("kernels=compile") == {
        f"{name} {'compile' if name in compiled else 'eager'}" for name in OPERATIONS
    }
    assert settings("kernels={attention: eager}") == {
        f"{name} {'eager' if name == 'attention' else 'auto'}" for name in OPERATIONS
    }


def test_a_run_folder_from_before_that_compiled_nothing_opens(tmp_path: Path) -> None:
    config = load_config(DEBUG)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml().replace("kernels: auto", "compile: false"))
    assert load_config(path).kernels == "auto"
