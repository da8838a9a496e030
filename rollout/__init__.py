"""Tokens in, tokens with log-probabilities and routing out."""

from rollout.engine import Engine, build_engine
from rollout.records import Completion, SamplingParams

__all__ = ["Completion", "Engine", "SamplingParams", "build_engine"]
