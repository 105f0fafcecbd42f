"""The text pillar: it uses tokenizers, never a model.

`segment` splits a text into features, `baselines` replace absent ones, `inputs` render coalitions
as token ids. `tokens` and `encoding` align ids with characters.
"""
