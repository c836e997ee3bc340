"""A checkpoint on disk: a folder with everything a run needs to go on, or another tool to load the model.

    step_00001000/
      checkpoint.json           format, step, samples seen, the recipe, data fingerprint, which file holds which tensor,
                                sha256 of every other file and of itself
      weight.safetensors        fp32 master weights, whole tensors by parameter name, under no layout
      exp_avg.safetensors       Adam's first moment, likewise; of trained parameters only
      exp_avg_sq.safetensors    Adam's second moment
      tokenizer.json            Hugging Face `tokenizers`

Several ranks write several files of each part, `weight-00001-of-00008.safetensors` and so on: each is a plain
safetensors file of whole tensors, and every tensor is in exactly one. They are counted over the ranks that own any.

Nothing is pickled. The folder appears by one rename when every byte of it is on disk; only then does the link `latest`
move to it, by a rename too. What is called `step_*` is complete. On a file system without links `latest` is a file that
holds the name.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.strict_json import read_json
from pretrain.errors import RequestError, WeftError

FORMAT, VERSION = "weft-checkpoint", 2
DESCRIPTION, LATEST, TOKENIZER = "checkpoint.json", "latest", "tokenizer.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names
PARTS = ("weight", *MOMENTS)
UNFINISHED = ".unfinished"  # ends the name of a folder that is being written


@dataclass(frozen=True)
class Checkpoint:
    """What `checkpoint.json` says, and where it lies."""

    path: Path
    step: int
    samples: int  # positions of the order that training has consumed
    updates: int  # how often Adam has stepped: a step whose gradients were not finite is none
    recipe: dict[str, Any]
    data_fingerprint: str
    files: dict[str, str]  # name -> sha256 (hex)
    parameters: dict[str, list[int]]  # name -> shape
    tensors: dict[str, dict[str, str]] = field(default_factory=dict)  # part -> parameter name -> file
    guard: dict[str, Any] = field(default_factory=dict)  # what the trainer's guard remembered
    order: str | None = None  # the order certificate of the samples so far; None: not known
    description_is_whole: bool = True  # whether `checkpoint.json` has the sha256 that it says

    @property
    def parameter_count(self) -> int:
        """Numbers in all weights."""
        return sum(math.prod(shape) for shape in self.parameters.values())

    @property
    def bytes(self) -> int:
        """Size of all files but `checkpoint.json`."""
        return sum((self.path / name).stat().st_size for name in self.files)


def file_name(part: str, number: int, count: int) -> str:
    """The file of a part that the number-th of `count` owners writes; plain where there is one owner."""
    return f"{part}.safetensors" if count == 1 else f"{part}-{number + 1:05d}-of-{count:05d}.safetensors"


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run folder."""
    return run / "checkpoints" / f"step_{step:08d}"


def complete_steps(checkpoints: Path) -> list[Path]:
    """The complete checkpoints in a folder of them, in order of their steps."""
    return sorted(path.parent for path in checkpoints.glob(f"step_*/{DESCRIPTION}"))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run folder or of its folder of checkpoints.

    Raises RequestError when there is none.
    """
    path = Path(path)
    if (path / DESCRIPTION).is_file():
        return path.resolve()
    for folder in (path / "checkpoints", path):
        if found := newest_of(folder):
            return found.resolve()
    if not path.exists():
        raise RequestError(f"no checkpoint at {path}: there is no such folder")
    raise RequestError(f"no checkpoint in {path}: there is no checkpoints/step_*/{DESCRIPTION} in it")


def newest_of(checkpoints: Path) -> Path | None:
    """The checkpoint that `latest` names in a folder of them, or the highest complete step; None without any."""
    steps = complete_steps(checkpoints)
    named = _named_by(checkpoints / LATEST)
    return named if named and (named / DESCRIPTION).is_file() else (steps[-1] if steps else None)


def _named_by(latest: Path) -> Path | None:
    """What `latest` stands for: a link, a file with the name, or (a copy that followed links) a folder like it."""
    try:
        if latest.is_symlink():
            return latest.resolve()
        if latest.is_file():
            return latest.with_name(Path(latest.read_text(encoding="utf-8").strip()).name)
        if latest.is_dir():
            original = step_folder(latest.parents[1], int(read_json((latest / DESCRIPTION).read_text())["step"]))
            return original if (original / DESCRIPTION).is_file() else latest
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        pass  # a link to itself, or bytes that name nothing
    return None


def newest_first(run: Path) -> list[Path]:
    """The checkpoint that a run folder means, and those of earlier steps; [] when there is none."""
    steps = [path.resolve() for path in complete_steps(run / "checkpoints")]
    if not steps:
        return []
    newest = find_checkpoint(run)
    # a `latest` that is a folder of its own is the copy of a step that is gone
    return [newest, *(path for path in reversed(steps) if path < newest or newest not in steps)]


def describe(path: str | Path) -> Checkpoint:
    """Read `checkpoint.json` of a checkpoint or of a run's newest one; WeftError when it is not one of ours."""
    folder = find_checkpoint(path)
    try:
        tree = read_json((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if (tree["format"], tree["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it is {tree['format']} version {tree['version']}, not {FORMAT} version {VERSION}")
        parameters = {str(name): [int(side) for side in shape] for name, shape in tree["parameters"].items()}
        tensors = {part: {str(name): str(file) for name, file in tree["tensors"][part].items()} for part in PARTS}
        return Checkpoint(
            folder,
            int(tree["step"]),
            int(tree["samples"]),
            int(tree["updates"]),
            dict(tree["recipe"]),
            str(tree["data_fingerprint"]),
            _files(tree["files"], tensors),
            parameters,
            tensors,
            dict(tree.get("guard", {})),
            _order(tree.get("order")),
            tree.get("checksum") == checksum_of_description(tree),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeftError(f"{folder / DESCRIPTION} does not describe a checkpoint of ours ({error})") from error


def _order(value: Any) -> str | None:
    if value is not None:
        int(value, 16)  # a ValueError or TypeError is caught where it is read
    return value or None


def _files(tree: Any, tensors: dict[str, dict[str, str]]) -> dict[str, str]:
    """Checksums by file name; ValueError unless every file of the checkpoint is among them."""
    files = {str(name): str(checksum) for name, checksum in tree.items()}
    for name in [file for by_name in tensors.values() for file in by_name.values()] + [TOKENIZER]:
        if name not in files:
            raise ValueError(f"it has no checksum of {name}")
        if Path(name).name != name:
            raise ValueError(f"{name} is not a file beside it")
    return files


def verify(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with the files of a checkpoint, a sentence each; [] when every byte is as it was written."""
    problems = [] if checkpoint.description_is_whole else [description_problem(checkpoint)]
    return problems + [problem for name in checkpoint.files if (problem := file_problem(checkpoint, name))]


def description_problem(checkpoint: Checkpoint) -> str:
    """The sentence about a `checkpoint.json` that was changed."""
    return f"{checkpoint.path / DESCRIPTION} is damaged: its sha256 is not the one it was written with"


def file_problem(checkpoint: Checkpoint, name: str) -> str:
    """What is wrong with one file, or an empty string."""
    file = checkpoint.path / name
    try:
        if checksum_of(file) == checkpoint.files[name]:
            return ""
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    return f"{file} is damaged: its sha256 is not the one it was written with"


def checksum_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of_description(tree: dict[str, Any]) -> str:
    """sha256 (hex) of what `checkpoint.json` says, its own "checksum" left out."""
    rest = {key: value for key, value in tree.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
