"""`PatchingResult`: how much of a feature's effect each patched cell restores or removes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from captum_llm_ext.base import files, tensor_file
from captum_llm_ext.base.arguments import position_of
from captum_llm_ext.result import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from captum_llm_ext.result.plot.axes import Drawing

_KIND = tensor_file.Kind(
    "saved patching",
    "captum_llm_ext_patching",
    format=1,
    advice="give a file written by `PatchingResult.save`.",
    digest_since=1,
    oldest=1,
)
# Smallest gain, in the unit of values (nats of a log-probability), that effects are divided by:
# below it, shares are mostly rounding and chance. Chosen, not measured.
_LEAST_GAIN = 1.0
_SHOWN = 0.005  # smaller effects are shown as 0
_TENSORS = ("effects", "clean_values", "corrupted_values", "target", "said_at")
_OPTIONAL = ("effects_se", "ranks")
_REST = (
    "places",
    "place_names",
    "replaced",
    "feature",
    "replacements",
    "output_tokens",
    "n_evaluations",
    "provenance",
)


@dataclass(frozen=True, eq=False)
class PatchingResult:
    """Effects of patched cells, as computed by `ActivationPatching.trace`.

    Attributes:
        effects: Shape ``(n_target, n_layers + 1, n_places)``, float64 on the CPU, in the unit of
            the values: the change of a target token's value when the stream of one cell is taken
            from the other text. Exactly 0 for cells that are equal in both, and for positions after
            the one that predicts the token; NaN for cells that were not patched (`first`), and for
            tokens within the replaced feature.
        effects_se: Their standard errors over draws; None for a single draw.
        clean_values: Values in the clean text, ``(n_target,)``.
        corrupted_values: Values in the corrupted text, averaged over draws, ``(n_target,)``.
        target: Token ids, ``(n_target,)``.
        said_at: Per target token the position that predicts it, the one before it.
        places: Per column of `effects` the positions that were patched together.
        place_names: The text at these positions.
        replaced: Positions where the texts differ, or noise was added.
        feature: Names of the replaced features.
        replacements: The replacement texts, one per draw.
        output_tokens: A printable name per target token.
        ranks: If only some cells were patched, their ranks by attribution patching, ``(n_layers +
            1, n_places)``: 0 for the first, -1 for cells without effect. Otherwise None.
        n_evaluations: Number of distinct rows scored.
        provenance: Model, versions and settings.
    """

    effects: Tensor
    clean_values: Tensor
    corrupted_values: Tensor
    target: Tensor
    said_at: Tensor
    places: list[list[int]]
    place_names: list[str]
    replaced: list[int]
    feature: list[str]
    replacements: list[str]
    output_tokens: list[str]
    n_evaluations: int
    effects_se: Tensor | None = None
    ranks: Tensor | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def n_layers(self) -> int:
        """Number of layers; there is one more stream."""
        return self.effects.shape[1] - 1

    @property
    def gain(self) -> Tensor:
        """Effect of the feature per target token, ``(n_target,)``: clean minus corrupted value."""
        return self.clean_values - self.corrupted_values

    @property
    def shares(self) -> Tensor:
        """Effects divided by the token's gain; NaN if the gain is within one nat of 0.

        (Or within one unit, if values are not in nats.)
        """
        gain = self.gain
        divided = self.effects / gain[:, None, None]
        return divided.masked_fill((gain.abs() <= _LEAST_GAIN)[:, None, None], torch.nan)

    def strongest(self, target_token: int | str, k: int = 5) -> list[tuple[int, int, float]]:
        """The cells with the largest effects on a token, by magnitude: layer, column, effect.

        Args:
            target_token: Its position in the target, or its name in `output_tokens`.
            k: Maximum number; cells without effect are left out.

        Raises:
            ValueError: If there is no such token, or several have this name.
        """
        at = position_of(target_token, self.output_tokens, "target token")
        effects = self.effects[at].nan_to_num()
        order = effects.abs().flatten().argsort(descending=True, stable=True)[:k].tolist()
        n_places = effects.shape[1]
        cells = [(i // n_places, i % n_places) for i in order]
        found = [(layer, column, float(effects[layer, column])) for layer, column in cells]
        return [cell for cell in found if cell[2]]

    def plot(
        self,
        target_token: int | str,
        show: bool = False,
        *,
        every_place: bool = False,
        ax: "Axes | None" = None,
        cmap: str | None = None,
    ) -> "Drawing":
        """Draws the effects on one target token: layers over positions.

        The positions of the feature and the one that predicts the token are marked. Blue cells
        restore the token's value (or are needed for it), red ones work against it.

        Args:
            target_token: Its position in the target, or its name in `output_tokens`.
            show: Show the figure, and return None.
            every_place: Whether to draw positions before the feature and after the token, which
                have no effect.
            ax: Axes to draw in; by default a new figure of suitable size.
            cmap: A diverging colour map, centred at zero; by default ``"RdBu"``.

        Returns:
            ``(figure, axes)``, or None if shown.

        Raises:
            ValueError: If there is no such token, or several have this name.
        """
        at = position_of(target_token, self.output_tokens, "target token")
        predicting, replaced = int(self.said_at[at]), {*self.replaced}
        own = [bool(replaced & {*group}) for group in self.places]
        says = [predicting in group for group in self.places]
        first = min(self.replaced)
        shown = [
            column
            for column, group in enumerate(self.places)
            if every_place or (max(group) >= first and min(group) <= predicting)
        ]
        value = self.provenance.get("attr_target")
        return plot.patching_map(
            self.effects[at][:, shown].numpy(),
            place_names=[self.place_names[column] for column in shown],
            replaced=[i for i, column in enumerate(shown) if own[column]],
            saying=[i for i, column in enumerate(shown) if says[column]],
            what="Lost of" if self.provenance.get("direction") == "noise" else "Given back of",
            cmap=cmap,
            ax=ax,
            show=show,
            title=self._title(at),
            unit="nats" if value in ("log_prob", "contrast") else None,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the result to one safetensors file, which `load` reads.

        Raises:
            TypeError, ValueError: If JSON cannot hold its provenance.
            OSError: If the file cannot be written.
        """
        tensors = {name: getattr(self, name) for name in (*_TENSORS, *_OPTIONAL)}
        there = {name: value for name, value in tensors.items() if value is not None}
        tensor_file.write(path, _KIND, there, {name: getattr(self, name) for name in _REST})

    @classmethod
    def load(cls, path: files.Path) -> "PatchingResult":
        """Reads a result written by `save`.

        Raises:
            OSError: If there is no such file, or it cannot be read.
            ValueError: If the file is damaged, not such a result, or of a later format.
        """
        tensors, rest = tensor_file.read(path, _KIND)
        try:
            given = {name: tensors.pop(name) for name in _TENSORS}
            given |= {name: tensors.pop(name, None) for name in _OPTIONAL}
            if tensors:
                raise ValueError(f"it has a tensor {min(tensors)!r}")
            found = cls(**given, **{name: rest[name] for name in _REST})
            found._check()
        except tensor_file.BROKEN as error:
            why = str(error) or type(error).__name__
            raise ValueError(f"{os.fspath(path)!r} is damaged ({why}): {_KIND.advice}") from error
        return found

    def __str__(self) -> str:
        names = ", ".join(repr(name.strip()) for name in self.feature)
        others = ", ".join(dict.fromkeys(repr(text.strip()) for text in self.replacements[:3]))
        lines = [
            f"{names} replaced by {others}; {self.n_layers} layers, {len(self.places)} places, "
            f"{self.n_evaluations} rows"
        ]
        for t, name in enumerate(self.output_tokens):
            gain = float(self.gain[t])
            cells = ", ".join(
                f"{effect:+.2f} at {self.place_names[column]!r} in stream {layer}"
                for layer, column, effect in self.strongest(t, 2)
                if abs(effect) >= _SHOWN
            )
            lines.append(f"{name!r}: gain {gain:+.2f}" + (f"; {cells}" if cells else ""))
        return "\n".join(lines)

    __repr__ = __str__

    def _title(self, at: int) -> str:
        names = " ".join(name.strip() for name in self.feature)
        return f"{names!r} → {self.output_tokens[at]!r}: gain {float(self.gain[at]):+.2f}"

    def _check(self) -> None:
        """Checks that the parts fit together.

        Raises:
            ValueError: If they do not.
        """
        n_target, n_streams, n_places = self.effects.shape
        sizes = {"places": self.places, "place_names": self.place_names}
        if any(len(part) != n_places for part in sizes.values()):
            raise ValueError("its places are not as many as its effects have")
        own = (self.clean_values, self.corrupted_values, self.target, self.said_at)
        if any(part.shape != (n_target,) for part in own) or len(self.output_tokens) != n_target:
            raise ValueError("its target tokens are not as many as its effects have")
        if self.effects_se is not None and self.effects_se.shape != self.effects.shape:
            raise ValueError("its standard errors are not as many as its effects")
        if self.ranks is not None and self.ranks.shape != (n_streams, n_places):
            raise ValueError("its ranks are not as many as its cells")
        flat = [p for group in cast("list[list[Any]]", self.places) for p in group]
        if not all(type(p) is int for p in (*flat, *self.replaced)):
            raise ValueError("its places are not numbers")
