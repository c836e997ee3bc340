"""Rotary embedding on CPU against the fp64 definition, its tables, and which backend is chosen where."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import dispatch, reference
from kernels.rotary import angles, grid_angles, rotary


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("size", "pairs"), [(2, 1), (64, 32), (72, 18), (13, 5)])
def test_is_its_formula_with_gradients(size: int, pairs: int, interleaved: bool) -> None:
    table = angles(torch.arange(7), pairs, dtype=torch.float64)
    results = []
    for function in (rotary, reference.rotary):
        x = draw(2, 3, 7, size).requires_grad_()
        out = function(x, *table, interleaved=interleaved)
        results.append([out.detach(), *torch.autograd.grad(out, x, draw(2, 3, 7, size) + 1)])
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only(interleaved: bool) -> None:
    q, k = draw(1, 1, 1, 16), draw(1, 1, 1, 16) + 1
    scores = []
    for start in (0, 100):
        table = angles(torch.tensor([start, start + 7]), 8, dtype=torch.float64)
        turned = rotary(torch.cat([q, k], 2), *table, interleaved=interleaved)
        scores.append(turned[0, 0, 0] @ turned[0, 0, 1])
    torch.testing.assert_close(*scores)


def test_the_pairings_are_one_permutation_apart() -> None:
    x, table = draw(1, 2, 5, 12), angles(torch.arange(5), 6, dtype=torch.float64)
    to_halves = torch.tensor([0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11])
    torch.testing.assert_close(rotary(x, *table, interleaved=True)[..., to_halves], rotary(x[..., to_halves], *table))


@pytest.mark.parametrize("interleaved", [False, True])
def test_bf16_is_rounded_once(interleaved: bool) -> None:
    x, table = draw(2, 3, 33, 64, dtype=torch.bfloat16), angles(torch.arange(33), 32)
    out = rotary(x, *table, interleaved=interleaved)
    exact = reference.rotary(x, *table, interleaved=interleaved)
    assert (out == exact.bfloat16()).double().mean() > 0.999  # fp32 in between may turn a tie


def test_positions_by_sample() -> None:
    positions = torch.tensor([[0, 1, 2], [7, 3, 0]])
    x, table = draw(2, 4, 3, 8), angles(positions, 4, dtype=torch.float64)
    for b in range(2):
        alone = rotary(x[b : b + 1], *angles(positions[b], 4, dtype=torch.float64))
        torch.testing.assert_close(rotary(x, *table)[b : b + 1], alone)


def test_angles() -> None:
    cos, sin = angles(torch.tensor([0, 3]), 2, base=100.0, dtype=torch.float64)
    expected = torch.tensor([[0.0, 0.0], [3.0, 0.3]], dtype=torch.float64)
    torch.testing.assert_close([cos, sin], [expected.cos(), expected.sin()])
    far = angles(torch.tensor([1_000_003]), 1)[1]
    assert far.dtype == torch.float32
    assert abs(float(far) - math.sin(1_000_003)) < 1e-6  # an angle in fp32 would be off by 0.03
    with pytest.raises(ValueError, match="pairs is 0"):
        angles(torch.arange(3), 0)


def test_grid_angles_turn_half_with_the_row_and_half_with_the_column() -> None:
    cos, sin = grid_angles(2, 3, 4, first=1, base=10.0)
    assert cos.shape == sin.shape == (7, 4)
    assert torch.equal(cos[0], torch.ones(4))
    assert torch.equal(sin[0], torch.zeros(4))
    down, across = angles(torch.arange(2), 2, base=10.0)[1], angles(torch.arange(3), 2, base=10.0)[1]
    for row in range(2):
        for column in range(3):
            assert torch.equal(sin[1 + 3 * row + column], torch.cat([down[row], across[column]]))
    with pytest.raises(ValueError, match="pairs is 3: need an even number"):
        grid_angles(2, 2, 3)


def test_finite_differences() -> None:
    table = angles(torch.arange(3), 2, dtype=torch.float64)
    x = draw(1, 2, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotary(x, *table), (x,))
    assert torch.autograd.gradcheck(lambda x: rotary(x, *table, interleaved=True), (x,))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend: str) -> None:
    table = angles(torch.arange(5), 4)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return rotary(rotary(x, *table), *table, interleaved=True)

    compiled = torch.compile(turned, backend=backend, fullgraph=True)
    x = draw(2, 3, 5, 8, dtype=torch.float32)
    torch.testing.assert_close(compiled(x), turned(x))


def test_what_does_not_fit_is_refused() -> None:
    x, (cos, sin) = torch.ones(2, 3, 5, 8), angles(torch.arange(5), 4)
    for arguments in ((x[0], cos, sin), (x, cos[:4], sin[:4]), (x, cos, sin[:, :2]), (x[..., :6], cos, sin)):
        with pytest.raises(ValueError, match=r"rotary: x \["):
            rotary(*arguments)
    with pytest.raises(ValueError, match=r"backend 'triton' cannot do this: (the tensors are on cpu|triton is not)"):
        rotary(x, cos, sin, backend="triton")


def test_a_gpu_takes_triton_once_the_trial_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "_trials", {("rotary in torch.float32", "cuda:0"): ""})
    with FakeTensorMode():
        x, table = torch.empty(2, 3, 5, 8, device="cuda"), torch.empty(5, 4, device="cuda")
        assert dispatch.why(rotary, x, table, table) == "rotary: triton, the preferred one"
        dispatch._trials[("rotary in torch.float32", "cuda:0")] = "its trial failed"
        assert "torch, the first that can" in dispatch.why(rotary, x, table, table, interleaved=True)
        wants = torch.empty(5, 4, device="cuda", requires_grad=True)
        assert "the angles require a gradient" in dispatch.why(rotary, x, wants, table)
    cpu = torch.ones(1, 1, 5, 8), torch.ones(5, 4), torch.zeros(5, 4)
    assert dispatch.why(rotary, *cpu) == "rotary: torch, the preferred one"
