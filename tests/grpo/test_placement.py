"""Who gets which GPUs, what is refused before any work, and engines that sleep while the learner works. On a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grpo import GRPOTrainer
from grpo import roles as roles_module
from grpo.cluster import Cluster, roles_of
from grpo.config import Config, ConfigError, load_config
from grpo.learner import Learner
from grpo.placement import assign_gpus, check_learner_fits, compute_device, gpus_wanted
from grpo.records import PackedBatch, StepStats
from model import DeepseekV3Config
from model.create import create_model
from rollout.engine import Sleeping
from rollout.vllm_engine import VllmEngine

ROOT = Path(__file__).resolve().parents[2]
V3: dict[str, Any] = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "n_routed_experts": 256,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
}  # fmt: skip


def config(**sections: Any) -> Config:
    return load_config(sections)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_and_its_batches_come_out(path: Path) -> None:
    if path.stem == "tiny_v3":
        pytest.skip("a model, not a run")
    made = load_config(path)
    grpo, rollout = made.grpo, made.rollout
    samples = grpo.prompts_per_step * grpo.num_generations
    assert samples % grpo.minibatches_per_step == 0
    assert grpo.num_generations <= rollout.max_num_seqs
    assert grpo.prompts_per_step >= rollout.num_workers  # no engine without a group
    length = rollout.engine_options.get("max_model_len")
    if length and made.data.max_prompt_length:
        assert made.data.max_prompt_length + rollout.max_completion_length <= length
    if made.data.max_prompt_length:  # a sample fits into a micro-batch
        assert made.data.max_prompt_length + rollout.max_completion_length <= grpo.max_tokens_per_microbatch


def test_the_large_recipes_ask_for_the_gpus_that_they_name() -> None:
    moonlight, v3 = (load_config(ROOT / "configs" / f"{name}.yaml") for name in ("moonlight_16b", "v3_671b"))
    assert sum(assign_gpus(moonlight, roles_of(moonlight), [8]).values()) == 8
    assert assign_gpus(v3, roles_of(v3), [8, 8, 8]) == {"learner": 1, "rollout-0": 8, "rollout-1": 8, "rewards": 0}
    with pytest.raises(ConfigError, match=r"asks for 17 GPUs \(learner 1, 2 rollout workers of 8\).* 16 \(8 \+ 8\)"):
        assign_gpus(v3, roles_of(v3), [8, 8])
    with pytest.raises(ConfigError, match=r"there are 20 \(4 \+ 4 \+ 4 \+ 4 \+ 4\)"):  # an actor lives on one machine
        assign_gpus(v3, roles_of(v3), [4] * 5)


def test_without_gpus_nobody_asks_for_any() -> None:
    plain = config(rollout={"num_workers": 3})
    assert set(assign_gpus(plain, roles_of(plain), [0, 0]).values()) == {0}
    with pytest.raises(ConfigError, match=r"model.device is 'cuda', but there is no GPU"):
        assign_gpus(config(model={"device": "cuda"}), ["learner"], [0])
    asleep = config(rollout={"engine": "vllm", "sleep_level": 1})
    with pytest.raises(ConfigError, match=r"rollout.sleep_level 1 gives back memory of a GPU, and there is none"):
        assign_gpus(asleep, roles_of(asleep), [0])


def test_roles_ask_for_what_they_compute_on() -> None:
    vllm = {"engine": "vllm", "engine_options": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}}
    assert gpus_wanted("rollout-1", config(rollout=vllm)) == 8
    assert gpus_wanted("rollout-1", config(rollout=vllm | {"gpus_per_worker": 0.5})) == 0.5
    assert gpus_wanted("rollout-0", config(rollout=vllm, model={"device": "cpu"})) == 8  # vLLM's own affair
    assert gpus_wanted("rollout-0", config(model={"device": "cpu"})) == gpus_wanted("rewards", config()) == 0
    shared = config(run={"learner_gpus": 0.4}, rollout={"gpus_per_worker": 0.3, "num_workers": 2})
    assert sum(assign_gpus(shared, roles_of(shared), [1]).values()) == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="asks for 3 GPUs"):
        assign_gpus(config(rollout={"num_workers": 2}), ["learner", "rollout-0", "rollout-1"], [2])


@pytest.mark.parametrize("run", [{"cluster": "inline"}, {"placement": "colocated"}])
def test_roles_of_one_process_share(run: dict[str, str]) -> None:
    together = config(run=run, rollout={"engine": "vllm", "engine_options": {"tensor_parallel_size": 2}})
    assert set(assign_gpus(together, roles_of(together), [2]).values()) == {2}
    with pytest.raises(ConfigError, match="asks for 2 GPUs"):
        assign_gpus(together, roles_of(together), [1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_device_of_a_machine_without_gpus(tmp_path: Path) -> None:
    assert compute_device("auto") == compute_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="torch sees no GPU here"):
        compute_device("cuda")
    run = {"cluster": "inline", "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=r"model\.fp8 is 'on'.*set it to emulate"):
        GRPOTrainer({"run": run, "model": {"fp8": "on", "init": str(ROOT / "configs" / "tiny_v3.yaml")}}).train()
    assert not list(tmp_path.iterdir())  # before anything was made


def test_a_model_too_large_for_the_learner_is_refused() -> None:
    v3 = load_config(ROOT / "configs" / "v3_671b.yaml")
    with pytest.raises(ConfigError, match=r"needs 1,2[67]\d GiB for 68\d\.\dB parameters at 2 bytes.* not sharded"):
        check_learner_fits(v3, DeepseekV3Config(**V3))
    full = config(run={"cluster": "auto"}, model={"dtype": "bfloat16", "device": "cuda"})
    smaller: dict[str, Any] = V3 | {"hidden_size": 2048, "num_hidden_layers": 27, "n_routed_experts": 64}
    sixteen = DeepseekV3Config(**smaller)
    with pytest.raises(ConfigError, match=r"at 18 bytes.*or model.lora"):
        check_learner_fits(full, sixteen)
    check_learner_fits(config(run={"cluster": "auto"}, model={"dtype": "bfloat16", "lora": {}}), sixteen)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    create_model(ROOT / "configs" / "tiny_v3.yaml", directory, seed=0)
    return directory


class FakeEngine:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.policy_version = 0

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: Any) -> None:
        self.calls.append(("wake_up", *tags))

    def load_weights(self, weights: Any, version: int, base: int | None = None) -> None:
        self.calls.append(("load_weights", len(list(weights)), version, base))
        self.policy_version = version


@pytest.fixture
def sleeper(
    monkeypatch: pytest.MonkeyPatch, tiny_dir: Path, request: pytest.FixtureRequest
) -> tuple[Cluster, FakeEngine]:
    """A cluster in this process whose engine is a fake and whose learner learns nothing."""
    engine = FakeEngine()
    assert isinstance(engine, Sleeping)
    monkeypatch.setattr(roles_module, "build_engine", lambda *_, **__: engine)
    monkeypatch.setattr("grpo.backend.assign_gpus", lambda *_: {})  # as if there were a GPU
    monkeypatch.setattr(Learner, "step", lambda self, *_: StepStats(1, {"loss": 0.5}))
    made = config(
        run={"cluster": "inline"},
        rewards={"exact_match": 1.0},
        rollout={"engine": "vllm", "sleep_level": request.param, "weight_check": "off"},
    )
    return Cluster(made, tiny_dir, tiny_dir), engine


@pytest.mark.parametrize("sleeper", [1, 2], indirect=True)
def test_engines_sleep_while_the_learner_works(sleeper: tuple[Cluster, FakeEngine], request: Any) -> None:
    cluster, engine = sleeper
    level = request.node.callspec.params["sleeper"]
    with cluster:
        cluster.sync_weights(0)
        assert [call[0] for call in engine.calls] == ["load_weights"]  # it was awake
        for _ in range(2):
            stats = cluster.learn([])
            assert set(stats.metrics) == {"loss", "memory/rollout_gib", "memory/released_gib"}
            assert stats.metrics["memory/released_gib"] == 0 or torch.cuda.is_available()
        cluster.sync_weights(0)
    names = [call[0] for call in engine.calls[1:]]
    assert names == ["sleep", "wake_up", "load_weights", "wake_up"]  # it sleeps once, however often it is asked
    assert engine.calls[1:3] == [("sleep", level), ("wake_up", "weights")]
    assert engine.calls[4] == ("wake_up", "kv_cache")
    whole = engine.calls[0][1]
    # nothing changed: dropped weights come back whole, others stay
    assert engine.calls[3] == ("load_weights", *((0, 0, 0) if level == 1 else (whole, 0, None)))


def test_only_vllm_sleeps() -> None:
    with pytest.raises(ConfigError, match=r"rollout.sleep_level 2 needs rollout.engine vllm, not embedded"):
        config(rollout={"sleep_level": 2})


def test_dropped_weights_are_not_sampled_with() -> None:
    engine: Any = VllmEngine.__new__(VllmEngine)
    engine.open, engine.whole, engine.llm = {}, True, FakeEngine()
    engine.sleep(1)
    assert engine.whole
    engine.sleep(2)
    assert not engine.whole
    with pytest.raises(ValueError, match="load a whole version first"):
        engine.load_weights([], 2, base=1)


def test_a_batch_moves_but_for_its_cuts() -> None:
    row, real = torch.arange(3), torch.zeros(3)
    cuts = torch.tensor([0, 3]), torch.tensor([-1])
    batch = PackedBatch(row, row, *cuts, row, row, row, real, real, real, real)
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert {t.device.type for t in (moved.input_ids, moved.target, moved.weights)} == {"meta"}
    assert moved.cu_seqlens is batch.cu_seqlens and moved.parent is batch.parent and moved.old_logprobs is None


def test_a_transport_that_the_placement_rules_out() -> None:
    vllm = {"engine": "vllm"}
    apart = config(rollout=vllm | {"weight_transport": "ipc"})
    with pytest.raises(ConfigError, match=r"ipc is for a learner and engines on one GPU, but they ask for 1 and 1"):
        assign_gpus(apart, roles_of(apart), [2])
    shares = config(run={"learner_gpus": 0.5}, rollout=vllm | {"gpus_per_worker": 0.5, "weight_transport": "broadcast"})
    with pytest.raises(ConfigError, match=r"broadcast goes by NCCL from GPU to GPU.*take ipc"):
        assign_gpus(shares, roles_of(shares), [1])
    for fine in (
        config(run={"learner_gpus": 0.5}, rollout=vllm | {"gpus_per_worker": 0.5, "weight_transport": "ipc"}),
        config(rollout=vllm | {"weight_transport": "broadcast"}),
    ):
        assert assign_gpus(fine, roles_of(fine), [2])
