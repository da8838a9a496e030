"""The tiny model that learners are tested on, and the Ray cluster that runs of them share."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from model.create import create_model

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_v3.yaml"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    spec = yaml.safe_load(TINY.read_text())
    spec["config"]["initializer_range"] = 0.1  # attention and experts that do something
    directory = tmp_path_factory.mktemp("tiny")
    create_model(spec, directory, seed=0)
    return directory


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The addresses of a Ray head and of its dashboard. A dozen processes: one head serves all tests but those that are
    about a cluster of a run's own."""
    ports = []
    for _ in range(4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=true"]
    command += [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"]
    command += [f"--dashboard-agent-listen-port={ports[3]}"]  # another cluster of the machine may have the usual one
    folder = Path("/tmp") / f"ray-{os.getpid()}"
    command += ["--temp-dir", str(folder), "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    log = (tmp_path_factory.mktemp("head") / "log").open("w+")
    head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", ports[1])) == 0:
                break
        assert head.poll() is None and time.monotonic() < deadline, (log.seek(0), log.read())[1]
        time.sleep(0.2)
    yield f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
    os.killpg(head.pid, signal.SIGKILL)  # this head alone: `ray stop` would stop every cluster of the machine
    head.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def shared_ray(ray_head: tuple[str, str]) -> Iterator[None]:
    """`run.cluster: ray` is this head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_head[0])
        yield
