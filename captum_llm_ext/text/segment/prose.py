"""Words, sentences, lines and paragraphs of running text."""

import importlib

from captum_llm_ext.text.segment.named import Named
from captum_llm_ext.text.segment.rules import LINE_BREAK, PARAGRAPH_END, WORD, sentence_ends
from captum_llm_ext.text.segment.span import Segmenter, Span, tiles


def words(text: str) -> list[Span]:
    """Words with the punctuation attached to them.

    White space separates them, also in Korean. In scripts without spaces, "words" are shorter: one
    ideograph or kana each (small kana, and marks of length and repetition, stay with the previous
    one); in Thai, Lao, Khmer and Burmese one consonant with its vowels and marks, since true words
    need a dictionary: use a callable that has one. Grapheme clusters are never split.

    Example:
        >>> text = "Baikal is 1,642 m deep. 東京は。"
        >>> [text[start:stop] for start, stop in words(text)]
        ['Baikal', ' is', ' 1,642', ' m', ' deep.', ' 東', '京', 'は。']
    """
    return tiles(text, (match.start() for match in WORD.finditer(text)))


def sentences(text: str) -> list[Span]:
    """Sentences by rule: abbreviations, initials and decimals do not end one.

    An empty line and the beginning of a list item always do. The rules are for languages that end
    sentences with ``. ! ? …`` or with a mark that has no other use (``。 । ؟ ።`` …); Thai and Lao
    have neither. Abbreviations are English: for other languages see `sentences_of`.

    Example:
        >>> text = "It is 1,642 m deep. Mr. Lee swam in it!"
        >>> [text[start:stop] for start, stop in sentences(text)]
        ['It is 1,642 m deep.', ' Mr. Lee swam in it!']
    """
    return tiles(text, sentence_ends(text))


def lines(text: str) -> list[Span]:
    """Lines that contain more than white space; the break belongs to the line after it."""
    return tiles(text, (match.end() for match in LINE_BREAK.finditer(text)))


def paragraphs(text: str) -> list[Span]:
    """Paragraphs, separated by empty lines (or Unicode's paragraph separator)."""
    return tiles(text, (match.end() for match in PARAGRAPH_END.finditer(text)))


def sentences_of(language: str) -> Segmenter:
    """Sentences by the rules and abbreviations of a language, using the package `sentencex`.

    Args:
        language: ISO 639-1 code such as ``"de"``; `sentencex` supports about 300 and treats unknown
            ones by the rules of a related language or of English.

    Raises:
        ImportError: If `sentencex` is not installed.
    """
    try:
        boundaries = importlib.import_module("sentencex").get_sentence_boundaries
    except ImportError as error:
        raise ImportError(
            "`sentences_of` needs the package sentencex: pip install 'captum-llm-ext[sentences]' "
            "(or use the unit 'sentence', whose rules are built in)."
        ) from error
    return Named(
        f"sentences_of({language!r})",
        lambda text: tiles(text, (found["start_index"] for found in boundaries(language, text))),
    )
