"""Artists that are laid out for the size of their axes, and again when it changes.

Axes shrink when other plots join their figure or a window is resized, and text has other widths at
other resolutions. Imported when something is drawn, because it needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from matplotlib.artist import Artist

from captum_llm_ext.result.plot.axes import inches

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FIRST = -1e3  # drawn before all other artists of the axes


class Fitted(Artist):
    """Draws nothing itself; keeps the artists added by `lay_out` in step with the axes' size.

    Args:
        ax: The axes.
        lay_out: Adds artists to the axes; called with the axes and a renderer, or None for the
            figure's own.
    """

    def __init__(self, ax: Axes, lay_out: Callable[[Axes, Any], None]) -> None:
        super().__init__()
        self.set_zorder(_FIRST)
        self.set_in_layout(False)
        self._lay_out = lay_out
        ax.add_artist(self)
        self._axes = ax
        self._renew(None)

    def draw(self, renderer: Any) -> None:
        """Lays out again if the size or the resolution has changed."""
        if self._size() == self._laid_out_for:
            return
        for artist in self._made:
            # The axes draw it in any case: hidden, and with the required figure.
            artist.set_visible(False)
            figure = artist.get_figure()
            artist.remove()
            artist.set_figure(figure)  # pyright: ignore[reportArgumentType]
        self._renew(renderer)
        for artist in sorted(self._made, key=lambda artist: artist.get_zorder()):
            artist.draw(renderer)

    def _renew(self, renderer: Any) -> None:
        before = set(self._axes.get_children())
        self._laid_out_for = self._size()
        self._lay_out(self._axes, renderer)
        self._made = [a for a in self._axes.get_children() if a not in before]

    def _size(self) -> tuple[float, ...]:
        fig = self._axes.get_figure(root=True)
        dpi = fig.dpi if fig is not None else 0.0
        return (*(round(length, 2) for length in inches(self._axes)), dpi)
