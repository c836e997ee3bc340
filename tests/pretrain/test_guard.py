"""Steps that change nothing are counted, and end a run when too many come in a row."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from layout_cases import made_up_batch, recipe_of
from ranks import run_ranks

from pretrain.checkpoint.format import step_folder
from pretrain.errors import DivergedError, WeftError
from pretrain.guard import LEAST, Guard
from pretrain.parallel.build import build_model
from pretrain.parallel.engine import Engine, Stepped
from pretrain.parallel.groups import start_ranks, stop_ranks
from pretrain.parallel.layout import lay_out
from pretrain.sections import Train

RUN = Path("runs/some")


def stepped(loss: float = 1.0, grad_norm: float = 1.0) -> Stepped:
    return Stepped(loss, {"contrastive": loss}, grad_norm, 14.3)


def test_a_run_ends_after_too_many_bad_steps_in_a_row() -> None:
    guard = Guard(Train(max_skipped=2), RUN)
    for step, norm in enumerate([1.0, math.inf, math.nan, 1.0, math.inf, math.inf]):
        guard.judge(stepped(grad_norm=norm), step)
    assert guard.skipped == 4
    with pytest.raises(
        WeftError,
        match=r"step 7: the loss is nan and the gradient norm inf; the last 3 steps were skip.*is no good checkpoint",
    ):
        guard.judge(stepped(math.nan, math.inf), 7)


def test_none_is_allowed_where_the_recipe_says_so() -> None:
    with pytest.raises(WeftError, match="step 1:"):
        Guard(Train(max_skipped=0), RUN).judge(stepped(grad_norm=math.inf), 1)


def test_a_spike_is_measured_against_the_losses_of_late() -> None:
    guard = Guard(Train(spike=3.0), RUN)
    for step in range(LEAST):
        assert guard.loss_limit == math.inf
        guard.judge(stepped(loss=2.0 + step % 3), step)
    assert guard.loss_limit == pytest.approx(3.0 * 3.0)
    for step in range(200):
        guard.judge(stepped(loss=1.0), step)
    assert guard.loss_limit == pytest.approx(3.0), "the first losses are forgotten"
    guard.judge(stepped(loss=50.0, grad_norm=math.inf), 300)
    assert guard.loss_limit == pytest.approx(3.0), "a step that changed nothing is no measure"
    assert Guard(Train(), RUN).loss_limit == math.inf


def test_what_it_remembers_survives_a_stop() -> None:
    guard = Guard(Train(spike=3.0, max_skipped=2), RUN)
    for step in range(LEAST):
        guard.judge(stepped(loss=2.0), step)
    for _ in range(2):
        guard.judge(stepped(loss=50.0, grad_norm=math.inf), LEAST)
    again = Guard(Train(spike=3.0, max_skipped=2), RUN, json.loads(json.dumps(guard.memory())))
    assert (again.loss_limit, again.skipped) == (6.0, 2)
    with pytest.raises(WeftError, match=r"above train\.spike=3 times the median.* a larger train\.spike"):
        again.judge(stepped(loss=50.0, grad_norm=math.inf), LEAST)


def test_a_run_that_ends_with_a_bad_batch_has_not_diverged() -> None:
    guard = Guard(Train(spike=3.0), RUN)
    for step in range(LEAST):
        guard.judge(stepped(loss=2.0), step)
    guard.judge(stepped(loss=50.0, grad_norm=math.inf), LEAST)
    again = Guard(Train(spike=3.0), RUN, json.loads(json.dumps(guard.memory())))
    assert (guard.problem, again.problem, again.steady) == ("", "", False)
    again.judge(stepped(math.nan, math.nan), LEAST + 1)
    assert again.problem == "the last 2 steps were skipped, because the loss or its gradients were not finite"
    again.judge(stepped(), LEAST + 2)
    assert again.problem == ""


@pytest.mark.parametrize(
    ("loss", "bad_from", "steps", "advice"),
    [
        (math.nan, 5, [2, 4], "step_00000002"),  # step 4 left the weights that give this loss
        (math.inf, 6, [2, 4], "step_00000004"),
        (math.nan, 2, [1], None),
        (math.nan, 4, [1, 5], "step_00000001"),  # of a run that was told to stop in between
        (1.0, 5, [2, 4], "step_00000004"),  # the gradients of one batch: the weights are good
    ],
)
def test_the_advice_is_a_checkpoint_whose_loss_is_finite(
    tmp_path: Path, loss: float, bad_from: int, steps: list[int], advice: str | None
) -> None:
    for step in steps:
        folder = step_folder(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "checkpoint.json").write_text("{}")
    guard = Guard(Train(max_skipped=2), tmp_path)
    for step in range(1, bad_from + 2):
        guard.judge(stepped() if step < bad_from else stepped(loss, math.inf), step)
    with pytest.raises(DivergedError) as ended:
        guard.judge(stepped(loss, math.inf), bad_from + 2)
    found = str(ended.value).partition("train.init_from=")[2]
    assert found == (str(step_folder(tmp_path, int(advice[-8:])).resolve()) if advice else "")
    assert advice or "no good checkpoint from before: start again in another run.dir with a lower" in str(ended.value)
    assert ended.value.good == advice


def test_weights_that_a_run_began_with_may_be_what_is_wrong() -> None:
    guard = Guard(Train(max_skipped=0, init_from=Path("runs/other")), RUN)
    with pytest.raises(WeftError, match=r"start again in another run\.dir with .*other weights than .*runs/other"):
        guard.judge(stepped(math.nan, math.nan), 1)


CASES: dict[int, list[tuple[str, list[str]]]] = {
    1: [
        ("contrastive", ["layout.zero=0"]),
        ("contrastive", ["layout.zero=1"]),
        ("contrastive", ["train.precision=bf16"]),
        ("contrastive", ["train.micro_batch=4"]),
        ("caption", ["train.micro_batch=4"]),
    ],
    2: [
        ("contrastive", ["layout.zero=2"]),
        ("contrastive", ["layout.zero=3"]),
        ("contrastive", ["layout.tp=2"]),
        ("contrastive", ["layout.pp=2", "train.micro_batch=4"]),
        ("caption", ["layout.zero=3", "train.micro_batch=4"]),
        ("caption", ["layout.pp=2", "train.micro_batch=4"]),
    ],
}


def train_with_bad_steps(rank: int, world: int) -> list[list[list[float]]]:
    """Of each case: [whether it updated, gradient norm, loss] of a good step, a spike, a poisoned and a good step."""
    found = []
    for model, overrides in CASES[world]:
        recipe = recipe_of(model, overrides)
        layout = lay_out(recipe, world)
        ranks = start_ranks(layout, torch.device("cpu"))
        engine = Engine(build_model(recipe, layout, ranks), recipe, layout, ranks)
        first = ranks.dp_rank * layout.share
        batch = made_up_batch(0).rows(slice(first, first + layout.share))
        steps = [engine.step(batch, 1e-3)]
        steps.append(engine.step(batch, 1e-3, loss_limit=0.01))
        if layout.zero < 3:  # there a parameter is a piece that is gathered when it is used
            parameter = next(engine.model.parameters()).data
            kept = parameter.clone()
            parameter.fill_(math.nan)
            steps.append(engine.step(batch, 1e-3))
            parameter.copy_(kept)
        steps.append(engine.step(batch, 1e-3))
        found.append([[float(each.updated), each.grad_norm, each.loss] for each in steps])
        engine.close()
        stop_ranks(ranks)
    return found


@pytest.mark.parametrize("world", CASES)
def test_a_bad_step_changes_nothing_under_any_layout(world: int) -> None:
    for rank in run_ranks(train_with_bad_steps, world, timeout=900):
        for case, (good, spike, *poisoned, after) in zip(CASES[world], rank, strict=True):
            assert good[0] == 1, case
            assert spike[0] == 0, f"{case}: a loss above the limit"
            assert [each[0] for each in poisoned] == [0.0] * len(poisoned), f"{case}: nan in a weight"
            assert after[0] == 1, case
            # the batch is the same: had one of the bad steps moved anything, it would not be one good step further
            assert spike[2] == pytest.approx(after[2], abs=1e-5), case
            assert after[2] < good[2], case
