"""`FoilContext`: a prompt and a target, for which foils are searched."""

from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.model import RowScorer, TokenRow
from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import draw_generator
from captum_llm_ext.text.baselines.words import KINDS, atoms, keeps_script, kind
from captum_llm_ext.text.inputs import GeneratedText, Prompt, RenderedPrompt, render_text

# Draws of random baselines for the model's distribution without features: as many as leave-one-out
# takes per feature. Chosen, not measured: more would find foils that win in fewer than one draw of
# eight.
_DRAWS = 8
# Characters before a token in which the word that it may continue is searched. Chosen, not
# measured.
_TAIL = 32
_FRAGMENT = "\ufffd"


class FoilContext:
    """A prompt and the target after it.

    Args:
        prompt: The prompt, whose baselines have the model.
        full: The prompt with every feature present.
        generated: The target.
        tokenizer: The model's tokenizer.
        seed: Seeds draws of random baselines.
    """

    def __init__(
        self,
        prompt: Prompt,
        full: RenderedPrompt,
        generated: GeneratedText,
        tokenizer: Any,
        seed: int,
    ) -> None:
        self._prompt, self._generated, self._seed = prompt, generated, seed
        self.tokenizer, self.full = tokenizer, full
        self.target = generated.ids
        self.names = list(generated.labels)
        self._special: set[int] = set(getattr(tokenizer, "all_special_ids", None) or ())
        self._pieces: dict[int, str] = {}
        self._likeliest: dict[int, tuple[Tensor, Tensor]] = {}
        self._written: list[int] = []

    def after(self, prompt: Prompt) -> "FoilContext":
        """The same where the prompt's baselines know more; what was found of the whole stays."""
        changed = copy(self)
        changed._prompt = prompt
        return changed

    def likeliest(self, model: RowScorer, n: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens in the target's places, with every feature present.

        They are asked for once, by whoever wants them first.

        Args:
            model: Is asked.
            n: How many.

        Returns:
            Log-probabilities and token ids, each ``(1, n_target, n)``, as `Scorer.likeliest` does.
        """
        if n not in self._likeliest:
            self._likeliest[n] = model.likeliest([self.whole], n)
        return self._likeliest[n]

    def continuation(self, model: RowScorer, n: int) -> tuple[int, ...]:
        """The model's greedy continuation of the target: `n` tokens, or fewer up to an end token.

        As `likeliest`, it is asked for once.
        """
        while len(self._written) < n:
            ids = (*self.full.ids, *self.target, *self._written)
            if self.is_special(ids[-1]):
                break
            try:  # a foil is read with what follows it
                model.check_length(len(ids) + 1, "what follows the target")
            except ValueError:
                break
            _, likeliest = model.likeliest([TokenRow(ids, (len(ids) - 1,))], 1)
            self._written.append(int(likeliest))
        return tuple(self._written[:n])

    @cached_property
    def _texts(self) -> list[str]:
        return [piece.text for piece in self._generated.pieces]

    @property
    def target_text(self) -> str:
        """What the target says."""
        return "".join(self._texts)

    @property
    def whole(self) -> TokenRow:
        """The row with every feature present."""
        text = self._generated.whole(self.full)
        return TokenRow(text.ids, text.positions, self.full.extras, self.full.key)

    def before(self, t: int) -> tuple[int, ...]:
        """The token before a target token."""
        return self.target[t - 1 : t] if t else self.full.ids[-1:]

    def is_special(self, token: int) -> bool:
        """Whether a token is special rather than text."""
        return token in self._special

    def ids_of(self, foil: str, t: int) -> tuple[int, ...]:
        """The tokens of a text in place of a target token.

        Raises:
            ValueError: If there is none.
        """
        own = self._texts[t]
        left = tokens.decode(self.tokenizer, (self.full.ids + self.target[:t])[-tokens.CONTEXT :])
        text = foil
        if own.strip() and not foil[0].isspace():
            # Another word, rather than a continuation of the previous one.
            glued = foil[0].isalnum() and left[-1:].isalnum() and not self.goes_on(t)
            text = (_space(own) or " " * glued) + foil
        ids = tokens.encode_in_place(self.tokenizer, text, left)
        if not ids:
            raise ValueError(f"the foil {foil!r} has no token: give another text, or a token id.")
        return ids

    def goes_on(self, t: int) -> bool:
        """Whether a target token continues a word, or a character, that began before it."""
        if self.is_special(self.target[t]):
            return False
        text = self._texts[t]
        if t and not self._texts[t - 1] and not self.is_special(self.target[t - 1]):
            return True  # the previous token is a part of a character
        if not text[:1].isalpha():
            return False
        left = "".join(self._texts[max(0, t - _TAIL) : t])[-_TAIL:]
        if len(left) < _TAIL and (not t or not self.is_special(self.target[t - 1])):
            left = tokens.decode(self.tokenizer, self.full.ids[-_TAIL:])[-_TAIL:] + left
        border = len(left)
        return any(atom.start < border < atom.stop for atom in atoms(left + text))

    def is_space(self, t: int) -> bool:
        """Whether a target token is white space alone."""
        return self._texts[t].isspace()

    def fits(self, token: int, t: int) -> bool:
        """Whether a token is of the same kind as a target token: a plausible alternative."""
        if token == self.target[t] or self.is_special(token):
            return False
        own, other = self._texts[t], self._piece(token, t)
        core = other.strip()
        is_text = bool(core) and core.isprintable() and _FRAGMENT not in core
        return (
            is_text
            and _space(own) == _space(other)
            and _kind(own) == _kind(other)
            and keeps_script(other, own)
        )

    def is_other(self, token: int, t: int) -> bool:
        """Whether a token differs, of any kind; for special tokens only special ones."""
        special = self.is_special(token) and not self.is_special(self.target[t])
        return token != self.target[t] and not special

    def _piece(self, token: int, t: int) -> str:
        if token not in self._pieces:
            [self._pieces[token]] = tokens.pieces(self.tokenizer, [token], self.before(t))
        return self._pieces[token]

    def without(self, feature: int | str) -> list[TokenRow]:
        """The rows with one feature absent, one per draw.

        Raises:
            ValueError: If there is no such feature, or several have this name.
        """
        prompt, generated = self._prompt, self._generated
        column = self._column(feature)
        n = 1 if prompt.deterministic and generated.deterministic else _DRAWS
        n_columns = prompt.n_features + generated.n_features
        masks = torch.ones(n, n_columns, dtype=torch.bool, device="cpu")
        masks[:, column] = False
        draws = torch.arange(n, device="cpu")
        # Draws that no coalition uses, so that foils are independent of what is explained.
        generator = draw_generator(self._seed, -1)
        return [
            TokenRow(text.ids, text.positions, text.prompt.extras, text.prompt.key)
            for text in render_text(prompt, generated, masks, generator, draws)
        ]

    def _column(self, feature: int | str) -> int:
        prompt, generated = self._prompt, self._generated
        names: list[list[str]] = [[] for _ in range(prompt.n_features)]
        for name, own in zip(prompt.names, prompt.columns, strict=True):
            names[own].append(name.strip())
        names += [[name.strip()] for name in generated.names]
        if isinstance(feature, int):
            if not 0 <= feature < len(names):
                raise ValueError(f"`without` is {feature}: there are {len(names)} features.")
            return feature
        found = [i for i, own in enumerate(names) if feature.strip() in own]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} features are called {feature!r} (`without`): give the number of one"
                + (f", such as {found[0]}." if found else f", below {len(names)}.")
            )
        return found[0]


def _space(text: str) -> str:
    """The white space at the beginning of a text."""
    return text[: len(text) - len(text.lstrip())]


def _kind(text: str) -> str | None:
    """The kind of a token's text, all marks being one kind; None for white space alone."""
    core = text.strip()
    found = kind(core) if core else None
    return found if found is None or found in KINDS else "mark"
