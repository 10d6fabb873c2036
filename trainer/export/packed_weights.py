"""Quantised weights of Hugging Face folders: exports MXFP4 and FP8, imports both.

The layout is the official one: an expert in MXFP4 has an int8 `w1.weight` [F, D/2] and a
`w1.scale`, float8_e8m0fnu [F, D/32]; an FP8 `weight` has a `scale` with one number for each
128 x 128 block. Which tensors the release has in which format is a column of the table in
model/parameters.py.

Letters: D hidden size, F inner size of an expert, R rows and C columns of a matrix.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from model import ModelConfig
from model.kernels.block_sizes import FP8_BLOCK, MXFP4_BLOCK
from model.kernels.fp8 import eager as fp8
from model.kernels.mxfp4 import Packed, dequantise, from_fp8, quantise, quantise_dequantise
from model.parameter_spec import ReleasedFormat
from model.parameters import memory_name, official_name, spec_of, tensors_of
from trainer.process.errors import ExportError

WeightFormat = Literal["as_trained", "mxfp4_experts", "released"]
"""`as_trained`: the tensors of the run's precision. `mxfp4_experts`: routed experts packed, the
rest as trained. `released`: every tensor in the release's format, which also has FP8 linears, and
bf16 instead of the run's precision and of fp32 norms."""
Read = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

# SGLang looks for these among the parts of a linear's name, transformers at its end.
_UNQUANTISED = ("self_attn", "shared_experts", "mlp.gate", "lm_head")
# vLLM's names of linears that it joins, by the first of the two.
_JOINED = {"wq_a": "fused_wqa_wkv", "shared_experts.w1": "shared_experts.gate_up_proj"}
_QUANTISATION: Mapping[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}


def config_keys(config: ModelConfig, weights: WeightFormat) -> dict[str, Any]:
    """Returns what a format adds to config.json, as transformers, vLLM and SGLang read it."""
    if weights == "as_trained":
        return {}
    quantisation = dict(_QUANTISATION)
    if weights == "mxfp4_experts":
        quantisation["modules_to_not_convert"] = _unquantised_modules(config)
    return {"expert_dtype": "fp4", "quantization_config": quantisation}


def _unquantised_modules(config: ModelConfig) -> list[str]:
    """Names the linears that are FP8 in the release, as each reader looks for them.

    transformers wants the beginning of its own name, vLLM the whole official name, or its own for
    two that it joins.
    """
    names = [*_UNQUANTISED]
    for layer in range(config.num_hidden_layers):
        place = f"model.layers.{layer}"
        names += [f"{place}.self_attn", f"{place}.mlp.shared_experts"]
    for line in tensors_of(config):
        if line.spec.released == "fp8":
            name = official_name(line.name).removesuffix(".weight")
            names.append(name)
            names += [name.replace(a, b) for a, b in _JOINED.items() if name.endswith(a)]
    return names


def require_blocks(config: ModelConfig, weights: WeightFormat) -> None:
    """Raises ExportError unless blocks of scales divide the matrices that have them.

    Rows of MXFP4 divide into blocks of 32. FP8 matrices, of the output projection those of each
    group, divide into 128 x 128: with other sizes the official converter stops, servers refuse
    merged projections, and transformers takes the scales for those of smaller blocks.
    """
    if weights == "as_trained":
        return
    for field in ("hidden_size", "moe_intermediate_size"):
        if (size := getattr(config, field)) % MXFP4_BLOCK:
            raise ExportError(
                f"model.{field} is {size}; MXFP4 experts need a multiple of {MXFP4_BLOCK}"
            )
    if weights != "released":
        return
    for line in tensors_of(config):
        if line.spec.released == "fp8":
            rows, columns = line.shape[0] // (line.matrices or 1), line.shape[1]
            if rows % FP8_BLOCK or columns % FP8_BLOCK:
                raise ExportError(
                    f"{line.name} has matrices of {rows} x {columns}; the released layout needs "
                    f"multiples of {FP8_BLOCK}; use --weights mxfp4_experts or as_trained"
                )


def packed_outline(outline: Mapping[str, Tensor], weights: WeightFormat) -> dict[str, Tensor]:
    """Returns the tensors of a folder in a format, on the meta device; `outline` is as trained."""
    packed: dict[str, Tensor] = {}
    for name, tensor in outline.items():
        stored = _format_of(name, weights)
        if stored == "mxfp4":
            rows, columns = tensor.shape
            packed[name] = _meta(torch.int8, rows, columns // 2)
            packed[_scale_of(name)] = _meta(torch.float8_e8m0fnu, rows, columns // MXFP4_BLOCK)
        elif stored == "fp8":
            grid = [size // FP8_BLOCK for size in tensor.shape]
            packed[name] = _meta(torch.float8_e4m3fn, *tensor.shape)
            packed[_scale_of(name)] = _meta(torch.float8_e8m0fnu, *grid)
        else:
            packed[name] = tensor.bfloat16() if stored == "bf16" else tensor
    return packed


def packed_read(read: Read, outline: Mapping[str, Tensor], weights: WeightFormat) -> Read:
    """Wraps `read` for `packed_outline`: quantised weights are read as in `outline`, then packed.

    A shard may have a weight without its scale, or the reverse.
    """

    def read_packed(shard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sources = {_weight_of(name, outline): name for name in shard}
        whole = read(
            {
                source: outline[source] if _pack_of(source, weights) else shard[name]
                for source, name in sources.items()
            }
        )
        tensors: dict[str, Tensor] = {}
        for source, tensor in whole.items():
            pack = _pack_of(source, weights)
            if pack is None:
                tensors[source] = tensor
            else:
                tensors[source], tensors[_scale_of(source)] = pack(tensor)
        return {name: tensors[name] for name in shard}

    return read_packed


def _format_of(name: str, weights: WeightFormat) -> ReleasedFormat | None:
    """Returns the format of a weight by its official name; None: as trained."""
    released = spec_of(memory_name(name)[0]).released
    if weights == "released" or (weights == "mxfp4_experts" and released == "mxfp4"):
        return released
    return None


def _pack_of(name: str, weights: WeightFormat) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Returns the function from a weight to its codes and scales; None where it has no scales."""
    stored = _format_of(name, weights)
    return {"mxfp4": _pack_mxfp4, "fp8": _pack_fp8}.get(stored or "")


# Weights are rounded before they are packed, which changes no number. A block's largest number may
# become one that a smaller scale reaches, and so packing what was unpacked gives the same bytes.
def _pack_mxfp4(matrix_RC: Tensor) -> tuple[Tensor, Tensor]:
    return quantise(quantise_dequantise(matrix_RC))


def _pack_fp8(matrix_RC: Tensor) -> tuple[Tensor, Tensor]:
    return fp8.quantise_blocks(fp8.quantise_dequantise(matrix_RC, FP8_BLOCK, FP8_BLOCK))


def _scale_of(name: str) -> str:
    return f"{name.removesuffix('.weight')}.scale"


def _weight_of(name: str, outline: Iterable[str]) -> str:
    """Returns the weight of a scale, other names as they are."""
    return name if name in outline else f"{name.removesuffix('.scale')}.weight"


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def dequantised(weights: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """Dequantises a folder's weights to bf16, or to fp32 where bf16 cannot represent them.

    A scale in uint8 is the exponent of float8_e8m0fnu. Raises ExportError for a quantised weight
    without its scale, or with one of another shape or dtype.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith(".scale") and _is_quantised(weights.get(f"{name[:-6]}.weight")):
            continue
        if _is_quantised(tensor):
            scale_name = _scale_of(name)
            if scale_name not in weights:
                raise ExportError(f"{place}: {name} is quantised, but {scale_name} is missing")
            result[name] = _dequantised(tensor, weights[scale_name], f"{place}: {name}")
        else:
            result[name] = tensor
    return result


def _is_quantised(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype in (torch.int8, torch.float8_e4m3fn)


def _dequantised(tensor: Tensor, scales: Tensor, what: str) -> Tensor:
    rows, columns = tensor.shape
    if scales.dtype == torch.uint8:  # the exponents as some converters store them
        scales = scales.view(torch.float8_e8m0fnu)
    dtypes = [torch.float8_e8m0fnu, *([] if tensor.dtype == torch.int8 else [torch.float32])]
    if scales.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(scales.dtype).removeprefix("torch.")
        raise ExportError(f"{what} has a scale in {found}; it should be {names}")
    if tensor.dtype == torch.int8:
        expected = (rows, 2 * columns // MXFP4_BLOCK)
    else:
        expected = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    if scales.shape != expected:
        raise ExportError(f"{what} has a scale of {tuple(scales.shape)} instead of {expected}")
    if tensor.dtype == torch.int8:
        return dequantise(Packed(tensor, scales), torch.bfloat16)
    numbers = from_fp8(tensor, scales)  # exact in bf16: FP8 times a power of two
    return numbers.bfloat16() if scales.dtype == torch.float8_e8m0fnu else numbers
