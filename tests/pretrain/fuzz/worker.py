"""`python worker.py BASE`: a seed a line on stdin, what came of it as JSON on stdout. See test_fuzz.py."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2]
# the packages of weft before the folders of tests that have their names
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(Path(__file__).parent)]

from damages import SAMPLES, SHARDS, SIZES, damage  # noqa: E402  # after the path to it

TOLD = re.compile(
    r"left out|not read|not be used|skipp|missing|lost|end mark|zeros|damaged|truncat|ends? at|unusable|no sample", re.I
)


@dataclass
class Result:
    """What came of one damage: a word a command, and what should not have been."""

    seed: int
    target: str = ""
    how: str = ""
    codes: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """What came of it, in a word: trained, refused or fault."""
        if self.faults:
            return "fault"
        return "trained" if self.codes.get("train") == 0 else "refused"


def run(result: Result, name: str, *arguments: str) -> str:
    """A command in this process; what it said. A fault unless it ends with 0, or with 1 or 2 and a sentence."""
    from pretrain.cli import main

    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(arguments))
    except BaseException as error:
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        else:
            last = traceback.extract_tb(error.__traceback__)[-1]
            ours = [each for each in traceback.extract_tb(error.__traceback__) if "site-packages" not in each.filename]
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}, {Path(last.filename).name}:{last.lineno}"
            result.faults.append(f"{name}: {type(error).__name__}: {str(error)[:200]} ({place})")
            code = -1
    said = out.getvalue() + err.getvalue()
    result.codes[name] = code
    if "Traceback (most recent" in said:
        result.faults.append(f"{name}: a traceback in its output")
    if code not in (0, 1, 2, -1):
        result.faults.append(f"{name}: exit code {code}")
    sentences = [line for line in err.getvalue().splitlines() if line.startswith("weft: ")]
    if code in (1, 2) and not sentences and name not in ("check", "verify"):
        result.faults.append(f"{name}: exit {code} without a sentence")
    if len(sentences) > 1:
        result.faults.append(f"{name}: {len(sentences)} sentences")
    if any(len(each) > 1500 for each in sentences):
        result.faults.append(f"{name}: a sentence of {max(map(len, sentences))} characters")
    return said


def judge(seed: int, base: Path) -> Result:
    """Damage a copy of the base, and hold every command to it."""
    result = Result(seed)
    with tempfile.TemporaryDirectory(prefix="weft-fuzz-") as scratch:
        folder = Path(scratch) / "case"
        shutil.copytree(base, folder, symlinks=True)
        result.target, result.how = damage(seed, folder)
        recipe = str(folder / "recipe.yaml") if result.target == "recipe" else "quickstart"
        data = folder / ("rows" if result.target in ("parquet", "cell") else "tars")
        new = [f"data.train={data}", f"run.dir={folder / 'new'}", *SIZES, "train.steps=3", "train.stop_at=null"]
        if result.target in ("checkpoint", "run"):
            run(result, "verify", "checkpoint", "verify", str(folder / "run"))
            # the recipe of the base names the data where the base lies, and so does this
            run(result, "train", *resumption(base, folder / "run"))
            if result.codes["train"] == 0 and (losses := losses_of(folder / "run")) != whole_losses(base):
                result.faults.append(f"train: exit 0, and other losses than of the whole checkpoint: {losses}")
            run(result, "report", "report", str(folder / "run"))
            return result
        if result.target == "recipe":
            run(result, "train", "train", recipe, *new)
            return result
        checked = "" if data.name == "rows" else run(result, "check", "data", "check", str(data), "--processes", "0")
        run(result, "stats", "data", "stats", str(data))
        said = run(result, "train", "train", recipe, *new)
        if result.codes["train"] == 0:
            result.faults += silent_loss(result, folder, base, data, checked, said)
    return result


def resumption(base: Path, run_folder: Path) -> list[str]:
    """The command that goes on with the run of the base, or with a copy of it."""
    return ["train", "quickstart", f"data.train={base / 'tars'}", f"run.dir={run_folder}", *SIZES, "train.steps=6"]


def losses_of(run_folder: Path) -> dict[int, float]:
    """step -> loss of the steps that a resumption makes."""
    from pretrain.metrics import read_lines

    lines = read_lines(run_folder / "metrics.jsonl")
    return {int(line["step"]): round(line["loss"], 5) for line in lines if line.get("step", 0) > 3}


@cache
def whole_losses(base: Path) -> dict[int, float]:
    """The losses of a resumption that nothing has damaged."""
    with tempfile.TemporaryDirectory(prefix="weft-fuzz-") as scratch:
        shutil.copytree(base / "run", Path(scratch) / "run", symlinks=True)
        whole = Result(-1)
        run(whole, "train", *resumption(base, Path(scratch) / "run"))
        assert whole.codes == {"train": 0}, whole
        return losses_of(Path(scratch) / "run")


def silent_loss(result: Result, folder: Path, base: Path, data: Path, checked: str, said: str) -> Iterator[str]:
    """What a run that ended well has neither read nor named."""
    from data_pipeline import open_dataset
    from pretrain.metrics import read_lines

    dataset = open_dataset(data)
    keys = {dataset.key(number) for number in range(len(dataset))}
    if data.name == "rows":
        if len(keys) < SAMPLES:
            yield f"train: {len(keys)} of {SAMPLES} rows, and exit 0"
        return
    named = {str(line["key"]) for line in read_lines(folder / "new" / "quarantine.jsonl")}
    lost = {f"s{number:02d}" for number in range(SAMPLES)} - keys
    if result.target == "tar" and all(is_sound(data / f"{shard}.tar") for shard in range(SHARDS)):
        return  # what was taken out of it before there was an index has left no trace
    if lost and result.codes["check"] == 0 and not re.search(r"^(warning|error) (?!index\.json)", checked, re.M):
        yield f"check: good, and {len(lost)} samples are lost"
    if lost and not TOLD.search(said):
        yield f"train: exit 0 and no word of {len(lost)} samples that are lost"
    if result.target == "tar with index":
        touched = changed_samples(base / "tars", data)
        if quiet := touched & keys - named:
            yield f"train: exit 0 and no word of samples that changed since they were indexed: {sorted(quiet)[:4]}"


def is_sound(path: Path) -> bool:
    """Whether a tar, by Python's reader, is whole files and an end mark with nothing behind; or gone altogether."""
    if not path.exists():
        return True
    content = path.read_bytes()
    try:
        with tarfile.open(path) as tar:
            members = tar.getmembers()
    except (tarfile.TarError, OSError):
        return False
    end = max((each.offset_data + -(-each.size // 512) * 512 for each in members), default=0)
    return len(content) % 512 == 0 and len(content) - end >= 1024 and not any(content[end:])


def changed_samples(before: Path, after: Path) -> set[str]:
    """Keys of the samples whose bytes are no more where they were."""
    found = set()
    for shard in range(SHARDS):
        new = (after / f"{shard}.tar").read_bytes()
        old = (before / f"{shard}.tar").read_bytes()
        with tarfile.open(before / f"{shard}.tar") as tar:
            for info in tar:
                place = slice(info.offset_data, info.offset_data + info.size)
                if new[place] != old[place]:
                    found.add(info.name.split(".")[0])
    return found


def answer(result: Result) -> str:
    """A line of JSON."""
    tree: dict[str, Any] = {**asdict(result), "outcome": result.outcome}
    return json.dumps(tree)


if __name__ == "__main__":
    import pretrain.train  # noqa: F401  # loads nearly all; the first damage is not to wait for it

    print("READY", flush=True)
    for line in sys.stdin:
        print("RESULT " + answer(judge(int(line), Path(sys.argv[1]))), flush=True)
