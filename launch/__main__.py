"""`v4`, the command; signals are handled before anything is imported that takes long."""

from data.activity import prepare_streams
from trainer.process.signals import raise_on_interrupt


def main() -> None:
    """Entry point; does not return."""
    prepare_streams()
    raise_on_interrupt()
    from launch import cli

    cli.main()


if __name__ == "__main__":
    main()
