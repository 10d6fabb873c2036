"""Names of weights: ours in memory, the official ones on disk, and transformers' in memory.

The names are those of the table in model/parameters.py. Ours are the official ones (those of the
released weights) with two exceptions: a layer's experts are stacked, ``ffn.experts.w1`` [E, F, D],
instead of ``ffn.experts.{j}.w1.weight``, and hyper-connections are modules, ``hc_attn.fn`` instead
of ``hc_attn_fn``. ``transformers`` also concatenates w1 and w3, and has no ``mtp.*``.

Letters: E experts, F inner size of an expert, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from model.errors import ModelConfigError
from model.parameters import (
    expert_name,
    memory_name,
    official_name,
    spec_of,
    transformers_name,
)


def named_tensors(model: nn.Module, grads: bool = False) -> dict[str, Tensor]:
    """Returns parameters and persistent buffers by our names, or the gradients that exist."""
    if grads:
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def to_official(state: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields (official name, tensor); stacked experts become one matrix per expert."""
    for name, tensor in state:
        official = official_name(name)
        if not spec_of(name).stacked:
            yield official, tensor
            continue
        for expert, matrix in enumerate(tensor):
            yield expert_name(official, expert), matrix


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors under our names, experts stacked; unknown names are kept as they are."""
    stacks: dict[str, dict[int, Tensor]] = {}
    result = {}
    for official, tensor in state.items():
        name, expert = memory_name(official)
        if expert is None:
            result[name] = tensor
        else:
            stacks.setdefault(name, {})[expert] = tensor
    for name, matrices in stacks.items():
        missing = set(range(len(matrices))) - set(matrices)
        if missing:
            raise ModelConfigError(f"{name} has no expert {min(missing)}")
        result[name] = torch.stack([matrices[j] for j in range(len(matrices))])
    return result


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors under transformers' in-memory names; ``mtp.*`` gets official names.

    ``state`` must have all tensors that ``transformers`` concatenates, or none of them.
    """
    result = {}
    for hf_name, names in _by_transformers_name(state).items():
        tensors = [state[name] for name in names]
        result[hf_name] = torch.cat(tensors, dim=1) if len(tensors) > 1 else tensors[0]
    return result


def from_transformers(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Returns tensors under our names; unknown names are kept as they are.

    ``names`` are the model's parameter names.
    """
    names_by_hf_name = _by_transformers_name(names)
    result: dict[str, Tensor] = {}
    for hf_name, tensor in state.items():
        ours = names_by_hf_name.get(hf_name, [hf_name])
        parts = tensor.chunk(len(ours), dim=1) if len(ours) > 1 else (tensor,)
        result |= zip(ours, parts, strict=True)
    return result


def _by_transformers_name(names: Iterable[str]) -> dict[str, list[str]]:
    """Maps each transformers name to our names that are concatenated into it, in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(transformers_name(name) or official_name(name), []).append(name)
    return groups


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies ``state``, in official or transformers' names, into ``model``.

    See V4Model.load_hf_state_dict.
    """
    weights = model.state_dict()
    if any(name.startswith("model.") for name in state):
        source = from_transformers(state, weights)
    else:
        source = from_official(state)
    _check_names(weights, source)
    source = {name: tensor for name, tensor in source.items() if name in weights}
    for name, tensor in source.items():
        if weights[name].shape != tensor.shape:
            raise ModelConfigError(
                f"{official_name(name)} has shape {tuple(tensor.shape)}; "
                f"this model has {tuple(weights[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in source.items():
            weights[name].copy_(tensor)


def _check_names(weights: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Raises ModelConfigError unless ``source`` has exactly the names of ``weights``.

    MTP weights may be missing.
    """
    has_mtp = any(name.startswith("mtp.") for name in source)
    missing = [n for n in weights if n not in source and (has_mtp or not n.startswith("mtp."))]
    if missing:
        raise ModelConfigError(
            f"the weights lack {official_name(missing[0])} ({len(missing)} missing in all)"
        )
    unknown = [n for n in source if n not in weights and not n.startswith("mtp.")]
    if unknown:
        raise ModelConfigError(f"the weights have {unknown[0]}, which this model does not have")
