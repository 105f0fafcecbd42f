"""How the coalitions of an attribution were planned and solved, as files hold it."""

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
        planned: Name of the estimator whose law the coalitions follow.
        solved: Name of the estimator that solved them, a key of `refit.SOLVERS`.
        options: Its options, such as the nesting of Owen values.
        n_features: Columns of the masks that were switched.
        n_anchors: See `Plan`.
        n_visible, required: See `Scope`.
        columns: Per prompt column of the result its feature.
        deterministic: Whether a coalition is worth the same every time.
        correction: Which of the coalitions say what a surrogate misses, if the others are its.
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
        """Numbers and text that JSON can hold."""
        data = asdict(self)
        if self.correction is None:  # as releases before it wrote and read
            del data["correction"]
        if not self.unchanging:
            del data["unchanging"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Design":
        """What `to_dict` gave, or JSON made of it."""
        design = cls(**data)
        design = replace(design, options=design.read_options(design.options))
        if (given := data.get("correction")) is not None:
            correction = Correction(**given)
            options = design.read_options(correction.options)
            design = replace(design, correction=replace(correction, options=options))
        return design

    def read_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a solver, converted back from JSON."""
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
        """Features that each target token can depend on."""
        return Scope(
            torch.tensor(self.n_visible, dtype=torch.int64, device="cpu"),
            torch.tensor(self.required, dtype=torch.int64, device="cpu"),
            unchanging=tuple(self.unchanging),
        )
