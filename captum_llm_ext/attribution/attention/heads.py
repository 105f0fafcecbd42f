"""`AttentionByHead`: attention weights of every head of every layer for one token."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from captum_llm_ext.result.plot.axes import Drawing


@dataclass(frozen=True)
class AttentionByHead:
    """The attention weights of one token, head by head, as `BertViz`_ shows them; for looking.

    .. _BertViz: https://github.com/jessevig/bertviz

    Attributes:
        weights: Shape ``(n_layers, n_heads, n_features)``, float32 on the CPU: features of the
            prompt, then of earlier output; those that come later are 0. NaN for heads that a layer
            has fewer.
        fixed: Shape ``(n_layers, n_heads)``: the part of fixed text (BOS, a chat template) and of
            attention sinks. With it
            the weights of a head sum to 1.
        token: The token.
        features: Names of the features.
        n_prompt: How many of these are the prompt's.
    """

    weights: Tensor
    fixed: Tensor
    token: str
    features: list[str]
    n_prompt: int

    def plot(
        self, show: bool = False, *, ax: "Axes | None" = None, cmap: str | None = None
    ) -> "Drawing":
        """A heat map: a row per head, in bands by layer, a column per feature.

        Args:
            show: Show it, and return None.
            ax: Axes to draw in; by default a new figure of fitting size.
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
