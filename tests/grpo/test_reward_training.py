"""`grpo rewards train`: losses by hand, gradients whatever the micro-batches, learning, what it writes and refuses."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from grpo.config import Config, RewardModelConfig, load_config
from grpo.learner import Learner
from grpo.preferences import Example, concordance, example_losses, measures
from grpo.reward_training import (
    load_reward_model,
    pack_examples,
    reward_loss,
    score_examples,
    train_reward_model,
)
from model.create import create_model
from model.reward_head import DeepseekV3ForSequenceClassification
from rewards import RewardInput, build_rewards
from tests import command

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_v3.yaml"
PAIRS = RewardModelConfig(center_rewards_coefficient=0.1)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `policy`, and `pairs.jsonl`: the completion with the larger share of vowels is the chosen one."""
    torch.set_num_threads(1)
    tmp, draw = tmp_path_factory.mktemp("rewards"), random.Random(0)
    create_model(TINY, tmp / "policy", seed=0)
    pairs, labelled = [], []
    for i in range(600):
        texts = ["".join(draw.choices("aeioubcdfg", [w] * 5 + [1 - w] * 5, k=6)) for w in (0.25, 0.75)]
        good = [sum(c in "aeiou" for c in text) for text in texts]
        if good[0] == good[1]:
            continue
        low, high = texts if good[0] < good[1] else texts[::-1]
        pairs.append({"prompt": f"{i}:", "chosen": high, "rejected": low})
        labelled.append({"prompt": f"{i}:", "completion": texts[i % 2], "label": good[i % 2] > 3})
    write(tmp / "pairs.jsonl", pairs)
    write(tmp / "labelled.jsonl", labelled)
    return tmp


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(tmp: Path, name: str, **sections: dict[str, Any]) -> Config:
    content: dict[str, Any] = {
        "run": {"output_dir": str(tmp / name), "eval_steps": 15},
        "model": {"path": str(tmp / "policy")},
        "data": {"path": str(tmp / "pairs.jsonl"), "holdout": 0.2},
        "reward_model": {"max_steps": 30, "batch_size": 32, "learning_rate": 2e-3, "max_tokens_per_microbatch": 200},
    }
    return load_config({key: value | sections.get(key, {}) for key, value in content.items()})


def examples(count: int, seed: int = 0) -> list[Example]:
    """Pairs of random tokens of random lengths; the margin is 0.1 times their number."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(7, 50) for _ in range(draw.randint(low, high)))

    return [Example(ids(1, 6), (ids(1, 9), ids(1, 9)), 0.1 * i) for i in range(count)]


# ---- losses


def test_pair_losses_and_gradient_by_hand() -> None:
    scores = torch.tensor([[2.0, 1.0], [0.0, 0.5]], requires_grad=True)
    losses = example_losses(scores, torch.tensor([0.25, 0.0]), PAIRS)
    # log(1 + exp(-0.75)) + 0.1 * 9, log(1 + exp(0.5)) + 0.1 * 0.25
    assert losses.tolist() == pytest.approx([0.386871 + 0.9, 0.974077 + 0.025], abs=1e-6)
    losses.sum().backward()
    assert scores.grad is not None
    # d/d chosen: -sigmoid(-(difference)) + 0.2 * sum; sigmoid(-0.75) = 0.320821, sigmoid(0.5) = 0.622459
    expected = [[-0.320821 + 0.6, 0.320821 + 0.6], [-0.622459 + 0.1, 0.622459 + 0.1]]
    assert scores.grad.numpy() == pytest.approx(np.array(expected), abs=1e-6)


def test_label_losses_by_hand() -> None:
    scores, labels = torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, 0.25])
    mse = example_losses(scores, labels, RewardModelConfig(loss_type="mse"))
    assert mse.tolist() == pytest.approx([1.0, 1.5625])
    bce = example_losses(scores, labels, RewardModelConfig(loss_type="bce"))
    # log(1 + exp(-2)); 0.25 * log(1 + e) + 0.75 * log(1 + exp(-1))
    assert bce.tolist() == pytest.approx([0.126928, 0.25 * 1.313262 + 0.75 * 0.313262], abs=1e-6)


def test_measures_by_hand() -> None:
    scores = np.array([[2.0, 1.0], [0.0, 0.5], [1.0, 1.0]], dtype=np.float32)
    found = measures(scores, np.zeros(3), RewardModelConfig())
    assert found["accuracy"] == pytest.approx(0.5)  # right, wrong, a tie
    # chosen 2, 0, 1 against rejected 1, .5, 1: 3 + 0 + (1 + 2 / 2) of 9
    assert found["auc"] == pytest.approx(5 / 9)
    assert found["margin"] == pytest.approx(0.5 / 3)
    labels = measures(
        np.array([[2.0], [-1.0], [0.0]], dtype=np.float32),
        np.array([1.0, 0.0, 1.0]),
        RewardModelConfig(loss_type="bce"),
    )
    assert labels["accuracy"] == pytest.approx(2.5 / 3) and labels["auc"] == 1.0
    # three labels: (0, 1), (0, 2) in order, (1, 2) not
    assert concordance(np.array([0.0, 2.0, 1.0]), np.array([0.0, 1.0, 2.0])) == pytest.approx(2 / 3)
    assert math.isnan(concordance(np.array([0.0, 2.0]), np.ones(2)))


def test_the_packed_loss_is_that_of_the_scores_one_by_one(tmp: Path) -> None:
    learner = learner_of(tmp)
    pairs = examples(5)
    network = learner.policy.model
    assert isinstance(network, DeepseekV3ForSequenceClassification)
    with torch.no_grad():
        alone = torch.stack([torch.cat([network([(e.prompt_ids, c)]) for c in e.completions]) for e in pairs])
    torch.testing.assert_close(torch.from_numpy(score_examples(learner.policy, pairs, 40)), alone, rtol=0, atol=1e-5)
    loss, _ = learner.policy.forward_backward(pack_examples(pairs, 10_000), reward_loss(PAIRS))
    expected = example_losses(alone, torch.tensor([e.value for e in pairs]), PAIRS).mean()
    assert loss == pytest.approx(float(expected), abs=1e-5)


def learner_of(tmp: Path) -> Learner:
    model = load_reward_model(tmp / "policy", torch.float32, seed=0)
    return Learner(tmp / "policy", PAIRS, model=model)


def test_gradients_do_not_depend_on_the_micro_batches(tmp: Path) -> None:
    pairs, gradients = examples(9), {}
    for max_tokens in (10_000, 60, 1):
        learner = learner_of(tmp)
        packed = pack_examples(pairs, max_tokens)
        loss, stats = learner.policy.forward_backward(packed, reward_loss(PAIRS))
        grads = torch.cat([g.flatten() for m in learner.policy.master if (g := m.grad) is not None])
        gradients[len(packed)] = (loss, grads, sum(int(s["sum/accuracy"] * 2) for s in stats))
    assert list(gradients) == [1, *sorted(gradients)[1:]] and max(gradients) > 4
    whole = gradients.pop(1)
    assert whole[1].norm() > 1e-3
    for loss, grads, right in gradients.values():
        assert loss == pytest.approx(whole[0], abs=1e-6) and right == whole[2]
        assert (grads - whole[1]).norm() < 1e-5 * whole[1].norm()


# ---- training


@pytest.fixture(scope="module")
def trained(tmp: Path) -> Path:
    """30 steps of pairs."""
    return train_reward_model(settings(tmp, "trained")).out


def test_thirty_steps_beat_chance(tmp: Path, trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(31))
    evaluated = [row for row in rows if "eval/accuracy" in row]
    assert [row["step"] for row in evaluated] == [0, 15, 30]
    assert abs(evaluated[0]["eval/accuracy"] - 0.5) < 0.2
    assert evaluated[-1]["eval/accuracy"] > 0.9 and evaluated[-1]["eval/auc"] > 0.85
    assert rows[-1]["accuracy"] > 0.8 and rows[-1]["loss"] < 0.5 < rows[1]["loss"]
    assert {"margin", "score", "grad_norm", "learning_rate"} <= rows[-1].keys()
    saved = json.loads((trained / "reward_model.json").read_text())
    assert saved["held_out"]["accuracy"] == evaluated[-1]["eval/accuracy"]
    assert yaml.safe_load((trained / "config.yaml").read_text())["reward_model"]["max_steps"] == 30


def test_the_directory_is_a_reward(tmp: Path, trained: Path) -> None:
    pairs = [json.loads(line) for line in (tmp / "pairs.jsonl").read_text().splitlines()]
    inputs = [RewardInput(row["prompt"], row[key]) for row in pairs for key in ("chosen", "rejected")]
    with build_rewards({"reward_model": {"model": str(trained), "standardize": True, "batch_size": 64}}) as rewards:
        values = np.array([score.value for score in rewards.score(inputs)]).reshape(-1, 2)
    assert (values[:, 0] > values[:, 1]).mean() > 0.9
    assert abs(values.mean()) < 0.3 and values.std() == pytest.approx(1.0, abs=0.2)


def test_training_goes_on_from_a_reward_model(tmp: Path, trained: Path) -> None:
    config = settings(
        tmp, "further", model={"path": str(trained)}, reward_model={"max_steps": 1, "learning_rate": 1e-9}
    )
    result = train_reward_model(config)
    before = json.loads((trained / "reward_model.json").read_text())["held_out"]
    assert result.held_out["loss"] == pytest.approx(before["loss"], abs=1e-4)
    assert result.describe().startswith(f"held out: pair accuracy {before['accuracy']:.3f}, AUC {before['auc']:.3f}")


@pytest.mark.parametrize("loss_type", ["bce", "mse"])
def test_labels(loss_type: str, tmp: Path) -> None:
    config = settings(tmp, loss_type, data={"path": str(tmp / "labelled.jsonl")}, reward_model={"loss_type": loss_type})
    result = train_reward_model(config)
    assert result.held_out["auc"] > 0.9
    assert ("accuracy" in result.held_out) is (loss_type == "bce")
    assert result.held_out.get("accuracy", 1.0) > 0.8


def test_equal_seeds_give_equal_models(tmp: Path) -> None:
    models = [
        train_reward_model(settings(tmp, name, reward_model={"max_steps": 2})).out / "model.safetensors"
        for name in ("once", "twice")
    ]
    assert models[0].read_bytes() == models[1].read_bytes()


# ---- bad input


def run(capfd: pytest.CaptureFixture[str], config: Config, tmp_path: Path, *argv: str) -> tuple[int, str, str]:
    path = tmp_path / "config.yaml"
    path.write_text(config.dump())
    return command.run(capfd, "rewards", "train", str(path), *argv)


GOOD = {"prompt": "1:", "chosen": "ae", "rejected": "bc"}
BAD_ROWS = {
    "no chosen": ({"prompt": "2:", "rejected": "bc"}, {}, "rows.jsonl:2: no column 'chosen'"),
    "no rejected": ({"prompt": "2:", "chosen": "bc"}, {}, "set reward_model.rejected_column"),
    "no text": (GOOD | {"chosen": 3}, {}, "rows.jsonl:2: column 'chosen' is 3; a completion is text"),
    "a chat": (GOOD | {"chosen": [{"role": "user", "content": "a"}]}, {}, "a list of one assistant message"),
    "equal": (GOOD | {"chosen": "bc"}, {}, "rows.jsonl:2: chosen and rejected are equal"),
    "margin": (GOOD | {"margin": "much"}, {}, "rows.jsonl:2: column 'margin' is 'much'"),
    "characters": (GOOD | {"chosen": "\u2603"}, {}, "rows.jsonl:2: the tokenizer has no token for"),
    "too long": (GOOD | {"chosen": "a" * 300}, {}, "rows.jsonl:2: prompt and completion have 303 tokens"),
    "all too long": (GOOD, {"reward_model": {"max_length": 3}, "data": {"drop_long_prompts": True}}, "all 2 rows have"),
    "max_length": (GOOD, {"reward_model": {"max_length": 999}}, "the model's context is 256"),
    "no completion": (GOOD, {"reward_model": {"loss_type": "mse"}}, "rows.jsonl:1: no column 'completion'"),
    "no label": (GOOD, {"reward_model": {"loss_type": "mse"}, "data": {"completion_column": "chosen"}}, "'label'"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(case: str, tmp: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row, sections, words = BAD_ROWS[case]
    data = {"path": str(write(tmp_path / "rows.jsonl", [GOOD, row])), "holdout": 0.0} | sections.get("data", {})
    config = settings(tmp, "refused", **(sections | {"data": data}))
    code, _, err = run(capfd, config, tmp_path)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == (2, 1) and words in errors[0], err
    assert not (tmp / "refused").exists()


def test_bad_labels(tmp: Path, tmp_path: Path) -> None:
    for labels, words in ((["yes", 1], "must be a finite number"), ([2, 1], "needs 0 to 1"), ([1, 1], "one value")):
        rows = [{"prompt": f"{i}:", "completion": "a", "label": label} for i, label in enumerate(labels)]
        data = {"path": str(write(tmp_path / "rows.jsonl", rows)), "holdout": 0.0}
        with pytest.raises(ValueError, match=words):
            train_reward_model(settings(tmp, "refused", data=data, reward_model={"loss_type": "bce"}))


def test_the_command_line(tmp: Path, tmp_path: Path, trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp, "line", data={"holdout": 0.0})
    code, out, _ = run(capfd, config, tmp_path, "--reward_model.max_steps=1")
    assert code == 0 and "nothing was held out" in out and f"model: {tmp / 'line'}" in out
    assert json.loads((tmp / "line" / "reward_model.json").read_text())["of"] == "training rows"
    code, _, err = run(capfd, config, tmp_path, f"--run.output_dir={trained}")
    assert code == 2 and "is not empty" in err and "--run.overwrite=true" in err
    code, _, err = run(capfd, config, tmp_path, "--reward_model=null")
    assert code == 2 and "no reward_model section" in err
    code, _, err = run(capfd, config, tmp_path, "--reward_model.loss_typ=mse")
    assert code == 2 and "did you mean 'reward_model.loss_type'" in err
