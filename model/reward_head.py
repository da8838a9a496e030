"""A reward model: the DeepSeek-V3 trunk with a head of one number, read at the last token of a text.

A directory of it is one of transformers' DeepseekV3ForSequenceClassification, and the other way round.
"""

import dataclasses
from collections.abc import Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from model.config import SCORER_ARCHITECTURE, DeepseekV3Config
from model.layout import SequenceLayout
from model.modeling import DeepseekV3ForCausalLM, DeepseekV3Model, DeepseekV3PreTrainedModel

Text = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of a completion


class DeepseekV3ForSequenceClassification(DeepseekV3PreTrainedModel):
    """The trunk and `score`, one linear row without bias. There are no MTP layers, whatever the config says."""

    architecture = SCORER_ARCHITECTURE
    head_name = "score"

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = dataclasses.replace(config, num_nextn_predict_layers=0)
        self.model = DeepseekV3Model(self.config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.mtp_layers = nn.ModuleList()
        if not self.score.weight.is_meta:
            self.init_weights()

    def forward(self, texts: Sequence[Text]) -> Tensor:
        """(prompt ids, completion ids) of N texts -> scores # [N] float32.

        The texts lie packed in one row, so a score depends on no padding and on no other text; a prompt that
        neighbours share is computed once. AssertionError for a text without tokens.
        """
        ids: list[int] = []
        lengths: list[int] = []
        parents: list[int] = []
        ends: list[int] = []

        def segment(tokens: Sequence[int], parent: int = -1) -> None:
            ids.extend(tokens)
            lengths.append(len(tokens))
            parents.append(parent)

        for prompt, group in groupby(texts, key=lambda text: text[0]):
            completions = [completion for _, completion in group]
            shared = len(prompt) > 0 and len(completions) > 1 and all(map(len, completions))
            parent = len(lengths) if shared else -1
            if shared:
                segment(prompt)
            for completion in completions:
                segment(completion if shared else [*prompt, *completion], parent)
                ends.append(len(ids) - 1)
        if not ends:
            return torch.zeros(0)
        layout = SequenceLayout.from_segments([0, *accumulate(lengths)], parents).to(self.device)
        hidden = self.forward_packed(torch.tensor(ids, device=self.device), layout).hidden
        return head_scores(hidden[torch.tensor(ends, device=self.device)], self.score.weight)

    @classmethod
    def from_policy(cls, directory: str | Path, dtype: torch.dtype | None = None, seed: int = 0) -> Self:
        """The trunk of a causal language model under a new head, normal(0, initializer_range) drawn by `seed`.

        Raises ValueError as from_pretrained does.
        """
        policy = DeepseekV3ForCausalLM.from_pretrained(directory, dtype)
        with torch.device("meta"):
            model = cls(policy.config)
        model.model = policy.model
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(1, policy.config.hidden_size, generator=generator) * policy.config.initializer_range
        model.score.weight = nn.Parameter(drawn.to(policy.dtype))
        return model

    def _config_entries(self) -> dict[str, Any]:
        return super()._config_entries() | {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def head_scores(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden # [N, d], weight # [1, d] -> [N] float32: in bfloat16 a score would have no more than three digits."""
    return (hidden.float() @ weight.float().T)[:, 0]
