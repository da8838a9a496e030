"""The policy as the learner sees it: packed rows in, log-probabilities and gradients out.

The learner knows this interface, not the architecture. Auxiliary losses that belong to the architecture (multi-token
prediction, balance) are added here, with normalisers of the whole update, so gradients do not depend on the cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from grpo.records import PackedBatch
from grpo.router import trained_tokens
from model import SequenceLayout
from model.fp8.modules import adding_to_gradients
from model.kernels import usable
from model.layout import moved
from model.lora import LoraAdapter
from model.modeling import DeepseekV3PreTrainedModel
from model.moe import TopkRouter, balanced_bias, expert_counts, sequence_balance_loss
from model.mtp import mtp_loss

Stats = dict[str, torch.Tensor]
# (hidden [T, d], head_weight [V, d], rows) -> (loss, statistics)
LossFn = Callable[[torch.Tensor, torch.Tensor, PackedBatch], tuple[torch.Tensor, Stats]]


@dataclass(frozen=True, slots=True)
class AuxiliaryLosses:
    """Weights of the losses that the architecture brings; 0: not computed."""

    mtp_loss_weight: float = 0.0
    mtp_detach: bool = False  # the MTP loss trains MTP parameters only
    router_aux_loss_coef: float = 0.0


def layout_of(batch: PackedBatch, few_shapes: bool = False) -> SequenceLayout:
    """On the batch's device. few_shapes: see SequenceLayout.from_segments; on a GPU only."""
    device = batch.input_ids.device
    few = few_shapes and device.type == "cuda"
    return SequenceLayout.from_segments(batch.cu_seqlens, batch.parent, batch.position_ids, few_shapes=few).to(device)


class Policy(ABC):
    """A model in one process. Gradients accumulate in FP32 in `master`, whatever dtype the model computes in."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        # an FP32 parameter is its own master copy: all of an FP32 model, and what computes in FP8 (to_fp8)
        self.master = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.parameters]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    @abstractmethod
    def head_weight(self) -> torch.Tensor:
        """[V, d]"""

    @abstractmethod
    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """[T, d] before the head, without gradient. The batch is on the policy's device."""

    @abstractmethod
    def _loss(
        self, batch: PackedBatch, loss_fn: LossFn, total_rows: int, total_samples: int
    ) -> tuple[torch.Tensor, Stats]:
        """Loss and statistics of a micro-batch, auxiliary losses included, by the normalisers of the whole update.

        The batch is anywhere.
        """

    @abstractmethod
    def balance(self, counts: torch.Tensor, rate: float) -> None:
        """Moves the biases of routers, where the architecture has them."""

    def forward_backward(self, microbatches: Sequence[PackedBatch], loss_fn: LossFn) -> tuple[float, list[Stats]]:
        """Adds the gradient of the sum of the micro-batches' losses to `master`; returns that sum and statistics."""
        total_rows = sum(len(b.target) for b in microbatches)
        total_samples = sum(b.num_samples for b in microbatches)
        losses, stats = [], []
        with self._collecting(), adding_to_gradients(self.model):
            for batch in microbatches:
                loss, stat = self._loss(batch, loss_fn, total_rows, total_samples)
                if loss.requires_grad:
                    loss.backward()
                losses.append(loss.detach())
                stats.append(stat)
        return sum((float(loss) for loss in losses), 0.0), stats  # on a GPU this is what waits for it

    @contextmanager
    def _collecting(self) -> Iterator[None]:
        """While it lasts a gradient goes to its master as soon as it is there, so that those in BF16 do not pile up.

        What finds the master at the parameter may add to its gradient itself (model/kernels/__init__.py).
        """
        copies: list[tuple[Any, torch.Tensor]] = [
            (p, master) for p, master in zip(self.parameters, self.master) if p is not master
        ]
        hooks = [p.register_post_accumulate_grad_hook(partial(_collect, master)) for p, master in copies]
        for parameter, master in copies:
            parameter.master = master
        try:
            yield
        finally:
            for hook, (parameter, _) in zip(hooks, copies):
                hook.remove()
                del parameter.master

    def gradient_norms(self) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        """Masters, and the norm of their gradients by which they are clipped; the policy's first."""
        return [(self.master, _norm(self.master))]

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the master weights into the model that computes, where it has a copy."""
        for parameter, master in zip(self.parameters, self.master):
            if parameter is not master:
                parameter.copy_(master)


def _norm(master: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([m.grad for m in master if m.grad is not None], foreach=True)


def _collect(master: torch.Tensor, parameter: torch.Tensor) -> None:
    """Moves the gradient of a parameter to its FP32 master."""
    grad, parameter.grad = parameter.grad, None
    if grad is None:  # it was added where it was computed
        return
    if usable(grad):
        from model.kernels.gradients import added

        master.grad = added(master.grad, grad)
    else:
        master.grad = grad.float() if master.grad is None else master.grad.add_(grad)


class DeepseekV3Policy(Policy):
    """DeepSeek-V3, with multi-token prediction and balanced routers.

    To the statistics of loss_fn are added `sum/expert_counts` [layers with experts, E] of the tokens trained on (MTP
    layers last, where they are trained), sums over the depths of MTP, and where routes are replayed the number of
    tokens trained on, and of those that would have gone to other experts in some layer.
    """

    def __init__(
        self, model: DeepseekV3PreTrainedModel, auxiliary: AuxiliaryLosses | None = None, checkpointing: bool = False
    ) -> None:
        super().__init__(model.train())
        self.model.model.gradient_checkpointing = checkpointing
        self.auxiliary = auxiliary or AuxiliaryLosses()

    @property
    def head_weight(self) -> torch.Tensor:
        return self.model.head.weight

    def _loss(
        self, batch: PackedBatch, loss_fn: LossFn, total_rows: int, total_samples: int
    ) -> tuple[torch.Tensor, Stats]:
        model, aux = self.model, self.auxiliary
        (trained,) = moved([trained_tokens(batch)], self.device)
        batch = batch.to(self.device)
        layout = layout_of(batch, few_shapes=True)
        out = model.forward_packed(
            batch.input_ids,
            layout,
            batch.routed_experts,
            output_routing=True,
            output_router_scores=aux.router_aux_loss_coef > 0,
        )
        loss, stats = loss_fn(out.hidden, model.head.weight, batch)
        assert out.routed_experts is not None
        counts = expert_counts(out.routed_experts, model.config.n_routed_experts, trained)
        if aux.mtp_loss_weight > 0 and len(model.mtp_layers):
            mtp = mtp_loss(
                model, out.hidden, batch.input_ids, layout, batch.source, batch.target, detach=aux.mtp_detach
            )
            stats["sum/mtp_loss"] = mtp.loss_sum.detach().mean()
            stats["sum/mtp_agree"], stats["sum/mtp_targets"] = mtp.agree.sum(), mtp.count.sum()
            counts = torch.cat((counts, mtp.expert_counts))
            loss = loss + aux.mtp_loss_weight * mtp.loss_sum.mean() / total_rows  # equations 24, 25
        if out.router_scores:
            # a sequence is a whole sample, its prompt included, however prompts are shared and groups cut
            index, whole = layout.repeat_parents()
            for scores in out.router_scores:
                balance = sequence_balance_loss(
                    scores.index_select(0, index),
                    whole.segment_ids,
                    batch.num_samples,
                    model.config.num_experts_per_tok,
                )
                loss = loss + aux.router_aux_loss_coef * balance * batch.num_samples / total_samples
        stats["sum/expert_counts"] = counts
        if out.routes_differ is not None:
            stats["sum/routes_differ"] = (out.routes_differ.any(1) & trained).sum()
            stats["sum/routed"] = trained.sum()
        return loss, stats

    @torch.no_grad()
    def balance(self, counts: torch.Tensor, rate: float) -> None:
        """Auxiliary-loss-free balancing (DeepSeek-V3, section 2.1.2): moves the routers' biases by +-rate.

        counts: [layers with experts, up to E], tokens per expert over a whole update (or rollout); experts beyond got
        none. MTP layers come last and may be left out. The biases are FP32 whatever dtype the model has.
        """
        routers = [m for m in self.model.modules() if isinstance(m, TopkRouter)]
        for router, count in zip(routers, counts.to(self.model.device)):
            bias = router.e_score_correction_bias
            bias.copy_(balanced_bias(bias, F.pad(count, (0, len(bias) - len(count))), rate))

    def gradient_norms(self) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        """Two where MTP is trained apart: in one common norm its gradient would scale the policy's."""
        apart = self.auxiliary.mtp_loss_weight > 0 and self.auxiliary.mtp_detach
        parts: dict[bool, list[torch.Tensor]] = {}
        for name, master in zip(self.names, self.master):
            parts.setdefault(apart and name.startswith("mtp_layers."), []).append(master)
        return [(part, _norm(part)) for _, part in sorted(parts.items())]

    @torch.no_grad()
    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """[T, d] without gradient."""
        layout = layout_of(batch, few_shapes=True)
        return self.model.forward_packed(batch.input_ids, layout, batch.routed_experts).hidden


class AdapterOff:
    """A policy that trains an adapter, without it: the reference policy, at no cost in memory."""

    def __init__(self, policy: Policy, adapter: LoraAdapter) -> None:
        self.policy, self.adapter, self.model = policy, adapter, policy.model

    @property
    def head_weight(self) -> torch.Tensor:
        return self.policy.head_weight

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """[T, d] without gradient."""
        with self.adapter.off():
            return self.policy.hidden(batch)
