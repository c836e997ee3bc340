"""What a run folder says about its run, for the report: numbers that are there, None for those that are not.

Nothing here trusts the files beyond config.yaml: a crash may have cut them short, an older version may have written
other keys.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.strict_json import read_json
from pretrain.checkpoint.format import describe
from pretrain.config import Recipe, saved_recipe
from pretrain.errors import RequestError, WeftError
from pretrain.metrics import EVALUATION, METRICS, read_lines
from pretrain.quarantine import QUARANTINE

SURE = 3.0  # standard errors between a score and guessing before it counts
Tree = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """A share of right answers among `count` questions, and what guessing gives."""

    name: str
    value: float | None
    guess: float | None
    count: float | None

    @property
    def verdict(self) -> str:
        """above, below or at guessing, by SURE standard errors; "" when it is not known."""
        if self.value is None or self.guess is None or not self.count:
            return ""
        error = math.sqrt(self.guess * (1 - self.guess) / self.count)
        difference = self.value - self.guess
        return "at" if abs(difference) <= SURE * error else "above" if difference > 0 else "below"


@dataclass(frozen=True)
class Task:
    """What evaluations score: the scores of each of them, oldest first, and which one speaks for all."""

    name: str
    history: list[list[Score]]
    main: int

    @property
    def latest(self) -> list[Score]:
        """The scores of the last evaluation."""
        return self.history[-1]


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says; lists are empty and trees too where a file is missing."""

    folder: Path
    recipe: Recipe
    manifest: Tree
    steps: list[Tree]
    evaluations: list[Tree]
    examples: list[Tree]
    unusable: list[Tree]

    @property
    def done(self) -> int:
        """The last logged step, 0 when there is none."""
        return int(number(self.steps[-1], "step") or 0) if self.steps else 0

    @property
    def goal(self) -> int:
        """The step this run was to end at."""
        train = self.recipe.train
        return min(train.steps, train.stop_at or train.steps)

    @property
    def starts(self) -> list[Tree]:
        """The first start and each resumption."""
        starts = self.manifest.get("starts")
        return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []

    @property
    def newest_checkpoint(self) -> int | None:
        """The step of the checkpoint that a resumption would go on from."""
        try:
            return describe(self.folder).step
        except WeftError:
            return None

    @property
    def evaluated_at(self) -> list[float]:
        """The steps of the evaluations."""
        return [number(line, "step") or 0.0 for line in self.evaluations]

    @property
    def told_of_test_set(self) -> tuple[str, list[str]]:
        """What the last evaluation says of the model ("" where all is well), and of its test set."""
        line = self.evaluations[-1] if self.evaluations else {}
        notes = line.get("notes")
        listed = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
        return str(line.get("problem") or ""), listed

    @property
    def tasks(self) -> list[Task]:
        """What the evaluations score, R@10 and top-1 first in rank; [] when there is no evaluation."""
        tasks = [
            Task("Image to text", [_retrieval(line, "image_to_text") for line in self.evaluations], main=2),
            Task("Text to image", [_retrieval(line, "text_to_image") for line in self.evaluations], main=2),
            Task("Zero-shot", [_zero_shot(line) for line in self.evaluations], main=0),
        ]
        return [task for task in tasks if any(score.value is not None for line in task.history for score in line)]

    def last(self, name: str) -> float | None:
        """A number of the last logged step."""
        return number(self.steps[-1], name) if self.steps else None

    @property
    def loss_is_not_finite(self) -> bool:
        """Whether that is what the null of the last logged step stands for."""
        return bool(self.steps) and self.steps[-1].get("loss", 0) is None

    def series(self, name: str) -> list[tuple[float, float | None]]:
        """(step, number or None) of every logged step."""
        return [(number(line, "step") or 0.0, number(line, name)) for line in self.steps]

    def median(self, name: str) -> float | None:
        """Of a number over the logged steps that have it."""
        values = [value for _, value in self.series(name) if value is not None]
        return statistics.median(values) if values else None

    def seconds(self) -> float | None:
        """Time from each start to the last step logged before the next one; None when that is not known."""
        times = [time for line in self.steps if (time := number(line, "time"))]
        begun = [time for start in self.starts if (time := number(start, "time"))]
        spans = []
        for begin, end in pairwise([*begun, math.inf]):
            within = [time for time in times if begin <= time < end]
            spans += [max(within) - begin] if within else []
        return sum(spans) if spans else None

    def guessed_loss(self) -> float | None:
        """The loss of a model that knows nothing: ln(global batch) for InfoNCE; None with another objective."""
        objectives = self.recipe.objectives
        if any(objective.name != "contrastive" for objective in objectives):
            return None
        return sum(objective.weight for objective in objectives) * math.log(self.recipe.train.global_batch)


def read_run(run: Path) -> RunRecord:
    """Everything the page needs of a run folder; RequestError when it is none."""
    if not run.is_dir():
        raise RequestError(f"{run} is no run folder: there is no such folder")
    for name in ("config.yaml", METRICS):
        if not (run / name).is_file():
            raise RequestError(f"{run} is no run folder: there is no {name} in it")
    manifest = _json(run / "manifest.json")
    examples = _json(run / "examples.json")
    return RunRecord(
        run,
        saved_recipe(run / "config.yaml"),
        manifest if isinstance(manifest, dict) else {},
        _with_step(read_lines(run / METRICS)),
        _with_step(read_lines(run / EVALUATION)),
        [each for each in examples if isinstance(each, dict)] if isinstance(examples, list) else [],
        [line for line in read_lines(run / QUARANTINE) if isinstance(line, dict)],
    )


def number(tree: Any, *path: str) -> float | None:
    """The finite number at a path of keys; None when there is none."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    right = isinstance(tree, int | float) and not isinstance(tree, bool) and math.isfinite(tree)
    return float(tree) if right else None


def _json(path: Path) -> Any:
    """None for a file that is missing or that a crash cut short."""
    try:
        return read_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _with_step(lines: list[Tree]) -> list[Tree]:
    return [line for line in lines if number(line, "step") is not None]


def _retrieval(evaluation: Tree, way: str) -> list[Score]:
    """R@1, R@5, R@10 of one way of an evaluation."""
    images, captions = number(evaluation, "retrieval", "images"), number(evaluation, "retrieval", "distinct_captions")
    if images is None:  # an early version knew one caption an image, and told R@10 of guessing alone
        images, captions = (number(evaluation, "retrieval", name) for name in ("pictures", "captions"))
    scores = []
    for k in (1, 5, 10):
        guess = number(evaluation, "retrieval", "chance", way, f"r{k}")
        if k == 10 and guess is None:
            guess = number(evaluation, "retrieval", "chance", way)
        value = number(evaluation, "retrieval", way, f"r{k}")
        scores.append(Score(f"R@{k}", value, guess, images if way == "image_to_text" else captions))
    return scores


def _zero_shot(evaluation: Tree) -> list[Score]:
    """Top-1 and top-5 of an evaluation."""
    classes, images = number(evaluation, "zero_shot", "classes"), number(evaluation, "zero_shot", "images")
    if images is None:
        images = number(evaluation, "zero_shot", "pictures")
    scores = []
    for k in (1, 5):
        guess = min(1.0, k / classes) if classes else None
        scores.append(Score(f"top-{k}", number(evaluation, "zero_shot", f"top{k}"), guess, images))
    return scores
