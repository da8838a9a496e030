"""Placement: the roles of a run in this process, or as Ray actors; and what happens when one of them dies.

`Cluster` gives the loop five verbs. A rollout or reward actor that dies is built anew, brought to the current weights
and asked again: draws depend on seeds alone, so the answer is the one the dead actor would have given. A dead learner
takes its optimiser with it: the run stops, and goes on from its last checkpoint.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import yaml

from grpo.backend import Backend, Inline
from grpo.config import Config
from grpo.dispatch import Request, collect, dispatch, room_for
from grpo.placement import assign_gpus
from grpo.prepare import model_spec
from grpo.records import PackedBatch, StepStats
from model.fp8.modules import load_kernels
from rewards import RewardInput, Score
from rollout import Completion, SamplingParams


class RunFailure(RuntimeError):
    """The run cannot go on; the message is one line for the user."""


class Cluster:
    """The roles of a run, behind the verbs of the loop."""

    def __init__(self, config: Config, model_dir: str | Path, reference_dir: str | Path, learner: bool = True) -> None:
        """Builds every role. `model_dir`: the policy's weights; `reference_dir`: those of the KL reference.

        Raises ValueError where Ray is asked for and not there, RunFailure where a process dies on the way.
        """
        if not learner:  # then the weights of model_dir are all there is
            config = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
        roles = roles_of(config, learner)
        self.engines = [role for role in roles if role.startswith("rollout")]
        weight_dir = Path(config.rollout.weight_dir or Path(config.run.output_dir) / "weights").resolve()
        dirs = {"model": str(model_dir), "reference": str(reference_dir), "weights": str(weight_dir)}
        self.sleep_level = config.rollout.sleep_level
        # who samples what may depend on who is fast where no bit depends on it
        self.fluid = config.rollout.exact or config.rollout.engine == "vllm"
        self.max_num_seqs, self.batches = config.rollout.max_num_seqs, 0
        self.synced: int | None = None  # the version that every engine holds; None: not known yet
        kind = Inline if config.run.cluster == "inline" else Remote
        self.backend: Backend = kind(config, roles, dirs)
        self.adapter_note = "" if config.model.lora is None else self._send_adapter()
        if learner:
            self.backend.call("learner", "send_fp8", self.backend.call(self.engines[0], "fp8_names").result()).result()

    def _send_adapter(self) -> str:
        """Settles whether the adapter travels as it is -> a line for the log."""
        reason = self.backend.call(self.engines[0], "why_merged").result()
        if reason:
            return f"adapter: merged into the weights for the engines ({reason})"
        self.backend.call("learner", "send_adapter").result()
        return "adapter: pushed to the engines as it is"

    def sample(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[Completion]]:
        """Completions of each prompt, in order."""
        self.batches += 1
        requests = list(zip(prompts, params, strict=True))
        return dispatch(
            requests,
            self.engines,
            lambda engine, held, everything: self.backend.call(engine, "advance", self.batches, held, everything),
            self.backend.first,
            room_for(requests, self.max_num_seqs) if self.fluid else None,
        )

    def collect(
        self, requests: Sequence[Request], begun: Sequence[Sequence[Completion]], enough: int
    ) -> list[list[Completion]]:
        """Samples of each request, going on from `begun`: `enough` requests are complete, others as far as they got."""
        return collect(
            requests,
            begun,
            self.engines,
            lambda engine, *work: self.backend.call(engine, "collect", *work),
            enough,
        )

    @property
    def version(self) -> int:
        """Of the weights that the engines hold."""
        return self.synced or 0

    def score(self, inputs: Sequence[RewardInput]) -> list[Score]:
        return self.backend.call("rewards", "score", inputs).result()

    def learn(
        self, minibatches: Sequence[Sequence[PackedBatch]], rollout_counts: torch.Tensor | None = None
    ) -> StepStats:
        asleep = [self.backend.call(engine, "sleep", self.sleep_level) for engine in self.engines if self.sleep_level]
        memory = [call.result() for call in asleep]
        stats = self.backend.call("learner", "step", minibatches, rollout_counts).result()
        mean = {key: sum(answer[key] for answer in memory) / len(memory) for key in (memory[0] if memory else ())}
        return replace(stats, metrics={**stats.metrics, **mean})

    def sync_weights(self, version: int) -> dict[str, float]:
        """The learner's weights to every engine -> metrics. They travel from process to process, not through this one.

        Raises WeightFault where an engine does not compute with them.
        """
        try:
            taken = self._push(version, self.synced)
        except ConnectionError:  # an engine died while weights were broadcast; by now there is one in its place
            try:
                taken = self._push(version, None)
            except ConnectionError as err:
                raise RunFailure(f"weights of version {version} did not reach the engines, twice: {err}") from err
        assert all(answer["policy_version"] == version for answer in taken), f"{taken=} {version=}"
        start = time.perf_counter()
        for answer in taken:
            if answer["rerouted"] is not None:
                self.backend.call("learner", "check_rerouted", answer["rerouted"]).result()
        self.synced = version
        metrics = {
            "time/weight_check": max(answer["check_seconds"] for answer in taken) + time.perf_counter() - start,
            "sync/bytes": float(taken[0]["bytes"]),
        }
        if "fp8_bytes" in taken[0]:
            metrics["sync/fp8_bytes"] = float(taken[0]["fp8_bytes"])
        if "drafted" in taken[0]:
            drafted, accepted = (sum(answer[key] for answer in taken) for key in ("drafted", "accepted"))
            metrics["rollout/draft_acceptance"] = accepted / max(drafted, 1.0)
        return metrics

    def _push(self, version: int, since: int | None) -> list[dict[str, float]]:
        """What each engine says of it. ConnectionError, once all engines have stopped, where it did not get through."""
        posted = self.backend.call("learner", "weights", since, self.engines)
        taken, lost = [], None
        try:
            pending = [self.backend.call(engine, "load_weights", posted, version) for engine in self.engines]
            sent = self.backend.call("learner", "send_weights", posted)
            for answer in pending:
                try:
                    taken.append(answer.result())
                except ConnectionError as err:
                    lost = err
            sent.result()
        finally:
            self.backend.call("learner", "release_weights", posted)
        if lost is not None:
            raise lost
        return taken

    def save(self, directory: str) -> None:
        self.backend.call("learner", "save", directory).result()

    def load(self, directory: str) -> int:
        """The learner goes on from a checkpoint, the engines follow; returns the policy version."""
        version = self.backend.call("learner", "load", directory).result()
        self.synced = None
        self.sync_weights(version)
        return version

    def close(self) -> None:
        self.backend.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def roles_of(config: Config, learner: bool = True) -> list[str]:
    """Names of a run's roles."""
    return [*(["learner"] if learner else []), *(f"rollout-{i}" for i in range(config.rollout.num_workers)), "rewards"]


class Remote:
    """Roles as Ray actors: one each, or one for all."""

    def __init__(self, config: Config, roles: Sequence[str], dirs: dict[str, str]) -> None:
        self.ray = start_ray(config.run.cluster)
        from grpo.actors import start_host  # needs Ray

        self.restarts_left = config.run.max_restarts
        self.version: int | None = None  # of the last load_weights
        gpus = assign_gpus(config, roles, _node_gpus(self.ray))
        colocated = config.run.placement == "colocated"
        self.hosts: dict[str, Any] = {}  # role -> actor
        self.start: dict[str, Callable[[], Any]] = {}  # role -> builds its actor
        prefix = f"{config.run.name}-{os.getpid()}"
        if colocated:
            actor = start_host("colocated", f"{prefix}-colocated", roles, config, dirs, gpus[roles[0]])
            self.hosts = dict.fromkeys(roles, actor)
        else:
            for role in roles:
                kind = role.split("-")[0]
                attempts = iter(range(1 + config.run.max_restarts))
                self.start[role] = lambda role=role, kind=kind, attempts=attempts: start_host(
                    kind, f"{prefix}-{role}-{next(attempts)}", [role], config, dirs, gpus[role]
                )
                self.hosts[role] = self.start[role]()
        # building an actor reports its errors here, not in the middle of the first step
        self._get([actor.pid.remote() for actor in set(self.hosts.values())], "a process of the run")

    def call(self, role: str, method: str, *args: Any) -> RemoteCall:
        refs = [arg.ref if isinstance(arg, RemoteCall) else arg for arg in args]
        if method == "load_weights":
            self.version = refs[1]
        return RemoteCall(self, role, method, refs)

    def first(self, pending: Mapping[str, RemoteCall]) -> str:
        refs = {call.ref: key for key, call in pending.items()}
        return refs[self.ray.wait(list(refs), num_returns=1)[0][0]]  # a call whose actor died counts: result revives

    def revive(self, role: str) -> None:
        """A new actor for a dead rollout or reward role, with the current weights. RunFailure for the learner's."""
        if role == "learner" or role not in self.start:
            raise RunFailure(f"the {role} process died")
        if self.restarts_left == 0:
            raise RunFailure(f"the {role} process died once more; run.max_restarts are used up")
        self.restarts_left -= 1
        self.hosts[role] = self.start[role]()
        if role.startswith("rollout") and self.version is not None:
            # everything: what travelled last may be only what changed since a version that a new engine lacks
            learner = self.hosts["learner"].call
            whole = learner.remote("learner", "weights", None, [role])
            loaded = self.hosts[role].call.remote(role, "load_weights", whole, self.version)
            learner.remote("learner", "send_weights", whole)
            answer = self._get(loaded, role)
            learner.remote("learner", "release_weights", whole)
            if answer["rerouted"] is not None:
                self._get(learner.remote("learner", "check_rerouted", answer["rerouted"]), role)

    def _get(self, refs: Any, who: str) -> Any:
        try:
            return self.ray.get(refs)
        except self.ray.exceptions.RayTaskError as err:
            if isinstance(_cause(err), self.ray.exceptions.RayActorError):  # the weights came from a dead learner
                raise RunFailure("the learner process died") from err
            if isinstance(_cause(err), ConnectionError):
                raise RunFailure(f"the weights did not reach {who}: {_cause(err)}") from err
            raise _cause(err) from err
        except self.ray.exceptions.RayActorError as err:
            raise RunFailure(f"{who} died while it started: {' '.join(str(err).split())[:300]}") from err

    def close(self) -> None:
        for actor in set(self.hosts.values()):
            self.ray.kill(actor)
        self.ray.shutdown()


class RemoteCall:
    """A call to an actor. The reference is what other calls get: data goes from actor to actor."""

    def __init__(self, backend: Remote, role: str, method: str, args: Sequence[Any]) -> None:
        self.backend, self.role, self.method, self.args = backend, role, method, args
        self._send()

    def _send(self) -> None:
        self.host = self.backend.hosts[self.role]
        self.ref = self.host.call.remote(self.role, self.method, *self.args)

    def result(self) -> Any:
        """Raises what the role raised, or RunFailure where its process is gone for good."""
        errors = self.backend.ray.exceptions
        while True:
            try:
                return self.backend.ray.get(self.ref)
            except errors.RayTaskError as err:
                cause = _cause(err)
                if isinstance(cause, errors.RayActorError):  # an argument came from an actor that died
                    raise RunFailure("the learner process died") from err
                raise cause from err
            except errors.RayActorError:
                if self.host is self.backend.hosts[self.role]:
                    self.backend.revive(self.role)
                self._send()
            except errors.RayError as err:
                raise RunFailure(f"{self.role}.{self.method} was lost: {' '.join(str(err).split())[:300]}") from err


def _send_token() -> None:
    """`ray start` asks for the token once there is one, but to an address that it is given Ray does not send it by
    itself.
    """
    found = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    if "RAY_AUTH_MODE" in os.environ or not (found or (Path.home() / ".ray" / "auth_token").is_file()):
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if "ray" in sys.modules:  # it read the variable when it was imported; it has no public way to read it again
        with suppress(ImportError, AttributeError):
            from ray._raylet import Config  # pyright: ignore

            Config.initialize("")


def start_ray(address: str) -> Any:
    """The ray module, connected to a new local cluster ("ray") or to a running one. Raises ValueError without Ray."""
    running = address != "ray" or "RAY_ADDRESS" in os.environ
    if running:
        _send_token()
    try:
        import ray
    except ImportError as err:
        raise ValueError(
            f"run.cluster is {address!r}, but Ray is not installed; pip install 'grpo-v3[ray]', or --run.cluster=inline"
        ) from err
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own advice, else it warns
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "grpo"}
    if not running:
        ray.init(**options)
    else:
        try:
            ray.init(address="auto" if address == "ray" else address, **options)
        except (ConnectionError, RuntimeError) as err:
            raise ValueError(
                f"run.cluster {address!r}: no Ray cluster answers ({' '.join(str(err).split())[:200]}); "
                "start one with `ray start --head`, or use run.cluster: ray for a local one"
            ) from err
    return ray


def check_gpus(config: Config) -> None:
    """Raises ValueError, before any long work, where a run asks for more GPUs than are there, or for others."""
    address = config.run.cluster
    if address == "inline" or (address == "ray" and "RAY_ADDRESS" not in os.environ):
        nodes = [float(torch.cuda.device_count())]
        if config.model.fp8 == "on":
            load_kernels(config.model.fp8_recipe)
    else:
        ray = start_ray(address)
        try:
            nodes = _node_gpus(ray)
        finally:
            ray.shutdown()
    assign_gpus(config, roles_of(config), nodes)


def _node_gpus(ray: Any) -> list[float]:
    return [float(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]


def _cause(err: Any) -> BaseException:
    """The exception that a role raised, out of Ray's wrapping."""
    return err.cause if isinstance(getattr(err, "cause", None), BaseException) else err


def _submitted(client: Any, entrypoint: str, folder: str) -> str:
    """The id of the job. A head that has just started answers before it can take jobs: asked again for two minutes."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": folder})
        except RuntimeError as err:
            if "No available agent" not in str(err):
                raise RunFailure(f"the cluster did not take the job: {' '.join(str(err).split())[:300]}") from err
            if time.monotonic() > deadline:
                raise RunFailure(
                    "the cluster has had no agent that takes jobs for two minutes; where another Ray runs on its "
                    "machine, start it with --dashboard-agent-listen-port=PORT"
                ) from err
            time.sleep(1)


def submit_job(config: Config, address: str) -> int:
    """Runs `grpo train` as a Ray job, prints its log as it comes, and returns its exit code.

    Paths of the configuration are made absolute: the cluster must see the same files (one machine, or a shared file
    system) and have this package installed. Raises ValueError where no cluster answers.
    """
    _send_token()
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as err:
        raise ValueError(f"--address {address}: no Ray cluster answers; start one with `ray start --head`") from err
    sections = config.model_dump(mode="json")
    for name in ("run.output_dir", "model.path", "data.path", "data.eval_path", "rollout.weight_dir"):
        section, key = name.split(".")
        if sections[section][key]:
            sections[section][key] = str(Path(sections[section][key]).resolve())
    if isinstance(sections["model"]["init"], str):
        sections["model"]["init"] = model_spec(sections["model"]["init"])
    local = urlsplit(address if "//" in address else f"//{address}").hostname in ("localhost", "127.0.0.1", "::1")
    python = sys.executable if local else "python3"
    with tempfile.TemporaryDirectory() as folder:
        name = f"{config.run.name}.yaml"
        (Path(folder) / name).write_text(yaml.safe_dump(sections, sort_keys=False))
        entrypoint = f"{shlex.quote(python)} -m grpo.cli train {shlex.quote(name)}"
        job = _submitted(client, entrypoint, folder)
    print(f"job {job} on {address}", flush=True)

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    asyncio.run(follow())
    info = client.get_job_info(job)
    while not info.status.is_terminal():  # the log ends a moment before the status says so
        time.sleep(0.5)
        info = client.get_job_info(job)
    code = info.driver_exit_code
    if code is None:
        print(f"error: job {job} ended as {info.status}: {info.message}", file=sys.stderr)
        return 1
    return code
