"""Byte-level BPE, trained on the captions of the data set it will read.

Design choices:
- Byte-level (GPT-2): the alphabet is the 256 bytes, so any Unicode text goes in and comes out unchanged, and
  nothing is ever out of vocabulary. No normalisation and no lower-casing, for the same reason.
- Ids 0 to 3 are PAD, EOS, BOS, MASK, the 256 bytes follow, then the merges. PAD = 0 makes padding `zeros`.
- A text becomes BOS tokens... EOS PAD... Truncation cuts the tokens and never EOS: a tower that pools at EOS
  always finds it. An empty caption is BOS EOS.
- "<eos>" written inside a caption is text and not the end: markers are known by id only.
- Training depends on the captions alone: the same captions give the same file, byte for byte, in any process.
- The file is the plain JSON of Hugging Face `tokenizers`, so other tools read it too. Nothing is pickled.

Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units"; Radford et al. 2019, GPT-2.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.strict_json import read_json

# Loader workers are forked from a process that has trained or used a tokenizer. Threads of `tokenizers` do not
# survive a fork, and it would say so in every worker: parallelism is the workers' business. A user's own
# setting stands. Set before the import, which reads it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_pipeline.errors import DataError, first_line

PAD, EOS, BOS, MASK = 0, 1, 2, 3
MARKERS = ("<pad>", "<eos>", "<bos>", "<mask>")  # position = id
MOST_CHARACTERS = 10_000  # of a caption to learn from: BPE takes seconds for a book
LONGEST_TOKEN = 64  # bytes: without a bound, one text of 10,000 equal letters makes a token of half of them
SMALLEST_VOCABULARY = len(MARKERS) + 256


class Tokenizer:
    """Text to token ids and back, losslessly; make one with `Tokenizer.train` or `Tokenizer.load`."""

    def __init__(self, definition: str) -> None:
        """Build from the JSON text that `to_json` gives; ValueError when it is something else."""
        _refuse_foreign(definition)
        try:
            self._bpe = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises nothing narrower for a damaged vocabulary
            raise ValueError(f"its vocabulary is damaged ({first_line(error)})") from error
        # Markers inside a caption are text. The JSON does not hold this flag, so it is set here.
        self._bpe.encode_special_tokens = True
        self._longest = max(len(token) for token in self._bpe.get_vocab())  # bytes; a character is at least one

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from captions, up to `vocab_size` ids (fewer when fewer pairs occur twice).

        Raises ValueError when vocab_size < 260 (4 markers, 256 bytes), DataError when there is no caption.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size is {vocab_size}, but 4 markers and 256 bytes already need "
                f"{SMALLEST_VOCABULARY}: give {SMALLEST_VOCABULARY} or more"
            )
        texts = [_well_formed(caption[:MOST_CHARACTERS]) for caption in captions]
        if not texts:
            raise DataError("there is no caption to train the tokenizer on: the data set has no text")
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,  # a pair seen once teaches a name, not a language
            special_tokens=list(MARKERS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            max_token_length=LONGEST_TOKEN,
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe.to_str(pretty=True))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what `save` wrote; FileNotFoundError when there is none, ValueError for any other file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}: there is no such file")
        try:
            return cls(path.read_text(encoding="utf-8"))
        except ValueError as error:  # UnicodeDecodeError is one too
            raise ValueError(f"{path} is not a weft tokenizer: {first_line(error)}") from error

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON; the file appears whole or not at all."""
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.tmp")
        try:
            unfinished.write_text(self.to_json(), encoding="utf-8")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def to_json(self) -> str:
        """The whole tokenizer as JSON text; equal texts are equal tokenizers."""
        return self._bpe.to_str(pretty=True)

    @property
    def vocab_size(self) -> int:
        """Number of ids, markers included: every id is in [0, vocab_size)."""
        return self._bpe.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, context: int) -> np.ndarray:
        """Text -> int32 [context]: BOS tokens... EOS PAD..., cut to fit but never without EOS.

        Raises ValueError when context < 2, DataError when the text holds a lone surrogate.
        """
        if context < 2:
            raise ValueError(f"context is {context}, but BOS and EOS already take 2: give 2 or more")
        # no token is longer than the longest, so what lies behind this many characters would be cut anyway
        tokens = self._bpe.encode(_well_formed(text[: context * self._longest])).ids[: context - 2]
        ids = np.full(context, PAD, dtype=np.int32)
        ids[0] = BOS
        ids[1 : 1 + len(tokens)] = tokens
        ids[1 + len(tokens)] = EOS
        return ids

    def encode_batch(self, texts: Sequence[str], context: int) -> np.ndarray:
        """Texts -> int32 [len(texts), context], each row as `encode` gives it."""
        if not texts:
            return np.zeros((0, context), dtype=np.int32)
        return np.stack([self.encode(text, context) for text in texts])

    def length(self, text: str) -> int:
        """How many ids the first MOST_CHARACTERS of a text take before any is cut, BOS and EOS included."""
        return len(self._bpe.encode(_well_formed(text[:MOST_CHARACTERS])).ids) + 2

    def decode(self, ids: Iterable[int]) -> str:
        """Token ids -> text, markers left out; a character cut in half by truncation becomes U+FFFD."""
        return self._bpe.decode([int(token) for token in ids if token >= len(MARKERS)])

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str]]:
        return Tokenizer, (self.to_json(),)


def _well_formed(text: str) -> str:
    """The text itself, or DataError: JSON may smuggle in half a surrogate pair, which UTF-8 cannot hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"caption {text[:40]!r} holds a lone surrogate at character {error.start}: it is not well-formed Unicode"
        ) from error
    return text


def _refuse_foreign(definition: str) -> None:
    """ValueError unless the JSON text is a byte-level BPE with our four markers at ids 0 to 3."""
    try:
        tree: Any = read_json(definition)
    except ValueError as error:
        raise ValueError(f"it does not hold JSON ({error})") from error
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise ValueError("its JSON does not describe a BPE model")
    if (tree.get("pre_tokenizer") or {}).get("type") != "ByteLevel":
        raise ValueError("its BPE is not byte-level, so it could not hold every text")
    markers = {token["id"]: token["content"] for token in tree.get("added_tokens") or []}
    if markers != dict(enumerate(MARKERS)):
        raise ValueError(f"its special tokens are {markers}, not {dict(enumerate(MARKERS))}")
