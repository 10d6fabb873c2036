"""Names of weights: ours in memory, the official ones on disk, and transformers' in memory.

Ours are the official names (report's release), except that a layer's experts are stacked:
``ffn.experts.w1`` [E, F, D] instead of ``ffn.experts.{j}.w1.weight``. ``transformers`` stacks w1
and w3 into one ``gate_up_proj`` and has no ``mtp.*``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from model.config import ModelConfigError

# (ours, transformers') from the outside in; each pair is applied once, at most one per group.
_TOP = (
    (r"embed\.weight", "model.embed_tokens.weight"),
    (r"head\.weight", "lm_head.weight"),
    (r"norm\.weight", "model.norm.weight"),
    (r"hc_head_(fn|base|scale)", r"model.hc_head.hc_\1"),
)
_LAYER = (
    (r"attn_norm\.weight", "input_layernorm.weight"),
    (r"ffn_norm\.weight", "post_attention_layernorm.weight"),
    (r"hc_(attn|ffn)_(fn|base|scale)", r"\1_hc.\2"),
    (r"attn\.wq_a\.weight", "self_attn.q_a_proj.weight"),
    (r"attn\.q_norm\.weight", "self_attn.q_a_norm.weight"),
    (r"attn\.wq_b\.weight", "self_attn.q_b_proj.weight"),
    (r"attn\.wkv\.weight", "self_attn.kv_proj.weight"),
    (r"attn\.kv_norm\.weight", "self_attn.kv_norm.weight"),
    (r"attn\.wo_a\.weight", "self_attn.o_a_proj.weight"),
    (r"attn\.wo_b\.weight", "self_attn.o_b_proj.weight"),
    (r"attn\.attn_sink", "self_attn.sinks"),
    (r"attn\.compressor\.wkv\.weight", "self_attn.compressor.kv_proj.weight"),
    (r"attn\.compressor\.wgate\.weight", "self_attn.compressor.gate_proj.weight"),
    (r"attn\.compressor\.norm\.weight", "self_attn.compressor.kv_norm.weight"),
    (r"attn\.compressor\.ape", "self_attn.compressor.position_bias"),
    (r"attn\.indexer\.wq_b\.weight", "self_attn.compressor.indexer.q_b_proj.weight"),
    (
        r"attn\.indexer\.weights_proj\.weight",
        "self_attn.compressor.indexer.scorer.weights_proj.weight",
    ),
    (r"attn\.indexer\.compressor\.wkv\.weight", "self_attn.compressor.indexer.kv_proj.weight"),
    (r"attn\.indexer\.compressor\.wgate\.weight", "self_attn.compressor.indexer.gate_proj.weight"),
    (r"attn\.indexer\.compressor\.norm\.weight", "self_attn.compressor.indexer.kv_norm.weight"),
    (r"attn\.indexer\.compressor\.ape", "self_attn.compressor.indexer.position_bias"),
    (r"ffn\.gate\.weight", "mlp.gate.weight"),
    (r"ffn\.gate\.bias", "mlp.gate.e_score_correction_bias"),
    (r"ffn\.gate\.tid2eid", "mlp.gate.tid2eid"),
    (r"ffn\.experts\.w2", "mlp.experts.down_proj"),
    (r"ffn\.shared_experts\.w1\.weight", "mlp.shared_experts.gate_proj.weight"),
    (r"ffn\.shared_experts\.w2\.weight", "mlp.shared_experts.down_proj.weight"),
    (r"ffn\.shared_experts\.w3\.weight", "mlp.shared_experts.up_proj.weight"),
)
_EXPERT = re.compile(r"(.*\.ffn\.experts)\.(\d+)\.(w[123])\.weight")
_STACKED = re.compile(r"(.*\.ffn\.experts)\.(w[123])")
_GATE_UP = re.compile(r"model\.(layers\.\d+)\.mlp\.experts\.gate_up_proj")


def named_tensors(model: nn.Module, grads: bool = False) -> dict[str, Tensor]:
    """Parameters and persistent buffers by our names, or the gradients that exist."""
    if grads:
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def to_official(state: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Unstack experts, one matrix an entry; every other name is official already."""
    for name, tensor in state:
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            yield name, tensor
            continue
        for expert, matrix in enumerate(tensor):
            yield f"{stacked[1]}.{expert}.{stacked[2]}.weight", matrix


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack experts again."""
    stacks: dict[str, dict[int, Tensor]] = {}
    result = {}
    for name, tensor in state.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            stacks.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
    for name, matrices in stacks.items():
        missing = set(range(len(matrices))) - set(matrices)
        if missing:
            raise ModelConfigError(f"{name} has no expert {min(missing)}")
        result[name] = torch.stack([matrices[j] for j in range(len(matrices))])
    return result


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to transformers' in-memory names; ``mtp.*`` stays."""
    result = {}
    for name, tensor in state.items():
        stacked = _STACKED.fullmatch(name)
        if name.startswith("mtp."):
            result[name] = tensor
        elif stacked is not None and stacked[2] != "w2":
            # w1 and w3 come together; a state that has one without the other is incomplete.
            if stacked[2] == "w1":
                both = torch.cat([tensor, state[f"{stacked[1]}.w3"]], dim=1)
                result[f"{_transformers_prefix(name)}mlp.experts.gate_up_proj"] = both
        else:
            result[_renamed(name)] = tensor
    return result


def _transformers_prefix(name: str) -> str:
    return "model." + ".".join(name.split(".")[:2]) + "."


def _renamed(name: str) -> str:
    if name.startswith("layers."):
        rest = name.split(".", 2)[2]
        for pattern, replacement in _LAYER:
            match = re.fullmatch(pattern, rest)
            if match is not None:
                return _transformers_prefix(name) + match.expand(replacement)
    for pattern, replacement in _TOP:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(replacement)
    raise ModelConfigError(f"{name} is not a name of a V4 weight")


def from_transformers(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """transformers' in-memory names to ours; ``names`` are the model's own."""
    ours = {}
    for name in names:
        if not name.startswith("mtp.") and _STACKED.fullmatch(name) is None:
            ours[_renamed(name)] = name
    result = {}
    for name, tensor in state.items():
        match = _GATE_UP.fullmatch(name)
        if match is not None:
            gate, up = tensor.chunk(2, dim=1)
            result[f"{match[1]}.ffn.experts.w1"] = gate
            result[f"{match[1]}.ffn.experts.w3"] = up
        elif name.endswith(".mlp.experts.down_proj"):
            layer = name.removeprefix("model.").removesuffix(".mlp.experts.down_proj")
            result[f"{layer}.ffn.experts.w2"] = tensor
        else:
            result[ours.get(name, name)] = tensor
    return result


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy ``state``, in official or transformers' names, into ``model``; see V4Model."""
    own = model.state_dict()
    if any(name.startswith("model.") for name in state):
        given = from_transformers(state, own)
    else:
        given = from_official(state)
    missing = [n for n in own if n not in given and not n.startswith("mtp.")]
    partial = [n for n in own if n not in given and n.startswith("mtp.")]
    if partial and any(name.startswith("mtp.") for name in given):
        missing += partial
    unknown = [n for n in given if n not in own and not n.startswith("mtp.")]
    if missing:
        raise ModelConfigError(f"the weights lack {missing[0]} ({len(missing)} missing in all)")
    if unknown:
        raise ModelConfigError(f"the weights have {unknown[0]}, which this model has not")
    given = {name: tensor for name, tensor in given.items() if name in own}
    for name, tensor in given.items():
        if own[name].shape != tensor.shape:
            raise ModelConfigError(
                f"{name} has shape {tuple(tensor.shape)}; this model has {tuple(own[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)
