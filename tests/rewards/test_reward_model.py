"""A model as a reward: its own numbers, in any batch, of whole texts; and what is no reward model is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from model.create import create_model
from model.reward_head import DeepseekV3ForSequenceClassification
from rewards import RewardInput, Score, Status, build_rewards
from rewards import reward_model as reward_module
from rewards.reward_model import fingerprint, reward_model

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_v3.yaml"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[:1] }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)
COMPLETIONS = ["4", "5 is the answer", "", "no, it is 4" * 9, "4 4", "what?", "2+2=4" * 3, "a", "b", "((()))"]
INPUTS = [RewardInput(f"{i % 3}+2=", text) for i, text in enumerate(COMPLETIONS)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 with a scalar head whose scores differ visibly, and a chat template."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("models") / "ours"
    spec = yaml.safe_load(TINY.read_text())
    spec["config"]["initializer_range"] = 0.2
    spec["tokenizer"]["chat_template"] = TEMPLATE
    create_model(spec, directory, seed=0)
    scorer = DeepseekV3ForSequenceClassification.from_policy(directory, seed=1)
    (directory / "model.safetensors").unlink()
    scorer.save_pretrained(directory)
    (directory / "reward_model.json").write_text(json.dumps({"scores": {"mean": 0.5, "std": 0.25}}))
    return directory


@pytest.fixture(scope="module")
def theirs(ours: Path) -> Path:
    """A Llama of transformers with one label and our tokenizer."""
    directory = ours.parent / "theirs"
    tokenizer = AutoTokenizer.from_pretrained(ours)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, num_labels=1, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def values(directory: Path, inputs: list[RewardInput] = INPUTS, **options: Any) -> list[float]:
    scores = reward_model(model=str(directory), **options).score(inputs)
    assert all(score.status is Status.OK for score in scores), scores
    return [score.value for score in scores]  # type: ignore[misc]


def ids(directory: Path, text: str) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def edited(directory: Path, tmp_path: Path, **config: Any) -> Path:
    """A copy with changes in config.json."""
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(content | config, indent=2) + "\n")
    return copy


# ---- numbers


@torch.no_grad()
def test_ours_is_the_head_on_the_end_token(ours: Path) -> None:
    network = DeepseekV3ForSequenceClassification.from_pretrained(ours)
    expected = [float(network([([], ids(ours, s.prompt + s.completion))])) for s in INPUTS]  # type: ignore[operator]
    assert torch.tensor(expected).std() > 0.1
    assert values(ours) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_transformers_model_is_logit_0_of_the_unpadded_text(theirs: Path) -> None:
    network = LlamaForSequenceClassification.from_pretrained(theirs)
    rows = [torch.tensor([ids(theirs, s.prompt + s.completion)]) for s in INPUTS]  # type: ignore[operator]
    expected = [float(network(input_ids=row).logits[0, 0]) for row in rows]
    assert torch.tensor(expected).std() > 0.1
    assert values(theirs) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_a_score_does_not_depend_on_the_batch(kind: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(kind)
    alone = values(directory, batch_size=1)
    assert values(directory, batch_size=8) == pytest.approx(alone, abs=1e-5)
    backwards = values(directory, INPUTS[::-1], batch_size=3)
    assert backwards[::-1] == pytest.approx(alone, abs=1e-5)


def test_a_model_without_a_pad_token_scores_one_text_at_a_time(theirs: Path, tmp_path: Path) -> None:
    copy = edited(theirs, tmp_path, pad_token_id=None)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(copy).pad_token_id is None
    assert values(copy, batch_size=4) == pytest.approx(values(theirs), abs=1e-5)


def test_chats_go_through_the_template(ours: Path, theirs: Path) -> None:
    chat = RewardInput([{"role": "user", "content": "2+2"}], "four")
    assert values(ours, [chat]) == pytest.approx(values(ours, [RewardInput("u: 2+2 a: ", "four")]), abs=1e-5)
    network = LlamaForSequenceClassification.from_pretrained(theirs)
    rendered = torch.tensor([ids(theirs, "u: 2+2 a: four ")[:-1]])  # the template ends the turn, with a space here
    with torch.no_grad():
        expected = float(network(input_ids=rendered).logits[0, 0])
    assert values(theirs, [chat]) == pytest.approx([expected], abs=1e-5)


def test_scale_shift_and_statistics(ours: Path) -> None:
    raw = values(ours)
    assert values(ours, scale=-2.0, shift=3) == pytest.approx([3 - 2 * value for value in raw], abs=1e-5)
    standard = values(ours, standardize=True, scale=2.0, shift=1.0)
    assert standard == pytest.approx([1 + 2 * (value - 0.5) / 0.25 for value in raw], abs=1e-4)


def test_bfloat16_is_close(ours: Path) -> None:
    assert values(ours, dtype="bfloat16") != values(ours)
    assert values(ours, dtype="bfloat16") == pytest.approx(values(ours), abs=1.0)


# ---- what cannot be scored


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_too_long_is_an_error_and_never_cut(kind: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(kind)
    texts = [RewardInput("2+2=", "4" * length) for length in (15, 16)]  # 4 tokens before, the end token after
    exact, long = reward_model(model=str(directory), max_length=20).score(texts)
    assert exact.status is Status.OK and exact.value == pytest.approx(values(directory, texts[:1])[0], abs=1e-5)
    assert (long.status, long.value) == (Status.ERROR, None)
    assert long.info["reason"] == "21 tokens with the prompt; the reward model reads 20"
    long = reward_model(model=str(directory), max_length=20, too_long="not_applicable").score(texts)[1]
    assert long.status is Status.NOT_APPLICABLE
    context = 256 if kind == "ours" else 128
    whole = reward_model(model=str(directory)).score([RewardInput("2+2=", "4" * (context - 4))])
    assert f"reads {context}" in whole[0].info["reason"]


def test_a_bad_text_costs_itself_alone(ours: Path) -> None:
    good, bad = reward_model(model=str(ours)).score([INPUTS[0], RewardInput("2+2=", "\u2603")])
    assert good.status is Status.OK and bad.status is Status.ERROR


def test_a_model_that_breaks_is_an_error_with_its_reason(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DeepseekV3ForSequenceClassification, "forward", broken)
    scores: list[Score] = reward_model(model=str(ours)).score(INPUTS[:2])
    assert [s.status for s in scores] == [Status.ERROR] * 2 and "out of memory" in scores[0].info["reason"]


# ---- as a reward of a run


def test_in_a_mapping_with_another_name_and_a_cache(ours: Path, tmp_path: Path) -> None:
    mapping = {
        "helpful": {"kind": "reward_model", "model": str(ours), "weight": 0.5},
        "length": {"weight": 0.1, "max": 9},
    }
    for cached in (False, True):
        with build_rewards(mapping, cache=tmp_path / "cache.sqlite") as rewards:
            scores = rewards.score(INPUTS[:3])
            assert [score.parts["helpful"] for score in scores] == pytest.approx(values(ours)[:3], abs=1e-5)
            assert scores[0].info["helpful"].get("cached", False) is cached
            assert rewards.highest() == float("inf")
    with pytest.raises(ValueError, match=r"^rewards\.helpful\.batch_size is 0"):
        build_rewards({"helpful": {"kind": "reward_model", "model": str(ours), "batch_size": 0}})


@pytest.mark.parametrize("whole", [reward_module.WHOLE_BYTES, 0])
def test_the_version_is_that_of_the_files(
    whole: int, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_module, "WHOLE_BYTES", whole)
    copy = edited(ours, tmp_path)
    assert fingerprint(copy) == fingerprint(ours) == reward_model(model=str(copy)).version
    network = DeepseekV3ForSequenceClassification.from_pretrained(copy)
    with torch.no_grad():
        network.score.weight.mul_(1.001)  # the smallest change there is: a head trained on a frozen trunk
    network.save_pretrained(copy)
    assert (copy / "config.json").read_bytes() == (ours / "config.json").read_bytes()
    assert fingerprint(copy) != fingerprint(ours)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "nowhere"}, "model 'nowhere' is no model directory"),
        ({"model": 3}, "model is 3"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 1000}, "max_length is 1000, but the model's context is 256"),
        ({"too_long": "cut"}, "too_long is 'cut'; give one of error, not_applicable"),
        ({"scale": "big"}, "scale is 'big'"),
        ({"shift": float("inf")}, "shift is inf"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"device": "cuda"}, "device is 'cuda', but there is no CUDA here"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str, ours: Path) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    refused({"model": str(ours)} | options, words)


def refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_rewards({"reward_model": options})
    message = str(caught.value)
    assert message.startswith("rewards.reward_model.") and words in message and "\n" not in message, message


def test_what_is_no_reward_model(ours: Path, theirs: Path, tmp_path: Path) -> None:
    create_model(TINY, tmp_path / "policy", seed=0)
    refused({"model": str(tmp_path / "policy")}, "is a DeepseekV3ForCausalLM, which has no scalar head")
    (tmp_path / "policy" / "config.json").write_text((ours / "config.json").read_text())  # only says that it is one
    refused({"model": str(tmp_path / "policy")}, "score.weight missing from the weights")
    labels = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    refused({"model": str(edited(theirs, tmp_path, **labels))}, "tells 2 classes apart")
    refused({"model": str(theirs), "standardize": True}, "has no mean and std")
    (tmp_path / "copy" / "config.json").write_text("{}")
    refused({"model": str(tmp_path / "copy")}, "names no architecture")


def test_a_head_that_would_be_random_stops_the_run(theirs: Path, tmp_path: Path) -> None:
    copy = edited(theirs, tmp_path, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lacks the weight 'model\.layers\.2.*would be random"):
        reward_model(model=str(copy)).score(INPUTS[:1])
