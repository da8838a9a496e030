"""When a call to an endpoint may start: so many at a time, so many a minute, and a budget that ends it all.

One per event loop, whose single thread is what makes the arithmetic here safe.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field


class BudgetSpent(Exception):
    """No call may start any more."""


@dataclass(slots=True)
class Spent:
    """What an endpoint was asked for so far: attempts sent, and the tokens it says they took."""

    requests: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Call:
    """One attempt: set `tokens` to what it took."""

    tokens: int = 0


@dataclass(slots=True)
class CallLimits:
    """0 stands for no limit. Starts are spaced evenly, so no minute sees more than its share, nor a burst.

    A call is charged `most_tokens` when it starts and what it took when it ends, so neither the tokens a minute nor
    the budget can be overrun by calls that are under way (as far as the estimate of a prompt's tokens is not too low).
    """

    spent: Spent
    concurrency: int
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_requests: int = 0
    max_total_tokens: int = 0
    _slots: asyncio.Semaphore = field(init=False)
    _settled: asyncio.Condition = field(init=False, default_factory=asyncio.Condition)
    _reserved: int = field(init=False, default=0)
    _next_request: float = field(init=False, default=0.0)  # time.monotonic() before which none may start
    _next_token: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.concurrency)

    @asynccontextmanager
    async def call(self, most_tokens: int) -> AsyncIterator[Call]:
        """Waits for its turn. Raises BudgetSpent where the call does not fit into what is left."""
        async with self._slots:
            await self._reserve(most_tokens)
            call, charged = Call(), 0.0
            try:
                charged = await self._wait_for_turn(most_tokens)
                self.spent.requests += 1
                yield call
            finally:
                self.spent.tokens += call.tokens
                self._reserved -= most_tokens
                if charged:
                    self._next_token -= charged * (1 - call.tokens / most_tokens)
                async with self._settled:
                    self._settled.notify_all()

    def pause(self, seconds: float) -> None:
        """Nothing starts for so long: the server said it is overloaded."""
        self._next_request = max(self._next_request, time.monotonic() + seconds)

    async def _reserve(self, most_tokens: int) -> None:
        async with self._settled:
            while self.max_total_tokens and self.spent.tokens + self._reserved + most_tokens > self.max_total_tokens:
                if not self._reserved:
                    raise BudgetSpent(
                        f"the budget is spent: {self.spent.tokens} of max_total_tokens {self.max_total_tokens}, and "
                        f"the next call may take {most_tokens}"
                    )
                await self._settled.wait()
            self._reserved += most_tokens

    async def _wait_for_turn(self, most_tokens: int) -> float:
        """Seconds of the token rate that the call is charged with."""
        while (wait := max(self._next_request, self._next_token) - time.monotonic()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait), self._settled:
                    await self._settled.wait()  # a call that ends gives back what it did not use
        if self.max_requests and self.spent.requests >= self.max_requests:
            raise BudgetSpent(f"the budget is spent: {self.spent.requests} of max_requests {self.max_requests}")
        now, charged = time.monotonic(), 0.0
        if self.requests_per_minute:
            self._next_request = now + 60 / self.requests_per_minute
        if self.tokens_per_minute:
            charged = most_tokens * 60 / self.tokens_per_minute
            self._next_token = now + charged
        return charged
