"""Lossless for any text, and the same ids as transformers gives."""

import json
import random
import signal
from pathlib import Path

import pytest
import sentencepiece

from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.lease import Lease
from data.prepare import tokenizer_training
from data.prepare.corpus import Document
from data.prepare.run import prepare
from data.prepare.tokenizer_sample import lowest_hashes
from data.prepare.tokenizer_training import train_model, train_tokenizer
from data.text.special_tokens import BOS, EOS
from data.text.tokenizer import Tokenizer

NASTY = [
    "",
    " ",
    "   leading and trailing   ",
    "a▁b ▁ c▁ d▁▁ ▁",
    "NUL \x00 and \x01\x1f\x7f\x85",
    "tabs\t\tand\r\nline\rends\n\n\n",
    "👩‍👩‍👧 é é \u0301\u0301 ﷽ ﬁ Å Å",
    "<think>plain</think> ｜DSML｜ <｜User｜>",
    "<0xE2><0x96>",
    "\ufeffbom \ufffe\uffff \U0010ffff",
]


@pytest.fixture(scope="module")
def hf(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    """The exported tokenizer as AutoTokenizer loads it, with a V4 config.json next to it."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("hf")
    tokenizer.export_hf(folder, max_length=4096)
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v4"}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("allow_special", [False, True])
def test_round_trip_of_nasty_text(tokenizer: Tokenizer, text: str, allow_special: bool) -> None:
    assert tokenizer.decode(tokenizer.encode(text, allow_special)) == text


def test_round_trip_of_any_text(tokenizer: Tokenizer, any_text) -> None:
    rng = random.Random(1)
    texts = [any_text(rng) for _ in range(2000)]
    for allow_special in (False, True):
        for text, ids in zip(texts, tokenizer.encode_batch(texts, allow_special), strict=True):
            assert tokenizer.decode(ids) == text


def test_round_trip_of_every_character(tokenizer: Tokenizer) -> None:
    everything = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    texts = ["".join(map(chr, everything[i : i + 4096])) for i in range(0, len(everything), 4096)]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


def test_the_bytes_of_ids_add_up_to_those_of_any_text(tokenizer: Tokenizer, any_text) -> None:
    lengths = tokenizer.byte_lengths()
    assert lengths is not None and not lengths[list(tokenizer.special.values())].any()
    rng = random.Random(2)
    for text in [*NASTY, *(any_text(rng) for _ in range(500))]:
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("kind", ["byte level", "Llama", "words"])
def test_the_bytes_of_ids_of_imported_tokenizers(kind: str, tmp_path: Path) -> None:
    """Of GPT's kind, as the released V4 has; others put spaces in front, or have no bytes."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Library

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(letters)} | {"th": len(letters)}
    model = models.BPE(vocab, [("t", "h")], byte_fallback=kind == "Llama")
    library = Library(models.WordLevel(vocab, unk_token="a") if kind == "words" else model)
    if kind == "byte level":
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        library.decoder = decoders.ByteLevel()
    elif kind == "Llama":
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁")])
    library.add_special_tokens([AddedToken(name) for name in (BOS, EOS)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    lengths = tokenizer.byte_lengths()
    assert (lengths is None) == (kind != "byte level")
    if lengths is not None:
        for text in NASTY:
            assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_special_spellings_are_text_unless_allowed(tokenizer: Tokenizer) -> None:
    text = "a<think>b</think>｜DSML｜"
    special = set(tokenizer.special.values())
    assert not special & set(tokenizer.encode(text))
    parsed = tokenizer.encode(text, allow_special=True)
    names = ("<think>", "</think>", "｜DSML｜")
    assert [i for i in parsed if i in special] == [tokenizer.special[name] for name in names]


def test_transformers_gives_the_same_ids(tokenizer: Tokenizer, hf, any_text, documents) -> None:
    rng = random.Random(2)
    texts = [any_text(rng) for _ in range(2000)] + NASTY + documents
    theirs = hf(texts, add_special_tokens=False).input_ids
    ours = tokenizer.encode_batch(texts, allow_special=True)
    assert theirs == ours
    assert [hf.decode(ids) for ids in ours] == texts
    assert len(hf) == tokenizer.vocab_size


def test_transformers_adds_no_token_as_in_the_released_files(tokenizer: Tokenizer, hf) -> None:
    """Whoever makes the prompt writes bos: the official encoder, for example."""
    ids = tokenizer.encode("x y")
    assert hf("x y").input_ids == hf.encode("x y") == ids
    assert hf("<｜begin▁of▁sentence｜>x y").input_ids == [tokenizer.bos_id, *ids]
    assert hf("x", "y").input_ids == [*tokenizer.encode("x"), *tokenizer.encode("y")]
    assert (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id) == (0, 1, 1)
    assert hf.model_max_length == 4096
    first, second = hf(["x y", "x y x y"], padding=True).input_ids
    assert first == [*ids, *[tokenizer.eos_id] * (len(second) - len(ids))] != ids


def test_transformers_decodes_any_ids_alike(tokenizer: Tokenizer, hf) -> None:
    rng = random.Random(3)
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(12))]
        assert hf.decode(ids) == tokenizer.decode(ids)


def test_sentencepiece_agrees_on_real_text(tokenizer: Tokenizer, documents: list[str]) -> None:
    """The file is an ordinary SentencePiece model, for programs that read those."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert processor.encode(documents) == tokenizer.encode_batch(documents)
    assert processor.piece_to_id("<think>") == tokenizer.special["<think>"]


def test_digits_stand_alone(tmp_path: Path) -> None:
    """However often a number occurs, and whatever stands before it."""
    model = train_model(["in 2024 or x2024\n"] * 500, TokenizerConfig(path="", vocab_size=384))
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = Tokenizer(tmp_path)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2024")] == list("2024")
    assert len(tokenizer.encode(" 2024")) == 5


def test_split_tokens_decode_to_the_same_text(tokenizer: Tokenizer, documents: list[str]) -> None:
    """Exactly the tokens that end with punctuation and ends of lines, by another way to find."""
    table = tokenizer.splittable()
    assert ":\n" in {tokenizer.decode([i]) for i in table}
    for i, pair in table.items():
        left, right = map(tokenizer.decode, ([pair[0]], [pair[1]]))
        assert left + right == tokenizer.decode(pair) == tokenizer.decode([i])
        assert not left.strip().isalnum() and left.rstrip("\r\n") == left
        assert right.strip("\r\n") == "" != right
    for text, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
        split = [part for i in ids for part in table.get(i, (i,))]
        assert tokenizer.decode(split) == text
        ends = [tokenizer.decode([i]) for i in ids if i not in table]
        assert not any(end[-1:] == "\n" and end[:-1] in set(":,.)({[]};") for end in ends)


def test_training_is_deterministic(config: DataConfig, documents: list[str]) -> None:
    first = train_model(documents[:20], config.tokenizer)
    assert first == train_model(documents[:20], config.tokenizer)


def test_of_documents_that_exceed_the_limit_one_is_cut() -> None:
    documents = [Document(f"{number} " * 60) for number in range(4)]
    (text,) = lowest_hashes(documents, 100)
    assert len(text) == 100 and any(document.text.startswith(text) for document in documents)


def test_sources_give_their_weights_of_thelowest_hashes(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = []
    for name in "abc":
        lines = [json.dumps({"text": f"{name}{i:04d} " * 20}) + "\n" for i in range(400)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        sources.append({"name": name, "paths": [str(tmp_path / f"{name}.jsonl")]})
    seen: list[str] = []

    def keep(texts: list[str], settings: TokenizerConfig) -> bytes:
        seen.extend(texts)
        return train_model(texts, settings)

    monkeypatch.setattr("data.prepare.tokenizer_training.train_model", keep)
    settings = {"path": str(tmp_path / "t"), "vocab_size": 400, "sample_bytes": 20_000}
    update = {"sources": sources, "source_weights": {"a": 3.0, "b": 1.0}, "tokenizer": settings}
    train_tokenizer(DataConfig.model_validate(config.model_dump() | update))
    sizes = {name: sum(len(t) for t in seen if t[0] == name) for name in "abc"}
    assert sizes == {"a": 15_000 // 120 * 120, "b": 5_000 // 120 * 120, "c": 0}
    update["source_weights"] = {"a": 1e9, "b": 1.0}
    seen.clear()
    train_tokenizer(DataConfig.model_validate(config.model_dump() | update), overwrite=True)
    assert {text[0] for text in seen} == {"a", "b"}  # no source is left out


def test_exported_folder_loads_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.export_hf(tmp_path, max_length=4096)
    assert Tokenizer(tmp_path).hash == tokenizer.hash
    (tmp_path / "tokenizer.model").unlink()
    imported = Tokenizer(tmp_path)  # only what transformers knows
    text = "def f():\n    return '▁<think>'"
    assert imported.encode(text) == tokenizer.encode(text)
    assert imported.encode(text, True) == tokenizer.encode(text, True)
    assert (imported.vocab_size, imported.special) == (tokenizer.vocab_size, tokenizer.special)


def test_missing_and_damaged_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer at"):
        Tokenizer(tmp_path)
    content = tokenizer.path.read_bytes()
    for damaged in (b"", b"not a model", content[: len(content) // 2], content[:-40]):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(DataError, match=r"tokenizer\.model"):
            Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    for damaged in (b"{", b"[]", b'{"model": {"type": "BPE"}}', b"\xff"):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(DataError, match=r"tokenizer\.json"):
            Tokenizer(tmp_path)


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"text 1 .* U\+D83D at character 2"):
        tokenizer.encode_batch(["fine", "ab\ud83d"])


def test_vocabulary_too_small_for_the_characters(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"text": "".join(map(chr, range(0x4E00, 0x5200)))}) + "\n"
    )
    update = {
        "sources": [{"name": "x", "paths": [str(tmp_path / "t.jsonl")], "split": "train"}],
        "tokenizer": {"path": str(tmp_path / "tok"), "vocab_size": 512, "character_coverage": 1.0},
    }
    small = DataConfig.model_validate(config.model_dump() | update)
    with pytest.raises(DataError, match="vocab_size 512"):
        train_tokenizer(small)
    assert not list(tmp_path.glob("tok/*"))


def test_ctrl_c_ends_the_training_at_once(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SentencePiece would return to Python, and so to its handler, only at the end."""
    handlers = []

    def training(texts: list[str], config: TokenizerConfig) -> bytes:
        handlers.append(signal.getsignal(signal.SIGINT))
        return train_model(texts, config)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(tokenizer_training, "train_model", training)
    place = TokenizerConfig(path=str(tmp_path), vocab_size=config.tokenizer.vocab_size)
    train_tokenizer(config.model_copy(update={"tokenizer": place}))
    assert handlers == [signal.SIG_DFL]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_folder_that_cannot_be_written_is_refused_before_the_corpus_is_read(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    place = TokenizerConfig(path=str(tmp_path / "file" / "tokenizer"), vocab_size=1024)
    monkeypatch.setattr(tokenizer_training, "sample_texts", None)
    with pytest.raises(DataError, match=r"cannot write .*file/tokenizer"):
        train_tokenizer(config.model_copy(update={"tokenizer": place}))


def test_one_training_at_a_time(config: DataConfig, tmp_path: Path) -> None:
    place = TokenizerConfig(path=str(tmp_path / "t"), vocab_size=config.tokenizer.vocab_size)
    config = config.model_copy(update={"tokenizer": place})
    refused = pytest.raises(DataError, match=r"`v4 tokenizer train` \(process \d+")
    with Lease(tmp_path / "t", "v4 tokenizer train"), refused:
        train_tokenizer(config, overwrite=True)
    train_tokenizer(config)
    assert [file.name for file in (tmp_path / "t").iterdir()] == ["tokenizer.model"]


def test_bad_records_are_tolerated_as_in_a_preparation(
    config: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer comes first: what `v4 data prepare` takes does not stop it."""
    good = [json.dumps({"text": f"word{i} " * 20}) for i in range(99)]
    (tmp_path / "a.jsonl").write_text("\n".join([*good[:50], '{"text": null}', *good[50:]]))
    update = {
        "sources": [{"name": "a", "paths": [str(tmp_path / "a.jsonl")]}],
        "tokenizer": {"path": str(tmp_path / "t"), "vocab_size": 400},
    }
    for fraction, message in ((0.0, "line 51 of"), (0.009, r"1 bad records, a fraction of 0\.01")):
        update["max_bad_record_fraction"] = fraction
        with pytest.raises(DataError, match=message):
            train_tokenizer(DataConfig.model_validate(config.model_dump() | update))
    assert not (tmp_path / "t/tokenizer.model").exists()
    update["max_bad_record_fraction"] = 0.01
    train_tokenizer(DataConfig.model_validate(config.model_dump() | update))
    output = capsys.readouterr()
    assert "source 'a': 1 bad records skipped; the first is line 51 of" in output.out + output.err


def test_the_size_is_compared(config: DataConfig, tokenizer: Tokenizer) -> None:
    """An embedding of 5000 ids for a tokenizer of 1024 would be trained without a word."""
    size = tokenizer.vocab_size
    tokenizer.check_vocab_size(size)
    settings = config.tokenizer.model_copy(update={"vocab_size": 5000})
    with pytest.raises(
        DataError, match=f"vocab_size is 5000, and the tokenizer in .* has {size} ids"
    ):
        prepare(config.model_copy(update={"tokenizer": settings}), progress=False)
