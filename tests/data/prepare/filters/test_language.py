"""Identification of languages, with a model that is trained here on made-up words."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data.config import DataConfig
from data.errors import DataError
from data.filter_config import LanguageConfig
from data.prepare.filters.language import identifier
from data.prepare.run import prepare
from tests.data.prepare.filters.made import words

fasttext = pytest.importorskip("fasttext")


_TRAIN = """
import sys, fasttext
options = {"dim": 8, "epoch": 20, "minn": 1, "maxn": 2, "bucket": 1000, "thread": 1}
fasttext.train_supervised(sys.argv[1], verbose=0, **options).save_model(sys.argv[2])
"""


def other_words(rng: random.Random, count: int) -> str:
    """Text of another alphabet than `words`."""
    parts = ["".join(rng.choices("щжюяфы", k=rng.randint(2, 6))) for _ in range(count)]
    return ".\n".join(" ".join(parts[i : i + 12]) for i in range(0, count, 12)) + ".\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the labels ka and zh."""
    folder, rng = tmp_path_factory.mktemp("model"), random.Random(1)
    lines = []
    for _ in range(200):
        lines.append(f"__label__ka {' '.join(words(rng, 20).split())}\n")
        lines.append(f"__label__zh {' '.join(other_words(rng, 20).split())}\n")
    (folder / "train.txt").write_text("".join(lines))
    # The library trains from memory that it did not set; glibc sets it to 0 here.
    environment = os.environ | {"MALLOC_PERTURB_": "255"}
    arguments = [sys.executable, "-c", _TRAIN, str(folder / "train.txt"), str(folder / "lid.bin")]
    subprocess.run(arguments, env=environment, check=True, timeout=60)
    return folder / "lid.bin"


def test_languages_are_kept_by_their_score(model: Path) -> None:
    rng = random.Random(2)
    judge = identifier(LanguageConfig(keep=("ka",), model=str(model)))
    assert judge(words(rng, 100)) is None
    detail = judge(other_words(rng, 100))
    assert detail is not None and detail.startswith("zh with a score of ")
    mixed = " ".join(words(rng, 100).split() + other_words(rng, 100).split())
    names, scores = fasttext.load_model(str(model)).predict(mixed, k=-1)
    score = dict(zip(names, scores, strict=True))["__label__ka"]
    for least, keeps in ((score - 0.01, True), (score + 0.01, False)):
        settings = LanguageConfig(keep=("ka",), model=str(model), min_score=least)
        assert (identifier(settings)(mixed) is None) == keeps
    both = LanguageConfig(keep=("ka", "zh"), model=str(model), min_score=0.01)
    assert identifier(both)(mixed) is None


def test_prepare_counts_what_is_in_other_languages(
    config: DataConfig, model: Path, tmp_path: Path
) -> None:
    rng = random.Random(3)
    documents = [words(rng, 120) for _ in range(10)] + [other_words(rng, 120) for _ in range(4)]
    for domain in ("prose", "code"):
        lines = [json.dumps({"text": f"{domain} {text}"}) + "\n" for text in documents]
        (tmp_path / f"{domain}.jsonl").write_text("".join(lines))
    fields = {
        "sources": [
            {"name": name, "paths": [str(tmp_path / f"{name}.jsonl")], "domain": name}
            for name in ("prose", "code")
        ],
        "filters": {
            "language": {"keep": ["ka"], "model": str(model)},
            "near_duplicate_similarity": None,
        },
        "shards": str(tmp_path / "shards"),
        "prepare_workers": 1,
    }
    made = DataConfig.model_validate(config.model_dump() | fields)
    manifest = prepare(made, progress=False)
    assert manifest.dropped["prose"]["language"].documents == 4
    assert "language" not in manifest.dropped["code"]
    assert manifest.dropped["prose"]["language"].examples[0].detail.startswith("zh with")
    copy = tmp_path / "copy.bin"
    copy.write_bytes(model.read_bytes())
    fields["filters"] = {**fields["filters"], "language": {"keep": ["ka"], "model": str(copy)}}  # type: ignore[dict-item]
    moved = DataConfig.model_validate(config.model_dump() | fields)
    assert prepare(moved, progress=False).digest == manifest.digest


def test_bad_models_and_labels(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        DataError, match=r"keep names 'en', and .*lid.bin has no such label; it has"
    ):
        identifier(LanguageConfig(keep=("ka", "en"), model=str(model)))
    (tmp_path / "bad.bin").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"language.model = .*bad.bin is no fastText model: "):
        identifier(LanguageConfig(keep=("ka",), model=str(tmp_path / "bad.bin")))
    monkeypatch.setitem(sys.modules, "fasttext.FastText", None)
    with pytest.raises(DataError, match=r"needs fastText: pip install 'v4-pretrain\[processing\]'"):
        identifier(LanguageConfig(keep=("ka",), model=str(model), min_score=0.123))
