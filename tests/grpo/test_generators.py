"""A tiny model trained on verdicts with reasons, from the command line to the reward that uses it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo.cli import main
from grpo.config import load_config
from grpo.generators import EngineGenerator
from grpo.prepare import load_tokenizer, reward_resources
from grpo.roles import RewardRole
from grpo.stages import run_sft
from model.create import create_model
from rewards import RewardInput, Status, build_rewards
from rewards.grading import grading

TEMPLATE = "<n>{completion}</n>"
OPTIONS = {"temperature": 0.0, "max_tokens": 20, "seed": 0, "chat": False}


def command(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["grpo", *argv])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model. The sentences that end each question are one token of its tokenizer, to keep the test fast."""
    ending = grading("generative_reward", scale=(0, 1)).without_reference.ending
    characters, special = "\n<n/>0123456789 evoda", ["<pad>", "<bos>", "<eos>", ending, "Verdict:"]
    config = {
        "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "num_attention_heads": 4, "num_key_value_heads": 4,
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "max_position_embeddings": 256, "rope_scaling": None, "initializer_range": 0.05, "dtype": "float32",
    }  # fmt: skip
    out = tmp_path_factory.mktemp("generator") / "model"
    tokenizer = {"type": "characters", "characters": characters, "special_tokens": special}
    create_model({"config": config, "tokenizer": tokenizer}, out, 0)
    return out


def test_a_model_trained_on_verdicts_gives_verdicts(
    random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule behind the labels: a number is good if it is even. A tenth of the numbers is never shown."""

    def row(number: int) -> dict[str, Any]:
        even = number % 2 == 0
        return {"prompt": "?", "completion": f"{number:03d}", "reason": "even" if even else "odd", "label": even}

    train = [row(number) for number in range(1000) if number % 11]
    unseen = [row(number) for number in range(0, 1000, 11)]
    data, verdicts = tmp_path / "labelled.jsonl", tmp_path / "verdicts.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in train))
    command(monkeypatch, "rewards", "verdicts", str(data), "--out", str(verdicts), "--template", TEMPLATE)
    assert json.loads(verdicts.read_text().splitlines()[1])["completion"] == "even\nVerdict: 1"
    config = load_config(
        {
            "model": {"path": str(random_model)},
            "data": {"path": str(verdicts), "completion_column": "completion", "holdout": 0},
            "run": {"cluster": "inline", "output_dir": str(tmp_path / "rm"), "threads": 1},
            "rewards": {"generative_reward": {"model": str(tmp_path / "rm"), "template": TEMPLATE, "max_tokens": 20}},
            "sft": {"max_steps": 80, "batch_size": 32, "learning_rate": 5e-3, "warmup_steps": 10},
        }
    )
    run_sft(config, random_model, tmp_path / "rm")
    role = RewardRole(config)  # as a run hosts it
    scores = role.score([RewardInput(each["prompt"], each["completion"]) for each in unseen])
    role.close()
    assert [score.status for score in scores].count(Status.OK) == len(unseen)
    agreement = sum(score.value == each["label"] for score, each in zip(scores, unseen)) / len(unseen)
    assert agreement >= 0.95
    assert {score.info["generative_reward"]["explanation"] for score in scores} == {"even", "odd"}


def generator(path: Path, **options: Any) -> EngineGenerator:
    return EngineGenerator(path, OPTIONS | options, load_tokenizer)


def test_draws_depend_on_the_prompt_and_its_repetition_alone(random_model: Path) -> None:
    hot = {"temperature": 1.0, "max_tokens": 200}  # an untrained model ends one time in thirty
    drawn = generator(random_model, **hot)(["<n>1</n>"] * 3 + ["<n>2</n>"])
    assert len({text for text in drawn if text is not None}) >= 2
    generate = generator(random_model, **hot)
    assert generate(["<n>2</n>", "<n>1</n>", "<n>1</n>"]) == [drawn[3], drawn[0], drawn[1]]
    generate.close()
    assert generate(["<n>1</n>"]) == drawn[:1]


def test_what_does_not_fit_has_no_text(random_model: Path) -> None:
    assert generator(random_model, max_tokens=1)(["<n>1</n>", "<n>" * 100, ""]) == [None, None, None]


def test_the_directory_is_checked_before_it_is_loaded(random_model: Path, tmp_path: Path) -> None:
    config = load_config({"rewards": {"mine": {"kind": "generative_reward", "model": "nowhere"}}})
    with pytest.raises(ValueError, match=r"rewards\.mine\.model 'nowhere' is no model directory"):
        build_rewards(config.rewards, **reward_resources())
    with pytest.raises(ValueError, match=r"max_tokens 256 leaves no room"):
        generator(random_model, max_tokens=256)
    with pytest.raises(ValueError, match="no chat template"):
        generator(random_model, chat=True)
    copy = tmp_path / "model"
    shutil.copytree(random_model, copy)
    before = generator(copy).version
    assert generator(copy).version == before
    weights = next(copy.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes())  # other weights at the same path are another judge
    assert generator(copy).version != before
