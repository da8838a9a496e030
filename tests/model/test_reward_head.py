"""The scalar head: transformers' numbers and directories, scores that no neighbour changes, the policy's trunk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3ForSequenceClassification as TransformersModel

from model import DeepseekV3Config, DeepseekV3ForCausalLM, SequenceLayout
from model.reward_head import DeepseekV3ForSequenceClassification

MakeModel = Callable[..., DeepseekV3ForCausalLM]


@pytest.fixture
def scorer(make_model: MakeModel, tmp_path: Path) -> DeepseekV3ForSequenceClassification:
    """On the trunk of a policy with an MTP layer."""
    make_model(num_nextn_predict_layers=1, pad_token_id=0).save_pretrained(tmp_path / "policy")
    return DeepseekV3ForSequenceClassification.from_policy(tmp_path / "policy", seed=3)


def random_texts() -> list[tuple[list[int], list[int]]]:
    """Of 2 to 60 tokens without the pad token 0; the first three share a prompt, the last but one has none."""
    lengths = [(5, 9), (5, 4), (5, 30), (3, 4), (20, 40), (1, 1), (0, 7), (6, 2)]
    texts = [(torch.randint(1, 40, (p,)).tolist(), torch.randint(1, 40, (c,)).tolist()) for p, c in lengths]
    return [(texts[0][0] if i < 3 else prompt, completion) for i, (prompt, completion) in enumerate(texts)]


def padded(texts: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    rows = [torch.tensor([*prompt, *completion]) for prompt, completion in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@torch.no_grad()
def test_scores_and_directories_are_those_of_transformers(
    scorer: DeepseekV3ForSequenceClassification, tmp_path: Path
) -> None:
    scorer.save_pretrained(tmp_path / "ours")
    theirs, info = TransformersModel.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and theirs.config.num_labels == 1
    texts = random_texts()
    ids = padded(texts)
    expected = theirs(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, 0]
    assert expected.std() > 0.5
    torch.testing.assert_close(scorer(texts), expected, rtol=0, atol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    back = DeepseekV3ForSequenceClassification.from_pretrained(tmp_path / "theirs")
    for name, tensor in scorer.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


@torch.no_grad()
def test_a_score_depends_on_its_own_text_alone(scorer: DeepseekV3ForSequenceClassification) -> None:
    texts = random_texts()
    together = scorer(texts)
    torch.testing.assert_close(together, torch.cat([scorer([text]) for text in texts]), rtol=0, atol=1e-5)
    order = torch.randperm(len(texts))
    torch.testing.assert_close(scorer([texts[i] for i in order]), together[order], rtol=0, atol=1e-5)
    [prompt, completion] = texts[2]  # the score is the head on the last token's hidden state
    ids = torch.tensor([*prompt, *completion])
    hidden = scorer.forward_packed(ids, SequenceLayout.from_batch(1, len(ids))).hidden[-1]
    torch.testing.assert_close(together[2], hidden @ scorer.score.weight[0], rtol=0, atol=1e-5)
    assert scorer([]).shape == (0,)


@torch.no_grad()
def test_bfloat16_scores_are_not_rounded_to_bfloat16(scorer: DeepseekV3ForSequenceClassification) -> None:
    scores = scorer.to(torch.bfloat16)(random_texts())
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_a_fresh_head_on_the_policys_trunk(
    scorer: DeepseekV3ForSequenceClassification, make_config: Callable[..., DeepseekV3Config], tmp_path: Path
) -> None:
    policy = load_file(tmp_path / "policy" / "model.safetensors")
    scorer.save_pretrained(tmp_path / "scorer")
    written = load_file(tmp_path / "scorer" / "model.safetensors")
    trunk = {n for n in policy if n != "lm_head.weight" and not n.startswith("model.layers.3.")}  # 3: the MTP layer
    assert written.keys() == trunk | {"score.weight"}
    assert all(torch.equal(written[name], policy[name]) for name in trunk)
    again = DeepseekV3ForSequenceClassification.from_policy(tmp_path / "policy", seed=3)
    other = DeepseekV3ForSequenceClassification.from_policy(tmp_path / "policy", seed=4)
    assert torch.equal(again.score.weight, scorer.score.weight)
    assert not torch.equal(other.score.weight, scorer.score.weight)
    wide = DeepseekV3ForSequenceClassification.from_policy(tmp_path / "policy").score.weight
    assert float(wide.detach().std()) == pytest.approx(make_config().initializer_range, rel=0.5)


def test_neither_kind_is_taken_for_the_other(scorer: DeepseekV3ForSequenceClassification, tmp_path: Path) -> None:
    scorer.save_pretrained(tmp_path / "scorer")
    with pytest.raises(ValueError, match=r"another architecture.*needs.*DeepseekV3ForCausalLM"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path / "scorer")
    with pytest.raises(ValueError, match=r"another architecture.*needs.*DeepseekV3ForSequenceClassification"):
        DeepseekV3ForSequenceClassification.from_pretrained(tmp_path / "policy")
