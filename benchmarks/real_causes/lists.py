"""Replacements of words, made by hand, and texts of the same kind as the prompts."""

import hashlib
import random
import re
from collections.abc import Sequence
from pathlib import Path

from captum_llm_ext import TextSegmentInput

_FOLDER = Path(__file__).parent
_WORD = re.compile(r"^(\W*)(.*?)((?:'s)?\W*)$", re.DOTALL)
_SLOT = re.compile(r"\{([\w -]+)(?::(\w))?\}")


def digest_of(*names: str) -> str:
    """Digest of the files of words and texts."""
    data = b"".join(_FOLDER.joinpath(name).read_bytes() for name in names)
    return hashlib.sha256(data).hexdigest()[:16]


def _lines(name: str) -> list[str]:
    lines = _FOLDER.joinpath(name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


_NAMED = [line.split(": ") for line in _lines("lists.txt")]
# By name, the star of function words taken off.
LISTS = {name.removeprefix("*"): words.split() for name, words in _NAMED}
_FUNCTION_WORDS = {w for name, words in _NAMED if name.startswith("*") for w in words.split()}


def bare(word: str) -> str:
    """A word without white space, punctuation and a genitive's ending."""
    return _parts(word)[1]


def _parts(word: str) -> tuple[str, str, str]:
    head, core, tail = _WORD.fullmatch(word.strip()).groups()  # pyright: ignore
    return head, core, tail


def is_function_word(word: str) -> bool:
    """Whether a word is a function word; punctuation alone is not."""
    core = bare(word)
    return not core or core in _FUNCTION_WORDS or core.lower() in _FUNCTION_WORDS


def alternatives(word: str) -> list[str]:
    """Other words of the same kind, in the same form; none for punctuation.

    Raises:
        KeyError: If no list has it.
    """
    core = bare(word)
    if not core:
        return []
    for written in (core, core.lower()):
        for words in LISTS.values():
            if written in words:
                others = [other for other in words if other != written]
                is_capital = written != core
                return [o[0].upper() + o[1:] if is_capital else o for o in dict.fromkeys(others)]
    raise KeyError(f"no list has {core!r}")


def by_hand(inp: TextSegmentInput) -> list[list[str]]:
    """Replacements of each word, with its punctuation; punctuation alone stays."""
    found: list[list[str]] = []
    for slot in inp.slots:
        head, _, tail = _parts(slot.text)
        others = [head + other + tail for other in alternatives(slot.text)]
        found.append(others or [slot.text.strip()])
    return found


def related_texts(n_each: int = 12, seed: int = 0, without: Sequence[str] = ()) -> list[str]:
    """Texts of the same kinds as the prompts.

    Args:
        n_each: Texts of each template.
        seed: Of their words.
        without: Texts that may not be among them, or begin one.
    """
    rng = random.Random(seed)
    templates = [line.replace("\\n", "\n") for line in _lines("related.txt") if line[0] != "["]
    found = [_filled(template, rng) for template in templates for _ in range(n_each)]
    return [text for text in found if not any(text.startswith(other) for other in without)]


def _filled(template: str, rng: random.Random) -> str:
    places: dict[str, float] = {}

    def fill(match: re.Match[str]) -> str:
        name, letter = match[1], match[2]
        luck = rng.random()
        if letter:  # the same place in every list
            luck = places.setdefault(letter, luck)
        return LISTS[name][int(luck * len(LISTS[name]))]

    text = _SLOT.sub(fill, template)
    return text[0].upper() + text[1:] if text.endswith(".") else text
