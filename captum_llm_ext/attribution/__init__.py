"""The attribution classes, where the pillars `text`, `coalitions` and `model` meet.

The subclasses of captum's attribution classes are in `generation` (a local model), `gradient` and
`remote` (an API); `dataset` attributes many prompts. `model_access` is what all classes need of a
model, `target` determines what is explained, and `game` joins the pillars: coalitions of features
are rendered as token rows and scored, which gives values of all target tokens.
"""
