"""What an attribution found: numbers, names and where they came from."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from captum.attr import InterpretableInput, LLMAttributionResult
from torch import Tensor

from captum_llm_ext.inputs import Level, Piece

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMAT = 1
_TENSORS = (
    "seq_attr",
    "token_attr",
    "output_probs",
    "token_attr_se",
    "output_attr",
    "output_attr_se",
    "full_values",
    "empty_values",
    "efficiency_gap",
    "masks",
    "values",
    "draws",
    "target",
)
_NAMES = ("input_tokens", "output_tokens", "output_features")


class Cause(NamedTuple):
    """One feature's share in a target token.

    Attributes:
        name: The feature.
        attribution: In the unit of the value (nats for log-probabilities).
        standard_error: 0 where the attribution is exact, NaN where it cannot be told.
        column: Of `full_attr`.
        is_output: Whether it is earlier output, not a part of the prompt.
    """

    name: str
    attribution: float
    standard_error: float
    column: int
    is_output: bool

    def __str__(self) -> str:
        name = self.name.strip()
        name = name if any(map(str.isalnum, name)) else repr(self.name)
        error = f" ± {self.standard_error:.2f}" if self.standard_error > 0 else ""
        return f"{name}{' (output)' if self.is_output else ''} {self.attribution:+.2f}{error}"


class GenerationAttributionResult(LLMAttributionResult):
    """Attributions of every target token to the prompt and to the output before it.

    Captum's fields have captum's meaning and shape; the others are new. There are ``T`` target
    tokens, ``P`` columns of prompt features, ``G`` features made of the generated text and ``C``
    coalitions.

    Attributes:
        input_tokens: ``P`` names of prompt columns, in prompt order; white space included where
            the feature has it (``" lives"``).
        output_tokens: ``T`` printable names of the target tokens, stripped, as in captum.
        output_features: ``G`` names of generated features, or None where the output is held fixed.
        token_attr: ``(T, P)``, to the prompt features, in the unit of the value (nats).
        output_attr: ``(T, G)``, to earlier output: exactly 0 where a feature holds the token or a
            later one. None where the output is held fixed.
        seq_attr: ``(P,)``, of the whole target: the sum over tokens, or for ``attr_target="prob"``
            the attribution of its joint probability with the output held fixed.
        token_attr_se, output_attr_se: Standard errors of the same shapes: 0 where the answer is
            exact, NaN where it cannot be told.
        output_probs: ``(T,)``, probability of each target token, where the value tells it.
        full_values, empty_values: ``(T,)``, the value with everything present, and with every
            prompt feature and all earlier output absent (averaged over the baseline's draws).
        efficiency_gap: ``(T,)``, full minus empty minus the sum of the attributions: 0 for
            Shapley-type methods, what is left unexplained for others.
        n_evaluations: Distinct rows that the model was run on.
        masks: Bool ``(C, P' + G)``: coalitions, True = present; ``P'`` prompt features (a group of
            columns counts once).
        values: ``(C, T)``, the value of every target token in each; NaN where a coalition gives it
            none.
        draws: ``(C,)``: coalitions with equal number share one draw of replacements.
        target: ``(T,)``, the target's token ids.
        prompt_pieces, output_pieces: The text in reading order, with the column that each piece
            shows.
        levels: Coarser readings of the prompt's columns: see `at_level`.
        provenance: Versions, model, method, seed, budget: what is needed to run it again.
    """

    def __init__(
        self,
        *,
        input_tokens: list[str],
        output_tokens: list[str],
        seq_attr: Tensor,
        token_attr: Tensor,
        output_probs: Tensor | None = None,
        inp: InterpretableInput | None = None,
        output_features: list[str] | None = None,
        output_attr: Tensor | None = None,
        token_attr_se: Tensor,
        output_attr_se: Tensor | None = None,
        full_values: Tensor,
        empty_values: Tensor,
        efficiency_gap: Tensor,
        n_evaluations: int,
        masks: Tensor,
        values: Tensor,
        draws: Tensor,
        target: Tensor,
        prompt_pieces: Sequence[Piece] = (),
        output_pieces: Sequence[Piece] = (),
        levels: Sequence[Level] = (),
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            seq_attr=cast(Any, seq_attr),
            token_attr=cast(Any, token_attr),
            output_probs=cast(Any, output_probs),
            inp=inp,
        )
        self.output_features = output_features
        self.output_attr = output_attr
        self.token_attr_se = token_attr_se
        self.output_attr_se = output_attr_se
        self.full_values = full_values
        self.empty_values = empty_values
        self.efficiency_gap = efficiency_gap
        self.n_evaluations = n_evaluations
        self.masks = masks
        self.values = values
        self.draws = draws
        self.target = target
        self.prompt_pieces = list(prompt_pieces)
        self.output_pieces = list(output_pieces)
        self.levels = list(levels)
        self.provenance = dict(provenance or {})

    @property
    def full_attr(self) -> Tensor:
        """Prompt and output side by side, shape ``(T, P + G)``."""
        attr = cast(Tensor, self.token_attr)
        return attr if self.output_attr is None else torch.cat([attr, self.output_attr], dim=1)

    @property
    def full_attr_se(self) -> Tensor:
        """Standard errors of `full_attr`."""
        se = self.token_attr_se
        return se if self.output_attr_se is None else torch.cat([se, self.output_attr_se], dim=1)

    def why(self, token: int | str, k: int = 5) -> list["Cause"]:
        """What made the model write one token.

        Args:
            token: Its position in the target, or its name in `output_tokens`.
            k: How many causes at most.

        Returns:
            The strongest causes, by falling magnitude; zeros are no causes.

        Raises:
            ValueError: If there is no such token, or there are several of that name.
        """
        attr, se = self.full_attr[self._position(token)], self.full_attr_se[self._position(token)]
        names = [*self.input_tokens, *(self.output_features or ())]
        order = attr.abs().argsort(descending=True, stable=True)[:k].tolist()
        return [
            Cause(names[c], float(attr[c]), float(se[c]), c, c >= len(self.input_tokens))
            for c in order
            if attr[c] != 0
        ]

    def top(self, k: int = 3) -> list[list["Cause"]]:
        """The `k` strongest causes of every target token, as `why` gives them."""
        return [self.why(position, k) for position in range(len(self.output_tokens))]

    def at_level(self, name: str) -> tuple[list[str], Tensor]:
        """Prompt attributions summed over the parts of a coarser level.

        For additive methods (Shapley values) that is what the part contributes.

        Args:
            name: A name of `levels`, such as ``"sentence"`` or ``"turn"``.

        Returns:
            The names of the parts, and their attributions ``(T, n_parts)``.

        Raises:
            ValueError: If there is no such level.
        """
        level = next((level for level in self.levels if level.name == name), None)
        if level is None:
            known = ", ".join(repr(level.name) for level in self.levels) or "none"
            raise ValueError(
                f"there is no level {name!r}: the levels are {known}. A tuple of units, such as "
                '`unit=("sentence", "word")`, makes them.'
            )
        attr = cast(Tensor, self.token_attr)
        sums = attr.new_zeros(len(attr), len(level.parts))
        return level.parts, sums.index_add(1, torch.tensor(level.part_of, device=attr.device), attr)

    def _position(self, token: int | str) -> int:
        n_target = len(self.output_tokens)
        if isinstance(token, int):
            if not -n_target <= token < n_target:
                raise ValueError(f"there is no token {token}: the target has {n_target}.")
            return token % n_target
        found = [i for i, name in enumerate(self.output_tokens) if name == token.strip()]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} target tokens are {token!r}: give the position"
                + (f", one of {found}." if found else f" of one of {self.output_tokens}.")
            )
        return found[0]

    def plot_token_attr(
        self, show: bool = False, *, ax: "Axes | None" = None, cmap: str = "RdBu"
    ) -> "tuple[Figure, Axes] | None":
        """A heat map: one row per target token, prompt features left, earlier output right.

        Args:
            show: Show it, and return None.
            ax: Axes to draw in; by default a new figure of fitting size.
            cmap: A diverging colour map, centred at zero.

        Returns:
            ``(figure, axes)``, or None if shown.
        """
        from captum_llm_ext import plot

        return plot.heat_map(
            cast(Tensor, self.token_attr).cpu(),
            None if self.output_attr is None else self.output_attr.cpu(),
            input_labels=self.input_tokens,
            output_feature_labels=self.output_features,
            output_labels=self.output_tokens,
            output_features=[piece.feature for piece in self.output_pieces] or None,
            ax=ax,
            cmap=cmap,
            show=show,
        )

    def plot_seq_attr(
        self, show: bool = False, *, ax: "Axes | None" = None
    ) -> "tuple[Figure, Axes] | None":
        """A bar per prompt feature: its attribution for the whole target.

        Args:
            show: Show it, and return None.
            ax: Axes to draw in; by default a new figure of fitting size.

        Returns:
            ``(figure, axes)``, or None if shown.
        """
        from captum_llm_ext import plot

        return plot.bars(self.seq_attr.cpu(), labels=self.input_tokens, ax=ax, show=show)

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, title: str | None = None
    ) -> str:
        """One self-contained page: text, attributions on hover, nothing from the network.

        Args:
            path: Where to write it, if anywhere.
            title: Title of the page.

        Returns:
            The page.
        """
        from captum_llm_ext import html

        page = html.page(self.to_dict(), title=title)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def _repr_html_(self) -> str:
        from captum_llm_ext import html

        return html.fragment(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Everything but the coalitions, as lists, numbers and text that JSON can hold."""
        return {
            "format": _FORMAT,
            "prompt": [{"text": p.text, "feature": p.feature} for p in self.prompt_pieces],
            "output": [{"text": p.text, "feature": p.feature} for p in self.output_pieces],
            "target": self.target.tolist(),
            "input_tokens": list(self.input_tokens),
            "output_tokens": list(self.output_tokens),
            "output_features": self.output_features,
            "token_attr": _lists(self.token_attr),
            "token_attr_se": _lists(self.token_attr_se),
            "output_attr": _lists(self.output_attr),
            "output_attr_se": _lists(self.output_attr_se),
            "seq_attr": _lists(self.seq_attr),
            "output_probs": _lists(self.output_probs),
            "full_values": _lists(self.full_values),
            "empty_values": _lists(self.empty_values),
            "efficiency_gap": _lists(self.efficiency_gap),
            "levels": [
                {"name": level.name, "parts": level.parts, "part_of": level.part_of}
                for level in self.levels
            ],
            "n_evaluations": self.n_evaluations,
            "attr_target": self.provenance.get("attr_target", "log_prob"),
            "method": self.provenance.get("method", ""),
            "estimate": bool(self.provenance.get("estimate", False)),
            "provenance": self.provenance,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the result to one safetensors file: tensors as they are, the rest as JSON.

        The interpretable input is not a part of it.
        """
        from safetensors.torch import save_file  # transformers brings it

        tensors = {
            name: value.detach().cpu().contiguous().clone()
            for name in _TENSORS
            if (value := getattr(self, name)) is not None
        }
        rest = {
            "format": _FORMAT,
            **{name: getattr(self, name) for name in _NAMES},
            "n_evaluations": self.n_evaluations,
            "prompt_pieces": [[p.text, p.feature] for p in self.prompt_pieces],
            "output_pieces": [[p.text, p.feature] for p in self.output_pieces],
            "levels": [[level.name, level.parts, level.part_of] for level in self.levels],
            "provenance": self.provenance,
        }
        save_file(tensors, path, metadata={"captum_llm_ext": json.dumps(rest)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "GenerationAttributionResult":
        """Reads a result that `save` wrote; `inp` is None.

        Raises:
            ValueError: If the file is damaged, no result, or of a later format.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with cast(Any, safe_open)(path, framework="pt") as file:
                rest = json.loads((file.metadata() or {}).get("captum_llm_ext", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is damaged or no saved result ({error}): give a file written "
                "by `GenerationAttributionResult.save`."
            ) from error
        if rest is None:
            raise ValueError(
                f"{os.fspath(path)!r} is a safetensors file but no saved result: give one written "
                "by `GenerationAttributionResult.save`."
            )
        if rest.pop("format") > _FORMAT:
            raise ValueError(
                f"{os.fspath(path)!r} was written by a later version: update captum-llm-ext."
            )
        for name in ("prompt_pieces", "output_pieces"):
            rest[name] = [Piece(*piece) for piece in rest[name]]
        rest["levels"] = [Level(*level) for level in rest["levels"]]
        return cls(**tensors, **rest)

    def __repr__(self) -> str:
        features = len(self.output_features or ())
        return (
            f"GenerationAttributionResult({len(self.output_tokens)} target tokens × "
            f"({len(self.input_tokens)} prompt + {features} output features), "
            f"{self.provenance.get('method', 'attribution')}, {self.n_evaluations} evaluations)"
        )

    def __str__(self) -> str:
        """A table of the strongest causes of every target token.

        What lies within 1.96 standard errors, or below a hundredth of the largest attribution, is
        left out.
        """
        least = float(self.full_attr.abs().max()) / 100
        width = max(len(name) for name in self.output_tokens)
        lines = [repr(self)]
        for name, causes in zip(self.output_tokens, self.top(3), strict=True):
            shown = [
                str(cause)
                for cause in causes
                if abs(cause.attribution) >= least
                and not abs(cause.attribution) < 1.96 * cause.standard_error
            ]
            lines.append(f"{name:>{width}}  ←  {', '.join(shown) or 'nothing in particular'}")
        return "\n".join(lines)


def _lists(tensor: Tensor | None) -> Any:
    """Nested lists, None for what is not finite: JSON has no NaN."""
    if tensor is None:
        return None
    if tensor.dim() > 1:
        return [_lists(row) for row in tensor]
    return [
        value if finite else None
        for value, finite in zip(tensor.tolist(), tensor.isfinite().tolist(), strict=True)
    ]
