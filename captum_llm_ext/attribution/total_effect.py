"""The total effect of a feature: how a token's log-probability falls if the answer is regenerated
without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext.attribution.game import Run
from captum_llm_ext.base.amounts import plus_minus
from captum_llm_ext.base.arguments import position_of
from captum_llm_ext.base.terminal import one_line
from captum_llm_ext.coalitions.clustered_errors import normal_scale
from captum_llm_ext.model import Generation, Scorer, TokenRow
from captum_llm_ext.text import tokens
from captum_llm_ext.text.inputs import GeneratedText, RenderedPrompt

# Answers to the original prompt are reweighted for a changed one if their effective number is at
# least this share of them. Chosen, not measured.
_ENOUGH = 0.8  # effective sample size over the number of answers
_NEAR_ONE = 0.2  # maximum distance of the mean weight from 1; chosen, not measured
_MOST_SEEDS = 2**31


@dataclass(frozen=True)
class TotalEffect:
    """Effects of features on each target token, including those through all that is generated
    because of them.

    ``F`` is the number of features and ``T`` that of target tokens; values are in nats.

    Attributes:
        names: Names of the features, ``F``.
        features: Indices of the features, ``F``.
        output_tokens: Names of the target tokens, ``T``.
        values: ``(F, T)``: mean log-probability of a token at its aligned position in answers to
            the original prompt, minus that in answers without the feature.
        standard_errors: Standard errors of `values`, ``(F, T)``.
        direct: ``(F, T)``: the same with the answer held fixed.
        full_values: ``(T,)``: the mean over answers to the original prompt.
        is_regenerated: ``F``: whether answers were generated without the feature; otherwise answers
            to the original prompt were reweighted.
        answers: Per feature index the answers that were generated; first, under -1, those to the
            original prompt.
        n_generated: Number of answers generated.
        n_evaluations: Distinct rows scored.
    """

    names: list[str]
    features: list[int]
    output_tokens: list[str]
    values: Tensor
    standard_errors: Tensor
    direct: Tensor
    full_values: Tensor
    is_regenerated: list[bool]
    answers: dict[int, list[str]]
    n_generated: int
    n_evaluations: int
    _deviations: Tensor = field(repr=False)

    def span(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Effects on a span of target tokens, such as those of a word.

        Args:
            start, stop: The span, as in a slice; by default the whole answer.

        Returns:
            Effects in nats ``(F,)`` and their standard errors, including the covariance of the
            tokens.
        """
        together = self._deviations[..., start:stop].sum(-1)
        return self.values[:, start:stop].sum(1), _standard_error(together)

    def table(self, k: int = 3) -> str:
        """The largest total effects on every token, beside the direct ones.

        Args:
            k: Maximum number of features per token.
        """
        names = [one_line(name.strip()) for name in self.output_tokens]
        longest = max(map(len, names))
        lines = [self.summary]
        for t, name in enumerate(names):
            order = self.values[:, t].abs().argsort(descending=True, stable=True)[:k].tolist()
            shown = [shown for f in order if (shown := self._shown_effect(f, t))]
            lines.append(f"{name:>{longest}}  ⇐  {', '.join(shown) or 'nothing in particular'}")
        return "\n".join(lines)

    def _shown_effect(self, feature: int, t: int) -> str:
        """An effect as text; empty if it is within its error."""
        value, error, direct = (
            float(held[feature, t]) for held in (self.values, self.standard_errors, self.direct)
        )
        if abs(value) < 0.005 or abs(value) <= 1.96 * error:
            return ""
        name = one_line(self.names[feature].strip())
        return f"{name} {value:+.2f}{plus_minus(error)} (directly {direct:+.2f})"

    @property
    def summary(self) -> str:
        """One line on what was computed."""
        return (
            f"Total effects of {len(self.names)} features on {len(self.output_tokens)} target "
            f"tokens, in nats: {self.n_generated} answers written, {self.n_evaluations} rows scored"
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold."""
        own = {n: v for n, v in vars(self).items() if not n.startswith("_")}
        held = {n: v.tolist() if isinstance(v, Tensor) else v for n, v in own.items()}
        return held | {"answers": {str(f): texts for f, texts in self.answers.items()}}

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"TotalEffect({self.summary})"


def total_effect(
    run: Run,
    generated: GeneratedText,
    generation: Generation,
    scorer: Scorer,
    *,
    feature: int | str | Sequence[int | str] | None,
    n_samples: int,
    may_weight: bool = True,
) -> TotalEffect:
    """See `GenerationAttribution.total_effect`.

    Args:
        run: The prompt, tokenizer and scorer.
        generated: The target, held fixed.
        generation: How answers are regenerated.
        scorer: Computes log-probabilities.
        feature, n_samples: As for `GenerationAttribution.total_effect`.
        may_weight: Whether answers are sampled from the model's own distribution, so that
            likelihood ratios give their probability under another prompt.
    """
    names = run.prompt.feature_names()
    chosen = _chosen(feature, names)
    writer = _Writer(run, generated, generation, scorer, n_samples)
    full = [run.full] * n_samples
    written = writer.answers(full)
    before = writer.values(full, written)
    likely = writer.log_probs(full, written)
    values, deviations, direct, anew = [], [], [], []
    answers = {-1: [writer.text(ids) for ids in written]}
    as_it_is = writer.values(full[:1], [writer.target])[0]
    for number in chosen:
        prompts = writer.without(number)
        direct.append(as_it_is - writer.values(prompts, [writer.target] * n_samples).mean(0))
        # (n_samples, T): likelihood ratios of what is generated before each token's position.
        ratios = [
            now.cumsum(0) - then.cumsum(0)
            for now, then in zip(writer.log_probs(prompts, written), likely, strict=True)
        ]
        weights = writer.at_places(ratios, written).exp()
        is_anew = not may_weight or not _are_enough(weights)
        answered = written
        if is_anew:
            answered = writer.answers(prompts)
            weights = torch.ones_like(weights)
        after = writer.values(prompts, answered)
        effect, deviation = _difference(before, after, weights)
        values.append(effect)
        deviations.append(deviation)
        anew.append(is_anew)
        answers[number] = [writer.text(ids) for ids in answered]
    return TotalEffect(
        names=[names[number] for number in chosen],
        features=chosen,
        output_tokens=list(generated.labels),
        values=torch.stack(values),
        standard_errors=_standard_error(torch.stack(deviations)),
        direct=torch.stack(direct),
        full_values=before.mean(0),
        is_regenerated=anew,
        answers=answers,
        n_generated=writer.n_generated,
        n_evaluations=scorer.n_evaluations,
        _deviations=torch.stack(deviations),
    )


class _Writer:
    """Regenerates answers and scores target tokens at their positions in them."""

    def __init__(
        self,
        run: Run,
        generated: GeneratedText,
        generation: Generation,
        scorer: Scorer,
        n_samples: int,
    ) -> None:
        self._run, self._generation, self._scorer = run, generation, scorer
        self._n_samples, self.target, self.n_generated = n_samples, generated.ids, 0
        self._ids = torch.tensor(generated.ids, dtype=torch.int64, device="cpu")
        draw = run.generator
        self._seed = int(torch.randint(2**62, (), generator=draw, device="cpu"))
        self._seeds = torch.randint(
            _MOST_SEEDS, (n_samples,), generator=draw, device="cpu"
        ).tolist()
        self._known: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}

    def without(self, feature: int) -> list[RenderedPrompt]:
        """The prompt with the feature replaced, in another draw for each continuation."""
        n = self._run.prompt.n_features
        masks = torch.ones(self._n_samples, n, dtype=torch.bool, device="cpu")
        masks[:, feature] = False
        generator = torch.Generator().manual_seed(self._seed)
        return self._run.prompt.render(masks, generator)

    def answers(self, prompts: Sequence[RenderedPrompt]) -> list[tuple[int, ...]]:
        """The answers to the prompts; equal for equal prompts and sample numbers."""
        keys = [(prompt.ids, number) for number, prompt in enumerate(prompts)]
        new = [number for number, key in enumerate(keys) if key not in self._known]
        rows = [TokenRow(p.ids, (), p.extras, p.key) for p in (prompts[i] for i in new)]
        seeds = [self._seeds[number] for number in new]
        for number, ids in zip(
            new, self._scorer.generate_each(rows, self._generation, seeds), strict=True
        ):
            self._known[keys[number]] = tuple(ids.tolist())
        self.n_generated += len(new)
        return [self._known[key] for key in keys]

    def values(
        self, prompts: Sequence[RenderedPrompt], answers: Sequence[tuple[int, ...]]
    ) -> Tensor:
        """Log-probabilities of the target tokens at their aligned positions, ``(n_answers,
        n_target)``.
        """
        rows: list[TokenRow] = []
        owner: list[int] = []
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            for ids, positions in _readings(self.target, answer, len(prompt.ids)):
                rows.append(TokenRow((*prompt.ids, *ids), positions, prompt.extras, prompt.key))
                owner.append(i)
        scored = self._scorer.values(rows, self._ids).nan_to_num()
        found = torch.zeros(len(prompts), len(self._ids), dtype=torch.float64, device="cpu")
        return found.index_add_(0, torch.tensor(owner, dtype=torch.int64, device="cpu"), scored)

    def log_probs(
        self, prompts: Sequence[RenderedPrompt], answers: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """Log-probabilities of the answers' own tokens after their prompts, ``(length,)`` each."""
        found: list[Tensor] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if not answer:
                found.append(torch.zeros(0, dtype=torch.float64, device="cpu"))
                continue
            last = len(prompt.ids) - 1
            row = TokenRow(
                (*prompt.ids, *answer[:-1]),
                range(last, last + len(answer)),
                prompt.extras,
                prompt.key,
            )
            answer_ids = torch.tensor(answer, dtype=torch.int64, device="cpu")
            found.append(self._scorer.values([row], answer_ids)[0])
        return found

    def at_places(self, sums: Sequence[Tensor], answers: Sequence[tuple[int, ...]]) -> Tensor:
        """Running sums over answers, taken at the aligned position of each target token."""
        found = torch.zeros(len(answers), len(self._ids), dtype=torch.float64, device="cpu")
        for i, (own, answer) in enumerate(zip(sums, answers, strict=True)):
            for t, (n_written, _) in enumerate(places(self.target, answer)):
                found[i, t] = own[n_written - 1] if n_written else 0.0
        return found

    def text(self, ids: tuple[int, ...]) -> str:
        """The text of an answer."""
        return tokens.decode(self._run.tokenizer, ids)


def places(target: Sequence[int], answer: Sequence[int]) -> list[tuple[int, int]]:
    """The aligned position of each target token in another answer.

    Args:
        target: Explained token ids.
        answer: Regenerated token ids.

    Returns:
        Per target token, the number of tokens of the answer, and of target tokens after these, that
        precede it: the latter are those of the same differing segment.
    """
    found: list[tuple[int, int]] = []
    matcher = SequenceMatcher(None, target, answer, autojunk=False)
    for kind, a, b, c, _ in matcher.get_opcodes():
        found += [(c + i, 0) if kind == "equal" else (c, i) for i in range(b - a)]
    return found


def _readings(
    target: Sequence[int], answer: Sequence[int], n_before: int
) -> list[tuple[tuple[int, ...], list[int]]]:
    """The texts to score so that every target token occurs in one of them, and its position."""
    at = places(target, answer)
    whole = [n_before + n - 1 if not own else -1 for n, own in at]
    most = max((n for n, own in at if not own), default=0)
    found = [(tuple(answer[:most]), whole)]
    stretches = sorted({n for n, own in at if own})
    for n in stretches:
        ours = [t for t, (begin, own) in enumerate(at) if begin == n and own]
        first = ours[0] - at[ours[0]][1]
        positions = [-1] * len(target)
        for t in ours:
            positions[t] = n_before + n + at[t][1] - 1
        found.append(((*answer[:n], *target[first : ours[-1]]), positions))
    return found


def _difference(before: Tensor, after: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A mean minus a weighted mean, and the influence of each sample on it.

    Samples with equal index share a seed and form pairs. The difference has shape ``(n_target,)``,
    the influences ``(n_samples, n_target)``.
    """
    weights = weights / weights.mean(0).clamp_min(1e-300)
    effect = before.mean(0) - (weights * after).mean(0)
    influence = (before - before.mean(0)) - weights * (after - (weights * after).mean(0))
    return effect, influence


def _standard_error(deviations: Tensor) -> Tensor:
    """Standard errors of means from influences of samples: ``(F, n_samples, …)`` to ``(F, …)``."""
    n = deviations.shape[1]
    if n < 2:
        return torch.full_like(deviations[:, 0], torch.nan)
    return deviations.std(1) / n**0.5 * normal_scale(n - 1)


def _are_enough(weights: Tensor) -> bool:
    """Whether reweighted answers can replace regenerated ones, at every position."""
    mean = weights.mean(0)
    effective = weights.sum(0).square() / weights.square().sum(0).clamp_min(1e-300)
    near = (mean - 1).abs() <= _NEAR_ONE
    return bool((near & (effective >= _ENOUGH * len(weights))).all())


def _chosen(feature: int | str | Sequence[int | str] | None, names: Sequence[str]) -> list[int]:
    if feature is None:
        return list(range(len(names)))
    if isinstance(feature, int | str):
        feature = [feature]
    return [position_of(one, names, "feature") for one in feature]
