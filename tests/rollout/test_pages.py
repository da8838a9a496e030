"""Pages are counted by holder: shared ones come back when the last holder lets go."""

import pytest

from rollout.paged.pages import PagePool


def test_a_page_is_free_when_its_last_holder_lets_go() -> None:
    pool = PagePool(4)
    shared, own = pool.take(2), pool.take(1)
    assert shared + own == [0, 1, 2] and pool.free == [3]
    again = pool.share(shared)
    assert again == shared and again is not shared
    pool.release(shared)
    assert pool.free == [3] and pool.holders == [1, 1, 1, 0]
    pool.release(again + own)
    assert sorted(pool.free) == [0, 1, 2, 3] and pool.holders == [0, 0, 0, 0]


def test_misuse_is_caught() -> None:
    pool = PagePool(2)
    with pytest.raises(AssertionError, match="3 pages wanted, 2 free"):
        pool.take(3)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released too often"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="is free"):
        pool.share(pages)
