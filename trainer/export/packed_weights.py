"""Quantised weights of Hugging Face folders: exports routed experts in MXFP4, imports FP4 and FP8.

The layout is the official one: an expert has an int8 `w1.weight` [F, D/2] and a `w1.scale`,
float8_e8m0fnu [F, D/32]; an FP8 `weight` has a `scale` with one number for each 128 x 128 block.

Letters: D hidden size, F inner size of an expert.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig
from model.kernels.block_sizes import FP8_BLOCK, MXFP4_BLOCK
from model.kernels.mxfp4 import Packed, dequantise, from_fp8, quantise
from trainer.errors import ExportError

_EXPERT = re.compile(r"(.*\.ffn\.experts\.\d+\.w[123])\.(weight|scale)")
# The modules of transformers' model that keep the precision of training.
_UNQUANTISED = ("self_attn", "shared_experts", "mlp.gate", "lm_head", "hc")

CONFIG: Mapping[str, Any] = {
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
        "expert_dtype": "fp4",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": list(_UNQUANTISED),
    },
}
"""Additions to config.json, as transformers reads them."""


def packed_outline(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Returns the tensors of a folder with packed routed experts, on the meta device.

    Raises ExportError unless the experts' rows divide into blocks of 32.
    """
    for field in ("hidden_size", "moe_intermediate_size"):
        if (size := getattr(config, field)) % MXFP4_BLOCK:
            raise ExportError(
                f"model.{field} is {size}; MXFP4 experts need a multiple of {MXFP4_BLOCK}"
            )
    outline: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            outline[name] = tensor
        else:
            rows, columns = tensor.shape
            codes = torch.empty(rows, columns // 2, dtype=torch.int8, device="meta")
            scales = torch.empty(rows, columns // MXFP4_BLOCK, dtype=torch.uint8, device="meta")
            outline[name] = codes
            outline[f"{match[1]}.scale"] = scales.view(torch.float8_e8m0fnu)
    return outline


def packed_read(
    read: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], dtype: torch.dtype
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Wraps `read` for `packed_outline`: experts are read in `dtype`, then packed."""

    def read_packed(shard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outlines: dict[str, Tensor] = {}
        for name, tensor in shard.items():
            match = _EXPERT.fullmatch(name)
            source = name if match is None else f"{match[1]}.weight"
            outlines[source] = tensor if match is None else torch.empty(0, dtype=dtype)
        whole = read(outlines)
        packed: dict[str, Tensor] = {}
        for name in shard:
            match = _EXPERT.fullmatch(name)
            if match is None:
                packed[name] = whole[name]
            else:
                codes, scales = quantise(whole[f"{match[1]}.weight"])
                packed[name] = codes if match[2] == "weight" else scales
        return packed

    return read_packed


def dequantised(weights: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """Dequantises a folder's weights to bf16, or to fp32 where bf16 cannot represent them.

    Raises ExportError for a quantised weight without its scale, or with one that does not fit.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith(".scale") and _is_quantised(weights.get(f"{name[:-6]}.weight")):
            continue
        if _is_quantised(tensor):
            scale_name = name.removesuffix(".weight") + ".scale"
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
