"""How the coalitions of an attribution were planned and solved, as stored in files."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from captum_llm_ext.coalitions import Scope
from captum_llm_ext.coalitions.owen_orders import as_tree
from captum_llm_ext.coalitions.two_levels import Correction


@dataclass(frozen=True)
class Design:
    """Everything needed to solve the coalitions of an attribution again.

    Attributes:
        planned: Name of the estimator whose distribution the coalitions follow.
        solved: Name of the estimator that solved them, a key of `refit.SOLVERS`.
        options: Its options, such as the hierarchy of Owen values.
        n_features: Number of players: columns of the masks that vary.
        n_anchors: See `Plan`.
        n_visible, required: See `Scope`.
        columns: Feature of each prompt column of the result.
        deterministic: Whether a coalition has the same value every time.
        correction: Which coalitions estimate the difference to a surrogate, if one was used.
        unchanging: See `Scope`.
    """

    planned: str
    solved: str
    options: Mapping[str, Any]
    n_features: int
    n_anchors: int
    n_visible: list[int]
    required: list[int]
    columns: list[int]
    deterministic: bool
    correction: Correction | None = None
    unchanging: list[int] = field(default_factory=list[int])

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        data = asdict(self)
        if self.correction is None:  # as earlier releases wrote and read it
            del data["correction"]
        if not self.unchanging:
            del data["unchanging"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Design":
        """Restores a design from the dictionary of `to_dict`, also after JSON."""
        design = cls(**data)
        design = replace(design, options=design.read_options(design.options))
        if (given := data.get("correction")) is not None:
            correction = Correction(**given)
            options = design.read_options(correction.options)
            design = replace(design, correction=replace(correction, options=options))
        return design

    def read_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a solver, restored from JSON."""
        options = dict(options)
        if "tree" in options:
            is_of_prompt = self.solved == "hierarchical search"
            n_nested = 1 + max(self.columns) if is_of_prompt else self.n_features
            options["tree"] = as_tree(options["tree"], n_nested)
        return options

    @property
    def is_additive(self) -> bool:
        """Whether attributions of summed values are the sums of attributions."""
        return self.options.get("penalty") != "l1"

    @property
    def scope(self) -> Scope:
        """The features that each target token can depend on."""
        return Scope(
            torch.tensor(self.n_visible, dtype=torch.int64, device="cpu"),
            torch.tensor(self.required, dtype=torch.int64, device="cpu"),
            unchanging=tuple(self.unchanging),
        )
