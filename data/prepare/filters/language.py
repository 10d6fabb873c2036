"""The filter `language`: fastText's identification, as in datatrove's LanguageFilter.

datatrove's class takes only the models that it downloads itself.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from data.errors import DataError
from data.filter_config import LanguageConfig

_LABEL = "__label__"


@lru_cache(maxsize=2)
def identifier(config: LanguageConfig) -> Callable[[str], str | None]:
    """A function from a text to why it is in no language to keep, or None.

    Raises DataError where fastText or the model is missing, or has no label of a language.
    """
    model = _open(config.model)
    labels = {label.removeprefix(_LABEL) for label in model.get_labels()}
    if unknown := sorted(set(config.keep) - labels):
        few = sorted(labels)[:10]
        raise DataError(
            f"data.filters.language.keep names {unknown[0]!r}, and {config.model} has no such "
            f"label; it has {len(labels)}, among them {', '.join(few)}."
        )

    def judge(text: str) -> str | None:
        # Every label that reaches the score, or, for the reason, the first.
        line = " ".join(text.split("\n"))
        names, scores = model.predict(line, k=-1, threshold=config.min_score)
        if any(name.removeprefix(_LABEL) in config.keep for name in names):
            return None
        names, scores = model.predict(line, k=1)
        if not names:
            return "no language"
        return f"{names[0].removeprefix(_LABEL)} with a score of {min(1.0, scores[0]):.2f}"

    return judge


def _open(file: str) -> Any:
    try:
        from fasttext.FastText import _FastText
    except ImportError as error:
        raise DataError(
            "data.filters.language needs fastText: pip install 'v4-pretrain[processing]'."
        ) from error
    try:
        return _FastText(file)
    except (ValueError, MemoryError, RuntimeError) as error:
        raise DataError(
            f"data.filters.language.model = {file} is no fastText model: "
            f"{' '.join(str(error).split())}"
        ) from error
