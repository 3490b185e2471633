"""Several tokens a step: a draft proposes them, the main model verifies them in one pass."""
