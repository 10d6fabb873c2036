"""DeepSeek-V4's special tokens and their ids.

In the 128K configuration (vocab 129280) every token has DeepSeek-V4's own id. A smaller vocabulary
keeps bos, eos and pad at 0, 1, 2 and has the 47 named tokens, in the same order, as its last ids,
but no reserved placeholders and image tokens.

Certainty: the spelling and id of bos, eos, pad, fim, User, Assistant, think and DSML are certain,
and so is the purpose of every id from 128800 to 128846. The other spellings, and those of
128847-129279, come from public ports of DeepSeek-V4's tokenizer, including the odd `<｜/table>｜`.
The ports agree except on 129264-129270, which one port of V4.1 renames; here they are as in V4.
"""

V4_VOCAB_SIZE = 129280
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
EDGES = (BOS, EOS, PAD)

_FIRST_PLACEHOLDER_ID = 128000

# Ids 128800 … 128846, without a gap.
NAMED = (
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",  # plain bars: inherited from V2
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
    "<｜begin▁of▁repo▁name｜>",
    "<｜end▁of▁repo▁name｜>",
    "<｜begin▁of▁file▁name｜>",
    "<｜end▁of▁file▁name｜>",
    "<｜begin▁of▁file｜>",
    "<｜end▁of▁file｜>",
    "<think>",
    "</think>",
    "<｜place▁holder▁for▁copy｜>",
    "<｜place▁holder▁for▁pointer▁replace｜>",
    "｜DSML｜",
    "<｜begin▁sys｜>",
    "<｜end▁sys｜>",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜task｜>",
    "<｜political｜>",
    "<｜entity｜>",
    "<｜title｜>",
    "<｜safety｜>",
    "<｜answer｜>",
    "<｜search｜>",
    "<dsml:",
    "</dsml:",
    "<｜search▁begin｜>",
    "<｜search▁end｜>",
    "<｜extracted_url｜>",
    "<｜read_url｜>",
    "<｜end_of_query｜>",
)

# Ids 129262 … 129279, after the numbered multimodal spans.
IMAGE = (
    "<｜rl_image_pad｜>",
    "<｜rl_image_start｜>",
    "<｜image2｜>",
    "<｜/table>｜",
    "<｜table｜>",
    "<｜/td｜>",
    "<｜td｜>",
    "<｜/tr｜>",
    "<｜tr｜>",
    "<｜/polygon｜>",
    "<｜polygon｜>",
    "<｜/point｜>",
    "<｜point｜>",
    "<｜/box｜>",
    "<｜box｜>",
    "<｜/ref｜>",
    "<｜ref｜>",
    "<｜image｜>",
)


PLACEHOLDERS = tuple(f"<｜place▁holder▁no▁{i}｜>" for i in range(800))
SPANS = tuple(f"<|place_holder_mm_span_{i:04d}|>" for i in range(21, 436))

_TABLES = ("<｜/table>｜", "<｜table｜>", "<｜/td｜>", "<｜td｜>", "<｜/tr｜>", "<｜tr｜>")
_VISIBLE = (*NAMED[:-1], "<｜image2｜>", *_TABLES)
HIDDEN = frozenset((*EDGES, *PLACEHOLDERS, *NAMED, *SPANS, *IMAGE)) - {*_VISIBLE}
"""Tokens that DeepSeek-V4 marks `special`, which `skip_special_tokens` hides. The others, such as
<think>, stay visible in decoded text."""


def special_ids(vocab_size: int) -> dict[str, int]:
    """Written form -> id of every special token in a vocabulary of `vocab_size`, sorted by id."""
    table = dict(zip(EDGES, (BOS_ID, EOS_ID, PAD_ID), strict=True))
    if vocab_size < V4_VOCAB_SIZE:
        first = vocab_size - len(NAMED)
        return table | {token: first + i for i, token in enumerate(NAMED)}
    tokens = (*PLACEHOLDERS, *NAMED, *SPANS, *IMAGE)
    return table | {token: _FIRST_PLACEHOLDER_ID + i for i, token in enumerate(tokens)}


def base_size(vocab_size: int) -> int:
    """Number of ids of bos, eos, pad and the ordinary pieces, which come first."""
    return vocab_size - (len(special_ids(vocab_size)) - len(EDGES))
