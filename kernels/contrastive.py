"""The contrastive losses over the global batch in O(N) extra memory, on one process or a group of them.

InfoNCE (Radford et al. 2021, figure 3), s_ij = scale x_i . y_j, over all N pairs of all ranks:

    L = 1/2N sum_i [ logsumexp_j s_ij - s_ii ]  +  1/2N sum_j [ logsumexp_i s_ij - s_jj ]
    dL/ds_ij = (exp(s_ij - row_i) + exp(s_ij - column_j)) / 2N - [i = j] / N

Pairwise sigmoid (Zhai et al. 2023, algorithm 1), t_ij = scale x_i . y_j + bias, z_ij = 1 on the diagonal and -1 off it:

    L = 1/N sum_ij log(1 + exp(-z_ij t_ij)),      dL/dt_ij = -z_ij / (1 + exp(z_ij t_ij)) / N

Extra negatives y_j, j > N, are wrong answers for every x_i and for nothing else: InfoNCE's logsumexp_j and the sigmoid
loss's sum go over them too; logsumexp_i stays as it is. Label smoothing e makes the target of row i, of K answers,
(1 - e) [i = j] + e / K, with K = N + M for the rows and N for the columns.

Design choices:
- The N x N matrix is never whole. It is made in squares; InfoNCE makes it twice (8 N^2 D operations), the sigmoid loss,
  which is separable, once (6 N^2 D).
- One custom operation returns the loss and all gradients, and the backward only multiplies them. So the other ranks'
  embeddings and all that grows with N live inside one call, and torch.compile sees shapes of this rank only. Without
  gradients (none required, or torch.no_grad) it makes the loss alone.
- InfoNCE subtracts one constant from every logit instead of a running maximum, so one exponential serves the row
  sum and the column sum, forward and backward. |s| is bounded by scale * max|x| * max|y|; should a sum still leave
  the range of fp32, both passes are repeated with exact maxima, in plain torch.
- Near the end of training s_ii is nearly all of its log-sum-exp, and their difference and exp(.) - 1 on the diagonal
  would be rounding noise. So the wrong answers are summed without s_ii, and both come from the log odds against the
  true pair, row_i = logsumexp_{j != i} s_ij - s_ii: L_i = log(1 + exp(row_i)), dL_i/ds_ii = -1 / (1 + exp(-row_i)).
- With a group, a rank holds the rows of its own x and meets everybody's y, by one gather or around a ring
  (kernels/contrastive_group.py); the gradient of y goes back to its owner. Of few pairs each rank makes the whole loss.
- Gradient convention: every rank returns the same global loss, and gradients of x, y and negatives are `world` times
  those of the global loss, because data parallelism averages parameter gradients over the group afterwards; those of
  scale and bias are the global loss's own on every rank, and averaging leaves them so.
- `products=torch.bfloat16` rounds the embeddings once and multiplies them in bf16, with fp32 sums; on a GPU these
  products run on the tensor cores at full rate, and half as much is gathered. A logit is then wrong by up to
  2^-8 scale |x| |y|, typically 2^-9 scale / sqrt(D). The default is the precision of the embeddings. 16-bit embeddings
  need the word too, for a tower under autocast gives them unasked.
- Deterministic: every sum is added in a fixed order, in the Triton kernels too, which use no atomics here. Over a group
  that order is the communication library's.

Axes: n pairs of this rank, N pairs of all ranks, M extra negatives, D embedding size.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from kernels import contrastive_squares
from kernels.collectives import group_named
from kernels.contrastive_group import AUTO as AUTO_EXCHANGE
from kernels.contrastive_group import EXCHANGES, Columns, Whole, columns_of, whole_of
from kernels.contrastive_passes import Result, Squares, infonce, longest_rows, sigmoid
from kernels.dispatch import AUTO, Choice, choose, chosen_by, no_triton, record, refuse_difference, trial
from kernels.precision import accumulator_of, tf32_is_allowed

BACKENDS = ("triton", "torch")  # in order of preference on a GPU; elsewhere torch is first


def _choose(
    operation: str,
    x_nD: torch.Tensor,
    *_: torch.Tensor,
    products: torch.dtype | None = None,
    backend: str = AUTO,
    **__: Any,
) -> Choice:
    order = BACKENDS if x_nD.is_cuda else BACKENDS[::-1]
    named = backend != AUTO
    return choose(operation, backend, order, lambda name: _refusal(name, operation, x_nD, products, named))


@chosen_by(partial(_choose, "contrastive_loss"))
def contrastive_loss(
    x_nD: torch.Tensor,
    y_nD: torch.Tensor,
    scale: torch.Tensor,
    *,
    negatives_MD: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    group: dist.ProcessGroup | None = None,
    exchange: str = AUTO_EXCHANGE,
    products: torch.dtype | None = None,
    backend: str = AUTO,
) -> torch.Tensor:
    """InfoNCE both ways over all pairs of the group; a scalar, the same on every rank.

    x and y fp32 or fp64 [n, D], paired row by row; n may differ between ranks. scale: a scalar tensor.
    negatives [M, D]: more wrong answers for the x of all ranks; M may differ between ranks.
    exchange: "replicate" (each rank makes the whole loss), "gather" (each holds all y), "ring" (two ranks' y at a time)
    or "auto" (the first for up to 1024 y in all, else the second); the same on every rank.
    products: None (the embeddings' dtype) or torch.bfloat16. backend: "auto", "triton" or "torch".
    label_smoothing: at least 0, below 1. All ranks must agree on whether gradients are wanted. Differentiable once.
    Raises ValueError when x, y, negatives and products do not fit each other, or scale is no scalar tensor.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing {label_smoothing}: at least 0, below 1")
    _check(x_nD, y_nD, negatives_MD, products, exchange, scale)
    wanted = _wanted(x_nD, y_nD, scale, negatives_MD)
    name = "" if group is None else group.group_name
    loss, *_ = _contrastive_loss(
        x_nD, y_nD, scale, negatives_MD, label_smoothing, name, exchange, products, backend, wanted
    )
    return loss


@chosen_by(partial(_choose, "sigmoid_loss"))
def sigmoid_loss(
    x_nD: torch.Tensor,
    y_nD: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    negatives_MD: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    exchange: str = AUTO_EXCHANGE,
    products: torch.dtype | None = None,
    backend: str = AUTO,
) -> torch.Tensor:
    """Pairwise sigmoid loss over all pairs of the group; a scalar, the same on every rank.

    x and y fp32 or fp64 [n, D], paired row by row; n may differ between ranks. scale and bias: scalar tensors.
    The rest as in `contrastive_loss`.
    """
    _check(x_nD, y_nD, negatives_MD, products, exchange, scale, bias)
    wanted = _wanted(x_nD, y_nD, scale, bias, negatives_MD)
    name = "" if group is None else group.group_name
    loss, *_ = _sigmoid_loss(x_nD, y_nD, scale, bias, negatives_MD, name, exchange, products, backend, wanted)
    return loss


def _wanted(*inputs: torch.Tensor | None) -> bool:
    """Whether gradients are."""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs)


def _check(
    x_nD: torch.Tensor,
    y_nD: torch.Tensor,
    negatives_MD: torch.Tensor | None,
    products: torch.dtype | None,
    exchange: str,
    *numbers: torch.Tensor,
) -> None:
    for number in numbers:
        if not isinstance(number, torch.Tensor) or number.ndim:
            what = list(number.shape) if isinstance(number, torch.Tensor) else type(number).__name__
            raise ValueError(f"scale or bias is {what}: they must be scalar tensors, as torch.tensor(10.0)")
    if x_nD.ndim != 2 or x_nD.shape != y_nD.shape or x_nD.dtype != y_nD.dtype:
        raise ValueError(
            f"x is {x_nD.dtype} {list(x_nD.shape)} and y {y_nD.dtype} {list(y_nD.shape)}: "
            "they must be matrices of one shape and dtype, paired row by row"
        )
    if negatives_MD is not None and (
        negatives_MD.ndim != 2 or negatives_MD.shape[1] != x_nD.shape[1] or negatives_MD.dtype != x_nD.dtype
    ):
        raise ValueError(
            f"negatives are {negatives_MD.dtype} {list(negatives_MD.shape)} and x {x_nD.dtype} {list(x_nD.shape)}: "
            "they must be matrices of one dtype and embedding size"
        )
    for name, other in (("y", y_nD), ("negatives", negatives_MD)):
        if other is not None and other.device != x_nD.device:
            raise ValueError(f"x is on {x_nD.device} and {name} on {other.device}: they must be on one device")
    if products not in (None, torch.bfloat16):
        raise ValueError(f"products={products}: either None, the embeddings' own dtype, or torch.bfloat16")
    if products is None and x_nD.dtype not in (torch.float32, torch.float64):
        ways = "give x and y in float32" + (", or say products=torch.bfloat16" if x_nD.dtype == torch.bfloat16 else "")
        raise ValueError(f"x is {x_nD.dtype}: sums over the global batch need float32 or float64; {ways}")
    if products is not None and x_nD.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x is {x_nD.dtype}: products={products} takes x and y in float32 or bfloat16")
    if exchange not in (AUTO_EXCHANGE, *EXCHANGES):
        raise ValueError(f"exchange={exchange!r} is none of {', '.join((AUTO_EXCHANGE, *EXCHANGES))}")


# --- backends


def _refusal(backend: str, operation: str, x_nD: torch.Tensor, products: torch.dtype | None, named: bool) -> str:
    """Why a backend cannot, or "". One that was named needs no trial: whoever names it wants it."""
    if backend == "torch":
        return ""
    dtype = products or x_nD.dtype
    if why_not := no_triton(x_nD.device.type, dtype):
        return why_not
    from kernels.gpu import contrastive as squares

    why_not = squares.refusal(x_nD, dtype)
    if why_not or named or not x_nD.is_cuda:
        return why_not
    return trial(f"{operation} in {dtype}", x_nD.device, lambda: _try(operation, x_nD.device, dtype))


def _squares_of(backend: str) -> Squares:
    if backend == "torch":
        return contrastive_squares
    from kernels.gpu import contrastive as squares

    return squares


def limit_of(dtype: torch.dtype) -> float:
    """The relative error (norm) that the trial allows; under torch's switch for TF32 its own products have that."""
    if dtype == torch.bfloat16:
        return 9e-3
    return 5e-3 if tf32_is_allowed() else 5e-5


@torch.no_grad()
def _try(operation: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ArithmeticError where Triton with products in `dtype` and fp64 torch differ on some small pairs."""
    generator = torch.Generator().manual_seed(0)
    noise_x, noise_y = (torch.randn(300, 64, generator=generator).to(device) for _ in range(2))
    x, y = (torch.nn.functional.normalize(each, dim=1) for each in (noise_x, noise_x + noise_y))
    x, y = x.to(dtype), y.to(dtype)
    mine = _small_result(operation, "triton", x, y, torch.float32)
    truth = _small_result(operation, "torch", x.double(), y.double(), torch.float64)
    refuse_difference(mine, truth, limit_of(dtype))


def _small_result(
    operation: str, backend: str, x_nD: torch.Tensor, y_nD: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Loss and gradients with sums in `dtype`, by a process alone."""
    columns = columns_of(y_nD, len(y_nD), dtype, None, "gather", longest_rows(x_nD, y_nD, dtype))
    scale, bias = (torch.tensor(value, dtype=dtype, device=x_nD.device) for value in (14.0, -4.0))
    if operation == "contrastive_loss":
        result = infonce(_squares_of(backend), x_nD, columns, scale, 0.0, gradients=True)
    else:
        result = sigmoid(_squares_of(backend), x_nD, columns, scale, bias, gradients=True)
    everything = (result.loss, result.dx, result.dy, result.dscale, result.dbias)
    return [each.double() for each in everything if each is not None]


# --- operations


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("weft::contrastive_loss", mutates_args=())
def _contrastive_loss(
    x_nD: torch.Tensor,
    y_nD: torch.Tensor,
    scale: torch.Tensor,
    negatives_MD: torch.Tensor | None,
    label_smoothing: float,
    group_name: str,
    exchange: str,
    products: torch.dtype | None,
    backend: str,
    gradients: bool,
) -> Gradients:
    """Loss and gradients by x, y, scale and negatives; without `gradients`, empty tensors instead of these."""
    chosen = record(_choose("contrastive_loss", x_nD, products=products, backend=backend))
    with torch.autocast(x_nD.device.type, enabled=False):
        rows, columns, whole = _meeting(x_nD, y_nD, negatives_MD, group_name, exchange, products, longest=True)
        scale = scale.to(x_nD.device, columns.dtype)
        result = _own(infonce(_squares_of(chosen), rows, columns, scale, label_smoothing, gradients), whole)
    dy_nD, dnegatives_MD = _split(result, len(y_nD), negatives_MD)
    return result.loss, _given(result.dx, scale), dy_nD, _given(result.dscale, scale), dnegatives_MD


@torch.library.custom_op("weft::sigmoid_loss", mutates_args=())
def _sigmoid_loss(
    x_nD: torch.Tensor,
    y_nD: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    negatives_MD: torch.Tensor | None,
    group_name: str,
    exchange: str,
    products: torch.dtype | None,
    backend: str,
    gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients by x, y, scale, bias and negatives; without `gradients`, empty tensors instead of these."""
    chosen = record(_choose("sigmoid_loss", x_nD, products=products, backend=backend))
    with torch.autocast(x_nD.device.type, enabled=False):
        rows, columns, whole = _meeting(x_nD, y_nD, negatives_MD, group_name, exchange, products)
        scale, bias = (number.to(x_nD.device, columns.dtype) for number in (scale, bias))
        result = _own(sigmoid(_squares_of(chosen), rows, columns, scale, bias, gradients), whole)
    dy_nD, dnegatives_MD = _split(result, len(y_nD), negatives_MD)
    dx_nD, dscale, dbias = (_given(each, scale) for each in (result.dx, result.dscale, result.dbias))
    return result.loss, dx_nD, dy_nD, dscale, dbias, dnegatives_MD


def _meeting(
    x_nD: torch.Tensor,
    y_nD: torch.Tensor,
    negatives_MD: torch.Tensor | None,
    group_name: str,
    exchange: str,
    products: torch.dtype | None,
    longest: bool = False,
) -> tuple[torch.Tensor, Columns, Whole | None]:
    """The rows, and the columns they are to meet, in the dtype of the products; whose they are, if not this rank's.

    longest: the columns know the longest rows.
    """
    y_cD = y_nD if negatives_MD is None else torch.cat([y_nD, negatives_MD])
    x_nD, y_cD = (each.to(products or x_nD.dtype).contiguous() for each in (x_nD, y_cD))
    dtype, group = accumulator_of(x_nD.dtype), group_named(group_name)
    numbers = longest_rows(x_nD, y_cD, dtype) if longest else ()
    columns = columns_of(y_cD, len(x_nD), dtype, group, exchange, numbers)
    whole = whole_of(x_nD, columns, exchange)
    return (x_nD, columns, None) if whole is None else (whole.x, whole.columns, whole)


def _own(result: Result, whole: Whole | None) -> Result:
    """This rank's part of a result."""
    if whole is None or result.dx is None or result.dy is None:
        return result
    dx_nD, dy_cD = whole.own(result.dx, result.dy)
    return replace(result, dx=dx_nD, dy=dy_cD)


def _split(result: Result, pairs: int, negatives_MD: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of y and of the negatives; empty where there is none."""
    dy_cD = _given(result.dy, result.loss)
    if result.dy is None or negatives_MD is None:
        return dy_cD, dy_cD.new_empty(0)
    return dy_cD[:pairs].clone(), dy_cD[pairs:].clone()


def _given(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if gradient is None else gradient


@_contrastive_loss.register_fake
def _(
    x_nD: torch.Tensor, y_nD: torch.Tensor, scale: torch.Tensor, negatives_MD: torch.Tensor | None, *settings: Any
) -> Gradients:
    loss, dx_nD, dy_nD, dscale, _, dnegatives_MD = _empty_results(x_nD, negatives_MD, *settings)
    return loss, dx_nD, dy_nD, dscale, dnegatives_MD


@_sigmoid_loss.register_fake
def _(
    x_nD: torch.Tensor,
    y_nD: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    negatives_MD: torch.Tensor | None,
    *settings: Any,
) -> list[torch.Tensor]:
    return _empty_results(x_nD, negatives_MD, *settings)


def _empty_results(x_nD: torch.Tensor, negatives_MD: torch.Tensor | None, *settings: Any) -> list[torch.Tensor]:
    """What the operations return, without values: loss, gradients by x, y, scale, bias, negatives."""
    gradients = settings[-1]  # whether they are wanted
    shapes = [x_nD.shape, x_nD.shape, (), (), (0,) if negatives_MD is None else negatives_MD.shape]
    dtype = accumulator_of(x_nD.dtype)
    return [x_nD.new_empty(shape, dtype=dtype) for shape in [(), *(shapes if gradients else [(0,)] * 5)]]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)  # zeros as large as the embeddings, for results that have no gradient
    ctx.save_for_backward(*gradients)
    ctx.arguments = len(inputs)
    # in the order of the arguments, which is that of the gradients too, with the negatives last
    ctx.dtypes = [None if each is None else each.dtype for each in inputs[: len(gradients)]]


@once_differentiable  # type: ignore[untyped-decorator]  # torch's
def _backward(ctx: Any, gradient: torch.Tensor | None, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    factored = [
        (each * gradient).to(dtype) if needed and gradient is not None else None
        for each, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return (*factored, *[None] * (ctx.arguments - len(factored)))


_contrastive_loss.register_autograd(_backward, setup_context=_setup)
_sigmoid_loss.register_autograd(_backward, setup_context=_setup)
