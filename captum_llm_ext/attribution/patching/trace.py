"""`ActivationPatching`: through which layer and place a feature came to its effect."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from captum.attr import InterpretableInput
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.attribution.patching.corruption import (
    Corruption,
    Feature,
    Selection,
    noisy_texts,
    original_text,
    replacement_texts,
    select_features,
)
from captum_llm_ext.attribution.patching.places import Grouping, Places, grouped
from captum_llm_ext.attribution.patching.ranking import first_order, ranked
from captum_llm_ext.attribution.patching.runs import Patched, PatchedRuns
from captum_llm_ext.attribution.target import as_ids, generate_target, target_ids
from captum_llm_ext.base.arguments import check_counts
from captum_llm_ext.base.digest import describe, digest
from captum_llm_ext.contrast import Contrast, FoilContext, Foils, as_value, foils_of, scored
from captum_llm_ext.model import (
    Accelerator,
    AttrTarget,
    Generation,
    Journal,
    Likelihood,
    Processes,
    Scorer,
    model_identity,
    planned_generation,
)
from captum_llm_ext.model.exclusive import exclusive_use
from captum_llm_ext.model.residual_stream import ResidualStream, same_streams
from captum_llm_ext.result.patching import PatchingResult
from captum_llm_ext.result.provenance import model_provenance, run_provenance, target_provenance
from captum_llm_ext.text.baselines.model.baselines import ModelBaselines
from captum_llm_ext.text.inputs import Context, GeneratedText, Prompt, TextSegmentInput, as_prompt
from captum_llm_ext.text.segment import Unit

Kind = Literal["replacement", "noise"]
Direction = Literal["denoise", "noise"]

# Samples of noise that effects are averaged over: those of Meng et al. 2022.
_NOISE_DRAWS = 10
_NOISE_SCALE = 3.0
# What passes beside the streams changes values by more than this, in the unit of these; parts of
# models that compute in float32 whatever their weights are in, by less.
_BESIDE = 1e-4


class ActivationPatching:
    """Which layer and place of a decoder carry what a feature of the text does to later tokens.

    The text is read twice: as it is, and with the feature replaced by other text of as many tokens
    from its own slot. A token's `gain` is what the feature is worth to it: its value in the one
    less that in the other. Then the corrupted text is read again and again, each time with the
    residual stream of one cell, a place between two layers, as it is in the clean text. What that
    alone gives back of a token's value is the cell's effect (causal tracing, Meng et al. 2022;
    activation patching, Wang et al. 2023; Zhang and Nanda 2024 compare the ways to do it). A row
    serves all target tokens: ``(n_layers + 1) * n_places`` rows at most, and fewer, for cells that
    are the same in both texts have no effect and are not run.

    Stream 0 enters the first layer, stream ``n_layers`` leaves the last one. So a token's whole
    gain is found in stream 0 at the places of the feature, and in the last stream at the place that
    says the token; between them it moves from one to the other. Effects of cells do not sum to it:
    what passes through several is told by each, and what needs two of them by none.

    Every call checks on the model itself that the streams are all that passes from layer to layer:
    with all places of a stream as in the clean text, its values must come out. Where they do not
    (token ids that layers read past the stream, keys that they share) the model is refused.

    Which heads, neurons and edges do it is asked of libraries made for that: nnsight
    (https://nnsight.net) and TransformerLens
    (https://transformerlensorg.github.io/TransformerLens).

    Args:
        model: A causal language model, whole in this process: offloaded or spread over devices by
            accelerate it may be, tensor parallel or with compiled parts not. Of a model that
            `torch.compile` returned the original is run.
        tokenizer: Its tokenizer. None: that of the input.
        attr_target: What a value is, as for `GenerationAttribution`; values in nats
            (``"log_prob"``, ``"contrast"``) or logits are best, for probabilities hide what lifts
            a token from unlikely to less unlikely.
        layers: The decoder layers in order, for models that do not tell them. Each is given and
            gives back the stream ``(batch, length, size)``, first of its arguments and outputs.
        accelerator: As of `GenerationAttribution`: rows are shared out among its processes, and
            all get the same result.

    Raises:
        TypeError: If the model is no causal language model.
        ValueError: If `attr_target` is unknown, or the layers cannot be found or watched.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        attr_target: AttrTarget | Contrast = "log_prob",
        *,
        layers: Sequence[nn.Module] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        _compat.check_causal(model)
        self.model = _compat.uncompiled(model)
        self.tokenizer = tokenizer
        self.attr_target = as_value(attr_target)
        self._stream = ResidualStream(self.model, layers)
        self._processes = Processes.of(accelerator, self.model)
        # Without an accelerator, batches are as large as suits one process.
        is_shared = accelerator is not None or self._processes.are_many
        self._shared = self._processes if is_shared else None

    @property
    def processes(self) -> Processes:
        """Those that work together on one trace."""
        return self._processes

    def trace(
        self,
        inp: InterpretableInput,
        target: str | Tensor | Sequence[int] | None = None,
        *,
        feature: Feature,
        baselines: Any = None,
        output_unit: Unit | None = "token",
        output_baselines: Any = None,
        gen_args: Mapping[str, Any] | None = None,
        kind: Kind = "replacement",
        direction: Direction = "denoise",
        places: Grouping = "token",
        first: int | None = None,
        n_draws: int | None = None,
        noise_scale: float = _NOISE_SCALE,
        seed: int = 0,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> PatchingResult:
        """Traces what one feature does to the target, or to what the model generates.

        Args:
            inp: The prompt: `TextSegmentInput`, `ChatInput` or captum's `TextTokenInput`.
            target: The text whose tokens are looked at, as for `GenerationAttribution`. None: the
                model generates it.
            feature: What is replaced: a feature's name, or its column in results (those of the
                prompt first, then those of the target, as in `full_attr`), or a list of such, which
                are replaced together.
            baselines: What stands there, as of `TextSegmentInput`; None: what the input's own say,
                and `ModelBaselines` where nobody said. A text is drawn until it has as many tokens
                as the feature.
            output_unit, output_baselines: Features of the target, as for `GenerationAttribution`.
            gen_args: As for `GenerationAttribution`.
            kind: ``"noise"``: instead of a replacement, Gaussian noise is added to the embeddings
                of the feature's tokens. It needs no other text, and makes none that could be.
            direction: ``"denoise"``: cells of the corrupted text are made clean, and an effect is
                what comes back: which cells are enough. ``"noise"``: cells of the clean text are
                corrupted, and an effect is what is lost: which cells are needed.
            places: What is patched together: ``"token"``: each place by itself; ``"feature"``: the
                places of each feature; or lists of places.
            first: Only so many cells are patched, those that attribution patching (one way back
                through the model a token) ranks highest; the effects of others are NaN. Its
                estimates are wrong by factors and are not told.
            n_draws: Replacements, or samples of noise, that effects are averaged over. By default 1
                replacement and 10 samples of noise.
            noise_scale: Standard deviation of the noise, in those of the text's embeddings.
            seed: Seeds every random choice.
            perturbations_per_eval: At most so many rows in a batch; by default what memory allows.
            show_progress: Whether a bar over the rows is shown.
            checkpoint: A file that ends in ``.safetensors``, or a folder, as for
                `GenerationAttribution`: rows that were run before are not run again, also where
                `places`, `first`, `direction` or `n_draws` have changed.

        Returns:
            The effects.

        Raises:
            ValueError: If an argument is out of range or would be ignored, the feature is unknown
                or nothing of as many tokens stands in for it, or the model is none whose streams
                can be patched.
            TypeError: If an argument is of the wrong kind, or features own no tokens.
        """
        is_noise = kind == "noise"
        _check_choice("kind", kind, ("replacement", "noise"))
        _check_choice("direction", direction, ("denoise", "noise"))
        check_counts(first=first, n_draws=n_draws, perturbations_per_eval=perturbations_per_eval)
        _check_used(is_noise, noise_scale, baselines, output_baselines)
        n_draws = n_draws or (_NOISE_DRAWS if is_noise else 1)
        tokenizer = self._tokenizer_of(inp)
        generation = None
        if target is None:
            generation = planned_generation(self.model, tokenizer, gen_args)
        prompt = _prompt(inp, tokenizer, baselines)
        context = Context(prompt, tokenizer, Likelihood(self.model, tokenizer))
        if context.full.extras is not None:
            raise ValueError("activation patching takes text alone, no pictures or the like.")
        context.prompt.places()  # whether it knows any, before the costly part
        runs = PatchedRuns(
            self.model,
            self._stream,
            scored(self.attr_target),
            max_rows=perturbations_per_eval,
            show_progress=show_progress,
            processes=self._shared,
        )
        open_journal = None
        if checkpoint is not None:
            given = None if target is None else as_ids(target, tokenizer).tolist()
            wanted = dict(generation.settings) if generation else digest(given)
            about = {"prompt": digest(context.full.ids), "target": wanted, "seed": seed}
            open_journal = partial(Journal, checkpoint, self.identity() | about)
        with (
            self._processes.session("`trace`"),
            runs.scorer.keeping(open_journal),
            runs.scorer.progress(),
        ):
            generate = partial(
                generate_target, runs.scorer, context.full, cast(Generation, generation), seed
            )
            size = _compat.vocabulary_size(self.model)
            ids = target_ids(target, tokenizer, gen_args, generate, context.full, runs.scorer, size)
            generated = context.generated(ids, output_unit, output_baselines)
            which = select_features(feature, context, generated)
            groups = grouped(places, context, generated, tokenizer)
            if is_noise:
                draw = partial(
                    self._noisy_texts, which, context, generated, n_draws, noise_scale, seed
                )
            else:
                draw = partial(
                    replacement_texts,
                    which,
                    context,
                    generated,
                    tokenizer,
                    n_draws=n_draws,
                    seed=seed,
                )
            # What is drawn by the model, and so by rounding, is the same on all processes.
            texts = self._processes.decide(draw)
            foils = self._foils(context, generated, tokenizer, seed)
            traced = _Trace(
                runs, original_text(context, generated), texts, ids, foils, groups, direction
            )
            ranks = None if first is None else traced.ranks(scored(self.attr_target))
            effects = traced.effects(ranks, first)
        provenance = {
            **target_provenance(self.attr_target, generation and generation.settings),
            "contrast": foils and foils.about,
            "kind": kind,
            "direction": direction,
            "baselines": None if is_noise else repr(context.prompt.own_baseline),
            "noise_scale": noise_scale if is_noise else None,
            "first": first,
            "n_draws": len(texts),
            "seed": seed,
            "unit": context.prompt.unit_name,
            "rows_by_process": runs.scorer.n_scored if self._shared else None,
            **runs.provenance(),
            **model_provenance(self.model, _compat.input_device(self.model)),
            **run_provenance(),
        }
        return traced.result(which, list(generated.labels), effects, ranks, provenance)

    def identity(self) -> dict[str, Any]:
        """What results depend on beside the arguments of `trace`, as JSON has it."""
        return {
            **model_identity(self.model),
            "method": type(self).__name__,
            "attr_target": describe(self.attr_target),
        }

    def _tokenizer_of(self, inp: InterpretableInput) -> Any:
        found = self.tokenizer or getattr(inp, "tokenizer", None)
        if found is None:
            raise ValueError(
                f"a {type(inp).__name__} does not tell its tokenizer: give "
                "`ActivationPatching(model, tokenizer)`."
            )
        return found

    def _noisy_texts(
        self,
        which: Selection,
        context: Context,
        generated: GeneratedText,
        n_draws: int,
        scale: float,
        seed: int,
    ) -> list[Corruption]:
        device = _compat.input_device(self.model)
        ids = torch.tensor(
            [original_text(context, generated).ids], dtype=torch.int64, device=device
        )
        with exclusive_use(self.model):
            embedded = self._stream.embedded(ids)
        return noisy_texts(
            which, context, generated, embedded, n_draws=n_draws, scale=scale, seed=seed
        )

    def _foils(
        self, context: Context, generated: GeneratedText, tokenizer: Any, seed: int
    ) -> Foils | None:
        if not isinstance(self.attr_target, Contrast):
            return None
        within = FoilContext(context.prompt, context.full, generated, tokenizer, seed)
        size = _compat.vocabulary_size(self.model)
        return foils_of(self.attr_target, within, Scorer(self.model, processes=self._shared), size)


class _Trace:
    """The cells of a text and of its corruptions, patched into one another.

    Args:
        runs: Of the model.
        clean: The text as it is.
        texts: Corrupted, one per draw.
        target: Token ids ``(n_target,)``.
        foils: What they are held against.
        groups: Places that are patched together.
        direction: As for `ActivationPatching.trace`.

    Raises:
        ValueError: If a stream is not all that passes from a layer to the next.
    """

    def __init__(
        self,
        runs: PatchedRuns,
        clean: Corruption,
        texts: Sequence[Corruption],
        target: Tensor,
        foils: Foils | None,
        groups: Places,
        direction: Direction,
    ) -> None:
        self._clean, self._texts, self._runs = clean, texts, runs
        self._target, self._foils = target, foils
        self._names, self._groups = groups.names, groups.groups
        self._denoises = direction == "denoise"
        distinct = list({text.key: text for text in texts}.values())
        runs.take([clean, *distinct], target, foils)
        self._check_streams(distinct[0])
        values = runs.values([Patched(text.key) for text in (clean, *texts)])
        self._best, self._worst = values[0], values[1:]

    def effects(self, ranks: Tensor | None, first: int | None) -> Tensor:
        """Effects ``(n_draws, n_target, n_layers + 1, n_places)``; NaN for cells not patched.

        Args:
            ranks: Of cells ``(n_layers + 1, n_places)``; None: all are patched.
            first: Those with a rank below it are.
        """
        each: list[Tensor] = []
        # All rows are asked for at once: batches are full, and the bar knows how many there are.
        wanted: list[list[tuple[int, int]]] = []
        cells: list[Patched] = []
        for text in self._texts:
            may_differ = self._may_differ(text)
            if ranks is not None and first is not None:
                may_differ &= (ranks >= 0) & (ranks < first)
            wanted.append([(layer, group) for layer, group in may_differ.nonzero().tolist()])
            base, source = self._pair(text)
            cells += [
                Patched(base.key, source.key, layer, self._groups[group])
                for layer, group in wanted[-1]
            ]
        values = iter(self._runs.values(cells) if cells else ())
        for text, own, at_worst in zip(self._texts, wanted, self._worst, strict=True):
            found = self._unpatched(text, ranks)
            for layer, group in own:
                value = next(values)
                effect = value - at_worst if self._denoises else self._best - value
                found[:, layer, group] = effect
            each.append(self._causal(found, text))
        return torch.stack(each)

    def ranks(self, attr_target: AttrTarget) -> Tensor:
        """In which order to patch cells, ``(n_layers + 1, n_places)``; -1: not at all."""
        summed: Tensor | None = None
        candidates: Tensor | None = None
        decide = self._runs.scorer.processes.decide
        for text in self._texts:
            base, source = self._pair(text)
            own = decide(
                partial(
                    first_order, self._runs, base, source, self._target, attr_target, self._foils
                )
            )
            is_one = self._may_differ(text)
            summed = own if summed is None or summed.shape != own.shape else summed + own
            candidates = is_one if candidates is None else candidates | is_one
        assert summed is not None
        assert candidates is not None
        return ranked(summed, self._groups, candidates)

    def result(
        self,
        which: Selection,
        output_tokens: list[str],
        effects: Tensor,
        ranks: Tensor | None,
        provenance: Mapping[str, Any],
    ) -> PatchingResult:
        """What users get.

        Args:
            which: The features that were replaced.
            output_tokens: Names of the target tokens.
            effects, ranks: As found.
            provenance: What they came from.
        """
        return PatchingResult(
            effects=effects.mean(0),
            # A single draw tells nothing of its error.
            effects_se=None if len(effects) < 2 else effects.std(0) / len(effects) ** 0.5,
            clean_values=self._best,
            corrupted_values=self._worst.mean(0),
            target=self._target,
            said_at=torch.tensor(self._clean.positions, dtype=torch.int64, device="cpu"),
            places=[list(group) for group in self._groups],
            place_names=list(self._names),
            replaced=sorted({p for text in self._texts for p in text.places}),
            feature=list(which.names),
            replacements=[text.text for text in self._texts],
            output_tokens=output_tokens,
            ranks=ranks,
            n_evaluations=self._runs.scorer.n_evaluations,
            provenance=provenance,
        )

    def _pair(self, text: Corruption) -> tuple[Corruption, Corruption]:
        """What is read, and whose stream is put there."""
        return (text, self._clean) if self._denoises else (self._clean, text)

    def _may_differ(self, text: Corruption) -> Tensor:
        """Cells that differ in both texts, bool ``(n_layers + 1, n_places)``."""
        streams = self._runs.streams(self._clean), self._runs.streams(text)
        same = self._runs.scorer.processes.decide(partial(same_streams, *streams))
        # What comes before the first place that was changed knows nothing of it but rounding.
        same[:, : text.places[0]] = True
        differs = [~same[:, list(group)].all(-1) for group in self._groups]
        return torch.stack(differs, -1)

    def _unpatched(self, text: Corruption, ranks: Tensor | None) -> Tensor:
        """No effect where nothing differs, unknown where nothing was patched."""
        differs = self._may_differ(text)
        blank = torch.zeros(differs.shape, dtype=torch.float64, device="cpu")
        if ranks is not None:
            blank[differs] = torch.nan
        return blank.expand(len(self._target), -1, -1).clone()

    def _causal(self, effects: Tensor, text: Corruption) -> Tensor:
        """What comes after the place that says a token has no effect on it, not even rounding."""
        firsts = torch.tensor([min(g) for g in self._groups], dtype=torch.int64, device="cpu")
        said = torch.tensor(self._clean.positions, dtype=torch.int64, device="cpu")
        later = (firsts > said[:, None])[:, None].expand_as(effects)
        effects = effects.masked_fill(later, 0.0)
        untold = torch.tensor(text.positions, dtype=torch.int64, device="cpu") < 0
        return effects.masked_fill(untold[:, None, None], torch.nan)

    def _check_streams(self, text: Corruption) -> None:
        """Holds values with a whole stream patched against those of the text that it is of."""
        runs, clean = self._runs, self._clean
        n_streams = len(runs.streams(clean))
        every = tuple(range(len(clean.ids)))
        cells = [Patched(text.key, clean.key, layer, every) for layer in range(n_streams)]
        [expected, *found] = runs.values([Patched(clean.key), *cells])
        told = torch.tensor(text.positions, dtype=torch.int64, device="cpu") >= 0
        tolerance = runs.tolerance(clean, expected)[told].clamp(min=_BESIDE)
        for layer, values in enumerate(found):
            error = (values - expected)[told].abs()
            if not bool((error <= tolerance).all()):
                raise ValueError(
                    f"stream {layer} of {n_streams - 1} is not all that this model's layers pass "
                    "on: with every place of it as in the clean text, values are up to "
                    f"{float(error.max()):.2g} from the clean text's (rounding makes "
                    f"{float(tolerance.max()):.2g} at most). Layers that read token ids or share "
                    "keys with earlier ones are not traced; for a model of your own give its "
                    "`layers`."
                )


def _prompt(inp: InterpretableInput, tokenizer: Any, baselines: Any) -> Prompt:
    prompt = as_prompt(inp, tokenizer, None)
    if baselines is None:
        return prompt.with_default(ModelBaselines())
    if not isinstance(prompt, TextSegmentInput):
        raise TypeError(
            f"`baselines` would be ignored: a {type(inp).__name__} has its own. Give a "
            "`TextSegmentInput`, whose baselines can be changed."
        )
    return prompt.with_baselines(baselines)


def _check_choice(name: str, given: object, known: Sequence[str]) -> None:
    if given not in known:
        raise ValueError(f"`{name}` is {given!r}: give one of {', '.join(map(repr, known))}.")


def _check_used(is_noise: bool, scale: float, *baselines: object) -> None:
    """Refuses what would be ignored.

    Raises:
        ValueError: If there is such.
    """
    if is_noise and any(own is not None for own in baselines):
        raise ValueError('baselines would be ignored: `kind="noise"` replaces nothing.')
    if not is_noise and scale != _NOISE_SCALE:
        raise ValueError('`noise_scale` would be ignored: it is of `kind="noise"`.')
    if not 0 < scale < float("inf"):
        raise ValueError(f"`noise_scale` is {scale!r}: give a number above 0.")
