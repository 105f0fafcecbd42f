"""`ModelBaselines`: absent features drawn anew from a language model's own distribution."""
