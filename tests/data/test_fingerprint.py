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
CASES: list[tuple[BaseModel, str]] = [
    (
        FiltersConfig(),
        '{"min_characters":100,"max_characters":10000000,"max_garbled":0.005,"generated":true,'
        '"quality":["gopher","repetition","fineweb"],"quality_domains":["prose"],"exact":true,'
        '"near":0.8,"template":0.6,"template_group":20}',
    ),
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
