"""The texts of a sample: its captions in json and txt, and every other text in them, to read and to change.

What is written back is the json field with its keys in the order they had, and a txt field that is the first caption
again where it was one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.filters.step import Change, Drop, Outcome
from data_pipeline.sample import Sample

# in scripts without blanks between words (kana, Chinese characters, Thai, Lao, Burmese, Khmer) a letter counts as one
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
    r"|[^\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)


def words_of(text: str) -> list[str]:
    """The words of a text; letters, in scripts that put no blanks between words."""
    return _WORD.findall(text)


def keep_captions(sample: Sample, judge: Callable[[str], Drop | None]) -> Outcome:
    """Take bad captions out of a sample, and drop the sample when all of its captions are bad.

    `judge` says what is wrong with one caption, or None. A sample without captions stays.
    """
    captions = sample.captions()
    found = [judge(caption) for caption in captions]
    bad = [drop for drop in found if drop is not None]
    if not bad:
        return None
    if len(bad) == len(captions):
        more = f", as are its other {len(bad) - 1} captions" if len(bad) > 1 else ""
        return Drop(bad[0].reason, bad[0].detail + more)
    kept = [caption for caption, drop in zip(captions, found, strict=True) if drop is None]
    fields = {**sample.fields, "json": dump(sample.metadata() | {"captions": kept})}
    if "txt" in fields and _text(sample, "txt").strip() not in kept:
        fields["txt"] = kept[0].encode("utf-8")
    return Change(Sample(sample.key, fields), tuple(dict.fromkeys(f"caption removed: {drop.reason}" for drop in bad)))


def replace_texts(sample: Sample, change: Callable[[str], str], but: tuple[str, ...]) -> Sample:
    """The sample with every text in its txt and json fields changed; json values under a key in `but` stay."""
    fields = dict(sample.fields)
    for name in sample.fields:
        extension = name.rpartition(".")[2]
        if extension == "txt":
            text = _text(sample, name)
            changed = change(text)
            if changed != text:
                fields[name] = changed.encode("utf-8")
        elif extension == "json":
            tree = Sample(sample.key, {"json": sample.fields[name]}).metadata()
            changed_tree = _replace(tree, change, but)
            if changed_tree != tree:
                fields[name] = dump(changed_tree)
    return sample if fields == sample.fields else Sample(sample.key, fields)


def dump(metadata: dict[str, Any]) -> bytes:
    """Metadata as the bytes of a json field."""
    return json.dumps(metadata, ensure_ascii=False).encode("utf-8", "backslashreplace")  # of half characters


def _replace(tree: Any, change: Callable[[str], str], but: tuple[str, ...]) -> Any:
    if isinstance(tree, str):
        return change(tree)
    if isinstance(tree, list):
        return [_replace(item, change, but) for item in tree]
    if isinstance(tree, dict):
        return {key: value if key in but else _replace(value, change, but) for key, value in tree.items()}
    return tree


def _text(sample: Sample, name: str) -> str:
    try:
        return sample.fields[name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"the {name} field of sample {sample.key!r} is not UTF-8 ({error})") from error
