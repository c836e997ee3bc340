"""VCR (Zellers et al. 2019, "From Recognition to Cognition"): questions about film scenes, answers to choose among.

Source, as visualcommonsense.com has it:
  train.jsonl, val.jsonl    a question a line; words are texts, or lists of places in "objects"
  vcr1images/               the images, under the names in "img_fn"

Design choices:
- val becomes OUT/test: the labels of the test images are not published, and test.jsonl is left out.
- Things are written by name and number, counted from 1 through "objects", as the people who wrote the questions saw
  them: [0] is "person1" and [0, 2] is "person1 and dog3". The names themselves are in the field "objects".
- The right answer is under "qa" too, as text, so that what reads open questions reads these.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Unpack

from data_pipeline.importers.annotations import BadRowError, json_lines, need, need_id
from data_pipeline.importers.gather import Gathered, Options, find_annotations, run_import
from data_pipeline.importers.image import read_image
from data_pipeline.importers.questions import Asked, multiple_choice, open_question
from data_pipeline.importers.split import Imported

PARTS = {"train": "train", "val": "test"}


def import_vcr(source: Path, out: Path, **options: Unpack[Options]) -> Imported:
    """Write the images of `source` with their questions into out/train and out/test.

    `options` and errors: see `gather.Options` and `gather.run_import`.
    """
    return run_import("vcr", source, out, options, gather_vcr, read_image)


def gather_vcr(source: Path, found: Gathered) -> None:
    """Every image with a question, of train and of val."""
    found.source = "VCR"
    files = find_annotations(source, ["train.jsonl", "val.jsonl"], [".", "vcr1annots"], "train.jsonl and vcr1images/")
    root = source.parent if source.is_file() else source
    folder = found.folder(root / "vcr1images", root.parent / "vcr1images")
    for path in files:
        if path.stem not in PARTS:
            raise ValueError(f"{path} is not called train.jsonl or val.jsonl, which are those with labels")
        asked = Asked(found)
        for where, question in json_lines(path, found.skip):
            with found.skipping():
                name, objects = need(question, "img_fn", str, where), _texts(question, "objects", where)
                text = sentence(need(question, "question", list, where), objects, where)
                number = need_id(question, "annot_id", where)
                choices, answer = _choices(question, "answer", objects, where)
                rationales, rationale = _choices(question, "rationale", objects, where)
                shown = asked.image(name, folder, name, name, PARTS[path.stem])
                if shown is not None:
                    shown.metadata.setdefault("objects", objects)
                    shown.qa.append(open_question(text, choices[answer], id=number, kind="multiple choice"))
                    shown.choice.append(multiple_choice(text, choices, answer, rationales, rationale, id=number))
        asked.finish()


def sentence(words: list[Any], objects: list[str], where: str) -> str:
    """The text of a list of words, in which things are lists of places in `objects`; BadRowError for anything else."""
    texts = []
    for word in words:
        if isinstance(word, str):
            texts.append(word)
        elif isinstance(word, list) and word and all(type(at) is int and 0 <= at < len(objects) for at in word):
            names = [f"{objects[at]}{at + 1}" for at in word]
            texts.append(" and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0])
        else:
            raise BadRowError(where, f"{str(word)[:40]} is neither a word nor a list of places in 'objects'")
    text = re.sub(r"\s+([.,?!;:%)])", r"\1", " ".join(texts))
    return re.sub(r"\s*(['’])\s*(s|t|re|ve|ll|d|m)\b", r"\1\2", text)


def _choices(question: dict[str, Any], kind: str, objects: list[str], where: str) -> tuple[list[str], int]:
    """(the answers or rationales to choose from, the place of the right one)."""
    lists = need(question, f"{kind}_choices", list, where)
    label = need(question, f"{kind}_label", int, where)
    if not all(isinstance(words, list) for words in lists):
        raise BadRowError(where, f"'{kind}_choices' holds something else than lists of words")
    if not 0 <= label < len(lists):
        raise BadRowError(where, f"'{kind}_label' is {label}, of {len(lists)} choices")
    return [sentence(words, objects, where) for words in lists], label


def _texts(question: dict[str, Any], name: str, where: str) -> list[str]:
    texts = need(question, name, list, where)
    if not all(isinstance(text, str) for text in texts):
        raise BadRowError(where, f"{name!r} holds something else than texts")
    return texts
