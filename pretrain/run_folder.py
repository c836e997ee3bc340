"""The folder of a run: what lies in it, whether a recipe may go on in it, and what is written once at the start.

config.yaml       the resolved recipe                manifest.json     data fingerprint, code, versions, layout
metrics.jsonl     one object a logged step           evaluation.jsonl  one object an evaluation
tokenizer.json    what made the tokens               quarantine.jsonl  samples that could not be used
checkpoints/      step_<n>/ and latest               examples.json     what the report shows of the last evaluation
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_pipeline.index import written_whole
from data_pipeline.strict_json import read_json
from pretrain.checkpoint.format import Checkpoint, describe, description_problem, newest_first
from pretrain.config import Recipe, recipe_of, saved_recipe
from pretrain.errors import DivergedError, RequestError, WeftError
from pretrain.parallel.layout import Layout
from pretrain.relevance import rules_of

# What may change between the start of a run and its end without making it another run
FREE = (
    "run.dir",
    "run.device",
    "data.train",
    "data.test",
    "data.ahead_gib",
    "data.cache",
    "data.cache_gib",
    "data.loader",
    "data.most_workers",
    "data.ray",
    "data.workers",
    "data.tokenizer",
    "data.max_corrupt",
    "data.max_corrupt_share",
    "train.stop_at",
    "train.max_skipped",
    "train.spike",
    "train.micro_batch",
    "train.resume",
    "train.init_from",
    "train.init_only",
    "train.log_every",
    "train.watchdog",
    "kernels.",
    "layout.",
    "checkpoint.",
    "eval.",
)


def checkpoint_to_resume(recipe: Recipe, data_fingerprint: str) -> Checkpoint | None:
    """Where to go on, None to begin; tensors are not read yet, see `pretrain.checkpoint.load.whole_checkpoint`.

    Raises RequestError when the folder holds a run of another recipe or other data, WeftError when no checkpoint in it
    can be read.
    """
    damage: WeftError | None = None
    for found in checkpoints_to_resume(recipe, data_fingerprint):
        if isinstance(found, Checkpoint):
            return found
        damage = damage or found
    if damage:
        raise damage
    return None


def checkpoints_to_resume(recipe: Recipe, data_fingerprint: str) -> Iterator[Checkpoint | WeftError]:
    """The checkpoints of a run, newest first, or what is wrong with a `checkpoint.json`."""
    run = recipe.run.dir
    if run.exists() and not run.is_dir():
        raise RequestError(f"run.dir is {run}, which is a file: give the name of a folder")
    paths = newest_first(run)
    if paths and recipe.train.resume == "never":
        raise RequestError(
            f"train.resume=never, but {run} holds a run with checkpoints: give another run.dir, or remove the folder"
        )
    for path in paths:
        changed = None
        try:
            checkpoint = describe(path)
            if not checkpoint.description_is_whole:
                changed = WeftError(description_problem(checkpoint))
            _refuse_another_run(checkpoint, recipe, data_fingerprint)
        except RequestError as error:
            if changed is None:
                raise
            yield changed if path != paths[-1] else error
        except WeftError as error:
            yield error
        else:
            # without an older one to go on from, whoever loads it says what does not fit
            yield changed if changed and path != paths[-1] else checkpoint


def _refuse_another_run(checkpoint: Checkpoint, recipe: Recipe, data_fingerprint: str) -> None:
    run = recipe.run.dir
    # through the model of a recipe, so that keys which are newer than the checkpoint stand there with their defaults
    before = recipe_of(checkpoint.recipe, str(checkpoint.path))
    theirs, mine = (flat(each.model_dump(mode="json")) for each in (before, recipe))
    # what changes nothing may differ, and changed nothing (the initial scale of a run that began with other weights)
    free = (*FREE, *(key for each in (before, recipe) for key, _ in rules_of(each)))
    for key in sorted(theirs.keys() | mine.keys()):
        if theirs.get(key) != mine.get(key) and not key.startswith(free):
            good = None if key.startswith(("model.", "run.")) else _good_weights(run)
            warm = f"; run.dir=OTHER train.init_from={good} starts a new run from its weights" if good else ""
            raise RequestError(
                f"{run} holds a run with {key}={theirs.get(key)}, and this recipe has {key}={mine.get(key)}: "
                f"give another run.dir, or the same value{warm}"
            )
    if checkpoint.data_fingerprint != data_fingerprint:
        raise RequestError(
            f"{run} was trained on other data than {recipe.data.train} now holds: give another run.dir, or that data"
        )


def as_begun(recipe: Recipe, checkpoint: Checkpoint | None) -> Recipe:
    """With the weights that a run began with, which a command that resumes it need not name, and may name others."""
    if checkpoint is None:
        return recipe
    train = recipe_of(checkpoint.recipe, str(checkpoint.path)).train
    began = {"init_from": train.init_from, "init_only": train.init_only}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=began)})


def begin(
    recipe: Recipe,
    layout: Layout,
    data_fingerprint: str,
    resumed_step: int,
    warm_start: Mapping[str, Any] | None = None,
) -> None:
    """Write config.yaml and manifest.json; a resumed run adds itself to the manifest's list of starts.

    `warm_start`: which weights a new run begins with; of a resumed run the manifest knows.
    """
    run = recipe.run.dir
    run.mkdir(parents=True, exist_ok=True)
    with written_whole(run / "config.yaml") as unfinished:
        unfinished.write_text(recipe.yaml(), encoding="utf-8")
    path = run / "manifest.json"
    starts: list[dict[str, Any]] = []
    if resumed_step and path.is_file():
        with suppress(ValueError, AttributeError, TypeError):  # a damaged manifest is written anew
            before = read_json(path.read_text(encoding="utf-8"))
            starts, warm_start = list(before.get("starts", [])), before.get("init_from")
    starts.append({"step": resumed_step, "time": time.time(), "layout": str(layout), "world": layout.world})
    manifest = {
        "data_fingerprint": data_fingerprint,
        "seed": recipe.run.seed,
        "layout": recipe.layout.model_dump(),
        "world": layout.world,
        "code": code_revision(),
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}",
        "init_from": warm_start,
        "starts": starts,
    }
    _write_manifest(path, manifest)


def record_divergence(run: Path, error: DivergedError) -> None:
    """Write into the manifest why the last start has ended; without one that is whole, nothing."""
    path = run / "manifest.json"
    with suppress(ValueError, LookupError, TypeError, OSError):  # the error itself is what is to be told
        manifest = read_json(path.read_text(encoding="utf-8"))
        manifest["starts"][-1]["diverged"] = {"step": error.step, "why": error.why, "good": error.good}
        _write_manifest(path, manifest)


def divergence(manifest: Any) -> dict[str, Any] | None:
    """Why the last start of a run has ended, as `record_divergence` wrote it; None where it has not diverged."""
    starts = manifest.get("starts") if isinstance(manifest, dict) else None
    last = starts[-1] if isinstance(starts, list) and starts else None
    found = last.get("diverged") if isinstance(last, dict) else None
    return found if isinstance(found, dict) else None


def _good_weights(run: Path) -> Path | None:
    """What a new run may begin with: the run, or its last good checkpoint where it has diverged; None without one."""
    manifest = None
    with suppress(ValueError, OSError):
        manifest = read_json((run / "manifest.json").read_text(encoding="utf-8"))
    if (diverged := divergence(manifest)) is None:
        return run
    folder = run / "checkpoints" / str(diverged.get("good"))
    return folder if folder.is_dir() else None


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """The versions of weft and of the libraries that numbers depend on."""
    found = {}
    for name in (
        "weft",
        "torch",
        "triton",
        "deepspeed",
        "megatron-core",
        "webdataset",
        "tokenizers",
        "numpy",
        "simplejpeg",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_revision() -> str:
    """The git commit of this code, with "+changes" when files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def load_config(run: Path) -> Recipe:
    """The resolved recipe of a run folder; RequestError when it is none."""
    path = run / "config.yaml"
    if not path.is_file():
        raise RequestError(f"{run} is no run folder: there is no config.yaml in it")
    return saved_recipe(path)


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; lists count as one value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found
