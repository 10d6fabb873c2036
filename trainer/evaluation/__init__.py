"""Evaluations of a model: the loss on validation text, continued prompts, tasks of lm-eval.

Names are loaded on first use; lm-eval itself only where tasks are opened.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, the names of _MODULES
    from trainer.evaluation.during_training import Evaluations
    from trainer.evaluation.shared_model import SharedModel
    from trainer.evaluation.tasks import Tasks
    from trainer.evaluation.validation import Evaluation, EvaluationStopped, Validation, check_stop

_MODULES = {
    "Evaluation": "validation",
    "EvaluationStopped": "validation",
    "Evaluations": "during_training",
    "SharedModel": "shared_model",
    "Tasks": "tasks",
    "Validation": "validation",
    "check_stop": "validation",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
