"""Multi-token prediction in RL: whom its gradient reaches, what it is trained on, and what it costs at weight 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from grpo import policy as policy_module
from grpo.config import ConfigError, GRPOConfig, load_config
from grpo.learner import Learner
from grpo.packing import pack
from grpo.prepare import prepare
from grpo.records import TrainingSample
from model import SequenceLayout
from model.create import create_model

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_v3.yaml"
SHAPES = [(9, (5, 1, 12)), (4, (7,)), (1, (3, 6)), (6, (2, 4, 2, 8))]  # prompt length, completion lengths


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two MTP layers."""
    torch.set_num_threads(1)
    spec = yaml.safe_load(TINY.read_text())
    spec["config"] |= {"initializer_range": 0.1, "num_nextn_predict_layers": 2}
    directory = tmp_path_factory.mktemp("tiny")
    create_model(spec, directory, seed=0)
    return directory


def make_groups() -> list[list[TrainingSample]]:
    rng = np.random.default_rng(0)
    groups = []
    for length, completions in SHAPES:
        prompt = tuple(rng.integers(0, 50, length).tolist())
        ids = [tuple(rng.integers(0, 50, n).tolist()) for n in completions]
        groups.append(
            [TrainingSample(prompt, t, 1 / 50, float(rng.normal()), (-4.0,) * len(t), (0.0,) * len(t)) for t in ids]
        )
    return groups


def gradients(tiny: Path, batches: Any, **config: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Of a GRPO step with these settings, by parameter, before the optimiser takes them; and the step's metrics."""
    learner, seen = Learner(tiny, GRPOConfig(**config)), {}
    policy = learner.policy
    step = learner.optimizer.step

    def spy() -> None:
        seen.update({n: m.grad.clone() for n, m in zip(policy.names, policy.master) if m.grad is not None})
        step()

    learner.optimizer.step = spy  # type: ignore[method-assign]
    metrics = dict(learner.step([batches]).metrics)
    seen["weights"] = torch.cat([m.detach().flatten() for n, m in zip(policy.names, policy.master) if "mtp" not in n])
    return seen, metrics


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
def test_only_mtp_parameters_feel_it(tiny: Path, max_grad_norm: float) -> None:
    """Every other parameter has the gradient and the update it would have had without: bit for bit, clipped or not."""
    batches = pack(make_groups(), 60)
    assert len(batches) > 1
    common = {"max_grad_norm": max_grad_norm, "learning_rate": 1e-3}
    without, plain = gradients(tiny, batches, **common)
    trained, metrics = gradients(tiny, batches, **common, mtp_loss_weight=0.3)
    names = [name for name, _ in Learner(tiny, GRPOConfig()).policy.model.named_parameters()]
    for name in names:
        if name.startswith("mtp_layers."):
            assert name not in without and trained[name].any(), name
        else:
            assert torch.equal(trained[name], without[name]), name
    assert len(trained) == len(names) + 1 and torch.equal(trained["weights"], without["weights"])
    assert metrics["grad_norm"] == plain["grad_norm"] and metrics["loss"] > plain["loss"] + 0.5
    assert metrics["mtp_loss"] > 3 and "mtp_loss" not in plain and "mtp/agreement" not in plain


def test_mtp_detach_false_reaches_every_parameter(tiny: Path) -> None:
    batches, common = pack(make_groups(), 1000), {"max_grad_norm": 0.0}
    without, _ = gradients(tiny, batches, **common)
    trained, _ = gradients(tiny, batches, **common, mtp_loss_weight=0.3, mtp_detach=False)
    for name, grad in trained.items():
        assert name not in without or not torch.equal(grad, without[name]), name


def test_at_weight_0_the_head_is_untouched_and_costs_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_module, "mtp_loss", lambda *_, **__: pytest.fail("the MTP layers were computed"))
    learner = Learner(tiny, GRPOConfig(learning_rate=1e-2, weight_decay=0.1, router_policy="update"))
    before = {name: value.clone() for name, value in learner.policy.model.mtp_layers.state_dict().items()}
    learner.step([pack(make_groups(), 1000)])
    assert before and all(torch.equal(v, before[n]) for n, v in learner.policy.model.mtp_layers.state_dict().items())


def naive(tiny: Path, groups: list[list[TrainingSample]]) -> tuple[float, int, int]:
    """(summed loss, targets, agreements) sample by sample, by the plain model on whole sequences."""
    model = Learner(tiny, GRPOConfig()).policy.model
    loss, targets, agree = 0.0, 0, 0
    for sample in [sample for group in groups for sample in group]:
        ids, prompt = torch.tensor(sample.prompt_ids + sample.completion_ids), len(sample.prompt_ids)
        with torch.no_grad():
            out = model(ids[None])
            hidden, likeliest = out.hidden[0], out.logits[0].argmax(-1)
            for k, layer in enumerate(model.mtp_layers, start=1):
                n = len(ids) - k
                if n < 1:
                    continue
                layout = SequenceLayout.from_batch(1, n)
                embedding = model.model.embed_tokens(ids[k:])
                hidden, _ = layer.predict(hidden[:n], embedding, *model.model.rotary(layout.position_ids), layout)  # type: ignore[operator]
                at = torch.arange(max(prompt - k - 1, 0), n - 1)
                logits = model.lm_head(hidden[at])
                loss += F.cross_entropy(logits, ids[at + k + 1], reduction="sum").item()
                targets += len(at)
                agree += int((logits.argmax(-1) == likeliest[at + k]).sum())
    return loss, targets, agree


def test_targets_are_the_samples_own_completion_tokens(tiny: Path) -> None:
    """Packed with shared prompts, cut or not: what sample by sample gives."""
    groups = make_groups()
    loss, targets, agree = naive(tiny, groups)
    assert targets == 2 * 50 - 2 * (1 + 2)  # after the prompt of one token, depth k has no place for k of them
    gradient = None
    for batches in (
        pack(groups, 1000),
        [pack([g], 1000)[0] for g in groups],
        pack([[s] for g in groups for s in g], 1000),
    ):
        got, metrics = gradients(tiny, batches, mtp_loss_weight=0.3, max_grad_norm=0.0)
        assert metrics["mtp_loss"] == pytest.approx(loss / 2 / 50, rel=1e-5)
        assert metrics["mtp/agreement"] == agree / targets
        gradient = gradient or got
        for name in (name for name in got if name.startswith("mtp_layers.")):
            assert (got[name] - gradient[name]).norm() <= 1e-5 * gradient[name].norm(), name


def test_settings_that_the_model_cannot_honour(tmp_path: Path) -> None:
    spec = yaml.safe_load(TINY.read_text())
    base: dict[str, Any] = {"run": {"output_dir": str(tmp_path / "run")}, "rewards": {"exact_match": 1.0}}

    def error(change: dict[str, Any], setting: str) -> str:
        content = base | {"model": {"init": spec | {"config": spec["config"] | change}}}
        with pytest.raises(ConfigError) as caught:
            prepare(load_config(content, [setting]))
        return str(caught.value)

    text = error({"num_nextn_predict_layers": 0}, "--grpo.mtp_loss_weight=0.1")
    assert text.startswith("grpo.mtp_loss_weight is 0.1, but the model has no MTP layers")
    text = error({"first_k_dense_replace": 3}, "--grpo.router_policy=update")
    assert text.startswith("grpo.router_policy is update, but the model has no layer with experts")
