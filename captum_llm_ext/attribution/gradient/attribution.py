"""`GenerationGradientAttribution`: captum's LLM gradient attribution, for prompt and output."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from captum.attr import InterpretableInput, LLMGradientAttribution
from captum.attr._utils.attribution import GradientAttribution
from torch import Tensor

from captum_llm_ext import _compat
from captum_llm_ext.attribution.gradient.arguments import (
    check_common,
    check_own,
    check_used,
    present_features,
)
from captum_llm_ext.attribution.gradient.path_groups import Absent
from captum_llm_ext.attribution.gradient.paths import Paths, Unattributed
from captum_llm_ext.attribution.model_access import ModelAccess
from captum_llm_ext.attribution.target import (
    Skipped,
    announce_answer,
)
from captum_llm_ext.base.arguments import check_passed_on
from captum_llm_ext.coalitions import Solution
from captum_llm_ext.contrast import Contrast, Foils, as_value, scored
from captum_llm_ext.methods import EquivalentLinearSystem, LayerSaliency
from captum_llm_ext.methods.path_methods import SUPPORTED, Points, check_method, points_of
from captum_llm_ext.model import (
    AttrTarget,
)
from captum_llm_ext.model.scoring.progress import ProgressBar, Shown
from captum_llm_ext.result import GenerationAttributionResult, SpanAttribution
from captum_llm_ext.result.assembled import assembled_without_coalitions
from captum_llm_ext.text.inputs import GeneratedText, Prompt, as_prompt
from captum_llm_ext.text.segment import Unit

# Draws of random baselines, whose mean stands for what is absent: 8 same-slot texts named .99 of
# the known causes, one of them .93 (benchmarks/results/gradients.json).
_N_DRAWS = 8
# Part of the largest explained value that attributions may miss before a warning. A choice: a gap
# that large can hide a feature; 50 points miss some .01 nats from such texts, 30 from zero vectors.
_WIDE_GAP = 0.1
# Parts of a value that a linear system's sum may miss. Float32 misses 1e-6 of it, bfloat16 .006 in
# the median and .02 at most: beyond this the value is no logit, or the precision is half.
_MOST_NONLINEAR, _MOST_ROUNDING = 1e-3, 1e-3


class _Found(NamedTuple):
    """What gradients say of the target tokens, or of `spans` of them if there are any."""

    prompt: Prompt
    generated: GeneratedText
    solution: Solution
    spans: list[range]
    joint: Tensor | None
    n_rows: int
    foils: Foils | None
    provenance: dict[str, Any]


class GenerationGradientAttribution(ModelAccess, LLMGradientAttribution):
    """Attributes every token of a generated text by gradients, to the prompt and to earlier output.

    Takes what captum's `LLMGradientAttribution` takes. A token's attribution is summed over the
    layer's size, a feature's over its tokens. Prompt and earlier output go together from absent to
    present, so that under `LayerIntegratedGradients` the attributions of a target token sum to
    ``full_values - empty_values``, up to the error of the quadrature, which is `efficiency_gap`.

    * `LayerIntegratedGradients`: gradients at points of the straight line between the layer's
      activations, absent and present.
    * `LayerGradientXActivation`: the gradient at the present activation, times that. What it
      explains to first order is the difference to the activation 0: that is `empty_values`.
      (`memory_efficient` changes nothing: gradients are summed as they are found.)
    * `LayerGradientShap`: expected gradients, at a random point between a random draw of the
      baselines and the present activation, with standard errors over the `n_samples` draws (bounds
      for the sums that `attribute_span` makes). Captum's own class means the same but, over the
      integer masks of `LLMGradientAttribution`, rounds the random point down to 0: it takes all
      gradients at the baseline. Here they are taken where they belong, so these numbers differ
      from captum's. Over `CorpusBaselines` this is SHAP's GradientExplainer.
    * `LayerSaliency`: the norm of the gradient, a mean over a feature's tokens. It has no sign and
      sums to nothing: `empty_values` and `efficiency_gap` are NaN.
    * `EquivalentLinearSystem`: what each token adds to a logit, exactly, where norms, attention
      weights and gates are held at what they are; no baseline is asked for. `empty_values` is what
      fixed text and biases add (`fixed_attr`, `fixed_share`). Each call checks that the sum is the
      logit: to 1e-6 of it in float32, a few hundredths in bfloat16 (2e-2 at most, 6e-3 in the
      median, were measured), else the model is refused. ``attr_target="log_prob"`` explains its
      gradient along the logits, which it is no sum of: `efficiency_gap` tells the rest. What a
      sentence's pattern adds to any word in a place is part of a logit: give a difference to other
      words of its kind where that is not what is asked. While a word lasts, what is written of it
      counts as fixed text. With a `norm` it is a size, as saliency is, and the check is the same.

    Args:
        attr_method: One of these over the model and a layer: a module whose activations are
            ``(batch, length, size)``. None, or the model's embedding, finds everything that turns
            token ids into vectors. At layers further up, attributions of the places of fixed text
            (such as BOS), which has taken up what came before, belong to no feature and are part
            of `efficiency_gap`.
        tokenizer: The model's tokenizer.
        attr_target: What is explained for a target token: its ``"log_prob"`` in nats (captum's),
            its ``"prob"``, its ``"logit"``, its ``"contrast"`` against other tokens that would fit
            (a `Contrast` says which), or a differentiable callable ``(logits (batch, n_target,
            vocabulary), target (n_target,)) -> (batch, n_target)``. None: the logit for
            `EquivalentLinearSystem`, the log-probability for all others.

    A target token takes a way back through the model for each point. Whole sentences or the whole
    answer take one each with `attribute_spans`; and where there are far fewer features than target
    tokens (passages of a held output, groups of a `feature_mask`), derivatives along the features
    are taken instead, in forward mode, if those of the first point are the gradient's.

    There is no ``accelerator=``: the points of one text are a few passes and as many ways back,
    which a single process takes in seconds. What is shared out are texts: `attribute_dataset` takes
    the accelerator, and each process a prompt at a time.

    Raises:
        TypeError: If the method is another one, or its model no causal language model.
        ValueError: If `attr_target` is unknown, the layer no module of the model, or the model held
            together by several processes (tensor parallel).
    """

    SUPPORTED_METHODS = SUPPORTED
    SUPPORTED_INPUTS = (InterpretableInput,)

    def __init__(
        self,
        attr_method: GradientAttribution,
        tokenizer: Any,
        *,
        attr_target: AttrTarget | Contrast | None = None,
    ) -> None:
        check_method(attr_method)
        if attr_target is None:
            attr_target = "logit" if isinstance(attr_method, EquivalentLinearSystem) else "log_prob"
        _compat.check_causal(attr_method.forward_func)
        self.attr_target: AttrTarget | Contrast = as_value(attr_target)
        super().__init__(attr_method, tokenizer)
        self._access_model()
        if self._processes.are_many:
            raise ValueError(
                f"the model is held together by {len(self._processes.ranks)} processes, and "
                "gradients need it whole: load it on one device or with a `device_map`, or take "
                "`GenerationAttribution`, which asks for none."
            )

    def _method_settings(self) -> dict[str, Any]:
        layer, modules = self._layer(), _compat.uncompiled(self.model).named_modules()
        name = next((name for name, module in modules if module is layer), None)
        method: Any = self.attr_method
        return {
            "layer": name,
            "multiply_by_inputs": method.multiplies_by_inputs,
            **({"norm": norm} if (norm := getattr(method, "norm", None)) else {}),
        }

    def attribute(  # captum's arguments in captum's order, then keyword-only ones
        self,
        inp: InterpretableInput,
        target: str | Tensor | Sequence[int] | None = None,
        gen_args: Mapping[str, Any] | None = None,
        *,
        output_unit: Unit | None = "token",
        output_baselines: Any = None,
        seed: int = 0,
        n_draws: int | None = None,
        absent: Absent = "baseline",
        feature_mask: Tensor | None = None,
        show_progress: Shown = False,
        baselines: Any = None,
        n_steps: int | None = None,
        method: str | None = None,
        internal_batch_size: int | None = None,
        n_samples: int | None = None,
        stdevs: float | tuple[float, ...] | None = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: Mapping[str, Any] | None = None,
        return_convergence_delta: bool = False,
        skip_tokens: Skipped | None = None,
        **kwargs: Any,
    ) -> GenerationAttributionResult:
        """Attributes the target, or what the model generates, to its causes.

        Args:
            inp: The prompt: captum's `TextTokenInput`, `TextSegmentInput` or `ChatInput`. What
                stands for an absent feature is what its baselines say: the embedding of a token id
                in each of its places, or that of another text. A text of as many tokens stands
                token by token; of one of another length, the mean of its embeddings stands in each
                of the feature's places; for deletion, which a path cannot do, the zero vector does.
            target: The text to explain, as text or as token ids ``(n_target,)``: a tensor, an
                array, a list, or what a tokenizer or ``generate`` returned, of one text; then
                what comes after the prompt is meant. None: the model generates it.
            gen_args: Arguments of the model's ``generate``, among them a ``generation_config`` if
                you like, without a target only. Greedy, 25 new tokens, where they do not say
                otherwise; all else is as the model's own generation configuration has it, and
                ``provenance["generation"]`` tells what was done. One answer is explained. Sampling
                is seeded by `seed`.
            output_unit: Features made of the target: ``"token"``, ``"word"``, ``"sentence"``…, each
                special token by itself; or spans or a segmenter over its text with special tokens
                shown, as in ``"<|channel|>final<|message|>golf"`` (the result's `output_pieces`
                spell it). None holds it fixed: captum's numbers.
            output_baselines: What stands where such a feature is absent, as for `TextSegmentInput`.
                By default what the prompt's baseline does.
            seed: Seeds every random choice. The global random state is neither read nor changed.
            n_draws: Draws of a random baseline, such as `CorpusBaselines`, whose mean embedding
                stands for an absent feature. By default 8; with other baselines there is nothing
                to draw. `LayerGradientShap` takes one draw for
                each of its `n_samples` instead.
            absent: ``"zero"``: the zero vector stands for absent features, whatever the baselines.
            feature_mask: As for `GenerationAttribution`: shape ``(1, n_features)``, equal numbers
                are one feature.
            show_progress: Whether a bar over the points is shown; or a `Listener`, as there.
            baselines: As in captum: which features of the prompt are present at the path's
                beginning (1; anything else is absent), shape ``(1, n_features)``; for
                `LayerGradientShap` ``(n, n_features)`` to draw from, or a callable that returns
                that. By default none is.
            n_steps: Points of `LayerIntegratedGradients`. By default 50.
            method: Its rule: ``"gausslegendre"`` (default), ``"riemann_trapezoid"`` and the others
                of captum.
            internal_batch_size: At most so many points in a pass; by default what memory allows.
            n_samples: Draws of `LayerGradientShap`. By default 32 (captum's 5 are too few).
            stdevs: Standard deviation of the noise that it adds to the present activations.
            attribute_to_layer_input: Whether the layer's input is meant, not its output.
            grad_kwargs: Passed on to `torch.autograd.grad`.
            return_convergence_delta: `efficiency_gap` of the result always tells it.
            skip_tokens: Deprecated, as captum had it up to 0.8: tokens left out of the target.
            **kwargs: None is known. What the method's own ``attribute`` takes may be given as long
                as it says no more than the default does.

        Returns:
            The result; its tensors are on the model's device, in float32 (float64 for float64
            models). There are no coalitions: `masks` and `values` hold the path's two ends, and
            `refit` has nothing to go by.

        Raises:
            ValueError: If an argument is out of range or would be ignored, the target is empty or
                outside the vocabulary, prompt and target are longer than the model's positions,
                the layer does not suit, no gradient reaches it, or values are not finite.
            TypeError: If an argument is of the wrong kind.

        Warns:
            UserWarning: If `n_steps` is too small for the attributions to sum to what they explain;
                or a linear system's do not, for the value is no logit, or in half precision.
        """
        check_passed_on(kwargs, self.attr_method, GenerationGradientAttribution.attribute)
        found = self._explain(
            inp,
            target,
            gen_args,
            None,
            output_unit=output_unit,
            output_baselines=output_baselines,
            seed=seed,
            n_draws=n_draws,
            absent=absent,
            feature_mask=feature_mask,
            show_progress=show_progress,
            baselines=baselines,
            n_steps=n_steps,
            method=method,
            internal_batch_size=internal_batch_size,
            n_samples=n_samples,
            stdevs=stdevs,
            attribute_to_layer_input=attribute_to_layer_input,
            grad_kwargs=grad_kwargs,
            return_convergence_delta=return_convergence_delta,
            skip_tokens=skip_tokens,
        )
        return assembled_without_coalitions(
            inp,
            found.prompt,
            found.generated,
            found.solution,
            found.joint,
            n_evaluations=found.n_rows,
            like=self._numbers(),
            foils=found.foils,
            provenance=found.provenance,
        )

    def attribute_spans(
        self,
        inp: InterpretableInput,
        target: str | Tensor | Sequence[int] | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        gen_args: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> list[SpanAttribution]:
        """Attributes whole spans of the target, such as its sentences, with one way back for each.

        What ``attribute(…).attribute_span(start, stop)`` adds up token by token, for the cost of a
        gradient of the sum. Where a span's tokens stand in several generated words (`output_unit`
        other than ``"token"`` or None), each word has a path and a way back of its own.

        Args:
            inp, target, gen_args: As for `attribute`.
            spans: First target token and the one after the last of each, negative ones from the
                end. None: the whole target.
            **arguments: The others of `attribute`.

        Returns:
            One attribution for each span. Standard errors are those of the sum, or, where several
            paths were taken for it, these added up: an upper bound.

        Raises:
            ValueError: As `attribute`; or if a span is empty or out of range, if probabilities are
                explained, whose sum means nothing, or the method takes norms or a linear system:
                take its `attribute`, and of the result `attribute_span`.
            TypeError: If an argument is unknown or of the wrong kind.

        Warns:
            UserWarning: As `attribute`.
        """
        if self.attr_target == "prob" or isinstance(
            self.attr_method, LayerSaliency | EquivalentLinearSystem
        ):
            what = (
                "probabilities of tokens do not add up to that of a span"
                if self.attr_target == "prob"
                else f"{type(self.attr_method).__name__} explains each token by itself"
            )
            raise ValueError(f"{what}: take `attribute`.")
        bound = inspect.signature(self.attribute).bind(inp, target, gen_args, **arguments)
        bound.apply_defaults()
        given = bound.arguments
        check_passed_on(
            given.pop("kwargs"), self.attr_method, GenerationGradientAttribution.attribute
        )
        found = self._explain(spans=[(0, None)] if spans is None else spans, **given)
        prompt, generated, solution = found.prompt, found.generated, found.solution
        own = torch.tensor(prompt.columns, dtype=torch.int64, device="cpu")
        later = torch.arange(prompt.n_features, solution.attributions.shape[1], device="cpu")
        columns = torch.cat([own, later])
        like = self._numbers()
        return [
            SpanAttribution(
                start=span.start,
                stop=span.stop,
                tokens=list(generated.labels[span.start : span.stop]),
                names=[*prompt.names, *generated.names],
                values=solution.attributions[i, columns].to(like, copy=True),
                standard_errors=solution.standard_errors[i, columns].to(like, copy=True),
                n_prompt=len(prompt.names),
                features=[*prompt.columns, *later.tolist()],
            )
            for i, span in enumerate(found.spans)
        ]

    def _explain(
        self,
        inp: InterpretableInput,
        target: str | Tensor | Sequence[int] | None,
        gen_args: Mapping[str, Any] | None,
        spans: Sequence[tuple[int, int | None]] | None,
        *,
        output_unit: Unit | None,
        output_baselines: Any,
        seed: int,
        n_draws: int | None,
        absent: Absent,
        feature_mask: Tensor | None,
        show_progress: Shown,
        baselines: Any,
        n_steps: int | None,
        method: str | None,
        internal_batch_size: int | None,
        n_samples: int | None,
        stdevs: float | tuple[float, ...] | None,
        attribute_to_layer_input: bool,
        grad_kwargs: Mapping[str, Any] | None,
        return_convergence_delta: bool,
        skip_tokens: Skipped | None,
    ) -> "_Found":
        """What gradients say, of each target token or of the sums over spans."""
        method_arguments = {
            "n_steps": n_steps,
            "method": method,
            "internal_batch_size": internal_batch_size,
        }
        method_arguments |= {"n_samples": n_samples, "stdevs": stdevs, "baselines": baselines}
        check_own(self.attr_method, method_arguments | {"grad_kwargs": grad_kwargs})
        check_common(
            absent=absent,
            n_draws=n_draws,
            internal_batch_size=internal_batch_size,
            return_convergence_delta=return_convergence_delta,
        )
        points = points_of(
            self.attr_method,
            n_steps=n_steps,
            rule=method,
            n_samples=n_samples,
            stdevs=stdevs,
            seed=seed,
        )
        is_zero = points.from_zero or absent == "zero"
        check_used(
            points,
            is_zero=is_zero,
            n_draws=n_draws,
            output_baselines=output_baselines,
            is_held=output_unit is None,
        )
        generation = None if target is not None else self.generation(gen_args)
        prompt = as_prompt(inp, self.tokenizer, feature_mask)
        prompt.places()  # whether it knows any, before the costly part
        present = present_features(baselines, prompt.n_features, is_drawn=points.is_sampled)
        run = self._run(prompt, self._scorer(None), seed)
        context = run.context
        ids = self._target_ids(run, target, gen_args, generation, skip_tokens)
        if generation is not None:
            announce_answer(show_progress, self, context.full, ids, generation)
        generated = self._generated(run, ids, output_unit, output_baselines)
        ranges = None if spans is None else _ranges(spans, len(ids))
        deterministic = context.prompt.deterministic and generated.deterministic
        if deterministic and n_draws is not None:
            raise ValueError(
                "`n_draws` would be ignored: every draw of these baselines is the same. Random "
                "ones are lists of several texts, or `CorpusBaselines(texts)`."
            )
        paths = Paths(
            self.model,
            self._layer(),
            points,
            context,
            present,
            scored(self.attr_target),
            of_input=attribute_to_layer_input,
            n_draws=1 if deterministic or is_zero else n_draws or _N_DRAWS,
            absent=absent,
            seed=seed,
            most_rows=internal_batch_size,
            grad_kwargs=grad_kwargs,
        )
        foils = self._foils(run)
        joint = None
        bar = ProgressBar("points of the path", "row", is_shown=show_progress)
        paths.on_total, paths.on_rows = bar.announce, bar.advance
        with bar.shown():
            solution = paths.attribute(generated, foils and foils.tensor, spans=ranges)
            if self.attr_target == "prob":
                fixed = context.generated(ids, None, None)
                joint = paths.attribute(fixed, is_joint=True).attributions[0]
        provenance: dict[str, Any] = {
            **self._provenance(run, generated, generation),
            **_path_provenance(paths),
            "columns": list(context.prompt.columns),
            "contrast": foils and foils.about,
            "absent": _absence(points, absent),
            "deterministic_baselines": deterministic,
            "n_draws": paths.n_draws,
            "baselines": None if is_zero else repr(context.prompt.own_baseline),
            "matches": context.matches(generated),
        }
        if paths.is_complete:
            _warn_of_gap(
                solution.efficiency_gap, solution.full_values - solution.empty_values, n_steps
            )
        rests = _linear_provenance(
            paths.unattributed, solution.full_values, is_sum=points.measure == "product"
        )
        return _Found(
            context.prompt,
            generated,
            solution,
            ranges or [],
            joint,
            paths.n_rows,
            foils,
            provenance | rests,
        )

    def _layer(self) -> torch.nn.Module | None:
        layer: Any = getattr(self.attr_method, "layer", None)
        if isinstance(layer, list | tuple):
            layers = cast("list[Any]", layer)
            if len(layers) != 1:
                raise ValueError(
                    f"`layer` is a list of {len(layers)}: give one module, or None for all "
                    "embeddings of token ids."
                )
            layer = layers[0]
        layer = None if layer is None else _compat.uncompiled(layer)
        if layer is not None and all(layer is not module for module in self.model.modules()):
            raise ValueError(
                f"`layer` is {type(layer).__name__}, which is no module of the model: give one of "
                "its own, such as `model.get_input_embeddings()`."
            )
        return layer


def _ranges(spans: Sequence[tuple[int, int | None]], n_target: int) -> list[range]:
    found = [range(n_target)[slice(start, stop)] for start, stop in spans]
    if not found or not all(found):
        raise ValueError(
            f"`spans` is {spans!r} for {n_target} target tokens: give the first token and the one "
            "after the last of each, with a token or more in it."
        )
    return found


def _path_provenance(paths: Paths) -> dict[str, Any]:
    points = paths.points
    return {
        "estimator": points.name,
        "gradients": True,
        **dict(points.settings),
        "layer": paths.layer_names,
        "multiply_by_inputs": points.multiplies,
        "unsigned": points.measure != "product",
        "estimate": points.is_sampled or paths.n_draws > 1,
        "n_evaluations": paths.n_rows,
        "probe": None if paths.found is None else paths.found.provenance(),
        "batching": None if paths.found is None else paths.found.batching,
    }


def _absence(points: Points, absent: Absent) -> str:
    """Name of what replaces absent features, for provenance."""
    if points.is_local:
        return "nothing"
    return "zero activation" if points.from_zero else absent


def _linear_provenance(
    parts: Mapping[int, Unattributed], values: Tensor, *, is_sum: bool
) -> dict[str, Any]:
    """The parts of a linear system's values that belong to no feature, for provenance.

    Norms sum to nothing: of them there is the check alone.

    Warns:
        UserWarning: If these are not the whole value.
    """
    if not parts:
        return {}
    each = [parts[t] for t in range(len(values))]
    defect, nonlinear = max(part.defect for part in each), max(abs(part.nonlinear) for part in each)
    if not is_sum:
        return {"reconstruction_error": defect}
    if nonlinear > _MOST_NONLINEAR * float(values.abs().max()):
        warnings.warn(
            f"attributions of a linear system sum to a logit or a difference of some, not to this "
            f"value, from which they are up to {nonlinear:.2g} apart (see `efficiency_gap`): give "
            '`attr_target="logit"` for a sum that is exact.',
            stacklevel=3,
        )
    if defect > _MOST_ROUNDING:
        warnings.warn(
            f"in this precision the sum of all shares misses the value by up to {defect:.1g} of "
            "it: load the model in float32 for a sum that is exact.",
            stacklevel=3,
        )
    return {
        "fixed_attr": [part.fixed for part in each],
        "fixed_share": [part.fixed_share for part in each],
        "constant_attr": [part.constant for part in each],
        "reconstruction_error": defect,
    }


def _warn_of_gap(gap: Tensor, explained: Tensor, n_steps: int | None) -> None:
    worst, most = float(gap.abs().max()), float(explained.abs().max())
    if worst > _WIDE_GAP * most:
        n = 50 if n_steps is None else n_steps
        warnings.warn(
            f"{n} steps are too few for this path: the attributions miss {worst:.2g} of what they "
            f"explain (up to {most:.2g}; see `efficiency_gap`). Give more `n_steps`, or baselines "
            "that are text of the same kind, from where the path is smoother than from zero.",
            stacklevel=3,
        )
