"""Where the features of a text begin and end.

A segmenter maps a text to the spans of its features. White space always belongs to what follows
it: a word that is removed together with its leading space leaves every other token as it was,
one removed with its trailing space never does. White space at the very end has nothing after it
and stays with the last span.

`words`, `sentences`, `lines`, `paragraphs` and `markdown_blocks` cut a text: their spans hold all
of it. `pattern`, `between`, `blocks`, `strings` and `spans` choose from it: what lies between
their spans is fixed text. None but the last two, which take what they are given, cuts through what
a reader sees as one character.
"""

from captum_llm_ext.text.segment.chosen import between, blocks, pattern, spans, strings
from captum_llm_ext.text.segment.markdown import markdown_blocks
from captum_llm_ext.text.segment.nesting import nest, parents
from captum_llm_ext.text.segment.prose import lines, paragraphs, sentences, sentences_of, words
from captum_llm_ext.text.segment.span import Segmenter, Span, shorten
from captum_llm_ext.text.segment.unit import (
    NAMED_UNITS,
    Unit,
    has_explicit_spans,
    segment,
    segmenter,
    unit_name,
)

__all__ = [
    "NAMED_UNITS",
    "Segmenter",
    "Span",
    "Unit",
    "between",
    "blocks",
    "has_explicit_spans",
    "lines",
    "markdown_blocks",
    "nest",
    "paragraphs",
    "parents",
    "pattern",
    "segment",
    "segmenter",
    "sentences",
    "sentences_of",
    "shorten",
    "spans",
    "strings",
    "unit_name",
    "words",
]
