"""Pages of the latent cache: which page belongs to whom, counted by reference since samples share their prompt's."""

from __future__ import annotations


class PagePool:
    """Hands out page numbers 0 .. num_pages - 1. A page is free again when its last holder lets go of it."""

    def __init__(self, num_pages: int) -> None:
        self.free = list(range(num_pages - 1, -1, -1))
        self.holders = [0] * num_pages

    def take(self, n: int) -> list[int]:
        """n pages with one holder each; AssertionError if there are too few (callers look at len(free) first)."""
        assert n <= len(self.free), f"{n} pages wanted, {len(self.free)} free"
        pages = [self.free.pop() for _ in range(n)]
        for page in pages:
            self.holders[page] = 1
        return pages

    def share(self, pages: list[int]) -> list[int]:
        """The same pages with one more holder each."""
        for page in pages:
            assert self.holders[page] > 0, f"page {page} is free"
            self.holders[page] += 1
        return list(pages)

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self.holders[page] -= 1
            assert self.holders[page] >= 0, f"page {page} released too often"
            if self.holders[page] == 0:
                self.free.append(page)
