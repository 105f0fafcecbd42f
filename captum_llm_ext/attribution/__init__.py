"""What users call, and where the pillars meet: `text`, `coalitions`, `model`.

The subclasses of captum's attribution classes: `generation` (a model of this process), `gradient`,
`remote` (an API), and `dataset` for many prompts. `target` is what is explained, `game` the join:
coalitions of features in, rendered as rows, scored, values of every target token out.
"""
