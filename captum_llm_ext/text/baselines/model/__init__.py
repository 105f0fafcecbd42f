"""`ModelBaselines`: absent features drawn from a language model's conditional distribution."""
