"""`ActivationPatching`: through which layers and positions a feature has its effect."""

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

# Samples of noise averaged over, as in Meng et al. 2022.
_NOISE_DRAWS = 10
_NOISE_SCALE = 3.0  # standard deviations of the embeddings, as in Meng et al. 2022
# What bypasses the streams changes values by more than this, in their unit; the parts that models
# always compute in float32 change them by less. Chosen, not measured.
_BESIDE = 1e-4


class ActivationPatching:
    """Finds which layers and positions of a decoder carry a feature's effect on later tokens.

    The text is read twice: clean, and corrupted, with the feature replaced by other text of as many
    tokens. A token's `gain` is its value in the clean text minus that in the corrupted one. Then
    the corrupted text is read once per cell (one position between two layers), with the residual
    stream of that cell taken from the clean text. The part of the gain that this restores is the
    cell's effect (causal tracing, Meng et al. 2022; activation patching, Wang et al. 2023; Zhang
    and Nanda 2024 compare variants). One row serves all target tokens: at most ``(n_layers + 1) *
    n_places`` rows; cells that are equal in both texts have no effect and are not run.

    Stream 0 enters the first layer, stream ``n_layers`` leaves the last one. A token's whole gain
    therefore appears in stream 0 at the feature's positions, and in the last stream at the position
    that predicts the token; in between it moves from one to the other. Effects of cells do not sum
    to the gain: what passes through several cells is counted in each, and what needs two of them in
    none.

    Every call checks that nothing else passes from layer to layer: with a whole stream taken from
    the clean text, its values must result. If not (layers that read token ids directly, or share
    keys), an error is raised.

    For heads, neurons and edges, use dedicated libraries: nnsight (https://nnsight.net) and
    TransformerLens (https://transformerlensorg.github.io/TransformerLens).

    Args:
        model: A causal language model held by this process alone. Accelerate may offload it or
            spread it over devices; it may not be tensor parallel or have compiled submodules. For a
            model returned by `torch.compile`, the original is run.
        tokenizer: Its tokenizer. None: the input's.
        attr_target: The kind of value, as for `GenerationAttribution`; values in nats
            (``"log_prob"``, ``"contrast"``) or logits are best, since probabilities hide changes of
            unlikely tokens.
        layers: The decoder layers in order, for models in which they cannot be found. Each takes
            and returns the stream ``(batch, length, size)`` as its first argument and output.
        accelerator: As for `GenerationAttribution`: its processes share the rows, and all get the
            same result.

    Raises:
        TypeError: If the model is not a causal language model.
        ValueError: If `attr_target` is unknown, or the layers cannot be found or hooked.
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
        # Without an accelerator, batches may have any size.
        is_shared = accelerator is not None or self._processes.are_several
        self._shared = self._processes if is_shared else None

    @property
    def processes(self) -> Processes:
        """The processes that work together on one trace."""
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
        """Traces the effect of a feature on the target, or on what the model generates.

        Args:
            inp: The prompt: `TextSegmentInput`, `ChatInput` or captum's `TextTokenInput`.
            target: The text whose tokens are explained, as for `GenerationAttribution`. None: the
                model generates it.
            feature: The replaced feature: its name, or its column in results (the prompt's first,
                then the target's, as in `full_attr`); or a list of these, replaced together.
            baselines: Replacements, as for `TextSegmentInput`; None: the input's own, or
                `ModelBaselines` if it has none. Texts are drawn until one has as many tokens as the
                feature.
            output_unit, output_baselines: Features of the target, as for `GenerationAttribution`.
            gen_args: As for `GenerationAttribution`.
            kind: ``"noise"``: instead of a replacement, Gaussian noise is added to the embeddings
                of the feature's tokens. No other text is needed, but the result is no possible
                text.
            direction: ``"denoise"``: cells of the corrupted text are taken from the clean one, and
                an effect is the value restored: which cells are sufficient. ``"noise"``: cells of
                the clean text are corrupted, and an effect is the value lost: which cells are
                necessary.
            places: What is patched together: ``"token"``: each position by itself; ``"feature"``:
                the positions of each feature; or lists of positions.
            first: Patch only this many cells, those ranked highest by attribution patching (one
                backward pass per token); effects of others are NaN. Its estimates are wrong by
                factors and are not reported.
            n_draws: Number of replacements or noise samples averaged over. Default: 1 replacement,
                or 10 noise samples.
            noise_scale: Standard deviation of the noise, in units of that of the text's embeddings.
            seed: Seeds all random choices.
            perturbations_per_eval: Maximum number of rows per batch; by default as memory allows.
            show_progress: Whether to show a bar over the rows.
            checkpoint: A file that ends in ``.safetensors``, or a folder, as for
                `GenerationAttribution`: rows that were run before are not run again, even if
                `places`, `first`, `direction` or `n_draws` change.

        Returns:
            The effects.

        Raises:
            ValueError: If an argument is out of range or would have no effect, the feature is
                unknown or has no replacement of as many tokens, or the model's streams cannot be
                patched.
            TypeError: If an argument has the wrong type, or features own no tokens.
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
            raise ValueError("activation patching takes text only, no images.")
        context.prompt.places()  # raises if the input knows none, before the costly part
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
        scale = noise_scale if is_noise else None
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
            corrupt = partial(
                self._corrupted, which, context, generated, tokenizer, n_draws, scale, seed
            )
            # What the model draws depends on rounding; all processes must use the same texts.
            texts = self._processes.decide(corrupt)
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
            "noise_scale": scale,
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
        """What results depend on besides the arguments of `trace`, as JSON values."""
        return {
            **model_identity(self.model),
            "method": type(self).__name__,
            "attr_target": describe(self.attr_target),
        }

    def _tokenizer_of(self, inp: InterpretableInput) -> Any:
        found = self.tokenizer or getattr(inp, "tokenizer", None)
        if found is None:
            raise ValueError(
                f"a {type(inp).__name__} does not expose its tokenizer: give "
                "`ActivationPatching(model, tokenizer)`."
            )
        return found

    def _corrupted(
        self,
        which: Selection,
        context: Context,
        generated: GeneratedText,
        tokenizer: Any,
        n_draws: int,
        scale: float | None,
        seed: int,
    ) -> list[Corruption]:
        """Texts with the features replaced or, with a scale, with noise on their embeddings."""
        if scale is None:
            return replacement_texts(
                which, context, generated, tokenizer, n_draws=n_draws, seed=seed
            )
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
        runs: Patched runs of the model.
        clean: The original text.
        texts: Corrupted texts, one per draw.
        target: Token ids ``(n_target,)``.
        foils: Foils of a contrast.
        groups: Positions that are patched together.
        direction: As for `ActivationPatching.trace`.

    Raises:
        ValueError: If more than the stream passes from a layer to the next.
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
            ranks: Ranks of cells ``(n_layers + 1, n_places)``; None: all are patched.
            first: Patch the cells whose rank is below this.
        """
        each: list[Tensor] = []
        # All rows are requested at once, so that batches are full and the bar knows the total.
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
        """Ranks in which to patch cells, ``(n_layers + 1, n_places)``; -1: not at all."""
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
        """The result of a trace.

        Args:
            which: The features that were replaced.
            output_tokens: Names of the target tokens.
            effects, ranks: As computed.
            provenance: Their provenance.
        """
        return PatchingResult(
            effects=effects.mean(0),
            # A single draw gives no standard error.
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
        """(text that is read, text whose stream is put there)."""
        return (text, self._clean) if self._denoises else (self._clean, text)

    def _may_differ(self, text: Corruption) -> Tensor:
        """Cells that differ between the two texts, bool ``(n_layers + 1, n_places)``."""
        streams = self._runs.streams(self._clean), self._runs.streams(text)
        same = self._runs.scorer.processes.decide(partial(same_streams, *streams))
        # Positions before the first change differ by rounding only.
        same[:, : text.places[0]] = True
        differs = [~same[:, list(group)].all(-1) for group in self._groups]
        return torch.stack(differs, -1)

    def _unpatched(self, text: Corruption, ranks: Tensor | None) -> Tensor:
        """Effects before patching: 0 where the texts do not differ, NaN elsewhere."""
        differs = self._may_differ(text)
        blank = torch.zeros(differs.shape, dtype=torch.float64, device="cpu")
        if ranks is not None:
            blank[differs] = torch.nan
        return blank.expand(len(self._target), -1, -1).clone()

    def _causal(self, effects: Tensor, text: Corruption) -> Tensor:
        """Sets effects of positions after the predicting one to exactly 0, without rounding."""
        firsts = torch.tensor([min(g) for g in self._groups], dtype=torch.int64, device="cpu")
        predicting = torch.tensor(self._clean.positions, dtype=torch.int64, device="cpu")
        later = (firsts > predicting[:, None])[:, None].expand_as(effects)
        effects = effects.masked_fill(later, 0.0)
        missing = torch.tensor(text.positions, dtype=torch.int64, device="cpu") < 0
        return effects.masked_fill(missing[:, None, None], torch.nan)

    def _check_streams(self, text: Corruption) -> None:
        """Checks values with a whole stream patched against those of the stream's own text."""
        runs, clean = self._runs, self._clean
        n_streams = len(runs.streams(clean))
        every = tuple(range(len(clean.ids)))
        cells = [Patched(text.key, clean.key, layer, every) for layer in range(n_streams)]
        [expected, *found] = runs.values([Patched(clean.key), *cells])
        predicted = torch.tensor(text.positions, dtype=torch.int64, device="cpu") >= 0
        tolerance = runs.tolerance(clean, expected)[predicted].clamp(min=_BESIDE)
        for layer, values in enumerate(found):
            error = (values - expected)[predicted].abs()
            if not bool((error <= tolerance).all()):
                raise ValueError(
                    f"stream {layer} of {n_streams - 1} is not all that passes between this "
                    "model's layers: with the whole stream of the clean text, values are up to "
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
    """Refuses arguments without effect.

    Raises:
        ValueError: If there is one.
    """
    if is_noise and any(own is not None for own in baselines):
        raise ValueError('baselines would be ignored: `kind="noise"` replaces nothing.')
    if not is_noise and scale != _NOISE_SCALE:
        raise ValueError('`noise_scale` would be ignored: it belongs to `kind="noise"`.')
    if not 0 < scale < float("inf"):
        raise ValueError(f"`noise_scale` is {scale!r}: give a number above 0.")
