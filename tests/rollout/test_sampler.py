"""Sampling by hand: kept sets, log-probabilities and log-support, frequencies."""

import math

import numpy as np
import pytest
import torch

from rollout import SamplingParams
from rollout.draws import sample_seeds, uniform
from rollout.paged.sampler import SamplingRows, kept_tokens, sample

PROBS = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
CPU = torch.device("cpu")


def draw(params: list[SamplingParams], numbers: list[float], logits: torch.Tensor | None = None) -> list[list[float]]:
    """Rows (token, logprob, log_support)."""
    logits = PROBS.log().repeat(len(params), 1) if logits is None else logits
    drawn = sample(logits, SamplingRows.of(params, logits.shape[1], CPU), np.array(numbers))
    return [list(row) for row in zip(*(t.tolist() for t in drawn))]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(), [0, 1, 2, 3, 4]),
        (SamplingParams(top_k=2), [1, 3]),
        (SamplingParams(top_k=99), [0, 1, 2, 3, 4]),
        (SamplingParams(top_k=-1), [0, 1, 2, 3, 4]),
        (SamplingParams(top_p=0.3), [1]),
        (SamplingParams(top_p=0.6), [1, 3]),
        (SamplingParams(top_p=0.7), [1, 3, 4]),
        (SamplingParams(top_p=1e-6), [1]),
        (SamplingParams(min_p=0.5), [1, 3, 4]),  # at least 0.5 * 0.4
        (SamplingParams(min_p=0.51), [1, 3]),
        (SamplingParams(min_p=1.0), [1]),
        # top-p of what top-k left: 0.4, 0.25, 0.2 become 0.47, 0.29, 0.24
        (SamplingParams(top_k=3, top_p=0.75), [1, 3]),
        (SamplingParams(top_k=4, min_p=0.6, top_p=0.9), [1, 3]),
        # at temperature 0.5 probabilities are squared: 0.4^2 of 0.275 is already 0.58
        (SamplingParams(temperature=0.5, top_p=0.57), [1]),
    ],
)
def test_kept_tokens_and_log_support(params: SamplingParams, kept: list[int]) -> None:
    power = PROBS ** (1 / params.temperature)
    probs = power / power.sum()
    rows = SamplingRows.of([params], 5, CPU)
    assert kept_tokens(probs[None], rows)[0].nonzero()[:, 0].tolist() == kept
    mass = probs[kept].sum().item()
    numbers = np.linspace(0.0005, 0.9995, 1000).tolist()
    drawn = draw([params] * 1000, numbers)
    assert {int(token) for token, _, _ in drawn} == set(kept)
    for token, logprob, support in drawn:
        assert logprob == pytest.approx(math.log(probs[int(token)]), abs=1e-5)
        assert support == pytest.approx(math.log(mass), abs=1e-5)
    share = np.bincount([int(token) for token, _, _ in drawn], minlength=5) / 1000
    expected = [probs[i].item() / mass if i in kept else 0.0 for i in range(5)]
    np.testing.assert_allclose(share, expected, atol=2e-3)  # inversion: evenly spread numbers give even shares


def test_inversion_in_order_of_token_ids() -> None:
    plain = SamplingParams()
    numbers = [0.049, 0.051, 0.449, 0.451, 0.549, 0.551, 0.799, 0.801, 1e-12, 1 - 1e-12]
    tokens = [token for token, _, _ in draw([plain] * len(numbers), numbers)]
    assert tokens == [0, 1, 1, 2, 2, 3, 3, 4, 0, 4]


def test_without_truncation_log_support_is_zero() -> None:
    assert [support for _, _, support in draw([SamplingParams(temperature=0.7)] * 3, [0.1, 0.5, 0.9])] == [0.0] * 3


def test_temperature_zero_takes_the_likeliest_with_probability_one() -> None:
    (greedy, plain) = draw([SamplingParams(temperature=0), SamplingParams()], [0.99, 0.99])
    assert greedy == [1, pytest.approx(math.log(0.4)), pytest.approx(math.log(0.4))]  # drawn with exp(0) = 1
    assert plain == [4, pytest.approx(math.log(0.2)), 0.0]
    with_top_p = draw([SamplingParams(temperature=0, top_p=0.5)], [0.99])[0]
    assert with_top_p == greedy


def test_rows_with_different_settings_do_not_mix() -> None:
    settings = [
        SamplingParams(), SamplingParams(top_k=1), SamplingParams(top_p=0.6), SamplingParams(temperature=2.0),
        SamplingParams(temperature=0), SamplingParams(min_p=0.5, temperature=0.5),
    ]  # fmt: skip
    numbers = [0.97, 0.97, 0.97, 0.3, 0.3, 0.9]
    together = draw(settings, numbers)
    assert together == [draw([p], [u])[0] for p, u in zip(settings, numbers)]


def test_huge_and_infinite_logits() -> None:
    logits = torch.tensor([[1e4, 0.0, -math.inf], [-math.inf, -math.inf, 3.0]])
    assert [row[0] for row in draw([SamplingParams()] * 2, [0.999, 1e-9], logits)] == [0, 2]


def test_frequencies_match_probabilities() -> None:
    count, probs = 40_000, torch.softmax(torch.randn(30, generator=torch.Generator().manual_seed(0)) * 2, 0)
    numbers = uniform(sample_seeds(3, count), np.full(count, 5))
    tokens, _, _ = sample(probs.log().repeat(count, 1), SamplingRows.of([SamplingParams()] * count, 30, CPU), numbers)
    observed, expected = np.bincount(tokens.numpy(), minlength=30), probs.double().numpy() * count
    assert ((observed - expected) ** 2 / expected).sum() < 58.3  # chi-square, 29 degrees of freedom, p = 0.001
