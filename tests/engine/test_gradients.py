"""Gradient norms and clipping are torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from runner.engine.gradients import clip, global_norm

pytestmark = pytest.mark.usefixtures("quiet")


def some(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=made).to(dtype) for shape in shapes]


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shapes", [[(3,)], [(4, 5), (5,), ()], [(100, 100), (1,)]])
def test_clipping_is_torchs(shapes: list[tuple[int, ...]], limit: float) -> None:
    gradients = some(*shapes)
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    expected = nn.utils.clip_grad_norm_(parameters, limit)
    norm = global_norm(gradients)
    clip(gradients, norm, limit)
    assert norm.dim() == 0
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for gradient, parameter in zip(gradients, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shapes", [[(50,)], [(50,), (20, 3)]])
def test_the_norm_of_bfloat16_is_float32(shapes: list[tuple[int, ...]]) -> None:
    gradients = some(*shapes, dtype=torch.bfloat16)
    norm = global_norm(gradients)
    assert norm.dtype == torch.float32
    exact = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    torch.testing.assert_close(norm.double(), exact, rtol=1e-2, atol=0)
    clip(gradients, norm, 0.1)
    assert gradients[0].dtype == torch.bfloat16


def test_no_gradients_have_no_length() -> None:
    assert global_norm([]).item() == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 2])
def test_what_is_not_finite_shows_in_the_norm(bad: float, count: int) -> None:
    gradients = some(*[(3,)] * count)
    gradients[-1][0] = bad
    assert not global_norm(gradients).isfinite()
