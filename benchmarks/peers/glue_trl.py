"""TRL's rewards that come out of a factory, made; both sides of benchmarks/adapters.py load this file."""

from trl.rewards import get_cosine_scaled_reward, get_repetition_penalty_reward, get_soft_overlong_punishment

cosine = get_cosine_scaled_reward(max_len=300)
repetition = get_repetition_penalty_reward(ngram_size=3)
overlong = get_soft_overlong_punishment(max_completion_len=300, soft_punish_cache=150)
