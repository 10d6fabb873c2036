"""Reading configs: values, inheritance, overrides, and one sentence for every mistake."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from launch.job import ClusterConfig
from trainer.config import ConfigError, RunConfig, Section, load_config
from trainer.config.explain import _model_at
from trainer.config.renamed import _REMOVED, _RENAMED
from trainer.config.section import section_in
from trainer.config.source import dump_yaml, parse_yaml

DEBUG = Path(__file__).parents[3] / "configs" / "debug.yaml"


def refused(*overrides: str, path: Path = DEBUG) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-20", 1e-20),
        ("3e-4", 3e-4),
        ("-1.5E+3", -1500.0),
        (".5", 0.5),
        ("10", 10),
        ("1_000", 1000),
        ("010", "010"),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("null", None),
        ("1:30", "1:30"),
        ("1e", "1e"),
        ("2026-01-02", "2026-01-02"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    read = parse_yaml(text, "test")
    assert read == value and type(read) is type(value)
    assert parse_yaml(dump_yaml({"x": value}), "test") == {"x": value}


def test_strings_that_look_like_numbers_survive() -> None:
    assert parse_yaml(dump_yaml({"x": "1e-20"}), "test") == {"x": "1e-20"}


def test_base_is_relative_and_overrides_come_last(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "low.yaml").write_text(f"base: {DEBUG}\nsteps: 7\noptim: {{learning_rate: 1e-5}}\n")
    (tmp_path / "sub/high.yaml").write_text("base: ../low.yaml\nseed: 5\n")
    config = load_config(
        tmp_path / "sub/high.yaml", ["optim.schedule.warmup_steps=2", "data.sources.0.name=other"]
    )
    assert (config.steps, config.seed, config.optim.learning_rate) == (7, 5, 1e-5)
    assert config.optim.schedule.warmup_steps == 2
    assert [source.name for source in config.data.sources] == ["other", "prose"]


def test_an_error_names_the_file_that_the_key_came_from(tmp_path: Path) -> None:
    base, child = tmp_path / "base.yaml", tmp_path / "child.yaml"
    base.write_text(f"base: {DEBUG}\noptim: {{learning_rat: 1.0}}\n")
    child.write_text("base: base.yaml\nsteps: 3\n")
    text = refused(path=child)
    assert text.startswith(f"{base}: unknown key 'optim.learning_rat'")
    assert "did you mean 'optim.learning_rate'?" in text
    base.write_text(f"base: {DEBUG}\noptimm: {{learning_rate: 1.0}}\n")
    assert refused(path=child).startswith(f"{base}: unknown key 'optimm'")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.hiden_size=3", ("command line", "model.hiden_size", "'model.hidden_size'")),
        ("modle.vocab_size=3", ("'modle'", "'model'")),
        ("seq_len=3", ("'seq_len'", "'data.seq_len'")),
        ("data.sources.0.nam=x", ("data.sources.0.nam", "'data.sources.0.name'")),
        ("metrics.wandb.api_key=x", ("metrics.wandb.api_key",)),
        ("steps=ten", ("command line: steps = 'ten'", "integer")),
        ("steps=true", ("steps = True", "integer")),
        ("optim.learning_rate=1e-3x", ("optim.learning_rate = '1e-3x'", "number")),
        ("steps=0", ("'steps' is missing, or 0", "at least 1")),
        ("engine=megatron", ("engine = 'megatron'", "'native'")),
        (
            "parallel.tensor=3",
            ("model.num_attention_heads = 8", "parallel.tensor = 3", "should be 2"),
        ),
        ("data.global_batch_size=7", ("data.global_batch_size = 7", "data.micro_batch_size = 4")),
        ("data.seq_len=99999", ("data.seq_len", "model.max_position_embeddings = 16384")),
        ("model.vocab_size=999", ("model.vocab_size = 999", "data.tokenizer.vocab_size = 4096")),
        ("model.num_attention_heads=7", ("num_attention_heads (7)", "o_groups (2)")),
        ("data.sources.9.name=x", ("data.sources.9.name", "0 to 1")),
        ("steps", ("'steps'", "key=value")),
        ("steps=[1", ("steps", "not valid YAML")),
    ],
)
def test_a_mistake_is_one_clear_sentence(override: str, parts: tuple[str, ...]) -> None:
    text = refused(override)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("data.row_length=8", "the key 'data.row_length' is now 'data.seq_len'"),
        ("data.batch_rows=8", "'data.batch_rows' is now 'data.global_batch_size'"),
        ("data.micro_rows=8", "'data.micro_rows' is now 'data.micro_batch_size'"),
        ("data.heldout_fraction=0", "'data.heldout_fraction' is now 'data.validation_fraction'"),
        ("stages=[]", "the key 'stages' is now 'phases'"),
        ("data.sources.1.split=heldout", "data.sources.1.split = heldout is now validation"),
        ("phases=[{until: 8}]", "'phases.0.until' is now 'phases.0.until_tokens'"),
        ("stability.anticipation.lead=2", "is now 'stability.anticipatory_routing'"),
        ("optim.muon.qk_clip=null", "'optim.muon.qk_clip' has been removed, since V4 normalises"),
    ],
)
def test_a_key_of_an_earlier_version_is_refused_with_its_name_of_today(
    override: str, remedy: str
) -> None:
    assert remedy in refused(override)


def test_every_name_of_today_exists_and_no_earlier_one_does() -> None:
    for old, new in {**_RENAMED, **dict.fromkeys(_REMOVED)}.items():
        section = _model_at(RunConfig, tuple(old.split("."))[:-1])
        if section is None:  # a section that has another name itself
            continue
        assert old.split(".")[-1] not in section.model_fields, old
        assert new is None or new in section.model_fields, new


def sections_in(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        if (inner := section_in(field.annotation)) is not None:
            yield from sections_in(inner)


@pytest.mark.parametrize("root", [RunConfig, ClusterConfig])
def test_all_sections_are_equally_strict(root: type[BaseModel]) -> None:
    for section in sections_in(root):
        assert section.model_config == Section.model_config, section


@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_numbers_are_finite(value: str) -> None:
    text = refused(f"metrics.peak_tflops={value}")
    assert "metrics.peak_tflops = " in text and "finite number" in text


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "there is no such config file" in refused(path=tmp_path / "none.yaml")
    (tmp_path / "twice.yaml").write_text("steps: 1\nsteps: 2\n")
    assert "line 2" in (text := refused(path=tmp_path / "twice.yaml")) and "twice" in text
    (tmp_path / "circle.yaml").write_text("base: circle.yaml\n")
    assert "circle" in refused(path=tmp_path / "circle.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: \xe9\n")
    assert "not UTF-8" in refused(path=tmp_path / "latin.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "mapping" in refused(path=tmp_path / "list.yaml")


def test_the_resolved_config_is_a_valid_config(tmp_path: Path) -> None:
    config = load_config(DEBUG, ["optim.adamw.eps=1e-20", "metrics.wandb.tags=['1e5', 'no']"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = load_config(tmp_path / "config.yaml")
    assert again == config and again.digest() == config.digest()
    assert again.metrics.wandb.tags == ("1e5", "no")
    assert load_config(DEBUG, ["seed=9"]).digest() != config.digest()


def test_more_processes_than_rows() -> None:
    config = load_config(DEBUG, ["data.global_batch_size=4"])
    config.check_world(3)
    with pytest.raises(ConfigError, match=r"data\.global_batch_size = 4 .* data-parallel ranks, 5"):
        config.check_world(5)


def test_configs_load_without_torch() -> None:
    code = f"import sys, trainer.config as c; c.load_config({str(DEBUG)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pydantic" in done.stdout.split()
    heavy = {"torch", "numpy", "datasets", "sentencepiece", "rich", "matplotlib", "optuna"}
    assert not heavy & set(done.stdout.split())


def test_a_config_is_refused_in_half_a_second_of_processor_time() -> None:
    command = [sys.executable, "-m", "launch", "train", str(DEBUG), "optim.lerning_rate=1"]
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert subprocess.run(command, capture_output=True).returncode == 2
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


def test_all_missing_keys_are_in_the_first_sentence(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("run_dir: x\nsteps: 1\noptim: {}\n")
    assert refused(path=path) == f"{path}: the keys 'model' and 'data' are missing"
    path.write_text(f"base: {DEBUG}\nmodel: {{head_dim: 32}}\ndata: null\n")
    assert "the key" not in refused(path=path)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.vocab_size=100", "model.vocab_size = 100 should be at least"),
        ("model.o_groups=3", "num_attention_heads (8) must be a multiple of o_groups (3)"),
        ("model.num_hidden_layers=7", "num_hidden_layers is 7"),
        ("optim.muon={coarse_steps: 0, fine_steps: 0}", "coarse_steps and fine_steps are both 0"),
        ("optim.adamw.eps=0", "should be greater than or equal to 1e-30"),
    ],
)
def test_a_sentence_about_several_fields_names_the_command_line(override: str, text: str) -> None:
    error = refused(override)
    assert error.startswith("command line: ") and text in error


def test_a_sentence_about_the_file_alone_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(f"base: {DEBUG}\nmodel: {{o_groups: 3}}\n")
    assert refused("steps=7", path=path).startswith(f"{DEBUG}: model: num_attention")


def test_rows_that_are_suggested_for_a_pipeline_are_accepted() -> None:
    schedule = ["parallel.pipeline=2", "parallel.pipeline_schedule=interleaved_1f1b"]
    rows = ["data.micro_batch_size=1", "data.global_batch_size=7"]
    with pytest.raises(ConfigError, match=r"should be 6 or 8$"):
        load_config(DEBUG, [*schedule, *rows]).check_world(2)
    for number in (6, 8):
        load_config(DEBUG, [*schedule, rows[0], f"data.global_batch_size={number}"]).check_world(2)
