"""Rows in, values out: which rows run together, in which process, and what is kept on disk."""
