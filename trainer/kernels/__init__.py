"""Which kernels a run uses: checked on the user's GPU, agreed by all ranks, pinned in its folder.

Importing this package does not import torch.
"""

from trainer.kernels.choose import (
    KernelError,
    choose_kernels,
    run_operations,
    unchecked_kernels,
)
from trainer.kernels.verdict import CheckKernels, Problem, Verdict

__all__ = [
    "CheckKernels",
    "KernelError",
    "Problem",
    "Verdict",
    "choose_kernels",
    "run_operations",
    "unchecked_kernels",
]
