"""Replacement texts given by name: by a feature's label, index or text."""

from collections.abc import Mapping, Sequence

from captum_llm_ext.text.baselines.slot import Slot

TextsByName = Mapping[str | int, str | Sequence[str]]
_PUNCTUATION = ".,;:!?\"'()[]{}…“”‘’«»"


class Labels:
    """Lists of texts by name.

    Args:
        texts: Replacement texts by label, slot index or a feature's own text.

    Raises:
        ValueError: If a list is empty.
        TypeError: If the argument is not a mapping to lists of texts.
    """

    def __init__(self, texts: TextsByName) -> None:
        if not isinstance(texts, Mapping):
            raise TypeError(
                f"`labels` is a {type(texts).__name__}: give a mapping from a label, a feature's "
                "number or its text to a list of texts."
            )
        self.texts = {key: as_choices(f"the entry {key!r}", entry) for key, entry in texts.items()}

    def __len__(self) -> int:
        return len(self.texts)

    def named(self, slot: Slot) -> str | int | None:
        """The key under which a slot has texts (label, index or own text), or None."""
        text = slot.text.strip()
        keys: list[str | int | None] = [slot.label, None if slot.generated else slot.index]
        keys += [text, text.strip(_PUNCTUATION)]
        return next((key for key in keys if key is not None and key in self.texts), None)

    def containing(self, text: str) -> str | int | None:
        """The only key whose texts include this one, or None."""
        found = [key for key, texts in self.texts.items() if text in texts]
        return found[0] if len(found) == 1 else None


def as_choices(name: str, entry: str | Sequence[str]) -> tuple[str, ...]:
    """A text, or a list of texts, as the texts to draw from.

    Args:
        name: What holds them, for messages.
        entry: The text or texts.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is an empty list.
    """
    if isinstance(entry, str):
        return (entry,)
    if not isinstance(entry, Sequence) or not all(isinstance(text, str) for text in entry):
        raise TypeError(f"{name} is {entry!r}: give a text, or a list of texts to draw from.")
    if not entry:
        raise ValueError(
            f"{name} is an empty list: give at least one text ('' deletes the feature)."
        )
    return tuple(entry)
