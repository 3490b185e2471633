"""An inference engine for Mixture-of-Experts language models whose core knows no hardware."""
