"""An attribution as a cooperative game: coalitions of features in, values of target tokens out."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from captum.attr._utils.attribution import PerturbationAttribution
from torch import Tensor

from captum_llm_ext.attribution.draw_log import DrawLog
from captum_llm_ext.attribution.target import whole_row
from captum_llm_ext.coalitions import Plan, Scope
from captum_llm_ext.coalitions.owen_orders import Tree
from captum_llm_ext.contrast import FoilContext, Foils
from captum_llm_ext.methods import nesting
from captum_llm_ext.model import RowScorer, TokenRow
from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import LanguageModel
from captum_llm_ext.text.inputs import (
    Context,
    GeneratedText,
    Prompt,
    render_text,
)

Inspect = Callable[[str, str, list[float]], None]


class Run:
    """What stays fixed during one call of ``attribute``.

    Args:
        method: The attribution method.
        tokenizer: The model's tokenizer.
        prompt: The prompt.
        scorer: Computes values.
        model: The model as baselines use it.
        seed: Seeds every random choice.
        callback: Captum's ``_inspect_forward``.
        surrogate: Approximates the values of `scorer` at lower cost.

    Attributes:
        work_of_model: Cost of a row for `scorer`, relative to the surrogate.
        foil_context: Prompt and target for the search of foils, once there is a target.
    """

    foil_context: FoilContext

    def __init__(
        self,
        method: PerturbationAttribution,
        tokenizer: Any,
        prompt: Prompt,
        scorer: RowScorer,
        model: LanguageModel,
        seed: int,
        callback: Inspect | None = None,
        surrogate: RowScorer | None = None,
    ) -> None:
        self.surrogate, self.work_of_model = surrogate, 1.0
        self.method, self.tokenizer = method, tokenizer
        self.context = Context(prompt, tokenizer, model)
        self.full = self.context.full
        self.scorer, self.seed, self.callback = scorer, seed, callback
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def prompt(self) -> Prompt:
        """The prompt, whose baselines know the model and, once it exists, the answer."""
        return self.context.prompt


class Game:
    """Coalitions of prompt and generated features in, values of the target tokens out.

    A generated feature that precedes no target token can cause nothing: it is not a player.

    Args:
        run: The settings of the call.
        generated: The target.
        foils: The alternatives of a contrast; None otherwise.
        whole: If a coalition has a single value, how it follows from those of the target tokens.
        unions: Per prompt feature the index of its union: the players are then the unions. Only
            without features of the target.
    """

    def __init__(
        self,
        run: Run,
        generated: GeneratedText,
        foils: Foils | None = None,
        *,
        whole: Literal["product", "sum"] | None = None,
        unions: Sequence[int] | None = None,
    ) -> None:
        self.run, self.generated, self._whole, self._unions = run, generated, whole, unions
        self.foils, self.foil_ids = foils, None if foils is None else foils.tensor
        self._foil_values: list[Tensor] = []
        self.target = generated.target
        n_prompt = run.prompt.n_features if unions is None else 1 + max(unions)
        n_generated = generated.n_causes
        self.n_features = n_prompt + n_generated
        self.draw_log = DrawLog(
            lambda feature: feature if unions is None else unions[feature],
            lambda feature: n_prompt + feature,
        )
        self.deterministic = run.prompt.deterministic and generated.deterministic
        n_visible = [n_prompt] if whole else [n + n_prompt for n in generated.n_visible]
        # Features that are not players are always present and need not be required.
        required = [
            -1 if g is None or g >= n_generated else g + n_prompt for g in generated.required
        ]
        self.scope = Scope(
            n_visible=torch.tensor(n_visible, dtype=torch.int64, device="cpu"),
            required=torch.tensor(required[: len(n_visible)], dtype=torch.int64, device="cpu"),
        )
        self._seen: set[tuple[tuple[int, ...], object]] = set()

    @property
    def names(self) -> list[str]:
        """One name per column; a feature that spans several result columns has all their names."""
        names = self.run.prompt.feature_names(" …")
        return [*names, *self.generated.names][: self.n_features]

    def joint(self) -> "Game":
        """The game of the target's joint probability with the output held fixed, as in captum."""
        fixed = self.run.context.generated(self.target, None, None)
        return Game(self.run, fixed, whole="product")

    def quotient(self, unions: Sequence[int], seed: int) -> "Game":
        """The game between unions of prompt features over the whole target, which is held fixed.

        Named after the quotient game of Owen (1977, "Values of games with a priori unions"). Its
        value is the sum over the target tokens: the log-probability of the whole.

        Args:
            unions: Per prompt feature the index of its union.
            seed: Seeds its draws; those of this game are unaffected.
        """
        run = copy.copy(self.run)
        run.generator = torch.Generator().manual_seed(seed)
        run.surrogate = None
        fixed = run.context.generated(self.target, None, None)
        game = Game(run, fixed, self.foils, whole="sum", unions=unions)
        game._seen = self._seen
        return game

    @property
    def held(self) -> list[int]:
        """Columns that some target token requires."""
        return sorted(set(self.scope.required.tolist()) - {-1})

    @cached_property
    def solved_scope(self) -> Scope:
        """The scope, with the columns that replacements leave unchanged.

        Calls the baselines for every slot, as scoring has already done.
        """
        n_prompt, unions = self.run.prompt.n_features, self._unions
        n_seen = 0 if unions is not None else self.n_features - n_prompt
        mask = torch.ones(1, n_prompt + self.generated.n_features, dtype=torch.bool, device="cpu")
        mask[0, list(self.run.prompt.unchanging())] = False
        mask[0, [n_prompt + g for g in self.generated.unchanging(n_seen)]] = False
        if bool(mask.all()):
            return self.scope
        # A text replaced by itself may be tokenised differently.
        generator = torch.Generator().manual_seed(0)
        (row,) = render_text(self.run.prompt, self.generated, mask, generator)
        if row.ids != self.full_row.ids:
            return self.scope
        unchanging: list[int] = (~mask[0]).nonzero()[:, 0].tolist()
        if unions is not None:
            changing = {u for u, is_own in zip(unions, mask[0].tolist(), strict=False) if is_own}
            unchanging = [u for u in range(self.n_features) if u not in changing]
        return replace(self.scope, unchanging=tuple(unchanging))

    @property
    def foil_values(self) -> Tensor | None:
        """Log-probabilities of all foils of each target token, ``(n_coalitions, n_target)``.

        For all coalitions scored so far, in order of scoring.
        """
        return None if self.foils is None else torch.cat(self._foil_values)

    def tree(self, hierarchy: Sequence[Any] | None) -> Tree:
        """The hierarchy of all columns: the user's, or that of the prompt's levels.

        Raises:
            ValueError: If it does not contain every feature exactly once.
        """
        levels = [level.part_of for level in self.run.prompt.levels]
        return nesting(
            hierarchy,
            self.run.prompt.n_features,
            self.n_features,
            levels=levels,
            beyond=self._whole is not None,
        )

    def values(self, plan: Plan, seed: int | None = None) -> Tensor:
        """Values ``(n_coalitions, n_target)``, NaN where a coalition lacks what a token requires.

        Args:
            plan: The coalitions and their draws.
            seed: Equal draw numbers give equal draws in all calls with the same seed.
        """
        return self.scored(plan, [self.run.scorer], seed)[0]

    def scored(
        self, plan: Plan, scorers: Sequence[RowScorer], seed: int | None = None
    ) -> list[Tensor]:
        """Like `values`, by several scorers that are given the same rows."""
        run = self.run
        generator = run.generator if seed is None else torch.Generator().manual_seed(seed)
        masks = plan.masks if self._unions is None else plan.masks[:, list(self._unions)]
        texts = render_text(run.prompt, self.generated, masks, generator, plan.draws)
        rows = [
            TokenRow(text.ids, text.positions, text.prompt.extras, text.prompt.key)
            for text in texts
        ]
        longest = max(len(row.ids) for row in rows)
        self.draw_log.add(texts)
        found: list[Tensor] = []
        for scorer in scorers:
            scorer.check_length(longest, "the longest coalition and the target")
            values = scorer.values(rows, self.target, self.foil_ids)
            if self.foils is not None:
                own, foils = values.split(len(self.target), dim=1)
                values = own - foils
                self._foil_values.append(foils)
            if run.callback is not None and scorer is run.scorer:
                self._report(run.callback, [text.prompt.ids for text in texts], rows, values)
            if self._whole is not None:
                values = values.sum(1, True) if self._whole == "sum" else values.prod(1, True)
            found.append(values)
        return found

    @property
    def n_foil_values(self) -> int:
        """Number of batches of foil values recorded: one for each scorer called."""
        return len(self._foil_values)

    def reorder_foil_values(self, order: Sequence[int]) -> None:
        """Reorders the recorded foil values."""
        self._foil_values = [self._foil_values[i] for i in order] if self.foils else []

    @property
    def full_row(self) -> TokenRow:
        """The row with every feature present."""
        return whole_row(self.run.full, self.generated)

    def masks_of_all_features(self, plan: Plan) -> Tensor:
        """The plan's masks, with a column for the last generated feature, which is not a player."""
        n_missing = self.run.prompt.n_features + self.generated.n_features - plan.n_features
        return torch.nn.functional.pad(plan.masks, (0, n_missing), value=True)

    def _report(
        self,
        callback: Inspect,
        prompts: Sequence[tuple[int, ...]],
        rows: Sequence[TokenRow],
        values: Tensor,
    ) -> None:
        """Passes every distinct row to captum's hook."""
        response = tokens.decode(self.run.tokenizer, self.generated.ids)
        is_log = self.run.scorer.attr_target == "log_prob"
        for prompt, row, value in zip(prompts, rows, values, strict=True):
            if (row.ids, row.key) in self._seen:
                continue
            self._seen.add((row.ids, row.key))
            probabilities = value.exp() if is_log else value
            joint = (
                probabilities.sum(0, keepdim=True)
                if self.foils
                else probabilities.prod(0, keepdim=True)
            )
            text = tokens.decode(self.run.tokenizer, prompt)
            callback(text, response, torch.cat([joint, probabilities]).tolist())
