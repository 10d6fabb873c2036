"""`v4 demo`: the whole pipeline, from text on this machine to a model that transformers loads."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data.files import read_step_records
from data.lease import Lease
from launch import processes
from trainer.config import RunConfig, load_config
from trainer.process.exit_codes import INTERRUPTED

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "debug.yaml"
PROCESSES = 2
PROMPT = "def main(argv):\n"
PROMPTS = (PROMPT, "The function returns")
"""What the model continues at every evaluation of the training."""
NEW_TOKENS = 48
CHANCE = 1 / 4
"""Accuracy in the task of a model that guesses; data.prepare.demo_cloze makes four choices."""


class DemoFailed(Exception):
    """A step of the demo failed; its message is on stderr already."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def run_demo(out: Path, nproc: int | None, overrides: list[str]) -> int:
    """Runs every step under `out` and returns the exit code.

    `nproc` None: two processes, as many as there are GPUs at most.

    Raises LeaseError if another demo is running there.
    """
    with Lease(out, "v4 demo"):
        return _run_steps(out, nproc, overrides)


def _run_steps(out: Path, nproc: int | None, overrides: list[str]) -> int:
    started = time.monotonic()
    console = Console(highlight=False)
    arguments = [
        str(CONFIG),
        f"run_dir={json.dumps(str(out / 'run'))}",
        f"data.sources.0.paths=[{json.dumps(str(out / 'corpus' / 'code.jsonl'))}]",
        f"data.sources.1.paths=[{json.dumps(str(out / 'corpus' / 'prose.jsonl'))}]",
        f"data.tokenizer.path={json.dumps(str(out / 'tokenizer'))}",
        f"data.shards={json.dumps(str(out / 'shards'))}",
    ]
    cloze = out / "cloze" / "cloze.yaml" if importlib.util.find_spec("lm_eval") else None
    arguments += [*_evaluated(load_config(str(CONFIG), [*arguments[1:], *overrides]), cloze)]
    arguments += overrides
    config = load_config(arguments[0], arguments[1:])
    run_dir = config.run_dir
    hugging_face = _unused_name(out / "hf")

    def heading(text: str) -> None:
        console.rule(f"[bold]{text}", align="left")

    try:
        if nproc is None:
            gpus = int(_run("gpus", *arguments, captured=True))
            nproc = min(gpus, PROCESSES) or PROCESSES
        config.check_world(nproc)
        _make_text(out, config, arguments, cloze, heading)
        heading("3  token shards")
        _run("prepare", *arguments)
        heading(f"4  training on {nproc} process{'es' * (nproc > 1)}, stopped by SIGTERM half-way")
        _train_half(config, arguments, nproc)
        heading("5  training resumes from the checkpoint")
        _check_exit(processes.train(arguments, nproc))
        if _steps_in(run_dir / "metrics.jsonl") < config.recipe.steps:
            raise DemoFailed(INTERRUPTED)  # a signal stopped the training
        heading("6  validation loss")
        result = json.loads(_run("eval", str(run_dir), captured=True))
        heading("7  export, and generation with transformers")
        _run("export", str(run_dir), str(hugging_face))
        sample = json.loads(_run("sample", str(hugging_face), PROMPT, captured=True))
        console.print(sample["text"], markup=False)
        heading("8  report")
        _run("report", str(run_dir))
        _open(run_dir / "report.html", console)
        scores = _show_model(run_dir, cloze, heading)
    except DemoFailed as failed:
        return failed.code
    seconds = time.monotonic() - started
    console.print(_table(config, result, sample, scores, hugging_face, seconds))
    return 0


def _make_text(
    out: Path,
    config: RunConfig,
    arguments: list[str],
    cloze: Path | None,
    heading: Callable[[str], None],
) -> None:
    """Makes corpus, cloze and tokenizer, except for what an earlier demo made.

    That stays: its tokenizer, shards and run depend on it.
    """
    if all((out / "corpus" / name).is_file() for name in ("code.jsonl", "prose.jsonl")):
        heading("1  text: that of an earlier demo in this folder")
    else:
        heading("1  text: the standard library, its documentation, the packages' documentation")
        _run("demo-corpus", str(out / "corpus"))
    if cloze is None:
        print("without a task, which needs lm-eval: pip install 'v4-pretrain[eval]'", flush=True)
    elif not cloze.is_file():
        _run("demo-cloze", arguments[0], str(cloze.parent), *arguments[1:])
    if (Path(config.data.tokenizer.path) / "tokenizer.model").is_file():
        heading("2  tokenizer: that of an earlier demo in this folder")
    else:
        heading("2  tokenizer")
        _run("tokenizer-train", *arguments)


def _evaluated(config: RunConfig, cloze: Path | None) -> Iterator[str]:
    """Yields overrides for what else the run evaluates, as far as its engine and degrees can."""
    if config.engine != "native":
        return
    if max(segment.parallel.pipeline for segment in config.recipe.segments) == 1:
        yield f"evaluation.prompts={json.dumps(PROMPTS)}"
        yield f"evaluation.prompt_tokens={NEW_TOKENS}"
    if cloze is not None:
        yield f"evaluation.tasks=[{json.dumps(str(cloze))}]"


def _show_model(
    run_dir: Path, cloze: Path | None, heading: Callable[[str], None]
) -> dict[str, float]:
    """Shows what the model writes, and returns its scores in the cloze."""
    heading("9  v4 generate, with the compressed cache and the MTP block's drafts")
    options = ["--temperature", "0", "--max-new-tokens", str(NEW_TOKENS)]
    _run("generate", str(run_dir), "--prompt", PROMPT, *options)
    if cloze is None:
        return {}
    heading("10  v4 eval --tasks, a cloze over validation text")
    result = _run("eval", str(run_dir), "--tasks", str(cloze), "--json", captured=True)
    scores: dict[str, float] = json.loads(result)["tasks"]
    return scores


def _open(report: Path, console: Console) -> None:
    """Opens the report in a browser when there is a graphical screen."""
    screen = sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ
    if console.is_terminal and (screen or "WAYLAND_DISPLAY" in os.environ):
        webbrowser.open(report.resolve().as_uri())


def _unused_name(folder: Path) -> Path:
    """Returns `folder`, or `folder-2` and so on where an earlier demo has written to it."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _run(verb: str, *arguments: str, captured: bool = False) -> str:
    """Runs a verb of trainer.commands; returns its last line of output when `captured`."""
    if not captured:
        _check_exit(processes.run(processes.command(verb, *arguments)))
        return ""
    command = processes.command(verb, *arguments)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    _check_exit(processes.finish(done.returncode, f"v4 {verb}"))
    return done.stdout.strip().splitlines()[-1]


def _check_exit(code: int) -> None:
    if code != 0:
        raise DemoFailed(code)


def _train_half(config: RunConfig, arguments: list[str], nproc: int) -> None:
    """Trains as `v4 train` does, and sends SIGTERM once half of the steps are in metrics.jsonl."""
    half = config.recipe.steps // 2
    metrics = config.run_dir / "metrics.jsonl"
    if _steps_in(metrics) >= half:
        return  # an earlier demo in the same folder got this far
    _check_exit(processes.train(arguments, nproc, is_enough=lambda: _steps_in(metrics) >= half))
    if _steps_in(metrics) < half:
        raise DemoFailed(INTERRUPTED)  # a signal stopped the training


def _steps_in(metrics: Path) -> int:
    if not metrics.is_file():
        return 0
    return metrics.read_bytes().count(b"\n")


def _table(
    config: RunConfig,
    result: dict[str, Any],
    sample: dict[str, Any],
    scores: dict[str, float],
    hugging_face: Path,
    seconds: float,
) -> Table:
    records, _ = read_step_records(config.run_dir / "metrics.jsonl")
    speeds = sorted(r["tokens_per_second"] for r in records if "tokens_per_second" in r)
    table = Table(title="v4 demo", show_header=False, title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in (
        ("parameters", f"{sample['parameters']:,}"),
        ("tokens trained on", f"{result['tokens']:,}"),
        ("validation loss, nats per token", f"{result['validation_loss']:.3f}"),
        ("unigram entropy of the validation text", f"{result['unigram_entropy']:.3f}"),
        *(
            (f"{name}, chance {CHANCE}", f"{score:.3f} ± {scores[name + '_stderr']:.3f}")
            for name, score in scores.items()
            if not name.endswith("_stderr")
        ),
        ("tokens per second, median", f"{speeds[len(speeds) // 2]:,.0f}"),
        ("time of the demo", f"{seconds / 60:.1f} min"),
        ("report", str(config.run_dir / "report.html")),
        ("transformers model", str(hugging_face)),
        ("run folder", str(config.run_dir)),
    ):
        table.add_row(name, value)
    return table
