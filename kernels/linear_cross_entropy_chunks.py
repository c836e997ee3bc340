"""The work of linear cross entropy, chunk by chunk of rows, on one process or a vocabulary parallel group.

Formulas and design choices are those of kernels/linear_cross_entropy.py.

Axes: N rows, D size of a hidden state, V vocabulary (of this rank), C rows of a chunk, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from kernels.collectives import all_gather, group_named
from kernels.dispatch import refuse_difference
from kernels.precision import accumulator_of

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of a chunk of logits
ROWS_WITH_RANKS = {"cpu": 512, "cuda": 4096}  # of a chunk: the same on ranks with slices of different sizes
PRODUCT_BYTES = 32 << 20  # of a piece of g^T hidden: stays in a GPU's cache until it is added
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of hidden, weight and bias; empty where not wanted


def run(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    factors_N: torch.Tensor,
    loss: Loss,
    group_name: str,
    backend: str,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, Gradients]:
    """Losses of the rows (0 where the factor is 0), and the gradients of sum_i factor_i loss_i."""
    device, wide = hidden_ND.device, accumulator_of(hidden_ND.dtype)
    with torch.autocast(device.type, enabled=False):
        vocabulary = _Vocabulary.of(group_name, len(weight_VD), device)
        if not hidden_ND.is_cuda:
            _check_targets(targets_N, factors_N, int(vocabulary.size))
        places_N = vocabulary.places(targets_N)
        dtype = wide if backend == "torch" and not hidden_ND.is_cuda else hidden_ND.dtype  # of products
        weight_of_products_VD = weight_VD.to(dtype)
        chunk = _Chunk(
            len(hidden_ND), len(weight_VD), wide if backend == "torch" else dtype, device, vocabulary.group is not None
        )
        losses_N = torch.empty_like(factors_N)
        dhidden_ND, dweight_VD, dbias_V = empty_gradients(hidden_ND, weight_VD, bias_V, wanted)
        if wanted[0] and vocabulary.group is not None:
            dhidden_ND = dhidden_ND.to(wide)
        dweight_VD, dbias_V = (torch.zeros_like(each, dtype=wide) for each in (dweight_VD, dbias_V))
        under_way = []
        for rows in chunk.slices():
            hidden_CD = hidden_ND[rows].to(dtype)
            g_CV = chunk.logits(hidden_CD, weight_of_products_VD, bias_V)
            losses_N[rows] = _loss_and_gradient_(
                g_CV, places_N[rows], factors_N[rows], loss, vocabulary, backend, any(wanted)
            )
            if wanted[2]:
                dbias_V += g_CV.sum(0, dtype=wide)
            g_CV = g_CV.to(dtype)
            if wanted[0]:
                _multiply(g_CV, weight_of_products_VD, dhidden_ND[rows])
                under_way += vocabulary.add(dhidden_ND[rows])
            if wanted[1]:
                _add_product_(dweight_VD, g_CV, hidden_CD)
        for each in under_way:
            each.wait()
    dbias_V = dbias_V if bias_V is None else dbias_V.to(bias_V.dtype)
    return losses_N, (dhidden_ND.to(hidden_ND.dtype), dweight_VD.to(weight_VD.dtype), dbias_V)


@dataclass(frozen=True)
class Loss:
    """The settings, and what they make of a row's four numbers."""

    label_smoothing: float
    z_loss: float
    soft_cap: float

    def of_rows(
        self, numbers_4C: torch.Tensor, maximum_C: torch.Tensor, factors_C: torch.Tensor, size: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [C], and [3, C] what a gradient is made of: g = scale exp(z - maximum) - floor, `own` at the target.

        numbers: maximum, sum of exp(z - maximum) without the target, z at the target, sum of z, of all `size` columns;
        maximum_C: that of the columns g is wanted for.
        """
        highest_C, wrong_C, own_C, total_C = numbers_4C
        odds_C = wrong_C.log() + highest_C - own_C
        lse_C = highest_C + (wrong_C + (own_C - highest_C).exp()).log()
        losses_C = F.softplus(odds_C, threshold=40)
        own_gradient_C = -odds_C.sigmoid()
        scale_C = (maximum_C - lse_C).exp()
        floor_C = torch.full_like(scale_C, self.label_smoothing) / size  # a number / size would be fp32, always
        if self.label_smoothing:
            losses_C = losses_C + self.label_smoothing * (own_C - total_C / size)
            own_gradient_C = own_gradient_C + (self.label_smoothing - floor_C)
        if self.z_loss:
            losses_C = losses_C + self.z_loss * lse_C.square()
            slope_C = 2 * self.z_loss * lse_C
            own_gradient_C = own_gradient_C + slope_C * (-odds_C).sigmoid()
            scale_C = scale_C * (1 + slope_C)
        losses_C = torch.where(factors_C == 0, 0, losses_C)
        return losses_C, torch.stack([scale_C, own_gradient_C, floor_C]) * factors_C


def _loss_and_gradient_(
    logits_CV: torch.Tensor,
    places_C: torch.Tensor,
    factors_C: torch.Tensor,
    loss: Loss,
    vocabulary: _Vocabulary,
    backend: str,
    gradient: bool,
) -> torch.Tensor:
    """Losses of the rows of a chunk; with `gradient`, the logits become their own gradients, times the factors."""
    if backend == "triton":
        from kernels.gpu import linear_cross_entropy as gpu

        settings = (loss.label_smoothing, loss.z_loss, loss.soft_cap)
        if vocabulary.group is None:
            return gpu.chunk_(logits_CV, places_C, factors_C, *settings, gradient=gradient)
        numbers_4C = gpu.numbers(logits_CV, places_C, loss.soft_cap)
    else:
        numbers_4C, slope_CV = _exponentials_(logits_CV, places_C, loss, gradient)
    maximum_C = numbers_4C[0]
    losses_C, gradient_3C = loss.of_rows(vocabulary.merge(numbers_4C), maximum_C, factors_C, vocabulary.size)
    if gradient and backend == "triton":
        gpu.gradient_(logits_CV, places_C, maximum_C, gradient_3C, loss.soft_cap)
    elif gradient:
        _gradient_(logits_CV, places_C, gradient_3C, slope_CV, loss)
    return losses_C


def _exponentials_(
    logits_CV: torch.Tensor, places_C: torch.Tensor, loss: Loss, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The four numbers of each row, and the slope of a soft cap; logits become exp(z - maximum), 0 at the target."""
    slope_CV = None
    if loss.soft_cap:
        logits_CV.div_(loss.soft_cap).tanh_()
        slope_CV = 1 - logits_CV.square() if gradient else None
        logits_CV.mul_(loss.soft_cap)
    own_C = _put_(logits_CV, places_C, None)
    total_C = logits_CV.sum(1) if loss.label_smoothing else torch.zeros_like(own_C)
    # finite where a rank's slice is masked out for a row, so that exp(-inf - maximum) is 0 and not nan
    maximum_C = logits_CV.amax(1).clamp(min=torch.finfo(logits_CV.dtype).min)
    _put_(logits_CV, places_C, torch.full_like(own_C, -torch.inf))
    wrong_C = logits_CV.sub_(maximum_C[:, None]).exp_().sum(1)
    return torch.stack([maximum_C, wrong_C, own_C, total_C]), slope_CV


def _gradient_(
    exponentials_CV: torch.Tensor,
    places_C: torch.Tensor,
    gradient_3C: torch.Tensor,
    slope_CV: torch.Tensor | None,
    loss: Loss,
) -> None:
    scale_C, own_C, floor_C = gradient_3C
    exponentials_CV.mul_(scale_C[:, None])
    if loss.label_smoothing:
        exponentials_CV.sub_(floor_C[:, None])
    _put_(exponentials_CV, places_C, own_C)
    if slope_CV is not None:
        exponentials_CV.mul_(slope_CV)


def _put_(values_CV: torch.Tensor, places_C: torch.Tensor, new_C: torch.Tensor | None) -> torch.Tensor:
    """What stood at each row's place, -inf where there is none (place -1); with new_C, that stands there afterwards."""
    here_C1 = places_C[:, None] >= 0
    index_C1 = places_C[:, None].clamp(min=0)
    old_C1 = values_CV.gather(1, index_C1)
    if new_C is not None:
        values_CV.scatter_(1, index_C1, torch.where(here_C1, new_C[:, None], old_C1))
    return torch.where(here_C1, old_C1, -torch.inf)[:, 0]


@dataclass(frozen=True)
class _Vocabulary:
    """This rank's columns among those of the group. Sizes of slices stay on the device: to look would stop a GPU."""

    size: int | torch.Tensor
    start: int | torch.Tensor
    own: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, group_name: str, own: int, device: torch.device) -> _Vocabulary:
        group = group_named(group_name)
        if group is None:
            return cls(own, 0, own, None)
        sizes_W = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
        all_gather(sizes_W, torch.full((1,), own, device=device), group=group)
        return cls(sizes_W.sum(), sizes_W[: dist.get_rank(group)].sum(), own, group)

    def places(self, targets_N: torch.Tensor) -> torch.Tensor:
        """Columns of the targets in this slice (int64), -1 for those elsewhere."""
        places_N = targets_N.long() - self.start
        return torch.where((places_N >= 0) & (places_N < self.own), places_N, -1)

    def merge(self, numbers_4C: torch.Tensor) -> torch.Tensor:
        """The four numbers of the rows over all slices."""
        if self.group is None:
            return numbers_4C
        parts = numbers_4C.new_empty(4 * dist.get_world_size(self.group), numbers_4C.shape[1])
        all_gather(parts, numbers_4C.contiguous(), group=self.group)
        maximum_WC, wrong_WC, own_WC, total_WC = parts.view(-1, *numbers_4C.shape).unbind(1)
        highest_C = maximum_WC.amax(0)
        wrong_C = (wrong_WC * (maximum_WC - highest_C).exp()).sum(0)
        return torch.stack([highest_C, wrong_C, own_WC.amax(0), total_WC.sum(0)])

    def add(self, rows_CD: torch.Tensor) -> list[dist.Work]:
        """Sum over the ranks in place; to be waited for."""
        if self.group is None:
            return []
        work = dist.all_reduce(rows_CD, group=self.group, async_op=True)
        assert work is not None
        return [work]


class _Chunk:
    """Memory for a chunk of logits, the same for all chunks; how many rows it has."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device, ranks: bool) -> None:
        self.total, self.columns = rows, columns
        self.stride = -(-columns // 64) * 64  # rows begin at multiples of 128 bytes
        most = max(1, CHUNK_BYTES[device.type] // (self.stride * dtype.itemsize))
        if ranks:
            most = ROWS_WITH_RANKS[device.type]
        self.rows = -(-rows // max(1, -(-rows // most)))  # of equal chunks, no more than `most`
        self._memory = torch.empty(self.rows * self.stride, dtype=dtype, device=device)

    def slices(self) -> list[slice]:
        starts = range(0, self.total, max(1, self.rows))
        return [slice(start, min(start + self.rows, self.total)) for start in starts]

    def logits(self, hidden_CD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
        rows = len(hidden_CD)
        out_CV = self._memory[: rows * self.stride].view(rows, self.stride)[:, : self.columns]
        if bias_V is not None and hidden_CD.dtype == out_CV.dtype:
            return torch.addmm(bias_V.to(out_CV.dtype), hidden_CD, weight_VD.T, out=out_CV)
        _multiply(hidden_CD, weight_VD.T, out_CV)
        return out_CV if bias_V is None else out_CV.add_(bias_V)


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a b, in the dtype of out if that is wider; torch has such a product on GPUs only."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        wide = accumulator_of(a.dtype)
        out.copy_(a.to(wide) @ b.to(wide))


def _add_product_(sum_VD: torch.Tensor, g_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """sum += g^T hidden. bf16 comes in pieces: not every torch we support has a product that adds to fp32 in place."""
    if not g_CV.is_cuda or g_CV.dtype == sum_VD.dtype:
        sum_VD.addmm_(g_CV.T.to(sum_VD.dtype), hidden_CD.to(sum_VD.dtype))
        return
    piece = max(1, PRODUCT_BYTES // (4 * hidden_CD.shape[1]))
    for sum_PD, g_CP in zip(sum_VD.split(piece), g_CV.split(piece, 1), strict=True):
        sum_PD += torch.mm(g_CP.T, hidden_CD, out_dtype=torch.float32)


def empty_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: tuple[bool, ...]
) -> Gradients:
    def like(tensor: torch.Tensor, want: bool) -> torch.Tensor:
        return tensor.new_empty(tensor.shape if want else (0,))

    return like(hidden, wanted[0]), like(weight, wanted[1]), like(hidden if bias is None else bias, wanted[2])


def _check_targets(targets_N: torch.Tensor, factors_N: torch.Tensor, size: int) -> None:
    wrong_N = (factors_N != 0) & ((targets_N < 0) | (targets_N >= size))
    if wrong_N.any():
        row = int(wrong_N.nonzero()[0])
        raise ValueError(f"target {int(targets_N[row])} of row {row} is outside the vocabulary, 0 to {size - 1}")


def compare_with_torch(device: torch.device, dtype: torch.dtype) -> None:
    """The trial: a small input with everything in it, against torch in fp32. Raises ArithmeticError if they differ."""
    generator = torch.Generator(device).manual_seed(0)
    targets = torch.arange(0, 9001, 900, device=device)  # 11 of them, the last in the last column
    factors = torch.arange(11, device=device).remainder(5) / 11
    tolerance = 9e-3 if dtype == torch.bfloat16 else 1e-3
    hidden, weight = (torch.randn(size, 64, generator=generator, device=device).to(dtype) / 4 for size in (11, 9001))
    for cap in (0.0, 20.0):
        results = []
        for backend, numbers in (("triton", dtype), ("torch", torch.float32)):
            loss, given = Loss(0.1, 1e-3, cap), (hidden.to(numbers), weight.to(numbers))
            losses, gradients = run(*given, None, targets, factors, loss, "", backend, (True, True, False))
            results.append((losses, *gradients[:2]))
        mine, plain = ([each.float() for each in result] for result in results)
        refuse_difference(mine, plain, tolerance, f"with a soft cap of {cap}: ")
