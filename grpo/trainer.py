"""GRPOTrainer: a configuration in, a trained policy and a run directory out; or a stopped run, gone on with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo.alarms import Alarms
from grpo.checkpoint import last_checkpoint, save_checkpoint
from grpo.cluster import Cluster, RunFailure, check_gpus
from grpo.config import Config
from grpo.data import PromptCursor
from grpo.log import RunLog, load_metrics
from grpo.loop import Run, run_loop
from grpo.partial import Rollouts
from grpo.placement import check_learner_fits
from grpo.prepare import Prepared, fresh_run_dir, prepare, run_config
from grpo.progress import Progress
from grpo.report import write_report
from grpo.stages import warm_start
from model.family import read_config
from model.lora import adapter_shapes
from rewards import RewardFailure
from rollout import WeightFault


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    run_dir: Path
    report: Path
    accuracy_before: float | None  # greedy, held out; None without held-out prompts
    accuracy_after: float | None
    seconds: float


class GRPOTrainer:
    """`GRPOTrainer("configs/smoke.yaml").train()`; takes the path of a YAML, a mapping or a Config."""

    def __init__(
        self,
        source: str | Path | Mapping[str, Any] | Config | None = None,
        overrides: Sequence[str] = (),
        resume: str = "",
    ) -> None:
        """`overrides`: `--section.key=value`. `resume`: a run directory to go on with, instead of a source.

        Raises ConfigError.
        """
        self.resume = bool(resume)
        self.config = run_config(source, overrides, resume)

    def train(self) -> TrainResult:
        """Prepares, trains and reports. Raises ValueError for bad input before any long work, RunFailure later."""
        started, config = time.monotonic(), self.config
        torch.set_num_threads(config.run.threads)
        check_gpus(config)
        prepared = prepare(config)
        model = read_config(prepared.model_dir)
        check_learner_fits(config, model)
        if config.model.lora is not None:
            adapter_shapes(model, config.model.lora.model_dump())
        checkpoint = last_checkpoint(Path(config.run.output_dir)) if self.resume else None
        run_dir = Path(config.run.output_dir) if self.resume else fresh_run_dir(config)
        start_dir = warm_start(prepared) if config.sft is not None else prepared.model_dir
        with Cluster(config, start_dir, start_dir) as cluster:
            if cluster.adapter_note:
                print(cluster.adapter_note, flush=True)
            try:
                self._loop(prepared, cluster, run_dir, checkpoint)
            except (ValueError, RunFailure, RewardFailure, WeightFault) as err:
                raise RunFailure(f"{err}; mend the cause and go on with `grpo train --resume {run_dir}`") from err
        report = write_report(run_dir)
        accuracies = [m["eval/accuracy"] for m in load_metrics(run_dir) if m.get("eval/accuracy") is not None]
        before, after = (accuracies[0], accuracies[-1]) if accuracies else (None, None)
        return TrainResult(run_dir, report, before, after, time.monotonic() - started)

    def _loop(
        self, prepared: Prepared, cluster: Cluster, run_dir: Path, checkpoint: tuple[Path, dict[str, Any]] | None
    ) -> None:
        config, step = self.config, None
        cursor = PromptCursor(prepared.prompts, config.run.seed, config.data.shuffle)
        rollouts = Rollouts(config, cluster, cursor)
        if checkpoint is not None:
            path, state = checkpoint
            step = int(state["step"])
            cursor.load_state(state["cursor"])
            rollouts.load(path / "train_state" / "unfinished.npz")
            cluster.load(str(path.resolve()))
            print(f"going on after step {step} with {path}", flush=True)
        elif self.resume:
            print("no whole checkpoint yet: starting from the beginning", flush=True)
        if checkpoint is None and config.rollout.engine == "vllm" and config.rollout.weight_check != "off":
            cluster.sync_weights(0)  # an engine that starts out wrong is found before the first sample

        def save(at: int) -> None:
            save_checkpoint(run_dir, at, cluster, {"cursor": cursor.state()}, prepared.tokenizer, rollouts)

        with (
            RunLog(run_dir, resume_step=step) as log,
            Progress(config.grpo.max_steps, start=step or 0) as progress,
        ):
            alarms = Alarms(config.run.alarms)
            run = Run(config, cluster, rollouts, prepared.held_out, prepared.tokenizer, log, progress, alarms, save)
            run_loop(run, first_step=0 if step is None else step + 1)
