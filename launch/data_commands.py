"""`v4 data`: the commands of training data."""

from typing import Annotated

import typer

from launch import processes
from launch.arguments import Config, Overrides, Overwrite, run_command

data_app = typer.Typer(help="Training data.", no_args_is_help=True)

Shards = Annotated[
    str, typer.Argument(help="Config file, run folder, or folder or URL of token shards.")
]


@data_app.command("prepare")
def prepare(config: Config, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """Turn data.sources into token shards."""
    run_command("prepare", config, overrides, *["--overwrite"] * overwrite)


@data_app.command("report")
def report(
    config: Shards,
    overrides: Overrides = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="SHARDS", help="Other shards, or their config: what differs, in compare.html."
        ),
    ] = None,
) -> None:
    """Show the contents of the token shards, and some rows, in report.html in the same folder."""
    if compare is None:
        run_command("data-report", config, overrides)
    command = processes.command("data-compare", config, compare, *(overrides or []))
    raise typer.Exit(processes.run(command))


@data_app.command("verify")
def verify(shards: Shards) -> None:
    """Check the SHA-256 of every file of the token shards, and name those that are broken."""
    raise typer.Exit(processes.run(processes.command("data-verify", shards)))


@data_app.command("merge")
def merge(
    out: Annotated[str, typer.Argument(help="New folder or URL.")],
    shards: Annotated[
        list[str], typer.Argument(help="Two or more: config files, or folders or URLs of shards.")
    ],
    overwrite: Overwrite = False,
) -> None:
    """Put token shards of several preparations together, by links where that is possible."""
    flags = ["--overwrite"] * overwrite
    raise typer.Exit(processes.run(processes.command("data-merge", out, *shards, *flags)))
