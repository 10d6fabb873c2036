"""Where DeepSeek-V4's special tokens stand."""

import pytest

from data.config import TokenizerConfig
from data.prepare.tokenizer_training import train_model
from data.text.special_tokens import HIDDEN, NAMED, base_size, special_ids
from data.text.tokenizer import MODEL_FILE, Tokenizer

# v4-spec section 8, written out by hand.
V4_IDS = {
    "<｜begin▁of▁sentence｜>": 0,
    "<｜end▁of▁sentence｜>": 1,
    "<｜▁pad▁｜>": 2,
    "<｜place▁holder▁no▁0｜>": 128000,
    "<｜place▁holder▁no▁799｜>": 128799,
    "<｜fim▁hole｜>": 128800,
    "<｜fim▁begin｜>": 128801,
    "<｜fim▁end｜>": 128802,
    "<｜User｜>": 128803,
    "<｜Assistant｜>": 128804,
    "<|EOT|>": 128805,
    "<｜tool▁calls▁begin｜>": 128806,
    "<｜tool▁sep｜>": 128814,
    "<｜begin▁of▁repo▁name｜>": 128815,
    "<｜end▁of▁file｜>": 128820,
    "<think>": 128821,
    "</think>": 128822,
    "｜DSML｜": 128825,
    "<｜begin▁sys｜>": 128826,
    "<｜latest_reminder｜>": 128828,
    "<｜action｜>": 128829,
    "<｜query｜>": 128830,
    "<｜task｜>": 128833,
    "<｜search｜>": 128839,
    "<dsml:": 128840,
    "</dsml:": 128841,
    "<｜search▁begin｜>": 128842,
    "<｜end_of_query｜>": 128846,
    "<|place_holder_mm_span_0021|>": 128847,
    "<｜image｜>": 129279,
}


# What `skip_special_tokens` leaves in a text, by the released tokenizer.json.
V4_VISIBLE = [
    *range(128800, 128846),  # all named ones but <｜end_of_query｜>
    *range(129264, 129271),  # <｜image2｜> and the parts of tables
]


def test_v4_hides_what_the_released_files_hide() -> None:
    table = special_ids(129280)
    visible = sorted(i for token, i in table.items() if token not in HIDDEN)
    assert visible == V4_VISIBLE
    placeholders = [token for token in HIDDEN if "holder" in token and "for" not in token]
    assert len(placeholders) == 1215


def test_v4_layout_has_every_id_once() -> None:
    table = special_ids(129280)
    assert {token: table[token] for token in V4_IDS} == V4_IDS
    assert sorted(table.values()) == [0, 1, 2, *range(128000, 129280)]
    assert base_size(129280) == 128000


def test_small_layout_is_compact_at_the_top() -> None:
    table = special_ids(4096)
    assert list(table.values()) == [0, 1, 2, *range(4096 - len(NAMED), 4096)]
    assert list(table)[3:] == list(NAMED)
    assert not any("holder▁no" in token or "mm_span" in token for token in table)


@pytest.mark.parametrize("vocab_size", [512, 129280])
def test_trained_model_has_the_layout(
    vocab_size: int, documents: list[str], tmp_path, any_text
) -> None:
    """The 128K vocabulary cannot be filled by a small text; unused pieces keep the ids in place."""
    config = TokenizerConfig(path=str(tmp_path), vocab_size=vocab_size)
    (tmp_path / MODEL_FILE).write_bytes(train_model(documents[:3], config))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.special == special_ids(vocab_size)
    for token, i in tokenizer.special.items():
        assert tokenizer.encode(token, allow_special=True) == [i]
        assert tokenizer.decode([i]) == token
    unused = tokenizer.encode("<｜unused▁5000｜>", allow_special=True)
    assert len(unused) > 1 and tokenizer.decode(unused) == "<｜unused▁5000｜>"
