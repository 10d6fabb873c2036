"""Which implementation each operation uses, as one object. Imports no torch: configs name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

IMPLEMENTATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention": ("eager", "triton", "flash_mla"),
        "indexer": ("eager", "triton"),
        "indexer_loss": ("eager", "triton"),
        "compressor": ("eager", "triton"),
        "norms": ("eager", "compile", "triton"),
        "hyper_connections": ("eager", "compile", "triton", "tile_kernels"),
        "swiglu": ("eager", "compile", "triton"),
        "permute": ("eager", "triton"),
        "grouped_mm": ("eager", "triton"),
        "cross_entropy": ("eager", "triton"),
        "fp8": ("eager", "triton"),
        "syrk": ("eager", "triton", "quack"),
    }
)
"""The implementations of each operation, by its name in the `kernels` of a config. "attention"
includes the entries' probability mass, "norms" the rotations, "permute" the MoE combine;
"grouped_mm" is the routed experts' matmuls unless they are in FP8; "fp8" is matmuls and their
operands' quantisation; "syrk" is the optimizer's symmetric matmul."""
OPERATIONS = tuple(IMPLEMENTATIONS)
LIBRARIES: Mapping[str, str] = MappingProxyType(
    {"flash_mla": "flash_mla", "tile_kernels": "tile_kernels", "quack": "quack-kernels"}
)
"""Implementations that are optional packages, by the name of their module, which is also the
implementation's: the name of the distribution."""
BLOCKS_OF_TRITON = ("triton", "flash_mla")
"""Implementations that take the block sizes of Triton kernels; FlashMLA's backward is Triton's."""


@dataclass(frozen=True)
class Choice:
    """The implementation of one operation.

    Attributes:
        name: one of the operation's IMPLEMENTATIONS.
        blocks: block sizes of its launches, keywords of the kernel's function; its own defaults
            where empty.
        why: the reason, for the log; choices with different reasons are equal.
    """

    name: str = "eager"
    blocks: Mapping[str, int] = field(default_factory=dict)
    why: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


EAGER = Choice()


@dataclass(frozen=True)
class Kernels:
    """The Choice of every operation; plain eager PyTorch by default.

    Raises ValueError for an implementation that an operation does not have.
    """

    attention: Choice = EAGER
    indexer: Choice = EAGER
    indexer_loss: Choice = EAGER
    compressor: Choice = EAGER
    norms: Choice = EAGER
    hyper_connections: Choice = EAGER
    swiglu: Choice = EAGER
    permute: Choice = EAGER
    grouped_mm: Choice = EAGER
    cross_entropy: Choice = EAGER
    fp8: Choice = EAGER
    syrk: Choice = EAGER

    def __post_init__(self) -> None:
        for operation, choice in self.by_operation().items():
            if choice.name not in IMPLEMENTATIONS[operation]:
                raise ValueError(
                    f"{operation} has no implementation {choice.name!r}; it has "
                    f"{', '.join(IMPLEMENTATIONS[operation])}"
                )

    def by_operation(self) -> dict[str, Choice]:
        """Returns the choices by the name of their operation."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


ALL_EAGER = Kernels()
