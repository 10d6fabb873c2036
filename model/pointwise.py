"""How a model computes what lies between its products: as the kernels choose, or compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from model.kernels import hyper_connection, norm, swiglu


@dataclass(frozen=True)
class Operations:
    """The functions of these names in model.kernels."""

    rms_norm: Callable[..., Tensor]
    clamped_swiglu: Callable[..., Tensor]
    read_streams: Callable[..., tuple[Tensor, Tensor, Tensor]]
    write_streams: Callable[..., Tensor]
    collapse_streams: Callable[..., Tensor]


CHOSEN = Operations(
    norm.rms_norm,
    swiglu.clamped_swiglu,
    hyper_connection.read_streams,
    hyper_connection.write_streams,
    hyper_connection.collapse_streams,
)


def use_compiled(model: nn.Module) -> None:
    """Let the model's norms, experts and residual streams run compiled where Triton does not."""
    from model.kernels import compiled  # imports torch's compiler, which takes long

    operations = Operations(
        partial(CHOSEN.rms_norm, eager=compiled.rms_norm),
        partial(CHOSEN.clamped_swiglu, eager=compiled.clamped_swiglu),
        partial(CHOSEN.read_streams, eager=compiled.read_streams),
        partial(CHOSEN.write_streams, eager=compiled.write_streams),
        partial(CHOSEN.collapse_streams, eager=compiled.read_streams),
    )
    for module in model.modules():
        if hasattr(module, "operations"):
            module.operations = operations  # type: ignore[assignment]
