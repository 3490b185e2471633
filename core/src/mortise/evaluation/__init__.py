"""How well a model predicts a text, measured beside baselines that merely count."""
