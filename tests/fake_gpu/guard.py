"""Builds guard.cpp once, and loads it before torch.

A CUDA build of torch has a guard of its own and needs none of this.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def torch_folder() -> Path:
    """The folder of the torch package, which is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def compiler() -> str | None:
    """The C++ compiler: $CXX, as torch.utils.cpp_extension takes it, or g++."""
    return shutil.which(os.environ.get("CXX", "g++"))


def missing() -> str | None:
    """Why there can be no fake GPU on this machine, or None."""
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists() or compiler() is not None:
        return None
    return "the fake GPU needs a C++ compiler: g++ is not on the PATH, and CXX names no other"


def built() -> Path:
    """The library, built where the cache has none of this source and this torch."""
    digest = hashlib.sha256(SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "v4-pretrain" / "tests"
    library = cache / f"fake_gpu_guard_{digest}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    torch, cxx = torch_folder(), compiler()
    assert cxx is not None
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        new = Path(folder) / "guard.so"
        command = [cxx, "-shared", "-fPIC", "-std=c++20", "-O1", str(SOURCE), "-o", str(new)]
        command += [f"-I{torch}/include", f"-L{torch}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        new.replace(library)
    return library


def load() -> None:
    """Loads the library into this process, which has not imported torch yet."""
    libraries = torch_folder() / "lib"
    if (libraries / "libtorch_cuda.so").exists():
        return
    for path in (libraries / "libc10.so", libraries / "libtorch_cpu.so", built()):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
