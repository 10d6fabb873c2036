"""Conversion of a SentencePiece BPE model to transformers' tokenizer.json.

In the JSON a space is a space, not SentencePiece's U+2581. U+2581 itself is then an ordinary
character that the vocabulary lacks, and is encoded as bytes: no text is ambiguous, and no
normaliser is needed. SentencePiece merges the pair whose union has the best score, leftmost first;
the `tokenizers` library merges by the rank of the pair. So the merges are all ways to split a piece
into two known pieces, in the order of the pieces' scores.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from data.text.special_tokens import BOS, BOS_ID, EOS, IMAGE, PAD

SPACE = "▁"
# Tokens that DeepSeek-V4 marks `special`, which `skip_special_tokens` hides. The others, such as
# <think>, stay visible in decoded text.
_HIDDEN = frozenset((BOS, EOS, PAD, "<｜end_of_query｜>", *IMAGE))


def merges_of(vocab: Mapping[str, int], pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Every split of every piece, best-scored piece first (`pieces` come in that order)."""
    return [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]


def tokenizer_json(
    pieces: Sequence[str], mergeable: Sequence[str], special: Mapping[str, int]
) -> dict[str, Any]:
    """The tokenizer.json of a vocabulary, as a dictionary.

    Arguments:
        pieces: the written form of id 0, 1, 2, …, with plain spaces.
        mergeable: the ordinary pieces, best score first.
        special: written form -> id of the special tokens, which are among `pieces`.
    """
    vocab = {piece: i for i, piece in enumerate(pieces)}
    begin = {"SpecialToken": {"id": BOS, "type_id": 0}}
    body = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token in _HIDDEN,
            }
            for token, i in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, body[0]],
            "pair": [begin, *body],
            "special_tokens": {BOS: {"id": BOS, "ids": [BOS_ID], "tokens": [BOS]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges_of(vocab, mergeable),
        },
    }


def tokenizer_config(max_length: int) -> dict[str, Any]:
    """The tokenizer_config.json that goes with it; `max_length` in tokens."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
