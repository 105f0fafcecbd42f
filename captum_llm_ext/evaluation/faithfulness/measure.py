"""`measure_faithfulness`: results of one target, measured on one input."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from captum.attr import InterpretableInput
from torch import Tensor

from captum_llm_ext.attribution.generation import GenerationAttribution
from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.evaluation.faithfulness.compatibility import (
    attributions_of,
    by_name,
    check_fit,
    span_of,
)
from captum_llm_ext.evaluation.faithfulness.game_metrics import (
    MetricSettings,
    as_attributions,
    measure,
)
from captum_llm_ext.evaluation.faithfulness.report import FaithfulnessReport
from captum_llm_ext.result import GenerationAttributionResult
from captum_llm_ext.result.causes import unit_of
from captum_llm_ext.result.foils import against_same
from captum_llm_ext.text.baselines import draw_generator
from captum_llm_ext.text.baselines.corpus.mismatch import is_mismatch
from captum_llm_ext.text.baselines.naming import UNSEEN, baseline_name, unseen
from captum_llm_ext.text.inputs import as_prompt
from captum_llm_ext.text.segment import Unit

Results = (
    GenerationAttributionResult
    | Mapping[str, GenerationAttributionResult]
    | Sequence[GenerationAttributionResult]
)
_MADE, _WHAT = "faithfulness is measured on", "metrics"
_BEST = (
    ", and below attributions made in the same way; by what stands in the same slot elsewhere they "
    "come out best."
)
# Relative to the value: more than rounding, even in half precision; chosen, not measured.
_SAME_MODEL = 0.01


def measure_faithfulness(
    attribution: GenerationAttribution,
    inp: InterpretableInput,
    results: Results,
    *,
    token: int | str | tuple[int, int] | None = None,
    k: int | Sequence[int] | None = None,
    n_draws: int = 8,
    n_orders: int = 8,
    n_coalitions: int = 128,
    max_steps: int = 20,
    output_unit: Unit | None = "token",
    output_baselines: Any = None,
    seed: int = 0,
    perturbations_per_eval: int | None = None,
    feature_mask: Tensor | None = None,
) -> FaithfulnessReport:
    """Measures the faithfulness of results: perturbation curves, ERASER's scores, LDS.

    Absent features are replaced by the *input's own* baselines, averaged over draws independent of
    those of ``attribute`` with the same seed. Use an input with `CorpusBaselines`: metrics that
    delete features, or replace them by one token, evaluate the model on texts it never saw, and
    most of them rank true causes barely above random (``benchmarks/faithfulness.py``).

    It takes up to ``n_draws`` × (2 × `max_steps` for every result + `max_steps` × `n_orders` +
    `n_coalitions`) evaluations, each row once, all in one call.

    Args:
        attribution: Its model, tokenizer and `attr_target` are used; its method is not.
        inp: The prompt, with the baselines of the measurement, which may differ from those of the
            results.
        results: One or several results of one target: by name, or a list, which is named by
            methods.
        token: A target token (position or name), or a span ``(start, stop)``: against all features
            before it, earlier output included. None: `seq_attr`, the whole target against the
            prompt's features, the output held fixed.
        k: For comprehensiveness and sufficiency: numbers of features. None: 1, 3 and 5, as far as
            there are as many features.
        n_draws: Draws of a random baseline.
        n_orders: Number of random orders as reference of curves.
        n_coalitions: Number of random coalitions of the linear datamodeling score.
        max_steps: Maximum number of steps of a curve, besides those at `k`.
        output_unit, output_baselines: As for ``attribute``, only with `token`; the unit is that of
            the results.
        feature_mask: As for ``attribute``, if the results were made with one.
        seed: Seeds all random choices.
        perturbations_per_eval: Maximum number of rows per batch.

    Returns:
        The report: every metric with a standard error, and that of random orders.

    Raises:
        ValueError: If a result is of another target, of other features or values than input and
            attribution, or an argument is out of range or would have no effect.
        TypeError: If an argument has the wrong type.

    Warns:
        UserWarning: If absent features are deleted or become one token, or are replaced from a
            corpus without matching places for most of them; if a result is of another model.
    """
    if not isinstance(attribution, GenerationAttribution):
        raise TypeError(
            f"`attribution` is a {type(attribution).__name__}: give a `GenerationAttribution`, "
            "such as `GenerationAttribution(ShapleyValueSampling(model), tokenizer)`; its method "
            "does not matter here."
        )
    named = by_name(results)
    settings = MetricSettings(k, n_orders, n_coalitions, max_steps=max_steps, seed=seed)
    if token is None and (output_baselines is not None or output_unit != "token"):
        raise ValueError(
            "`output_unit` and `output_baselines` have no meaning for the whole target, whose "
            "output is held fixed: leave them out, or give a `token`."
        )
    prompt = attribution.with_absence(as_prompt(inp, attribution.tokenizer, feature_mask))
    check_fit(named, prompt, attribution)
    first = next(iter(named.values()))
    attribution = against_same(attribution, first)
    span = None if token is None else span_of(first, token)
    game = attribution.to_game(
        inp,
        first.target,
        token=span,
        output_unit=None if span is None else output_unit,
        output_baselines=output_baselines,
        n_draws=n_draws,
        normalize=False,
        seed=_seed_of_draws(seed),
        perturbations_per_eval=perturbations_per_eval,
        feature_mask=feature_mask,
    )
    earlier = game.player_names[prompt.n_features :]
    attributions = {
        name: as_attributions(
            f"results[{name!r}]", attributions_of(name, result, span, prompt, earlier), game
        )
        for name, result in named.items()
    }
    absent = {"prompt": prompt.own_baseline}
    if earlier:
        absent["output"] = prompt.output_baseline if output_baselines is None else output_baselines
    if is_mismatch(prompt.own_baseline, lambda: game.matches):
        _warn_of_unlike()
    _warn_of_absence(absent.values())
    _warn_of_another_model(named, span, game.grand_coalition_value)
    return measure(
        attributions,
        game,
        settings,
        features=list(game.player_names),
        unit=unit_of(first),
        target=_target(first, span),
        absence=_absence(absent),
    )


def _seed_of_draws(seed: int) -> int:
    """A seed whose draws differ from those of attributions with `seed`."""
    return int(torch.randint(2**62, (), generator=draw_generator(seed, 0), device="cpu"))


def _warn_of_absence(baselines: Iterable[object]) -> None:
    """Warns if absence makes texts unlike any that the model was trained on."""
    message = unseen(baselines, _MADE, _WHAT)
    if message is not None:
        warn_user(f"{message}{_BEST} Give the input `baselines=CorpusBaselines(texts)`.")


def _warn_of_unlike() -> None:
    warn_user(
        "Absent features are replaced by arbitrary text of an unrelated corpus, which has no "
        f"similar context for most of them: {_MADE} {UNSEEN.format(what=_WHAT)}{_BEST} Give "
        "`CorpusBaselines` texts of the same kind as the prompt.",
    )


def _warn_of_another_model(
    results: Mapping[str, GenerationAttributionResult], span: tuple[int, int] | None, full: float
) -> None:
    """Warns if a result has another value of the whole text, which no baseline changes."""
    for name, result in results.items():
        values = result.full_values[slice(*span or (None,))].detach().cpu().double()
        is_probability = result.provenance.get("attr_target") == "prob"
        known = float(values.prod() if is_probability else values.sum())
        if abs(known - full) > _SAME_MODEL * max(abs(known), abs(full), 1e-3):
            warn_user(
                f"The model gives the target {full:.4g}, {name!r} explains {known:.4g}: it comes "
                "from another model, or from other settings of it.",
            )


def _target(result: GenerationAttributionResult, span: tuple[int, int] | None) -> str:
    if span is None:
        return "the whole target"
    return repr(" ".join(result.output_tokens[slice(*span)]))


def _absence(baselines: Mapping[str, object]) -> str:
    kinds = {where: baseline_name(baseline) for where, baseline in baselines.items()}
    if len(set(kinds.values())) == 1:
        return kinds["prompt"]
    return ", ".join(f"{kind} ({where})" for where, kind in kinds.items())
