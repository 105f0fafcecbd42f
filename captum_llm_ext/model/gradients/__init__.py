"""Gradients: backward passes from values of target tokens to a layer."""
