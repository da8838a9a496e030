"""Text in, score out: rules, users' functions, and the processes that keep a hanging checker from hanging the run."""

from rewards.build import build_rewards
from rewards.compose import RewardFailure, Rewards, error_share, raise_if_failing
from rewards.export import as_trl, as_verl
from rewards.records import RewardInput, Score, Status

__all__ = [
    "RewardFailure",
    "RewardInput",
    "Rewards",
    "Score",
    "Status",
    "as_trl",
    "as_verl",
    "build_rewards",
    "error_share",
    "raise_if_failing",
]
