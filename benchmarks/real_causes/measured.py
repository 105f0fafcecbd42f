"""One attribution of one prompt with its cost, cached on disk so that runs resume."""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from captum.attr import FeatureAblation, KernelShap, LayerIntegratedGradients
from environment import environment

from captum_llm_ext import (
    AttentionRollout,
    AttentionWeights,
    Contrast,
    CorpusBaselines,
    Deletion,
    EquivalentLinearSystem,
    GenerationAttentionAttribution,
    GenerationAttribution,
    GenerationGradientAttribution,
    LayerSaliency,
    ModelBaselines,
    TextSegmentInput,
)
from captum_llm_ext.text.baselines import is_deterministic
from real_causes import checkpoints
from real_causes.judged import answer_of
from real_causes.lists import by_hand, digest_of, related_texts
from real_causes.prompts import HALVES, Prompt

EVALUATIONS_PER_WORD = 8
STEPS, PATHS = 10, 4  # of a path, and paths from drawn texts
ABSENCES = (
    "deletion",
    "end of text",
    "`CorpusBaselines`, unrelated news",
    "`CorpusBaselines`, related text",
    "lists by hand",
    "`ModelBaselines`",
)
# What else decides what is found.
TEXTS = {
    "lists by hand": digest_of("lists.txt"),
    "`CorpusBaselines`, related text": digest_of("lists.txt", "related.txt"),
}
PROMPTS = [prompt.text for half in HALVES.values() for prompt in half]
NOTHING = "nothing"  # where a method asks for no absence
# Methods that look into the model at the text as it is.
INSIDE: dict[str, Callable[[Any], Any]] = {
    "saliency, L2": LayerSaliency,
    "linear system": EquivalentLinearSystem,
    "linear system, L2 of its slope": lambda model: EquivalentLinearSystem(model, norm="l2"),
    "ALTI": lambda model: AttentionRollout(model, "alti"),
    "rollout of projections": lambda model: AttentionRollout(model, "projection"),
    "rollout": AttentionRollout,
    "attention weights": AttentionWeights,
}
METHODS = ("leave-one-out", "Shapley, kernel", "integrated gradients")


def makes_sense(method: str, absence: str) -> bool:
    """Whether a combination can be measured: gradients take tokens and texts only."""
    if method in INSIDE or absence == NOTHING:
        return method in INSIDE and absence == NOTHING
    known = ("end of text", "lists by hand", "`ModelBaselines`")
    return method != "integrated gradients" or absence in known


@dataclass
class Cost:
    """Model passes and processor seconds.

    Attributes:
        positions: Tokens that the model read.
        seconds: Of the processor.
        search_positions, search_seconds: Of these, what finding replacements took.
    """

    positions: int = 0
    seconds: float = 0.0
    search_positions: int = 0
    search_seconds: float = 0.0

    def read(self, _: Any, ids: tuple[torch.Tensor, ...]) -> None:
        """Before a pass."""
        self.positions += ids[0].numel()


class _Asked:
    """A language model for baselines that counts its calls."""

    def __init__(self, model: Any, cost: Cost) -> None:
        self._model, self._cost = model, cost

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._model, name)
        return partial(self.counted, found) if callable(found) else found

    def counted(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call on that account."""
        positions, start = self._cost.positions, time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            self._cost.search_positions += self._cost.positions - positions
            self._cost.search_seconds += time.process_time() - start


class _Counted(ModelBaselines):
    """Counts the calls; `bound` is the model of the run."""

    cost: Cost
    bound: ModelBaselines

    def with_model(self, model: Any) -> ModelBaselines:
        asked = _Asked(model, self.cost)
        bound = self.bound = super().with_model(asked)

        def with_answer(fit: Any, text: str) -> ModelBaselines:
            self.bound = ModelBaselines.with_answer(bound, partial(asked.counted, fit), text)
            return self.bound

        vars(bound)["with_answer"] = with_answer
        return bound


def _told(baselines: Any, inp: TextSegmentInput) -> list[str]:
    """Per word its replacements, if these were determined."""
    if not isinstance(baselines, CorpusBaselines | ModelBaselines):
        return []
    return [str(match) for match in baselines.matches(inp)]


@dataclass
class Measured:
    """Results of a model on the prompts.

    Args:
        name: One of `checkpoints.PACKAGES`, or a folder or name of transformers.
        dtype: What it computes in.
        cache: Where attributions are kept.
        again: Absences that are measured though they are there.
    """

    name: str
    dtype: str
    cache: Path
    again: tuple[str, ...] = ()

    @cached_property
    def model(self) -> Any:
        """In evaluation mode."""
        from transformers import AutoModelForCausalLM

        where = checkpoints.folder(self.name)
        dtype = getattr(torch, self.dtype)
        return AutoModelForCausalLM.from_pretrained(where, dtype=dtype).eval()

    @cached_property
    def tokenizer(self) -> Any:
        """Its own."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(checkpoints.folder(self.name))

    def answer(self, prompt: Prompt) -> list[int] | None:
        """See `judged.answer_of`."""
        key = {"answer": asdict(prompt)}
        return self._kept(key, lambda: answer_of(self.model, self.tokenizer, prompt))

    def attribution(
        self, prompt: Prompt, answer: list[int], absence: str, method: str, targets: Sequence[str]
    ) -> dict[str, Any]:
        """The words' attributions by each of `attr_target`, their spans, and what they cost."""
        key = {
            "prompt": prompt.text,
            "answer": answer,
            "absence": absence,
            "method": [method, EVALUATIONS_PER_WORD, STEPS, PATHS],
            "attr_targets": sorted(targets),
            "texts": TEXTS.get(absence),
        }
        run = partial(self._attributed, prompt, answer, absence, method, sorted(targets))
        return self._kept(key, run, again=absence in self.again)

    def _attributed(
        self, prompt: Prompt, answer: list[int], absence: str, method: str, targets: list[str]
    ) -> dict[str, Any]:
        cost = Cost()
        inp = TextSegmentInput(prompt.text, self.tokenizer, "word")
        baselines = self._baselines(absence, inp, cost)
        inp = inp.with_baselines(baselines)
        hook = self.model.get_input_embeddings().register_forward_pre_hook(cost.read)
        start = time.process_time()
        try:
            results = self._results(inp, torch.tensor(answer), method, targets)
        finally:
            hook.remove()
        cost.seconds += time.process_time() - start
        return {
            "spans": [(slot.start, slot.stop) for slot in inp.slots],
            "attributions": {t: r.seq_attr.double().tolist() for t, r in results.items()},
            "evaluations": max(result.n_evaluations for result in results.values()),
            "cost": asdict(cost),
            "replacements": _told(getattr(baselines, "bound", baselines), inp),
            "n_foils": Contrast().n_foils,
            "commit": environment(seed=0)["commit"],
        }

    def _results(
        self, inp: TextSegmentInput, answer: Any, method: str, targets: list[str]
    ) -> dict[str, Any]:
        """By `attr_target`; where coalitions were scored, those after the first cost no pass."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some absences are bad on purpose
            if method in INSIDE:
                return {t: self._inside(inp, answer, method, t) for t in targets}
            if method == "integrated gradients":
                kind = LayerIntegratedGradients(self.model, None)
                drawn = {} if is_deterministic(inp.own_baseline) else {"n_draws": PATHS}
                return {
                    target: GenerationGradientAttribution(
                        kind,
                        self.tokenizer,
                        attr_target=target,  # pyright: ignore[reportArgumentType]
                    ).attribute(inp, answer, output_unit=None, n_steps=STEPS, **drawn)
                    for target in targets
                }
            budget = {"n_samples": EVALUATIONS_PER_WORD * inp.n_features}
            kind, arguments = {
                "leave-one-out": (FeatureAblation, {}),
                "Shapley, kernel": (KernelShap, budget),
            }[method]
            # A contrast keeps log-probabilities beside it.
            first, *others = sorted(targets, key=lambda target: target != "contrast")
            attribution = GenerationAttribution(kind(self.model), self.tokenizer, first)
            result = attribution.attribute(inp, answer, output_unit=None, **arguments)
            return {first: result} | {t: result.refit(attr_target=t) for t in others}

    def _inside(self, inp: TextSegmentInput, answer: Any, method: str, target: str) -> Any:
        """Attributions by a white-box method for one value; attention has none."""
        kind = INSIDE[method](self.model)
        if isinstance(kind, AttentionRollout | AttentionWeights):
            attribution: Any = GenerationAttentionAttribution(kind, self.tokenizer)
        else:
            value: Any = target
            attribution = GenerationGradientAttribution(kind, self.tokenizer, attr_target=value)
        return attribution.attribute(inp, answer, output_unit=None)

    def _baselines(self, absence: str, inp: TextSegmentInput, cost: Cost) -> Any:
        """Replacements of absent words of a prompt; finding them counts as cost."""
        if absence in ("deletion", NOTHING):
            return Deletion()
        if absence == "end of text":
            return self.tokenizer.eos_token_id
        if absence == "lists by hand":
            return by_hand(inp)
        if absence == "`ModelBaselines`":
            baselines = _Counted()
            baselines.cost = cost
            return baselines
        baselines = self._corpora[absence]
        start = time.process_time()
        baselines.matches(inp)
        cost.search_seconds = cost.seconds = time.process_time() - start
        return baselines

    @cached_property
    def _corpora(self) -> dict[str, CorpusBaselines]:
        texts = {
            "`CorpusBaselines`, unrelated news": checkpoints.unrelated_news(),
            "`CorpusBaselines`, related text": related_texts(without=PROMPTS),
        }
        return {name: CorpusBaselines(own, min_candidates=0) for name, own in texts.items()}

    def _kept(self, key: dict[str, Any], run: Callable[[], Any], *, again: bool = False) -> Any:
        """The cached result, if there is one."""
        given = json.dumps(key | {"model": self._weights, "dtype": self.dtype}, sort_keys=True)
        digest = hashlib.sha256(given.encode()).hexdigest()[:24]
        path = self.cache / f"{digest}.json"
        if again or not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            half = path.with_suffix(".part")
            half.write_text(json.dumps({"found": run()}), encoding="utf-8")
            half.replace(path)
        return json.loads(path.read_text(encoding="utf-8"))["found"]

    @cached_property
    def _weights(self) -> list[Any]:
        """A digest that distinguishes models of one name."""
        files = Path(checkpoints.folder(self.name)).glob("*.safetensors")
        return [Path(self.name).name, *sorted(file.stat().st_size for file in files)]
