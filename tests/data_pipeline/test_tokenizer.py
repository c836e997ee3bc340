"""The tokenizer: lossless, deterministic, never without EOS, and picky about what it loads."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.tokenizer import BOS, EOS, LONGEST_TOKEN, MARKERS, MASK, PAD, Tokenizer

CAPTIONS = [
    f"a {size} {colour} {shape} {where} a {other} square"
    for size in ("small", "large")
    for colour in ("red", "green", "blue")
    for shape in ("circle", "triangle")
    for where in ("above", "left of")
    for other in ("yellow", "grey")
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, vocab_size=400)


@pytest.mark.parametrize(
    "text",
    [
        "a small red circle above a grey square",
        "ALL Caps, and  two spaces\n\ttabs ",
        " leading space",
        "čeština, Ελληνικά, 日本語, العربية, עברית, हिन्दी",
        "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u00e9 \u200b \ufeff \x00 \x7f \U0010ffff \ufffd",
        "literal <eos> and <pad><bos><mask> markers",
        "".join(chr(code) for code in range(0x20, 0x3000, 7)),
    ],
)
def test_any_text_comes_back_unchanged(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, context=8000)
    assert tokenizer.decode(ids) == text
    assert ids.max() < tokenizer.vocab_size
    assert (ids == EOS).sum() == 1  # a written "<eos>" is text, not the end
    assert (ids == BOS).sum() == 1
    assert (ids == MASK).sum() == 0


def test_random_code_points_come_back_unchanged(tokenizer: Tokenizer) -> None:
    generator = np.random.default_rng(5)
    for _ in range(50):
        codes = generator.integers(0, 0x110000, size=40)
        text = "".join(chr(code) for code in codes if not 0xD800 <= code <= 0xDFFF)
        assert tokenizer.decode(tokenizer.encode(text, context=400)) == text


def test_layout_of_a_row(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a red circle", context=32)
    assert ids.shape == (32,)
    assert ids.dtype == np.int32
    assert ids[0] == BOS
    end = int(np.flatnonzero(ids == EOS)[0])
    assert (ids[1:end] >= len(MARKERS)).all()
    assert (ids[end + 1 :] == PAD).all()


def test_empty_caption_is_bos_eos(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("", context=5).tolist() == [BOS, EOS, PAD, PAD, PAD]
    assert tokenizer.encode("", context=2).tolist() == [BOS, EOS]


@pytest.mark.parametrize("context", [2, 3, 4, 7, 16, 64])
@pytest.mark.parametrize("text", ["x" * 500, "日本語" * 100, "a red circle " * 40])
def test_truncation_keeps_eos_and_the_beginning(tokenizer: Tokenizer, text: str, context: int) -> None:
    ids = tokenizer.encode(text, context)
    whole = tokenizer.encode(text, 4000)
    assert ids[0] == BOS
    assert ids[-1] == EOS
    assert (ids[:-1] == whole[: context - 1]).all()


def test_exact_fit_is_not_truncated(tokenizer: Tokenizer) -> None:
    text = "a small red circle"
    length = int(np.flatnonzero(tokenizer.encode(text, 100) == EOS)[0]) + 1
    assert tokenizer.decode(tokenizer.encode(text, length)) == text
    assert tokenizer.decode(tokenizer.encode(text, length - 1)) != text


def test_batch_equals_rows(tokenizer: Tokenizer) -> None:
    texts = ["", "a red circle", "日本語 " * 20]
    batch = tokenizer.encode_batch(texts, 12)
    assert batch.dtype == np.int32
    assert batch.tolist() == [tokenizer.encode(text, 12).tolist() for text in texts]
    assert tokenizer.encode_batch([], 12).shape == (0, 12)


def test_merges_were_learnt(tokenizer: Tokenizer) -> None:
    text = CAPTIONS[0]
    tokens = int((tokenizer.encode(text, 200) >= len(MARKERS)).sum())
    assert tokens <= len(text.split())  # every word of the training captions is one token by now
    assert 260 < tokenizer.vocab_size <= 400


def test_training_is_the_same_in_another_process_and_order(tokenizer: Tokenizer) -> None:
    program = (
        "import sys, json; from data_pipeline.tokenizer import Tokenizer;"
        "sys.stdout.write(Tokenizer.train(json.load(sys.stdin), 400).to_json())"
    )
    for captions in (CAPTIONS, CAPTIONS[::-1]):
        fresh = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(captions),
            capture_output=True,
            text=True,
            check=True,
        )
        assert fresh.stdout == tokenizer.to_json()
    assert Tokenizer.train(iter(CAPTIONS), 400).to_json() == tokenizer.to_json()


def test_save_and_load(tokenizer: Tokenizer, tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = Tokenizer.load(path)
    assert again.to_json() == tokenizer.to_json() == path.read_text(encoding="utf-8")
    assert again.encode("red <eos>", 20).tolist() == tokenizer.encode("red <eos>", 20).tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_goes_to_a_worker_unchanged(tokenizer: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("red <eos>", 20).tolist() == tokenizer.encode("red <eos>", 20).tolist()


def test_smallest_vocabulary() -> None:
    assert Tokenizer.train(CAPTIONS, 260).vocab_size == 260
    with pytest.raises(ValueError, match=r"259.*260"):
        Tokenizer.train(CAPTIONS, 259)


def test_no_captions_and_small_context_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no caption"):
        Tokenizer.train([], 300)
    with pytest.raises(ValueError, match="context is 1"):
        tokenizer.encode("red", 1)


def test_half_a_character_is_bad_data(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="lone surrogate at character 4"):
        tokenizer.encode("red \ud800", 20)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x04\x95pickle", "codec can't decode"),
        (b"not json", "does not hold JSON"),
        (b"[1, 2]", "does not describe a BPE"),
        (b'{"model": {"type": "WordPiece"}}', "does not describe a BPE"),
        (b'{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Whitespace"}}', "not byte-level"),
        (
            b'{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"},'
            b' "added_tokens": [{"id": 50256, "content": "<|endoftext|>"}]}',
            "special tokens",
        ),
        (
            b'{"model": {"type": "BPE", "vocab": 3}, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens":'
            b' [{"id": 0, "content": "<pad>"}, {"id": 1, "content": "<eos>"}, {"id": 2, "content": "<bos>"},'
            b' {"id": 3, "content": "<mask>"}]}',
            "vocabulary is damaged",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, content: bytes, reason: str) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"other\.json is not a weft tokenizer: .*{reason}"):
        Tokenizer.load(path)


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Tokenizer.load(tmp_path / "nowhere.json")


def test_captions_of_megabytes_and_of_nothing_but_one_letter_are_bounded() -> None:
    captions = ["x" * 3_000_000, "word " * 500_000, "a\0b\0" * 9, "\U0001f468\u200d" * 300_000, " " * 1_000_000]
    tokenizer = Tokenizer.train(captions, 400)
    assert tokenizer._longest <= LONGEST_TOKEN
    for caption in captions:
        ids = tokenizer.encode(caption, 77)
        assert ids[-1] in (PAD, EOS)
        assert caption.startswith(tokenizer.decode(ids).rstrip("\ufffd"))
    assert tokenizer.decode(tokenizer.encode(captions[2], 77)) == captions[2]
    with pytest.raises(DataError) as caught:
        tokenizer.encode("\ud800" + "y" * 100_000, 77)
    assert len(str(caught.value)) < 300
