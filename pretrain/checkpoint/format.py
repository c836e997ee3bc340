"""A checkpoint on disk: a folder with everything a run needs to go on, or another tool to load the model.

    step_00001000/
      checkpoint.json           format, step, samples seen, the recipe, data fingerprint, sha256 of every other file
      weight.safetensors        fp32 master weights, whole tensors by parameter name, under no layout
      exp_avg.safetensors       Adam's first moment, likewise
      exp_avg_sq.safetensors    Adam's second moment
      tokenizer.json            Hugging Face `tokenizers`

Nothing is pickled. The folder appears by one rename when every byte of it is on disk; only then does the link `latest`
move to it, by a rename too. What is called `step_*` is complete.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import RequestError, WeftError

FORMAT, VERSION = "weft-checkpoint", 1
DESCRIPTION, LATEST = "checkpoint.json", "latest"
FILES = ("weight.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors", "tokenizer.json")


@dataclass(frozen=True)
class Checkpoint:
    """What `checkpoint.json` says, and where it lies."""

    path: Path
    step: int
    samples: int  # positions of the order that training has consumed
    recipe: dict[str, Any]
    data_fingerprint: str
    files: dict[str, str]  # name -> sha256 (hex)
    parameters: dict[str, list[int]]  # name -> shape

    @property
    def parameter_count(self) -> int:
        """Numbers in all weights."""
        total = 0
        for shape in self.parameters.values():
            count = 1
            for side in shape:
                count *= side
            total += count
        return total


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run folder."""
    return run / "checkpoints" / f"step_{step:08d}"


def complete_steps(checkpoints: Path) -> list[Path]:
    """The complete checkpoints in a folder of them, in order of their steps."""
    return sorted(path.parent for path in checkpoints.glob(f"step_*/{DESCRIPTION}"))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run folder. RequestError when there is none.

    The newest is what `latest` points to; where the link is lost (a copy without links), the highest complete step.
    """
    path = Path(path)
    for candidate in (path, path / "checkpoints" / LATEST, path / LATEST, *complete_steps(path / "checkpoints")[-1:]):
        if (candidate / DESCRIPTION).is_file():
            return candidate.resolve()
    if not path.exists():
        raise RequestError(f"no checkpoint at {path}: there is no such folder")
    raise RequestError(
        f"no checkpoint in {path}: neither {DESCRIPTION} nor checkpoints/{LATEST}/{DESCRIPTION} is there"
    )


def describe(path: str | Path) -> Checkpoint:
    """Read `checkpoint.json` of a checkpoint or of a run's newest one; WeftError when it is not one of ours."""
    folder = find_checkpoint(path)
    try:
        tree = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if (tree["format"], tree["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it is {tree['format']} version {tree['version']}, not {FORMAT} version {VERSION}")
        return Checkpoint(
            folder,
            int(tree["step"]),
            int(tree["samples"]),
            dict(tree["recipe"]),
            str(tree["data_fingerprint"]),
            _files(tree["files"]),
            {name: [int(side) for side in shape] for name, shape in tree["parameters"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeftError(f"{folder / DESCRIPTION} does not describe a checkpoint of ours ({error})") from error


def _files(tree: Any) -> dict[str, str]:
    """Checksums by file name; ValueError unless every file of a checkpoint is among them."""
    files = {str(name): str(checksum) for name, checksum in tree.items()}
    for name in FILES:
        if name not in files:
            raise ValueError(f"it has no checksum of {name}")
    return files


def verify(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with the files of a checkpoint, a sentence each; [] when every byte is as it was written."""
    problems = []
    for name, checksum in checkpoint.files.items():
        file = checkpoint.path / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif checksum_of(file) != checksum:
            problems.append(f"{file} is damaged: its sha256 is not the one it was written with")
    return problems


def checksum_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
