"""`weft bench step`: one training step of ours against the same model in plain torch, in one run on one machine.

Both start from the same parameters and train on the same batches, so their first losses must agree; they take turns
in short rounds, so that whatever else the machine does falls on both alike. With several ranks (`--nproc`) the peer is
plain torch under DistributedDataParallel, whose loss gathers all embeddings.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data_pipeline import Batch
from data_pipeline.tokenizer import EOS
from pretrain.config import Recipe
from pretrain.flops import training_flops_per_sample
from pretrain.models.dual import DTYPES, DualEncoder
from pretrain.models.initialise import initialise
from pretrain.parallel.engine import Engine, parameter_groups
from pretrain.parallel.groups import Ranks, pick_device, start_ranks, stop_ranks, world_size
from pretrain.parallel.layout import lay_out
from pretrain.plain import PlainDualEncoder, plain_contrastive_loss

ROUNDS, STEPS_A_ROUND = 7, 4


@dataclass(frozen=True)
class StepBench:
    """Seconds are medians over rounds of one step on the global batch; ratio = weft / plain, below 1 is faster."""

    layout: str
    device: str
    threads: int
    global_batch: int
    parameters: int
    weft_seconds: float
    plain_seconds: float
    weft_gflops: float
    first_loss_difference: float

    @property
    def ratio(self) -> float:
        """Time of ours over time of plain torch."""
        return self.weft_seconds / self.plain_seconds

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        return (
            f"{self.layout}, {self.device}, {self.threads} thread(s) a rank, {self.parameters / 1e6:.2f} M parameters, "
            f"batch {self.global_batch}\n"
            f"  weft         {self.weft_seconds:.4f} s a step, {self.global_batch / self.weft_seconds:.0f} samples/s, "
            f"{self.weft_gflops:.0f} GFLOP/s a rank\n"
            f"  plain torch  {self.plain_seconds:.4f} s a step, {self.global_batch / self.plain_seconds:.0f} samples/s"
            f"\n  weft / plain torch = {self.ratio:.3f} (below 1: weft is faster); first losses differ by "
            f"{self.first_loss_difference:.1e}"
        )


def bench_training_step(recipe: Recipe) -> StepBench | None:
    """Measure the model, batch, precision and layout of a recipe; None on every rank but the first.

    Raises ValueError for a recipe that the plain twin is not written for.
    """
    layout = lay_out(recipe, world_size())
    if layout.tp > 1 or [objective.name for objective in recipe.objectives] != ["contrastive"]:
        raise ValueError("weft bench step compares data parallel contrastive training: layout.tp=1, one objective")
    ranks = start_ranks(layout, pick_device(recipe.run.device))
    try:
        dtype = DTYPES[recipe.train.precision]
        model = DualEncoder(recipe.model, dtype=dtype)
        initialise(model, recipe.run.seed)
        plain = PlainDualEncoder.from_weft(model, recipe.model).to(ranks.device)
        steps = {"weft": _weft_step(model, recipe, ranks), "plain": _plain_step(plain, recipe, ranks)}
        batches = [_random_batch(recipe, layout.share, ranks, number) for number in range(STEPS_A_ROUND)]
        first = {name: step(batches[0]) for name, step in steps.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for round_number in range(ROUNDS + 1):
            for name, step in steps.items():
                dist.barrier(group=ranks.control_group)
                began = time.perf_counter()
                for batch in batches:
                    step(batch)
                if ranks.device.type == "cuda":
                    torch.cuda.synchronize()
                if round_number:  # the first warms up
                    seconds[name].append((time.perf_counter() - began) / STEPS_A_ROUND)
        if not ranks.is_first:
            return None
        weft = statistics.median(seconds["weft"])
        flops = training_flops_per_sample(recipe.model) * recipe.train.global_batch
        return StepBench(
            layout=str(layout),
            device=torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU",
            threads=torch.get_num_threads(),
            global_batch=recipe.train.global_batch,
            parameters=sum(parameter.numel() for parameter in plain.parameters()),
            weft_seconds=weft,
            plain_seconds=statistics.median(seconds["plain"]),
            weft_gflops=flops / weft / layout.world / 1e9,
            first_loss_difference=abs(first["weft"] - first["plain"]),
        )
    finally:
        stop_ranks(ranks)


def _weft_step(model: DualEncoder, recipe: Recipe, ranks: Ranks) -> Any:
    engine = Engine(model.to(ranks.device), recipe, lay_out(recipe, ranks.world), ranks)
    return lambda batch: engine.step(batch, recipe.train.lr).loss


def _plain_step(plain: PlainDualEncoder, recipe: Recipe, ranks: Ranks) -> Any:
    train = recipe.train
    wrapped = DistributedDataParallel(plain, process_group=ranks.dp_group)
    optimizer = torch.optim.AdamW(
        parameter_groups(plain, train.weight_decay), lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps
    )
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


def _random_batch(recipe: Recipe, rows: int, ranks: Ranks, number: int) -> Batch:
    generator = torch.Generator().manual_seed(1000 * ranks.dp_rank + number)
    size, context = recipe.model.vision.image_size, recipe.model.text.context
    image = torch.randint(0, 256, (rows, 3, size, size), generator=generator, dtype=torch.uint8)
    text = torch.randint(4, recipe.model.text.vocab_size, (rows, context), generator=generator)
    text[:, -1] = EOS
    places = torch.arange(rows)
    return Batch(image, text, places, places, []).to(ranks.device)
