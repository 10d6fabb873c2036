"""The demo's task of lm-eval: a cloze over prose that its model was not trained on."""

import json
from collections.abc import Iterator
from pathlib import Path

from data.config import DataConfig
from data.errors import DataError
from data.files import write_atomically
from data.prepare.corpus import Corpus
from data.prepare.splits import is_validation

CHOICES = 4
MAX_QUESTIONS = 48
_CONTEXT_WORDS = 20
_ANSWER_WORDS = 10
_MIN_PLAIN = 0.7
"""Smallest share of a passage's words that are letters, perhaps with punctuation."""

_TASK = """\
# Which words come next? One choice is right, the others are those of other passages. It is the one
# whose probability the context raises most: that of small models is mostly how frequent words are.
task: demo_cloze
dataset_path: json
dataset_kwargs: {data_files: {test: cloze.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc_mutual_info, aggregation: mean, higher_is_better: true}]
"""


def write_demo_cloze(config: DataConfig, folder: Path) -> int:
    """Writes cloze.jsonl and cloze.yaml into `folder`; returns the number of questions.

    A question is a passage of the validation split of `config`'s prose, its next ten words, and
    those of three other passages. The same text gives the same files. A passage whose end also
    stands in the training split is not asked. Raises DataError where too few are left.
    """
    splits: dict[bool, list[str]] = {True: [], False: []}
    for source in config.sources:
        if source.domain == "prose":
            for document in Corpus(source):
                validation = is_validation(source, document.text, config.validation_fraction)
                splits[validation].append(" ".join(document.text.split()))
    trained_on = "\n".join(splits[False])
    passages = list(dict.fromkeys(p for text in splits[True] for p in _passages(text, trained_on)))
    passages = _evenly(passages, MAX_QUESTIONS)
    if len({answer for _, answer in passages}) < CHOICES:
        raise DataError(
            f"the validation split of the prose has {len(passages)} passages for the cloze, which "
            f"needs {CHOICES}; raise data.validation_fraction = {config.validation_fraction}"
        )
    lines = [json.dumps(_question(passages, i), ensure_ascii=False) for i in range(len(passages))]
    write_atomically(folder / "cloze.jsonl", "\n".join(lines) + "\n")
    write_atomically(folder / "cloze.yaml", _TASK)
    return len(lines)


def _passages(text: str, trained_on: str) -> Iterator[tuple[str, str]]:
    """Yields contexts and the words after them, without overlap."""
    words = text.split()
    length = _CONTEXT_WORDS + _ANSWER_WORDS
    for start in range(0, len(words) - length + 1, length):
        passage = words[start : start + length]
        plain = sum(word.strip(".,:;!?()\"'`*").isalpha() for word in passage)
        end = " ".join(passage[-2 * _ANSWER_WORDS :])
        if plain >= _MIN_PLAIN * length and end not in trained_on:
            yield " ".join(passage[:_CONTEXT_WORDS]), " ".join(passage[_CONTEXT_WORDS:])


def _evenly(passages: list[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """Returns at most `limit` of the passages, from all parts of the list."""
    count = min(limit, len(passages))
    return [passages[i * len(passages) // count] for i in range(count)]


def _question(passages: list[tuple[str, str]], index: int) -> dict[str, object]:
    """Returns the question of a passage, with the answers of passages far from it in the list."""
    context, answer = passages[index]
    count = len(passages)
    others: list[str] = []
    for step in range(count):
        other = passages[(index + count // CHOICES + step * (count // CHOICES + 1)) % count][1]
        if other != answer and other not in others:
            others.append(other)
    place = index % CHOICES
    choices = [*others[:place], answer, *others[place : CHOICES - 1]]
    return {"context": context, "choices": choices, "answer": place}
