"""Tasks of lm-eval, evaluated by all ranks of a model: opened once, then at every evaluation."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from trainer.config import EvaluationConfig
from trainer.evaluation.shared_model import SharedModel, Texts, lead
from trainer.parallel.grid import Grid
from trainer.process.errors import TaskError

if TYPE_CHECKING:
    from trainer.evaluation.harness import Samples


class Tasks:
    """The tasks of `settings`, opened on the first rank; all ranks make one together.

    Attributes:
        samples: what lm-eval logs about each question in the last evaluation, on the first rank.

    Raises TaskError on all ranks where a task or its data is missing, or a pipeline of `stages`
    cannot evaluate it.
    """

    def __init__(self, settings: EvaluationConfig, grid: Grid, stages: int = 1) -> None:
        self._settings, self._grid = settings, grid
        self._opened: Any = lead(grid, lambda _: None, lambda _: _open(settings, stages))
        self.samples: Samples = {}

    def evaluate(self, model: SharedModel) -> dict[str, float]:
        """Returns the scores by task/metric, on the first rank; nothing on the others.

        Raises TaskError on all ranks where lm-eval fails, EvaluationStopped where a rank has
        received a stop signal.
        """

        def work(asked: Any) -> Any:
            return model.continue_texts(asked) if isinstance(asked, Texts) else model.score(asked)

        def body(call: Any) -> tuple[dict[str, float], Samples]:
            from trainer.evaluation.harness import HarnessModel, run_tasks

            bos = self._settings.task_bos
            harness = HarnessModel(call, model.tokenizer, model.max_length, bos)
            return run_tasks(harness, self._opened, self._settings.task_limit)

        result = lead(self._grid, work, body)
        if result is None:
            return {}
        scores, self.samples = result
        return scores


def _open(settings: EvaluationConfig, stages: int) -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        raise TaskError(
            "evaluation.tasks need the package lm_eval: pip install 'v4-pretrain[eval]', or remove "
            "them"
        )
    from trainer.evaluation.harness import continues_texts, open_tasks

    opened = open_tasks(settings)
    if stages > 1 and (names := continues_texts(opened)):
        raise TaskError(
            f"{names[0]}: lets the model continue texts, which needs parallel.pipeline = 1, and it "
            f"is {stages}: no process has all layers"
        )
    return opened
