"""VQAv2 (Goyal et al. 2017, "Making the V in VQA Matter"): questions about COCO's images, ten answers each.

Source, as visualqa.org has it:
  v2_OpenEndedQuestions_mscoco_train2014_questions.json    {"questions": [{question_id, image_id, question}]}
  v2_mscoco_train2014_annotations.json                     {"annotations": [{question_id, answers, answer_type, ...}]}
  the same for val2014, and COCO's train2014/ and val2014/ with COCO_train2014_000000000009.jpg, here or in images/
Format: https://visualqa.org/download.html.

Design choices:
- val becomes OUT/test: the answers of the test images are not published.
- The answer is "multiple_choice_answer", which is the most common of the ten; where that is missing, it is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, Unpack

from data_pipeline.importers.annotations import BadRowError, need, need_id, objects, read_json
from data_pipeline.importers.gather import Gathered, Options, find_annotations, run_import
from data_pipeline.importers.image import read_image
from data_pipeline.importers.questions import Asked, open_question
from data_pipeline.importers.split import Imported

PARTS = {"train": "train", "val": "test"}
QUESTIONS = re.compile(r"v2_OpenEndedQuestions_mscoco_((train|val)\d{4})_questions\.json")
ANNOTATIONS = "v2_mscoco_{}_annotations.json"


def import_vqav2(source: Path, out: Path, **options: Unpack[Options]) -> Imported:
    """Write the images of `source` with their questions into out/train and out/test.

    `options` and errors: see `gather.Options` and `gather.run_import`.
    """
    return run_import("vqav2", source, out, options, gather_vqav2, read_image)


def gather_vqav2(source: Path, found: Gathered) -> None:
    """Every image with an answered question, of train and of val."""
    found.source = "VQAv2"
    pattern = "v2_OpenEndedQuestions_mscoco_*_questions.json"
    files = find_annotations(source, [pattern], [".", "questions", "annotations"], f"{pattern} and the annotations")
    root = source.parent if source.is_file() else source
    for path in files:
        match = QUESTIONS.fullmatch(path.name)
        if match:
            folder = found.folder(root / match[1], root / "images" / match[1], root / "images")
            _gather_set(path, match[1], PARTS[match[2]], root, folder, found)
        else:
            found.skip(path.name, "is of a set without published answers")


def _gather_set(path: Path, name: str, part: str, root: Path, folder: Path, found: Gathered) -> None:
    """The images of one set, such as train2014."""
    answers_path = _annotations(path, name, root)
    answers = read_json(answers_path)
    answered: dict[str | int, tuple[str, dict[str, Any]]] = {}
    for where, each in objects(answers, "annotations", answers_path, found.skip):
        with found.skipping():
            answered[need_id(each, "question_id", where)] = where, each
    licence = answers.get("license")
    asked = Asked(found)
    for where, question in objects(read_json(path), "questions", path, found.skip):
        with found.skipping():
            number, image = need_id(question, "question_id", where), need(question, "image_id", int, where)
            text = need(question, "question", str, where)
            if number not in answered:
                raise BadRowError(f"question {number}", f"has no answer in {answers_path.name}")
            asking = _question(number, text, *answered[number])
            file = f"COCO_{name}_{image:012d}.jpg"
            shown = asked.image(file, folder, f"{name}/{file}", image, part)
            if shown is not None:
                shown.qa.append(asking)
    asked.finish(licence.get("name") if isinstance(licence, dict) else None)


def _question(number: str | int, text: str, where: str, annotation: dict[str, Any]) -> dict[str, Any]:
    """A question with its ten answers and the most common of them."""
    answers = [need(answer, "answer", str, place) for place, answer in objects(annotation, "answers", Path(where))]
    if not answers:
        raise BadRowError(where, "has no answer")
    common = annotation.get("multiple_choice_answer")
    answer = common if isinstance(common, str) else Counter(answers).most_common(1)[0][0]
    kind = annotation.get("answer_type")
    return open_question(text, answer, id=number, kind=kind if isinstance(kind, str) else None, answers=answers)


def _annotations(path: Path, name: str, root: Path) -> Path:
    """The file with the answers to the questions at `path`."""
    file = ANNOTATIONS.format(name)
    places = [path.parent / file, *(root / folder / file for folder in (".", "annotations", "answers"))]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise FileNotFoundError(f"there is no {places[0]} with the answers to {path.name}")
    return place
