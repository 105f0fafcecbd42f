"""One forward pass over many rows: what they share is computed once, logits become values."""
