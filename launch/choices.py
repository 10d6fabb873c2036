"""Choices of the `v4` command's options."""

from enum import StrEnum


class Effort(StrEnum):
    """How much a model reasons before it answers."""

    NONE = "none"
    HIGH = "high"
    MAX = "max"


class GpuName(StrEnum):
    """GPUs whose data-sheet rates `v4 plan --efficiency` knows."""

    A100 = "a100"
    H100 = "h100"
    H200 = "h200"
    B200 = "b200"


class WeightFormat(StrEnum):
    """How `v4 export` stores the weights."""

    AS_TRAINED = "as_trained"
    MXFP4_EXPERTS = "mxfp4_experts"
    RELEASED = "released"
