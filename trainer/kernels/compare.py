"""Is an implementation right? Outputs and every gradient, compared with a truth of more precision.

An implementation in the run's dtype may be as far from the truth as the eager one is in that dtype,
times two; below a floor that rounding explains, differences do not count. Fresh memory is filled
with NaN, inputs lie between NaNs, and both are looked at afterwards: what is read outside of its
tensor or before it is written shows, and so does what is written elsewhere.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernel_cases import Case, Function

FACTOR, COSINE = 2.0, 0.999
"""Limits of the norm of the error over that of the truth, and of the cosine between result and
truth: twice the error of the eager version, or the floor of the result's dtype."""
FLOORS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-4}
"""For bf16 and fp16, half the spacing of numbers. In fp32, a sum's error exceeds that: of the 8192
tokens of a check, added one by one, it is about sqrt(8192) · 2^-24 = 5e-6 of the norm of the terms,
and a result may be a tenth of that norm. One rounding to bf16 or to TF32 has an error of about
1.6e-3 or 2e-4."""
ROW_FACTOR, ROW_FLOOR = 4.0, 5.0
"""Limits of the same for each vector along the last dimension, over its own norm plus the mean one:
a wrong row among thousands does not show in the norm of all. Wider, as it is a maximum.
`ROW_FLOOR` multiplies the result's floor."""
_FEW = 4.0
"""The norm of few numbers' errors fluctuates: of n numbers, limits are wider by 1 + 4 / sqrt(n).
The ratio of the norms of n independent errors of equal size has a standard deviation of about
1 / sqrt(n); this leaves four. Of 16 numbers (the sinks' gradient of as many heads), 0.4% of the
results that are as good as the eager one are more than twice as far from the truth by chance, and
3e-7 four times (F distribution); of a thousand and more the limit is nearly FACTOR alone."""
SELECTED, TIE = 0.98, 1e-3
"""The least share of selected entries that agree with the truth, and how far the score of others
may be from that of the truth's last, as a share of the query's largest magnitude."""
_GUARD = 256
"""NaNs before and after every input. A multiple of any vector load's width: alignment stays."""
_CHUNK = 1 << 24
"""Numbers compared in float64 at once."""


@dataclass(frozen=True)
class Distance:
    """How far a result is from the truth; see the limits above. ``numbers`` is how many it has."""

    error: float
    worst_row: float
    cosine: float
    numbers: int


@dataclass(frozen=True)
class Reference:
    """The truth of a case, and the eager version's distance from it in the run's dtype.

    Attributes:
        names: of the results: outputs, then gradients.
        eager: empty where the truth is the eager version's own result.
    """

    names: list[str]
    truth: list[Tensor]
    eager: list[Distance]

    @property
    def errors(self) -> tuple[float, float]:
        """The eager version's largest error of outputs and of gradients."""
        return largest(self.names, self.eager) if self.eager else (0.0, math.nan)


def largest(names: Sequence[str], distances: Sequence[Distance]) -> tuple[float, float]:
    """Returns the largest error of outputs and of gradients, NaN where there are none."""
    gradients = [name.startswith("gradient of") for name in names]
    pairs = list(zip(gradients, distances, strict=True))
    return (
        max((d.error for is_gradient, d in pairs if not is_gradient), default=math.nan),
        max((d.error for is_gradient, d in pairs if is_gradient), default=math.nan),
    )


def reference_of(case: Case) -> Reference:
    """Computes the truth: the naive version in float64, or the eager one in fp32 without it."""
    truth_dtype = torch.float32 if case.naive is None else torch.float64
    exact = case.exact or case.selection is not None
    names, truth = results(case, case.naive or case.eager, None if exact else truth_dtype)
    _, eager = (names, truth) if exact else results(case, case.eager)
    distances = [distance(a, b) for a, b in zip(eager, truth, strict=True)] if not exact else []
    return Reference(names, truth, distances)


def fault_of(case: Case, function: Function, reference: Reference) -> tuple[str | None, tuple]:
    """Compares an implementation with the truth.

    Returns:
        What is wrong, as the end of a sentence, or None; and its errors as `Reference.errors`.
    """
    names, computed = results(case, function)
    fault, errors = _fault_of_results(case, names, computed, reference)
    if fault is None and case.repeatable:
        _, again = results(case, function)
        pairs = zip(names, computed, again, strict=True)
        changed = next((name for name, a, b in pairs if not _same_bits(a, b)), None)
        fault = None if changed is None else f"{changed} has other bits at a second run"
    return fault, errors


def _fault_of_results(
    case: Case, names: Sequence[str], computed: Sequence[Tensor], reference: Reference
) -> tuple[str | None, tuple]:
    if case.selection is not None:
        fault, share = _selection_fault(case, computed[0])
        return fault, (share, math.nan)
    if case.exact:
        exact = zip(names, computed, reference.truth, strict=True)
        fault = next((f"{name} differs" for name, a, b in exact if not _same_bits(a, b)), None)
        return fault, (0.0 if fault is None else math.inf, math.nan)
    distances, floors = [], []
    for name, ours, truth in zip(names, computed, reference.truth, strict=True):
        if ours.shape != truth.shape:
            return f"{name} has the shape {tuple(ours.shape)}, not {tuple(truth.shape)}", (
                math.inf,
                math.inf,
            )
        distances.append(distance(ours, truth))
        floors.append(_floor(case, ours))
    errors = largest(names, distances)
    pairs = zip(distances, reference.eager, floors, strict=True)
    for name, some in zip(names, pairs, strict=True):
        if (fault := _fault(*some)) is not None:
            return f"{name} {fault}", errors
    return None, errors


def _floor(case: Case, result: Tensor) -> float:
    """Returns the floor of a result's dtype, or the highest of the leaves' if they decide."""
    own = FLOORS[result.dtype]
    if not case.rounds_within:
        return own
    return max(own, *(FLOORS[x.dtype] for x in case.leaves.values()))


def _fault(ours: Distance, eager: Distance, floor: float) -> str | None:
    # A scalar is a loss, in fp32.
    few = 1 + _FEW / math.sqrt(ours.numbers) if ours.numbers > 1 else 1.0
    error = few * max(FACTOR * eager.error, floor)
    row = max(ROW_FACTOR * eager.worst_row, ROW_FLOOR * floor)
    if math.isnan(ours.error):
        return "is not finite: a kernel read what nothing had written, or left it unwritten"
    if not ours.error <= error:
        return f"has an error of {ours.error:.1e}, where at most {error:.1e} is rounding"
    if not ours.worst_row <= row:
        return (
            f"has a row with an error of {ours.worst_row:.1e}, where at most {row:.1e} is rounding"
        )
    if not ours.cosine > COSINE:
        return f"has a cosine of {ours.cosine:.4f} with the truth, not above {COSINE}"
    return None


def results(
    case: Case, function: Function, dtype: torch.dtype | None = None
) -> tuple[list[str], list[Tensor]]:
    """Returns names and values of the outputs and of every leaf's gradient.

    The gradients are those of the outputs' sum with random weights, the same ones at every call.

    Args:
        dtype: of the floating-point leaves; their own by default.

    Raises:
        RuntimeError: the function changed an input or the memory next to it.
    """
    leaves = [_guarded(x if dtype is None else x.to(dtype)) for x in case.leaves.values()]
    inputs = [x.detach().requires_grad_(case.differentiable) for x in leaves]
    with _poisoned(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.set_grad_enabled(case.differentiable):
            out = function(*inputs)
        outputs = list(out) if isinstance(out, tuple) else [out]
        names, grads = list(case.outputs), []
        if case.differentiable:
            weights = [_weights(x, number) for number, x in enumerate(outputs)]
            grads = list(torch.autograd.grad(outputs, inputs, weights, allow_unused=True))
            names += [f"gradient of {name}" for name in case.leaves]
    for name, plain, guarded in zip(case.leaves, case.leaves.values(), leaves, strict=True):
        if not _is_intact(plain, guarded):
            raise RuntimeError(f"{name}, an input, or memory next to it was written")
    outputs = [x.detach() for x in outputs]
    zeros = zip(grads, inputs, strict=False)
    return names, outputs + [torch.zeros_like(x) if g is None else g for g, x in zeros]


def _weights(output: Tensor, number: int) -> Tensor:
    """Returns the gradient of an output: a loss has 1, others random numbers that bf16 holds."""
    if output.dim() == 0:
        return torch.ones_like(output)
    generator = torch.Generator(output.device).manual_seed(99 + number)
    normal = torch.randn(output.shape, generator=generator, device=output.device)
    return normal.bfloat16().to(output.dtype)


def _guarded(x: Tensor) -> Tensor:
    """Copies a tensor into the middle of a buffer of NaNs."""
    buffer = x.new_full((x.numel() + 2 * _GUARD,), torch.nan)
    inside = buffer[_GUARD:-_GUARD].view(x.shape)
    return inside.copy_(x)


def _is_intact(plain: Tensor, guarded: Tensor) -> bool:
    buffer = guarded.new_empty(0).set_(guarded.untyped_storage())
    guards = torch.cat([buffer[:_GUARD], buffer[-_GUARD:]])
    return bool(guards.isnan().all()) and torch.equal(
        guarded.nan_to_num(), plain.to(guarded.dtype).nan_to_num()
    )


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Fills what torch allocates with NaN, or the largest integer: torch's own debugging aid."""
    was, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def distance(ours: Tensor, truth: Tensor) -> Distance:
    """Measures a result in float64; NaN where it is not finite."""
    width = truth.shape[-1] if truth.dim() > 1 else 1
    a, b = ours.reshape(-1, width), truth.reshape(-1, width)
    step = max(_CHUNK // max(width, 1), 1)
    squares = b.new_zeros(3, dtype=torch.float64)
    rows_error, rows_truth = [], []
    for x, y in zip(a.split(step), b.split(step), strict=True):
        x, y = x.double(), y.double()
        error, size = (x - y).square().sum(1), y.square().sum(1)
        squares += torch.stack([error.sum(), x.square().sum(), (x * y).sum()])
        rows_error.append(error)
        rows_truth.append(size)
    error_n, truth_n = torch.cat(rows_error), torch.cat(rows_truth)
    total, ours_total, dot = (float(x) for x in squares)
    truth_total = float(truth_n.sum())
    if not math.isfinite(total):
        return Distance(math.nan, math.nan, math.nan, truth.numel())
    if truth_total == 0.0:
        # Nothing to be relative to: an exact zero must be one.
        cosine = 1.0 if total == 0.0 else 0.0
        return Distance(math.sqrt(total), math.sqrt(total), cosine, truth.numel())
    mean = math.sqrt(truth_total / len(truth_n))
    worst = float((error_n.sqrt() / (truth_n.sqrt() + mean)).max())
    cosine = dot / math.sqrt(truth_total * ours_total) if ours_total > 0 else 0.0
    return Distance(math.sqrt(total / truth_total), worst, cosine, truth.numel())


def _same_bits(ours: Tensor, truth: Tensor) -> bool:
    """Whether all numbers are the same; NaN is NaN, and zeros have signs."""
    if not ours.is_floating_point():
        return torch.equal(ours, truth)
    if ours.shape != truth.shape or not torch.equal(ours.isnan(), truth.isnan()):
        return False
    a, b = ours.float().nan_to_num(), truth.float().nan_to_num()
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def _selection_fault(case: Case, selected_Tk: Tensor) -> tuple[str | None, float]:
    """Compares a selection with the exact scores; returns also the share that differs."""
    selection = case.selection
    assert selection is not None
    leaves = [x.double() for x in case.leaves.values()]
    start_T, end_T, k = selection.start_T, selection.end_T, selected_Tk.shape[1]
    index_C = torch.arange(len(leaves[1]), device=start_T.device)
    step = max(_CHUNK // max(leaves[0].shape[1] * len(index_C), 1), 1)
    differ = total = 0
    for rows in torch.arange(len(selected_Tk), device=start_T.device).split(step):
        some = slice(int(rows[0]), int(rows[-1]) + 1)
        ours = selected_Tk[some].long()
        low, high = start_T[some, None], end_T[some, None]
        valid = ours >= 0
        if not bool((((ours >= low) & (ours < high)) | (ours == -1)).all()):
            return "has entries that their query does not see", math.inf
        if bool((valid[:, 1:] & ~valid[:, :-1]).any()):
            # Attention reads a query's first columns, as many as it has entries.
            return "has an entry after a -1, where all -1 come last", math.inf
        chosen = torch.zeros(len(ours), len(index_C) + 1, dtype=torch.int32, device=ours.device)
        chosen.scatter_add_(1, ours.masked_fill(~valid, len(index_C)), torch.ones_like(ours).int())
        wanted = (high - low).clamp(max=k)[:, 0]
        if bool((chosen[:, :-1] > 1).any()):
            return "has an entry twice", math.inf
        if not torch.equal(valid.sum(1), wanted):
            return f"does not have min({k}, visible entries) of every query", math.inf
        scores = selection.scores(leaves, some)
        masked = scores.masked_fill((index_C < low) | (index_C >= high), -torch.inf)
        best = masked.topk(min(k, masked.shape[1]), dim=1)
        is_best = torch.zeros_like(chosen).scatter_(1, best.indices, 1)[:, :-1].bool()
        is_best &= masked > -torch.inf
        is_ours = chosen[:, :-1].bool()
        last = best.values[:, -1:].nan_to_num(neginf=0.0)
        near = (scores - last).abs() <= TIE * scores.abs().amax(1, keepdim=True)
        if bool(((is_ours != is_best) & ~near).any()):
            return "has entries whose scores are not among the best", math.inf
        differ += int((is_ours & ~is_best).sum())
        total += int(is_ours.sum())
    share = differ / max(total, 1)
    if share > 1 - SELECTED:
        return f"differs from the truth in {share:.1%} of the entries", share
    return None, share
