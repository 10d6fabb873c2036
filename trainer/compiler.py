"""Whether torch.compile can make programs on this machine, asked before a run needs them."""

from __future__ import annotations

import importlib.util

import torch

from trainer.errors import PreflightError


def check_compiler(device: torch.device) -> None:
    """Raise PreflightError where programs for `device` cannot be made here."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise PreflightError(
                "compile = true needs triton for a GPU, and it is not installed; install it, or "
                "leave compile out"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes long
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise PreflightError(
            "compile = true needs a C++ compiler, and neither g++ nor what CXX names runs here; "
            "install one, or leave compile out"
        ) from None
