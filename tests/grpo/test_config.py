"""Configuration: what is wrong is one line that names key, value and remedy; what is right comes back unchanged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.config import Config, ConfigError, LoraConfig, Section, StageConfig, digest, load_config


def sections() -> list[type[Section]]:
    given = [type(value) for value in dict(Config()).values() if isinstance(value, Section)]
    return [Config, LoraConfig, StageConfig, *given]


def message(source: Any, *overrides: str) -> str:
    """The error of a bad configuration, checked to be one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    text = str(caught.value)
    assert text and "\n" not in text, f"not one line: {text!r}"
    return text


# ---- errors


@pytest.mark.parametrize(
    "content, unknown, near",
    [
        ({"grpo": {"learning_rat": 1e-4}}, "grpo.learning_rat", "grpo.learning_rate"),
        ({"rollout": {"temprature": 1}}, "rollout.temprature", "rollout.temperature"),
        ({"rolout": {}}, "rolout", "rollout"),
        ({"sft": {"max_step": 1}}, "sft.max_step", "sft.max_steps"),
    ],
)
def test_an_unknown_key_names_the_nearest(content: dict[str, Any], unknown: str, near: str) -> None:
    text = message(content)
    assert repr(unknown) in text and repr(near) in text


def test_an_unknown_key_in_an_override_names_the_nearest() -> None:
    assert "'run.threads'" in message({}, "--run.thread=2")


def test_prompts_that_do_not_divide_into_minibatches() -> None:
    text = message({"grpo": {"prompts_per_step": 10, "minibatches_per_step": 4}})
    for part in ("grpo.prompts_per_step", "10", "grpo.minibatches_per_step", "4", "multiple"):
        assert part in text


def test_on_and_off_are_words(tmp_path: Path) -> None:
    """YAML 1.1 would read them, and yes and no, as booleans."""
    path = tmp_path / "run.yaml"
    path.write_text("model: {fp8: on}\nrollout: {weight_check: off, exact: true}\n")
    config = load_config(path, ["--run.overwrite=True", "--rollout.replay_routing=false"])
    assert (config.model.fp8, config.rollout.weight_check, config.rollout.exact) == ("on", "off", True)
    assert (config.run.overwrite, config.rollout.replay_routing) == (True, False)
    path.write_text(config.dump())
    assert load_config(path) == config
    assert load_config(path, ["--model.fp8=off"]).model.fp8 == "off"


def test_bf16_moments_that_could_not_decay() -> None:
    text = message({"grpo": {"adam_moment_dtype": "bfloat16", "adam_beta2": 0.999}})
    for part in ("adam_beta2 0.999", "0.996", "adam_moment_dtype", "float32"):
        assert part in text


@pytest.mark.parametrize(
    "key, value",
    [
        ("run.threads", 0),
        ("grpo.num_generations", 1),
        ("grpo.learning_rate", 0),
        ("grpo.learning_rate", "fast"),
        ("grpo.delta", 1.0),
        ("grpo.loss_type", "ppo"),
        ("rollout.top_p", 0),
        ("rollout.temperature", 0),
        ("model.dtype", "float16"),
        ("data.holdout", 1.0),
        ("run.overwrite", "perhaps"),
    ],
)
def test_a_value_out_of_range_names_key_and_value(key: str, value: Any) -> None:
    text = message({}, f"--{key}={value}")
    assert key in text and repr(value) in text


def test_two_sources_are_one_too_many() -> None:
    assert "data.path and data.task" in message({"data": {"path": "a.jsonl", "task": "chain_sum"}})
    assert "model.path and model.init" in message({"model": {"path": "a", "init": "b.yaml"}})


@pytest.mark.parametrize("key", ["prompt_pattern", "answer_pattern"])
def test_a_pattern_must_be_an_expression_with_one_group(key: str) -> None:
    assert f"data.{key}" in message({"data": {key: "("}})
    assert "exactly one (group)" in message({"data": {key: "abc"}})
    assert "exactly one (group)" in message({"data": {key: "(a)(b)"}})


@pytest.mark.parametrize("weight", ["high", True, [1], None])
def test_a_reward_is_a_weight_or_a_mapping(weight: Any) -> None:
    text = message({"rewards": {"exact_match": weight}})
    assert "rewards.exact_match" in text and repr(weight) in text


def test_bad_yaml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("run: {seed: 1\ngrpo: [")
    text = message(path)
    assert str(path) in text and "line" in text


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin1.yaml"
    path.write_bytes(b"run: {name: \xff}")
    assert str(path) in message(path)


@pytest.mark.parametrize("content", ["- a\n- b\n", "just words\n", "3\n"])
def test_yaml_that_is_no_mapping(tmp_path: Path, content: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(content)
    assert str(path) in message(path)


def test_a_section_that_is_no_mapping(tmp_path: Path) -> None:
    assert "run" in message({"run": 3})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "missing.yaml" in message(tmp_path / "missing.yaml")
    assert str(tmp_path) in message(tmp_path)


@pytest.mark.parametrize("argument", ["run.seed=1", "--run.seed", "--seed=1", "--run.=1", "--=1", "-run.seed=1"])
def test_an_override_of_another_form_is_shown(argument: str) -> None:
    assert repr(argument) in message({}, argument)


def test_an_override_with_bad_yaml_is_an_error_of_its_own() -> None:
    assert "--rewards.exact_match={" in message({}, "--rewards.exact_match={")


def test_an_override_below_a_value_that_is_no_section() -> None:
    assert "'seed' is not a section" in message({"run": {"seed": "x"}}, "--run.seed.deep=1")


# ---- overrides and defaults


@pytest.mark.parametrize(
    "text, value", [("3e-4", 3e-4), ("1E-5", 1e-5), ("2.5e-3", 2.5e-3), (".5e-1", 0.05), ("1", 1.0)]
)
def test_floats_in_overrides_and_files(tmp_path: Path, text: str, value: float) -> None:
    assert load_config({}, [f"--grpo.learning_rate={text}"]).grpo.learning_rate == value
    path = tmp_path / "rate.yaml"
    path.write_text(f"grpo:\n  learning_rate: {text}\n")
    assert load_config(path).grpo.learning_rate == value


def test_words_that_look_a_little_like_floats_stay_words() -> None:
    for word in ("1e", "e5", "run-1e-4", "2e-4-b"):
        assert load_config({}, [f"--run.name={word}"]).run.name == word


def test_overrides_reach_every_kind_of_value() -> None:
    config = load_config(
        {"rewards": {"exact_match": 1.0}, "grpo": {"epsilon_high": 0.3}},
        [
            "--run.overwrite=true",
            "--run.name=",
            "--run.output_dir=runs/a=b",
            "--grpo.epsilon_high=null",
            "--rewards.length.weight=0.1",
            "--rewards.length.max=3e2",
            "--rewards.exact_match.strip=false",
            "--data.task_options.min_terms=2",
            "--sft.max_steps=7",
        ],
    )
    assert config.run.overwrite is True and config.run.output_dir == "runs/a=b"
    assert config.grpo.epsilon_high is None
    assert config.rewards == {"exact_match": {"weight": 1.0, "strip": False}, "length": {"weight": 0.1, "max": 300.0}}
    assert config.data.task_options == {"min_terms": 2}
    assert config.sft is not None and config.sft.max_steps == 7


def test_the_last_override_wins() -> None:
    assert load_config({}, ["--run.seed=1", "--run.seed=2"]).run.seed == 2


def test_overrides_leave_the_source_alone() -> None:
    source = {"run": {"seed": 1}}
    load_config(source, ["--run.seed=2"])
    assert source == {"run": {"seed": 1}}


def test_name_and_output_directory_come_from_the_stem(tmp_path: Path) -> None:
    path = tmp_path / "maths.yaml"
    path.write_text("")
    assert load_config(path).run.name == "maths" and load_config(path).run.output_dir == "runs/maths"
    given = load_config(path, ["--run.name=a", "--run.output_dir=b"])
    assert (given.run.name, given.run.output_dir) == ("a", "b")


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError):
        load_config({}).run.seed = 3  # type: ignore[misc]


# ---- self-description and round trip


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_field_is_described(section: type[Section]) -> None:
    bare = [name for name, info in section.model_fields.items() if not info.description]
    if section is Config:  # its sections describe themselves
        bare = [name for name in bare if not (getattr(Config(), name).__doc__ or "").strip()]
    assert not bare, f"{section.__name__}: fields without a docstring: {bare}"
    assert (section.__doc__ or "").strip(), section.__name__


def test_docstrings_name_only_fields_that_exist() -> None:
    names = {f"{top}.{key}" for top, info in Config.model_fields.items()
             for key in getattr(type(getattr(Config(), top)), "model_fields", {})}  # fmt: skip
    for section in sections():
        for name, info in section.model_fields.items():
            for mention in re.findall(r"\b(?:run|grpo|model|data|rollout)\.[a-z_]+\b", info.description or ""):
                assert mention in names, f"{section.__name__}.{name} mentions {mention}"


def test_the_resolved_configuration_comes_back_unchanged(tmp_path: Path) -> None:
    config = load_config(
        {"data": {"task": "chain_sum", "answer_pattern": "#### (.+)"}, "sft": {}, "rewards": {"exact_match": 1}},
        ["--grpo.learning_rate=3e-4", "--grpo.epsilon_high=0.28", "--rewards.a.weight=1e-3", "--run.name=\u00e9"],
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.dump())
    again = load_config(path)
    assert again == config
    assert again.dump() == config.dump()
    assert yaml.safe_load(config.dump())["grpo"]["num_generations"] == 8, "defaults are written out too"


def test_digest_depends_on_content_and_not_on_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_cispo_needs_its_cap() -> None:
    assert "grpo.epsilon_high" in message({"grpo": {"loss_type": "cispo"}})
    assert load_config({"grpo": {"loss_type": "cispo", "epsilon_high": 5}}).grpo.epsilon_high == 5


def test_a_rate_for_a_frozen_router_is_a_mistake() -> None:
    text = message({"grpo": {"router_bias_update_rate": 0.01}})
    assert "grpo.router_bias_update_rate is 0.01" in text and "grpo.router_policy is frozen" in text
    assert load_config({"grpo": {"router_policy": "update"}}).grpo.router_bias_update_rate == 0.001
    assert "'freeze'" in message({}, "--grpo.router_policy=freeze")
