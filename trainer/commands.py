"""`python -m trainer.commands VERB ...`: everything but training that needs torch or data.

The `v4` command starts these as subprocesses; they also work without it. What takes long to import
is imported where it is used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.activity import Activity, prepare_streams, print_line
from trainer.data_commands import DATA_VERBS, add_data_arguments
from trainer.evaluation.arguments import add_eval_arguments
from trainer.generate.arguments import add_chat_arguments, add_generate_arguments
from trainer.process.signals import raise_on_interrupt

if TYPE_CHECKING:
    from data.storage import AnyPath
    from trainer.config import RunConfig


def tokenizer_train(config: RunConfig, options: argparse.Namespace) -> None:
    """Train the tokenizer of `data.tokenizer` on `data.sources`."""
    from data.prepare import train_tokenizer
    from trainer.run_tokenizer import check_replaceable

    if isinstance(path := _place(config.data.tokenizer.path), Path):
        check_replaceable(path)
    print(f"wrote {train_tokenizer(config.data, options.overwrite)}")


def data_prepare(config: RunConfig, options: argparse.Namespace) -> None:
    """Turn `data.sources` into token shards."""
    from data.prepare import prepare

    manifest = prepare(config.data, overwrite=options.overwrite)
    for line in manifest.skipped():
        print(line)
    train, validation = manifest.tokens("train"), manifest.tokens("validation")
    print(f"{config.data.shards}: {train:,} tokens for training, {validation:,} for validation")


def data_report(config: RunConfig, options: argparse.Namespace) -> None:
    """Show the contents of the token shards in report.html in their folder."""
    from trainer.report import write_data_report

    with Activity("reading the shards"):
        path = write_data_report(config)
    print(f"wrote {path}")


def evaluate(config: RunConfig, options: argparse.Namespace) -> None:
    """Print the loss of the newest checkpoint on the validation text, or its scores in tasks."""
    with _loading():
        from trainer.evaluation.command import evaluate_run

    evaluate_run(config, options)


def evaluate_folder(options: argparse.Namespace) -> None:
    """Print the scores of a Hugging Face folder in tasks."""
    with _loading():
        from trainer.evaluation.command import evaluate_folder

    evaluate_folder(options)


def export(config: RunConfig, options: argparse.Namespace) -> None:
    """Write the newest checkpoint as a Hugging Face folder; processes divide its files."""
    with _loading():
        import torch

        from data.lease import LEASE_FILE
        from data.text import OWN_PROMPTS, read_prompts
        from trainer.export import export_run
        from trainer.parallel.grid import open_grid
        from trainer.process.failures import report_failures
        from trainer.process.lease import lease_on

    with report_failures() as watch, open_grid(torch.device("cpu")) as grid:
        watch.connect(grid)
        if grid.is_first:
            _warn_of_other_tokenizer(config)
        prompts = OWN_PROMPTS if options.prompts is None else read_prompts(options.prompts)
        out = _place(options.folder)
        if isinstance(out, Path):
            out = out.resolve()  # of a link, or the working directory
        lease_file = f".{out.name}.{LEASE_FILE}"  # the folder itself appears whole
        with lease_on(out.parent, "v4 export", grid, watch, lease_file):
            text = export_run(config, out, grid, weights=options.weights, prompts=prompts)
        if grid.is_first:
            print(text)
        watch.close()


def check_export(folder: str, options: argparse.Namespace) -> None:
    """Check that vLLM and SGLang find in a Hugging Face folder what they read from it."""
    with _loading():
        from trainer.export import check_command

    check_command(_place(folder))


def _place(text: str) -> AnyPath:
    """Returns a folder of the command line. Raises ConfigError for a URL that is none of files."""
    from data.storage import as_path
    from trainer.config import ConfigError

    try:
        return as_path(text)
    except ValueError as error:
        raise ConfigError(f"command line: the folder {error}") from None


def _warn_of_other_tokenizer(config: RunConfig) -> None:
    from trainer.run_tokenizer import other_tokenizer

    if notice := other_tokenizer(config):
        print_line(f"v4: warning: {notice}", sys.stderr)


def import_(config: RunConfig, options: argparse.Namespace) -> None:
    """Start a run from a Hugging Face folder."""
    with _loading():
        from data.lease import Lease
        from trainer.export import import_hf_folder

    with ExitStack() as leases:
        for folder in config.written_folders:
            leases.enter_context(Lease(folder, "v4 import"))
        print(import_hf_folder(config, _place(options.folder)))


def report(config: RunConfig, options: argparse.Namespace) -> None:
    """Draw the run's curves into report.html."""
    from trainer.report import write_report

    with Activity("drawing the report"):
        path = write_report(config)
    print(f"wrote {path}")


def sweep_report(folder: str, options: argparse.Namespace) -> None:
    """Compare the trials of a sweep in report.html."""
    from trainer.report import write_sweep_report

    with Activity("drawing the report"):
        path = write_sweep_report(Path(folder))
    print(f"wrote {path}")


def generate(folder: str, options: argparse.Namespace) -> None:
    """Continue prompts with the newest checkpoint of a run, or a Hugging Face folder."""
    with _loading():
        from trainer.generate.command import generate_command

    generate_command(folder, options)


def chat(folder: str, options: argparse.Namespace) -> None:
    """Talk to the newest checkpoint of a run, or a Hugging Face folder."""
    with _loading():
        from trainer.generate.chat import chat_command

    chat_command(folder, options)


def plan(config: RunConfig, options: argparse.Namespace) -> None:
    """Show steps, phases, parallelism, traffic and memory of a config."""
    from trainer.config import ConfigError
    from trainer.planning import describe_efficiency, describe_plan

    of_efficiency, of_training = ("gpu", "plot"), ("dry_run", "phase", "measure", "parameters")
    for name in of_training if options.efficiency else of_efficiency:
        if (value := getattr(options, name)) is not None and value is not False:
            option = f"--{name.replace('_', '-')}"
            relation = "has no meaning with" if options.efficiency else "needs"
            raise ConfigError(f"v4 plan: {option} {relation} --efficiency")
    if options.efficiency:
        plot = None if options.plot is None else Path(options.plot)
        name = Path(options.config).stem
        _print_all(describe_efficiency(config.model, name, options.gpu, plot))
        return
    with Activity("measuring" if options.measure else "planning"):
        _print_all(
            describe_plan(
                config, options.processes, options.dry_run, options.phase, options.parameters
            )
        )
        if options.measure:
            from trainer.planning import measure_layers

            _print_all(measure_layers(config, options.processes))


def kernels_check(config: RunConfig, options: argparse.Namespace) -> None:
    """Check every kernel of a config on this machine's GPUs, and choose the fastest."""
    with _loading():
        from trainer.kernels.commands import check_command
        from trainer.planning import fit_to_device
        from trainer.process.errors import PreflightError
        from trainer.process.local_device import local_device

    if (device := local_device(config.device)).type != "cuda":
        raise PreflightError(
            f"v4 kernels check: kernels are checked on a GPU, and this run's device is the "
            f"{device.type.upper()}, where every operation runs eagerly"
        )
    config, lines = fit_to_device(config, device, options.processes or config.min_world)
    _print_all([*lines, *check_command(config)])


def kernels_show(options: argparse.Namespace) -> None:
    """Show the kernels that were checked on GPUs, and for what."""
    from trainer.kernels.commands import show_command

    _print_all(show_command())


def _print_all(parts: Iterable[Any]) -> None:
    """Prints tables and lines. A file or a pipe has no width: tables may take 200 columns."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for part in parts:
        console.print(part)


def gpus(config: RunConfig, options: argparse.Namespace) -> None:
    """Print how many processes of this host can have a GPU; 0 on the CPU."""
    with _loading():
        from trainer.process.local_device import usable_gpus

    print(usable_gpus(config.device))


def demo_corpus(folder: str, options: argparse.Namespace) -> None:
    """Collect code and prose that this machine has into two .jsonl files."""
    from data.prepare import build_demo_corpus

    with Activity("collecting text"):
        paths = build_demo_corpus(folder)
    for path in paths:
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def demo_cloze(config: RunConfig, options: argparse.Namespace) -> None:
    """Make a task of lm-eval of the prose in the validation split."""
    from data.prepare import write_demo_cloze

    with Activity("making the task"):
        questions = write_demo_cloze(config.data, Path(options.folder))
    print(f"wrote {Path(options.folder, 'cloze.yaml')}: {questions} questions")


def sample(folder: str, options: argparse.Namespace) -> None:
    """Load an exported folder with transformers and continue a prompt."""
    from trainer.export import sample_text

    with Activity("loading the model with transformers, then sampling"):
        result = sample_text(Path(folder), options.prompt)
    print(json.dumps(result))


def _loading() -> Activity:
    """Reports slow imports in the first process."""
    return Activity("loading torch", visible=os.environ.get("RANK", "0") == "0")


VERBS = {
    "tokenizer-train": tokenizer_train,
    "prepare": data_prepare,
    "data-report": data_report,
    "eval": evaluate,
    "export": export,
    "import": import_,
    "report": report,
    "demo-cloze": demo_cloze,
    "plan": plan,
    "gpus": gpus,
    "kernels-check": kernels_check,
}
PLAIN_VERBS = {"kernels-show": kernels_show} | DATA_VERBS
FOLDER_VERBS = {
    "chat": chat,
    "check-export": check_export,
    "demo-corpus": demo_corpus,
    "generate": generate,
    "sample": sample,
    "sweep-report": sweep_report,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0, 2 after one line on stderr about bad input, or 130 after Ctrl-C."""
    prepare_streams()
    options = parse(arguments)
    from trainer.process.errors import run_or_explain

    def run() -> None:
        raise_on_interrupt()  # one that came before is delivered here
        from trainer.config import is_hf_folder, require_unicode

        require_unicode([os.path.abspath(getattr(options, "folder", "."))])
        if options.verb in FOLDER_VERBS:
            FOLDER_VERBS[options.verb](options.folder, options)
        elif options.verb in PLAIN_VERBS:
            PLAIN_VERBS[options.verb](options)
        elif options.verb == "eval" and is_hf_folder(options.config):
            evaluate_folder(options)
        else:
            VERBS[options.verb](_load(options), options)

    return run_or_explain(run)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the verb and its arguments, options and overrides in any order.

    argparse itself takes no override after an option.
    """
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    overrides = [word for word in others if not word.startswith("-")]
    if others and (options.verb not in VERBS or overrides != others):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if overrides:
        options.overrides += overrides
    return options


def _load(options: argparse.Namespace) -> RunConfig:
    """Reads the config; that of an import has the folder's sizes where it has none of its own."""
    from trainer.config import load_run

    if options.verb != "import":
        return load_run(options.config, options.overrides)
    from trainer.export import imported_sizes

    return load_run(options.config, options.overrides, imported_sizes(_place(options.folder)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.commands", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, folder_function in FOLDER_VERBS.items():
        verb = verbs.add_parser(name, help=folder_function.__doc__)
        verb.add_argument("folder")
        if name == "sample":
            verb.add_argument("prompt")
        if name == "generate":
            add_generate_arguments(verb)
        if name == "chat":
            add_chat_arguments(verb)
    verbs.add_parser("kernels-show", help=kernels_show.__doc__)
    add_data_arguments(verbs)
    for name, function in VERBS.items():
        verb = verbs.add_parser(name, help=function.__doc__)
        verb.add_argument("config", help="config file or run folder")
        if name in ("export", "import"):
            verb.add_argument("folder", help="Hugging Face folder")
        if name == "demo-cloze":
            verb.add_argument("folder", help="folder of the task")
        if name in ("tokenizer-train", "prepare"):
            verb.add_argument("--overwrite", action="store_true", help="replace what is there")
        if name == "eval":
            add_eval_arguments(verb)
        if name == "export":
            formats = ["as_trained", "mxfp4_experts", "released"]
            verb.add_argument("--weights", choices=formats, default="as_trained")
            verb.add_argument("--prompts", help="the encoder of a released folder, for its prompts")
        if name == "kernels-check":
            verb.add_argument("--processes", type=int)
        if name == "plan":
            verb.add_argument("--processes", type=int, default=1)
            verb.add_argument("--dry-run", action="store_true", help="memory with activations")
            verb.add_argument("--phase", type=int, help="the phase whose activations are counted")
            verb.add_argument("--parameters", action="store_true", help="the optimizer's table")
            verb.add_argument("--measure", action="store_true", help="time one layer of each kind")
            verb.add_argument("--efficiency", action="store_true", help="costs against context")
            verb.add_argument("--gpu", help="with --efficiency, the decoding rate of this GPU")
            verb.add_argument("--plot", help="with --efficiency, a picture to write")
        verb.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


if __name__ == "__main__":
    sys.exit(main())
