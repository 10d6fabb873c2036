"""`python -m trainer.post.tasks FOLDER`: writes the files of the made-up tasks."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.post.tasks.files import write_tasks
from trainer.process.errors import run_or_explain


def main() -> None:
    """Parses the command line and writes the files."""
    parser = argparse.ArgumentParser(prog="python -m trainer.post.tasks", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", type=int, default=200, help="prompts to measure with")
    parser.add_argument("--train", type=int, default=1000, help="prompts to sample answers to")
    parser.add_argument("--answered", type=int, default=300, help="questions with answers")
    options = parser.parse_args()
    sizes = options.test, options.train, options.answered
    raise SystemExit(run_or_explain(lambda: write_tasks(options.folder, options.seed, *sizes)))


if __name__ == "__main__":
    main()
