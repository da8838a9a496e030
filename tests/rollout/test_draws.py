"""Counter-based draws: pure functions of (seed, position), uniform and uncorrelated."""

import numpy as np

from rollout.draws import sample_seeds, seed_of, uniform

EXPECTED_SEED = 5200964203003160165
EXPECTED_SEEDS = [13478418381427711195, 10936887474700444964, 3728693401281897946]
EXPECTED_DRAWS = [0.5064063083631742, 0.6444466208607611, 0.4743649834167734]


def test_draws_are_these_numbers() -> None:
    # fixed, so that a change of the mixer, which would change every run, does not go unnoticed
    seeds = sample_seeds(1234, 3)
    assert seeds.dtype == np.uint64
    draws = uniform(seeds, np.array([0, 1, 2]))
    assert seed_of(17, "a", 2) == EXPECTED_SEED
    np.testing.assert_array_equal(seeds, np.array(EXPECTED_SEEDS, dtype=np.uint64))
    np.testing.assert_array_equal(draws, EXPECTED_DRAWS)


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    seeds, positions = sample_seeds(5, 64), np.arange(64)
    together = uniform(seeds, positions)
    alone = [uniform(seeds[i : i + 1], positions[i : i + 1])[0] for i in range(64)]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(sample_seeds(5, 8), seeds[:8])  # more samples do not change the first ones


def test_different_seeds_positions_and_parts_give_different_draws() -> None:
    many = uniform(np.repeat(sample_seeds(0, 300), 300), np.tile(np.arange(300), 300))
    assert len(np.unique(many)) == len(many)
    assert len({seed_of(0, i, j) for i in range(50) for j in range(50)}) == 2500
    assert seed_of(1, 23) != seed_of(12, 3)
    assert all(0 <= seed_of(i) < 2**63 for i in range(100))
    assert sample_seeds(2**64 - 1, 2)[0] != sample_seeds(0, 2)[0]  # any whole number is a seed


def test_draws_are_uniform_and_uncorrelated() -> None:
    table = uniform(np.repeat(sample_seeds(7, 400), 400), np.tile(np.arange(400), 400)).reshape(400, 400)
    assert table.min() > 0 and table.max() < 1
    counts = np.histogram(table, bins=100, range=(0, 1))[0]
    expected = table.size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 149  # chi-square, 99 degrees of freedom, p = 0.001
    for a, b in ((table[:-1], table[1:]), (table[:, :-1], table[:, 1:])):  # next seed, next position
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(table.size)
