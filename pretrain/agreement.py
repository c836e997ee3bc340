"""Before the first step every rank tells what it is about to train on; ranks that differ refuse, in one sentence.

Nodes may hold copies of the data, the recipe and the code, and a copy may be stale or incomplete. Each rank would then
permute its own number of samples, and the run would train on something that nobody can say. The folder of the run is
one for all: what ranks write into several folders is no checkpoint.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline import Dataset, Joined
from pretrain.checkpoint.format import Checkpoint
from pretrain.checkpoint.warm_start import find_warm_start
from pretrain.config import Recipe
from pretrain.errors import WeftError
from pretrain.job import difference, ranks_in_words
from pretrain.parallel.groups import Ranks
from pretrain.run_folder import flat, versions
from pretrain.run_lock import Owner

SHOWN = 12  # characters of a fingerprint
APPEARS = 30.0  # seconds in which a rank sees what rank 0 wrote: NFS clients remember for so long what was not there
PACKAGES = ("pretrain", "data_pipeline", "kernels", "cluster")
# Keys that name something of the node itself: what lies there is compared, not what it is called
LOCAL = (
    "run.dir",
    "run.device",
    "data.train",
    "data.test",
    "data.also",
    "data.cache",
    "data.tokenizer",
    "data.workers",
    "data.most_workers",
    "data.ahead_gib",
    "kernels.",
    "train.init_from",
    "layout.memory_gib",
)


def refuse_different_ranks(
    recipe: Recipe,
    dataset: Dataset | Joined,
    test: Dataset | None,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
) -> None:
    """WeftError on every rank, naming what differs and on which ranks; every rank calls this."""
    if ranks.world == 1:
        return
    _refuse_several_folders(recipe, ranks)
    warm = None if checkpoint else find_warm_start(recipe)
    settings = {key: value for key, value in flat(recipe.model_dump(mode="json")).items() if not key.startswith(LOCAL)}
    settings["data.also"] = str([source.weight for source in recipe.data.also])
    told = {
        "data.train": _data(dataset),
        "data.test": _data(test),
        "the recipe": _digest(repr(sorted(settings.items()))),
        "weft's code": _code(),
        "the versions of the libraries": _digest(repr(sorted(versions().items()))),
        "the checkpoint to resume from": _weights(checkpoint),
        "train.init_from": _weights(warm.checkpoint if warm else None),
    }
    everyone: list[dict[str, str]] = ranks.of_all(told)
    for name in told:
        if len({each[name] for each in everyone}) == 1:
            continue
        if name == "the recipe":
            name, values = _first_difference(ranks.of_all(settings))
        else:
            values = [each[name] for each in everyone]
        raise WeftError(difference(name, values))


def _refuse_several_folders(recipe: Recipe, ranks: Ranks) -> None:
    """WeftError on every rank unless all see in run.dir whom rank 0 has written there as the run's owner."""
    run, limit = recipe.run.dir, recipe.train.watchdog
    token = ranks.of_first(_owner(run))
    with suppress(OSError):
        run.mkdir(parents=True, exist_ok=True)  # asks the server, where a client remembers that there was none
    end = time.monotonic() + min(APPEARS, 3 * limit or APPEARS)  # before the watchdog speaks
    while not (sees := _owner(run) == token) and time.monotonic() < end:
        time.sleep(0.2)
    everyone: list[tuple[bool, str]] = ranks.of_all((sees, str(run.absolute())))
    if blind := [rank for rank, (sees, _) in enumerate(everyone) if not sees]:
        raise WeftError(
            f"run.dir is not the same folder on rank 0 and {ranks_in_words(blind)}: what rank 0 writes in "
            f"{everyone[0][1]} is not in {everyone[blind[0]][1]} of rank {blind[0]}; give a folder that all nodes share"
        )


def _owner(run: Path) -> str:
    return owner.token if (owner := Owner.read(run)) else ""


def _weights(checkpoint: Checkpoint | None) -> str:
    """By what its files hold, wherever they lie."""
    if checkpoint is None:
        return "none"
    return f"step {checkpoint.step} ({_digest(repr(sorted(checkpoint.files.items())))})"


def _data(dataset: Dataset | Joined | None) -> str:
    return f"{len(dataset)} samples ({dataset.fingerprint[:SHOWN]})" if dataset is not None else "none"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:SHOWN]


def _code() -> str:
    """Of every source file of ours, so that changes that are not committed count."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:SHOWN]


def _first_difference(settings: list[dict[str, Any]]) -> tuple[str, list[str]]:
    keys = sorted({key for each in settings for key in each})
    key = next(key for key in keys if len({str(each.get(key)) for each in settings}) > 1)
    return key, [str(each.get(key)) for each in settings]
