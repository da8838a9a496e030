"""GRPO for mixture-of-experts models of the DeepSeek-V3 family: algorithm, learner, loop, command line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.trainer import GRPOTrainer

__all__ = ["GRPOTrainer"]


def __getattr__(name: str) -> Any:  # so that `import grpo.config` does not load torch
    if name == "GRPOTrainer":
        from grpo.trainer import GRPOTrainer

        return GRPOTrainer
    raise AttributeError(f"module 'grpo' has no attribute {name!r}")
