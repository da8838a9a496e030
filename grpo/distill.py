"""`grpo distill`: rejection sampling. A policy answers the training prompts, rewards score the answers, and a choice of
those accepted becomes an SFT data set.

    prompts --> rollout --> rewards --> samples.jsonl --> selection --> data.jsonl, sft.yaml, provenance.json

Sampling is the long part. It goes step by step and writes every answer down, so a killed run goes on after its last
whole step. The choice (grpo/selection.py) is made from samples.jsonl at the end; `--resume` with another
distill.threshold, max_per_prompt or cap_mean_length makes it again and samples nothing anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from grpo.checkpoint import last_checkpoint
from grpo.cluster import Cluster, RunFailure
from grpo.config import Config, ConfigError, DistillConfig, StageConfig, digest
from grpo.data import PromptCursor
from grpo.log import RunLog, iter_samples, load_metrics, write_rows
from grpo.loop import Clock
from grpo.prepare import Prepared, fresh_run_dir, prepare, reward_resources, run_config
from grpo.progress import Progress
from grpo.records import Prompt
from grpo.report import write_report
from grpo.selection import Selection, select, why_rejected
from grpo.stages import warm_start
from grpo.steps import make_groups, reward_inputs, rollout_params, sample_rows, step_metrics
from rewards import RewardFailure, build_rewards, raise_if_failing
from rollout.draws import seed_of

DATA, PROVENANCE, SFT = "data.jsonl", "provenance.json", "sft.yaml"
COLUMNS = ("completion", "reward", "parts", "length", "provenance")  # of data.jsonl, beside those of the data
PACKAGES = ("grpo-v3", "torch", "transformers", "math-verify", "reasoning-gym")


@dataclass(frozen=True)
class DistillResult:
    """What a run came to."""

    run_dir: Path
    data: Path
    sft: Path  # a configuration for `grpo sft` on the data
    report: Path
    selection: Selection


def distill(
    source: str | Path | Mapping[str, Any] | Config | None, overrides: Sequence[str] = (), resume: str = ""
) -> DistillResult:
    """Samples, scores, chooses and writes. The arguments are those of grpo.trainer.GRPOTrainer.

    Raises ValueError for bad input before any long work, RunFailure later.
    """
    config = _with_policy_of_run(run_config(source, overrides, resume))
    torch.set_num_threads(config.run.threads)
    if config.distill is None:
        raise ConfigError("the configuration has no distill section; add one, e.g. `distill: {threshold: 1.0}`")
    prepared = prepare(config)
    prompts, cursor_state = _prompts(prepared, config.distill)
    _check(prepared, config.distill)
    run_dir = Path(config.run.output_dir) if resume else fresh_run_dir(config)
    policy = warm_start(prepared) if config.sft is not None else prepared.model_dir
    origin = {"policy": _policy(policy), "prompts": cursor_state, "sampling": _sampling(config)}
    metrics = load_metrics(run_dir)
    done = metrics[-1]["step"] if metrics else 0
    if done:
        _check_origin(run_dir, origin)
    steps = -(-len(prompts) // config.distill.prompts_per_step)
    record = origin | {"steps": steps, "config": config.model_dump(mode="json"), "versions": _versions()}
    (run_dir / "config.yaml").write_text(config.dump())  # a resumed run may choose otherwise
    (run_dir / DATA).unlink(missing_ok=True)  # there is one only where it is whole and as config.yaml says
    _write_json(run_dir / PROVENANCE, record)
    if done < steps:
        with Cluster(config, policy, policy, learner=False) as cluster:
            try:
                _sample(prepared, config.distill, cluster, prompts, run_dir, done)
            except (ValueError, RunFailure, RewardFailure) as err:
                raise RunFailure(f"{err}; mend the cause and go on with `grpo distill --resume {run_dir}`") from err
    selection = select(iter_samples(run_dir), config.distill)
    if not selection.kept:
        raise RunFailure(
            f"none of {selection.sampled} answers is accepted at distill.threshold {config.distill.threshold:g}: "
            f"{_reasons(selection)}, the highest reward is {selection.highest}; choose again with `grpo distill "
            f"--resume {run_dir} --distill.threshold=...`, or sample from a better policy"
        )
    write_rows(run_dir / DATA, _data_rows(prepared, selection, run_dir, origin["policy"]["id"]))
    (run_dir / SFT).write_text(_sft_config(config, policy, run_dir).dump())
    made = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "selection": selection.summary()}
    _write_json(run_dir / PROVENANCE, record | made)
    return DistillResult(run_dir, run_dir / DATA, run_dir / SFT, write_report(run_dir), selection)


def describe(selection: Selection) -> str:
    """The summary in three lines."""
    share = selection.accepted / max(selection.sampled, 1)
    lengths = ", ".join(f"{name} {value:.2f}" for name, value in selection.mean_length.items() if value is not None)
    prompts_kept = selection.summary()["prompts_kept"]
    return (
        f"{selection.prompts:,} prompts, {selection.sampled:,} answers, {selection.accepted:,} accepted ({share:.1%}), "
        f"{len(selection.kept):,} kept, of {prompts_kept:,} prompts\n"
        f"mean length in tokens: {lengths}\n"
        f"dropped: {_reasons(selection)}"
    )


# ---- before sampling


def _with_policy_of_run(config: Config) -> Config:
    """model.path may name a run: then its last checkpoint is the policy."""
    path = Path(config.model.path)
    if not config.model.path or (path / "config.json").is_file() or not (path / "config.yaml").is_file():
        return config
    found = last_checkpoint(path)
    if found is None:
        raise ConfigError(
            f"model.path {config.model.path!r} is a run without a whole checkpoint; name a model directory"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(found[0])})})


def _prompts(prepared: Prepared, section: DistillConfig) -> tuple[list[Prompt], dict[str, Any]]:
    """The prompts to sample, and what identifies them. Of rows with one and the same prompt the first one counts."""
    distinct = list({prompt.token_ids: prompt for prompt in reversed(prepared.prompts)}.values())[::-1]
    if len(distinct) < len(prepared.prompts):
        print(f"left out {len(prepared.prompts) - len(distinct)} rows with the prompt of an earlier row", flush=True)
    cursor = PromptCursor(distinct, prepared.config.run.seed, prepared.config.data.shuffle)
    return cursor.take(min(section.max_prompts or len(distinct), len(distinct))), cursor.state()


def _check(prepared: Prepared, section: DistillConfig) -> None:
    """What `prepare` cannot know. Raises ConfigError."""
    config = prepared.config
    with build_rewards(config.rewards, **reward_resources(config.model.dtype)) as rewards:
        highest, needs = rewards.highest(), rewards.needs()
    if section.threshold > highest + 1e-9:
        raise ConfigError(
            f"distill.threshold {section.threshold:g} is out of reach: the rewards give at most {highest:g}; lower it"
        )
    for name in sorted({config.data.prompt_column, config.data.answer_column, *needs} & set(COLUMNS)):
        raise ConfigError(f"the data's column {name!r} would be replaced by the one that distill writes; rename it")
    for row in prepared.train_rows:
        try:
            json.dumps(row.columns, allow_nan=False)
        except (TypeError, ValueError) as err:
            raise ConfigError(f"{row.where}: a column does not go into JSON ({err}); convert or remove it") from err


def _policy(directory: Path) -> dict[str, Any]:
    """Where the policy is, and what it is: the SHA-256 of its files. `id` is short for them."""
    files = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json"):
            with path.open("rb") as file:
                files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(directory), "id": digest(files), "sha256": files}


def _sampling(config: Config) -> dict[str, Any]:
    """Everything else that decides which answers are drawn and what they are worth."""
    return config.model_dump(
        mode="json",
        include={"run": {"seed"}, "data": True, "rollout": True, "rewards": True, "distill": True},
        exclude={
            "rollout": {"num_workers", "max_num_seqs", "page_size", "num_pages"},
            "distill": {"threshold", "max_per_prompt", "cap_mean_length"},
        },
    )


def _check_origin(run_dir: Path, origin: dict[str, Any]) -> None:
    """A resumed run must sample what it would have sampled. Raises ConfigError naming the key that is different."""
    if not (run_dir / PROVENANCE).is_file():
        raise ConfigError(f"--resume {str(run_dir)!r} is no run of `grpo distill` (no {PROVENANCE}); check the path")
    saved = json.loads((run_dir / PROVENANCE).read_text())
    pairs = {
        f"{section}.{key}": (saved["sampling"][section].get(key), values.get(key))
        for section, values in origin["sampling"].items()
        for key in [*values, *saved["sampling"][section]]
    }
    pairs["the policy under model.path"] = (saved["policy"]["id"], origin["policy"]["id"])
    pairs["the digest of the prompts under data"] = (saved["prompts"]["digest"], origin["prompts"]["digest"])
    for name, (before, now) in pairs.items():
        if before != now:
            raise ConfigError(
                f"{name} {now!r} is not the {before!r} that {run_dir} was begun with; restore it, or start a new run "
                "(only distill.threshold, max_per_prompt and cap_mean_length may change)"
            )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# ---- sampling


def _sample(
    prepared: Prepared, section: DistillConfig, cluster: Cluster, prompts: Sequence[Prompt], run_dir: Path, done: int
) -> None:
    """Steps done + 1 to the last; a step is in metrics.jsonl once all its answers are in samples.jsonl."""
    config, size = prepared.config, section.prompts_per_step
    steps = -(-len(prompts) // size)
    if done:
        print(f"going on after step {done}", flush=True)
    with RunLog(run_dir, resume_step=done) as log, Progress(steps, start=done) as progress:
        for step in range(done + 1, steps + 1):
            clock, share = Clock(), prompts[(step - 1) * size : step * size]
            with clock("rollout"):
                params = [rollout_params(config, section.num_generations, _seed(config, p.id)) for p in share]
                completions = cluster.sample([p.token_ids for p in share], params)
            with clock("rewards"):
                inputs = reward_inputs(share, completions, prepared.tokenizer)
                scores = cluster.score(inputs)
            raise_if_failing(scores, config.grpo.max_error_share)
            groups = make_groups(share, completions, inputs, scores)
            rows = sample_rows(step, groups, len(inputs))
            accepted = sum(not why_rejected(row, section.threshold) for row in rows)
            metrics = {"step": step, "acceptance_rate": accepted / len(rows), **step_metrics(groups, groups)}
            metrics |= {name: value for name, value in clock.metrics().items() if value}
            log.samples(rows)
            log.metrics(metrics)
            progress.step(metrics)


def _seed(config: Config, prompt_id: str) -> int:
    """Of a prompt's samples; not the seeds that training draws with."""
    return seed_of(config.run.seed, "distill", prompt_id)


# ---- results


def _data_rows(prepared: Prepared, selection: Selection, run_dir: Path, policy: str) -> Iterator[dict[str, Any]]:
    """The data's columns as they were, and COLUMNS; in the order of samples.jsonl."""
    columns = {row.id: row.columns for row in prepared.train_rows}
    kept = {(answer.prompt_id, answer.sample) for answer in selection.kept}
    for row in iter_samples(run_dir):
        prompt_id, sample = row["prompt_id"], row["sample"]
        if (prompt_id, sample) in kept:
            yield {
                **columns[prompt_id],
                "completion": row["completion"],
                "reward": row["reward"],
                "parts": row["scores"],
                "length": row["length"],
                "provenance": {
                    "prompt_id": prompt_id,
                    "sample": sample,
                    "seed": _seed(prepared.config, prompt_id),
                    "policy": policy,
                },
            }


def _sft_config(config: Config, policy: Path, run_dir: Path) -> Config:
    """A configuration for `grpo sft` that trains the policy on the data; every row of it, for all max_steps."""
    data = {"path": str(run_dir / DATA), "task": "", "task_options": {}, "holdout": 0.0}
    data |= {"completion_column": "completion", "completion_template": ""}
    stage = (config.sft or StageConfig()).model_copy(update={"stop_accuracy": 0.0})
    run = {"name": f"{config.run.name}-sft", "output_dir": f"{run_dir}-sft", "overwrite": False}
    return config.model_copy(
        update={
            "run": config.run.model_copy(update=run),
            "model": config.model.model_copy(update={"path": str(policy), "init": None}),
            "data": config.data.model_copy(update=data),
            "sft": stage,
        }
    )


def _reasons(selection: Selection) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in selection.dropped.items() if count) or "none"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
