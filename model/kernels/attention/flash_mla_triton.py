"""FlashMLA's sparse forward for attention to selected entries, between two Triton kernels.

FlashMLA (github.com/deepseek-ai/FlashMLA, optional) attends to lists of keys that all heads share,
with a sink, at 640 TFLOP/s on an H800 by its authors' account. It has no backward, norm or
rotation: queries are normed and rotated before it, its output is rotated back, and everything else
is as in ``forward_triton.py``, attention to ranges and backward included, which needs only out and
lse2. Its list has a token's window and its selected entries.

T queries; L keys; H heads; K their width (DIM); R rotary dims (ROTARY); k selected entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import backend
from model.kernels.attention import forward_triton
from model.kernels.attention.inputs import AttentionInputs
from model.kernels.attention.parts_triton import (
    LOG2E,
    SELECTED_ENTRIES,
    Blocks,
    Call,
    load_queries,
)
from model.kernels.norm import norm_triton

_DTYPE, _WIDTH, _HEADS = torch.bfloat16, 512, (64, 128)
_CAPABILITIES = (9, 10)
_LIST_MULTIPLE = 128
"""What the length of a list has to be a multiple of, on every GPU."""
_ROWS = 16


def attention(
    inputs: AttentionInputs, *, deterministic: bool = True, blocks: Blocks | None = None
) -> tuple[Tensor, Tensor]:
    """Computes ``model.kernels.attention.attention_with_lse2``.

    Arguments and results are those of ``forward_triton.attention``.

    Raises:
        UnsupportedError: FlashMLA is not installed or cannot run this.
        ValueError: as ``forward_triton.attention``.
    """
    _check(inputs.q_THK)

    def forward(
        call: Call,
        q: Tensor,
        kv: Tensor,
        entries: Tensor | None,
        sink: Tensor,
        cos_sin: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        if call.mode != SELECTED_ENTRIES.value or entries is None:
            return forward_triton.launch(call, q, kv, entries, sink, cos_sin, eps)
        indices_Tn = _lists(call, inputs.window, len(kv))
        return _sparse_forward(call, q, torch.cat([kv, entries]), indices_Tn, sink, cos_sin, eps)

    return forward_triton.attention(
        inputs, deterministic=deterministic, blocks=blocks, forward=forward
    )


def _check(q_THK: Tensor) -> None:
    backend.library("flash_mla")
    _, heads, dim = q_THK.shape
    unsupported = None
    if dim != _WIDTH or heads not in _HEADS:
        unsupported = f"it takes 64 or 128 heads of width 512, not {heads} of width {dim}"
    elif q_THK.dtype != _DTYPE:
        unsupported = f"it takes {_DTYPE}, not {q_THK.dtype}"
    elif q_THK.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(q_THK.device)
        if major not in _CAPABILITIES:
            unsupported = f"it needs compute capability 9.0 or 10.0, the GPU has {major}.{minor}"
    if unsupported is not None:
        raise backend.UnsupportedError(f"attention: FlashMLA cannot run this, {unsupported}")


def _lists(call: Call, window: int, keys: int) -> Tensor:
    """Returns each query's keys as indices into keys and entries, int32 [T, n], -1 for none."""
    assert call.selected is not None
    place = torch.arange(window, dtype=torch.int32, device=call.selected.device)
    token_TW = call.key_start[:, None] + place
    token_TW = torch.where(token_TW < call.key_end[:, None], token_TW, -1)
    entry_Tk = torch.where(call.selected >= 0, call.selected + keys, -1)
    width = window + call.num_selected
    padding = triton.cdiv(width, _LIST_MULTIPLE) * _LIST_MULTIPLE - width
    lists_Tn = torch.cat([token_TW, entry_Tk], 1)
    return torch.nn.functional.pad(lists_Tn, (0, padding), value=-1).contiguous()


def _sparse_forward(
    call: Call,
    q: Tensor,
    keys: Tensor,
    indices_Tn: Tensor,
    sink: Tensor,
    cos_sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns the output, rotated back, and lse2. FlashMLA's log-sum-exp has no sink in it."""
    from flash_mla import flash_mla_sparse_fwd

    sink = sink.float().contiguous()
    out, _, lse = flash_mla_sparse_fwd(
        _rotated_queries(q, cos_sin, eps),
        keys[:, None],
        indices_Tn[:, None],
        call.softmax_scale,
        d_v=call.dim,
        attn_sink=sink,
    )
    back = torch.view_as_complex(cos_sin.view(len(q), -1, 2)).conj().resolve_conj()
    return norm_triton.rotate(out, back), torch.logaddexp(lse, sink) * LOG2E


@triton.jit(do_not_specialize=["rows"])
def _rotate_queries(
    q,
    cos_sin,
    rotated,
    rows,
    heads,
    eps,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_bounds = row < rows
    x, _ = load_queries(q, cos_sin, row, row // heads, in_bounds, eps, ROWS, DIM, ROTARY)
    at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(rotated + at, x.to(rotated.dtype.element_ty), mask=in_bounds[:, None])


def _rotated_queries(q: Tensor, cos_sin: Tensor, eps: float) -> Tensor:
    """Returns the queries [T, H, K] after their norm and rotation, rounded once."""
    rotated, rows = torch.empty_like(q), q.shape[0] * q.shape[1]
    if rows:
        _rotate_queries[(triton.cdiv(rows, _ROWS),)](
            q,
            cos_sin,
            rotated,
            rows,
            q.shape[1],
            eps,
            DIM=q.shape[2],
            ROTARY=cos_sin.shape[1],
            ROWS=_ROWS,
            num_warps=4,
        )
    return rotated
