"""`grpo distill` as a whole: what it writes is what was sampled, survives kills, and trains as samples of their own."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from grpo.cli import main
from grpo.cluster import Cluster, RunFailure
from grpo.config import load_config
from grpo.data import load_rows, make_prompts, sft_examples
from grpo.distill import DistillResult, distill
from grpo.learner import nll_loss
from grpo.packing import pack
from grpo.policy import AuxiliaryLosses, DeepseekV3Policy
from grpo.prepare import load_tokenizer
from grpo.records import TrainingSample
from model import DeepseekV3ForCausalLM, SequenceLayout
from model.create import create_model, encode
from rewards import RewardInput, build_rewards
from rollout import SamplingParams, build_engine

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_v3.yaml"


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `model`, which says a few digits and spaces and ends, and `sums.jsonl`, which asks for one digit."""
    torch.set_num_threads(1)
    tmp = tmp_path_factory.mktemp("distill")
    model = create_model(TINY, tmp / "model", seed=0)
    tokenizer = load_tokenizer(tmp / "model")
    with torch.no_grad():  # every position has the same large first feature, and the head reads likely tokens off it
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[encode(tokenizer, "0123456789 "), 0] = 1.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 1.6
    model.save_pretrained(tmp / "model")
    rows = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10), "id": [a, b]} for a in range(8) for b in range(8)]
    rows.append(rows[5] | {"id": "again"})  # one prompt twice
    (tmp / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp


def settings(tmp: Path, name: str, **changes: Any) -> dict[str, Any]:
    content = {
        "run": {"cluster": "inline", "output_dir": str(tmp / name)},
        "model": {"path": str(tmp / "model")},
        "data": {"path": str(tmp / "sums.jsonl"), "holdout": 0.2},
        "rollout": {"max_completion_length": 6},
        "rewards": {"exact_match": {"pattern": r"(\d)"}},  # the last digit counts
        "distill": {"num_generations": 32, "max_per_prompt": 2, "prompts_per_step": 10},
    }
    return {k: {**v, **changes.get(k, {})} if k != "rewards" else changes.get(k, v) for k, v in content.items()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp: Path) -> DistillResult:
    """A run that nothing interrupted."""
    return distill(settings(tmp, "whole"))


def test_rows_are_the_datas_own_and_score_as_accepted_again(tmp: Path, whole: DistillResult) -> None:
    """Kept rows, read back by the written sft.yaml, get the reward they have; none comes from a held-out prompt."""
    rows, samples = lines(whole.data), lines(whole.run_dir / "samples.jsonl")
    config = load_config(whole.sft)
    train, held_out = load_rows(load_config(settings(tmp, "whole")).data)
    back, none = load_rows(config.data)
    assert len(back) == len(rows) == len(whole.selection.kept) > 40 and not none
    prompts = make_prompts(back, config.data, load_tokenizer(tmp / "model"))
    with build_rewards(config.rewards) as rewards:
        scores = rewards.score([RewardInput(p.text, row["completion"], p.fields) for p, row in zip(prompts, rows)])
    assert [score.value for score in scores] == [row["reward"] for row in rows] == [1.0] * len(rows)
    own = {"completion", "reward", "parts", "length", "provenance"}
    columns = [row.columns for row in train]
    assert all({k: v for k, v in row.items() if k not in own} in columns for row in rows)
    assert not {row["prompt"] for row in rows} & {row.columns["prompt"] for row in held_out}
    assert all(row["parts"] == {"exact_match": 1.0} and row["completion"].strip() for row in rows)

    accepted = [s for s in samples if s["reward"] == 1.0 and s["finish_reason"] == "stop"]
    assert sum(r["length"] for r in rows) * len(accepted) <= sum(s["length"] for s in accepted) * len(rows)
    assert max(map([row["prompt"] for row in rows].count, {row["prompt"] for row in rows})) == 2
    assert len({(row["prompt"], row["completion"].strip()) for row in rows}) == len(rows)
    dropped = whole.selection.dropped
    assert all(dropped[reason] > 0 for reason in ("below_threshold", "truncated", "duplicate", "over_max_per_prompt"))


def test_provenance_is_enough_to_draw_a_row_again(tmp: Path, whole: DistillResult) -> None:
    made = json.loads((whole.run_dir / "provenance.json").read_text())
    weights = (tmp / "model" / "model.safetensors").read_bytes()
    assert made["policy"]["sha256"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert made["selection"]["kept"] == len(lines(whole.data)) and made["steps"] == 5
    assert made["config"]["rewards"] == {"exact_match": {"pattern": r"(\d)"}} and made["versions"]["torch"]
    tokenizer, engine = load_tokenizer(tmp / "model"), build_engine(made["policy"]["path"])
    for row in lines(whole.data)[:8]:
        origin = row["provenance"]
        assert origin["policy"] == made["policy"]["id"]
        params = SamplingParams(n=origin["sample"] + 1, max_tokens=6, seed=origin["seed"])
        completion = engine.generate([encode(tokenizer, row["prompt"])], params)[0][-1]
        assert tokenizer.decode(completion.token_ids, skip_special_tokens=True) == row["completion"]
        assert len(completion.token_ids) == row["length"]


def test_a_prompt_given_twice_is_sampled_once(whole: DistillResult) -> None:
    samples = lines(whole.run_dir / "samples.jsonl")
    prompts = [sample["prompt"] for sample in samples]
    assert set(map(prompts.count, prompts)) == {32}
    assert whole.selection.prompts == len(prompts) // 32 == 49


def test_a_killed_run_loses_one_step_and_ends_the_same(
    tmp: Path, whole: DistillResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, calls = Cluster.score, []

    def dies(self: Cluster, inputs: Any) -> Any:
        calls.append(len(inputs))
        if len(calls) == 4:
            raise RunFailure("the rewards process died")
        return score(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Cluster, "score", dies)
        with pytest.raises(RunFailure, match=r"grpo distill --resume \S*killed`$"):
            distill(settings(tmp, "killed"))
    killed = tmp / "killed"
    assert not (killed / "data.jsonl").exists()
    with (killed / "samples.jsonl").open("a") as file:  # a step that was being written when the machine went off
        file.write(json.dumps({"step": 4, "prompt_id": "x"}) + '\n{"step": 4, "prom')
    with monkeypatch.context() as patch:
        patch.setattr(Cluster, "score", lambda self, inputs: (calls.append(len(inputs)), score(self, inputs))[1])
        distill(None, resume=str(killed))
    assert calls == [320] * 5 + [288]  # three steps, the lost one, and again from there
    for name in ("samples.jsonl", "data.jsonl"):
        assert (killed / name).read_bytes() == (whole.run_dir / name).read_bytes(), name


def test_choosing_again_samples_nothing(tmp: Path, whole: DistillResult, monkeypatch: pytest.MonkeyPatch) -> None:
    distill(settings(tmp, "again"))
    monkeypatch.setattr(Cluster, "__init__", lambda *_, **__: pytest.fail("sampled"))
    result = distill(None, ["--distill.max_per_prompt=1"], resume=str(tmp / "again"))
    assert 0 < len(result.selection.kept) < len(whole.selection.kept)
    assert len(lines(result.data)) == len({row["prompt"] for row in lines(result.data)}) == len(result.selection.kept)
    assert (result.run_dir / "samples.jsonl").read_bytes() == (whole.run_dir / "samples.jsonl").read_bytes()
    assert yaml.safe_load((result.run_dir / "config.yaml").read_text())["distill"]["max_per_prompt"] == 1
    everything = distill(None, ["--distill.threshold=0", "--distill.max_per_prompt=16"], resume=str(tmp / "again"))
    assert everything.selection.dropped["below_threshold"] == 0 < everything.selection.dropped["empty"]


def test_nothing_accepted_ends_with_a_remedy(tmp: Path) -> None:
    unreachable = {"exact_match": {"pattern": "(no such text)"}}
    with pytest.raises(
        RunFailure, match=r"none of 1568 answers .* highest reward is 0\.0; choose again with `grpo dist"
    ):
        distill(settings(tmp, "hopeless", rewards=unreachable))
    assert not (tmp / "hopeless" / "data.jsonl").exists()
    assert len(distill(None, ["--distill.threshold=0"], str(tmp / "hopeless")).selection.kept) > 49


def test_the_report_says_what_was_kept(whole: DistillResult) -> None:
    page = whole.report.read_text()
    kept = f"<b>{len(whole.selection.kept)}</b><span>rows kept</span>"
    assert kept in page and "Finished: 5 steps." in page and '"title": "Accepted"' in page


def test_sft_trains_on_the_file_as_it_is(
    tmp: Path, whole: DistillResult, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["grpo", "sft", str(whole.sft), "--sft.max_steps=10", "--sft.learning_rate=1e-3"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert capfd.readouterr().out.splitlines()[-1] == f"model: {tmp / 'whole-sft'}"
    losses = [row["loss"] for row in lines(tmp / "whole-sft" / "metrics.jsonl")]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.1
    assert DeepseekV3ForCausalLM.from_pretrained(tmp / "whole-sft").config.vocab_size


# ---- packed rows


def test_packed_rows_of_the_file_do_not_see_each_other(tmp: Path, whole: DistillResult) -> None:
    """All rows in one packed row, MTP on: loss and every gradient are those of the rows one by one."""
    config, tokenizer = load_config(whole.sft), load_tokenizer(tmp / "model")
    examples = sft_examples(load_rows(config.data)[0], config.data, tokenizer)[:24]
    assert len({tuple(prompt) for prompt, _ in examples}) < 24, "two rows of one prompt"
    weight = 1.0 / sum(len(completion) for _, completion in examples)
    samples = [[TrainingSample(tuple(p), tuple(c), weight)] for p, c in examples]
    together, alone = pack(samples, 10_000), pack(samples, 1)
    assert (len(together), len(alone)) == (1, 24)
    losses, grads = [], []
    for batches in (together, alone):
        policy = DeepseekV3Policy(DeepseekV3ForCausalLM.from_pretrained(tmp / "model"), AuxiliaryLosses(0.3))
        losses.append(policy.forward_backward(batches, nll_loss)[0])
        grads.append([p.grad for p in policy.master])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, packed, single in zip(policy.names, *grads, strict=True):
        assert single is None or (packed - single).norm() <= 1e-5 * single.norm() + 1e-9, name

    batch, model = together[0], policy.model
    changed = batch.input_ids.clone()
    start, end = batch.cu_seqlens[10:12]
    changed[start:end] = (changed[start:end] + 5) % 40
    layout = SequenceLayout.from_segments(batch.cu_seqlens, batch.parent, batch.position_ids)
    with torch.no_grad():
        before, after = (model.forward_packed(ids, layout).hidden for ids in (batch.input_ids, changed))
    other = torch.ones(len(before), dtype=torch.bool)
    other[start:end] = False
    assert (before - after)[other].abs().max() < 1e-5 < 0.1 < (before - after)[~other].abs().max()


# ---- Ray


@pytest.mark.ray
@pytest.mark.slow
def test_ray_writes_the_same_file(tmp: Path, whole: DistillResult) -> None:
    content = settings(tmp, "ray", run={"cluster": "ray"}, rollout={"num_workers": 2})
    assert distill(content).data.read_bytes() == whole.data.read_bytes()


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards": {}}, ["rewards is empty"]),
        ({"distill": {"threshold": 1.5}}, ["distill.threshold 1.5", "at most 1", "lower it"]),
        ({"distill": {"threshold": float("inf")}}, ["distill.threshold", "inf"]),
        ({"distill": {"max_per_prompt": 33}}, ["distill.max_per_prompt 33", "distill.num_generations 32"]),
        ({"rollout": {"max_num_seqs": 8}}, ["distill.num_generations 32", "rollout.max_num_seqs 8"]),
        ({"run": {"output_dir": "whole"}}, ["whole", "is not empty", "--resume", "run.overwrite"]),
        ({"data": {"answer_column": "length"}}, ["column 'length'", "rename"]),
        ({"model": {"path": "run"}}, ["model.path", "without a whole checkpoint"]),
    ],
)
def test_bad_input_is_one_line_before_any_sampling(
    tmp: Path,
    whole: DistillResult,
    changes: dict[str, Any],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Cluster, "__init__", lambda *_, **__: pytest.fail("sampled"))
    content = settings(tmp, "bad", **changes)
    if "output_dir" in changes.get("run", {}):
        content["run"]["output_dir"] = str(whole.run_dir)
    if "path" in changes.get("model", {}):
        content["model"]["path"] = str(whole.run_dir)
    if "answer_column" in changes.get("data", {}):
        rows = [row | {"length": row["answer"]} for row in lines(tmp / "sums.jsonl")]
        (tmp / "lengths.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        content["data"]["path"] = str(tmp / "lengths.jsonl")
    (tmp / "bad.yaml").write_text(yaml.safe_dump(content))
    error = refused(capfd, monkeypatch, "distill", str(tmp / "bad.yaml"))
    assert all(word in error for word in words), error


def test_resume_refuses_what_would_mix_two_policies(
    tmp: Path, whole: DistillResult, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    resume, other_data = ("distill", "--resume", str(whole.run_dir)), tmp / "other.jsonl"
    other_data.write_text("".join(json.dumps(row) + "\n" for row in lines(tmp / "sums.jsonl")[3:]))
    for override, what in (
        ("--distill.num_generations=4", "distill.num_generations 4 is not the 32"),
        ("--rollout.temperature=0.5", "rollout.temperature 0.5 is not the 1.0"),
        ("--run.seed=3", "run.seed 3 is not the 0"),
        (f"--data.path={other_data}", "data.path"),
    ):
        assert what in refused(capfd, monkeypatch, *resume, override, "--distill.max_per_prompt=1")
    create_model(TINY, tmp / "other", seed=1)
    assert "model.path" in refused(capfd, monkeypatch, *resume, f"--model.path={tmp / 'other'}")
    train = tmp / "train"
    train.mkdir()
    (train / "config.yaml").write_text((whole.run_dir / "config.yaml").read_text())
    (train / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "no run of `grpo distill`" in refused(capfd, monkeypatch, "distill", "--resume", str(train))
    assert "no distill section" in refused(capfd, monkeypatch, *resume, "--distill=null")


def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> str:
    """The one error line of a command that ends with exit code 2."""
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["grpo", *argv])
    with pytest.raises(SystemExit) as stop:
        main()
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (stop.value.code, len(errors)) == (2, 1), errors
    return errors[0]
