"""Conversion of a SentencePiece BPE model to transformers' tokenizer.json.

In the JSON a space is a space, not SentencePiece's U+2581. U+2581 itself is then an ordinary
character that the vocabulary lacks, and is encoded as bytes: no text is ambiguous, and no
normaliser is needed. SentencePiece merges the pair whose union has the best score, leftmost first;
the `tokenizers` library merges by the rank of the pair. So the merges are all ways to split a piece
into two known pieces, in the order of the pieces' scores.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from data.text.special_tokens import BOS, EOS, HIDDEN

SPACE = "▁"


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
    """The tokenizer.json of a vocabulary, as a dictionary; it adds no tokens to a text.

    Arguments:
        pieces: the written form of id 0, 1, 2, …, with plain spaces.
        mergeable: the ordinary pieces, best score first.
        special: written form -> id of the special tokens, which are among `pieces`.
    """
    vocab = {piece: i for i, piece in enumerate(pieces)}
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
                "special": token in HIDDEN,
            }
            for token, i in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
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
    """The tokenizer_config.json that goes with it, as released; `max_length` in tokens.

    Whoever makes a prompt writes bos; batches are padded with eos.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
