"""Which engine samples what: groups go to the engine with the fewest outstanding tokens, and each is answered once.

A group (a prompt and its samples) stays on one engine, which reads the prompt once. `room` bounds the tokens that an
engine is given at a time; what is left waits here and goes to whoever has room first, so a slow engine gets less.
Without `room` everything is given out at once, the same way every time: for engines whose last bits depend on the
batch.

Each call names all that its engine is to work on, not only what is new. So an engine that died and came back has
nothing to be told: the same call asks it again for what it still owes, and what was answered before is not in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from rollout import Completion, SamplingParams

Request = tuple[Sequence[int], SamplingParams]  # prompt, how to sample it
Held = dict[int, Request]  # by position in the batch


class Answer(Protocol):
    """What an engine finished, perhaps not there yet."""

    def result(self) -> Mapping[int, list[Completion]]: ...


A = TypeVar("A", bound=Answer)


def tokens(request: Request) -> int:
    """The most that a group can come to: its prompt once, and every sample at full length."""
    prompt, params = request
    return len(prompt) + params.n * params.max_tokens


def room_for(requests: Sequence[Request], max_num_seqs: int) -> int:
    """Tokens of as many samples as an engine decodes at a time, at this batch's mean."""
    samples = sum(params.n for _, params in requests)
    return max_num_seqs * sum(map(tokens, requests)) // max(samples, 1)


def dispatch(
    requests: Sequence[Request],
    engines: Sequence[str],
    send: Callable[[str, Held, bool], A],
    first: Callable[[Mapping[str, A]], str],
    room: int | None = None,
) -> list[list[Completion]]:
    """The answer to each request, in order.

    send(engine, held, everything) asks an engine to work on `held` until one group of it is done, or everything;
    first(pending) waits for one of several calls and names its engine. One call an engine is under way at a time.
    """
    waiting = deque(sorted(range(len(requests)), key=lambda i: -tokens(requests[i])))  # large ones first: a level end
    held: dict[str, Held] = {engine: {} for engine in engines}
    pending: dict[str, A] = {}
    answers: dict[int, list[Completion]] = {}
    while len(answers) < len(requests):
        hand_out(waiting, requests, {e: work for e, work in held.items() if e not in pending}, room)
        for engine, work in held.items():
            if work and engine not in pending:
                pending[engine] = send(engine, dict(work), not waiting)
        engine = first(pending)
        for index, completions in pending.pop(engine).result().items():
            assert index in held[engine], f"{engine} answered {index}, which it was not asked for, or answered before"
            del held[engine][index]
            answers[index] = completions
    return [answers[index] for index in range(len(requests))]


def collect(
    requests: Sequence[Request],
    begun: Sequence[Sequence[Completion]],
    engines: Sequence[str],
    send: Callable[[str, Held, dict[int, Sequence[Completion]], int], A],
    enough: int,
) -> list[list[Completion]]:
    """The samples of each request, in order: of at least `enough` requests complete, of the others as far as they got.

    `begun`: what there is of each already. send(engine, held, begun, enough) asks an engine for so many complete groups
    of `held`. Each engine gets its share of the requests, in order, and of `enough`, so nothing depends on who is fast:
    the answer is the same in one process, on Ray, and after an engine died in it.
    """
    held: dict[str, Held] = {engine: {} for engine in engines}
    hand_out(deque(range(len(requests))), requests, held, None)
    calls, seen = [], 0
    for engine, work in held.items():
        share = enough * (seen + len(work)) // max(len(requests), 1) - enough * seen // max(len(requests), 1)
        seen += len(work)
        if work:
            calls.append(send(engine, work, {index: begun[index] for index in work}, share))
    answers: dict[int, list[Completion]] = {}
    for call in calls:
        answers |= call.result()
    return [answers[index] for index in range(len(requests))]


def hand_out(waiting: deque[int], requests: Sequence[Request], held: dict[str, Held], room: int | None) -> None:
    """Moves work from `waiting` to the engines of `held`, each time to the one that has least, while there is room.

    An engine without work takes a group of any size.
    """
    outstanding = {engine: sum(map(tokens, work.values())) for engine, work in held.items()}
    while waiting and outstanding:
        size = tokens(requests[waiting[0]])
        engine = min(outstanding, key=lambda e: outstanding[e])
        if room is not None and outstanding[engine] and outstanding[engine] + size > room:
            return
        index = waiting.popleft()
        held[engine][index] = requests[index]
        outstanding[engine] += size
