"""A process of an array of jobs: `python -m data.prepare.engines.slurm_job FILES FIRST`."""

import os
import sys
from pathlib import Path

from data.prepare.engines.remote import open_preparation, run_job


def main() -> None:
    """Runs the tasks of the job whose number is FIRST plus its index in the array."""
    files, first = Path(sys.argv[1]), int(sys.argv[2])
    index = int(os.environ["SLURM_ARRAY_TASK_ID"])
    run_job(files, f"{first + index:06d}", open_preparation(files))


if __name__ == "__main__":
    main()
