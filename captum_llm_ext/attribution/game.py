"""One attribution as a game: coalitions of features in, values of the target tokens out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from captum.attr._utils.attribution import PerturbationAttribution
from torch import Tensor

from captum_llm_ext.attribution.target import whole_row
from captum_llm_ext.coalitions import Plan, Scope, Solution, join_plans, plan_anchors
from captum_llm_ext.coalitions.owen_orders import Tree
from captum_llm_ext.coalitions.stopping import StoppingRule
from captum_llm_ext.contrast import Foils
from captum_llm_ext.methods import (
    HierarchicalAblation,
    PartitionShap,
    Unfold,
    nesting,
    tree_of_prompt,
)
from captum_llm_ext.methods.estimators import Budget, Estimator, estimator, is_known
from captum_llm_ext.methods.foreign import attribute_foreign
from captum_llm_ext.model import RowScorer, TokenRow
from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import LanguageModel
from captum_llm_ext.text.inputs import Context, GeneratedText, Prompt

# The value of the empty coalition enters every attribution: its draws are the cheapest accuracy.
_EMPTY_DRAWS = 32
_MOST_ROUNDS = 64
# With a tolerance, each round adds about this share of what there is.
_GROWTH = 0.25
# Rounds that hold nothing new cost no evaluation: they would never end a run.
_MOST_IDLE_ROUNDS = 8
# A forecast beyond it says no more than "long".
_MOST_EXCESS = 1e3
_NO_ERROR = (
    "`tol` and `stop` need standard errors, and here there are none (a lasso, or a single draw): "
    "leave them out, or give more samples or draws."
)
Inspect = Callable[[str, str, list[float]], None]


class Run:
    """What stays the same during one call of ``attribute``.

    Args:
        method: The attribution method.
        tokenizer: The model's tokenizer.
        prompt: The prompt.
        scorer: Where values come from.
        model: The model as baselines ask it.
        seed: Seeds every random choice.
        callback: Captum's hook.
    """

    def __init__(
        self,
        method: PerturbationAttribution,
        tokenizer: Any,
        prompt: Prompt,
        scorer: RowScorer,
        model: LanguageModel,
        seed: int,
        callback: Inspect | None = None,
    ) -> None:
        self.method, self.tokenizer = method, tokenizer
        self.context = Context(prompt, tokenizer, model)
        self.full = self.context.full
        self.scorer, self.seed, self.callback = scorer, seed, callback
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def prompt(self) -> Prompt:
        """The prompt, whose baselines know the model, and the answer once it is there."""
        return self.context.prompt


class Game:
    """Coalitions of prompt and generated features in, values of the target tokens out.

    A generated feature with no token after it can cause nothing: it is no player.

    Args:
        run: The call this belongs to.
        generated: The target.
        foils: What its tokens are held against, if that is what a value is.
        is_joint: Whether the one value of a coalition is the product over the target tokens.
    """

    def __init__(
        self,
        run: Run,
        generated: GeneratedText,
        foils: Foils | None = None,
        *,
        is_joint: bool = False,
    ) -> None:
        self.run, self.generated, self._is_joint = run, generated, is_joint
        self.foils, self.foil_ids = foils, None if foils is None else foils.tensor
        self._foil_values: list[Tensor] = []
        self.target = generated.target
        n_prompt = run.prompt.n_features
        n_generated = max(generated.n_visible)
        self.n_features = n_prompt + n_generated
        self.deterministic = run.prompt.deterministic and generated.deterministic
        n_visible = [n_prompt] if is_joint else [n + n_prompt for n in generated.n_visible]
        # What is no player is always present and need not be required.
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
        """One per column; prompt features that span several columns of results by all of them."""
        names = self.run.prompt.feature_names(" …")
        return [*names, *self.generated.names][: self.n_features]

    def joint(self) -> "Game":
        """The game of the target's joint probability, the output held fixed, as in captum."""
        fixed = self.run.context.generated(self.target, None, None)
        return Game(self.run, fixed, is_joint=True)

    @property
    def held(self) -> list[int]:
        """Columns that some target requires."""
        return sorted(set(self.scope.required.tolist()) - {-1})

    @property
    def foil_values(self) -> Tensor | None:
        """Log-probabilities of all foils of each target token, ``(n_coalitions, n_target)``.

        Of all coalitions that were scored, in the order in which they were asked for.
        """
        return None if self.foils is None else torch.cat(self._foil_values)

    def tree(self, hierarchy: Sequence[Any] | None) -> Tree:
        """The nesting of all columns: the user's, or that of the prompt's levels.

        Raises:
            ValueError: If it does not hold every feature once.
        """
        levels = [level.part_of for level in self.run.prompt.levels]
        return nesting(
            hierarchy,
            self.run.prompt.n_features,
            self.n_features,
            levels=levels,
            beyond=self._is_joint,
        )

    def values(self, plan: Plan, seed: int | None = None) -> Tensor:
        """Values ``(n_coalitions, n_target)``, NaN where a coalition gives a token none.

        Args:
            plan: The coalitions.
            seed: Draws of equal number are equal in all calls with the same seed.
        """
        run, n_prompt = self.run, self.run.prompt.n_features
        generator = run.generator if seed is None else torch.Generator().manual_seed(seed)
        masks = self.with_last_feature(plan.masks, True)
        prompts = run.prompt.render(masks[:, :n_prompt], generator, plan.draws)
        texts = self.generated.render(
            [prompt.ids for prompt in prompts], masks[:, n_prompt:], generator, plan.draws
        )
        rows = [
            TokenRow(ids, positions, prompt.extras, prompt.key)
            for prompt, (ids, positions) in zip(prompts, texts, strict=True)
        ]
        run.scorer.check_length(
            max(len(row.ids) for row in rows), "the longest coalition and the target"
        )
        values = run.scorer.values(rows, self.target, self.foil_ids)
        if self.foils is not None:
            own, foils = values.split(len(self.target), dim=1)
            values = own - foils
            self._foil_values.append(foils)
        if run.callback is not None:
            self._tell(run.callback, [prompt.ids for prompt in prompts], rows, values)
        return values.prod(1, keepdim=True) if self._is_joint else values

    @property
    def full_row(self) -> TokenRow:
        """What the model reads where everything is present."""
        return whole_row(self.run.full, self.generated)

    def with_last_feature(self, tensor: Tensor, value: float) -> Tensor:
        """Puts back the column of the last generated feature, which is no player."""
        missing = self.run.prompt.n_features + self.generated.n_features - tensor.shape[1]
        return torch.nn.functional.pad(tensor, (0, missing), value=value)

    def _tell(
        self,
        callback: Inspect,
        prompts: Sequence[tuple[int, ...]],
        rows: Sequence[TokenRow],
        values: Tensor,
    ) -> None:
        """Tells every distinct row to captum's hook."""
        response = tokens.decode(self.run.tokenizer, self.generated.ids)
        is_log = self.run.scorer.attr_target == "log_prob"
        for prompt, row, value in zip(prompts, rows, values, strict=True):
            if (row.ids, row.key) in self._seen:
                continue
            self._seen.add((row.ids, row.key))
            told = value.exp() if is_log else value
            joint = told.sum(0, keepdim=True) if self.foils else told.prod(0, keepdim=True)
            text = tokens.decode(self.run.tokenizer, prompt)
            callback(text, response, torch.cat([joint, told]).tolist())


@dataclass(frozen=True)
class Effort:
    """What the user allows one attribution to spend."""

    budget: Budget
    num_trials: int
    stop: StoppingRule | None
    max_evaluations: int | None


@dataclass(frozen=True)
class Outcome:
    """What was found, and how.

    `options` are those of the solver; `settled` says of what a stopping rule judged whether it was
    met, bool ``(n_target,)``, of the whole answer ``(1,)``.
    """

    name: str
    plan: Plan
    values: Tensor
    solution: Solution
    estimate: bool
    settled: Tensor | None = None
    stop: StoppingRule | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def stopping(self) -> dict[str, Any]:
        """For provenance: what the run stopped by, and where it was met."""
        if self.settled is None:
            return {"stop": None, "settled": None, "converged": None}
        settled = self.settled.tolist()
        return {"stop": str(self.stop), "settled": settled, "converged": all(settled)}


def solve(game: Game, effort: Effort, arguments: Mapping[str, Any]) -> Outcome:
    """Attributes the game with the method of its run.

    Args:
        game: What is played.
        effort: What may be spent.
        arguments: For methods that the package does not know: passed to their ``attribute``.

    Raises:
        ValueError: If the effort names what the method would ignore.
    """
    method = game.run.method
    if not is_known(method):
        return _drive(game, method, effort, arguments)
    chosen = estimator(
        method,
        game.n_features,
        effort.budget,
        deterministic=game.deterministic,
        tree=_tree(game, method),
        held=game.held,
        num_trials=effort.num_trials,
    )
    if chosen.unfold is not None:
        return _unfold(game, chosen, chosen.unfold, effort)
    return _sample(game, chosen, effort)


def _tree(game: Game, method: PerturbationAttribution) -> Tree:
    if isinstance(method, PartitionShap):
        return game.tree(method.hierarchy)
    if isinstance(method, HierarchicalAblation):
        prompt = game.run.prompt
        return tree_of_prompt(prompt.n_features, [level.part_of for level in prompt.levels])
    return ()


def _unfold(game: Game, method: Estimator, unfold: Unfold, effort: Effort) -> Outcome:
    """Scores what the values found so far say is worth it."""
    if effort.stop is not None or effort.num_trials > 1:
        raise ValueError(
            f"`tol`, `stop` and `num_trials` have no meaning for {method.name}, where the values "
            "decide what is scored next: leave them out, or give more `n_samples` or `n_draws`."
        )
    anchors = _anchors(game)
    seed = int(torch.randint(2**62, (), generator=game.run.generator, device="cpu"))
    ends = game.values(anchors)
    plan, values = unfold(partial(game.values, seed=seed), game.scope)
    plan, values = join_plans([anchors, plan]), torch.cat([ends, values])
    solution = method.solve(plan, values, game.scope)
    return Outcome(method.name, plan, values, solution, method.estimate, options=method.options)


def _anchors(game: Game) -> Plan:
    n_empty = 1 if game.deterministic else _EMPTY_DRAWS
    return plan_anchors(game.n_features, required=game.held, n_empty=n_empty)


def _sample(game: Game, method: Estimator, effort: Effort) -> Outcome:
    """Plans, scores and solves, in rounds until the stopping rule is met."""
    rule, generator, scorer = effort.stop, game.run.generator, game.run.scorer
    if rule is not None and not method.tells_error:
        raise ValueError(_NO_ERROR)
    first = [method.plan(generator) for _ in range(effort.num_trials)]
    plan = join_plans([_anchors(game), *first])
    values = game.values(plan)
    solution = _solved(game, method, plan, values)
    if rule is None:
        return Outcome(method.name, plan, values, solution, method.estimate, options=method.options)
    size, idle = len(first[0].masks), 0
    most = effort.max_evaluations or _MOST_ROUNDS * size
    excess = _excess(rule, game, method, plan, values, solution)
    while bool((excess > 1).any()) and method.estimate:
        # Solving everything again after every single round would cost more than the rounds.
        n_rounds = max(1, round(_GROWTH * len(plan.masks) / max(size, 1)))
        n_rounds = min(n_rounds, (most - scorer.n_evaluations) // max(size, 1))
        if effort.budget.grows and not effort.max_evaluations:
            # As many coalitions as without a rule; some of them are alike and cost nothing.
            planned = len(plan.masks) - plan.n_anchors
            n_rounds = min(n_rounds, (method.usual - planned) // max(size, 1))
        if n_rounds < 1 or idle > _MOST_IDLE_ROUNDS:
            break
        more = join_plans([method.plan(generator) for _ in range(n_rounds)])
        # Standard errors shrink with the square root of the evaluations.
        likely = scorer.n_evaluations * min(float(excess.max()), _MOST_EXCESS) ** 2
        scorer.forecast(round(min(likely, most)) - scorer.n_evaluations)
        plan = join_plans([plan, more])
        scored_before = scorer.n_evaluations
        values = torch.cat([values, game.values(more)])
        idle = idle + 1 if scorer.n_evaluations == scored_before else 0
        solution = _solved(game, method, plan, values)
        excess = _excess(rule, game, method, plan, values, solution)
    scorer.forecast(0)
    return Outcome(
        method.name,
        plan,
        values,
        solution,
        method.estimate,
        excess <= 1,
        rule,
        method.options,
    )


def _solved(game: Game, method: Estimator, plan: Plan, values: Tensor) -> Solution:
    """Attributions of all targets; of several processes each solves for some of the targets."""
    processes, n_target = game.run.scorer.processes, len(game.scope.n_visible)
    if processes.n_replicas == 1:
        return method.solve(plan, values, game.scope)
    # Several parts each, for all to be through at the same time; but what targets have in common
    # is computed once for each part.
    n_parts = min(4 * processes.n_replicas, n_target)
    borders = [i * n_target // n_parts for i in range(n_parts + 1)]
    parts = [slice(start, stop) for start, stop in pairwise(borders)]

    def solve(part: slice) -> Solution:
        return method.solve(plan, values[:, part], game.scope.part(part))

    return Solution.joined(processes.each(parts, solve))


def _excess(
    rule: StoppingRule,
    game: Game,
    method: Estimator,
    plan: Plan,
    values: Tensor,
    solution: Solution,
) -> Tensor:
    """How many times too large the errors are that a rule goes by.

    Raises:
        ValueError: If there is no standard error to go by.
    """
    if rule.of == "answer":
        # A token depends on nothing after it: the sum's attributions are the sums.
        whole = values.sum(1, keepdim=True)
        solution = method.solve(plan, whole, Scope.of_all(1, game.n_features))
    excess = rule.excess(solution)
    if bool(excess.isnan().any()):
        raise ValueError(_NO_ERROR)
    return excess


def _drive(
    game: Game,
    method: PerturbationAttribution,
    effort: Effort,
    arguments: Mapping[str, Any],
) -> Outcome:
    """Runs a method that the package does not know through its own ``attribute``."""
    name = type(method).__name__
    if effort.stop is not None or effort.budget.n_draws is not None:
        raise ValueError(
            f"`tol`, `stop` and `n_draws` would be ignored: {name} runs through its own "
            "`attribute`."
        )
    if (game.scope.required >= 0).any():
        raise ValueError(
            f"{name} runs through its own `attribute`, which cannot hold a generated word while "
            'its later tokens are explained: use `output_unit="token"` or None.'
        )
    if effort.budget.n_samples is not None:
        arguments = {**arguments, "n_samples": effort.budget.n_samples}
    anchors = plan_anchors(game.n_features)
    ends = game.values(anchors)
    found = attribute_foreign(
        method,
        game.values,
        game.n_features,
        n_target=len(game.scope.n_visible),
        num_trials=effort.num_trials,
        seed=game.run.seed,
        arguments=arguments,
    )
    later = torch.arange(game.n_features, device="cpu") >= game.scope.n_visible[:, None]
    attributions = found.attributions.masked_fill(later, 0.0)
    solution = Solution(
        attributions=attributions,
        standard_errors=torch.full_like(attributions, torch.nan).masked_fill(later, 0.0),
        full_values=ends[0],
        empty_values=ends[1],
    )
    plan = join_plans([anchors, found.plan])
    return Outcome(name, plan, torch.cat([ends, found.values]), solution, estimate=True)
