"""The pillar of text: it knows tokenizers, never a model.

`segment` cuts a text into features, `baselines` say what stands where one is absent, `inputs`
render a coalition as token ids. `tokens` and `encoding` tell how ids and characters line up.
"""
