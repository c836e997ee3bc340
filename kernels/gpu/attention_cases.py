"""The configurations of the Triton attention kernels that the ahead-of-time gate compiles.

What a call can launch is any of 48 sets of options, for heads of any size, in 3 dtypes, on 4 GPUs, in up to 3 tiles for
each of 3 kernels: far more than can be compiled. Taken are

- every tile that bf16 calls choose, with few options, and of the tiles for long sequences those with the most that they
  have to bear: `ALL_LIGHT`, and `ALL` with soft cap and dropout, each with a window behind and to both sides;
- fp32 by exact products and by TF32: causal, and with the most that there is;
- fp16, causal.

Left out, since the code is the same but for a constant, a type, or tiles that are smaller: fewer options where more are
there; key lengths where documents are; the tiles for short sequences, which have no more scores a thread; heads of a
size between those taken, with the same tile, and smaller ones; edge blocks between 16 keys and a whole one; int32 for
int64 lengths; more of fp16; in fp32 windows to both sides. Nothing else reaches the kernels: the launcher copies what
does not start at multiples of 16 bytes, and `refusal` and kernels.dispatch keep away other sizes of heads and fp64.
tests/kernels/ahead_of_time/test_attention_launchers.py holds the launchers to this.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from kernels.gpu.attention_backward import attention_delta_kernel, attention_dkdv_kernel, attention_dq_kernel
from kernels.gpu.attention_dropout import dropout_keep_kernel
from kernels.gpu.attention_forward import attention_forward_kernel
from kernels.gpu.attention_spills import SPILLS
from kernels.gpu.attention_tiles import DELTA_ROWS, DKDV, DQ, FORWARD, SHORT, Tile, choose, parts

if TYPE_CHECKING:
    from kernels.aot import AotCase

SIZES = (64, 72, 80, 96, 128, 256)
MASKS: dict[str, tuple[str, ...]] = {
    "full": (),
    "causal": ("CAUSAL",),
    "lengths": ("LENGTHS",),
    "documents": ("QUERY_STARTS", "KEY_STARTS"),
    "causal documents": ("CAUSAL", "QUERY_STARTS", "KEY_STARTS"),
    "window": ("CAUSAL", "WINDOW"),
    "window lengths": ("CAUSAL", "WINDOW", "LENGTHS"),
    "window documents": ("CAUSAL", "WINDOW", "QUERY_STARTS", "KEY_STARTS"),
    "two-sided documents": ("WINDOW", "QUERY_STARTS", "KEY_STARTS"),
    "capped window": ("CAUSAL", "WINDOW", "CAP"),
    "causal dropout": ("CAUSAL", "DROP", "SEED"),
    "all documents": ("CAUSAL", "WINDOW", "CAP", "DROP", "SEED", "QUERY_STARTS", "KEY_STARTS"),
    "all two-sided": ("WINDOW", "CAP", "DROP", "SEED", "QUERY_STARTS", "KEY_STARTS"),
}
ALL_LIGHT, ALL = ("window documents", "two-sided documents"), ("all documents", "all two-sided")
_FEW = ("full", "causal", "lengths", "documents")
_MANY = (*_FEW, "causal documents", "window", "capped window", "causal dropout")
MASKS_OF_SIZE = {64: _MANY, 72: _FEW, 80: (*_FEW, "window"), 96: (*_FEW, "window"), 128: _MANY, 256: (*_FEW, "window")}
OF_WIDE = ("causal", "window documents", "all documents")
FLAGS = ("CAUSAL", "WINDOW", "CAP", "DROP")
POINTERS = {"LENGTHS": "*i64", "QUERY_STARTS": "*i32", "KEY_STARTS": "*i32", "SEED": "*i64"}


class Kind(NamedTuple):
    """What the tensors are: a name for the case, their type, how it is multiplied."""

    name: str = ""
    dtype: str = "bf16"
    precision: str = "ieee"

    @property
    def itemsize(self) -> int:
        return int(self.dtype[-2:]) // 8


BF16, FP16, FP32, TF32 = Kind(), Kind("fp16", "fp16"), Kind("fp32", "fp32"), Kind("tf32", "fp32", "tf32")


class Wanted(NamedTuple):
    """A kind of call; in every tile that such calls choose, or in that for long sequences alone."""

    size: int
    mask: str
    kind: Kind = BF16
    every_tile: bool = True


def cases() -> list[AotCase]:
    """All of them, one that several GPUs take with these as its targets."""
    rows = [_delta_case(size) for size in SIZES]
    rows += [_delta_case(128, kind) for kind in (FP16, FP32)]
    found = {case.name: case for case in (*rows, _keep_case())}
    for kernel, lists in (
        (attention_forward_kernel, FORWARD),
        (attention_dkdv_kernel, DKDV),
        (attention_dq_kernel, DQ),
    ):
        for architecture, tiles in lists.items():
            if architecture == "interpreter":
                continue
            for each in _wanted():
                chosen = chosen_tiles(tiles, each.size, each.mask, each.kind.itemsize)
                for tile in chosen if each.every_tile else chosen[:1]:
                    case = _case(kernel, each.size, tile, each.mask, architecture, each.kind)
                    known = found.setdefault(case.name, case)
                    if architecture not in known.targets:
                        found[case.name] = dataclasses.replace(known, targets=(*known.targets, architecture))
    return sorted(found.values(), key=lambda case: "bf16" not in case.signature.get("Q", "bf16"))


def _wanted() -> list[Wanted]:
    long = partial(Wanted, every_tile=False)
    return [
        *(Wanted(size, mask) for size in SIZES for mask in MASKS_OF_SIZE[size]),
        *(long(size, mask) for size in (64, 96, 128) for mask in ALL_LIGHT),
        *(long(size, mask) for size in (64, 72, 256) for mask in ALL),  # 72 to 256 take one tile for it
        long(64, "window lengths"),
        long(64, "causal", FP16),
        *(long(size, mask, kind) for size in (64, 128) for kind in (FP32, TF32) for mask in OF_WIDE),
    ]


def chosen_tiles(tiles: list[Tile], size: int, mask: str, itemsize: int) -> list[Tile]:
    """Every tile that a call can choose, by its lengths; that for long sequences first."""
    options = MASKS[mask]
    bears = dict(
        causal="CAUSAL" in options,
        masked=any(option in ("WINDOW", "LENGTHS", "QUERY_STARTS") for option in options),
        heavy=any(option in ("CAP", "DROP") for option in options),
    )
    lengths = (SHORT + 1, *(tile.own for tile in tiles))
    return list(dict.fromkeys(choose(tiles, size, itemsize, each, **bears) for each in lengths))


def _case(kernel: Any, size: int, tile: Tile, mask: str, architecture: str, kind: Kind) -> AotCase:
    """Full attention is taken with 16 keys to an edge block, as for 257 keys; the others with whole ones."""
    from kernels.aot import AotCase

    left, right = parts(size)
    options = MASKS[mask]
    constexprs = dict(
        HEAD=size, LEFT=left, RIGHT=right, UNIT=8, ROWS=tile.own, KEYS=tile.step,
        EDGE=16 if mask == "full" else tile.step, ACC=tl.float32, PRECISION=kind.precision,
        **{flag: flag in options for flag in FLAGS},
        **{pointer: None for pointer in POINTERS if pointer not in options},
    )  # fmt: skip
    if kernel is attention_dkdv_kernel:
        constexprs |= {"ROWS": tile.step, "KEYS": tile.own}
        del constexprs["EDGE"]
    names = [name for name in kernel.arg_names if name not in constexprs]
    kinds = {"LSE": "*fp32", "DELTA": "*fp32", **POINTERS}
    pointers = {name: kinds.get(name, f"*{kind.dtype}") for name in names if name.isupper()}
    numbers = {name: "fp32" if name in ("scale", "soft_cap") else "i32" for name in names if name.islower()}
    stem = " ".join((kernel.fn.__name__.removesuffix("_kernel"), str(size), mask, *kind.name.split()))
    name = f"{stem} {tile.own}x{tile.step} w{tile.warps} s{tile.stages}"
    return AotCase(
        name=name,
        kernel=kernel,
        signature=pointers | numbers,
        constexprs=constexprs,
        attrs=[*pointers],
        options=dict(num_warps=tile.warps, num_stages=tile.stages),
        targets=(architecture,),
        spills=SPILLS.get(name, {}),
        # Hopper's and Blackwell's matrix instructions take 64 rows or more, but so many of a large head do not fit
        matrix=(kind.itemsize == 2 or kind.precision == "tf32")
        and (tile.own >= 64 or (kind.itemsize == 2 and kernel is not attention_dkdv_kernel)),
    )


def _delta_case(size: int, kind: Kind = BF16) -> AotCase:
    from kernels.aot import AotCase

    names = [name for name in attention_delta_kernel.arg_names if not name.isupper()]
    tensors = {"GRAD": f"*{kind.dtype}", "OUT": f"*{kind.dtype}", "DELTA": "*fp32"}
    width = triton.next_power_of_2(size)
    return AotCase(
        name=" ".join(("attention_delta", str(size), *kind.name.split())),
        kernel=attention_delta_kernel,
        signature=tensors | dict.fromkeys(names, "i32"),
        constexprs=dict(HEAD=size, WIDTH=width, UNIT=8, ROWS=DELTA_ROWS, ACC=tl.float32),
        attrs=[*tensors],
        options={},
        matrix=False,
    )


def _keep_case() -> AotCase:
    from kernels.aot import AotCase

    return AotCase(
        name="dropout_keep",
        kernel=dropout_keep_kernel,
        signature={"KEEP": "*i8", "SEED": "*i64", "queries": "i32", "keys": "i32", "threshold": "i32"},
        constexprs={"ROWS": 64, "KEYS": 64},
        attrs=["KEEP", "SEED"],
        options={},
        matrix=False,
    )
