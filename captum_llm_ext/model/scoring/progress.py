"""`ProgressBar`: what users see of a run while it goes on."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


class ProgressBar:
    """One bar on stderr over all that is done while it is shown.

    Args:
        name: What is counted.
        unit: One of it.
        is_shown: Whether there is a bar at all.
    """

    def __init__(self, name: str, unit: str, *, is_shown: bool) -> None:
        self._name, self._unit, self._is_shown = name, unit, is_shown
        self._bar: Any = None

    @contextmanager
    def shown(self) -> Generator[None]:
        """Draws it within, whatever number of calls the work comes in."""
        if not self._is_shown:
            yield
            return
        from tqdm.auto import tqdm  # captum and transformers both bring it

        with tqdm(total=0, desc=self._name, unit=self._unit) as self._bar:
            yield

    def announce(self, n: int) -> None:
        """There is so much more to do."""
        if self._bar is not None:
            self._bar.total += n
            self._bar.refresh()

    def advance(self, n: int = 1) -> None:
        """So much of it is done."""
        if self._bar is not None:
            self._bar.update(n)

    def note(self, text: str) -> None:
        """What stands behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
