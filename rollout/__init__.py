"""Tokens in, tokens with log-probabilities and routing out."""

from rollout.engine import Engine, build_engine
from rollout.records import Completion, SamplingParams, WeightFault

__all__ = ["Completion", "Engine", "SamplingParams", "WeightFault", "build_engine"]
