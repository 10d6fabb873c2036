"""Host memory that this process fills and the one that writes checkpoints reads.

It is anonymous (memfd): no name that a killed run leaves, and no limit of /dev/shm, which is
64 MiB in many containers.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from trainer.checkpoint.layout import ALIGNMENT, LocalTensors, PlannedFile


class SharedMemory:
    """A block of shared memory, for a GPU page-locked. Allocated and touched at once.

    Raises OSError where the host has not as much.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = max(nbytes, 1)
        self.handle = os.memfd_create("v4-checkpoint", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.handle, 0, self.nbytes)
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # no page is missing in the first copy
            self._map = mmap.mmap(self.handle, self.nbytes, flags)
        except OSError:
            os.close(self.handle)
            raise
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._device = device
        if device.type == "cuda":
            try:
                _page_lock(self._bytes, device)
            except OSError:
                self._free()
                raise

    def fill(self, files: Iterable[PlannedFile], tensors: LocalTensors) -> None:
        """Copies the data of the files to `places`; waits for the copies from a GPU."""
        for file, start in places(files):
            at = start
            for chunk in file.chunks:
                flat = self._bytes[at : at + chunk.nbytes].view(chunk.dtype)
                flat.view(chunk.shape).copy_(tensors[chunk], non_blocking=True)
                at += chunk.nbytes
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """Frees the memory once the other process has closed it, too."""
        if self._device.type == "cuda":
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        self._free()

    def _free(self) -> None:
        del self._bytes
        self._map.close()
        os.close(self.handle)


def places(files: Iterable[PlannedFile]) -> Iterator[tuple[PlannedFile, int]]:
    """Yields each file with the first byte of its data in the shared memory."""
    at = 0
    for file in files:
        yield file, at
        at += file.nbytes + -file.nbytes % ALIGNMENT


def needed_bytes(files: Iterable[PlannedFile]) -> int:
    """Returns the shared memory that the data of these files takes."""
    return sum(file.nbytes + -file.nbytes % ALIGNMENT for file in files)


def _page_lock(memory: Tensor, device: torch.device) -> None:
    """Page-locks memory, so that a GPU writes it without the CPU.

    Raises OSError where the host, or a limit of this process, does not allow it.
    """
    portable = 1  # for every CUDA context of this process
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, portable)
    try:
        torch.cuda.check_error(int(error))
    except torch.cuda.CudaError as failure:
        with suppress(RuntimeError):
            torch.ones(1, device=device)  # CUDA reports the error once more, to the next kernel
        raise OSError(errno.ENOMEM, f"page-locking failed: {failure}") from None
