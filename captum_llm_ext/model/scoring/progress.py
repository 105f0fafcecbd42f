"""Progress of a run: bars in terminals, lines elsewhere, or a listener."""

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

_TENTHS = 10


@runtime_checkable
class Listener(Protocol):
    """Receives the progress of a run, as ``show_progress`` of an ``attribute``.

    Methods are called in the main process, in the order of their definition; exceptions end the
    run. Preparatory work, such as a search for candidates, may come first, between its own `begins`
    and `ends`.
    """

    def answered(self, text: str, n_tokens: int, is_cut: bool) -> None:
        """The model has generated the explained text.

        Args:
            text: The answer.
            n_tokens: Its length.
            is_cut: Whether it was truncated at the maximum length.
        """
        ...

    def begins(self, name: str, unit: str) -> None:
        """Work begins; the name of what is counted, and of one unit."""
        ...

    def announce(self, n: int) -> None:
        """`n` more units are to be done."""
        ...

    def advance(self, n: int) -> None:
        """`n` more units are done."""
        ...

    def note(self, text: str) -> None:
        """The text after the bar; empty removes it."""
        ...

    def ends(self) -> None:
        """The work is done, or ended by an error."""
        ...


Shown = bool | Listener


class ProgressBar:
    """One bar over all work while it is shown.

    Args:
        name: Name of what is counted.
        unit: Name of one unit.
        is_shown: Whether to show a bar; or a listener to call instead.
    """

    def __init__(self, name: str, unit: str, *, is_shown: Shown) -> None:
        self._name, self._unit = name, unit
        self._listener: Listener | None = None
        if isinstance(is_shown, Listener):
            self._listener = is_shown
        elif is_shown:
            self._listener = bar()
        self._is_open = False

    @contextmanager
    def shown(self) -> Generator[None]:
        """Shows the bar within, over any number of calls."""
        if self._listener is None:
            yield
            return
        self._listener.begins(self._name, self._unit)
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            self._listener.ends()

    def announce(self, n: int) -> None:
        """Adds `n` units to be done."""
        if self._is_open and self._listener is not None:
            self._listener.announce(n)

    def advance(self, n: int = 1) -> None:
        """Adds `n` units done."""
        if self._is_open and self._listener is not None:
            self._listener.advance(n)

    def note(self, text: str) -> None:
        """Sets the text after the bar."""
        if self._is_open and self._listener is not None:
            self._listener.note(text)


def bar(ago: float = 0.0) -> Listener:
    """Progress on stderr: a moving bar if that can be displayed, otherwise lines.

    Args:
        ago: Seconds since the work began.
    """
    return _Bar(ago) if _shows_bars() else _Lines(ago)


def _shows_bars() -> bool:
    """Whether stderr is a terminal or a notebook, which can redraw a line."""
    stream = sys.stderr
    try:
        return stream.isatty() or type(stream).__module__.startswith("ipykernel")
    except (AttributeError, ValueError):  # none, a custom object, or closed
        return False


class _Bar:
    """tqdm's bar, with a clock that starts with the work: preparation does not affect the rate."""

    def __init__(self, ago: float) -> None:
        self._name, self._unit, self._ago = "", "", ago
        self._bar: Any = None

    def answered(self, text: str, n_tokens: int, is_cut: bool) -> None:
        """Does nothing."""

    def begins(self, name: str, unit: str) -> None:
        self._name, self._unit = name, unit

    def announce(self, n: int) -> None:
        from tqdm.auto import tqdm  # a dependency of captum and transformers

        if self._bar is None:
            # Resumed work shows nothing before there is a rate.
            delay = 1e-9 if self._ago else 0
            self._bar = tqdm(total=n, desc=self._name, unit=self._unit, delay=delay)
            self._bar.start_t = self._bar.last_print_t = time.time() - self._ago
            return
        self._bar.total += n
        self._bar.refresh()

    def advance(self, n: int) -> None:
        if self._bar is not None:
            self._bar.update(n)

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def ends(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Lines:
    """A line for each tenth of the work, for files and pipes."""

    def __init__(self, ago: float) -> None:
        self._ago = ago
        self._name, self._unit, self._note = "", "", ""
        self._total = self._done = self._n_printed = 0
        self._began = 0.0

    def answered(self, text: str, n_tokens: int, is_cut: bool) -> None:
        """Does nothing."""

    def begins(self, name: str, unit: str) -> None:
        self._name, self._unit = name, unit

    def announce(self, n: int) -> None:
        if not self._total:
            self._began = time.monotonic() - self._ago
        self._total += n
        # More work changes the tenths.
        self._n_printed = min(self._n_printed, self._tenths())

    def advance(self, n: int) -> None:
        self._done += n
        if (tenths := self._tenths()) > self._n_printed:
            self._n_printed = tenths
            self._print()

    def note(self, text: str) -> None:
        self._note = f", {text}" if text else ""

    def ends(self) -> None:
        if self._total and self._done < self._total:  # how far it came
            self._print()

    def _tenths(self) -> int:
        return _TENTHS * self._done // max(self._total, 1)

    def _print(self) -> None:
        taken = max(time.monotonic() - self._began, 1e-9)
        rate = self._done / taken
        left = (self._total - self._done) / rate if rate else 0.0
        rest = f", {duration(left)} left" if self._done < self._total else f" in {duration(taken)}"
        done = f"({self._done}"
        if self._total:  # otherwise unknown
            done = f"{100 * self._done // self._total} % ({self._done} of {self._total}"
        text = f"{self._name}: {done}, {_rounded(rate)} {self._unit}s a second){rest}{self._note}"
        print(text, file=sys.stderr, flush=True)


def _rounded(rate: float) -> str:
    """Without an exponent: ``"1,290"``, ``"2.5"``, ``"0.31"``."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: ``"8 s"``, ``"2 min 05 s"``, ``"1 h 20 min"``."""
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"
