"""A tiny model for engine tests, with random norms and router biases, so that a mistake in either shows."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model import DeepseekV3Config, DeepseekV3ForCausalLM
from rollout.vllm_engine import VllmEngine

TINY = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 12,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "initializer_range": 0.2, "max_position_embeddings": 256,
    "eos_token_id": 2,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip

VLLM_TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.12,  # large, so that any wrong weight shows
    "eos_token_id": 1,
}


@pytest.fixture(autouse=True, scope="session")
def kept_engines() -> Iterator[None]:
    """vLLM's process groups are the process's: an engine that is dropped would take those of the others along."""
    kept, build = [], VllmEngine.__init__

    def building(self: VllmEngine, *args: Any, **options: Any) -> None:
        kept.append(self)
        build(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VllmEngine, "__init__", building)
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def make_model() -> Callable[..., DeepseekV3ForCausalLM]:
    def make(seed: int = 1, dtype: torch.dtype = torch.float32, **changes: object) -> DeepseekV3ForCausalLM:
        torch.manual_seed(seed)
        model = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(TINY | changes))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if "norm" in name:
                    tensor.uniform_(0.5, 1.5)
                if "e_score_correction_bias" in name:
                    tensor.uniform_(-1.5, 0.2)
        return model.to(dtype)

    return make


@pytest.fixture
def prompts() -> Callable[..., list[list[int]]]:
    """Prompts of the given lengths, with tokens 3 .. 39."""

    def make(lengths: list[int], seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths]

    return make


@pytest.fixture(scope="session")
def vllm_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a model of sizes that vLLM's kernels take on a CPU, with random router biases."""

    def make(seed: int = 0, **changes: object) -> Path:
        torch.manual_seed(seed)
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**VLLM_TINY | changes))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith("e_score_correction_bias"):
                    tensor.normal_(0.0, 0.1)
        path = tmp_path_factory.mktemp("vllm") / "model"
        model.save_pretrained(path)
        return path

    return make
