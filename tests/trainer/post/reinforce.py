"""Runs of a second that train on their own samples."""

from __future__ import annotations

import json
from pathlib import Path

PROMPTS = ["ab cd", "ef", "gh ab", "hh a", "b"]


def reinforcement(folder: Path, checker: str = "count_a", **more: object) -> list[str]:
    """The overrides of the tiny run with `post`; `more` are further fields of it."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    domain = {
        "name": "words",
        "prompts": str(path),
        "checker": f"tests.trainer.post.own_checkers:{checker}",
    }
    post = {
        "method": "reinforce",
        "domains": [domain],
        "prompts_per_step": 2,
        "samples_per_prompt": 4,
        "max_new_tokens": 6,
        **more,
    }
    return [f"post={json.dumps(post)}", "evaluation.every=0", "metrics.layer_stats_every=0"]


def distillation(folder: Path, teachers: list[str], **more: object) -> list[str]:
    """The overrides of the tiny run that learns from teachers, each with a domain of its own."""
    domains = []
    for number, teacher in enumerate(teachers):
        path = folder / f"prompts-{number}.jsonl"
        texts = PROMPTS[number::2]
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        domains.append({"name": f"domain{number}", "prompts": str(path), "teacher": teacher})
    post = {
        "method": "distil",
        "domains": domains,
        "prompts_per_step": 4,
        "samples_per_prompt": 2,
        "max_new_tokens": 6,
        **more,
    }
    return [f"post={json.dumps(post)}", "evaluation.every=0", "metrics.layer_stats_every=0"]
