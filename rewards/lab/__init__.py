"""The offline reward lab: how good rewards are, measured on completions that are already there."""
