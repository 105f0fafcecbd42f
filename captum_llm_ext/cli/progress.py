"""Progress of a run on the terminal: the answer, an estimate of time and memory, a bar."""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from captum_llm_ext import _compat
from captum_llm_ext.attribution.quotient import most_evaluations
from captum_llm_ext.base.terminal import one_line
from captum_llm_ext.cli.command import say
from captum_llm_ext.model.scoring.progress import Listener, bar, duration

# A run of fewer seconds needs no advice. Chosen, not measured.
_WORTH_ADVICE = 20.0


class CheaperRun(NamedTuple):
    """Another command with about the same answer.

    Attributes:
        options: Its options.
        share: Its evaluations as a share of this command's; None if values decide.
        means: The difference in the result.
    """

    options: str
    share: float | None
    means: str


class DryRunEndError(Exception):
    """Ends a dry run after its output."""


class RunProgress:
    """Prints the answer as soon as it is generated, and an estimate after the first batch.

    Args:
        model: The model whose memory is shown; None for a remote one.
        is_dry: Whether the run ends with the estimate, by a `DryRunEndError`.
        is_quiet: Whether to show neither a bar nor an unrequested estimate.
        is_open: Whether more work may be announced later, depending on values.
        attributes_answer: Whether a few evaluations for the whole answer may follow.
        uses_proposals: Whether the model proposes replacements, which takes a while.
        cheaper: Returns other commands for the number of tokens of the answer.
        lists_end: Whether the answer's end is a token of it, so that one token alone is none.
    """

    def __init__(
        self,
        model: Any,
        *,
        is_dry: bool,
        is_quiet: bool,
        is_open: bool,
        attributes_answer: bool,
        uses_proposals: bool,
        cheaper: Callable[[int], Iterable[CheaperRun]],
        lists_end: bool = True,
    ) -> None:
        self._model, self._is_dry, self._is_open = model, is_dry, is_open
        self._uses_proposals, self._cheaper = uses_proposals, cheaper
        self._attributes_answer, self._lists_end = attributes_answer, lists_end
        self._shows_estimate = is_dry or not is_quiet
        self._has_bar = not is_quiet
        self._bar: Listener | None = None
        # The phase before the first batch, if it is running.
        self._before: Listener | None = None
        self._is_before = False
        self._n_tokens = self._total = self._done = 0
        self._began = self._first = 0.0
        self._name, self._unit = "", ""

    @property
    def has_answered(self) -> bool:
        """Whether the answer has been printed."""
        return self._n_tokens > 0

    def answered(self, text: str, n_tokens: int, is_cut: bool) -> None:
        """Prints the answer, and whether it was truncated."""
        if self.has_answered:
            say("the strongest cause is not told apart yet: twice as many answers are sampled")
            return
        self._n_tokens = n_tokens
        say(f"answer: {one_line(text)}")
        if n_tokens == 1 and not is_cut and self._lists_end:
            say(
                "the model ended at once: what follows is why it wrote nothing (a chat model wants "
                "--as-chat)"
            )
        if is_cut:
            say(
                f"the answer was cut after {n_tokens} tokens: a larger --max-new-tokens lets the "
                "model end it"
            )

    def begins(self, name: str, unit: str) -> None:
        """Stores what is counted; the bar starts with the first batch."""
        if self._name:  # within the run: a preparatory phase
            self._is_before = True
            self._before = bar() if self._has_bar else None
            if self._before is not None:
                self._before.begins(name, unit)
        else:
            self._name, self._unit = name, unit
            if self._uses_proposals and self._shows_estimate:
                say("looking for what the model could have written in place of each part …")

    def announce(self, n: int) -> None:
        """Adds to the work to be done."""
        if self._is_before:
            if self._before is not None:
                self._before.announce(n)
            return
        if not self._total:
            self._began = time.monotonic()
        self._total += n
        if self._bar is not None:
            self._bar.announce(n)

    def advance(self, n: int) -> None:
        """Prints the estimate after the first batch, then the progress."""
        if self._is_before:
            if self._before is not None:
                self._before.advance(n)
            return
        is_first = not self._done
        self._done += n
        if is_first:
            taken = max(time.monotonic() - self._began, 1e-9)
            if self._shows_estimate:
                self._print_estimate(taken / n, n)
            if self._is_dry:
                raise DryRunEndError
            if self._has_bar:
                self._bar = bar(taken)
                self._bar.begins(self._name, self._unit)
                self._bar.announce(self._total)
        if self._bar is not None:
            self._bar.advance(n)

    def note(self, text: str) -> None:
        """Sets the text after the bar."""
        if self._bar is not None:
            self._bar.note(text)

    def ends(self) -> None:
        """Removes the bar."""
        if self._is_before:
            self._is_before = False
            if self._before is not None:
                self._before.ends()
        elif self._bar is not None:
            self._bar.ends()

    def _print_estimate(self, each: float, n: int) -> None:
        write = print if self._is_dry else say  # in a dry run, this is the output
        left = each * (self._total - n)
        more = " to begin with; the values decide how many more" if self._is_open else ""
        # A coalition of several requests is one of an API that does not report whole prompts.
        if self._attributes_answer and self._unit != "coalition":
            more += f", and at most {most_evaluations(self._total)} for the whole answer"
        # The work of a dry run has to be repeated.
        whole = each * self._total if self._is_dry else left
        rest = (
            f"{duration(whole)} {'in all' if self._is_dry else 'more'}" if left else "which is all"
        )
        first = f"the first {n} took {duration(each * n)}"
        memory = self._memory()
        write(
            f"estimate: {self._total} {self._name}{more}: {rest} ({first})"
            f"{memory and f'; {memory}'}"
        )
        if not (self._is_dry or left > _WORTH_ADVICE):
            return
        for way in self._cheaper(self._n_tokens):
            if way.share is None:
                write(f"cheaper: {way.options}: {way.means}")
            else:
                rows = max(1, round(way.share * self._total))
                if each * rows >= whole:  # starting again would take longer than the rest
                    continue
                write(f"cheaper: {way.options}: {rows}, {duration(each * rows)}; {way.means}")

    def _memory(self) -> str:
        if self._model is None:
            return ""
        tensors = (*self._model.parameters(), *self._model.buffers())
        own = sum(t.numel() * t.element_size() for t in tensors)
        device = _compat.input_device(self._model)
        used = (
            torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else _compat.used_memory()
        )
        in_use = "" if used is None else f"{_size(used)} in use, "
        return f"memory: {in_use}{_size(own)} of it the model"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
