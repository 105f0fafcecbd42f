"""Scoring: which rows run together, on which process, and what is saved to disk."""
