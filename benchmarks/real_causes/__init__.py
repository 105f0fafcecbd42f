"""Do attributions name the cause? Natural prompts, real models, a table per kind of absence.

    PYTHONPATH=benchmarks python -m real_causes --model NAME_OR_FOLDER [--out FILE]

`prompts` has the prompts and what decides their answers, `judged` what a model makes of them and
whether an attribution names the cause, `checkpoints` small real models that the package index has.
"""
