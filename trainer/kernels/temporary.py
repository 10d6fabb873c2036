"""Failures whose cause lies outside the kernel, its GPU and its software."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
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
