"""The tokenizer: text to ids and back, lossless for any text.

The model is a SentencePiece BPE file with byte fallback. It is run by the `tokenizers` library, on
the same JSON that `export_hf` writes, so that transformers gives the same ids as in training.
SentencePiece's encoder reads U+2581 as a space, and breaks ties between two ways to build a piece
by position instead of by rank; on text without U+2581 it gives the same ids in practice.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.activity import print_line
from data.errors import DataError
from data.files import sha256_of, write_atomically
from data.storage import AnyPath, StoragePath, as_path
from data.text.cuts import Cuts
from data.text.hf_tokenizer import SPACE, tokenizer_config, tokenizer_json
from data.text.hub import fetched, is_on_hub
from data.text.special_tokens import BOS, EOS, NAMED, PAD, V4_VOCAB_SIZE, special_ids

MODEL_FILE = "tokenizer.model"
HF_FILE = "tokenizer.json"
HF_CONFIG_FILE = "tokenizer_config.json"
_BATCH_CHARACTERS = 1 << 20  # encoded at once, on all cores
_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_ADD_SPACES = {"Metaspace", "Prepend", "Replace"}  # whose pieces have other bytes than the text
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Punctuation or symbols, optionally after whitespace, then line breaks.
_COMBINED = re.compile(r"([^\S\r\n]*(?:[^\w\s\ufffd]|_)+)([\r\n]+)")


def tokenizer_file(path: str | AnyPath) -> AnyPath:
    """The file that defines the tokenizer at `path`, a folder or the file itself.

    Raises DataError where there is none.
    """
    path = as_path(path)
    if isinstance(path, StoragePath) and is_on_hub(path):
        path = fetched(path)
    try:
        if path.is_file():
            return path
        for name in (MODEL_FILE, HF_FILE):
            if (path / name).is_file():
                return path / name
    except (FileNotFoundError, PermissionError) as error:  # of a bucket
        raise DataError(f"the tokenizer at {path}: {error.strerror}.") from error
    raise DataError(
        f"no tokenizer at {path}: expected {MODEL_FILE} or {HF_FILE} there; "
        "train one with `v4 tokenizer train CONFIG`."
    )


class Tokenizer:
    """Encodes and decodes text.

    Attributes:
        vocab_size: number of ids, special tokens included.
        hash: sha256 of the defining file, which includes the special tokens.
        special: written form -> id of every special token.
        bos_id, eos_id, pad_id: ids; pad_id is eos_id where an imported tokenizer has no pad.

    Raises DataError where the file is missing, damaged, or not a tokenizer.
    """

    def __init__(self, path: str | AnyPath) -> None:
        self.path = tokenizer_file(path)
        self.hash = sha256_of(self.path)
        self._json = _read_hf(self.path) if self.path.suffix == ".json" else _read_model(self.path)
        self._full = _engine(self._json, self.path)
        # The same merges without the added tokens, whose spellings are then plain text.
        self._plain = _engine(self._json | {"added_tokens": [], "post_processor": None}, self.path)
        self._cuts = Cuts(self._json, self._plain)
        added = self._json.get("added_tokens", [])
        self.special: dict[str, int] = {token["content"]: token["id"] for token in added}
        self.vocab_size: int = 1 + max(self._full.get_vocab(with_added_tokens=True).values())
        for token in (BOS, EOS):
            if token not in self.special:
                raise DataError(f"{self.path} has no special token {token}; V4 models need it.")
        self.bos_id = self.special[BOS]
        self.eos_id = self.special[EOS]
        self.pad_id = self.special.get(PAD, self.eos_id)

    def check_vocab_size(self, expected: int) -> None:
        """Raises DataError where a SentencePiece model has another size than `expected`.

        `v4 tokenizer train` makes exactly that size; tokenizers of other origin have their own.
        """
        if self.path.name == MODEL_FILE and self.vocab_size != expected:
            raise DataError(
                f"data.tokenizer.vocab_size is {expected}, and the tokenizer in {self.path} has "
                f"{self.vocab_size} ids; set it to {self.vocab_size}, or train another tokenizer "
                "in another data.tokenizer.path."
            )

    def check_special_tokens(self, wanted: Sequence[str], purpose: str) -> None:
        """Raises DataError where the tokenizer lacks a token; warns of ids that V4 has not.

        Arguments:
            wanted: written forms, which `purpose` needs.
        """
        if missing := [token for token in wanted if token not in self.special]:
            raise DataError(
                f"{self.path} has no special token {', '.join(missing)}; {purpose} need "
                f"{'it' if len(missing) == 1 else 'them'}."
            )
        official = special_ids(V4_VOCAB_SIZE)
        ids = [(token, self.special.get(token, official[token])) for token in NAMED]
        others = [(token, i) for token, i in ids if i != official[token]]
        if others and self.path.name == HF_FILE and self.vocab_size > official[NAMED[0]]:
            token, number = others[0]
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            print_line(
                f"v4: warning: {self.path} has {token} at {number}{more}, and DeepSeek-V4 at "
                f"{official[token]}: its ids are not those of released models",
                sys.stderr,
            )

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of `text`, without bos and eos.

        The spelling of a special token is plain text unless `allow_special`. Raises DataError where
        `text` has a lone surrogate, which UTF-8 cannot encode.
        """
        return self.encode_batch([text], allow_special)[0]

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        """The ids of many texts as by `encode`, on all cores."""
        engine = self._full if allow_special else self._plain
        try:
            encodings = engine.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise _surrogate_error(texts) from error
        return [encoding.ids for encoding in encodings]

    def encode_parts(self, texts: Iterable[str]) -> Iterator[list[NDArray[np.int32]]]:
        """Yields the ids of each text as by `encode`, in one or more arrays.

        Long texts are encoded in parts: the memory that the library needs is that of
        `_BATCH_CHARACTERS`, however long a text is.
        """
        ids: list[NDArray[np.int32]] = []
        for batch in _batches(self._parts(texts)):
            encodings = self.encode_batch([part for part, _ in batch])
            for (_, is_last), encoding in zip(batch, encodings, strict=True):
                ids.append(np.array(encoding, dtype=np.int32))
                if is_last:
                    yield ids
                    ids = []

    def _parts(self, texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """The parts of the texts, and whether a part is the last of its text."""
        for text in texts:
            parts = self._cuts.parts(text)
            part = next(parts)
            for following in parts:
                yield part, False
                part = following
            yield part, True

    def decode(self, ids: Sequence[int], hide_special: bool = False) -> str:
        """The text of `ids`; an incomplete character becomes U+FFFD.

        With special tokens, or, if `hide_special`, without those that transformers hides.
        """
        return self._full.decode(list(ids), skip_special_tokens=hide_special)

    def splittable(self) -> dict[int, tuple[int, int]]:
        """The tokens that join punctuation and line breaks, each with the two ids it splits into.

        `":\\n"` splits into `":"` and `"\\n"`: the pair decodes to the text of the token. Tokens
        whose halves are not single tokens are not included. Source: DeepSeek-V3 report §4.1, where
        such tokens are split at random against the token boundary bias of prompts.
        """
        special = set(self.special.values())
        ids = [i for i in range(self.vocab_size) if i not in special]
        texts = self._full.decode_batch([[i] for i in ids], skip_special_tokens=False)
        combined = [
            (i, match.groups())
            for i, text in zip(ids, texts, strict=True)
            if (match := _COMBINED.fullmatch(text)) is not None
        ]
        halves = iter(self.encode_batch([half for _, pair in combined for half in pair]))
        table = {}
        for (i, _), left, right in zip(combined, halves, halves, strict=True):
            if len(left) == len(right) == 1:
                table[i] = (left[0], right[0])
        return table

    def byte_lengths(self) -> NDArray[np.int64] | None:
        """Bytes of text [V] that each id stands for, 0 for special tokens; V vocabulary.

        None for an imported tokenizer whose ids do not add up to the bytes of a text.
        """
        spec = self._json
        kinds = {part["type"] for name in _PARTS for part in _parts_of(spec.get(name))}
        is_byte_level = "ByteLevel" in kinds
        has_bytes = is_byte_level or spec["model"].get("byte_fallback", False)
        if not has_bytes or kinds & _ADD_SPACES:
            return None
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, number in spec["model"]["vocab"].items():
            if is_byte_level:  # a character for each byte
                lengths[number] = len(piece)
            else:
                lengths[number] = 1 if _BYTE.fullmatch(piece) else len(piece.encode())
        lengths[list(self.special.values())] = 0
        return lengths

    def copy_to(self, folder: str | AnyPath) -> None:
        """Writes the defining file, and the config beside a tokenizer.json: an equal tokenizer.

        Raises DataError where the file has changed since it was opened, or cannot be written.
        """
        folder, content = as_path(folder), self.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.hash:
            raise DataError(f"{self.path} has changed since it was opened; run the command again.")
        is_hf = self.path.suffix == ".json"
        companion = self.path.with_name(HF_CONFIG_FILE)
        if is_hf and companion.is_file():
            write_atomically(folder / HF_CONFIG_FILE, companion.read_bytes())
        write_atomically(folder / (HF_FILE if is_hf else MODEL_FILE), content)

    def difference(self, other: "Tokenizer") -> str | None:
        """Returns a reason why `other` gives other ids for some text; None if there is none.

        What transformers adds to the ids of a text, and hides of it, does not count.
        """
        if self.hash == other.hash:
            return None
        ours, theirs = (t._full.get_vocab(with_added_tokens=True) for t in (self, other))
        for token, _ in sorted({**theirs, **ours}.items(), key=lambda item: item[1]):
            if ours.get(token) != theirs.get(token):
                there, here = (str(ids.get(token, "no token")) for ids in (theirs, ours))
                return f"{token!r} is {there} there and {here} here"
        if self.special != other.special:
            return "they mark other tokens as special"
        ours, theirs = (json.loads(tokenizer._full.to_str()) for tokenizer in (self, other))
        for part in ("normalizer", "pre_tokenizer", "model"):
            if ours[part] != theirs[part]:
                return f"the part `{part}` of their tokenizer.json differs"
        return None

    def export_hf(self, folder: str | AnyPath, max_length: int) -> None:
        """Writes the files of `transformers.AutoTokenizer` and the SentencePiece model.

        `max_length`: maximum of tokens that the model reads. The files of an imported tokenizer are
        copied as they are.
        """
        folder = as_path(folder)
        if self.path.suffix == ".json":
            companion = self.path.with_name(HF_CONFIG_FILE)
            config = companion.read_bytes() if companion.is_file() else None
            write_atomically(folder / HF_FILE, self.path.read_bytes())
        else:
            config = None
            write_atomically(folder / MODEL_FILE, self.path.read_bytes())
            write_atomically(folder / HF_FILE, _dump(self._json))
        config = config or _dump(tokenizer_config(max_length))
        write_atomically(folder / HF_CONFIG_FILE, config)


def _parts_of(part: Any) -> list[dict[str, Any]]:
    """The members of a part of a tokenizer.json, which may be a sequence or missing."""
    if part is None:
        return []
    members = next(
        (part[n] for n in ("normalizers", "pretokenizers", "decoders") if n in part), None
    )
    return [part] if members is None else [inner for one in members for inner in _parts_of(one)]


def _batches(parts: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Yields parts together, about `_BATCH_CHARACTERS` of them."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part[0])
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def _surrogate_error(texts: Sequence[str]) -> DataError:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            return DataError(f"text {number} is a {type(text).__name__}; expected a string.")
        for position, character in enumerate(text):
            if "\ud800" <= character <= "\udfff":
                return DataError(
                    f"text {number} has the lone surrogate U+{ord(character):04X} at character "
                    f"{position}, which is not valid Unicode text."
                )
    return DataError("the text cannot be encoded.")


def _engine(spec: dict[str, Any], path: AnyPath) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is not a tokenizer that can be loaded: {error}.") from error


def _read_hf(path: AnyPath) -> dict[str, Any]:
    try:
        spec = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise DataError(f"{path} is not a tokenizer.json: it has no `model` object.")
    return spec


def sentencepiece_schema() -> Any:
    """The generated protobuf classes of SentencePiece's model file."""
    return import_module("sentencepiece.sentencepiece_model_pb2")


def _read_model(path: AnyPath) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece model made by `train_tokenizer`.

    Raises DataError for any other file.
    """
    from google.protobuf.message import DecodeError

    schema = sentencepiece_schema()
    try:
        model = schema.ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise DataError(f"{path} is damaged: it is not a whole SentencePiece model.") from error
    written = [piece.piece for piece in model.pieces]
    trained = model.trainer_spec
    if trained.model_type != schema.TrainerSpec.BPE or not trained.byte_fallback:
        raise DataError(f"{path} is not a SentencePiece BPE model with byte fallback.")
    special = special_ids(len(written))
    if any(i >= len(written) or i < 0 or written[i] != token for token, i in special.items()):
        raise DataError(
            f"{path} does not have V4's special tokens at their ids; "
            "train one with `v4 tokenizer train CONFIG`."
        )
    pieces = [piece if piece in special else piece.replace(SPACE, " ") for piece in written]
    normal = schema.ModelProto.SentencePiece.NORMAL
    ordinary = [p.piece.replace(SPACE, " ") for p in model.pieces if p.type == normal]
    if len(set(pieces)) != len(pieces):
        raise DataError(f"{path} is damaged: it has a piece twice.")
    return tokenizer_json(pieces, ordinary, special)
