"""Failures whose cause lies outside the kernel, its GPU and its software."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_NO_COMPILER = "Failed to find C compiler"
_NO_CACHE = "Could not create or locate cache dir"
"""How Triton's messages begin."""


def advice_on(error: BaseException) -> str | None:
    """Returns what would make a temporary failure pass; None for a failure of the kernel."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "free the GPU's memory"
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
