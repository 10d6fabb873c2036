"""Failures whose cause lies outside the kernel, its GPU and its software."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sysconfig
from pathlib import Path

_NO_COMPILER = "Failed to find C compiler"
_NO_CACHE = "Could not create or locate cache dir"
"""How Triton's messages begin."""
_KILLED_COMPILER = f"failed with error code {-signal.SIGKILL}"
_NO_MEMORY = (
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Of a GPU, in messages of libraries and drivers; torch's allocator has a class of error."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU had no memory left, whichever library requested it."""
    import torch

    message = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(text in message for text in _NO_MEMORY)


def advice_on(error: BaseException) -> str | None:
    """Returns what would make a temporary failure pass; None for a failure of the kernel."""
    if is_out_of_memory(error):
        return "free the GPU's memory"
    if isinstance(error, MemoryError) or _KILLED_COMPILER in str(error):
        return "free memory of the host, or raise the limit of its job or pod"
    if _NO_COMPILER in str(error):
        return "install gcc, which Triton needs"
    if isinstance(error, subprocess.CalledProcessError):
        return "install gcc and Python's headers (python3-dev), which Triton needs"
    if _NO_CACHE in str(error):
        return "set TRITON_CACHE_DIR to a folder that can be written"
    if isinstance(error, OSError):
        name = f" {error.filename}" if error.filename else ""
        return f"make{name or ' the folder'} writable, with room on its disk"
    return None


def missing_compiler() -> str | None:
    """Returns what this host lacks to launch any Triton kernel, and what to install; else None.

    Triton builds a small C module for the host. Hosts that share a home share the verdicts of those
    on which that worked.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "this host has no C compiler: install gcc, which Triton needs"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    include = sysconfig.get_paths(scheme=scheme)["include"]
    command = [compiler, "-fsyntax-only", f"-I{include}", "-x", "c", "-"]
    try:
        subprocess.run(command, input=b"#include <Python.h>\n", capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return (
            f"{compiler} does not compile with Python's headers on this host: install gcc and "
            "python3-dev, which Triton needs"
        )
    return None


def use_writable_triton_cache(fallback: Path) -> None:
    """Sets Triton's cache of compiled kernels to `fallback` where its own cannot be written.

    Applies to this process and those that it starts.
    """
    if "TRITON_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("TRITON_HOME") or "~").expanduser()
    existing = home / ".triton" / "cache"
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        os.environ["TRITON_CACHE_DIR"] = str(fallback)


def describe_error(error: Exception) -> str:
    """Returns the first line of an error's message, with advice where its cause is temporary."""
    line = (str(error).strip() or "no message").splitlines()[0][:200]
    advice = advice_on(error)
    return f"{type(error).__name__}: {line}" + (f" ({advice})" if advice else "")
