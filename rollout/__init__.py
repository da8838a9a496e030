"""Tokens in, tokens with log-probabilities and routing out."""

from rollout.engine import Engine, build_engine
from rollout.records import Completion, Rerouted, SamplingParams, WeightFault

__all__ = ["Completion", "Engine", "Rerouted", "SamplingParams", "WeightFault", "build_engine"]
