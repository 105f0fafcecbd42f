"""Colours and sizes that all plots share."""

UP, DOWN = "#2166ac", "#b2182b"  # the two ends of RdBu, distinguishable by colour-blind readers
SIZE, SIZES = "#54278f", "Purples"  # for unsigned values
UNKNOWN = "#e4e4e4"
DARK = "#222222"
MUTED = "#6b6b6b"
FAINT = "#8c8c8c"

LABEL_POINTS = 8.0
SIGN_FROM = 0.1  # share of the scale below which a colour is too pale to need a sign
PALE = 0.35  # opacity of values that are not significant
SURE = 1.96  # standard errors at which a single value is significant
# Distinguishable by colour-blind readers (Okabe and Ito 2008) and, by markers, without colour.
LINES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#a6599b", "D"),
    ("#8a6d00", "v"),
    ("#3a3a3a", "P"),
    ("#56788f", "X"),
)
