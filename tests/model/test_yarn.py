"""Context extension: the edited config is what transformers reads, weights stay, and only lengths that grow pass."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers import DeepseekV3ForCausalLM as TransformersModel

from model import DeepseekV3Config, DeepseekV3ForCausalLM
from model.yarn import copy_with_config, extend_context

MakeModel = Callable[..., DeepseekV3ForCausalLM]
MakeConfig = Callable[..., DeepseekV3Config]
SHORT = {"rope_scaling": None, "max_position_embeddings": 64}


def test_the_released_model_is_an_extension_by_40(make_config: MakeConfig) -> None:
    long = extend_context(make_config(rope_scaling=None, max_position_embeddings=4096), 40)
    assert long.max_position_embeddings == 163840
    assert long.rope_scaling == {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    assert long.softmax_scale * long.qk_head_dim**0.5 == pytest.approx(1.8738542, abs=1e-7)  # (0.1 ln 40 + 1)^2


def test_transformers_reads_the_extended_directory(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(**SHORT)
    model.save_pretrained(tmp_path / "short")
    path = tmp_path / "short" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_another_tool": 7}))
    copy_with_config(tmp_path / "short", tmp_path / "long", extend_context(model.config, 4))
    assert DeepseekV3Config.from_pretrained(tmp_path / "short") == model.config  # the source is as it was
    assert all(
        (tmp_path / "long" / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "short").glob("*.safetensors")
    )
    assert json.loads((tmp_path / "long" / "config.json").read_text())["of_another_tool"] == 7
    read = AutoConfig.from_pretrained(tmp_path / "long")
    assert read.max_position_embeddings == 256
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32}
    assert expected.items() <= read.rope_parameters.items()
    theirs = TransformersModel.from_pretrained(tmp_path / "long", attn_implementation="eager").eval()
    ids = torch.randint(0, 40, (1, 256))
    with torch.no_grad():
        ours = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "long")(ids).logits
        other = theirs(ids).logits
        plain = model(ids).logits
    assert (ours - other).abs().max() <= 1e-5 * other.abs().max()
    assert (plain - other).abs().max() > 1e-2 * other.abs().max()  # the edit is no formality


def test_factor_1_is_plain_rope(make_model: MakeModel) -> None:
    yarn = {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
    ids = torch.randint(0, 40, (1, 100))
    with torch.no_grad():
        plain, one = (make_model(**SHORT | {"rope_scaling": s})(ids).logits for s in (None, yarn))
    torch.testing.assert_close(one, plain, rtol=0, atol=1e-6 * float(plain.abs().max()))


def test_what_is_no_extension_is_refused(make_config: MakeConfig) -> None:
    def refused(match: str, *args: float, **changes: object) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            extend_context(make_config(**changes), *args)  # pyright: ignore[reportArgumentType]
        assert "\n" not in str(caught.value)

    for factor in (1, 0.5, float("nan"), float("inf")):
        refused(f"factor is {factor}: a context grows by a factor above 1", factor, **SHORT)
    refused("original length is 256, but the model has YaRN over 64 already: give 64", 4, 256)  # the fixture has YaRN
    refused("factor is 4: 64 times that is 256, no longer than the context it has, 256; raise it", 4)
    assert extend_context(make_config(), 8).max_position_embeddings == 512  # of the same original: from 4 to 8 times
