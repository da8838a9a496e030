"""From a configuration to what a run starts from: model, tokenizer, prompts, run directory. Checks come first.

A model that the configuration describes (model.init), and its warm start, are kept under `.cache/` beside the run
directory, keyed by everything that went into them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grpo.config import Config, ConfigError, digest, load_config
from grpo.data import Row, load_rows, make_prompts
from grpo.records import Prompt
from model.config import DeepseekV3Config
from model.family import AnyConfig, read_config
from rewards import build_rewards


@dataclass(frozen=True)
class Prepared:
    """A checked configuration and what it names."""

    config: Config
    model_dir: Path  # before any warm start
    tokenizer: Any
    train_rows: list[Row]
    prompts: list[Prompt]
    held_out: list[Prompt]


def run_config(
    source: str | Path | Mapping[str, Any] | Config | None, overrides: Sequence[str] = (), resume: str = ""
) -> Config:
    """The configuration of a new run, or with `resume` that of a run directory to go on with. Raises ConfigError."""
    if resume:
        saved = Path(resume) / "config.yaml"
        if source is not None:
            raise ConfigError(f"--resume {resume} brings its own configuration; leave {source} out")
        if not saved.is_file():
            raise ConfigError(f"--resume {resume!r} is no run directory (no config.yaml); check the path")
        config = load_config(saved, overrides)
        return config.model_copy(update={"run": config.run.model_copy(update={"output_dir": resume})})
    if source is None:
        raise ConfigError("no configuration given; name a YAML file, or a run with --resume RUN_DIR")
    return source if isinstance(source, Config) else load_config(source, overrides)


def prepare(config: Config) -> Prepared:
    """Reads and checks model, data and rewards against each other. Raises ValueError; takes seconds, not minutes."""
    model_dir = model_directory(config)
    model_config = read_config(model_dir, config.model.family)
    _check_model(config, model_config)
    tokenizer = load_tokenizer(model_dir)
    if not config.rewards:
        raise ConfigError("rewards is empty; name at least one, e.g. `rewards: {exact_match: 1.0}`")
    with build_rewards(config.rewards, **reward_resources(config.model.dtype)) as rewards:
        gold = "answer" in rewards.needs()
        train_rows, held_out_rows = load_rows(config.data)
        room = model_config.max_position_embeddings - config.rollout.max_completion_length
        if room < 1:
            raise ConfigError(
                f"rollout.max_completion_length {config.rollout.max_completion_length} leaves no room for a prompt in "
                f"the context of {model_config.max_position_embeddings}; lower it"
            )
        prompts = make_prompts(train_rows, config.data, tokenizer, room, gold)
        held_out = make_prompts(held_out_rows, config.data, tokenizer, room, gold)
        for prompt in prompts:
            rewards.check(prompt.fields)
    return Prepared(config, model_dir, tokenizer, train_rows, prompts, held_out)


def reward_resources(dtype: str = "float32") -> dict[str, Any]:
    """What build_rewards hands to the rewards that ask for it by name. `dtype`: of models they compute with."""

    def load_generator(model_dir: str, options: Mapping[str, Any]) -> Any:
        from grpo.generators import EngineGenerator

        return EngineGenerator(model_dir, options, load_tokenizer, dtype)

    return {"load_generator": load_generator}


def _check_model(config: Config, model: AnyConfig) -> None:
    if not isinstance(model, DeepseekV3Config):
        for key, value, off in (
            ("grpo.router_policy", config.grpo.router_policy, "frozen"),
            ("grpo.router_aux_loss_coef", config.grpo.router_aux_loss_coef, 0.0),
            ("grpo.mtp_loss_weight", config.grpo.mtp_loss_weight, 0.0),
            ("rollout.replay_routing", config.rollout.replay_routing, False),
        ):
            if value != off:
                raise ConfigError(
                    f"{key} is {value}, but the model is a {model.model_type!r}; only models of the DeepSeek-V3 family "
                    f"have that here: set it to {str(off).lower()}"
                )
        return
    if config.grpo.mtp_loss_weight > 0 and model.num_nextn_predict_layers == 0:
        raise ConfigError(
            f"grpo.mtp_loss_weight is {config.grpo.mtp_loss_weight}, but the model has no MTP layers "
            "(num_nextn_predict_layers is 0); set it to 0"
        )
    if config.grpo.router_policy != "frozen" and model.num_moe_layers == 0:
        raise ConfigError(
            f"grpo.router_policy is {config.grpo.router_policy}, but the model has no layer with experts "
            f"(first_k_dense_replace is {model.first_k_dense_replace}); set it to frozen"
        )


def load_tokenizer(model_dir: Path) -> Any:
    """The tokenizer of a model directory. Raises ValueError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as err:
        raise ConfigError(f"{model_dir} has no usable tokenizer: {' '.join(str(err).split())[:200]}") from err


def model_directory(config: Config) -> Path:
    """model.path, or a directory made from model.init. Raises ConfigError where neither leads to a model."""
    if config.model.path:
        path = Path(config.model.path)
        if not (path / "config.json").is_file():
            raise ConfigError(f"model.path {str(path)!r} is no model directory (no config.json); check the path")
        return path
    if config.model.init is None:
        raise ConfigError("neither model.path nor model.init is given; name a model directory or a model YAML")
    spec = model_spec(config.model.init)
    return cached(
        config, "model", {"spec": spec, "seed": config.run.seed}, lambda out: _create(spec, out, config.run.seed)
    )


def model_spec(init: str | dict[str, Any]) -> dict[str, Any]:
    """The content of model.init. Raises ConfigError for a missing or malformed file."""
    if isinstance(init, dict):
        return init
    if not Path(init).is_file():
        raise ConfigError(
            f"model.init {init!r} does not exist; give the path of a model YAML, e.g. configs/tiny_v3.yaml"
        )
    spec = yaml.safe_load(Path(init).read_text(encoding="utf-8"))
    if not isinstance(spec, dict):
        raise ConfigError(f"model.init {init!r} must be a mapping with `config` and `tokenizer`")
    return spec


def _create(spec: dict[str, Any], out: Path, seed: int) -> None:
    from model.create import create_model

    create_model(spec, out, seed)


def cached(config: Config, kind: str, key: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """`.cache/<kind>-<hash of key>` beside the run directory, built by `build(directory)` if it is not there yet."""
    path = Path(config.run.output_dir).parent / ".cache" / f"{kind}-{digest(key)}"
    if not path.is_dir():
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            build(partial)
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if not path.is_dir():  # another run may have been faster
                raise
    return path


def fresh_run_dir(config: Config) -> Path:
    """Makes run.output_dir, empty. Raises ConfigError if it is in use, unless run.overwrite and it is a run's."""
    path = Path(config.run.output_dir)
    if path.is_dir() and any(path.iterdir()):
        if not config.run.overwrite:
            raise ConfigError(
                f"run.output_dir {str(path)!r} is not empty; go on with `--resume {path}`, choose another directory, "
                "or replace it with --run.overwrite=true"
            )
        if not (path / "config.yaml").is_file():
            raise ConfigError(
                f"run.output_dir {str(path)!r} holds no run (no config.yaml), so run.overwrite does not delete it; "
                "choose another directory"
            )
        shutil.rmtree(path)
    elif path.exists() and not path.is_dir():
        raise ConfigError(f"run.output_dir {str(path)!r} is a file; choose a directory")
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(config.dump())
    return path
