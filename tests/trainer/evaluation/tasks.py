"""Task files of lm-eval on invented text, one for each kind of request."""

from __future__ import annotations

import json
import random
from pathlib import Path

HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: questions.jsonl}}}}
test_split: test
metadata: {{version: 1}}
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""
UNTIL = """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "ad"], max_gen_toks: 24}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write_tasks(folder: Path, questions: int = 12) -> dict[str, Path]:
    """Writes the files into `folder`; returns that of each kind: choice, rolling, until."""
    chance = random.Random(5)

    def words(count: int) -> str:
        return " ".join("".join(chance.choices("abcdefgh", k=4)) for _ in range(count))

    texts = [words(chance.randint(1, 90)) for _ in range(questions - 4)]
    # A space at the end, characters of several tokens, a special token, more than the model reads.
    texts += ["abc ", "Grüße, 世界", "a<｜end▁of▁sentence｜>b", words(300)]
    lines = []
    for text in texts:
        choices = [words(chance.randint(1, 4)) for _ in range(3)]
        lines.append({"text": text, "choices": choices, "answer": chance.randrange(3)})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = {}
    for name, rest in (("choice", CHOICE), ("rolling", ROLLING), ("until", UNTIL)):
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(HEAD.format(name=name) + rest)
    return paths
