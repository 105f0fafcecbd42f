"""Foundations of all parts, which depend on none of them: files, digests, messages, terminal."""
