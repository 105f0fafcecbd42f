"""Attributions of the whole answer to the largest parts of the prompt.

They come from coalitions of their own: the players of this game (Owen's quotient game) are the few
parts of the prompt's coarsest level, and its value is the log-probability of the whole answer, held
as it is. A handful of evaluations beside those of the attribution answer what is read first.
"""

from collections.abc import Sequence

from captum_llm_ext.attribution.game import Game
from captum_llm_ext.attribution.sampling import Effort, sample
from captum_llm_ext.methods.estimators import Budget, estimator_of_few, is_known
from captum_llm_ext.result.answer import AnswerAttribution, is_at_hand, mean_and_error
from captum_llm_ext.result.levels import coarsest, levels_of
from captum_llm_ext.text.inputs import Prompt

# Share of an attribution's evaluations that this may take in addition, and a number that it always
# may: all coalitions of three parts. Chosen: an eighth hardly prolongs a run.
_SHARE, _LEAST = 1 / 8, 8
_STREAM = 0x5155  # distinguishes the seed of these draws from that of the attribution's own


def most_evaluations(n_evaluations: float) -> int:
    """The most evaluations that the whole answer may take, besides so many of the attribution."""
    return max(_LEAST, int(_SHARE * n_evaluations))


def attribute_answer(
    game: Game, estimator: str, n_evaluations: float, max_evaluations: int | None = None
) -> AnswerAttribution | None:
    """Attributes the whole answer to the parts of the prompt's coarsest level.

    Args:
        game: The game that was attributed.
        estimator: Name of the estimator that did.
        n_evaluations: What that cost, in evaluations of the model.
        max_evaluations: The user's limit on all evaluations.

    Returns:
        None if the game's own coalitions hold it (`answer_at_hand`), if the parts are too many for
        a share of these evaluations, if the values of tokens do not add up, or if the method has no
        such attributions.
    """
    scorer, prompt = game.run.scorer, game.run.prompt
    adds_up = scorer.attr_target != "prob" or len(game.target) == 1
    level, unions = _coarsest(prompt)
    if not adds_up or not is_known(game.run.method) or unions is None or max(unions) < 1:
        return None
    are_features = len(set(unions)) == prompt.n_features
    has_output = game.generated.n_causes > 0
    # Rows that were scored cost nothing, and that of the empty coalition tells the gain.
    is_free = estimator == "leave-one-out" and has_output and game.deterministic
    at_hand = is_at_hand(estimator, are_features=are_features, has_output=has_output)
    if at_hand and not is_free:
        return None
    most = most_evaluations(n_evaluations)
    if max_evaluations is not None:
        most = min(most, max_evaluations - scorer.n_evaluations)
    quotient = game.quotient(unions, game.run.seed ^ _STREAM)
    chosen = estimator_of_few(
        game.run.method, 1 + max(unions), most, deterministic=quotient.deterministic
    )
    if chosen is None:
        return None
    method, n_empty = chosen
    before = scorer.n_evaluations
    outcome = sample(quotient, method, Effort(Budget(), 1, None, None, n_empty))
    found, is_empty = outcome.solution, ~outcome.plan.masks.any(1)
    empty, error = mean_and_error(outcome.values[is_empty, 0])
    return AnswerAttribution(
        level,
        [unions[feature] for feature in prompt.columns],
        found.attributions[0],
        found.standard_errors[0],
        float(found.full_values[0]),
        empty,
        0.0 if quotient.deterministic else error,
        method.name,
        scorer.n_evaluations - before,
    )


def _coarsest(prompt: Prompt) -> tuple[str, Sequence[int] | None]:
    """The level of the largest parts, and each feature's part; None if it splits a feature."""
    columns, unit = prompt.columns, prompt.unit_name
    levels = levels_of(prompt.levels, prompt.pieces, unit, len(columns), prompt.n_features)
    level = coarsest(levels)
    if level is None:
        return unit, range(prompt.n_features)
    pairs = set(zip(columns, level["part_of"], strict=True))
    part_of = dict(pairs)
    return level["name"], None if len(pairs) > len(part_of) else [
        part_of[feature] for feature in range(prompt.n_features)
    ]
