"""Which kernels a run uses: checked on the user's GPU, agreed by all ranks, pinned in its folder.

1. `choose` makes a rank's choices from the config's `kernels` and the verdicts.
2. `agree` finds what passed on every kind of GPU of the job, and what the run used before.
3. `pinned` keeps the result in the run's folder.

Importing this package does not import torch.
"""

from trainer.kernels.agree import AgreedKernels, RankKernels, agree, unchecked
from trainer.kernels.choose import run_operations, unchecked_kernels
from trainer.kernels.gpu import Platform
from trainer.kernels.pinned import KERNELS_FILE, PinnedKernels, read_pinned
from trainer.kernels.verdict import CheckKernels, LocalVerdicts, Problem, Verdict

__all__ = [
    "KERNELS_FILE",
    "AgreedKernels",
    "CheckKernels",
    "LocalVerdicts",
    "PinnedKernels",
    "Platform",
    "Problem",
    "RankKernels",
    "Verdict",
    "agree",
    "read_pinned",
    "run_operations",
    "unchecked",
    "unchecked_kernels",
]
