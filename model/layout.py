"""Sample boundaries of packed rows, as integer ranges.

A row is one sequence of the batch; a sample is a packed document, or a piece of one, inside a row
(what `cu_seqlens` delimit elsewhere). The model sees a microbatch as one flat sequence of T = B·S
tokens. A sample never crosses a row, so rows need no special treatment: every mask in every layer
is a range of flat token indices and a range of compressed-entry indices, and no [S, S] mask exists
anywhere.

Letters: B rows, S tokens of a row, T = B·S tokens, Z samples, C compressed entries, m tokens in an
entry's window.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 256  # bytes, as torch's allocator aligns tensors


def on_device(array: np.ndarray, device: torch.device | str | None) -> Tensor:
    """Copies an array to a device without synchronising with the GPU."""
    tensor = torch.from_numpy(array)
    if device is None or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def all_on_device(
    arrays: Sequence[np.ndarray], device: torch.device | str | None
) -> tuple[Tensor, ...]:
    """Copies arrays to a device without synchronising with the GPU, in one transfer to it."""
    if device is None or torch.device(device).type != "cuda":
        return tuple(on_device(array, device) for array in arrays)
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    packed = np.zeros(sum(sizes), np.uint8)
    parts = np.split(packed, np.cumsum(sizes)[:-1])
    for part, array in zip(parts, arrays, strict=True):
        part[: array.nbytes] = np.ascontiguousarray(array).view(np.uint8)
    copies = on_device(packed, device).split(sizes)
    return tuple(
        copy[: array.nbytes].view(torch.from_numpy(array).dtype)
        for copy, array in zip(copies, arrays, strict=True)
    )


@dataclass(frozen=True)
class Entries:
    """Index ranges of the compressed entries: one for every complete window of ``ratio`` tokens.

    Entries are in the order of samples.

    Attributes:
        first_token_C: flat index of each window's first token.
        position_C: that token's position in its sample, the entry's position in RoPE.
        has_previous_C: whether the window before it belongs to the same sample.
        start_T, end_T: the range of entries that a query at token t may see: its sample's entries
            from the first up to (position + 1) // ratio.
        host_*: copies of these arrays on the host, so that loops need no device sync.
    """

    ratio: int
    first_token_C: Tensor
    position_C: Tensor
    has_previous_C: Tensor
    start_T: Tensor
    end_T: Tensor
    host_first_token_C: np.ndarray
    host_position_C: np.ndarray
    host_start_T: np.ndarray
    host_end_T: np.ndarray

    @property
    def count(self) -> int:
        """C, the number of entries."""
        return self.first_token_C.shape[0]

    @property
    def max_visible(self) -> int:
        """The largest number of entries that any query sees."""
        return int((self.host_end_T - self.host_start_T).max(initial=0))


@dataclass(frozen=True)
class SampleLayout:
    """Samples of B packed rows of length S, on one device.

    Attributes:
        rows, seq_len: B and S.
        sample_lengths: length of every sample in flat order, padding included.
        length_Z: the same on the device.
        position_T: each token's 0-based position in its sample.
        start_T: flat index of the first token of its sample.
        sample_T: index of its sample.
        padding_T: True for tokens after a row's last sample. They form a separate sample, so no
            other token attends to them; routers exclude them from loads and losses.
    """

    rows: int
    seq_len: int
    sample_lengths: np.ndarray
    length_Z: Tensor
    position_T: Tensor
    start_T: Tensor
    sample_T: Tensor
    padding_T: Tensor
    host_position_T: np.ndarray
    host_start_T: np.ndarray
    _entries: dict[int, Entries] = field(default_factory=dict, repr=False)
    _derived: dict[Hashable, Tensor] = field(default_factory=dict, repr=False)

    def derived(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Returns `make()`, which depends on the layout alone, computed once for all layers."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    @property
    def valid_T(self) -> Tensor:
        """fp32 [T]: 1, and 0 for padding."""
        return self.derived("valid", lambda: (~self.padding_T).float())

    @property
    def has_tokens_Z(self) -> Tensor:
        """fp32 [Z]: 1 for samples of which this layout has tokens that are no padding, else 0."""

        def count() -> Tensor:
            zeros_Z = self.valid_T.new_zeros(self.num_samples)
            return zeros_Z.index_add_(0, self.sample_T, self.valid_T).clamp_(max=1)

        return self.derived("has tokens", count)

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[Sequence[int]],
        seq_len: int | None = None,
        device: torch.device | str | None = None,
    ) -> SampleLayout:
        """Builds the layout from each row's sample lengths.

        Args:
            lengths: per row, the lengths of its samples in order.
            seq_len: S; defaults to the longest row. Shorter rows are padded.

        Raises:
            ValueError: no rows, a length below 1, or samples longer than their row.
        """
        if not lengths:
            raise ValueError("a layout needs at least one row of sample lengths")
        longest = max(sum(row) for row in lengths)
        seq_len = longest if seq_len is None else seq_len
        flat: list[int] = []
        padded: list[bool] = []
        for number, row in enumerate(lengths):
            if any(length < 1 for length in row):
                raise ValueError(f"row {number} has a sample length below 1: {list(row)}")
            rest = seq_len - sum(row)
            if rest < 0:
                raise ValueError(
                    f"row {number} holds {sum(row)} tokens of samples but is {seq_len} long"
                )
            flat += [*row, rest] if rest else [*row]
            padded += [False] * len(row) + [True] * bool(rest)
        return cls._build(len(lengths), seq_len, np.array(flat), np.array(padded), device)

    @classmethod
    def whole_rows(cls, tokens_BS: Tensor) -> SampleLayout:
        """The layout in which every row is one sample."""
        rows, length = tokens_BS.shape
        return cls.from_lengths([[length]] * rows, device=tokens_BS.device)

    @classmethod
    def _build(
        cls,
        rows: int,
        seq_len: int,
        sample_lengths: np.ndarray,
        padded: np.ndarray,
        device: torch.device | str | None,
    ) -> SampleLayout:
        starts = np.cumsum(sample_lengths) - sample_lengths
        sample_T = np.repeat(np.arange(len(sample_lengths)), sample_lengths)
        start_T = starts[sample_T]
        position_T = np.arange(rows * seq_len) - start_T
        arrays = (sample_lengths, position_T, start_T, sample_T, padded[sample_T])
        length_Z, position, start, sample, padding = all_on_device(arrays, device)
        return cls(
            rows=rows,
            seq_len=seq_len,
            sample_lengths=sample_lengths,
            length_Z=length_Z,
            position_T=position,
            start_T=start,
            sample_T=sample,
            padding_T=padding,
            host_position_T=position_T,
            host_start_T=start_T,
        )

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.rows * self.seq_len

    @property
    def num_samples(self) -> int:
        """Number of samples; each row's padding counts as one."""
        return len(self.sample_lengths)

    def select(self, token_index: np.ndarray, seq_len: int) -> SampleLayout:
        """Returns the layout of the tokens at these flat indices, ``seq_len`` of them in every row.

        Samples keep their indices, and `sample_lengths` and `length_Z` stay those of whole samples.
        """
        tokens_T = on_device(token_index, self.position_T.device)
        return replace(
            self,
            seq_len=seq_len,
            position_T=self.position_T[tokens_T],
            start_T=self.start_T[tokens_T],
            sample_T=self.sample_T[tokens_T],
            padding_T=self.padding_T[tokens_T],
            host_position_T=self.host_position_T[token_index],
            host_start_T=self.host_start_T[token_index],
            _entries={},
            _derived={},
        )

    def entries(self, ratio: int) -> Entries:
        """The compressed entries at m = ``ratio``; computed once and cached."""
        if ratio not in self._entries:
            self._entries[ratio] = self._build_entries(ratio)
        return self._entries[ratio]

    def _build_entries(self, ratio: int) -> Entries:
        device = self.position_T.device
        per_sample = self.sample_lengths // ratio
        first_entry = np.cumsum(per_sample) - per_sample
        sample_C = np.repeat(np.arange(len(per_sample)), per_sample)
        index_C = np.arange(len(sample_C)) - first_entry[sample_C]
        token_starts = np.cumsum(self.sample_lengths) - self.sample_lengths
        sample_T = np.repeat(np.arange(len(per_sample)), self.sample_lengths)
        start_T = first_entry[sample_T]
        end_T = start_T + (self.host_position_T + 1) // ratio
        first_token_C = token_starts[sample_C] + index_C * ratio

        arrays = (first_token_C, index_C * ratio, index_C > 0, start_T, end_T)
        names = ("first_token_C", "position_C", "has_previous_C", "start_T", "end_T")
        return Entries(
            ratio=ratio,
            **dict(zip(names, all_on_device(arrays, device), strict=True)),
            host_first_token_C=first_token_C,
            host_position_C=index_C * ratio,
            host_start_T=start_T,
            host_end_T=end_T,
        )
