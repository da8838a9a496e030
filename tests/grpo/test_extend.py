"""Context extension end to end on a model of a few thousand weights: phases, checks, result; not that it learns."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from grpo import extend
from grpo.cli import main
from grpo.config import load_config
from model import DeepseekV3Config, DeepseekV3ForCausalLM
from model.create import create_model

ROOT = Path(__file__).parents[2]
PHASE = {"max_steps": 1, "batch_size": 2, "block_size": 128}


def recipe(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    """configs/yarn.yaml with a step a stage and 10 prompts a check."""
    content = yaml.safe_load((ROOT / "configs" / "yarn.yaml").read_text())
    content["run"] = {"output_dir": str(tmp_path / "run"), "overwrite": True}
    content["pretrain"] |= PHASE
    content["extend"] = {"check_size": 10, "phases": [PHASE | {"block_size": 256}, PHASE | {"block_size": 512}]}
    return content | sections


def written(tmp_path: Path, content: dict[str, Any]) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def grpo(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `grpo ARGV`."""
    monkeypatch.setattr(sys, "argv", ["grpo", *argv])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capfd.readouterr()


def test_the_recipe_runs_its_phases_and_ends_with_two_accuracies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, recipe(tmp_path))
    code, out, err = grpo(monkeypatch, capfd, "pretrain", path)
    assert code == 0, err
    run = tmp_path / "run"
    result = json.loads((run / "needle.json").read_text())
    assert result["lengths"] == [128, 512] and list(result["checks"]) == ["before", "yarn", "after"]
    before, after = (100 * result["checks"][name]["512"]["accuracy"] for name in ("before", "after"))
    assert f"needle accuracy at 512 tokens: {before:.1f} % before, {after:.1f} % after" in out
    config = DeepseekV3Config.from_pretrained(run)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    yarn |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    for name in ("phase_0", "phase_1", "."):  # the same constants from the first step on
        config = DeepseekV3Config.from_pretrained(run / name)
        assert (config.rope_scaling, config.max_position_embeddings) == (yarn, 512)
    short = next((tmp_path / ".cache").glob("pretrain-*"))
    assert DeepseekV3Config.from_pretrained(short).rope_scaling is None
    embeddings = [
        DeepseekV3ForCausalLM.from_pretrained(directory).model.embed_tokens.weight
        for directory in (short, run / "phase_0", run / "phase_1", run)
    ]
    moved = [not bool((a == b).all()) for a, b in pairwise(embeddings)]
    assert moved == [False, True, True]  # the edit keeps the weights, each phase trains on from the one before
    page = (run / "needle.html").read_text()
    assert all(label in page for label in extend.LABELS.values())
    assert len(page) > 3_000_000 and "<script src=" not in page  # plotly is part of it
    # A trained model is extended as it is, and the short model is not trained again.
    code, out, err = grpo(monkeypatch, capfd, "pretrain", path, "--model.init=null", f"--model.path={short}")
    assert code == 0 and "short model" not in out, err
    assert json.loads((run / "needle.json").read_text())["checks"] == result["checks"]


def test_a_check_counts_exact_answers_by_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(recipe(tmp_path, extend={"check_size": 100, "phases": [PHASE]}))
    model = tmp_path / "model"
    assert isinstance(config.model.init, dict)
    create_model(config.model.init, model, 0)
    tokenizer = extend.load_tokenizer(model)

    class Oracle:
        """Knows what stands in the first half of the context, and answers wrongly beyond."""

        def generate(self, prompts: list[list[int]], params: list[Any]) -> list[list[Any]]:
            assert all((p.temperature, p.max_tokens) == (0, 1) for p in params)
            answers = []
            for ids in prompts:
                assert len(ids) == 127
                tokens = tokenizer.convert_ids_to_tokens(ids)
                place = next(i for i, token in enumerate(tokens) if token.startswith(f"<{tokens[-1]}"))
                answer = tokens[place] if place < 64 else "<A0>" if tokens[place] != "<A0>" else "<A1>"
                answers.append([SimpleNamespace(token_ids=tokenizer.convert_tokens_to_ids([answer]))])
            return answers

    monkeypatch.setattr(extend, "build_engine", lambda *_args, **_options: Oracle())
    result = extend.needle_check(config, model, 128)
    assert result["by_depth"][:5] == [1.0] * 5 and result["by_depth"][5:] == [0.0] * 5
    assert 0.4 <= result["accuracy"] <= 0.6


@pytest.mark.parametrize(
    "override, words",
    [
        ("--extend.factor=1", ("extend.factor", "greater than 1")),
        ("--extend.phases=[{block_size: 600}]", ("extend.phases.0.block_size 600", "context of 512")),
        ("--extend.phases=[]", ("extend.phases",)),
        ("--extend.phases=[{blocksize: 64}]", ("extend.phases.0.blocksize", "block_size")),
        ("--extend.phases=[{block_size: 64}]", ("data.task_options", "length 63 is too short")),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(
    override: str,
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = written(tmp_path, recipe(tmp_path))
    code, out, err = grpo(monkeypatch, capfd, "pretrain", path, override)
    assert code == 2 and "step" not in out
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), line
