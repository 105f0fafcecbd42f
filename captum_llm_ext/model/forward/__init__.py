"""Forward passes over many rows: shared parts are computed once, logits become values."""
