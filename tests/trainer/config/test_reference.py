"""The reference of the config: complete, current, and shown by `v4 config`."""

import re
import subprocess
import sys

import pytest
from pydantic import BaseModel

from docs import write_config
from launch.job import ClusterConfig
from launch.show_config import ROOTS
from tests.trainer.config.test_config import sections_in
from trainer.config import ConfigError, Reference, RunConfig
from trainer.config.reference import _rules_across_sections, describe

REFERENCE = Reference(ROOTS)
KEYS = {field.key for field in REFERENCE.fields}


def test_every_section_and_field_has_a_meaning() -> None:
    for section in REFERENCE.sections.values():
        assert section.meaning, section.key
        for field in section.fields:
            assert len(field.meaning) > 10, field.key
            assert field.default or "section" in field.type, field.key


def test_the_page_is_current() -> None:
    command = "python docs/write_config.py"
    assert write_config.TARGET.read_text(encoding="utf-8") == write_config.page(), command


def test_rules_across_sections_are_about_fields_that_exist() -> None:
    rules = _rules_across_sections()
    assert len(rules) > 30
    for rule in rules:
        quoted = set(re.findall(r"`([\w.]+)`", rule))
        assert quoted and quoted <= KEYS, rule


@pytest.mark.parametrize("root", [RunConfig, ClusterConfig])
def test_every_validator_is_about_fields_of_its_section(root: type[BaseModel]) -> None:
    for section in sections_in(root):
        decorators = section.__pydantic_decorators__
        for name, validator in {
            **decorators.model_validators,
            **decorators.field_validators,
        }.items():
            if name == "_fits_together":  # the checks across sections
                continue
            quoted = re.findall(r"`(\w+)`", validator.func.__doc__ or "")
            assert set(quoted) & set(section.model_fields), f"{section.__name__}.{name}"


def test_a_field() -> None:
    (field,) = REFERENCE.section("parallel.tensor").fields
    assert (field.name, field.type, field.default, field.unit) == (
        "tensor",
        "integer",
        "1",
        "ranks",
    )
    assert field.checks[0] == "> 0"
    assert "`tensor` divides `model.num_attention_heads`" in "; ".join(field.checks)
    (field,) = REFERENCE.section("data.filters.near_duplicate_similarity").fields
    assert (field.type, field.default, field.checks) == ("number or null", "0.8", ("> 0, ≤ 1",))
    (field,) = REFERENCE.section("optim.no_weight_decay").fields
    assert field.checks[0].startswith("each one of embedding, head")


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (dict[str, float] | None, "mapping from names to numbers or null"),
        (tuple[int, int], "list of 2 integers"),
        (tuple[str, ...], "list of text"),
        (bool, "true or false"),
    ],
)
def test_types_are_named(annotation: object, name: str) -> None:
    assert describe(annotation) == (name, [])


def test_search_finds_keys_before_meanings() -> None:
    keys = [field.key for field in REFERENCE.search("Momentum")]
    assert keys[0] == "optim.muon.momentum"
    assert [field.key for field in REFERENCE.search("robust")] == ["stability.spikes.threshold"]
    with pytest.raises(ConfigError, match="no field has 'xyzzy' in its name or meaning"):
        REFERENCE.search("xyzzy")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from launch.__main__ import main; sys.argv = ['v4', 'config', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command() -> None:
    listed, section, matches = run(), run("optim.muon"), run("--search", "momentum")
    assert listed.returncode == section.returncode == matches.returncode == 0
    assert all(key in listed.stdout for key in REFERENCE.sections)
    assert "optim.muon.momentum = 0.95" in section.stdout and "adamw" not in section.stdout
    assert "optim.muon.momentum_start = 0.85" in matches.stdout


def test_a_wrong_section_is_one_sentence() -> None:
    done = run("optim.moun")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "v4: error: there is no section or field 'optim.moun'; did you mean 'optim.muon'?\n"
    )
