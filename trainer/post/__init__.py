"""Post-training: losses over samples of the model, and their rewards.

Names are loaded on first use; `trainer.post.checkers` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, the names of _MODULES
    from trainer.post.advantages import group_advantages, length_penalty
    from trainer.post.chosen_tokens import log_probabilities
    from trainer.post.divergence import reverse_kl
    from trainer.post.own_samples import OwnSamples, open_own_samples
    from trainer.post.policy import PolicyStats, policy_loss

_MODULES = {
    "OwnSamples": "own_samples",
    "open_own_samples": "own_samples",
    "PolicyStats": "policy",
    "group_advantages": "advantages",
    "length_penalty": "advantages",
    "log_probabilities": "chosen_tokens",
    "policy_loss": "policy",
    "reverse_kl": "divergence",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
