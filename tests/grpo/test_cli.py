"""The command line: bad input gives exit code 2 and one line on stderr that names key, value and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command import run

ROOT = Path(__file__).parents[2]


def config(tmp_path: Path, **sections: dict[str, Any]) -> str:
    """A small inline run on three sums, with sections changed."""
    data = tmp_path / "sums.jsonl"
    if not data.exists():
        rows = [{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(20)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content: dict[str, Any] = {
        "run": {"cluster": "inline", "output_dir": str(tmp_path / "run")},
        "model": {"init": str(ROOT / "configs" / "tiny_v3.yaml")},
        "data": {"path": str(data)},
        "rollout": {"max_completion_length": 4},
        "rewards": {"exact_match": 1.0},
        "grpo": {"max_steps": 1, "prompts_per_step": 2, "num_generations": 2},
    }
    for name, values in sections.items():
        content[name] = values if name == "rewards" else content[name] | values
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def rows_file(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refused(capfd: pytest.CaptureFixture[str], path: str, *words: str, argv: tuple[str, ...] = ()) -> None:
    code, _, err = run(capfd, "train", path, *argv)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == (2, 1), (code, err)
    assert all(word in errors[0] for word in words), errors[0]


def test_unknown_key_names_the_nearest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, config(tmp_path), "grpo.max_step", "grpo.max_steps", argv=("--grpo.max_step=3",))


def test_sizes_that_do_not_divide(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, grpo={"prompts_per_step": 5, "minibatches_per_step": 2})
    refused(capfd, path, "grpo.prompts_per_step", "5", "grpo.minibatches_per_step", "2")


def test_missing_data_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, config(tmp_path, data={"path": "nowhere.jsonl"}), "data.path", "nowhere.jsonl")


def test_row_without_the_field_names_file_and_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = rows_file(tmp_path, {"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2="})
    refused(capfd, config(tmp_path, data={"path": path}), "rows.jsonl:2", "answer")


def test_unknown_reward_names_the_nearest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, config(tmp_path, rewards={"exact_mach": 1.0}), "exact_mach", "exact_match")


def test_no_reward(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, config(tmp_path, rewards={}), "rewards is empty")


def test_prompt_longer_than_the_context(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "1+" * n + "1=", "answer": "2"} for n in (1, 2, 150)]
    path = config(tmp_path, data={"path": rows_file(tmp_path, *rows), "holdout": 0.0})
    refused(capfd, path, "rows.jsonl:3", "302 tokens", "252", "data.drop_long_prompts")
    code, out, err = run(capfd, "train", path, "--data.drop_long_prompts=true")
    assert code == 0, err
    assert (tmp_path / "run" / "report.html").is_file(), out


def test_checkpoint_of_another_architecture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 10}))
    refused(capfd, config(tmp_path, model={"path": str(tmp_path / "llama"), "init": None}), "llama", "deepseek_v3")


def test_model_directory_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, config(tmp_path, model={"path": "no/model", "init": None}), "model.path", "no/model")


def test_output_directory_in_use(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path)
    assert run(capfd, "train", path)[0] == 0
    kept = (tmp_path / "run" / "metrics.jsonl").read_text()
    refused(capfd, path, str(tmp_path / "run"), "--resume", "run.overwrite")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == kept
    assert run(capfd, "train", path, "--run.overwrite=true")[0] == 0


def test_overwrite_never_deletes_what_is_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    refused(capfd, config(tmp_path, run={"overwrite": True}), "holds no run")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


def test_resume_of_what_is_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capfd, "train", "--resume", str(tmp_path))
    assert (code, err.count("error: ")) == (2, 1)
    assert "config.yaml" in err


@pytest.mark.parametrize("body", ["raise RuntimeError('boom')", "while True: pass"])
def test_a_reward_that_fails_on_one_sample_costs_that_sample_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], body: str
) -> None:
    source = (
        f"def fn(completion, prompt, answer):\n    if answer == '4':\n        {body}\n    return len(completion) / 10\n"
    )
    (tmp_path / "mine.py").write_text(source)
    rewards = {"mine": {"weight": 1.0, "function": f"{tmp_path / 'mine.py'}:fn", "timeout": 0.5}}
    grpo = {"prompts_per_step": 16, "max_error_share": 0.2}
    path = config(tmp_path, rewards=rewards, grpo=grpo, data={"holdout": 0.0}, run={"log_samples": 1000})
    code, _, err = run(capfd, "train", path, "--data.size=20", "--data.shuffle=false")
    assert code == 0, err
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    failed = [s for s in samples if s["reward"] is None]
    assert [s["prompt"] for s in failed] == ["2+2=", "2+2="]
    assert {s["status"] for s in failed} == {"timeout" if "while" in body else "error"}
    assert len(samples) == 32 and all(s["advantage"] is None for s in failed)


def test_a_reward_that_always_fails_stops_the_run_with_exit_code_1(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text("def fn(completion, prompt):\n    raise RuntimeError('boom')\n")
    rewards = {"bad": {"weight": 1.0, "function": f"{tmp_path / 'bad.py'}:fn"}}
    code, _, err = run(capfd, "train", config(tmp_path, rewards=rewards, data={"holdout": 0.0}))
    assert (code, err.count("error: ")) == (1, 1), err
    assert "boom" in err and "--resume" in err


def test_model_init_eval_and_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "model")
    code, text, _ = run(capfd, "model", "init", str(ROOT / "configs" / "tiny_v3.yaml"), "--out", out)
    assert code == 0 and "parameters" in text
    path = config(tmp_path, model={"path": out, "init": None}, data={"holdout": 0.3})
    assert run(capfd, "train", path)[0] == 0
    saved = tmp_path / "run" / "config.yaml"  # as of a run on a cluster: nothing is sent in an evaluation
    values = yaml.safe_load(saved.read_text())
    values["run"]["cluster"], values["rollout"]["weight_transport"] = "ray", "broadcast"
    saved.write_text(yaml.safe_dump(values))
    code, text, err = run(capfd, "eval", str(tmp_path / "run"), "--n", "4", "--k", "1,4")
    assert code == 0, err
    result = json.loads(text)
    assert set(result) >= {"pass@1", "pass@4", "maj@4", "greedy_accuracy"}
    assert result["model"].endswith("step_1")
    assert run(capfd, "report", str(tmp_path / "run"))[1].strip().endswith("report.html")
    code, _, err = run(capfd, "eval", path, "--n", "2", "--k", "4")
    assert code == 2 and "--k" in err


def test_model_convert_and_info(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("fp32", "fp8", "bf16", "no")]
    assert run(capfd, "model", "init", str(ROOT / "configs" / "tiny_v3.yaml"), "--out", paths[0])[0] == 0
    code, out, err = run(capfd, "model", "convert", paths[0], "--out", paths[1], "--to", "fp8", "--ue8m0")
    assert (code, err) == (0, "") and out.strip() == f"{paths[1]}/model.safetensors: 1.074 MB of 1.074 MB"
    assert run(capfd, "model", "convert", paths[1], "--out", paths[2], "--to", "bf16")[0] == 0
    saved = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("fp32", "fp8", "bf16")]
    assert saved[1].pop("quantization_config")["scale_fmt"] == "ue8m0"
    assert saved[1] == saved[2] == saved[0] | {"dtype": "bfloat16"}
    assert (tmp_path / "bf16" / "tokenizer.json").read_bytes() == (tmp_path / "fp32" / "tokenizer.json").read_bytes()
    for argv, word in (
        ((paths[0], "--out", paths[1], "--to", "bf16"), "is not empty"),
        ((paths[0], "--out", paths[3], "--to", "bf16", "--ue8m0"), "--ue8m0"),
        ((paths[3], "--out", paths[3], "--to", "bf16"), "config.json does not exist"),
    ):
        code, _, err = run(capfd, "model", "convert", *argv)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and word in err

    counts = json.loads(run(capfd, "model", "info", paths[2], "--json")[1])
    assert counts["parameters"] + counts["mtp_parameters"] == 993_920 + 3 * 8  # and the router biases
    (tmp_path / "alone.json").write_text(json.dumps(saved[1]))
    code, out, err = run(capfd, "model", "info", str(tmp_path / "alone.json"))
    assert (code, err) == (0, "") and "693.168 k" in out and "288 B" in out and "1 MTP layer" in out
    assert run(capfd, "model", "info", paths[3])[0] == 2


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "sft",
        "pretrain",
        "distill",
        "eval",
        "report",
        "submit",
        "model init",
        "model convert",
        "model info",
        "rewards list",
    ],
)
def test_every_command_has_help_with_an_example(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, *command.split(), "--help")
    assert code == 0 and f"grpo {command}" in " ".join(out.split())
