"""Digests on disk stay valid where fields of the config are renamed.

The literals are what version 0.1 hashed.
"""

import pytest
from pydantic import BaseModel

from data.config import DataPhase, FiltersConfig, SourceConfig, fingerprint_source, fingerprint_text

PHASE = DataPhase(
    steps=3,
    seq_len=8,
    global_batch_size=4,
    micro_batch_size=2,
    initial_batch_size=2,
    rampup_steps=2,
    source_weights={"a": 1.0},
)
FIRST_FILTERS = (
    '{"min_characters":100,"max_characters":10000000,"max_garbled":0.005,"generated":true,'
    '"quality":["gopher","repetition","fineweb"],"quality_domains":["prose"],"exact":true,'
    '"near":0.8,"template":0.6,"template_group":20}'
)
CASES: list[tuple[BaseModel, str]] = [
    (
        PHASE,
        '{"steps":3,"row_length":8,"batch_rows":4,"micro_rows":2,"ramp_from":2,"ramp_steps":2,'
        '"weights":{"a":1.0}}',
    ),
]


@pytest.mark.parametrize(("config", "text"), CASES)
def test_fields_are_hashed_by_their_first_names(config: BaseModel, text: str) -> None:
    assert fingerprint_text(config.model_dump_json()) == text


def test_a_source_is_hashed_by_its_first_fields() -> None:
    source = SourceConfig(name="a", paths=("a.jsonl",), split="validation")
    assert fingerprint_source(source) == (
        '{"name":"a","format":"json","dataset":null,'
        '"dataset_subset":null,"dataset_split":"train","dataset_revision":null,"content":"text",'
        '"text_field":"text","messages_field":"messages","domain":"prose","split":"heldout"}'
    )


def test_filters_are_hashed_by_their_first_fields() -> None:
    assert fingerprint_text(FiltersConfig().fingerprint()) == FIRST_FILTERS
    assert fingerprint_text(FiltersConfig(pii_domains=("code",)).fingerprint()) == FIRST_FILTERS
    language = {"keep": ["en"], "model": "a.bin"}
    changed = [
        {"pii": "mask"},
        {"pii": "drop"},
        {"pii": "drop", "pii_domains": ["code"]},
        {"language": language},
        {"language": language | {"min_score": 0.5}},
        {"decontamination": {"paths": ["a"]}},
        {"decontamination": {"paths": ["a"], "min_matches": 2}},
    ]
    texts = [FiltersConfig.model_validate(fields).fingerprint() for fields in changed]
    assert len({FIRST_FILTERS, *texts}) == 1 + len(changed)
    moved = FiltersConfig.model_validate({"language": language | {"model": "b.bin"}})
    assert moved.fingerprint() == texts[3]  # by content
