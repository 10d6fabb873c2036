"""Which kernels a run uses: checked on the user's GPU, agreed by all ranks, pinned in its folder.

1. `first_check` has the verdicts of `check` about this host's GPUs, from the user's cache.
2. `choose` makes a rank's choices from the config's `kernels` and the verdicts.
3. `agree` finds what passed on every kind of GPU of the job, and what the run used before.
4. `pinned` keeps the result in the run's folder.

Importing this package does not import torch.
"""

from trainer.kernels.agree import AgreedKernels, RankKernels, agree, unchecked
from trainer.kernels.choose import run_operations, unchecked_kernels
from trainer.kernels.first_check import local_verdicts
from trainer.kernels.gpu import Platform
from trainer.kernels.pinned import KERNELS_FILE, PinnedKernels, kernels_without_check, read_pinned
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
    "kernels_without_check",
    "local_verdicts",
    "read_pinned",
    "run_operations",
    "unchecked",
    "unchecked_kernels",
]
