"""Training of the SentencePiece model on a bounded sample of the sources.

SentencePiece runs with identity normalisation, no dummy prefix and no removal of spaces; every
digit is a token; runs of spaces may be pieces, so that indentation is cheap. The result is the same
for the same texts on any machine. Where the sample cannot fill the vocabulary (a 128K vocabulary on
a small corpus), the remaining ids get unused pieces that no text encodes to, so that the special
tokens still have V4's ids.
"""

import io
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from data.activity import Activity, print_line
from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.files import write_atomically
from data.lease import Lease
from data.prepare.tokenizer_sample import sample_texts
from data.storage import AnyPath, as_path
from data.text import (
    BOS,
    EDGES,
    EOS,
    HF_FILE,
    MODEL_FILE,
    PAD,
    PAD_ID,
    SPACE,
    Tokenizer,
    base_size,
    is_on_hub,
    sentencepiece_schema,
    special_ids,
)

_CHUNK_CHARACTERS = 2048  # SentencePiece is fed lines joined up to this length
_MAX_LINE = 1 << 16  # characters; a longer line is cut


def train_tokenizer(config: DataConfig, overwrite: bool = False) -> AnyPath:
    """Trains on the train split of `config.sources`; returns the model file.

    A tokenizer that is there is replaced only with `overwrite`: shards and models are of no use
    without theirs.

    The sample is the `sample_bytes` worth of documents with the lowest hashes, of all that is read
    (tokenizer_sample.py): a random sample that does not depend on the order of small files. With
    `config.source_weights` every source contributes its share of these bytes, or all it has.

    Raises DataError where the corpus is empty or cannot be read, the vocabulary is too small for
    the characters of the sample, there is a tokenizer, the folder cannot be written, or another
    process is working in it.
    """
    folder = as_path(config.tokenizer.path)
    if is_on_hub(folder):
        raise DataError(
            f"data.tokenizer.path = {folder} is a released tokenizer, which is used as it is; to "
            "train one, name a folder."
        )
    if not overwrite:
        _check_is_new(folder)
    with Lease(folder, "v4 tokenizer train"):
        if not overwrite:
            _check_is_new(folder)  # written in the meantime
        return _train(config, folder)


def _train(config: DataConfig, folder: AnyPath) -> AnyPath:
    for name in config.without_weight(config.source_weights):
        print_line(f"data.source_weights does not name {name}: it is not in the sample")
    sample = sample_texts(config)
    if not sample:
        raise DataError("the sources hold no document to train a tokenizer on.")
    millions = sum(len(text) for text in sample) / 1e6
    with Activity(f"training the tokenizer on {millions:,.1f} M characters"), _ended_by_interrupt():
        model = train_model(sample, config.tokenizer)
    path = folder / MODEL_FILE
    write_atomically(path, model)
    Tokenizer(path)  # raises where the model is not usable
    return path


def _check_is_new(folder: AnyPath) -> None:
    files = (folder, folder / MODEL_FILE, folder / HF_FILE)
    existing = [file for file in files if file.is_file()]
    if existing:
        raise DataError(
            f"{existing[0]} is there already, and shards and runs that were made with it need it; "
            "set another data.tokenizer.path, or replace it with --overwrite."
        )


@contextmanager
def _ended_by_interrupt() -> Iterator[None]:
    """Lets Ctrl-C end the process at once: SentencePiece returns to Python only when it is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def train_model(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """The serialised SentencePiece model of `texts`, with the special tokens at their ids."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chunks(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=base_size(config.vocab_size),
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=config.character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 30,
            shuffle_input_sentence=False,
            num_threads=1,
            bos_id=0,
            eos_id=1,
            unk_id=PAD_ID,  # SentencePiece requires an unknown piece; byte fallback never uses it
            pad_id=-1,
            bos_piece=BOS,
            eos_piece=EOS,
            unk_piece=PAD,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"SentencePiece cannot train vocab_size {config.vocab_size} on this sample: "
            f"{' '.join(str(error).split())}"
        ) from error
    return _with_special_tokens(model.getvalue(), config.vocab_size)


def _with_special_tokens(serialised: bytes, vocab_size: int) -> bytes:
    """Adds unused pieces and then the special tokens, at their ids."""
    schema = sentencepiece_schema()
    kind = schema.ModelProto.SentencePiece
    model = schema.ModelProto.FromString(serialised)
    for i in range(len(model.pieces), base_size(vocab_size)):
        model.pieces.add(piece=f"<｜unused▁{i}｜>", score=0.0, type=kind.UNUSED)
    for token, i in special_ids(vocab_size).items():
        if token not in EDGES:
            assert i == len(model.pieces)
            model.pieces.add(piece=token, score=0.0, type=kind.CONTROL)
    model.trainer_spec.vocab_size = vocab_size
    return model.SerializeToString(deterministic=True)


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Yields whole lines joined to about `_CHUNK_CHARACTERS`, their line ends included."""
    for text in texts:
        chunk: list[str] = []
        length = 0
        for line in text.replace(SPACE, " ").splitlines(keepends=True):
            chunk.append(line[:_MAX_LINE])
            length += len(chunk[-1])
            if length >= _CHUNK_CHARACTERS:
                yield "".join(chunk)
                chunk, length = [], 0
        if chunk:
            yield "".join(chunk)
