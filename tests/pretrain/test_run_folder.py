"""When a run may go on in its folder and when not, and what the folder says about it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pretrain import run_folder
from pretrain.checkpoint.format import DESCRIPTION, FORMAT, PARTS, TOKENIZER, VERSION, checksum_of_description
from pretrain.config import Recipe, load_recipe
from pretrain.errors import RequestError, WeftError
from pretrain.parallel.layout import Layout
from pretrain.run_folder import FREE, begin, checkpoint_to_resume, code_revision, load_config, versions

DATA = "fingerprint of the data"
LAYOUT = Layout(world=2, dp=2, tp=1, zero=1, share=12, micro_batch=12)


def recipe_in(run: Path, *overrides: str) -> Recipe:
    return load_recipe("quickstart", [f"run.dir={run}", *overrides])


def leave_checkpoint(run: Path, recipe: Recipe, step: int = 30) -> Path:
    """A folder as `save_checkpoint` leaves it, without tensors: what says whether a run may go on."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "samples": step * 128,
        "updates": step,
        "recipe": recipe.model_dump(mode="json"),
        "data_fingerprint": DATA,
        "files": {TOKENIZER: "0" * 64},
        "parameters": {},
        "tensors": {part: {} for part in PARTS},
    }
    description["checksum"] = checksum_of_description(description)
    (folder / DESCRIPTION).write_text(json.dumps(description))
    latest = run / "checkpoints" / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(folder.name)
    return folder


def refusal(recipe: Recipe, data: str = DATA) -> str:
    with pytest.raises(RequestError) as caught:
        checkpoint_to_resume(recipe, data)
    return str(caught.value)


# --- going on


def test_an_empty_folder_or_none_begins(tmp_path: Path) -> None:
    assert checkpoint_to_resume(recipe_in(tmp_path / "none"), DATA) is None
    (tmp_path / "checkpoints").mkdir()
    assert checkpoint_to_resume(recipe_in(tmp_path), DATA) is None
    assert checkpoint_to_resume(recipe_in(tmp_path, "train.resume=never"), DATA) is None


def test_the_same_recipe_goes_on_from_the_newest(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    leave_checkpoint(tmp_path, recipe, 30)
    newest = leave_checkpoint(tmp_path, recipe, 45)
    found = checkpoint_to_resume(recipe, DATA)
    assert found is not None
    assert (found.step, found.samples, found.path) == (45, 45 * 128, newest.resolve())


@pytest.mark.parametrize(
    ("changed", "key", "before", "after"),
    [
        ("run.seed=1", "run.seed", "0", "1"),
        ("train.lr=0.002", "train.lr", "0.0007", "0.002"),
        ("train.steps=700", "train.steps", "900", "700"),
        ("train.global_batch=32", "train.global_batch", "64", "32"),
        ("train.precision=bf16", "train.precision", "fp32", "bf16"),
        ("data.flip=true", "data.flip", "False", "True"),
        ("data.crop_scale=[0.5, 1]", "data.crop_scale", "[1.0, 1.0]", "[0.5, 1.0]"),
        ("model.text.layers=2", "model.text.layers", "3", "2"),
        ("objectives=[{name: sigmoid}]", "objectives", "contrastive", "sigmoid"),
    ],
)
def test_a_changed_key_is_refused_with_both_values(
    tmp_path: Path, changed: str, key: str, before: str, after: str
) -> None:
    leave_checkpoint(tmp_path, recipe_in(tmp_path))
    sentence = refusal(recipe_in(tmp_path, changed))
    assert str(tmp_path) in sentence
    theirs, mine = sentence.split(", and this recipe has ")
    assert f"{key}=" in theirs
    assert before in theirs
    assert f"{key}=" in mine
    assert after in mine
    assert "give another run.dir, or the same value" in sentence


FREE_CHANGES = [
    "run.device=cpu",
    "data.train=elsewhere/train",
    "data.test=null",
    "data.workers=5",
    "data.tokenizer=some.json",
    "data.max_corrupt=7",
    "data.max_corrupt_share=0.2",
    "train.stop_at=40",
    "train.micro_batch=16",
    "train.log_every=3",
    "train.max_skipped=9",
    "train.spike=4",
    "train.init_from=elsewhere",
    "layout.tp=2",
    "layout.zero=3",
    "checkpoint.every=9",
    "checkpoint.keep=5",
    "checkpoint.asynchronous=false",
    "eval.every=0",
    "eval.samples=17",
    "eval.templates=['{}!']",
]


@pytest.mark.parametrize("changed", [*FREE_CHANGES, None])
def test_what_does_not_change_the_run_is_free(tmp_path: Path, changed: str | None) -> None:
    leave_checkpoint(tmp_path, recipe_in(tmp_path))
    found = checkpoint_to_resume(recipe_in(tmp_path, *([changed] if changed else FREE_CHANGES)), DATA)
    assert found is not None
    assert found.step == 30


def test_a_resumed_run_reads_no_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {train: x}\nmodel: {logit_scale_init: 20}\n")
    where = f"run.dir={tmp_path / 'run'}"
    leave_checkpoint(tmp_path / "run", load_recipe(str(path), [where, "train.init_from=runs/other"]))
    for given in ([], ["train.init_from=/away/runs/other"], ["train.init_from=x", "train.init_only=[vision.]"]):
        assert checkpoint_to_resume(load_recipe(str(path), [where, *given]), DATA) is not None


def test_a_moved_folder_is_the_same_run(tmp_path: Path) -> None:
    leave_checkpoint(tmp_path / "old", recipe_in(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert checkpoint_to_resume(recipe_in(tmp_path / "new"), DATA) is not None


def test_every_free_key_exists() -> None:
    """A key that was renamed must not leave its old name here."""
    known = run_folder.flat(load_recipe("quickstart").model_dump(mode="json"))
    for free in FREE:
        assert any(key.startswith(free) for key in known), free


def test_other_data_is_refused(tmp_path: Path) -> None:
    leave_checkpoint(tmp_path, recipe_in(tmp_path))
    sentence = refusal(recipe_in(tmp_path, "data.train=some/folder"), "other data")
    assert "some/folder" in sentence
    assert "other data" in sentence
    assert "give another run.dir, or that data" in sentence


def test_never_means_never(tmp_path: Path) -> None:
    leave_checkpoint(tmp_path, recipe_in(tmp_path))
    sentence = refusal(recipe_in(tmp_path, "train.resume=never"))
    assert "train.resume=never" in sentence
    assert str(tmp_path) in sentence
    assert "give another run.dir, or remove the folder" in sentence


def test_a_folder_that_is_no_checkpoint_of_ours_is_said_to_be_bad(tmp_path: Path) -> None:
    folder = leave_checkpoint(tmp_path, recipe_in(tmp_path))
    (folder / DESCRIPTION).write_text('{"format": "another"}')
    with pytest.raises(WeftError, match=DESCRIPTION) as caught:
        checkpoint_to_resume(recipe_in(tmp_path), DATA)
    assert caught.value.exit_code == 1


# --- what is written


def test_the_config_reads_back_and_the_manifest_says_where_numbers_come_from(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "deep" / "run", "run.seed=5", "layout.zero=2")
    begin(recipe, LAYOUT, DATA, 0)
    assert load_config(recipe.run.dir) == recipe
    manifest = json.loads((recipe.run.dir / "manifest.json").read_text())
    assert (manifest["data_fingerprint"], manifest["seed"], manifest["world"]) == (DATA, 5, 2)
    assert manifest["layout"]["zero"] == 2
    assert manifest["versions"] == versions()
    assert set(manifest["versions"]) >= {"weft", "torch", "deepspeed", "megatron-core"}
    assert [(start["step"], start["world"], start["layout"]) for start in manifest["starts"]] == [(0, 2, str(LAYOUT))]


def test_every_start_is_listed_and_a_new_beginning_forgets_the_old(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    path = tmp_path / "manifest.json"
    for step in (0, 30, 45):
        begin(recipe, LAYOUT, DATA, step)
    starts = json.loads(path.read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 30, 45]
    assert starts[0]["time"] <= starts[1]["time"] <= starts[2]["time"]
    begin(recipe, LAYOUT, DATA, 0)
    assert [start["step"] for start in json.loads(path.read_text())["starts"]] == [0]


def test_a_folder_without_a_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"is no run folder: there is no config\.yaml in it"):
        load_config(tmp_path)


def test_the_revision_is_a_commit_and_tells_of_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "package").mkdir()
    source = tmp_path / "package" / "run_folder.py"
    source.write_text("one\n")
    monkeypatch.setattr(run_folder, "__file__", str(source))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert code_revision() == "unknown"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    assert code_revision() == git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert code_revision() == git("rev-parse", "HEAD"), "runs and data beside the code are no changes of it"
    source.write_text("two\n")
    assert code_revision() == git("rev-parse", "HEAD") + "+changes"
