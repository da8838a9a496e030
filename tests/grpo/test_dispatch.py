"""Dispatch with engines made of plain objects: balance, room, order, and engines that die with work under way."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from grpo.config import Config, RolloutConfig
from grpo.dispatch import Held, Request, dispatch, hand_out, room_for, tokens
from grpo.roles import RolloutRole
from model.create import create_model
from rollout import Completion, SamplingParams

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_v3.yaml"


def requests(count: int, n: int = 4, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 40 tokens; at most 5 to 100 more for each of n samples."""
    rng = random.Random(seed)
    return [(range(rng.randint(1, 40)), SamplingParams(n=n, max_tokens=rng.randint(5, 100))) for _ in range(count)]


def reply(index: int) -> list[Completion]:
    return [Completion((index,), (0.0,), (0.0,), "stop", 0)]


class Fleet:
    """Engines that do one group in tokens / speed seconds; a call is answered when its group, or all of them, is done.

    Where `deaths` has the number of a call, its engine dies in it: the answer comes late, from a new one, as
    RemoteCall.result gives it.
    """

    def __init__(self, speeds: dict[str, float], room: int | None, deaths: tuple[int, ...] = ()) -> None:
        self.speeds, self.room, self.deaths = speeds, room, deaths
        self.now = 0.0
        self.busy: dict[str, float] = dict.fromkeys(speeds, 0.0)
        self.ends: dict[int, float] = {}
        self.calls: list[tuple[str, Held, bool]] = []
        self.by: dict[int, str] = {}

    def send(self, engine: str, held: Held, everything: bool) -> Any:
        self.calls.append((engine, held, everything))
        if self.room is not None and len(held) > 1:
            assert sum(map(tokens, held.values())) <= self.room
        sizes = {index: tokens(request) / self.speeds[engine] for index, request in held.items()}
        done = list(held) if everything else [min(sizes, key=lambda i: sizes[i])]
        delay = sum(sizes.values()) if everything else sizes[done[0]]
        if len(self.calls) in self.deaths:
            delay += 1000
        self.ends[id(held)] = self.busy[engine] = self.now + delay
        for index in done:
            self.by[index] = engine
        return Reply({index: reply(index) for index in done}, self.busy[engine])

    def first(self, pending: Mapping[str, Any]) -> str:
        engine = min(pending, key=lambda e: pending[e].at)
        self.now = max(self.now, pending[engine].at)
        return engine


class Reply:
    def __init__(self, value: dict[int, list[Completion]], at: float) -> None:
        self.value, self.at = value, at

    def result(self) -> dict[int, list[Completion]]:
        return self.value


@pytest.mark.parametrize("room", [None, 0, 500, 5000])
@pytest.mark.parametrize("deaths", [(), (2,), (1, 3, 4, 9)])
def test_every_request_is_answered_once_and_in_order(room: int | None, deaths: tuple[int, ...]) -> None:
    work = requests(50)
    fleet = Fleet({"a": 1.0, "b": 2.0, "c": 5.0}, room, deaths)
    got = dispatch(work, list(fleet.speeds), fleet.send, fleet.first, room)
    assert [group[0].token_ids for group in got] == [(i,) for i in range(50)]
    if room is None:
        assert len(fleet.calls) == 3
    assert dispatch([], ["a"], fleet.send, fleet.first, room) == []
    assert len(dispatch(work[:2], list(fleet.speeds), fleet.send, fleet.first, room)) == 2  # fewer than engines


def test_shares_are_equal_in_tokens_not_in_prompts() -> None:
    work = [(range(10), SamplingParams(max_tokens=n)) for n in (990, 10, 490, 10, 490, 10, 10)]
    fleet = Fleet({"a": 1.0, "b": 1.0}, None)
    dispatch(work, ["a", "b"], fleet.send, fleet.first)
    loads = [sum(map(tokens, held.values())) for _, held, _ in fleet.calls]
    assert max(loads) - min(loads) <= 20


def test_the_same_requests_are_shared_out_the_same_way() -> None:
    """Without room it cannot matter who is fast: bits of a batch depend on who is in it."""
    shares = []
    for speeds in ({"a": 1.0, "b": 3.0}, {"a": 5.0, "b": 1.0}):
        fleet = Fleet(speeds, None)
        dispatch(requests(30), ["a", "b"], fleet.send, fleet.first)
        shares.append([(engine, list(held)) for engine, held, _ in fleet.calls])
    assert shares[0] == shares[1]


def test_with_room_a_slow_engine_gets_less_and_the_batch_ends_sooner() -> None:
    work = requests(200)
    room = room_for(work, 16)
    assert room == 16 * sum(map(tokens, work)) // 800
    ends, counts = [], []
    for bound in (None, room):
        fleet = Fleet({"a": 1.0, "b": 3.0}, bound)
        dispatch(work, ["a", "b"], fleet.send, fleet.first, bound)
        ends.append(fleet.now)
        counts.append([list(fleet.by.values()).count(e) for e in "ab"])
    assert abs(counts[0][0] - counts[0][1]) < 20
    assert counts[1][1] > 2 * counts[1][0]
    assert ends[1] < 0.62 * ends[0]  # a level load at speeds 1 and 3: half the time of equal shares


def test_hand_out_by_hand() -> None:
    work: list[Request] = [(range(size - 1), SamplingParams(max_tokens=1)) for size in (50, 40, 30, 20, 10)]
    held: dict[str, Held] = {"a": {}, "b": {}}
    waiting = deque(range(5))
    hand_out(waiting, work, held, 60)
    assert (list(held["a"]), list(held["b"]), list(waiting)) == ([0], [1], [2, 3, 4])  # 30 more fit nowhere
    held["a"].clear()
    hand_out(waiting, work, {"a": held["a"]}, 60)  # b is busy
    assert (list(held["a"]), list(waiting)) == ([2, 3, 4], [])
    alone: dict[str, Held] = {"a": {}}
    hand_out(deque([0]), work, alone, 10)
    assert list(alone["a"]) == [0]  # larger than the room, but somebody has to


def test_an_answer_that_was_not_asked_for_is_an_error() -> None:
    with pytest.raises(AssertionError, match="a answered 7, which it was not asked for"):
        dispatch(requests(2), ["a"], lambda *_: Reply({7: reply(7)}, 0.0), lambda pending: next(iter(pending)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    create_model(TINY, path, seed=0)
    return str(path)


def test_a_role_goes_on_with_what_it_has_begun(directory: str) -> None:
    """Group by group, with more coming in between, it samples what one call samples; a new batch ends an old one."""
    config = Config(rollout=RolloutConfig(exact=True, max_num_seqs=8))
    role, fresh = RolloutRole(config, directory), RolloutRole(config, directory)
    work: list[Request] = [((3 + i, 9, 4), SamplingParams(n=2, max_tokens=4 + 3 * i, seed=i)) for i in range(6)]
    want = fresh.engine.generate([p for p, _ in work], [q for _, q in work])
    held: Held = dict(enumerate(work[:3]))
    got: dict[int, list[Completion]] = {}
    added: list[int] = []
    add = role.engine.add_request
    role.engine.add_request = lambda prompt, params: added.append(sum(prompt) - 16) or add(prompt, params)  # type: ignore
    while held:
        done = role.advance(1, held, False)
        assert done and not set(done) & set(got)
        got |= done
        held = {i: work[i] for i in range(min(6, 3 + 2 * len(got))) if i not in got}
    assert [got[i] for i in range(6)] == want and sorted(added) == list(range(6))
    role.advance(2, dict(enumerate(work)), False)  # given up with five groups under way
    assert len(role.begun) >= 4
    assert role.advance(3, {0: work[5]}, True) == {0: want[5]}
    assert not role.begun
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        role.advance(4, {0: work[0], 1: ((), work[1][1])}, True)
    assert role.advance(5, {1: work[1]}, True) == {1: want[1]}
