"""Every transport between real processes: bit for bit, whole versions only, whatever is lost, doubled or damaged."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config import Config, ConfigError, load_config
from grpo.transport import Disk, InProcess, Ipc, Transport, build_transport
from grpo.weight_sync import Bucket, Outbox, Pairs, flats, unpack

KINDS = ["object_store", "ipc", "broadcast", "disk"]
ENGINES = ["rollout-0", "rollout-1"]
SPAWN = multiprocessing.get_context("spawn")


def weights(version: int, changed: str = "") -> list[tuple[str, torch.Tensor]]:
    """Two dtypes, sizes that leave gaps, a view with strides; `changed`: this tensor alone differs."""
    made = []
    for i in range(8):
        generator = torch.Generator().manual_seed(100 * version + i + 50 * (f"m.{i}.weight" == changed))
        tensor = torch.randn(33, 7, generator=generator).to(torch.bfloat16 if i % 2 else torch.float32)
        made.append((f"m.{i}.weight", tensor.T if i == 3 else tensor))
    return made


def everyone(tensors: int) -> dict[str, list[Any]]:
    """All engines got this many tensors, bit for bit."""
    return {name: [True, tensors] for name in ENGINES}


def same(got: Pairs, want: Pairs) -> bool:
    return all(a == b and torch.equal(s.cpu(), t) for (a, s), (b, t) in zip(got, want, strict=True))


def ends(name: str, directory: str) -> dict[str, Transport]:
    """Of every kind, with little patience."""
    options = [{"weight_transport": kind, "broadcast_timeout": 2.0} for kind in KINDS]
    return {o["weight_transport"]: build_transport(load_config({"rollout": o}), name, directory) for o in options}


def engine(name: str, directory: str, calls: Any, answers: Any) -> None:
    """Fetches what it is told to, holds the bits against its own and says what happened. Version -1: dies with half."""
    torch.set_num_threads(1)
    transports, own_gpu = ends(name, directory), 1 + ENGINES.index(name)
    answers.put((name, "ready"))
    while (call := calls.get()) is not None:
        kind, received, version, changed = call
        if kind == "broadcast" and torch.cuda.device_count() > own_gpu:  # NCCL takes each GPU once
            torch.cuda.set_device(own_gpu)
        if version == -1:
            transports[kind].fetch(received[0])
            answers.put((name, "fetched one"))
            time.sleep(0.2)  # the queue's thread has to write
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            got = unpack(received, version, transports[kind].fetch)
            names = {name for name, _ in got}
            want = [pair for pair in weights(0 if changed else version, changed) if pair[0] in names]
            answers.put((name, same(got, want), len(got)))
            del got
        except (ValueError, ConnectionError) as err:
            answers.put((name, type(err).__name__, str(err)))
        del call, received


class Cast:
    """A learner's ends, and engines in processes of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.kind = str(directory), ""
        self.transports = ends("learner", self.directory)
        self.calls: dict[str, Any] = {}
        self.answers: dict[str, Any] = {}  # one for each: who is killed may hold the lock of his
        self.processes: dict[str, Any] = {}
        self.start(*ENGINES)

    @property
    def transport(self) -> Transport:
        return self.transports[self.kind]

    def start(self, *names: str) -> None:
        for name in names:
            self.calls[name], self.answers[name] = SPAWN.Queue(), SPAWN.Queue()
            args = (name, self.directory, self.calls[name], self.answers[name])
            self.processes[name] = SPAWN.Process(target=engine, args=args, daemon=True)
            self.processes[name].start()
        assert [self.answers[name].get(timeout=60)[0] for name in names] == list(names)

    def push(
        self,
        version: int,
        outbox: Outbox | None = None,
        since: int | None = None,
        changed: str = "",
        damaged: str = "",
        spoil: Callable[[list[Bucket]], list[Bucket]] | None = None,
        engines: list[str] = ENGINES,
        device: str = "cpu",
    ) -> dict[str, list[Any]]:
        """Everybody's answer to a version, of which one tensor is `damaged` on the way, or whose buckets are spoiled
        so that no engine should fetch one."""
        pairs = [(name, tensor.to(device)) for name, tensor in weights(0 if changed else version, changed)]
        plan = (outbox or Outbox()).plan(pairs, version, since, max_bytes=2000)
        if damaged:
            pairs = [(name, -tensor if name == damaged else tensor) for name, tensor in pairs]
        made = self.transport.post(plan, pairs, engines)
        for name in engines:
            self.calls[name].put((self.kind, spoil(made) if spoil else made, version, changed))
        if spoil is None:
            self.transport.send(made, pairs)
        answers = [self.answers[name].get(timeout=60) for name in engines]
        self.transport.release(made)
        return {name: rest for name, *rest in answers}

    def close(self) -> None:
        for name, process in self.processes.items():
            self.calls[name].put(None)
            process.join(20)


@pytest.fixture(scope="module")
def troupe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cast]:
    made = Cast(tmp_path_factory.mktemp("weights"))
    yield made
    made.close()


@pytest.fixture
def cast(troupe: Cast, request: pytest.FixtureRequest) -> Cast:
    troupe.kind = request.param
    return troupe


each = pytest.mark.parametrize("cast", KINDS, indirect=True)


@each
def test_versions_and_changes_arrive_bit_for_bit(cast: Cast) -> None:
    outbox = Outbox()
    assert cast.push(0, outbox) == everyone(8)
    for version in (1, 2):
        outbox.plan(weights(0), version - 1)
        assert cast.push(version, outbox, version - 1, changed="m.3.weight") == everyone(1)
    outbox.plan(weights(3), 2)
    assert cast.push(3, outbox, since=2) == everyone(0)  # nothing changed
    assert cast.push(4, outbox, since=1) == everyone(8)  # not what was sent last


FAULTS: dict[str, tuple[Callable[[list[Bucket]], list[Bucket]], str]] = {
    "nothing": (lambda made: [], "not one whole version"),
    "lost": (lambda made: made[:-1], "not one whole version"),
    "doubled": (lambda made: [*made, made[0]], "not one whole version"),
    "one for another": (lambda made: [*made[:-1], made[0]], "not one whole version"),
    "mixed": (lambda made: [made[0], *(dataclasses.replace(b, version=8) for b in made[1:])], "versions [8, 9]"),
    "older": (lambda made: [dataclasses.replace(b, version=8) for b in made], "version 8 came where 9 was expected"),
    "two bases": (lambda made: [made[0], *(dataclasses.replace(b, base=7) for b in made[1:])], "several bases"),
}


@each
@pytest.mark.parametrize("fault", FAULTS)
def test_anything_but_the_whole_version_is_refused_by_name(cast: Cast, fault: str) -> None:
    spoil, message = FAULTS[fault]
    for kind, text in cast.push(9, spoil=spoil).values():
        assert kind == "ValueError" and message in text
    assert cast.push(10) == everyone(8)


@each
@pytest.mark.parametrize("name", ["m.0.weight", "m.7.weight"])
def test_a_damaged_tensor_is_named(cast: Cast, name: str) -> None:
    for kind, text in cast.push(5, damaged=name).values():
        assert (kind, text) == ("ValueError", f"{name} of version 5 was damaged on its way: its checksum differs")
    assert cast.push(6) == everyone(8)


@each
def test_an_engine_that_was_replaced_gets_everything(cast: Cast) -> None:
    """Alone, and then with the others again."""
    assert cast.push(1) == everyone(8)
    cast.processes["rollout-1"].kill()
    cast.processes["rollout-1"].join()
    cast.start("rollout-1")
    assert cast.push(1, engines=["rollout-1"]) == {"rollout-1": [True, 8]}
    assert cast.push(2) == everyone(8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA IPC needs a GPU")
@pytest.mark.parametrize("cast", ["ipc"], indirect=True)
def test_processes_share_memory_of_a_gpu(cast: Cast) -> None:
    for version in (1, 2):
        assert cast.push(version, device="cuda") == everyone(8)
    for kind, text in cast.push(3, device="cuda", damaged="m.4.weight").values():
        assert kind == "ValueError" and "m.4.weight of version 3 was damaged" in text


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each process")
@pytest.mark.parametrize("cast", ["broadcast"], indirect=True)
def test_a_broadcast_from_gpu_to_gpu(cast: Cast) -> None:
    engines = ENGINES[: torch.cuda.device_count() - 1]
    want = {name: [True, 8] for name in engines}
    for version in (1, 2):
        assert cast.push(version, device="cuda", engines=engines) == want
    for kind, text in cast.push(3, device="cuda", engines=engines, damaged="m.4.weight").values():
        assert kind == "ValueError" and "m.4.weight of version 3 was damaged" in text
    assert cast.push(4, device="cuda", engines=engines) == want


@pytest.mark.parametrize("cast", ["broadcast"], indirect=True)
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))],
)
def test_an_engine_that_dies_in_the_middle_of_a_broadcast_ends_it(cast: Cast, device: str) -> None:
    """For the learner as well: it is neither killed with it nor does it wait for ever."""
    assert cast.push(1, device=device, engines=ENGINES[:1]) == {"rollout-0": [True, 8]}
    pairs = [(name, tensor.to(device)) for name, tensor in weights(2)]
    made = cast.transport.post(Outbox().plan(pairs, 2, max_bytes=2000), pairs, ENGINES[:1])
    assert len(made) > 2
    cast.calls["rollout-0"].put((cast.kind, made, -1, ""))
    start = time.monotonic()
    cast.transport.send(made, pairs)
    assert cast.answers["rollout-0"].get(timeout=20) == ("rollout-0", "fetched one")
    cast.processes["rollout-0"].join(20)
    assert time.monotonic() - start < 20
    cast.start("rollout-0")
    assert cast.push(3, device=device, engines=ENGINES[:1]) == {"rollout-0": [True, 8]}


@pytest.mark.parametrize("cast", ["broadcast"], indirect=True)
def test_a_broadcast_without_one_of_its_engines_ends_for_the_others(cast: Cast) -> None:
    assert cast.push(1) == everyone(8)
    pairs = weights(2)
    made = cast.transport.post(Outbox().plan(pairs, 2), pairs, ENGINES)
    cast.calls["rollout-0"].put((cast.kind, made, 2, ""))
    start = time.monotonic()
    cast.transport.send(made, pairs)  # rollout-1 does not come
    name, kind, text = cast.answers["rollout-0"].get(timeout=20)
    assert (name, kind) == ("rollout-0", "ConnectionError") and "version 2 broke off" in text
    assert time.monotonic() - start < 10
    cast.calls["rollout-1"].put((cast.kind, made, 2, ""))  # too late
    name, kind, text = cast.answers["rollout-1"].get(timeout=20)
    assert (name, kind) == ("rollout-1", "ConnectionError") and "it is over" in text
    assert cast.push(2) == everyone(8)


def test_in_process_hands_over_the_tensors_themselves() -> None:
    transport, pairs, others = InProcess(), weights(1), set(InProcess.shelves)
    plan = Outbox(delta=False).plan(pairs, 1, proved=transport.proved, max_bytes=2000)
    assert len(plan) > 1 and all(entry.digest is None for bucket in plan for entry in bucket.entries)
    made = transport.post(plan, pairs)
    for (name, tensor), (want, own) in zip(unpack(made, 1, InProcess().fetch), pairs, strict=True):
        assert name == want and tensor.data_ptr() == own.data_ptr()
    for spoil, message in FAULTS.values():
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            unpack(spoil([dataclasses.replace(b, version=9) for b in made]), 9, transport.fetch)
    transport.release(made)
    with pytest.raises(ValueError, match="another process, or gone"):
        unpack(made, 1, transport.fetch)
    assert set(InProcess.shelves) == others


def test_in_process_still_sends_changes_only() -> None:
    outbox = Outbox()
    outbox.plan(weights(0), 0, proved=False)
    plan = outbox.plan(weights(0, "m.2.weight"), 1, since=0, proved=False)
    assert [(b.base, [e.name for e in b.entries]) for b in plan] == [(0, ["m.2.weight"])]
    assert not outbox.plan(weights(0, "m.2.weight"), 2, since=1, proved=False)[0].entries


def test_without_delta_sync_nothing_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = Outbox(delta=False)
    monkeypatch.setattr("grpo.weight_sync.digests", None)
    for version in (0, 1):
        plan = outbox.plan(weights(0), version, since=version - 1, proved=False)
        assert [(b.base, len(b.entries)) for b in plan] == [(None, 8)]


def test_files_that_are_gone_or_cut_off_are_named_and_old_ones_removed(tmp_path: Path) -> None:
    for stale in ("weights_9_push_0_bucket_0.safetensors", "weights_9_push_1_bucket_0.partial"):
        (tmp_path / stale).touch()
    transport, pairs = Disk(tmp_path), weights(1)
    made = transport.post(Outbox().plan(pairs, 1, max_bytes=2000), pairs)
    files = sorted(tmp_path.iterdir())
    assert [str(file) for file in files] == [bucket.payload for bucket in made]
    content = files[1].read_bytes()
    for spoiled in (content[:-5], content[:20], b""):
        files[1].write_bytes(spoiled)
        with pytest.raises(ValueError, match="a bucket of version 1 is not to be read"):
            unpack(made, 1, transport.fetch)
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match="does not hold the tensors of its bucket of version 1"):
        unpack(made, 1, transport.fetch)
    files[1].unlink()
    with pytest.raises(ValueError, match="a bucket of version 1 is not to be read"):
        unpack(made, 1, transport.fetch)
    transport.release(made)
    assert not list(tmp_path.iterdir())


def test_shared_memory_is_kept_until_it_is_released() -> None:
    transport, pairs = Ipc(), weights(1)
    plan = Outbox().plan(pairs, 1)
    first, second = transport.post(plan, pairs), transport.post(plan, pairs)
    transport.release(first)
    assert list(transport.kept) == [1] and second[0].nbytes <= len(transport.kept[1][0])
    assert torch.equal(transport.kept[1][0], next(flats(plan, pairs)))


def test_what_auto_takes_and_what_does_not_fit() -> None:
    assert Config().weight_transport == "object_store"
    alone = r"weight_transport in_process is for .* in one process, but run\.cluster is ray"
    with pytest.raises(ConfigError, match=alone):
        load_config({"rollout": {"weight_transport": "in_process"}})
    for run in ({"cluster": "inline"}, {"placement": "colocated"}):
        assert load_config({"run": run}).weight_transport == "in_process"
        for kind in ("ipc", "broadcast"):
            with pytest.raises(ConfigError, match=rf"weight_transport {kind} is for .* in processes of their own"):
                load_config({"run": run, "rollout": {"weight_transport": kind}})
