"""How the buckets of a push get from the learner to its engines: `rollout.weight_transport`.

    in_process    the learner's tensors themselves, on whatever device; nothing is copied or packed
    object_store  bytes in host memory, which Ray shares between the processes of a host and copies to others
    ipc           handles of memory on the GPU (CUDA IPC), or of shared memory where the tensors are on a CPU
    broadcast     a process group of its own: NCCL between GPUs, gloo on CPUs
    disk          safetensors files in a directory that learner and engines see

A transport has two ends. The learner posts a plan (grpo.weight_sync), which fills in the payloads; the buckets then
travel as arguments of calls, and engines fetch the tensors of each. Nothing is proved here: see weight_sync.unpack.
"""

from __future__ import annotations

import itertools
import os
import pickle
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grpo.config import Config
from grpo.weight_sync import Bucket, Pairs, flat_bytes, flats, grouped, views

Readers = Sequence[str]  # the engines of a push, by role name


class Transport:
    """What both ends of every transport can do. `proved`: bytes travel, so their digests are to be checked."""

    proved = True

    def post(self, plan: Sequence[Bucket], pairs: Pairs, readers: Readers = ("",)) -> list[Bucket]:
        """Learner: the plan with payloads for these engines. `pairs`: what the plan was made of, in that order."""
        raise AssertionError(type(self))

    def send(self, posted: Sequence[Bucket], pairs: Pairs) -> None:
        """Learner, while the engines load: what they wait for."""

    def release(self, posted: Sequence[Bucket]) -> None:
        """Learner, once every engine has loaded: what was kept for them may go."""

    def fetch(self, bucket: Bucket) -> Sequence[torch.Tensor]:
        """Engine: the bucket's tensors, in its order. ValueError where they are not to be had."""
        raise AssertionError(type(self))


class InProcess(Transport):
    """The learner's own tensors: they must be loaded before the learner goes on, as calls in one process are.

    Calls may pass through Ray to an actor that hosts both ends, so a bucket carries the number of a shelf only.
    """

    proved = False
    shelves: ClassVar[dict[int, list[list[torch.Tensor]]]] = {}
    numbers: ClassVar[Iterator[int]] = itertools.count()

    def post(self, plan: Sequence[Bucket], pairs: Pairs, readers: Readers = ("",)) -> list[Bucket]:
        number = next(self.numbers)
        self.shelves[number] = list(grouped(plan, pairs))
        return [replace(bucket, payload=(os.getpid(), number)) for bucket in plan]

    def release(self, posted: Sequence[Bucket]) -> None:
        self.shelves.pop(posted[0].payload[1], None)

    def fetch(self, bucket: Bucket) -> Sequence[torch.Tensor]:
        process, number = bucket.payload
        if process != os.getpid() or number not in self.shelves:
            raise ValueError(f"weights of version {bucket.version} are in another process, or gone; send them again")
        return self.shelves[number][bucket.index]


class ObjectStore(Transport):
    """Bytes in host memory; between processes of a host Ray hands them over without a copy."""

    def post(self, plan: Sequence[Bucket], pairs: Pairs, readers: Readers = ("",)) -> list[Bucket]:
        made = zip(plan, flats(plan, pairs), strict=True)
        return [replace(bucket, payload=flat.cpu().numpy()) for bucket, flat in made]

    def fetch(self, bucket: Bucket) -> Sequence[torch.Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # shared memory is read-only; so are we
            return views(bucket, torch.from_numpy(bucket.payload))


class Ipc(Transport):
    """Flat buckets in memory that another process maps: on a GPU by CUDA IPC, on a CPU by shared memory.

    The learner keeps them until they are released: a push takes as much memory of the GPU again as it sends. A handle
    counts as one reader, so each engine gets its own.
    """

    def __init__(self, name: str = "") -> None:
        """`name`: the engine's own, as in the readers of a push."""
        self.name = name
        self.kept: dict[int, list[torch.Tensor]] = {}
        self.numbers = itertools.count()

    def post(self, plan: Sequence[Bucket], pairs: Pairs, readers: Readers = ("",)) -> list[Bucket]:
        number = next(self.numbers)
        self.kept[number] = list(flats(plan, pairs))
        made = zip(plan, self.kept[number], strict=True)
        return [
            replace(bucket, payload=(number, _gpu(flat.device), {reader: _handle(flat) for reader in readers}))
            for bucket, flat in made
        ]

    def release(self, posted: Sequence[Bucket]) -> None:
        self.kept.pop(posted[0].payload[0], None)

    def fetch(self, bucket: Bucket) -> Sequence[torch.Tensor]:
        _, gpu, handles = bucket.payload
        if gpu is not None and _gpu(torch.device("cuda", gpu[0])) != gpu:
            raise ValueError(
                f"rollout.weight_transport is ipc, but the learner's GPU {gpu[1]} is not cuda:{gpu[0]} of this "
                "engine; place both on one GPU, or use broadcast"
            )
        try:
            return views(bucket, pickle.loads(handles[self.name]))
        except (RuntimeError, OSError) as err:
            raise ValueError(f"a bucket of version {bucket.version} is not to be mapped: {_line(err)}") from err


def _handle(flat: torch.Tensor) -> bytes:
    """Pickled by torch.multiprocessing: by name, as the processes have no parent in common that could pass files on."""
    from multiprocessing.reduction import ForkingPickler

    from torch import multiprocessing  # registers tensors with it

    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        return bytes(ForkingPickler.dumps(flat))
    finally:
        multiprocessing.set_sharing_strategy(before)


def _gpu(device: torch.device) -> tuple[int, str] | None:
    """(index, identity) of a GPU that this process sees."""
    if device.type != "cuda":
        return None
    index = device.index or 0
    seen = index < torch.cuda.device_count()
    return index, str(torch.cuda.get_device_properties(index).uuid) if seen else ""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the processes of a broadcast find each other."""

    host: str
    port: int
    number: int  # of the push
    readers: tuple[str, ...]  # ranks 1, 2, ...; the learner is rank 0
    backend: str


class Broadcast(Transport):
    """The learner, rank 0, sends each bucket to all engines at once; neither end has more than one in flight.

    Not through vLLM's own weight-transfer API: it loads each chunk as it arrives and forgets it. Here the whole version
    must be there, proved, before one tensor is used, and the check of what lies in the engine needs what was pushed. So
    an engine holds a push beside its weights until it has been checked.

    The group is not torch.distributed's default one, and has a store of its own. It lives until an engine is
    replaced: at each push the engines say which group they are in, and the learner whether it is to be made anew. A
    push in which an engine dies ends for all with a ConnectionError, at the latest after `timeout` seconds.
    """

    def __init__(self, name: str = "", timeout: float = 60.0) -> None:
        """`name`: the engine's own, as in the readers of a push."""
        self.name, self.timeout = name, timedelta(seconds=timeout)
        self.store: Any = None
        self.numbers = itertools.count()
        self.unread = 0  # buckets of the last push that were not fetched
        self.group: Any = None
        self._leave()

    def _leave(self) -> None:
        nccl = getattr(dist, "ProcessGroupNCCL", None)
        if nccl is not None and isinstance(self.group, nccl):
            self.group.abort()  # else it waits, as it goes, for what a dead engine left unfinished
        self.group = None
        self.epoch = -1  # number of the group; -1: in none
        self.members: tuple[str, Readers] | None = None  # of the learner's group, and its backend

    def post(self, plan: Sequence[Bucket], pairs: Pairs, readers: Readers = ("",)) -> list[Bucket]:
        if self.store is None:
            self.host, self.epochs = _own_address(), itertools.count()
            self.store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                self.host, 0, is_master=True, wait_for_workers=False, timeout=self.timeout
            )
        _, first = next(iter(pairs))
        backend = "nccl" if first.device.type == "cuda" else "gloo"
        meeting = Meeting(self.host, self.store.port, next(self.numbers), tuple(readers), backend)
        return [replace(bucket, payload=meeting) for bucket in plan]

    def send(self, posted: Sequence[Bucket], pairs: Pairs) -> None:
        """A push that fails is no error here: its engines say so, and the caller pushes again."""
        meeting: Meeting = posted[0].payload
        key = f"push {meeting.number}"
        try:
            held = {int(self.store.get(f"{key} {reader}")) for reader in meeting.readers}
            members = meeting.backend, meeting.readers
            keep = self.members == members and held == {self.epoch}
            epoch = self.epoch if keep else next(self.epochs)
            self.store.set(f"{key} group", str(epoch))
            if not keep:
                self._leave()
                self.group, self.epoch = self._build(meeting, epoch, 0), epoch
                self.members = members
            for flat in flats(posted, pairs):
                self._broadcast(flat)
        except RuntimeError:  # torch.distributed's errors
            self.store.set(f"{key} group", "-1")  # for engines that wait for it
            self._leave()
        finally:
            self.store.set(f"{key} over", "")  # for one that comes late

    def fetch(self, bucket: Bucket) -> Sequence[torch.Tensor]:
        """Raises ConnectionError where the broadcast broke off."""
        meeting: Meeting = bucket.payload
        try:
            if bucket.index == 0:
                self._join(meeting)
            device = "cuda" if meeting.backend == "nccl" else "cpu"
            flat = torch.empty(flat_bytes(bucket), dtype=torch.uint8, device=device)
            self._broadcast(flat)
        except RuntimeError as err:
            self._leave()
            raise ConnectionError(f"the broadcast of version {bucket.version} broke off: {_line(err)}") from err
        self.unread = bucket.count - bucket.index - 1
        return views(bucket, flat)

    def _join(self, meeting: Meeting) -> None:
        if self.unread:  # what is still on its way in that group belongs to another push
            self._leave()
        if self.store is None:
            self.store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                meeting.host, meeting.port, is_master=False, timeout=self.timeout
            )
        key = f"push {meeting.number}"
        if self.store.check([f"{key} over"]):
            raise RuntimeError("it is over")
        self.store.set(f"{key} {self.name}", str(self.epoch))
        epoch = int(self.store.get(f"{key} group"))  # waits for the learner
        if epoch < 0:
            raise RuntimeError("another engine did not come")
        if epoch != self.epoch:
            self._leave()
            self.group, self.epoch = self._build(meeting, epoch, 1 + meeting.readers.index(self.name)), epoch

    def _build(self, meeting: Meeting, epoch: int, rank: int) -> Any:
        size = 1 + len(meeting.readers)
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a dead peer is an error, not the end of the process
        store = dist.PrefixStore(f"group {epoch}", self.store)  # pyright: ignore[reportPrivateImportUsage]
        if meeting.backend == "gloo":
            return dist.ProcessGroupGloo(store, rank, size, self.timeout)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self.timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)

    def _broadcast(self, flat: torch.Tensor) -> None:
        if len(flat):
            options = dist.BroadcastOptions()
            options.rootRank = 0
            self.group.broadcast([flat], options).wait()


def _own_address() -> str:
    """Of this host, as others reach it: that of the interface that leads outside. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


class Disk(Transport):
    """A safetensors file for each bucket: renamed to its name once it is whole, gone once every engine has loaded."""

    def __init__(self, directory: str | Path) -> None:
        """`directory`: of this run alone; what an earlier learner left there is removed."""
        self.directory = Path(directory)
        self.numbers = itertools.count()

    def post(self, plan: Sequence[Bucket], pairs: Pairs, readers: Readers = ("",)) -> list[Bucket]:
        number = next(self.numbers)
        self.directory.mkdir(parents=True, exist_ok=True)
        for old in self.directory.glob("weights_*") if number == 0 else ():
            old.unlink()
        posted = []
        for bucket, flat in zip(plan, flats(plan, pairs), strict=True):
            path = self.directory / f"weights_{bucket.version}_push_{number}_bucket_{bucket.index}.safetensors"
            tensors = [view.clone() for view in views(bucket, flat.cpu())]  # views of one memory are refused
            partial = path.with_suffix(".partial")
            save_file({e.name: t for e, t in zip(bucket.entries, tensors)}, partial, {"format": "pt"})
            os.replace(partial, path)
            posted.append(replace(bucket, payload=str(path)))
        return posted

    def release(self, posted: Sequence[Bucket]) -> None:
        for bucket in posted:
            Path(bucket.payload).unlink(missing_ok=True)

    def fetch(self, bucket: Bucket) -> Sequence[torch.Tensor]:
        try:
            tensors = load_file(bucket.payload)
        except (OSError, SafetensorError) as err:
            raise ValueError(f"a bucket of version {bucket.version} is not to be read: {_line(err)}") from err
        if set(tensors) != {entry.name for entry in bucket.entries}:
            raise ValueError(f"{bucket.payload} does not hold the tensors of its bucket of version {bucket.version}")
        return [tensors[entry.name] for entry in bucket.entries]


def _line(err: BaseException) -> str:
    return " ".join(str(err).split())[:200]


def build_transport(config: Config, name: str, directory: str | Path) -> Transport:
    """The end of the role `name`. `directory`: of `disk`."""
    return {
        "in_process": InProcess,
        "object_store": ObjectStore,
        "ipc": lambda: Ipc(name),
        "broadcast": lambda: Broadcast(name, config.rollout.broadcast_timeout),
        "disk": lambda: Disk(directory),
    }[config.weight_transport]()
