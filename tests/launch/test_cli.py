"""The `v4` command: exit codes, one line for a user's mistake, signals."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer

from launch import cli, demo, processes
from tests.distributed import spawn
from tests.trainer.tiny import assert_same_run, steps_in_file, train, train_jobs
from trainer.commands import parse
from trainer.config import load_config
from trainer.process.exit_codes import INTERRUPTED

V4 = [sys.executable, "-m", "launch"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny matrices: more threads only wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def v4(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*V4, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def without_progress(text: str) -> str:
    """The lines of stderr but those about work that takes seconds, on a busy machine."""
    progress = re.compile(r"v4: (starting \d+ processes|.*, \d+ s(, about .* left)?)\n")
    return "".join(line for line in text.splitlines(True) if not progress.fullmatch(line))


def assert_one_sentence(
    done: subprocess.CompletedProcess[str], *parts: str, started: bool = False
) -> None:
    """Exit code 2 and one line of error; a run that `started` has logged its first line before."""
    assert done.returncode == 2, done.stderr
    errors = without_progress(done.stderr)
    assert errors.count("\n") == 1 and errors.startswith("v4: error: "), done.stderr
    if started:
        assert done.stdout.count("\n") == 1 and "loading torch" in done.stdout
    else:
        assert done.stdout == ""
    for part in parts:
        assert part in errors


@pytest.mark.parametrize(
    "arguments", [("train",), ("data", "prepare"), ("tokenizer", "train"), ("eval",), ("plan",)]
)
def test_a_mistyped_key_is_one_line(tiny: Path, arguments: tuple[str, ...]) -> None:
    done = v4(*arguments, tiny, "data.seq_lenn=3")
    assert_one_sentence(done, "data.seq_lenn", "'data.seq_len'")


RUN = ["run", "steps=3", "seed=1"]


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        (["export", "run", "out", *RUN[1:]], {"weights": "as_trained"}),
        (["export", "--weights=released", "run", "out", *RUN[1:]], {"weights": "released"}),
        (["export", "--prompts=a.py", "run", "out", *RUN[1:]], {"prompts": "a.py"}),
        (["data", "prepare", *RUN, "--overwrite"], {"overwrite": True}),
        (["data", "prepare", *RUN], {"overwrite": False}),
        (["data", "report", *RUN], {}),
        (["tokenizer", "train", "--overwrite", *RUN], {"overwrite": True}),
        (["eval", *RUN], {}),
        (["import", "out", *RUN], {}),
        (["report", *RUN], {}),
        (["plan", *RUN, "--nproc=4", "--dry-run"], {"processes": 4, "dry_run": True}),
    ],
)
def test_every_command_takes_overrides_and_options(
    arguments: list[str], flags: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `v4` starts is what the verb's parser reads."""
    commands: list[list[str]] = []
    run = SimpleNamespace(check_world=lambda world: None)
    for module in ("launch.cli", "launch.arguments"):
        monkeypatch.setattr(f"{module}.check", lambda config, overrides: run)
    monkeypatch.setattr(processes, "run", lambda command: commands.append(command) or 0)
    cli.app(arguments, standalone_mode=False)
    options = parse(commands[0][3:])
    assert (options.config, options.overrides) == ("run", ["steps=3", "seed=1"])
    assert {name: getattr(options, name) for name in flags} == flags
    assert getattr(options, "folder", "out") == "out"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["verify", "s3://bucket/a"], {"shards": "s3://bucket/a"}),
        (["merge", "out", "a", "b", "--overwrite"], {"out": "out", "shards": ["a", "b"]}),
        (["report", "a", "--compare", "b"], {"config": "a", "other": "b"}),
    ],
)
def test_commands_of_shards_that_exist(
    arguments: list[str], expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(processes, "run", lambda command: commands.append(command) or 0)
    cli.app(["data", *arguments], standalone_mode=False)
    options = parse(commands[0][3:])
    assert {name: getattr(options, name) for name in expected} == expected


def test_export_checks_a_folder_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(processes, "run", lambda command: commands.append(command) or 0)
    cli.app(["export", "--check", "folder"], standalone_mode=False)
    assert parse(commands[0][3:]).folder == "folder"
    for arguments in (["export", "run"], ["export", "--check", "folder", "out"]):
        with pytest.raises(typer.BadParameter):
            cli.app(arguments, standalone_mode=False)


def test_what_no_option_is_stays_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["eval", "run", "--all"], ["sweep-report", "folder", "steps=3"]):
        with pytest.raises(SystemExit, match="2"):
            parse(arguments)
        assert f"unrecognized arguments: {arguments[-1]}" in capsys.readouterr().err


def test_a_stdout_that_is_not_utf8(tiny: Path) -> None:
    for arguments in (["config", "optim.muon"], ["plan", str(tiny)]):
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        done = subprocess.run([*V4, *arguments], capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert b"?" in done.stdout and done.stdout.isascii()


def test_mistakes_found_by_the_subprocess(tiny: Path, tmp_path: Path) -> None:
    assert_one_sentence(v4("report", tiny, f"run_dir={tmp_path}"), "nothing to draw")
    assert_one_sentence(v4("train", tiny, f"data.shards={tmp_path}"), "data prepare", started=True)
    assert_one_sentence(v4("eval", tmp_path), "config.yaml")


def test_a_run_folder_that_is_a_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the run folder should be")
    done = v4("train", tiny, f"run_dir={tmp_path / 'run'}")
    assert_one_sentence(done, "cannot write", "run/lease.json", started=True)


@pytest.mark.slow
def test_ranks_report_an_error_once_and_torchrun_does_not(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, "steps=2")
    next((tmp_path / "checkpoints/step-00000002").glob("*.safetensors")).unlink()
    done = v4("train", tiny, f"run_dir={tmp_path}", "steps=4", "--nproc-per-node=2")
    problem = "step-00000002 is damaged", "no complete checkpoint before it"
    assert_one_sentence(done, *problem, started=True)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_run_resumes(tiny: Path, tmp_path: Path, ranks: int) -> None:
    """Stopped by a real signal wherever it comes, resumed: equal to the run that was not.

    One rank gets SIGTERM; with two, the whole process group gets SIGINT, as from Ctrl-C.
    """
    common = ["steps=16"]
    command = [*V4, "train", str(tiny), f"run_dir={tmp_path / 'run'}", *common]
    command.append(f"--nproc-per-node={ranks}")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        wait_for_step(tmp_path / "run", 3, process)
        if ranks == 1:
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err.decode()
    stopped = steps_in_file(tmp_path / "run")[-1]
    assert 3 <= stopped < 16
    last = out.decode().splitlines()[-1]
    assert last.startswith(f"stopped after step {stopped}, saved ")
    command = shlex.split(last.split("; resume: ")[1])
    assert command[-1 - (ranks > 1) :] == [str(tmp_path / "run"), "--nproc-per-node=2"][:ranks]
    done = v4(*command[command.index("train") :])
    assert done.returncode == 0, done.stderr
    if ranks == 1:
        train(tiny, tmp_path / "straight", *common)
    else:
        jobs = [("straight", common, 0)]
        spawn(train_jobs, ranks, tiny, tmp_path, jobs)
    assert_same_run(tmp_path / "straight", tmp_path / "run", 16)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").is_file() or steps_in_file(run_dir)[-1:] < [step]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_signal_kills(tiny: Path, tmp_path: Path) -> None:
    command = [*V4, "train", str(tiny), f"run_dir={tmp_path}", "steps=100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_step(tmp_path, 1, process)
        worker = next(child for child in processes.psutil.Process(process.pid).children())
        worker.suspend()  # it cannot finish its step
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode != 0
    assert not processes.psutil.pid_exists(worker.pid)


@pytest.mark.slow
def test_eval_export_import_and_plan(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path / "run", "steps=2")
    done = v4("eval", tmp_path / "run")
    assert done.returncode == 0 and '"unigram_entropy"' in done.stdout, done.stderr
    done = v4("export", tmp_path / "run", tmp_path / "hf")
    assert done.returncode == 0 and (tmp_path / "hf/model.safetensors").is_file(), done.stderr
    done = v4("import", tmp_path / "hf", tiny, f"run_dir={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again/checkpoints/step-00000000/manifest.json").is_file()
    done = v4("plan", tiny, "--nproc", 2)
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr


def test_the_demo_stops_its_training_after_half_of_the_steps(tiny: Path, tmp_path: Path) -> None:
    arguments = [str(tiny), f"run_dir={tmp_path}", "steps=24"]
    demo._train_half(load_config(tiny, arguments[1:]), arguments, 1)
    assert 12 <= steps_in_file(tmp_path)[-1] < 24
    stopped = (tmp_path / "metrics.jsonl").read_bytes()
    demo._train_half(load_config(tiny, arguments[1:]), arguments, 1)  # nothing to train
    assert (tmp_path / "metrics.jsonl").read_bytes() == stopped


@pytest.mark.slow
def test_a_signal_for_the_demo_alone_ends_its_training(tiny: Path, tmp_path: Path) -> None:
    arguments = [str(tiny), f"run_dir={tmp_path}", "steps=100000"]
    code = "import sys; from pathlib import Path; from trainer.config import load_config\n"
    code += "from launch import demo; config = load_config(sys.argv[1], sys.argv[2:])\n"
    code += "try: demo._train_half(config, sys.argv[1:], 1)\n"
    code += "except demo.DemoFailed as failed: sys.exit(failed.code)\n"
    with subprocess.Popen([sys.executable, "-c", code, *arguments]) as process:
        wait_for_step(tmp_path, 1, process)
        (training,) = processes.psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == INTERRUPTED
    assert not processes.psutil.pid_exists(training.pid)
    assert list((tmp_path / "checkpoints").glob("step-*")), "saved"


def test_help_loads_only_typer_and_a_config_no_torch(tiny: Path) -> None:
    code = "import sys, launch.cli; print(*sys.modules); launch.cli.check(sys.argv[1], [])"
    code += "; print(*sys.modules)"
    command = [sys.executable, "-c", code, str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for_help, for_config = map(str.split, done.stdout.splitlines())
    assert "typer" in for_help and not {"torch", "pydantic", "rich", "optuna"} & set(for_help)
    assert "pydantic" in for_config and not {"torch", "numpy"} & set(for_config)


def test_threads_are_shared_unless_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert processes.environment(1)["OMP_NUM_THREADS"] == str(cores)
    assert processes.environment(4 * cores)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert processes.environment(1)["OMP_NUM_THREADS"] == "7"


@pytest.mark.slow
def test_a_killed_process_is_started_again(tiny: Path, tmp_path: Path) -> None:
    """SIGKILL after step 5 and restart from the checkpoint of step 3: equal to an unhurt run."""
    common = ["steps=9", "checkpoint.every=3", "checkpoint.keep=0"]
    command = [*V4, "train", str(tiny), f"run_dir={tmp_path / 'run'}", *common]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, "--max-restarts=1"], stdout=pipe, stderr=pipe) as process:
        wait_for_step(tmp_path / "run", 5, process)
        (torchrun,) = processes.psutil.Process(process.pid).children()
        (worker,) = torchrun.children()
        worker.kill()
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err.decode()
    assert "resumed from" in out.decode()
    train(tiny, tmp_path / "straight", *common)
    assert_same_run(tmp_path / "straight", tmp_path / "run", 9)


def test_a_mistake_is_not_tried_again(tiny: Path, tmp_path: Path) -> None:
    done = v4("train", tiny, f"data.shards={tmp_path}", "--max-restarts=9", "--nproc-per-node=2")
    assert_one_sentence(done, "data prepare", started=True)


def test_a_demo_goes_on_with_what_an_earlier_one_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verbs = []

    def run(verb: str, *arguments: str, captured: bool = False) -> str:
        verbs.append(verb)
        if verb == "prepare":
            raise demo.DemoFailed(3)
        return ""

    monkeypatch.setattr(demo, "_run", run)
    assert demo.run_demo(tmp_path, 2, []) == 3
    assert verbs == ["demo-corpus", "demo-cloze", "tokenizer-train", "prepare"]
    corpus = ("corpus/code.jsonl", "corpus/prose.jsonl")
    for name in (*corpus, "cloze/cloze.yaml", "tokenizer/tokenizer.model"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    verbs.clear()
    assert demo.run_demo(tmp_path, 2, []) == 3
    assert verbs == ["prepare"]


@pytest.mark.parametrize(
    ("overrides", "evaluated"),
    [
        ([], {"prompts", "prompt_tokens", "tasks"}),
        (["parallel.pipeline=2"], {"tasks"}),
        (
            [
                "engine=deepspeed",
                "optim.matrix_optimizer=adamw",
                'deepspeed={"optimizer": {"type": "AdamW"}}',
            ],
            set(),
        ),
    ],
)
def test_a_demo_evaluates_what_its_engine_and_degrees_can(
    overrides: list[str], evaluated: set[str]
) -> None:
    config = load_config(demo.CONFIG, overrides)
    added = [*demo._evaluated(config, Path("cloze.yaml"))]
    assert {text.split("=")[0] for text in added} == {f"evaluation.{name}" for name in evaluated}
    load_config(demo.CONFIG, [*overrides, *added])  # accepts them


@pytest.mark.parametrize(("gpus", "processes"), [("0", 2), ("1", 1), ("2", 2), ("8", 2)])
def test_a_demo_has_no_more_processes_than_gpus(
    gpus: str, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on = []

    def train_half(config: object, arguments: list[str], nproc: int) -> None:
        trained_on.append(nproc)
        raise demo.DemoFailed(3)

    monkeypatch.setattr(demo, "_run", lambda verb, *_, **__: gpus if verb == "gpus" else "")
    monkeypatch.setattr(demo, "_train_half", train_half)
    assert demo.run_demo(tmp_path, None, []) == 3
    assert trained_on == [processes]
