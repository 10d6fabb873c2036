"""Does a kernel fit a GPU? What it needs is compiled for the GPU and compared with its limits.

No kernel runs here. The calls of an operation are made with Triton's cache hook, which sees every
variant that would be compiled, and returns before the launch; the variants are then compiled side
by side, which also warms Triton's cache on disk. Without a GPU the same works for any target, with
a driver that only names it (tests/trainer/kernels/).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from trainer.kernels.temporary import advice_on
from trainer.process.host_memory import HostMemory

TENSOR_MEMORY_COLUMNS = 512
"""Of a multiprocessor that has tensor memory (compute capability 10.x)."""
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
"""Compiler options that a launch may set."""
_COMPILERS = 16
"""Variants compiled at once, on a host with as many processors."""
_COMPILER_BYTES = 2 << 30
"""Host memory for each of them: an estimate, above the largest that was observed for a kernel."""


@dataclass(frozen=True)
class DeviceLimits:
    """What a program may use on a GPU.

    Attributes:
        capability: compute capability as one number, 90 for 9.0.
        shared_bytes: of a program's shared memory.
    """

    capability: int
    shared_bytes: int
    tensor_memory_columns: int = TENSOR_MEMORY_COLUMNS
    warp_size: int = 32


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants of its arguments and its compiler options."""

    kernel: Any = field(compare=False)
    signature: Mapping[str, str] = field(compare=False)
    constants: Mapping[Any, Any] = field(compare=False)
    attributes: Mapping[Any, Any] = field(compare=False)
    options: Mapping[str, int] = field(compare=False)
    key: str = ""

    @property
    def name(self) -> str:
        """Module and function, without what all kernels share."""
        module = self.kernel.fn.__module__.split(".")[-1].removesuffix("_triton")
        return f"{module}.{self.kernel.fn.__name__}"


@dataclass(frozen=True)
class Needs:
    """What a program of a compiled kernel uses."""

    shared_bytes: int
    tensor_memory_columns: int


def device_limits(index: int) -> DeviceLimits:
    """Returns the limits of a GPU, as Triton's driver reads them."""
    import torch
    import triton

    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    return DeviceLimits(10 * major + minor, properties["max_shared_mem"])


def record_variants(call: Callable[[], object]) -> list[Variant]:
    """Returns the variants of kernels that a call would compile, without compiling or running any.

    What the call returns is undefined.
    """
    import triton

    variants: dict[str, Variant] = {}

    def hook(*, key: str, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        kernel, options = fn.jit_function, json.loads(compile["specialization_data"])["options"]
        key = f"{kernel.fn.__module__}.{kernel.fn.__name__} {key}"
        variants[key] = Variant(
            kernel,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            {name: options[name] for name in _OPTIONS if options[name] is not None},
            key,
        )
        return True

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = hook
        call()
    return list(variants.values())


def compiled_for(variant: Variant, limits: DeviceLimits) -> Any:
    """Compiles a variant for a GPU of these limits; raises whatever the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(variant.kernel, variant.signature, variant.constants, variant.attributes)
    target = GPUTarget("cuda", limits.capability, limits.warp_size)
    return triton.compile(source, target=target, options=dict(variant.options))


def needs_of(binary: Any) -> Needs:
    """Returns what a compiled kernel uses."""
    metadata = binary.metadata
    return Needs(metadata.shared, getattr(metadata, "tmem_size", None) or 0)


def misfit(variants: Iterable[Variant], limits: DeviceLimits) -> str | None:
    """Returns why one of the variants cannot run on a GPU of these limits, or None.

    Registers never prevent a launch: what does not fit into them goes to a thread's stack, and only
    timing shows whether that is slow. Raises an error whose cause is temporary.
    """

    def check(variant: Variant) -> str | None:
        try:
            needs = needs_of(compiled_for(variant, limits))
        except Exception as error:
            if advice_on(error) is not None:
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"{variant.name} does not compile for it: {first[:160]}"
        return exceeded(variant.name, needs, limits)

    pool = ThreadPoolExecutor(_compilers(HostMemory.read().available))
    try:
        reasons = pool.map(check, variants)
        return next((reason for reason in reasons if reason is not None), None)
    finally:
        pool.shutdown(cancel_futures=True)


def _compilers(available: int) -> int:
    """Returns how many variants are compiled at once with this much host memory."""
    return max(min(os.cpu_count() or 1, _COMPILERS, available // _COMPILER_BYTES), 1)


def exceeded(name: str, needs: Needs, limits: DeviceLimits) -> str | None:
    """Returns which limit a kernel exceeds, or None."""
    if needs.shared_bytes > limits.shared_bytes:
        return (
            f"{name} needs {needs.shared_bytes:,} bytes of shared memory, "
            f"this GPU has {limits.shared_bytes:,}"
        )
    if needs.tensor_memory_columns > limits.tensor_memory_columns:
        return (
            f"{name} needs {needs.tensor_memory_columns} columns of tensor memory, "
            f"this GPU has {limits.tensor_memory_columns}"
        )
    return None
