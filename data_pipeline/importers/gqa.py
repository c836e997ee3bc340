"""GQA (Hudson and Manning 2019): questions about real scenes that take several steps of reasoning to answer.

Source, as cs.stanford.edu/people/dorarad/gqa has it, the files here or in questions/:
  train_balanced_questions.json, val_balanced_questions.json, testdev_balanced_questions.json
      {"02930152": {"question", "answer", "fullAnswer", "imageId", "types", ...}}
  images/2354786.jpg

Design choices:
- testdev becomes OUT/test, val OUT/val: the answers of GQA's own test are not published.
- A question file is over a gigabyte and most of it is programs of reasoning, which are not taken. It is read one
  question at a time.
- `kind` is the structural type: verify, query, choose, logical or compare.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from data_pipeline.importers.annotations import BadRowError, json_members, need
from data_pipeline.importers.gather import Gathered, Options, find_annotations, run_import
from data_pipeline.importers.image import read_image
from data_pipeline.importers.questions import Asked, open_question
from data_pipeline.importers.split import Imported

PARTS = {"train": "train", "val": "val", "testdev": "test"}
FILES = "*_balanced_questions.json"


def import_gqa(source: Path, out: Path, **options: Unpack[Options]) -> Imported:
    """Write the images of `source` with their questions into out/train, out/val and out/test.

    `options` and errors: see `gather.Options` and `gather.run_import`.
    """
    return run_import("gqa", source, out, options, gather_gqa, read_image)


def gather_gqa(source: Path, found: Gathered) -> None:
    """Every image with an answered question."""
    found.source = "GQA balanced"
    files = find_annotations(source, [FILES], [".", "questions", "questions1.2"], f"{FILES} and images/")
    root = source.parent if source.is_file() else source
    folder = found.folder(root / "images", root.parent / "images")
    for path in files:
        part = PARTS.get(path.name.partition("_")[0])
        if part is None:
            found.skip(path.name, "is of a set without published answers")
        else:
            _gather_set(path, part, folder, found)


def _gather_set(path: Path, part: str, folder: Path, found: Gathered) -> None:
    asked = Asked(found)
    for number, question in json_members(path):
        where = f"{path}, question {number}"
        with found.skipping():
            if not isinstance(question, dict):
                raise BadRowError(where, "is no object")
            image = need(question, "imageId", str, where)
            shown = asked.image(f"{image}.jpg", folder, f"{image}.jpg", image, part)
            if shown is not None:
                text, answer = need(question, "question", str, where), need(question, "answer", str, where)
                shown.qa.append(_question(number, text, answer, question))
    asked.finish()


def _question(number: str, text: str, answer: str, question: dict[str, Any]) -> dict[str, Any]:
    types = question.get("types")
    kind = types.get("structural") if isinstance(types, dict) else None
    asked = open_question(text, answer, id=number, kind=kind if isinstance(kind, str) else None)
    full = question.get("fullAnswer")
    return {**asked, "full_answer": full} if isinstance(full, str) else asked
