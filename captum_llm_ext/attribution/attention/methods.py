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
            Shape ``(length, length)``, float64 on the CPU: row i tells what place i takes from each
            place. What comes after a place is exactly 0 in its row. Rows sum to 1, those of
            weights to what attention sinks leave (a sink takes weight and gives nothing).

        Raises:
            ValueError: If the model's layers do not all attend, or in a way no map can tell.
        """
        raise NotImplementedError

    def attribute(self, inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Maps of plain token ids.

        Args:
            inputs: Token ids ``(batch, length)``, without padding.

        Returns:
            Shape ``(batch, length, length)``, as `map` gives them.
        """
        return torch.stack([self.map(row) for row in inputs])


class AttentionWeights(_AttentionMap):
    """Attention weights of some layers, averaged over them.

    For looking: weights tell where a layer looks, not what it takes from there, nor what becomes of
    it (Jain and Wallace 2019, arXiv 1902.10186). What they are worth on languages with known causes
    is told by `GenerationAttentionAttribution`.

    Args:
        model: A model of transformers.
        layers: Numbers of layers, negative ones from the end. None: all.
        heads: ``"mean"`` or ``"max"`` over heads (rows of the latter are made to sum to 1), or the
            number of one.

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
        """Numbers of the layers that are averaged."""
        if self.layers is None:
            return None
        n = len(_layers(self.model))
        wrong = [layer for layer in self.layers if not -n <= layer < n]
        if wrong:
            raise ValueError(f"`layers` holds {wrong[0]}: the model has {n} layers.")
        return {layer % n for layer in self.layers}


class AttentionRollout(_AttentionMap):
    """Attention composed over all layers: the shares of input positions in each final position.

    Maps of all layers are multiplied (Abnar and Zuidema 2020, arXiv 2005.00928). Every place of a
    text is answered by the same product, but two tokens that could be written at one place have the
    same row: a map knows nothing of which token it is asked about.

    Args:
        model: A model of transformers.
        contributions: What a layer's map is made of. ``"weights"``: the heads' mean, half of it,
            the other half the place itself, which the layer passes on. ``"values"``: the same of
            the sizes of what is taken, ``‖Σ α v W‖`` (Kobayashi et al. 2020, arXiv 2004.10102).
            ``"alti"``: by how much what the layer passes on would shrink, in L1, without a part of
            it, the place itself included (Ferrando et al. 2022, arXiv 2203.04212).
            L1 charges a part for each coordinate in which it goes beyond the sum, which large
            parts that cancel do. ``"projection"``: how far the same parts go along what they sum
            to, ``⟨part, sum⟩``, of which those that go against it count as nothing. What they are
            worth is told by `GenerationAttentionAttribution`: all are for looking before they are
            measured on a model like yours.

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
                # A layer that adds nothing leaves every place what it was.
                own = torch.where(own.sum(-1, keepdim=True) > 0, (own + same) / 2, same)
            # Nothing is made of what goes to attention sinks: no place has it.
            product = own @ product

        each_map(self.model, on_device(ids, self.model), self.contributions, "mean", take)
        return product.tril()


def on_device(ids: Tensor, model: nn.Module) -> Tensor:
    """One row of ids ``(1, length)`` where the model reads them."""
    return ids[None].to(_compat.input_device(model))


def _layers(model: nn.Module) -> list[nn.Module]:
    return _compat.decoder_layers(model) or []
