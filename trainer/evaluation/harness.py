"""An adapter of our models to lm-eval: its LM class, its tasks, and the scores that it returns.

Imports lm-eval, which is an extra; see `trainer.evaluation.tasks`.
"""

from __future__ import annotations

import difflib
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
import lm_eval.utils
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import metric_registry
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from data import Tokenizer
from trainer.config import EvaluationConfig, is_task_file
from trainer.evaluation.scoring import Continuation, Score
from trainer.evaluation.shared_model import Texts
from trainer.evaluation.task_files import make_paths_absolute, read_task_file
from trainer.generate.sampling import Sampling
from trainer.process.errors import TaskError

FEWSHOT_SEED = 1234  # lm-eval's own
MAX_NEW_TOKENS = 256  # of a task that sets none; lm-eval's own
_SAMPLING = {"do_sample", "temperature", "top_p", "until", "max_gen_toks"}
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "top_k": None}
"""Settings of generation that change nothing at these values."""

Samples = dict[str, list[dict[str, Any]]]
"""What lm-eval logs about each question, by task."""


class HarnessModel(TemplateLM):
    """A model for lm-eval; `call` scores continuations and continues texts.

    Texts are encoded as by lm-eval's `hf` backend with an exported folder.
    """

    def __init__(
        self, call: Callable[[Any], Any], tokenizer: Tokenizer, max_length: int, bos: bool
    ) -> None:
        """Wraps the model that `call` runs; with `bos`, every text begins with that token."""
        super().__init__()
        self._call, self._ids, self._bos = call, tokenizer, bos
        self.max_length = max_length

    @property
    def eot_token_id(self) -> int:
        return self._ids.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._ids.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encodes a text; a special token that is spelled out becomes that token."""
        ids = self._ids.encode(string, allow_special=True)
        with_bos = self._bos if add_special_tokens is None else add_special_tokens
        return [self._ids.bos_id, *ids] if with_bos and ids[:1] != [self._ids.bos_id] else ids

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Returns each continuation's log-probability, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self._scores([(context, rest) for _, context, rest in requests])
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Scores tokens after their context, which loses its beginning if too long."""
        for _, rest in pairs:
            if not 0 < len(rest) <= self.max_length:
                raise TaskError(
                    f"an answer has {len(rest):,} tokens; it should have between 1 and the "
                    f"{self.max_length:,} that the model reads"
                )
        # A context of spaces alone is empty: lm-eval moves them into the answer.
        texts = [
            ((context or [self.prefix_token_id]) + rest)[-(self.max_length + 1) :]
            for context, rest in pairs
        ]
        items = [Continuation(t, len(rest)) for t, (_, rest) in zip(texts, pairs, strict=True)]
        scores = list(self._call(items)) if items else []
        if not all(math.isfinite(score.log_likelihood) for score in scores):
            raise TaskError("the model's logits are not finite")
        return scores

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Returns the log-probability of each whole text, in windows of `max_length`."""
        windows: list[tuple[list[int], list[int]]] = []
        ends = []
        for request in requests:
            rolling = lm_eval.utils.get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                self.prefix_token_id,
                self.max_length,
                context_len=1,
            )
            windows += map(lm_eval.utils.make_disjoint_window, rolling)
            ends.append(len(windows))
        scores = [score.log_likelihood for score in self._scores(windows)]
        return [sum(scores[a:b]) for a, b in zip([0, *ends], ends, strict=False)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continues each context up to one of its stop strings, its maximum length, or eos."""
        results: dict[int, str] = {}
        settings = [repr(sorted(request.args[1].items())) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: settings[index])
        for _, group in groupby(order, key=lambda index: settings[index]):
            indices = list(group)
            contexts = [requests[index].args[0] for index in indices]
            texts = self._texts(contexts, requests[indices[0]].args[1])
            results |= zip(indices, self._call(texts), strict=True)
        return [results[index] for index in range(len(requests))]

    def _texts(self, contexts: Sequence[str], settings: dict[str, Any]) -> Texts:
        """Returns prompts and settings; a prompt that is too long loses its beginning."""
        values = normalize_gen_kwargs(settings, MAX_NEW_TOKENS)
        for name, value in values.items():
            if name not in _SAMPLING and (name not in _NEUTRAL or value != _NEUTRAL[name]):
                raise TaskError(
                    f"generation_kwargs: {name} = {value} is not supported; there are "
                    f"{', '.join(sorted(_SAMPLING))}"
                )
        new = values["max_gen_toks"]
        if new >= self.max_length:
            raise TaskError(
                f"generation_kwargs: {new:,} new tokens should be fewer than the "
                f"{self.max_length:,} tokens that the model reads"
            )
        eos = self._ids.decode([self.eot_token_id])
        prompts = [
            self.tok_encode(context)[new - self.max_length :] or [self.prefix_token_id]
            for context in contexts
        ]
        temperature = values.get("temperature", 1.0) if values.get("do_sample") else 0.0
        sampling = Sampling(temperature, values.get("top_p", 1.0))
        until = [text for text in handle_stop_sequences(values.get("until"), eos) if text]
        return Texts(prompts, new, until, sampling)


def open_tasks(settings: EvaluationConfig) -> dict[str, Any]:
    """Opens tasks and their data, as lm-eval's `evaluate` takes them.

    Raises TaskError for a task that does not exist or cannot be opened.
    """
    _prepare()
    names = [task for task in settings.tasks if not is_task_file(task)]
    manager = TaskManager(include_defaults=bool(names))
    specs = [
        _task_of_file(task, settings.task_code) if is_task_file(task) else _known(task, manager)
        for task in settings.tasks
    ]
    own = [spec["task"] for spec in specs if isinstance(spec, dict) and "task" in spec]
    for name in own:
        if own.count(name) > 1 or name in names:
            raise TaskError(f"task: {name} names two tasks; their scores need names of their own")
    try:
        opened: dict[str, Any] = dict(manager.load(specs))
    except Exception as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        raise TaskError(f"{', '.join(settings.tasks)}: cannot be opened: {problem}") from error
    for name, task in opened["tasks"].items():
        of_task = task.config.num_fewshot
        if settings.task_fewshot is not None and of_task != 0:  # 0 is fixed by the task
            task.set_config("num_fewshot", settings.task_fewshot)
        elif of_task is None:
            task.set_config("num_fewshot", 0)
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            kind = "runs code that a model writes" if task.UNSAFE_CODE else "needs images or sound"
            raise TaskError(f"{name}: {kind}, which is not supported")
    return opened


def continues_texts(opened: Mapping[str, Any]) -> list[str]:
    """Returns the names of tasks in which the model continues texts."""
    return [n for n, task in opened["tasks"].items() if task.OUTPUT_TYPE == "generate_until"]


def _prepare() -> None:
    """Makes lm-eval quiet, and renders the templates of tasks in a sandbox.

    In Jinja's plain environment a template can reach Python's own modules.
    """
    for name in ("lm_eval", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(lm_eval.api.task.tqdm, disable=True)
    sandbox = SandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    sandbox.filters["regex_replace"] = lm_eval.utils.regex_replace
    lm_eval.utils.env = sandbox


def _known(name: str, manager: TaskManager) -> str:
    if name in manager.all_tasks:
        return name
    nearest = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.0)
    raise TaskError(
        f"{name}: is no task of lm-eval {lm_eval.__version__}; the nearest name is "
        f"{nearest[0]}, and a task of your own is named by its .yaml file"
    )


def _task_of_file(path: str, may_run_code: bool) -> dict[str, Any]:
    place = Path(path).expanduser()
    if may_run_code and place.is_file():
        task = load_yaml(place, resolve_func=True)
        make_paths_absolute(task, place)
        return task
    task = read_task_file(place)
    for entry in task.get("metric_list") or []:
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if name not in metric_registry or (isinstance(entry, dict) and entry.get("hf_evaluate")):
            raise TaskError(
                f"{path}: metric {name} is none of lm-eval's own, and others run code of the hub; "
                f"there are {', '.join(sorted(metric_registry))}"
            )
    return task


def run_tasks(
    model: HarnessModel, opened: Mapping[str, Any], limit: int | None
) -> tuple[dict[str, float], Samples]:
    """Evaluates tasks; returns scores by task/metric, and what lm-eval logs about each question.

    The standard error of a mean is under task/metric_stderr.
    """
    for task in opened["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)  # the same examples at every evaluation
    result = evaluate(model, dict(opened), limit=limit, bootstrap_iters=0, log_samples=True)
    scores: dict[str, float] = {}
    for task, values in result["results"].items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not isinstance(value, float | int) or not chosen or metric.endswith("_stderr"):
                continue
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            scores[f"{task}/{name}"] = float(value)
            of_items = [
                sample[metric]
                for sample in result["samples"].get(task, [])
                if sample["filter"] == chosen and metric in sample
            ]
            is_mean = task in opened["tasks"] and _is_mean(opened["tasks"][task], metric)
            if is_mean and len(of_items) > 1:
                spread = statistics.stdev(map(float, of_items)) / len(of_items) ** 0.5
                scores[f"{task}/{name}_stderr"] = spread
    return scores, dict(result["samples"])


def _is_mean(task: Any, metric: str) -> bool:
    return bool(task.aggregation().get(metric) is mean)
