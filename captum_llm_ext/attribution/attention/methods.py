"""`AttentionWeights` and `AttentionRollout`: attention maps of a text."""

from collections.abc import Sequence
from typing import get_args

import torch
from captum.attr._utils.attribution import Attribution
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.attribution.attention.layer import Contributions, Heads
from captum_llm_ext.attribution.attention.maps import each_map


class _AttentionMap(Attribution):
    """A map of how much each position takes from each position up to it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model = model

    def map(self, ids: Tensor) -> Tensor:
        """The map of one text.

        Args:
            ids: Token ids ``(length,)``.

        Returns:
            Shape ``(length, length)``, float64 on the CPU: row i holds what position i takes from
            each position; later positions are exactly 0. Rows sum to 1, those of weights to 1 minus
            the share of attention sinks (which take weight and give nothing).

        Raises:
            ValueError: If some layer has no attention, or one of a kind that has no map.
        """
        raise NotImplementedError

    def attribute(self, inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Maps of plain token ids.

        Args:
            inputs: Token ids ``(batch, length)``, without padding.

        Returns:
            Shape ``(batch, length, length)``, as returned by `map`.
        """
        return torch.stack([self.map(row) for row in inputs])


class AttentionWeights(_AttentionMap):
    """Attention weights of some layers, averaged over them.

    For inspection: weights show where a layer attends, not what it takes from there nor how that is
    used (Jain and Wallace 2019, arXiv 1902.10186). `GenerationAttentionAttribution` lists their
    precision on grammars with known causes.

    Args:
        model: A transformers model.
        layers: Indices of layers, negative ones from the end. None: all.
        heads: ``"mean"`` or ``"max"`` over heads (rows of the latter are normalised to sum to 1),
            or the index of one head.

    Raises:
        ValueError: If `heads` is something else, or `layers` is empty.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int] | None = None, heads: Heads = "mean"
    ) -> None:
        super().__init__(model)
        is_number = isinstance(heads, int) and not isinstance(heads, bool)
        if heads not in ("mean", "max") and not is_number:
            raise ValueError(f"`heads` is {heads!r}: give 'mean', 'max' or the number of a head.")
        if layers is not None and not len(layers):
            raise ValueError("`layers` is empty: give numbers of layers, or None for all of them.")
        self.layers = None if layers is None else [int(layer) for layer in layers]
        self.heads: Heads = heads

    def map(self, ids: Tensor) -> Tensor:
        """The mean of the layers' weights; see `_AttentionMap.map`."""
        wanted = self._wanted()
        found: list[Tensor] = []

        def take(number: int, weights: Tensor) -> None:
            if wanted is None or number in wanted:
                found.append(weights.double().cpu())
                found[:] = [torch.stack(found).sum(0)]

        each_map(self.model, on_device(ids, self.model), "weights", self.heads, take)
        n = len(_layers(self.model)) if wanted is None else len(wanted)
        return found[0] / n

    def _wanted(self) -> set[int] | None:
        """Indices of the layers that are averaged."""
        if self.layers is None:
            return None
        n = len(_layers(self.model))
        wrong = [layer for layer in self.layers if not -n <= layer < n]
        if wrong:
            raise ValueError(f"`layers` holds {wrong[0]}: the model has {n} layers.")
        return {layer % n for layer in self.layers}


class AttentionRollout(_AttentionMap):
    """Attention composed over all layers: the share of each input position in each final position.

    Maps of all layers are multiplied (Abnar and Zuidema 2020, arXiv 2005.00928). One product serves
    every position of a text, but two tokens that could be generated at the same position have the
    same row: the map does not depend on the token.

    Args:
        model: A transformers model.
        contributions: What a layer's map is made of. ``"weights"``: half the mean over heads plus
            half the identity, for the residual connection. ``"values"``: the same with norms of
            value vectors, ``‖Σ α v W‖`` (Kobayashi et al. 2020, arXiv 2004.10102). ``"alti"``: how
            much the L1 norm of the layer's attention output plus residual would shrink without a
            part of it (Ferrando et al. 2022, arXiv 2203.04212). L1 penalises a part for each
            coordinate in which it exceeds the sum, as large parts that cancel do. ``"projection"``:
            the projection of the same parts onto their sum, ``⟨part, sum⟩``, negative ones counted
            as 0. Of these it names known causes best, ahead of ``"alti"`` on both languages that
            `GenerationAttentionAttribution` lists; all are for inspection until measured on a model
            like yours.

    Raises:
        ValueError: If `contributions` is unknown.
    """

    def __init__(self, model: nn.Module, contributions: Contributions = "weights") -> None:
        super().__init__(model)
        if contributions not in get_args(Contributions):
            known = ", ".join(map(repr, get_args(Contributions)))
            raise ValueError(f"`contributions` is {contributions!r}: give one of {known}.")
        self.contributions: Contributions = contributions

    def map(self, ids: Tensor) -> Tensor:
        """The product of the layers' maps; see `_AttentionMap.map`."""
        product = torch.eye(len(ids), dtype=torch.float64, device="cpu")

        def take(_: int, own: Tensor) -> None:
            nonlocal product
            own = own.double().cpu()
            if self.contributions in ("weights", "values"):
                same = torch.eye(len(own), dtype=own.dtype, device="cpu")
                # A layer that adds nothing leaves every position unchanged.
                own = torch.where(own.sum(-1, keepdim=True) > 0, (own + same) / 2, same)
            # The share of attention sinks comes from no position.
            product = own @ product

        each_map(self.model, on_device(ids, self.model), self.contributions, "mean", take)
        return product.tril()


def on_device(ids: Tensor, model: nn.Module) -> Tensor:
    """One row of ids ``(1, length)`` on the model's input device."""
    return ids[None].to(_compat.input_device(model))


def _layers(model: nn.Module) -> list[nn.Module]:
    return _compat.decoder_layers(model) or []
