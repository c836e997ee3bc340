"""What question sets have in common: one sample an image, with all its questions, in the form of `scenes.questions`.

The form, in a sample's json field:
  qa       [{question, answer, kind?, answers?, id}]                   the answer as text
  choice   [{question, choices, answer, rationales, rationale, id}]    answer and rationale as places in the lists

Design choices:
- Data sets ask several questions of an image, so that an image is stored once and a reader draws among its questions.
- The captions of such a sample are its questions, each with its answer behind it: text that belongs to the image, for
  whatever trains on captions. Each caption once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.importers.annotations import clean
from data_pipeline.importers.gather import Gathered

Metadata = dict[str, Any]


@dataclass
class AskedImage:
    """An image and what is asked about it; `id` is the data set's own name for it."""

    name: str
    place: Path
    id: str | int
    part: str | None
    qa: list[dict[str, Any]] = field(default_factory=list)
    choice: list[dict[str, Any]] = field(default_factory=list)
    metadata: Metadata = field(default_factory=dict)


@dataclass
class Asked:
    """The images of a question set, as its questions name them one by one."""

    found: Gathered
    images: dict[str, AskedImage | None] = field(default_factory=dict)

    def image(self, written: str, folder: Path, name: str, id: str | int, part: str | None) -> AskedImage | None:
        """The image that a question is about; None, told once, when it is missing or refused."""
        if name not in self.images:
            place = self.found.file(written, folder, name)
            self.images[name] = None if place is None else AskedImage(name, place, id, part)
        return self.images[name]

    def finish(self, licence: str | None = None) -> None:
        """Hand every image with its questions on; one whose questions were all left out has been told with them."""
        for image in self.images.values():
            if image is not None and image.qa:
                captions = dict.fromkeys(f"{each['question']} {each['answer']}" for each in image.qa)
                self.found.add(
                    image.name,
                    image.place,
                    captions,
                    id=image.id,
                    part=image.part,
                    licence=licence,
                    qa=image.qa or None,
                    choice=image.choice or None,
                    **image.metadata,
                )


def open_question(
    question: str, answer: str, *, id: str | int, kind: str | None = None, answers: Iterable[str] = ()
) -> dict[str, Any]:
    """A question of the list "qa"; `answers`: what all that were asked said, the most common being `answer`."""
    known = {"kind": kind, "question": clean(question), "answer": clean(answer), "answers": [*map(clean, answers)]}
    return {name: value for name, value in known.items() if value not in (None, [])} | {"id": id}


def multiple_choice(
    question: str, choices: Sequence[str], answer: int, rationales: Sequence[str], rationale: int, *, id: str | int
) -> dict[str, Any]:
    """A question of the list "choice"; `answer` and `rationale` are places in the lists before them."""
    return {
        "question": clean(question),
        "choices": [*map(clean, choices)],
        "answer": answer,
        "rationales": [*map(clean, rationales)],
        "rationale": rationale,
        "id": id,
    }
