"""`weft bench step`: one training step of ours against the same model in plain torch, in one run on one machine.

Both start from the same parameters and train on the same batches, so their first losses must agree; they take turns
in short rounds, so that whatever else the machine does falls on both alike. The batches are those of the first steps of
training where the recipe's data is there, made up otherwise. weft computes no padding of captions, plain torch the
whole context, as trainers usually do; made-up captions fill it. With several ranks (`--nproc`) the peer is plain torch
under DistributedDataParallel, whose loss gathers all embeddings; a model that is cut has no such peer, and is measured
alone.

Beside the time: the share of a step in which a collective or a message between stages is under way on this rank, by
torch's profiler, waiting for the others included; and the bytes that autograd keeps for backward at the worst moment.

Plain torch runs twice: as it comes, and with its best settings for the device (one fused kernel for all of AdamW). The
ratio is against the faster of the two; it is the median over rounds of the ratio within a round, because a virtual
machine is slower in one round than in another by more than what is compared here. All run in one process, so what weft
sets there for glibc's allocator serves them all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from data_pipeline import Batch
from pretrain.activations import SavedBytes
from pretrain.bench_batches import batches_for
from pretrain.config import Recipe
from pretrain.flops import training_flops_per_sample
from pretrain.models.dual import DualEncoder
from pretrain.parallel.build import build_model
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Ranks, pick_device, start_ranks, stop_ranks, world_size
from pretrain.parallel.layout import lay_out
from pretrain.parallel.updater import adamw, parameter_groups
from pretrain.plain import PlainDualEncoder, plain_contrastive_loss

Step = Callable[[Batch], float]  # trains on this rank's rows; the loss
ROUNDS, STEPS_A_ROUND = 15, 4


@dataclass(frozen=True)
class StepBench:
    """Seconds are medians over rounds of one step on the global batch.

    ratio = weft / the faster plain torch, a median over rounds too; below 1 weft is faster.
    """

    layout: str
    device: str
    batches: str
    threads: int
    global_batch: int
    parameters: int
    weft_seconds: float
    weft_gflops: float
    communication: float  # share of a step, 0 to 1
    activations: int  # bytes that autograd keeps
    plain_seconds: float | None = None  # AdamW as it comes
    plain_fused_seconds: float | None = None
    ratio: float | None = None
    first_loss_difference: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.layout}, {self.device}, {self.threads} thread(s) a rank, {self.parameters / 1e6:.2f} M parameters, "
            f"batch {self.global_batch}\n  {self.batches}\n"
            f"  weft         {self.weft_seconds:.4f} s a step, {self.global_batch / self.weft_seconds:.0f} samples/s, "
            f"{self.weft_gflops:.0f} GFLOP/s a rank; communication {self.communication:.0%} of it, "
            f"activations {self.activations / (1 << 20):.1f} MiB\n" + self._peer()
        )

    def _peer(self) -> str:
        if self.plain_seconds is None or self.plain_fused_seconds is None:
            return "  no peer: plain torch does not cut models"
        rows = (("plain torch ", self.plain_seconds), ("  fused AdamW", self.plain_fused_seconds))
        return (
            "\n".join(
                f"  {name} {seconds:.4f} s a step, {self.global_batch / seconds:.0f} samples/s"
                for name, seconds in rows
            )
            + f"\n  weft / the faster plain torch = {self.ratio:.3f} (below 1: weft is faster); first losses differ by "
            f"{self.first_loss_difference:.1e}"
        )


def bench_training_step(recipe: Recipe) -> StepBench | None:
    """Measure the model, batch, precision and layout of a recipe; None on every rank but the first.

    Raises ValueError for a recipe that the plain twin is not written for.
    """
    layout = lay_out(recipe, world_size())
    if [objective.name for objective in recipe.objectives] != ["contrastive"]:
        raise ValueError("weft bench step measures contrastive training: one objective, contrastive")
    ranks = start_ranks(layout, pick_device(recipe.run.device))
    try:
        model = build_model(recipe, layout, ranks)
        assert isinstance(model, DualEncoder)
        parameters = list(model.parameters())
        steps: dict[str, Step] = {}
        if layout.tp * layout.pp * layout.cp == 1:
            for name, fused in (("plain", None), ("fused", True)):
                plain = PlainDualEncoder.from_weft(model, recipe.model).to(ranks.device)
                steps[name] = _plain_step(plain, recipe, ranks, fused)
        steps["weft"] = _weft_step(model, recipe, ranks)
        batches, source = batches_for(recipe, layout, ranks, STEPS_A_ROUND)
        length = statistics.fmean(batch.caption_length for batch in batches)
        first = {name: step(batches[0]) for name, step in steps.items()}
        seconds = _take_turns(steps, batches, ranks)
        with SavedBytes(parameters) as saved:
            steps["weft"](batches[0])
        communication = _communication_share(steps["weft"], batches[0], ranks)
        if not ranks.is_first:
            return None
        weft = statistics.median(seconds["weft"])
        flops = training_flops_per_sample(recipe.model, length) * recipe.train.global_batch
        compared = "plain" in steps
        return StepBench(
            layout=str(layout),
            device=torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU",
            batches=f"{source}; captions of {length:.3g} of {recipe.model.text.context} tokens on average",
            threads=torch.get_num_threads(),
            global_batch=recipe.train.global_batch,
            parameters=sum(parameter.numel() for parameter in parameters),
            weft_seconds=weft,
            weft_gflops=flops / weft / layout.world / 1e9,
            communication=communication,
            activations=saved.peak,
            plain_seconds=statistics.median(seconds["plain"]) if compared else None,
            plain_fused_seconds=statistics.median(seconds["fused"]) if compared else None,
            ratio=max(_ratio(seconds["weft"], seconds[name]) for name in ("plain", "fused")) if compared else None,
            first_loss_difference=abs(first["weft"] - first["plain"]) if compared else None,
        )
    finally:
        stop_ranks(ranks)


def _take_turns(steps: dict[str, Step], batches: list[Batch], ranks: Ranks) -> dict[str, list[float]]:
    """Seconds of a step, by name and round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(ROUNDS + 1):
        for name, step in steps.items():
            ranks.wait_for_all()
            began = time.perf_counter()
            for batch in batches:
                step(batch)
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:  # the first warms up
                seconds[name].append((time.perf_counter() - began) / STEPS_A_ROUND)
    return seconds


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds."""
    return statistics.median(mine / their for mine, their in zip(ours, theirs, strict=True))


def _communication_share(step: Step, batch: Batch, ranks: Ranks) -> float:
    """The share of a step in which a collective or a message is under way on this rank, waiting for others included."""
    ranks.wait_for_all()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ranks.device.type == "cuda" else [])]
    with profile(activities=activities) as profiler, record_function("step"):
        step(batch)
    events = profiler.events() or []
    (whole,) = [event.time_range for event in events if event.name == "step"][:1]
    spans = sorted(
        (event.time_range.start, event.time_range.end) for event in events if event.name.startswith(("gloo:", "nccl:"))
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


def _plain_step(plain: PlainDualEncoder, recipe: Recipe, ranks: Ranks, fused: bool | None) -> Step:
    train = recipe.train
    wrapped = DistributedDataParallel(plain, process_group=ranks.dp_group)
    optimizer = adamw(parameter_groups(plain, train.weight_decay), train, fused)
    half = train.precision == "bf16"

    def step(batch: Batch) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=half):
            image, text, scale = wrapped(batch.image, batch.text)
        image, text = (_gathered(each.float(), ranks) for each in (image, text))
        loss = plain_contrastive_loss(image, text, scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), train.grad_clip or float("inf"))
        optimizer.step()
        return float(loss.detach())

    return step


def _gathered(own: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """All ranks' rows with the gradient of the own ones, as CLIP trainers do."""
    if ranks.dp_size == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(ranks.dp_size)]
    dist.all_gather(parts, own.detach().contiguous(), group=ranks.dp_group)
    parts[ranks.dp_rank] = own
    return torch.cat(parts)
