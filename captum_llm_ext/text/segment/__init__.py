"""Segmenters: where the features of a text begin and end.

A segmenter maps a text to the spans of its features. White space belongs to the text after it: a
word removed together with its leading space leaves every other token unchanged, one removed with
its trailing space never does. White space at the very end belongs to the last span.

`words`, `sentences`, `lines`, `paragraphs` and `markdown_blocks` tile a text: their spans cover all
of it. `pattern`, `between`, `blocks`, `strings` and `spans` select from it: text between their
spans is fixed. Only the last two, which use what they are given, may split a grapheme cluster.
"""

from captum_llm_ext.text.segment.markdown import markdown_blocks
from captum_llm_ext.text.segment.nesting import nest, parents
from captum_llm_ext.text.segment.prose import lines, paragraphs, sentences, sentences_of, words
from captum_llm_ext.text.segment.selected import between, blocks, pattern, spans, strings
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
