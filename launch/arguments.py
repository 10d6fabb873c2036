"""Arguments that many commands of `v4` have, and how a command runs in a subprocess."""

from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from launch import processes

if TYPE_CHECKING:
    from trainer.config import RunConfig

Config = Annotated[str, typer.Argument(help="Config file, or the folder of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the file."),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what is there, which runs may have been made with."),
]


def run_command(verb: str, config: str, overrides: list[str] | None, *more: str) -> NoReturn:
    """Checks the config here, where it is cheap, then runs the verb in a subprocess."""
    check(config, overrides)
    arguments = [config, *more, *(overrides or [])]
    raise typer.Exit(processes.run(processes.command(verb, *arguments)))


def check(config: str, overrides: list[str] | None) -> "RunConfig":
    """Returns the config of a run."""
    from trainer.config import load_run

    return load_run(config, overrides or [])
