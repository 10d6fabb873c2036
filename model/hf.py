"""Names of weights: ours in memory, the official ones on disk, and transformers' in memory.

The names are those of the table in model/parameters.py. Ours are the official ones (report's
release) with two exceptions: a layer's experts are stacked, ``ffn.experts.w1`` [E, F, D] instead
of ``ffn.experts.{j}.w1.weight``, and hyper-connections are modules, ``hc_attn.fn`` instead of
``hc_attn_fn``. ``transformers`` also concatenates w1 and w3, and has no ``mtp.*``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from model.errors import ModelConfigError
from model.parameters import (
    entry_of,
    expert_name,
    memory_name,
    official_name,
    transformers_name,
)


def named_tensors(model: nn.Module, grads: bool = False) -> dict[str, Tensor]:
    """Returns parameters and persistent buffers by our names, or the gradients that exist."""
    if grads:
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def to_official(state: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields tensors under their official names; each expert's matrices are entries."""
    for name, tensor in state:
        official = official_name(name)
        if not entry_of(name).stacked:
            yield official, tensor
            continue
        for expert, matrix in enumerate(tensor):
            yield expert_name(official, expert), matrix


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors under our names, experts stacked; unknown names stay."""
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
    for theirs, names in _by_transformers_name(state).items():
        tensors = [state[name] for name in names]
        result[theirs] = torch.cat(tensors, dim=1) if len(tensors) > 1 else tensors[0]
    return result


def from_transformers(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Returns tensors under our names; ``names`` are the model's own, unknown names stay."""
    ours = _by_transformers_name(names)
    result: dict[str, Tensor] = {}
    for theirs, tensor in state.items():
        names_of = ours.get(theirs, [theirs])
        parts = tensor.chunk(len(names_of), dim=1) if len(names_of) > 1 else (tensor,)
        result |= zip(names_of, parts, strict=True)
    return result


def _by_transformers_name(names: Iterable[str]) -> dict[str, list[str]]:
    """Our names by the tensor of transformers that they make up, in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(transformers_name(name) or official_name(name), []).append(name)
    return groups


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy ``state``, in official or transformers' names, into ``model``; see V4Model."""
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
    """Raise ModelConfigError unless ``source`` has the ``weights`` and no others; MTP may lack."""
    has_mtp = any(name.startswith("mtp.") for name in source)
    missing = [n for n in weights if n not in source and (has_mtp or not n.startswith("mtp."))]
    if missing:
        raise ModelConfigError(
            f"the weights lack {official_name(missing[0])} ({len(missing)} missing in all)"
        )
    unknown = [n for n in source if n not in weights and not n.startswith("mtp.")]
    if unknown:
        raise ModelConfigError(f"the weights have {unknown[0]}, which this model has not")
