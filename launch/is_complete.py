"""`python -m launch.is_complete CONFIG [key=value ...]`: whether a run has its last checkpoint.

CONFIG is a config file or a run folder. Ends with 0 if it has, else with 1. A pod runs it after
training.
"""

import sys

from trainer.config import load_run


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    return 0 if load_run(arguments[0], arguments[1:]).is_complete else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
