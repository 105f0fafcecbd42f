"""The attribution classes, where the pillars meet: `text`, `coalitions`, `model`.

The subclasses of captum's attribution classes: `generation` (a model of this process), `gradient`,
`remote` (an API), and `dataset` for many prompts. `model_access` is what all of them ask of a
model, `target` what is explained, `game` the join: coalitions of features in, rendered as rows,
scored, values of every target token out.
"""
