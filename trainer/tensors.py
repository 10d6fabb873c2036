"""The whole logical tensors of a run by name, as checkpoints hold them.

Each expert's matrix is an entry of its own under its official name
(`layers.0.ffn.experts.3.w1.weight`), and optimizer states carry the name of their parameter
behind `optim.<state>.`. Where the optimizer keeps an fp32 master of a bf16 parameter, the master
stands under the parameter's name, and loading rounds it again to the same bf16 weight.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from model.hf import to_official

MASTER = "master."


def logical_tensors(model: nn.Module, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Live tensors of the model and its optimizer by logical name; loading copies into them.

    `states` are the optimizer's `state_tensors()`: `<state>.<parameter>`, each state in the shape
    of its parameter, or for the whole parameter.
    """
    logical: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        logical.update(to_official([(name, states.get(MASTER + name, tensor.detach()))]))
    for key, tensor in states.items():
        if key.startswith(MASTER):
            continue
        state, _, name = key.partition(".")
        for part, view in to_official([(name, tensor)]):
            logical[f"optim.{state}.{part}"] = view
    return logical
