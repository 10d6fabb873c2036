"""The `v4` command: reads the config, then starts the work as subprocesses."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launch import processes
from launch.cluster import load_cluster, write_job
from launch.demo import run_demo
from trainer.config import ConfigError, RunConfig, load_run

app = typer.Typer(
    help="Pre-training of the DeepSeek-V4 architecture, from raw text to a transformers model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tokenizer_app = typer.Typer(help="The tokenizer.", no_args_is_help=True)
data_app = typer.Typer(help="Training data.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")

Config = Annotated[str, typer.Argument(help="Config file, or the folder of a run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values instead of the file's.")
]


class ExpertFormat(StrEnum):
    """How `v4 export` writes the routed experts."""

    AS_TRAINED = "as_trained"
    MXFP4 = "mxfp4"


def _finish(code: int) -> None:
    raise typer.Exit(code)


def _command(verb: str, config: str, overrides: list[str] | None, *more: str) -> None:
    """Check the config here, where it is cheap, then run the verb in a subprocess."""
    _check(config, overrides)
    _finish(processes.run(processes.command(verb, config, *more, *(overrides or []))))


def _check(config: str, overrides: list[str] | None) -> RunConfig:
    return load_run(config, overrides or [])


@tokenizer_app.command("train")
def tokenizer_train(config: Config, overrides: Overrides = None) -> None:
    """Train the tokenizer of data.tokenizer on data.sources."""
    _command("tokenizer-train", config, overrides)


@data_app.command("prepare")
def data_prepare(config: Config, overrides: Overrides = None) -> None:
    """Turn data.sources into token shards."""
    _command("prepare", config, overrides)


@data_app.command("report")
def data_report(config: Config, overrides: Overrides = None) -> None:
    """Show what the token shards hold, and some rows, in report.html beside them."""
    _command("data-report", config, overrides)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    nproc_per_node: Annotated[
        int, typer.Option(min=1, help="Processes on this machine (torchrun when more than one).")
    ] = 1,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Restarts after a crash, from the newest checkpoint.")
    ] = 0,
) -> None:
    """Train, or go on from the newest checkpoint. SIGTERM or Ctrl-C: checkpoint and a clean end."""
    _check(config, overrides).check_world(nproc_per_node)
    _finish(processes.train([config, *(overrides or [])], nproc_per_node, max_restarts))


@app.command("eval")
def evaluate(config: Config, overrides: Overrides = None) -> None:
    """Loss of the newest checkpoint on the validation text."""
    _command("eval", config, overrides)


@app.command()
def export(
    config: Config,
    out: Path,
    overrides: Overrides = None,
    experts: Annotated[
        ExpertFormat, typer.Option(help="mxfp4 packs the routed experts as the official release.")
    ] = ExpertFormat.AS_TRAINED,
) -> None:
    """Write the newest checkpoint as a Hugging Face folder."""
    _command("export", config, overrides, str(out), f"--experts={experts.value}")


@app.command("import")
def import_(source: Path, config: Config, overrides: Overrides = None) -> None:
    """Start a run from a Hugging Face folder; CONFIG says everything but the model's sizes."""
    _command("import", config, overrides, str(source))


@app.command()
def report(config: Config, overrides: Overrides = None) -> None:
    """Draw the run's curves, or the comparison of a sweep's trials, into report.html."""
    if (Path(config) / "sweep.json").is_file():
        _finish(processes.run(processes.command("sweep-report", config)))
    _command("report", config, overrides)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Processes in all; by default the fewest that the axes need."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Memory with activations, without holding it.")
    ] = False,
    phase: Annotated[
        int | None,
        typer.Option(min=0, help="Phase whose activations --dry-run counts; else the largest's."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time one layer of each kind on this machine.")
    ] = False,
    cluster: Annotated[
        str | None,
        typer.Option(help="Write a job, too: a cluster file, or slurm or kubernetes for ours."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Processes on each of them.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the job's file.")] = Path("job"),
) -> None:
    """Show steps, tokens, parameters and memory of a config; write the job for a cluster."""
    run = _check(config, overrides)
    if cluster is not None:
        arguments = [config, *(overrides or [])]
        nproc = nodes * gpus_per_node
        path = write_job(run, arguments, load_cluster(cluster), nodes, gpus_per_node, out)
        submit = "sbatch" if path.suffix == ".sbatch" else "kubectl apply -f"
        print(f"wrote {path}; submit it with: {submit} {path}", flush=True)
    nproc = nproc or run.parallel.least_world
    run.check_world(nproc)
    flags = ["--dry-run"] * dry_run + ["--measure"] * measure
    flags += [] if phase is None else [f"--phase={phase}"]
    command = processes.command("plan", config, *(overrides or []), f"--processes={nproc}", *flags)
    _finish(processes.run(command))


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(help="Sweep file in wandb's format.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the trials; by default runs/sweep-NAME.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at a time.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Decides which random trials are drawn.")] = 0,
) -> None:
    """Run a sweep on this machine, or go on with one that was stopped."""
    from launch.sweep import run_sweep  # optuna takes a second to import

    _finish(run_sweep(file, out, jobs, seed))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(
        "runs/demo"
    ),
    nproc_per_node: Annotated[int, typer.Option(min=1)] = 2,
    overrides: Overrides = None,
) -> None:
    """The whole job on real text that is on this machine: corpus to transformers model."""
    _finish(run_demo(out, nproc_per_node, overrides or []))


def main() -> None:
    """Entry point: one line on stderr and exit code 2 for a config that cannot be used."""
    try:
        app()
    except ConfigError as error:
        print(f"{processes.ERROR_PREFIX}{' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(processes.USER_ERROR)


if __name__ == "__main__":
    main()
