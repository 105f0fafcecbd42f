"""Whether attributions name the cause: natural prompts, real models, a table per kind of absence.

    PYTHONPATH=benchmarks python -m real_causes --model NAME_OR_FOLDER [--out FILE]

`prompts` has the prompts and what decides their answers, `lists` what else may stand for words, and
texts of the same kind, `judged` what a model makes of a prompt and whether an attribution names the
cause, `measured` the attributions and what they cost, `table` shares and comparisons, `checkpoints`
small real models that the package index has.
"""
