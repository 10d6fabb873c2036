"""Which kernels a run uses: checked on the user's GPU, agreed by all ranks, pinned in its folder.

Importing this package does not import torch.
"""

from trainer.kernels.verdict import CheckKernels, Problem, Verdict

__all__ = ["CheckKernels", "Problem", "Verdict"]
