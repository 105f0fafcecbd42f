"""`AttentionByHead`: attention weights of every head of every layer for one token."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from captum_llm_ext.result.plot.axes import Drawing


@dataclass(frozen=True)
class AttentionByHead:
    """Attention weights of every head for one token, as `BertViz`_ shows them.

    .. _BertViz: https://github.com/jessevig/bertviz

    Attributes:
        weights: Shape ``(n_layers, n_heads, n_features)``, float32 on the CPU: features of the
            prompt, then of earlier output; later features are 0. NaN where a layer has fewer heads.
        fixed: Shape ``(n_layers, n_heads)``: the share of fixed text (BOS, a chat template) and of
            attention sinks. Including it, the weights of a head sum to 1.
        token: The token.
        features: Names of the features.
        n_prompt: How many of these belong to the prompt.
    """

    weights: Tensor
    fixed: Tensor
    token: str
    features: list[str]
    n_prompt: int

    def plot(
        self, show: bool = False, *, ax: "Axes | None" = None, cmap: str | None = None
    ) -> "Drawing":
        """Draws a heat map: a row per head, grouped by layer, and a column per feature.

        Args:
            show: Show the figure, and return None.
            ax: Axes to draw in; by default a new figure of suitable size.
            cmap: A sequential colour map; by default ``"Purples"``.

        Returns:
            ``(figure, axes)``, or None if shown.
        """
        from captum_llm_ext.result.plot.heads import head_map

        return head_map(
            self.weights,
            self.fixed,
            labels=self.features,
            n_prompt=self.n_prompt,
            cmap=cmap,
            ax=ax,
            show=show,
            title=f"Attention where {self.token!r} is written",
        )
