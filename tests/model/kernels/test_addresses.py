"""No kernel computes a wrong address at rows of a million tokens and the widths of Pro.

The check on a user's GPU compares at most 8192 tokens, where 32 bits hold every offset. Here a step
of the trainer's own code is taken on the fake GPU, and its launches are repeated in Triton's
interpreter without memory (addresses.py): one of each kernel and its constants, the last.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.fake_gpu import run
from tests.model.kernels.addresses import AddressError, Launch, Pointer, check_addresses
from tests.model.kernels.interpreter import interpreted
from tests.trainer.fake_gpu_run import needs_compiler

ROOT = Path(__file__).parents[3]
TOKENS = 1 << 20
LAYERS = ("num_hidden_layers=2", "layer_types=[csa, hca]", "num_hash_layers=0")
"""And the MTP block, whose attention has a window alone."""
MODES = {"sparse": "precision=fp8", "warmup": "precision=bf16", "dense": "precision=bf16"}
"""Attention modes that together launch every kernel, and what else they take."""
ELSEWHERE = {"optim.syrk_triton", "model.kernels.attention.flash_mla_triton"}
"""The optimizer, whose kernel has a test of its own, and what needs a library."""
TYPES = {"bfloat16": "bfloat16", "float8_e4m3fn": "float8e4nv"}


def launches(gpu: Any, mode: str) -> list[Launch]:
    """The last launch of each kernel and its constants in a microbatch of one row."""
    import torch
    from triton.runtime.jit import JITFunction

    from data import Batch
    from model import V4Model
    from model.kernels.indexer import KLTarget
    from trainer.build import build_native
    from trainer.config import load_config
    from trainer.engine import NativeEngine
    from trainer.parallel.grid import Grid

    pro = load_config(ROOT / "configs" / "pro.yaml").model.model_dump(mode="json")
    own = [text.split("=")[0] for text in LAYERS]
    widths = [f"model.{k}={json.dumps(v)}" for k, v in pro.items() if k not in own]
    sizes = ["fit_to_memory=false", f"data.seq_len={TOKENS}", "data.micro_batch_size=1"]
    layers = [f"model.{text}" for text in LAYERS]
    overrides = ["kernels=triton", *sizes, *widths, *layers, MODES[mode]]
    config = load_config(ROOT / "configs" / "nano.yaml", overrides)
    last: dict[Any, Launch] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bound = dict(zip(kernel.arg_names, args, strict=False))
        bound |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        module, name = kernel.fn.__module__, kernel.__name__
        constants = tuple((p.name, bound[p.name]) for p in kernel.params if p.is_constexpr)
        pointers = {k: x for k, x in bound.items() if isinstance(x, torch.Tensor)}
        kinds = tuple((name, x.dtype) for name, x in pointers.items())
        arguments = bound | {name: pointer_to(x) for name, x in pointers.items()}
        size = tuple(grid(bound) if callable(grid) else grid)
        last[module, name, constants, kinds] = Launch(
            module, name, size, arguments, integers(bound)
        )

    with patch.object(V4Model, "init_weights", lambda *_, **__: None):
        local, _ = build_native(config, grid := Grid.single(torch.device("cuda", 0)))
    engine = NativeEngine(local, grid)
    engine.set_attention(mode)  # type: ignore[arg-type]
    torch.use_deterministic_algorithms(mode == "sparse")  # entries' gradients as ordered pairs
    row = torch.ones(1, TOKENS, dtype=torch.int64).pin_memory()
    blocks = KLTarget.blocks

    def last_blocks(*sizes: Any) -> Any:
        return list(blocks(*sizes))[-2:]

    with patch.object(JITFunction, "run", record), patch.object(KLTarget, "blocks", last_blocks):
        engine.forward_backward([Batch(row, row, [[TOKENS]])])
    return list(last.values())


def pointer_to(x: Any) -> Pointer:
    """A tensor's type, and where it lies in its memory."""
    name = str(x.dtype).removeprefix("torch.")
    before = x.storage_offset() * x.element_size()
    return Pointer(TYPES.get(name, name), before, x.untyped_storage().nbytes())


def integers(bound: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """The largest numbers that tensors of integers may hold; ranges go from 0 to the end."""

    def rows(*names: str) -> int:
        return next((len(x) for name in names if (x := bound.get(name)) is not None), 0)

    entries, matrix = rows("entries", "keys"), bound.get("a", bound.get("x"))
    matrix_rows = 0 if matrix is None else matrix.shape[:-1].numel()
    groups = max(rows("b"), len(matrix) if matrix is not None and matrix.dim() == 3 else 1)
    is_selected = bound.get("MODE") == 2
    end = bound.get("num_selected", bound.get("width")) if is_selected else entries
    tiles, pairs = rows("tile_first"), rows("pairs")
    numbers = {
        "key_end": rows("keys"),
        "entry_end": end,
        "selected": entries - 1,
        "selected_end": bound.get("num_selected", 0),
        "end_T": rows("keys"),
        "query_end": rows("start_T", "entry_start"),
        "tile_first": matrix_rows - 128,
        "tile_end": matrix_rows,
        "tile_group": groups - 1,
        "ends": matrix_rows or 128 * tiles,
        "row_of_pair": rows("y") - 1,
        "target": bound.get("vocab", 1) - 1,
        "order": pairs - 1,
    }
    both = {name: (number, number) for name, number in numbers.items()}
    window = rows("values") - bound.get("M", 0)
    return both | {
        "first_token": (0, window),
        "has_previous": (0, 1),
        "before": (0, tiles or rows("a")),
        "bounds": (0, pairs),
    }


@cache
def launches_of(mode: str) -> list[Launch]:
    return run(launches, mode)


@interpreted
def repeat(some: list[Launch]) -> None:
    for launch in some:
        check_addresses(launch)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_million_tokens(mode):
    repeat(some=launches_of(mode))


def kernels() -> set[tuple[str, str]]:
    """Module and name of every kernel that is launched, not called by another."""
    files = [*(ROOT / "model").rglob("*_triton.py"), *(ROOT / "optim").glob("*_triton.py")]
    texts = {path: path.read_text() for path in files}
    every = set()
    for path, text in texts.items():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in re.findall(r"@triton\.jit.*\ndef (\w+)\(", text):
            own = text if name.startswith("_") else "".join(texts.values())
            if re.search(rf"\b{name}\[.*\]\(\n", own):
                every.add((module, name))
    return every


@needs_compiler
@pytest.mark.slow
def test_every_kernel_is_among_them():
    launched = {(launch.module, launch.name) for mode in MODES for launch in launches_of(mode)}
    missing = kernels() - launched
    assert {module for module, _ in missing} == ELSEWHERE


@interpreted
def test_matrices_of_all_experts():
    """Muon's symmetric matmul of Pro's 384 matrices in one launch."""
    experts, rows, columns, block = 384, 3072, 7168, 128
    pairs = rows // block * (rows // block + 1) // 2
    square = Pointer("bfloat16", 0, 2 * experts * rows * rows)
    arguments = {
        "a": Pointer("bfloat16", 0, 2 * experts * rows * columns),
        "add": square,
        "out": square,
        "rows": rows,
        "columns": columns,
        "matrix_stride": rows * columns,
        "row_stride": columns,
        "column_stride": 1,
        "pairs": pairs,
        "beta": 1.0,
        "alpha": 1.0,
        "ADD": True,
        "BLOCK": block,
        "BLOCK_K": 64,
    }
    check_addresses(Launch("optim.syrk_triton", "_syrk", (pairs * experts,), arguments))


@interpreted
def test_a_right_kernel_passes():
    check_addresses(copy_of_rows())


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"BITS": 32}, "a 32-bit integer should be 2,147"), ({"SHIFT": 1}, "out has .* bytes")],
)
@interpreted
def test_a_fault_is_found(fault, message):
    with pytest.raises(AddressError, match=message):
        check_addresses(copy_of_rows(**fault))


def copy_of_rows(**changes: int) -> Launch:
    """2^32 numbers."""
    dim, rows = 4096, TOKENS
    tensor = Pointer("bfloat16", 0, 2 * rows * dim)
    arguments = {"x": tensor, "out": tensor, "BITS": 64, "SHIFT": 0, "DIM": dim} | changes
    return Launch("tests.model.kernels.copy_triton", "copy_row", (rows,), arguments)
