"""Backward passes: values of every target token back to a layer."""
