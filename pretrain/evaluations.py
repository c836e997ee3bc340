"""The evaluations of a run: when one is due, and what is logged and said of it."""

from __future__ import annotations

from collections.abc import Callable

from data_pipeline import Dataset, Tokenizer
from data_pipeline.index import written_whole
from data_pipeline.strict_json import strict_json
from pretrain.config import Recipe
from pretrain.evaluation.captioning import Reader
from pretrain.evaluation.evaluate import evaluate, summary
from pretrain.evaluation.rounds import Encoder
from pretrain.metrics import EVALUATION, EXAMPLES, RunLog, read_lines
from pretrain.parallel.groups import Ranks
from pretrain.sources import cache_of


class Evaluations:
    """Evaluates at the last step and every `eval.every` steps; every rank calls every method."""

    def __init__(
        self, recipe: Recipe, test: Dataset | None, stop: int, ranks: Ranks, say: Callable[[str], None]
    ) -> None:
        self._recipe, self._test, self._stop, self._ranks, self._say = recipe, test, stop, ranks, say
        self._said: set[str] = set()
        self.problem = ""  # what the last evaluation found wrong with the model

    def due(self, step: int) -> bool:
        """Whether an evaluation belongs to this step."""
        every = self._recipe.eval.every
        regular = every > 0 and step % every == 0 and 0 < step < self._stop
        return self._test is not None and (regular or step == self._stop)

    def missing(self, step: int) -> bool:
        """Whether the one that belongs to a step that was trained and saved was never finished.

        If it was, `problem` is what it found.
        """
        lines = [line for line in read_lines(self._recipe.run.dir / EVALUATION) if line.get("step") == step]
        problem = lines[-1].get("problem") if lines else None
        told: tuple[bool, str] = self._ranks.of_first((self.due(step) and not lines, str(problem or "")))
        missing, self.problem = told
        return missing

    def run(self, model: Encoder | Reader, tokenizer: Tokenizer, step: int, log: RunLog | None) -> None:
        """Evaluate, log it, and say the scores; what has been said once of the test set is not said again."""
        assert self._test is not None, "none is due without a test set"
        recipe = self._recipe
        found = evaluate(
            model,
            self._test,
            tokenizer,
            recipe.model,
            recipe.eval,
            self._ranks,
            memory=cache_of(recipe).folder,
        )
        self.problem = found.problem
        if log is None:
            return
        with written_whole(recipe.run.dir / EXAMPLES) as unfinished:
            unfinished.write_text(strict_json(found.examples) + "\n", encoding="utf-8")
        log.evaluation({"step": step, "samples": step * recipe.train.global_batch, **found.as_tree()})
        self._say(f"step {step}: " + summary(found))
        for note in [*found.notes, *([found.problem] if found.problem else [])]:
            if note not in self._said:
                self._said.add(note)
                self._say(f"  {note}")
