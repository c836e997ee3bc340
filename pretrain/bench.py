"""`weft bench step`: one training step of ours against the same model elsewhere, in one run on one machine.

The peers (bench_peers.py) are plain torch, as it comes and at its best, and open_clip's model where it is installed; a
model that is cut has none, nor has a step that they would make otherwise (`no_peer`): weft is measured alone. Ours and
plain torch start from the same parameters and train on the same batches, so their first losses must agree; all take
turns in short rounds, so that whatever else the machine does falls on all alike. The batches are those of the first
steps of training where the recipe's data is there, made up otherwise. weft computes no padding of captions, the others
the whole context, as trainers usually do; made-up captions fill it. `layout=auto` gives weft its microbatches; the
others take a rank's share at once.

A step is over when the device has done it: each round ends with the last of its work. The first round warms up, and
before it a step has compiled what is compiled. FLOP/s and MFU are of one count for all, the matrix products that the
model needs (flops.py), against the card's dense bf16 peak. Memory is the peak of the device's allocator over a round,
without what the others keep there meanwhile.

Beside the time: the share of a step in which a collective or a message between stages is under way on this rank, by
torch's profiler, waiting for the others included; and the bytes that autograd keeps for backward at the worst moment.

The ratio is against the fastest peer; it is the median over rounds of the ratio within a round, because a virtual
machine is slower in one round than in another by more than what is compared here. All run in one process, so what weft
sets there for glibc's allocator serves them all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from data_pipeline import Batch
from data_pipeline.errors import first_line
from pretrain.activations import SavedBytes
from pretrain.bench_batches import batches_for
from pretrain.bench_peers import Step, no_peer, peers, plain_start
from pretrain.config import Recipe
from pretrain.errors import RequestError, is_memory_full
from pretrain.flops import peak_tflops, training_flops_per_sample
from pretrain.models.dual import DualEncoder
from pretrain.parallel.build import build_model
from pretrain.parallel.choose import GIB, with_layout
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Ranks, pick_device, start_ranks, stop_ranks, world_size
from pretrain.parallel.layout import Layout, lay_out

ROUNDS, STEPS_A_ROUND = 15, 4
PLAIN = "plain torch"  # so begin the names of the peers that start from our parameters
SAME_LOSS = {"fp32": 1e-3, "bf16": 2e-2}  # relative; what differs more does other work
FEWEST = 3  # rounds
LONGEST = {"cpu": 150.0, "cuda": 20.0}  # seconds after which there are no more; a card is not as uneven as a CPU


@dataclass(frozen=True)
class Measured:
    """One way to train: the median over rounds of a step on the global batch, in seconds."""

    seconds: float
    samples_per_second: float
    gflops: float  # a second and rank
    mfu: float | None = None  # where the card's peak is known
    memory_gib: float | None = None  # of this rank's card

    def __str__(self) -> str:
        more = f", {self.mfu:.1%} MFU" if self.mfu is not None else ""
        more += f", {self.memory_gib:.1f} GiB" if self.memory_gib is not None else ""
        return f"{self.seconds:.4f} s a step, {self.samples_per_second:.0f} samples/s, {self.gflops:.0f} GFLOP/s{more}"


@dataclass(frozen=True)
class StepBench:
    """ratio = weft / the fastest peer, a median over rounds; below 1 weft is faster."""

    layout: str
    device: str
    batches: str
    threads: int
    global_batch: int
    parameters: int
    gflop_per_sample: float
    weft: Measured
    communication: float  # share of a step, 0 to 1
    activations: int  # bytes that autograd keeps
    peers: dict[str, Measured] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # peers that are not to be had here, and why
    fastest: str | None = None  # of the peers
    ratio: float | None = None
    first_loss_difference: float | None = None

    @property
    def weft_seconds(self) -> float:
        """Of a step."""
        return self.weft.seconds

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "weft_seconds": self.weft_seconds}

    def __str__(self) -> str:
        width = max(map(len, ("weft", *self.peers)))
        lines = [
            f"{self.layout}, {self.device}, {self.threads} thread(s) a rank, {self.parameters / 1e6:.2f} M parameters, "
            f"batch {self.global_batch}, {self.gflop_per_sample:.2f} GFLOP a sample",
            f"  {self.batches}",
            *(f"  {name:{width}} {each}" for name, each in {"weft": self.weft, **self.peers}.items()),
            f"  of weft's step, communication {self.communication:.0%}; activations "
            f"{self.activations / (1 << 20):.1f} MiB",
            *(f"  {sentence}" for sentence in self.left_out),
        ]
        if self.fastest:
            lines.append(f"  weft / {self.fastest} = {self.ratio:.3f} (below 1: weft is faster)")
        if self.first_loss_difference is not None:
            lines[-1] += f"; first losses of weft and plain torch differ by {self.first_loss_difference:.1e}"
        return "\n".join(lines)


def bench_training_step(recipe: Recipe, compiled: bool | None = None) -> StepBench | None:
    """Measure the model, batch, precision and layout of a recipe; None on every rank but the first.

    compiled: also peers whose blocks are compiled, which takes a minute or more on a CPU; default: on CUDA.
    Raises ValueError for a recipe with other objectives.
    """
    recipe = with_layout(recipe, world_size())
    layout = lay_out(recipe, world_size())
    if [objective.name for objective in recipe.objectives] != ["contrastive"]:
        raise ValueError("weft bench step measures contrastive training: one objective, contrastive")
    ranks = start_ranks(layout, pick_device(recipe.run.device))
    try:
        return _measure(recipe, layout, ranks, ranks.device.type == "cuda" if compiled is None else compiled)
    finally:
        stop_ranks(ranks)


def _measure(recipe: Recipe, layout: Layout, ranks: Ranks, compiled: bool) -> StepBench | None:
    batches, source = batches_for(recipe, layout, ranks, STEPS_A_ROUND)
    length = statistics.fmean(batch.caption_length for batch in batches)
    before = _allocated(ranks)
    model = build_model(recipe, layout, ranks)
    assert isinstance(model, DualEncoder)
    kept = {"weft": _allocated(ranks) - before}  # bytes on the card from one step to the next
    parameters = list(model.parameters())
    whole = layout.tp * layout.pp * layout.cp == 1
    alone = no_peer(recipe) if whole else ""  # of a model that is cut, the layout says it
    compared = whole and not alone
    start = plain_start(model, recipe) if compared else {}
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    left_out = [alone] if alone else []

    def begin(name: str, make: Callable[[], Step]) -> None:
        """Make it, with a first step, which makes Adam's state and compiles."""
        before = _allocated(ranks)
        step = make()
        first[name], steps[name] = float(step(batches[0])), step
        kept[name] = kept.get(name, 0) + _allocated(ranks) - before

    for name, make in (peers(start, recipe, ranks, compiled) if compared else {}).items():
        try:
            begin(name, make)
        except RequestError as error:
            if str(error) not in left_out:
                left_out.append(str(error))
        except Exception as error:  # compilers and packages of others fail with whatever they raise
            if ranks.world > 1:  # the others may have gone on
                raise
            full = "the memory is full, for it takes the whole batch at once"
            left_out.append(f"{name} is not measured: {full if is_memory_full(error) else first_line(error)}")
    begin("weft", lambda: _weft_step(model, recipe, ranks))
    for name in [each for each in steps if each.startswith(PLAIN)]:
        ours, theirs = first["weft"], first[name]
        off = not abs(ours - theirs) <= SAME_LOSS[recipe.train.precision] * abs(ours)
        if int(ranks.agree(torch.tensor([int(off)]))):  # on any rank
            del steps[name], kept[name]
            left_out.append(f"{name} is not measured: its first loss is {theirs:.5g} and weft's {ours:.5g}")
    seconds, peaks = _take_turns(steps, batches, ranks)
    with SavedBytes(parameters) as saved:
        steps["weft"](batches[0])
    communication = _communication_share(steps["weft"], batches[0], ranks)
    if not ranks.is_first:
        return None
    of_sample = training_flops_per_sample(recipe.model, length)
    peak = peak_tflops(ranks.device)

    def measured(name: str) -> Measured:
        median = statistics.median(seconds[name])
        gflops = of_sample * recipe.train.global_batch / median / layout.world / 1e9
        others = sum(kept.values()) - kept[name]
        return Measured(
            seconds=median,
            samples_per_second=recipe.train.global_batch / median,
            gflops=gflops,
            mfu=gflops / peak / 1e3 if peak else None,
            memory_gib=(peaks[name] - others) / GIB if name in peaks else None,
        )

    found = {name: measured(name) for name in steps if name != "weft"}
    fastest = min(found, key=lambda name: found[name].seconds) if found else None
    return StepBench(
        layout=str(layout),
        device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU",
        batches=f"{source}; captions of {length:.3g} of {recipe.model.text.context} tokens on average",
        threads=torch.get_num_threads(),
        global_batch=recipe.train.global_batch,
        parameters=sum(parameter.numel() for parameter in parameters),
        gflop_per_sample=of_sample / 1e9,
        weft=measured("weft"),
        communication=communication,
        activations=saved.peak,
        peers=found,
        left_out=tuple(left_out),
        fastest=fastest,
        ratio=_ratio(seconds["weft"], seconds[fastest]) if fastest else None,
        first_loss_difference=abs(first["weft"] - first["plain torch"]) if "plain torch" in first else None,
    )


def _take_turns(
    steps: dict[str, Step], batches: list[Batch], ranks: Ranks
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """(seconds of a step, by name and round; the most bytes on the card in the first round, by name)."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, int] = {}
    start = time.perf_counter()
    for round_number in range(ROUNDS + 1):
        for name, step in steps.items():
            ranks.wait_for_all()
            if ranks.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(ranks.device)
            began = time.perf_counter()
            for batch in batches:
                step(batch)
            if ranks.device.type == "cuda":
                torch.cuda.synchronize(ranks.device)
            if round_number:  # the first warms up
                seconds[name].append((time.perf_counter() - began) / STEPS_A_ROUND)
            elif ranks.device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(ranks.device)
        late = time.perf_counter() - start > LONGEST[ranks.device.type]
        if int(ranks.agree(torch.tensor([int(late)]))) and round_number >= FEWEST:
            break
    return seconds, peaks


def _allocated(ranks: Ranks) -> int:
    return torch.cuda.memory_allocated(ranks.device) if ranks.device.type == "cuda" else 0


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds."""
    return statistics.median(mine / their for mine, their in zip(ours, theirs, strict=True))


def _communication_share(step: Step, batch: Batch, ranks: Ranks) -> float:
    """The share of a step in which a collective or a message is under way on this rank, waiting for others included."""
    ranks.wait_for_all()
    on_card = ranks.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
    with profile(activities=activities) as profiler, record_function("step"):
        step(batch)
        if on_card:
            torch.cuda.synchronize(ranks.device)
    events = profiler.events() or []
    (whole,) = [event.time_range for event in events if event.name == "step" and event.device_type == DeviceType.CPU][
        :1
    ]
    # on a card what NCCL's kernels take there, not the calls that start them
    where, names = (DeviceType.CUDA, ("nccl",)) if on_card else (DeviceType.CPU, ("gloo:",))
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == where and event.name.startswith(names)
    )
    busy, until = 0.0, whole.start
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / (whole.end - whole.start)


def _weft_step(model: DualEncoder, recipe: Recipe, ranks: Ranks) -> Step:
    layout = lay_out(recipe, ranks.world)
    engine = Engine(model.to(ranks.device), recipe, layout, ranks)
    return lambda batch: engine.step(batch.shortened(layout.text_step), recipe.train.lr).loss
