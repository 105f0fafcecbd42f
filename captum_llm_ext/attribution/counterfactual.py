"""Counterfactuals: the fewest features whose replacement changes a target token into another.

Features are replaced by the draws of the input's baselines. Sets are tried by size, the most
promising first; one row per set and draw serves all target tokens.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from functools import cached_property
from itertools import combinations, islice
from math import comb
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from captum_llm_ext.attribution.game import Run
from captum_llm_ext.attribution.target import whole_row
from captum_llm_ext.base.amounts import probability
from captum_llm_ext.base.terminal import one_line, spelled
from captum_llm_ext.model import Generation, Processes, Scorer, TokenRow
from captum_llm_ext.model.plain_forward import plain_log_probs
from captum_llm_ext.text import tokens
from captum_llm_ext.text.inputs import GeneratedText, RenderedPrompt

# Default number of rows of a search. Chosen, not measured: 60 features take 60 rows per draw and
# their 1,770 pairs as many; of the 34,220 triples the most promising are tried. (The documents with
# 21 features in `benchmarks/results/counterfactuals.json` took 21 rows.) `summary` reports how many
# sets of each size were tried.
BUDGET = 2000
# Rows scored between two reports, so that the first counterfactual is reported early. Chosen, not
# measured: fewer give smaller batches, more delay the first report.
_ROWS_AT_ONCE = 32
# Sets of one size that are ranked at most: a few seconds of Python (chosen, not measured). Beyond
# it, only the features that came nearest to a flip by themselves are combined.
_MOST_COMBINATIONS = 200_000


class Flip(NamedTuple):
    """What happened to a target token when some features were replaced.

    Attributes:
        position: Position of the target token.
        token: Its text.
        new_token: Text of the likeliest token at this position after the replacement.
        log_prob: Log-probability of the target token with everything present, in nats.
        new_log_prob: Log-probability of the target token after the replacement, in nats.
    """

    position: int
    token: str
    new_token: str
    log_prob: float
    new_log_prob: float


Flips = Literal["argmax"] | float | Callable[[Flip], bool]
Features = frozenset[int]


@dataclass(frozen=True)
class Counterfactual:
    """A replacement of few features that changes a target token into another.

    Attributes:
        token: Position of the target token.
        name: Its text.
        features: Indices of the replaced features.
        names: Their names.
        replacements: (original, replacement) texts in reading order.
        new_token: The likeliest token at this position after the replacement.
        values: Log-probabilities in nats, from a separate forward pass: of the target token with
            everything present, of the target token after the replacement, and of `new_token` after
            it.
        prompt_text: The changed prompt.
        answer: What the model generates after the changed prompt.
        old_answer: The explained answer.
        share_of_draws: Share of the baseline draws that change the token.
        proven_minimal: Whether every proper subset was tried, with all draws, and changed nothing.
        n_evaluations: Distinct rows scored so far.
    """

    token: int
    name: str
    features: tuple[int, ...]
    names: tuple[str, ...]
    replacements: tuple[tuple[str, str], ...]
    new_token: str
    values: tuple[float, float, float]
    prompt_text: str
    answer: str
    old_answer: str
    share_of_draws: float
    proven_minimal: bool
    n_evaluations: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Counterfactual":
        """Restores a counterfactual from the dictionary of `to_dict`, also after JSON."""
        held = dict(data)
        for name in ("features", "names", "values"):
            held[name] = tuple(held[name])
        held["replacements"] = tuple((old, new) for old, new in held["replacements"])
        return cls(**held)

    def __str__(self) -> str:
        changes = ", ".join(f"{_quoted(old)} → {_quoted(new)}" for old, new in self.replacements)
        before, now, new = map(probability, self.values)
        old, other = _quoted(self.name), _quoted(self.new_token)
        return (
            f"{changes}: {old} → {other} ({old} {before} → {now}, {other} {new}; "
            f"in {self.share_of_draws:.0%} of draws"
            f"{'' if self.proven_minimal else ', perhaps not minimal'})\n"
            f"  answer: {one_line(self.answer.strip())}"
        )


class CounterfactualSearch(Iterator[Counterfactual]):
    """An iterator over counterfactuals as they are found, the smallest sets of features first.

    Iteration may stop at any time: what was found remains valid. `summary` says which sets were
    tried and which were not, so that finding none is informative.

    Attributes:
        n_features: Number of prompt features.
        n_draws: Baseline draws per set.
        n_found: Counterfactuals found so far.
        n_unconfirmed: Candidates that a separate forward pass did not confirm; they are not
            reported.
        tried: Per size, the number of sets tried and the number that exist.
        already_other: Target tokens that are not the likeliest even with everything present, so
            that they cannot flip (``flips="argmax"``).
    """

    def __init__(self, search: "_Search") -> None:
        self._search, self._found = search, search.run(self)
        self.n_features, self.n_draws = search.n_features, search.n_draws
        self.n_found = self.n_unconfirmed = 0
        self.tried: dict[int, tuple[int, int]] = {}
        self.already_other: list[int] = []

    def __next__(self) -> Counterfactual:
        with self._search.processes.session("`counterfactuals`"):
            found = next(self._found, None)
        if found is None:
            raise StopIteration
        self.n_found += 1
        return found

    @property
    def n_evaluations(self) -> int:
        """Distinct rows scored so far."""
        return self._search.n_evaluations

    @property
    def proven_up_to(self) -> int:
        """The largest size up to which all sets were tried, so that the search is exhaustive."""
        size = 0
        while size + 1 in self.tried and self.tried[size + 1][0] == self.tried[size + 1][1]:
            size += 1
        return size

    @property
    def summary(self) -> str:
        """One line on which sets were tried."""
        draws = f"these {self.n_draws} draws" if self.n_draws > 1 else "one draw"
        found = f"{self.n_found} found" if self.n_found else "none"
        rest = [
            f"of {size} features {n:,} of {of:,} sets"
            for size, (n, of) in self.tried.items()
            if size > self.proven_up_to
        ]
        most = self.proven_up_to
        text = f"{found} up to {most} feature{'s' * (most != 1)} with {draws}"
        more = f" ({'; '.join(rest)})" if rest else ""
        return f"{text}{more}, {self.n_evaluations:,} rows"

    def __repr__(self) -> str:
        return f"CounterfactualSearch({self.summary})"


@dataclass(frozen=True)
class _Tried:
    """Outcomes for the target tokens under each draw of one set of features.

    Attributes:
        flipped: bool, ``(n_draws, n_target)``.
        margins: ``(n_draws, n_target)``, the lower, the nearer to a flip.
    """

    flipped: Tensor
    margins: Tensor


class _Search:
    """The search.

    Args:
        model: The model.
        run: The prompt, tokenizer and scorer.
        generated: The target, held fixed.
        generation: How answers are regenerated.
        flips: What counts as a change.
        positions: Positions of the target tokens to flip.
        max_size: Features of the largest sets.
        n_draws: Baseline draws per set.
        budget: Maximum number of rows scored.
        order: One priority per feature: larger ones are tried first.
        max_rows: Maximum number of rows per batch.
        processes: The processes that share the work.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        generated: GeneratedText,
        generation: Generation,
        *,
        flips: Flips,
        positions: Sequence[int],
        max_size: int,
        n_draws: int,
        budget: int,
        order: Callable[[], Sequence[float]],
        max_rows: int | None,
        processes: Processes | None,
    ) -> None:
        self._model, self._run, self._generated = model, run, generated
        self._generation, self._flips, self._order = generation, flips, order
        self._positions, self._max_size, self._budget = list(positions), max_size, budget
        self.n_features = run.prompt.n_features
        self.n_draws = 1 if run.prompt.deterministic else n_draws
        kinds: dict[str, Any] = {"log_prob": "log_prob"}
        if flips == "argmax":
            kinds = {"margin": _margin}
        elif callable(flips):
            kinds |= {"likeliest": _likeliest}
        self._scorers = {
            name: Scorer(model, attr_target=kind, max_rows=max_rows, processes=processes)
            for name, kind in kinds.items()
        }
        self.processes = processes or Processes()
        self._target = torch.tensor(generated.ids, dtype=torch.int64, device="cpu")
        self._seed = int(torch.randint(2**62, (), generator=run.generator, device="cpu"))
        self._tried: dict[Features, _Tried] = {}
        self._answers: dict[tuple[int, ...], str] = {}

    @property
    def n_evaluations(self) -> int:
        return sum(scorer.n_evaluations for scorer in self._scorers.values())

    def run(self, search: CounterfactualSearch) -> Generator[Counterfactual]:
        """Tries sets of features in order of size and yields the counterfactuals found."""
        open_tokens = [t for t in self._positions if not bool(self._full.flipped[0, t])]
        search.already_other = [t for t in self._positions if t not in open_tokens]
        promising = self.processes.decide(self._order)
        ranked = sorted(range(self.n_features), key=_by(promising))
        minimal: dict[int, list[Features]] = {t: [] for t in open_tokens}
        for size in range(1, self._max_size + 1):
            if size > self.n_features or not open_tokens:
                return
            every, candidates = self._candidates(size, ranked, minimal)
            search.tried[size] = (0, every)
            done = 0
            for chunk in _chunks(candidates, max(_ROWS_AT_ONCE // self.n_draws, 1)):
                room = (self._budget - self.n_evaluations) // max(
                    self.n_draws * len(self._scorers), 1
                )
                chunk = chunk[: max(room, 0)]
                if not chunk:
                    return
                self._try(chunk)
                done += len(chunk)
                search.tried[size] = (done, every)
                for features in chunk:
                    yield from self._minimal(features, minimal, search)

    def _candidates(
        self, size: int, ranked: Sequence[int], minimal: Mapping[int, Sequence[Features]]
    ) -> tuple[int, list[Features]]:
        """The number of sets of a size worth trying, and those to be tried, the most promising
        first.

        A superset of a set that flips a token is not minimal: it is skipped if this holds for all
        tokens.
        """
        if size == 1:
            return self.n_features, [frozenset({feature}) for feature in ranked]
        known = list(minimal.values())
        usable = [f for f in ranked if _is_open(frozenset({f}), known)]
        gains = self._gains(list(minimal))
        usable.sort(key=lambda feature: -float(gains[feature].max()))
        room = max((self._budget - self.n_evaluations) // self.n_draws, 1)
        most = len(usable)
        # More than fit the budget: some turn out not to be minimal or to repeat a row.
        while most > size and comb(most, size) > min(4 * room, _MOST_COMBINATIONS):
            most -= 1
        sets = [frozenset(own) for own in combinations(usable[:most], size)]
        wanted = [features for features in sets if _is_open(features, known)]
        score = {features: float(gains[list(features)].sum(0).max()) for features in wanted}
        every = comb(len(usable), size) - (len(sets) - len(wanted))
        return every, sorted(wanted, key=lambda features: -score[features])

    def _gains(self, positions: Sequence[int]) -> Tensor:
        """How far each feature alone moves each token toward its flip, ``(n_features, n_open)``.

        As a share of the margin, for the draw that moves it most.
        """
        full = self._full.margins[0]
        lowest = [self._tried[frozenset({f})].margins.amin(0) for f in range(self.n_features)]
        return ((full - torch.stack(lowest)) / full.abs().clamp_min(1e-6))[:, list(positions)]

    def _minimal(
        self, features: Features, minimal: dict[int, list[Features]], search: CounterfactualSearch
    ) -> Generator[Counterfactual]:
        flipped = self._tried[features].flipped
        for t, known in minimal.items():
            draws = flipped[:, t].nonzero()[:, 0].tolist()
            if not draws or any(smaller <= features for smaller in known):
                continue
            subsets = _proper_subsets(features)
            missing = [s for s in subsets if s not in self._tried]
            cost = len(missing) * self.n_draws * len(self._scorers)
            if cost <= self._budget - self.n_evaluations:
                self._try(missing)
                missing = []
            if any(s in self._tried and bool(self._tried[s].flipped[:, t].any()) for s in subsets):
                continue
            known.append(features)
            found = self._confirmed(features, t, draws, not missing)
            if found is None:
                search.n_unconfirmed += 1
                known.pop()
            else:
                yield found

    @cached_property
    def _full(self) -> _Tried:
        self._try([frozenset()])
        return self._tried[frozenset()]

    def _try(self, sets: Sequence[Features]) -> None:
        """Scores sets of features under every draw."""
        new = [s for s in dict.fromkeys(sets) if s not in self._tried]
        if not new:
            return
        rows = [self._row(features, draw) for features in new for draw in range(self.n_draws)]
        values = {
            name: scorer.values(rows, self._target).view(len(new), self.n_draws, -1)
            for name, scorer in self._scorers.items()
        }
        for i, features in enumerate(new):
            self._tried[features] = self._outcome({name: own[i] for name, own in values.items()})

    def _outcome(self, values: Mapping[str, Tensor]) -> _Tried:
        if "margin" in values:
            return _Tried(values["margin"] < 0, values["margin"])
        log_probs = values["log_prob"]
        if not self._tried:  # with everything present
            self._before = log_probs[0]
            return _Tried(torch.zeros_like(log_probs, dtype=torch.bool), log_probs)
        if "likeliest" not in values:
            lost = self._before - log_probs
            return _Tried(lost >= float(self._flips), log_probs)  # pyright: ignore[reportArgumentType]
        flipped = [
            [
                self._is_flip(t, int(values["likeliest"][draw, t]), float(log_probs[draw, t]))
                for t in range(len(self._target))
            ]
            for draw in range(self.n_draws)
        ]
        return _Tried(torch.tensor(flipped, dtype=torch.bool, device="cpu"), log_probs)

    def _is_flip(self, t: int, new_token: int, log_prob: float) -> bool:
        flips: Any = self._flips
        name, new = self._text(int(self._target[t])), self._text(new_token)
        return bool(flips(Flip(t, name, new, float(self._before[t]), log_prob)))

    def _confirmed(
        self, features: Features, t: int, draws: Sequence[int], proven: bool
    ) -> Counterfactual | None:
        """The counterfactual, if a separate forward pass confirms the flip for one of the draws."""
        own = int(self._target[t])
        before = float(self._plain(self._row(frozenset(), 0), t)[own])
        for draw in draws:
            row = self._row(features, draw)
            log_probs = self._plain(row, t)
            new, now = int(log_probs.argmax()), float(log_probs[own])
            if self._flips == "argmax":
                is_flip = new != own
            elif callable(self._flips):
                is_flip = self._is_flip(t, new, now)
            else:
                is_flip = before - now >= float(self._flips) - 1e-4  # float32 rounds
            if is_flip:
                prompt = self._prompt(features, draw)
                return self._counterfactual(
                    features, t, prompt, new, (before, now, float(log_probs[new])), draws, proven
                )
        return None

    def _counterfactual(
        self,
        features: Features,
        t: int,
        prompt: RenderedPrompt,
        new: int,
        values: tuple[float, float, float],
        draws: Sequence[int],
        proven: bool,
    ) -> Counterfactual:
        tokenizer, full = self._run.tokenizer, self._run.full
        chosen = tuple(sorted(features))
        shown = self._run.prompt.feature_names()
        text = tokens.decode(tokenizer, prompt.ids)
        return Counterfactual(
            token=t,
            name=self._text(int(self._target[t])),
            features=chosen,
            names=tuple(shown[feature] for feature in chosen),
            replacements=tuple(_changes(*map(self._words, (full.ids, prompt.ids)))),
            new_token=self._text(new),
            values=values,
            prompt_text=text,
            answer=self._answer(prompt),
            old_answer=tokens.decode(tokenizer, self._generated.ids),
            share_of_draws=len(draws) / self.n_draws,
            proven_minimal=proven,
            n_evaluations=self.n_evaluations,
        )

    def _words(self, ids: Sequence[int]) -> list[str]:
        """The words of an answer, without special tokens."""
        special = {*(getattr(self._run.tokenizer, "all_special_ids", None) or ())}
        return tokens.decode(self._run.tokenizer, [i for i in ids if i not in special]).split()

    def _answer(self, prompt: RenderedPrompt) -> str:
        if prompt.ids not in self._answers:
            scorer = next(iter(self._scorers.values()))
            row = TokenRow(prompt.ids, (), prompt.extras)
            ids = scorer.generate(row, self._generation.arguments, self._run.seed)
            self._answers[prompt.ids] = tokens.decode(self._run.tokenizer, ids.tolist())
        return self._answers[prompt.ids]

    def _plain(self, row: TokenRow, t: int) -> Tensor:
        end = row.up_to(t) or row
        return self.processes.decide(lambda: plain_log_probs(self._model, end)[-1])

    def _prompt(self, features: Features, draw: int) -> RenderedPrompt:
        mask = torch.ones(1, self.n_features, dtype=torch.bool, device="cpu")
        mask[0, list(features)] = False
        draws = torch.tensor([draw], dtype=torch.int64, device="cpu")
        generator = torch.Generator().manual_seed(self._seed)
        return self._run.prompt.render(mask, generator, draws)[0]

    def _row(self, features: Features, draw: int) -> TokenRow:
        return whole_row(self._prompt(features, draw), self._generated)

    def _text(self, token: int) -> str:
        return tokens.decode(self._run.tokenizer, [token])


def counterfactuals(model: nn.Module, *given: Any, **options: Any) -> CounterfactualSearch:
    """See `GenerationAttribution.counterfactuals`; arguments are those of `_Search`."""
    return CounterfactualSearch(_Search(model, *given, **options))


def _margin(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probability of the target token minus that of the likeliest other token."""
    chosen = target.expand(len(logits), -1)[..., None]
    own = logits.gather(2, chosen)[..., 0]
    others = logits.scatter(2, chosen, -torch.inf).amax(2)
    return (own - others).double()


def _likeliest(logits: Tensor, target: Tensor) -> Tensor:
    return logits.argmax(2).double()


def _by(order: Sequence[float]) -> Callable[[int], float]:
    return lambda feature: -order[feature]


def _chunks(sets: Sequence[Features], size: int) -> Iterator[list[Features]]:
    rest = iter(sets)
    while chunk := list(islice(rest, size)):
        yield chunk


def _is_open(features: Features, known: Sequence[Sequence[Features]]) -> bool:
    """Whether some token is not flipped by any subset; `known` lists known subsets per token."""
    return any(not any(found <= features for found in own) for own in known)


def _proper_subsets(features: Features) -> list[Features]:
    return [
        frozenset(own) for size in range(1, len(features)) for own in combinations(features, size)
    ]


def _changes(before: Sequence[str], after: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Words that differ: (original, replacement) pairs."""
    for kind, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind != "equal":
            yield " ".join(before[a:b]), " ".join(after[c:d])


def _quoted(text: str) -> str:
    shown = spelled(text)
    return f"‘{shown}’" if shown else "nothing"
