"""The Gluon attention kernel as far as it can be seen without a GPU: what its machine code has, that the launcher
describes its tensors as the compile gate does, and what it refuses. test_attention_gluon_model.py runs its source.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from kernels import aot
from kernels.attention_spec import Spec
from kernels.gpu import attention_gluon

aot.choose_cache_folder()
CASES = {case.name: case for case in attention_gluon.aot_cases()}


# --- the machine code


Machined = tuple[aot.AotCase, str, list[str]]  # case, PTX, instructions without their predicates


@pytest.fixture(scope="module", params=["attention_gluon 128 bf16 causal", "attention_gluon 256 fp16 full"])
def machined(request: pytest.FixtureRequest) -> Machined:
    case = CASES[request.param]
    compiled = aot.compile_case(case, "sm_90")
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);", aot.machine_code(compiled.asm["cubin"]), re.MULTILINE)
    return case, compiled.asm["ptx"], [re.sub(r"^@!?U?P\d\s+", "", line) for line in lines]


def test_it_uses_what_hopper_has(machined: Machined) -> None:
    _, ptx, lines = machined
    names = {line.split(".")[0].split()[0] for line in lines}
    assert {"HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG"} <= names
    assert "STL" not in names  # no register is spilled
    registers = re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)
    assert {"240", "24"} <= set(registers)


def test_products_stay_asynchronous(machined: Machined) -> None:
    """ptxas serializes them, with a warning, when it cannot keep their registers apart."""
    _, ptx, _ = machined
    assert "serialized" not in aot.assembler_report(ptx)


def test_the_softmax_runs_under_a_product(machined: Machined) -> None:
    """All its exponentials lie between the waits for the scores and for the output: ptxas is free to move them."""
    case, _, code = machined
    first, second = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    starts = [place for place, line in enumerate(code) if line.startswith(first)]
    assert len(starts) == 4  # two groups of warps, with mask and without
    for start in starts:
        end = next(place for place in range(start, len(code)) if code[place].startswith(second))
        exponentials = sum("MUFU.EX2" in line for line in code[start:end])
        assert exponentials >= 64 * case.constexprs["KEYS"] // 128  # a thread's: 64 rows, 128 threads


# --- the launcher, and what it refuses


def tensors(
    q: tuple[int, ...] = (2, 4, 9, 64), k: tuple[int, ...] = (2, 2, 7, 64), dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in (q, k, k)]


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_launcher_passes_what_the_gate_compiled(case: aot.AotCase) -> None:
    _, size, dtype, mask = case.name.split()
    q, k, v = tensors(
        (2, 4, 300, int(size)), (2, 2, 7, int(size)), {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    )
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    spec = Spec(scale=0.5, causal=mask == "causal")
    grid, arguments, constants = attention_gluon.launch(q, k, v, torch.empty_like(q), torch.empty(2, 4, 300), spec)
    assert grid == (2 * 4 * 3,)
    assert {name: constants[name] for name in case.constexprs} == case.constexprs
    kinds = list(case.signature.values())
    for argument, kind in zip(arguments[:4], kinds, strict=False):
        assert f"tensordesc<{dtype}{argument.block_shape},{argument.layout!r}>" == kind
    assert arguments[0].strides == [4 * 300 * int(size), int(size), 4 * int(size), 1]
    assert arguments[5:9] == (4, 2, 300, 7)
    assert arguments[9] == pytest.approx(0.5 * math.log2(math.e))
    assert len(arguments) == len(kinds)


def test_an_axis_of_one_may_have_any_stride() -> None:
    q, k, v = tensors((1, 2, 5, 64), (1, 2, 5, 64))
    odd = torch.as_strided(k, k.shape, (3, 320, 64, 1))
    assert "needs a Hopper GPU" in attention_gluon.refusal(q, odd, v, Spec(1.0))
    _, arguments, _ = attention_gluon.launch(q, odd, v, q, q[..., 0].float(), Spec(1.0))
    assert arguments[1].strides == [64, 320, 64, 1]


def test_no_keys_at_all() -> None:
    q, k, v = tensors(k=(2, 2, 0, 64))
    out, lse = attention_gluon.forward(q, k, v, Spec(1.0))
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:3], torch.float32)


def test_refusals() -> None:
    q, k, v = tensors()
    plain = Spec(scale=0.125)

    def reason(*each: torch.Tensor, spec: Spec = plain, **more: Any) -> str:
        return attention_gluon.refusal(*each, spec, **more)

    assert reason(q, k, v) == "the tensors are on cpu: it needs a Hopper GPU (sm_90)"
    assert "need q [B, H, Q, K]" in reason(q[0], k, v)
    assert "the 4 heads are no multiple of the 3" in reason(q, *tensors(k=(2, 3, 7, 64))[1:])
    assert "heads of size 72: sizes 64, 128, 256 are there" in reason(*tensors((2, 4, 9, 72), (2, 2, 7, 72)))
    assert "need bfloat16 or float16" in reason(*tensors(dtype=torch.float32))
    assert reason(q, k, v, spec=Spec(1.0, window=4)) == "a window: it is plain or causal only"
    assert "a soft cap and dropout" in reason(q, k, v, spec=Spec(1.0, soft_cap=5.0, dropout=0.1))
    assert "key lengths" in reason(q, k, v, key_lengths_B=torch.tensor([1, 2]))
    assert "packed samples" in reason(q, k, v, query_starts=torch.tensor([0, 2]))
    assert "scale is 0" in reason(q, k, v, spec=Spec(0.0))
    assert "side by side" in reason(q, k.transpose(2, 3).contiguous().transpose(2, 3), v)
    assert "multiples of 8 elements" in reason(q, k, torch.zeros(2, 2, 7, 68, dtype=v.dtype)[..., :64])
    assert "no expanded axis" in reason(q, k[:, :1].expand(-1, 2, -1, -1), v)
    assert "begins at element 4 of its storage" in reason(q, torch.zeros(2, 2, 7, 72, dtype=v.dtype)[..., 4:68], v)
    assert "need one device" in reason(q.to("meta"), k, v)


def test_a_tensor_off_a_boundary_is_named() -> None:
    q, k, v = tensors()
    off = torch.zeros(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape)
    with pytest.raises(ValueError, match="k begins 2 bytes off a multiple of 16"):
        attention_gluon.forward(q, off, v, Spec(1.0))


def test_the_choice_can_be_traced() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q + 1 if attention_gluon.refusal(q, k, v, Spec(1.0)) else q

    q, k, v = tensors()
    assert (choose(q, k, v) == 1).all()
