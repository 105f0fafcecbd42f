"""`AnswerAccess`: treats the answer as one target token, for methods that compare whole texts."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor

from captum_llm_ext.attribution.game import Game, Run
from captum_llm_ext.attribution.model_access import ModelAccess
from captum_llm_ext.attribution.target import Skipped, as_ids
from captum_llm_ext.methods import Smile
from captum_llm_ext.model import Generation, Journal, Processes, RowScorer, Scorer, TokenRow
from captum_llm_ext.model.likelihood import Likelihood
from captum_llm_ext.model.scoring.progress import ProgressBar, Shown
from captum_llm_ext.text import tokens
from captum_llm_ext.text.baselines import LanguageModel
from captum_llm_ext.text.plain_tokenizer import OpenVocabulary


class AnswerAccess(ModelAccess):
    """Generates an answer for each coalition and scores it by its distance to the original answer.

    The answer is one target token of a vocabulary of whole texts. Its value is minus the distance:
    0 for the answer to the whole prompt.
    """

    _base_tokenizer: Any
    _answers: "AnswerScorer"

    @classmethod
    def of(cls, given: ModelAccess, generation: Generation) -> Self:
        """A copy of an attribution that compares generated answers.

        Args:
            given: The user's attribution, whose method is `Smile`.
            generation: How answers are generated.
        """
        own = cls.__new__(cls)
        vars(own).update(vars(given))
        own._base_tokenizer = given.tokenizer
        own._answers = AnswerScorer(
            Scorer(given.model, processes=given.shared),
            generation,
            given.tokenizer,
            cast(Smile, given.attr_method).distance_function(given.model, given.tokenizer),
        )
        own.attr_target, own.tokenizer = "similarity", OpenVocabulary(given.tokenizer)
        return own

    def _scorer(self, max_rows: int | None, show_progress: Shown = False) -> RowScorer:
        del max_rows
        self._answers.shows(show_progress)
        return self._answers

    def _language_model(self, scorer: RowScorer) -> LanguageModel:
        del scorer
        return Likelihood(self.model, self._base_tokenizer)

    def _target_ids(
        self,
        run: Run,
        target: str | Tensor | Sequence[int] | None,
        gen_args: Mapping[str, Any] | None,
        generation: Generation | None,
        skip_tokens: Skipped | None,
    ) -> Tensor:
        del gen_args, generation, skip_tokens
        self._answers.seed = run.seed
        row = TokenRow(run.full.ids, (len(run.full.ids) - 1,), run.full.extras, run.full.key)
        if target is None:
            text = self._answers.answer(row)
        else:
            text = self._answers.text(as_ids(target, self._base_tokenizer))
        if not text.strip():
            raise ValueError("the answer is empty: there is nothing to compare others with.")
        self._answers.original = text
        vocabulary = cast(OpenVocabulary, self.tokenizer)
        return torch.tensor([vocabulary.token(text)], dtype=torch.int64, device="cpu")

    def _vocabulary_size(self) -> int | None:
        return None

    def _scoring_provenance(self, game: Game) -> dict[str, Any]:
        del game
        return {"noise_floor": None, "n_answers": self._answers.n_evaluations}


class AnswerScorer:
    """A `RowScorer` whose values are the negative distances of generated answers to the original.

    Args:
        scorer: Generates answers.
        generation: How answers are generated.
        tokenizer: The model's tokenizer.
        distance: The distance of two answers.

    Attributes:
        original: The answer that others are compared with.
        seed: Seeds sampled answers.
    """

    attr_target: Any = "similarity"
    scores_continuations = False

    def __init__(
        self,
        scorer: Scorer,
        generation: Generation,
        tokenizer: Any,
        distance: Callable[[str, str], float],
    ) -> None:
        self._scorer, self._generation = scorer, generation
        self._tokenizer, self._distance = tokenizer, distance
        self.original, self.seed = "", 0
        self.n_evaluations = 0
        self.n_scored = [0] * len(scorer.n_scored)
        self._known: dict[tuple[tuple[int, ...], object], str] = {}
        self.shows(False)

    def shows(self, show_progress: Shown) -> None:
        """Whether `progress` shows a bar."""
        self._bar = ProgressBar("answers", "answer", is_shown=show_progress)

    @property
    def processes(self) -> Processes:
        """The processes that generate together."""
        return self._scorer.processes

    def text(self, ids: Tensor) -> str:
        """The text of an answer as it is compared, without special tokens."""
        special = {*(getattr(self._tokenizer, "all_special_ids", None) or ())}
        return tokens.decode(self._tokenizer, [i for i in ids.tolist() if i not in special])

    def answer(self, row: TokenRow) -> str:
        """The ids that the model generates after a prompt."""
        return self._written([row])[0]

    def values(
        self, rows: Sequence[TokenRow], target: Tensor, foils: Tensor | None = None
    ) -> Tensor:
        """Negative distances to the original answer, ``(n_rows, 1)``."""
        del target, foils
        found = [[-float(self._distance(self.original, text))] for text in self._written(rows)]
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    def _written(self, rows: Sequence[TokenRow]) -> list[str]:
        """Answers to the rows; each distinct prompt is generated once."""
        keys = [(row.ids[: row.first + 1], row.key) for row in rows]
        new = {
            key: TokenRow(key[0], (), row.extras, row.key)
            for key, row in zip(keys, rows, strict=True)
            if key not in self._known
        }
        self._bar.announce(len(new))
        seeds = [self.seed] * len(new)
        written = self._scorer.generate_each(
            [*new.values()], self._generation, seeds, self._bar.advance
        )
        for key, ids in zip(new, written, strict=True):
            self._known[key] = self.text(ids)
        self.n_evaluations += len(new)
        return [self._known[key] for key in keys]

    def generate(self, row: TokenRow, gen_args: Mapping[str, Any], seed: int) -> Tensor:
        """See `Scorer.generate`."""
        return self._scorer.generate(row, gen_args, seed)

    def check_length(self, length: int, what: str) -> None:
        """See `Scorer.check_length`."""
        self._scorer.check_length(length, what)

    def likeliest(self, rows: Sequence[TokenRow], n: int) -> NoReturn:
        """Not available: answers have no alternative tokens."""
        raise NotImplementedError

    def noise_floor(self, row: TokenRow, target: Tensor, foils: Tensor | None = None) -> None:
        """None: answers are either equal or not."""

    def tolerance(self, values: Tensor) -> Tensor:
        """Zero: values have no rounding error."""
        return torch.zeros_like(values)

    def progress(self) -> AbstractContextManager[None]:
        """Shows one progress bar over all answers generated within."""
        return self._bar.shown()

    @contextmanager
    def keeping(self, open_journal: Callable[[], Journal] | None) -> Generator[None]:
        """A context in which nothing is saved: answers have no checkpoints."""
        if open_journal is not None:
            raise ValueError("`checkpoint` would be ignored: answers are not kept by it.")
        yield

    def forecast(self, n_rows: int) -> None:
        """See `Scorer.forecast`."""
        self._bar.note(f"about {n_rows} more answers" if n_rows > 0 else "")
