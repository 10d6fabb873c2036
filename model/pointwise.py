"""What lies between the matmuls: eager or Triton as model.kernels chooses, or torch.compile'd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from model.kernels import hyper_connection, norm, swiglu


@dataclass(frozen=True)
class PointwiseOps:
    """Norms, SwiGLU and hyper-connections, with the signatures of model.kernels' functions."""

    rms_norm: Callable[..., Tensor]
    clamped_swiglu: Callable[..., Tensor]
    read_streams: Callable[..., tuple[Tensor, Tensor, Tensor]]
    write_streams: Callable[..., Tensor]
    collapse_streams: Callable[..., Tensor]


EAGER_OR_TRITON = PointwiseOps(
    norm.rms_norm,
    swiglu.clamped_swiglu,
    hyper_connection.read_streams,
    hyper_connection.write_streams,
    hyper_connection.collapse_streams,
)


def compiled_or_triton() -> PointwiseOps:
    """Returns the ops of EAGER_OR_TRITON, torch.compile'd where Triton does not run them."""
    from model.kernels import compiled  # imports torch's compiler, which takes long

    ops = EAGER_OR_TRITON
    return PointwiseOps(
        partial(ops.rms_norm, eager=compiled.rms_norm),
        partial(ops.clamped_swiglu, eager=compiled.clamped_swiglu),
        partial(ops.read_streams, eager=compiled.read_streams),
        partial(ops.write_streams, eager=compiled.write_streams),
        partial(ops.collapse_streams, eager=compiled.read_streams),
    )
