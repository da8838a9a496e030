"""Any causal language model of transformers (`model.family: auto`) as the policy; see model/auto.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from grpo.policy import LossFn, Policy, Stats, layout_of
from grpo.records import PackedBatch
from model.auto import check_head, head_weight, packed_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AutoPolicy(Policy):
    """A transformers model. Whatever its architecture has of auxiliary losses and routers stays as it is."""

    def __init__(self, model: PreTrainedModel, checkpointing: bool = False) -> None:
        """Raises ValueError for a model whose logits are more than a matrix product of its hidden states."""
        super().__init__(model.eval())  # no dropout: the engine has none either
        check_head(model)
        self.checkpointed: list[torch.nn.Module] = []
        if checkpointing:
            from transformers.modeling_layers import GradientCheckpointingLayer

            # transformers has renamed it on the way to version 6
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            self.checkpointed = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

    @property
    def head_weight(self) -> torch.Tensor:
        return head_weight(self.model)

    def _loss(
        self, batch: PackedBatch, loss_fn: LossFn, total_rows: int, total_samples: int
    ) -> tuple[torch.Tensor, Stats]:
        for layer in self.checkpointed:
            layer.training = True  # of the layer alone, which then recomputes; its parts stay without dropout
        batch = batch.to(self.device)
        return loss_fn(self._hidden(batch), self.head_weight, batch)

    def _hidden(self, batch: PackedBatch) -> torch.Tensor:
        return packed_hidden(self.model, batch.input_ids, layout_of(batch))

    @torch.no_grad()
    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """See Policy."""
        return self._hidden(batch)

    def balance(self, counts: torch.Tensor, rate: float) -> None:
        """There is no bias to move."""
