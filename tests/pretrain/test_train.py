"""The training loop where something goes wrong or is begun from something: in process, one rank, a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline import DataError, Tokenizer
from data_pipeline.scenes.synth import synthesise
from pretrain.certificate import compare_orders
from pretrain.checkpoint.format import (
    LATEST,
    checksum_of,
    checksum_of_description,
    complete_steps,
    describe,
    find_checkpoint,
)
from pretrain.checkpoint.warm_start import find_warm_start
from pretrain.config import load_recipe, recipe_of
from pretrain.errors import RequestError, WeftError
from pretrain.metrics import read_lines
from pretrain.parallel.engine import Engine
from pretrain.report import write_report
from pretrain.run_folder import load_config
from pretrain.signals import stop_on_signal
from pretrain.train import train

TINY = [
    "model.vision={layers: 1, width: 32, heads: 2, image_size: 32, patch: 16, mlp_ratio: 2}",
    "model.text={layers: 1, width: 32, heads: 2, context: 16, vocab_size: 300, mlp_ratio: 2}",
    "model.embed_dim=16",
    "train={steps: 6, global_batch: 8, warmup: 1, log_every: 1, lr: 1.0e-3, watchdog: 0}",
    "checkpoint.every=2",
    "eval={every: 0, samples: 16, batch: 8}",
    "data.workers=0",
    "data.test=null",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    synthesise(folder, train=40, test=16, size=32, sound=False, processes=1)
    return folder


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with its checkpoints of steps 4 and 6; not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert go(data, run) == 0
    return run


def go(data: Path, run: Path, *more: str) -> int:
    recipe = load_recipe("quickstart", [f"data.train={data / 'train'}", f"run.dir={run}", *TINY, *more])
    return train(recipe, "weft train again")


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in complete_steps(run / "checkpoints")]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(path) / "weight.safetensors")


# --- an evaluation


@pytest.mark.parametrize("every", [2, 100])
@pytest.mark.parametrize("error", [WeftError("no usable samples"), DataError("damaged"), RuntimeError("unexpected")])
def test_an_evaluation_that_fails_costs_no_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Engine, "encode_image", fail)
    test = [f"data.test={data / 'test'}", "eval.every=2", f"checkpoint.every={every}"]
    for done in (2, 4):  # and the next start goes on behind it
        with pytest.raises(type(error)):
            go(data, tmp_path / "run", *test)
        assert steps(tmp_path / "run")[-1] == done


@pytest.mark.parametrize(("stop", "number"), [(2, signal.SIGTERM), (6, signal.SIGTERM), (2, signal.SIGHUP)])
def test_a_stop_signal_ends_an_evaluation_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, number: signal.Signals
) -> None:
    encode = Engine.encode_image

    def told(self: Engine, image: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), number)
        return encode(self, image)

    monkeypatch.setattr(Engine, "encode_image", told)
    every = 2 if stop == 2 else 0
    run = tmp_path / "run"
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored where nohup has started the tests
    try:
        code = go(data, run, f"data.test={data / 'test'}", f"eval.every={every}", "checkpoint.every=100")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 128 + number
    assert steps(run) == [stop]
    assert read_lines(run / "evaluation.jsonl") == []


def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with stop_on_signal() as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_last_evaluation_that_is_missing_is_made_up_for(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, test = tmp_path / "run", [f"data.test={data / 'test'}", "train.steps=2", "eval.every=0"]
    assert go(data, run, *test) == 0
    scored, saved = read_lines(run / "evaluation.jsonl"), (find_checkpoint(run) / "checkpoint.json").stat().st_mtime_ns
    assert [line["step"] for line in scored] == [2]
    (run / "evaluation.jsonl").write_text("")
    assert go(data, run, *test) == 0
    assert read_lines(run / "evaluation.jsonl") == scored
    assert (find_checkpoint(run) / "checkpoint.json").stat().st_mtime_ns == saved, "nothing is saved anew"
    capsys.readouterr()
    assert go(data, run, *test) == 0
    assert "nothing to do" in capsys.readouterr().err


# --- `latest`


def as_copied_folder(checkpoints: Path) -> None:
    (checkpoints / LATEST).unlink()
    shutil.copytree(checkpoints / "step_00000004", checkpoints / LATEST)


def as_file(checkpoints: Path) -> None:
    (checkpoints / LATEST).unlink()
    (checkpoints / LATEST).write_text("step_00000004\n")


def dangling(checkpoints: Path) -> None:
    (checkpoints / LATEST).unlink()
    (checkpoints / LATEST).symlink_to("step_00000099")


def lost(checkpoints: Path) -> None:
    (checkpoints / LATEST).unlink()


def without_sense(checkpoints: Path) -> None:
    (checkpoints / LATEST).unlink()
    (checkpoints / LATEST).write_bytes(b"\xff\x00")


def empty_folder(checkpoints: Path) -> None:
    (checkpoints / LATEST).unlink()
    (checkpoints / LATEST).mkdir()


@pytest.mark.parametrize(
    ("change", "step"),
    [(as_copied_folder, 4), (as_file, 4), (dangling, 6), (lost, 6), (without_sense, 6), (empty_folder, 6)],
    ids=lambda each: getattr(each, "__name__", each),
)
@pytest.mark.parametrize("links", [True, False])
def test_latest_may_be_anything_and_is_put_right_by_the_next_save(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, step: int, links: bool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    change(run / "checkpoints")
    assert describe(run).step == step
    if step == 6 and links:
        return  # nothing is left to train
    if step == 6:
        shutil.rmtree(run / "checkpoints" / "step_00000006")
    if not links:

        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "symlink", refuse)
    assert go(data, run) == 0
    assert describe(run).step == 6
    latest = run / "checkpoints" / LATEST
    if links:
        assert latest.readlink() == Path("step_00000006")
    else:
        assert latest.read_text() == "step_00000006\n"
    assert sorted(path.name for path in latest.parent.iterdir()) == [LATEST, "step_00000004", "step_00000006"]


# --- a warm start


def test_a_run_begins_with_the_weights_of_another(data: Path, finished: Path, tmp_path: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(finished, source, symlinks=True)
    more = [f"train.init_from={source}", "train.steps=12", "train.lr=1e-9", "train.warmup=0", "train.stop_at=1"]
    assert go(data, run, *more) == 0
    begun, theirs = weights(run), weights(source)
    assert begun.keys() == theirs.keys()
    for name, tensor in begun.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=0)
    assert describe(run).updates == 1
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["init_from"]["step"] == 6
    assert manifest["init_from"]["path"] == str(find_checkpoint(source))
    tokenizers = [(each / "tokenizer.json").read_text() for each in (run, source)]
    assert tokenizers[0] == tokenizers[1]
    shutil.rmtree(source)  # from now on the run's own checkpoint counts
    assert go(data, run, "train.init_from=elsewhere", *more[1:-1], "train.stop_at=2") == 0
    assert go(data, run, *more[1:-1]) == 0, "it is not read when it resumes"
    assert describe(run).step == 12
    for recipe in (load_config(run).train, recipe_of(describe(run).recipe, "").train):
        assert recipe.init_from == source, "and what it began with is still said"
    assert json.loads((run / "manifest.json").read_text())["init_from"] == manifest["init_from"]


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_tower_is_taken_over_and_frozen(data: Path, finished: Path, tmp_path: Path, zero: int) -> None:
    run = tmp_path / "run"
    more = [f"train.init_from={finished}", "train.init_only=[vision.]", "train.freeze=[vision.]", "train.steps=2"]
    assert go(data, run, *more, f"layout.zero={zero}", "run.seed=5", "model.text.width=48") == 0
    begun, theirs = weights(run), weights(finished)
    towers = {name: torch.equal(tensor, theirs[name]) for name, tensor in begun.items()}
    assert all(equal for name, equal in towers.items() if name.startswith("vision."))
    assert not any(equal for name, equal in towers.items() if name.startswith("text."))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model.vision.width=48"], r"vision\.patches\.linear\.weight is \[32, .*\] in .* and \[48, "),
        (["model.vision.layers=2"], r"vision\.block\.layers\.1.* is missing in .*more\).*init_only"),
        (["train.init_only=[visual.]"], r"begins with 'visual\.' \(did you mean 'vision\.'\?\)"),
        (["train.init_from=nowhere"], "train.init_from: no checkpoint at nowhere"),
        (["model.text.heads=4"], r"of another model \(model\.text\.heads=2 there, 4 here\).*init_only"),
        (["model.text.causal=false", "train.init_only=[text.]"], r"model\.text\.causal=True there, False here"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    data: Path, finished: Path, tmp_path: Path, more: list[str], said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        go(data, tmp_path / "run", f"train.init_from={finished}", *more)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_of_another_kind_of_model_are_refused_by_it(finished: Path) -> None:
    more = ["model.kind=captioner", "objectives=[{name: caption}]", f"train.init_from={finished}"]
    with pytest.raises(RequestError, match=r"model\.kind=dual there, captioner here"):
        find_warm_start(load_recipe("quickstart", more))


def test_a_part_that_is_not_taken_may_have_other_heads_and_tokens(data: Path, finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    Tokenizer.train(["something else"], 260).save(other)
    more = ["train.init_only=[vision., text.positions]", "model.text.heads=4", f"data.tokenizer={other}"]
    assert go(data, tmp_path / "run", f"train.init_from={finished}", *more, "train.steps=2") == 0
    assert (tmp_path / "run" / "tokenizer.json").read_text() == other.read_text()


def test_another_tokenizer_than_the_token_table_s_is_refused(data: Path, finished: Path, tmp_path: Path) -> None:
    other, same = tmp_path / "other.json", tmp_path / "same.json"
    Tokenizer.train(["something else"], 260).save(other)
    same.write_text(json.dumps(json.loads((finished / "tokenizer.json").read_text()), indent=3))
    warm = [f"train.init_from={finished}", "train.steps=4", "train.stop_at=2"]
    with pytest.raises(
        RequestError, match=rf"data\.tokenizer is {other}, but .*/finished/.* another tokenizer.*init_only"
    ):
        go(data, tmp_path / "run", *warm, f"data.tokenizer={other}")
    assert go(data, tmp_path / "run", *warm, f"data.tokenizer={same}") == 0
    config = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(RequestError, match=rf"data\.tokenizer is {other}, but .*/run/.* another tokenizer.*run\.dir"):
        go(data, tmp_path / "run", *warm[:-1], f"data.tokenizer={other}")
    assert (tmp_path / "run" / "config.yaml").read_text() == config
    assert go(data, tmp_path / "run", *warm[:-1], f"data.tokenizer={same.rename(tmp_path / 'moved.json')}") == 0


def test_a_part_of_nothing_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"init_from too"):
        go(data, tmp_path / "run", "train.init_only=[vision.]")


def test_training_longer_is_told_the_way(data: Path, finished: Path) -> None:
    with pytest.raises(RequestError, match=rf"run\.dir=OTHER train\.init_from={finished}"):
        go(data, finished, "train.steps=12")


# --- divergence


def test_after_a_divergence_the_advice_can_be_followed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none, spoilt = tmp_path / "none", ["train.lr=1e12", "train.warmup=0", "train.steps=40"]
    with pytest.raises(WeftError, match=r"no good checkpoint from before: start again in another run\.dir with a lo"):
        go(data, none, *spoilt, "checkpoint.every=1")
    assert steps(none) == [1], "its weights are finite, but no loss of theirs is"
    with pytest.raises(RequestError, match=r"give another run\.dir, or the same value$"):
        go(data, none, "train.steps=40")
    assert "Diverged</b> at step 5: the loss is nan" in write_report(none, tmp_path / "report.html").read_text()

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.train.learning_rate", lambda settings, step: 1e-3 if step < 3 else 1e12)
        with pytest.raises(WeftError, match=r"run\.dir=OTHER train\.init_from=(\S+)") as refused:
            go(data, run, "train.steps=40", "checkpoint.every=1", "checkpoint.keep=2")
    advice = str(refused.value).rpartition("train.init_from=")[2]
    assert steps(run) == [3, 4], "skipped steps made no checkpoint"
    assert advice.endswith("step_00000003"), "the weights of step 4 give a loss that is not finite"
    with pytest.raises(RequestError, match=r"run\.dir=OTHER train\.init_from=\S*/step_00000003 starts a new run"):
        go(data, run, "train.steps=41", "checkpoint.every=1")
    assert go(data, tmp_path / "other", f"train.init_from={advice}", "train.steps=1", "train.warmup=0") == 0


def test_weights_that_are_not_finite_are_refused_at_once(data: Path, finished: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(find_checkpoint(finished), source)
    spoilt = weights(finished)
    spoilt["text.projection.weight"][0, 0] = torch.nan
    save_file(spoilt, source / "weight.safetensors")
    tree = json.loads((source / "checkpoint.json").read_text())
    tree["files"]["weight.safetensors"] = checksum_of(source / "weight.safetensors")
    tree["checksum"] = checksum_of_description(tree)
    (source / "checkpoint.json").write_text(json.dumps(tree))
    more = [f"train.init_from={source}", "train.steps=2"]
    with pytest.raises(RequestError, match=r"text\.projection\.weight in .* has numbers that are not finite"):
        go(data, tmp_path / "run", *more)
    assert go(data, tmp_path / "part", *more, "train.init_only=[vision.]") == 0
    tree["recipe"]["model"]["text"]["heads"] = 4
    (source / "checkpoint.json").write_text(json.dumps(tree))
    with pytest.raises(WeftError, match=r"train\.init_from: .*checkpoint\.json is damaged"):
        go(data, tmp_path / "run", *more, "model.text.heads=4")


def test_a_checkpoint_of_a_skipped_step_pushes_none_out(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["train.lr=1e12", "train.warmup=5", "train.steps=6", "train.max_skipped=50", "checkpoint.keep=1"]
    with pytest.raises(WeftError, match=r"diverged: at step 6, the last \d steps were skipped"):
        go(data, run, *more, "checkpoint.every=1")
    with pytest.raises(WeftError, match="diverged: at step 6"):
        go(data, run, *more, "checkpoint.every=1")
    assert len(steps(run)) == 2, "that of the last step, and that before the steps which changed nothing"
    assert describe(run).guard["in_a_row"] > 0


def test_a_rate_beyond_fp32_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"train\.lr"):
        go(data, tmp_path / "run", "train.lr=1e38")


def test_everything_frozen_names_the_key(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"train\.freeze is .*nothing to train"):
        go(data, tmp_path / "run", "train.freeze=[vision., text., logit_]")


# --- precision and order


@pytest.mark.parametrize(
    "layout", ["zero: 1", "zero: 2", "zero: 3", "zero: 3, offload: true", "zero: 1, offload: true"]
)
def test_the_temperature_stays_fp32_in_bf16(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    run = tmp_path / "run"
    assert go(data, run, "train.precision=bf16", f"layout={{{layout}}}", "train.lr=1e-4", "train.steps=8") == 0
    assert capsys.readouterr().out == "", "DeepSpeed has its say of the memory"
    scales = [line["logit_scale"] for line in read_lines(run / "metrics.jsonl")]
    assert scales[0] == pytest.approx(14.3, abs=1e-5)
    assert len(set(scales)) == len(scales), "bf16 would round them to the same"
    kept = weights(run)["logit_scale.log"]
    assert kept.exp().item() == pytest.approx(scales[-1], rel=2e-4)
    assert kept.bfloat16().float() != kept


def test_the_order_certificate_knows_what_was_read(data: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert go(data, run, "train.stop_at=3", "checkpoint.every=3", "train.micro_batch=2") == 0
    assert go(data, run, "data.workers=1", "checkpoint.every=3") == 0
    assert compare_orders(finished, run).same
    assert compare_orders(finished, run).samples == 48
    assert describe(run).order == read_lines(run / "metrics.jsonl")[-1]["order"]
    wider = tmp_path / "wider"
    assert go(data, wider, "train.global_batch=16", "train.steps=3", "train.warmup=0") == 0
    assert compare_orders(finished, wider).same, "how it is cut into batches is not the order"
    other = tmp_path / "other"
    assert go(data, other, "run.seed=1") == 0
    assert compare_orders(finished, other).differs_at == 8
