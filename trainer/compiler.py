"""Whether torch.compile can make programs on this machine, asked before a run needs them."""

import importlib.util

import torch


def lacking(device: torch.device) -> str:
    """What is not here that programs for `device` are made with; empty where nothing is missing."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "triton for a GPU"
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes long
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler (g++, or what CXX names)"
    return ""
