"""First contact with a card, in one command: what is worth most comes first, and each part leaves its results.

    timeout -s INT 590 python -m kernels.bench.first --out DIR --minutes 9.5 2>&1 | tee -a LOG

A part is a process with a limit of its own. All suites write into one file, DIR/<card>-<date>.json. A part that has had
its turn leaves DIR/<part>.done, so the same command goes on where it was cut off; one that no time is left for is not
begun. Whatever a part leaves running is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels.bench.process import dying_with_me, interruptible
from kernels.bench.table import markdown

MARK = "WEFT_FIRST_CONTACT"  # in the environment of whatever a part starts
SUITE_ENDS = 25.0  # seconds after its --minutes at most
CLIP_B = (  # a model of the size of OpenAI's ViT-B/16
    *("model.vision.image_size=224", "model.vision.patch=16", "model.vision.layers=12", "model.vision.width=768"),
    *("model.vision.heads=12", "model.vision.mlp_ratio=4", "model.text.layers=12", "model.text.width=512"),
    *("model.text.heads=8", "model.text.mlp_ratio=4", "model.text.context=77"),
    *("train.global_batch=256", "train.precision=bf16", "run.device=cuda"),
)
ONE_CARD = ("train.global_batch=128", "run.device=cuda")
SCENES = ("data.train={out}/scenes/train", "data.test={out}/scenes/test")


@dataclass(frozen=True)
class Part:
    """A module with its arguments, and the seconds it gets; {out} is the folder of all, {minutes} what a suite gets."""

    name: str
    seconds: float
    words: tuple[str, ...]

    def command(self, out: Path, seconds: float) -> list[str]:
        minutes = f"{max(seconds - SUITE_ENDS, 1) / 60:.2f}"
        return [sys.executable, "-m", *(each.format(out=out, minutes=minutes) for each in self.words)]


def _suite(name: str, seconds: float, *words: str) -> Part:
    return Part(name, seconds, ("kernels.bench.suite", *words, "--minutes", "{minutes}", "--out", "{out}"))


WEFT = "pretrain.cli"
PARTS = (
    _suite("losses", 150, "--only", "contrastive,linear_cross_entropy"),
    _suite("attention", 175, "--only", "attention"),
    _suite("step", 130, "--only", "step"),
    Part("scenes", 20, (WEFT, "data", "synth", "{out}/scenes", "--train", "2048", "--test", "64", "--no-sound")),
    Part(
        "train",
        75,
        (WEFT, "train", "quickstart", "run.dir={out}/train", *SCENES, *CLIP_B, "train.steps=40", "train.warmup=5"),
    ),
    Part("plain", 105, (WEFT, "bench", "step", "--recipe", "vit_l_14", "--no-compile", *ONE_CARD)),
    _suite("gluon", 60, "--only", "gluon"),
    _suite("sanitizer", 90, "--only", "sanitizer"),
)


def run(out: Path, minutes: float, parts: Sequence[Part] = PARTS) -> None:
    """Do in order what has not been done, as far as the time goes."""
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        given = min(part.seconds, end - time.monotonic())
        done = out / f"{part.name}.done"
        if done.exists():
            print(f"== {part.name}: done before; without {done} it is run again", flush=True)
        elif given < part.seconds / 2:
            print(f"== {part.name}: not run, no time was left", flush=True)
        else:
            print(f"== {part.name}: {given:.0f} s at most", flush=True)
            done.touch()
            with interruptible():
                print(f"== {part.name}: {_ended(part.command(out, given), given)}", flush=True)


def _ended(command: Sequence[str], seconds: float) -> str:
    """Run a command for some seconds; how it ended. Nothing that it started is left."""
    mark = f"{os.getpid()}-{time.time_ns()}"
    # one card and no network: what is between ranks goes through the loopback device
    environment = os.environ | {MARK: mark, "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    began = time.monotonic()
    process = subprocess.Popen(dying_with_me(command), env=environment, start_new_session=True)
    try:
        process.wait(seconds)
        told = ""
    except subprocess.TimeoutExpired:
        told = f"not done after {seconds:.0f} s; "
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        left = _kill_marked(mark)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    told += f"exit code {process.returncode} after {time.monotonic() - began:.0f} s"
    return told + (f"; {left} process(es) that were left are killed" if left else "")


def _kill_marked(mark: str) -> int:
    """Kill every process that a part has started, in whatever session it is; how many there were."""
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
                found += 1
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.first", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="for all parts; 13.5 are enough for each; default 9.5"
    )
    arguments = parser.parse_args()
    code = 0
    try:
        run(arguments.out, arguments.minutes)
    except KeyboardInterrupt:
        code = 130
    for path in sorted(arguments.out.glob("*-????-??-??.json")):
        print(f"\n{markdown(json.loads(path.read_text()))}\n{path}")
    return code


if __name__ == "__main__":
    sys.exit(main())
