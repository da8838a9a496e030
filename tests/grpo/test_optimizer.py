"""AdamW with BF16 moments: an exact hand computation, how near it stays to FP32 moments, and where it refuses."""

import pytest
import torch

import grpo.optimizer
from grpo.optimizer import LowMemoryAdamW, build_optimizer, step_with_scales

BETAS = (0.9, 0.95)


def gradients(steps: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(-6, 0, shape[-1])  # a column's gradients are of one size
    return [torch.randn(*shape, generator=generator) * scale for _ in range(steps)]


def trained(steps: int, dtype: torch.dtype, weight_decay: float = 0.1) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.ones(16, 32))
    optimizer = build_optimizer([weight], 1e-2, BETAS, weight_decay, dtype)
    for grad in gradients(steps, (16, 32)):
        weight.grad = grad
        optimizer.step()
    return weight.detach(), optimizer


def test_two_steps_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo.optimizer, "CHUNK", 100)  # does not divide the 512 weights
    got, optimizer = trained(2, torch.bfloat16)
    want = torch.ones(16, 32, dtype=torch.float64)
    m = v = torch.zeros(16, 32, dtype=torch.float64)
    for step, grad in enumerate(gradients(2, (16, 32)), start=1):
        m, v = 0.9 * m + 0.1 * grad.double(), 0.95 * v + 0.05 * grad.double() ** 2
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        want = want * (1 - 1e-2 * 0.1) - 1e-2 * update
        m, v = m.bfloat16().double(), v.bfloat16().double()  # what is kept between steps
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    (state,) = optimizer.state.values()
    # FP32 and float64 can fall on either side of a rounding boundary of BF16: one ulp
    torch.testing.assert_close(state["exp_avg"].double(), m, rtol=2**-7, atol=0)
    torch.testing.assert_close(state["exp_avg_sq"].double(), v, rtol=2**-7, atol=0)
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_with_scales_is_one_with_scaled_gradients(dtype: torch.dtype) -> None:
    after = []
    for by_hand in (True, False):
        weights = [torch.nn.Parameter(torch.ones(16, 32)) for _ in range(3)]
        optimizer = build_optimizer(weights, 1e-2, BETAS, 0.1, dtype)
        for grads in zip(*(gradients(2, (16, 32)) for _ in weights)):
            for weight, grad, scale in zip(weights, grads, (0.3, 1.0, 7.0)):
                weight.grad = grad * scale if by_hand else grad.clone()
            if by_hand:
                optimizer.step()
            else:
                step_with_scales(optimizer, {weights[0]: 0.3, weights[2]: 7.0})
        after.append(torch.stack([weight.detach() for weight in weights]))
    assert torch.equal(*after)
    assert not torch.equal(after[0][0], after[0][1])


def test_stays_near_fp32_moments() -> None:
    """Over 200 steps the path differs by less than one percent of the distance travelled."""
    low, _ = trained(200, torch.bfloat16)
    full, _ = trained(200, torch.float32)
    assert (low - full).norm() / (full - 1).norm() < 0.01


def test_moments_that_are_not_fed_shrink_at_the_largest_beta2() -> None:
    weight = torch.nn.Parameter(torch.ones(256))
    optimizer = LowMemoryAdamW([weight], betas=(0.9, 0.996))
    weight.grad = torch.linspace(0.5, 1.5, 256)
    optimizer.step()
    before = optimizer.state[weight]["exp_avg_sq"].clone()
    weight.grad = torch.zeros(256)
    optimizer.step()
    assert (optimizer.state[weight]["exp_avg_sq"] < before).all()


def test_beta2_that_would_freeze_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta2 0.999: with BF16 moments at most 0.996"):
        build_optimizer([torch.nn.Parameter(torch.ones(2, 2))], 1e-3, (0.9, 0.999), 0.0, torch.bfloat16)


def test_weight_decay_is_for_matrices() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([matrix, vector], 0.1, BETAS, 0.5, torch.bfloat16)
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.95))
    assert vector.tolist() == [1.0, 1.0]


def test_moments_that_come_in_float32_are_not_overwritten() -> None:
    """As from a checkpoint of the other kind."""
    weights = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    given, own = (LowMemoryAdamW([weight], betas=BETAS) for weight in weights)
    for weight, optimizer in zip(weights, (given, own)):
        weight.grad = torch.full((4, 4), 0.5)
        optimizer.step()
    for key in ("exp_avg", "exp_avg_sq"):
        given.state[weights[0]][key] = given.state[weights[0]][key].float()
    for optimizer in (given, own):
        optimizer.step()
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(given.state[weights[0]][key].bfloat16(), own.state[weights[1]][key], rtol=0, atol=0)
    assert torch.equal(*weights)
