"""`GenerationGradientAttribution`: captum's LLM gradient attribution for prompt and output."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from captum.attr import InterpretableInput, LLMGradientAttribution
from captum.attr._utils.attribution import GradientAttribution
from torch import Tensor

from captum_llm_ext import _compat
from captum_llm_ext.attribution.gradient.arguments import GradientArguments, present_features
from captum_llm_ext.attribution.gradient.path_groups import Absent
from captum_llm_ext.attribution.gradient.paths import Paths, Unattributed
from captum_llm_ext.attribution.model_access import ModelAccess
from captum_llm_ext.attribution.target import Skipped, announce_answer
from captum_llm_ext.base.arguments import check_passed_on
from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.coalitions import Solution
from captum_llm_ext.contrast import Contrast, Foils, as_value, scored
from captum_llm_ext.methods import EquivalentLinearSystem, LayerSaliency
from captum_llm_ext.methods.path_methods import SUPPORTED, Points, check_method
from captum_llm_ext.model import AttrTarget
from captum_llm_ext.model.scoring.progress import ProgressBar, Shown
from captum_llm_ext.result import GenerationAttributionResult, SpanAttribution
from captum_llm_ext.result.assembled import assembled_without_coalitions
from captum_llm_ext.text.inputs import GeneratedText, Prompt, as_prompt
from captum_llm_ext.text.segment import Unit

# Share of the largest explained value that attributions may miss without a warning. Chosen, not
# measured: a gap this large can hide a feature; 50 points miss about .01 nats from same-slot texts,
# 30 from zero vectors.
_WIDE_GAP = 0.1
# Share of a value that the sum of a linear system may miss. Measured: 1e-6 in float32, in bfloat16
# .006 in the median and .02 at most. Beyond the limit the value is not a logit, or the precision is
# half.
_MOST_NONLINEAR, _MOST_ROUNDING = 1e-3, 1e-3


class _Found(NamedTuple):
    """Gradient attributions of the target tokens, or of `spans` of them if given."""

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

    Takes what captum's `LLMGradientAttribution` takes. Attributions are summed over the layer's
    dimension and over a feature's tokens. Prompt and earlier output move together from absent to
    present, so with `LayerIntegratedGradients` the attributions of a target token sum to
    ``full_values - empty_values``, up to the quadrature error `efficiency_gap`.

    * `LayerIntegratedGradients`: gradients at points of the straight line between the layer's
      activations, absent and present.
    * `LayerGradientXActivation`: the gradient at the present activation times this activation. It
      explains, to first order, the difference to the activation 0, whose value is `empty_values`.
      (`memory_efficient` has no effect: gradients are always summed as they are computed.)
    * `LayerGradientShap`: expected gradients, at a random point between a random draw of the
      baselines and the present activation, with standard errors over the `n_samples` draws (bounds
      for the sums that `attribute_span` makes). Captum's own class intends the same but, with the
      integer masks of `LLMGradientAttribution`, rounds the random point down to 0 and takes all
      gradients at the baseline. Here they are taken at the random points, so numbers differ from
      captum's. With `CorpusBaselines` this is SHAP's GradientExplainer.
    * `LayerSaliency`: the norm of the gradient, averaged over a feature's tokens. It has no sign
      and no completeness: `empty_values` and `efficiency_gap` are NaN.
    * `EquivalentLinearSystem`: the exact contribution of each token to a logit with norms,
      attention weights and gates frozen; it needs no baseline. `empty_values` is the contribution
      of fixed text and biases (`fixed_attr`, `fixed_share`). Each call checks that the
      contributions sum to the logit (relative error 1e-6 in float32; in bfloat16 at most 2e-2, 6e-3
      in the median, were measured), otherwise it raises an error. ``attr_target="log_prob"`` is not
      linear in the logits: its gradient is explained, and `efficiency_gap` holds the remainder. A
      logit includes what the sentence pattern adds to any word at a position: to exclude it,
      explain a difference to other words of the same kind. The tokens already generated of the
      current word count as fixed text. With a `norm`, attributions are magnitudes like saliency;
      the check is the same.

    Args:
        attr_method: One of these over the model and a layer: a module whose activations have shape
            ``(batch, length, size)``. None, or the model's embedding, stands for everything that
            turns token ids into vectors. At higher layers, positions of fixed text (such as BOS)
            have absorbed information from earlier ones; their attributions belong to no feature and
            are part of `efficiency_gap`.
        tokenizer: The model's tokenizer.
        attr_target: What is explained for a target token: its ``"log_prob"`` in nats (captum's),
            its ``"prob"``, its ``"logit"``, its ``"contrast"`` against plausible other tokens (a
            `Contrast` says which), or a differentiable callable ``(logits (batch, n_target,
            vocabulary), target (n_target,)) -> (batch, n_target)``. None: the logit for
            `EquivalentLinearSystem`, the log-probability for all others.

    A target token takes one backward pass per point. With `attribute_spans` a whole sentence or
    answer takes one. If there are far fewer features than target tokens (passages with the output
    held fixed, groups of a `feature_mask`), forward-mode derivatives along the features are used
    instead, provided that they agree with the gradient at the first point.

    There is no ``accelerator=``: one text takes a few forward and backward passes, seconds on a
    single process. To distribute many texts, give `attribute_dataset` the accelerator: each process
    takes one prompt at a time.

    Raises:
        TypeError: If the method is not one of these, or its model not a causal language model.
        ValueError: If `attr_target` is unknown, the layer is not a module of the model, or the
            model is tensor parallel.
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
        if self._processes.are_several:
            raise ValueError(
                f"the model is sharded across {len(self._processes.ranks)} processes, and "
                "gradients need it whole: load it on one device or with a `device_map`, or take "
                "`GenerationAttribution`, which needs none."
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
        """Attributes the target, or what the model generates, to prompt and generated features.

        Args:
            inp: The prompt: captum's `TextTokenInput`, `TextSegmentInput` or `ChatInput`. Its
                baselines define what replaces an absent feature: the embedding of a token id at
                each of its positions, or those of another text. A text with as many tokens replaces
                it token by token; of a text of another length, the mean embedding is used at each
                of the feature's positions. Deletion, which has no path, becomes the zero vector.
            target: The text to explain, as text or as token ids ``(n_target,)``: a tensor, an
                array, a list, or the output of a tokenizer or of ``generate`` for one text, of
                which the part after the prompt is taken. None: the model generates it.
            gen_args: Arguments of the model's ``generate``, including ``generation_config``; only
                without a target. Default: greedy, 25 new tokens; everything else follows the
                model's own generation configuration, and ``provenance["generation"]`` records what
                was used. One answer is explained. Sampling is seeded by `seed`.
            output_unit: Features made of the target: ``"token"``, ``"word"``, ``"sentence"``…, each
                special token a feature; or spans or a segmenter over its text including special
                tokens, as in ``"<|channel|>final<|message|>golf"`` (concatenated `output_pieces` of
                the result). None holds the target fixed, as captum does.
            output_baselines: Replacements of absent generated features, as for `TextSegmentInput`.
                Default: as the prompt's baseline defines.
            seed: Seeds all random choices. The global random state is neither read nor changed.
            n_draws: Draws of a random baseline, such as `CorpusBaselines`, whose mean embedding
                replaces an absent feature. Default: 8; 1 for other baselines. `LayerGradientShap`
                uses one draw for each of its `n_samples` instead.
            absent: ``"zero"``: the zero vector replaces absent features, whatever the baselines.
            feature_mask: As for `GenerationAttribution`: shape ``(1, n_features)``, equal numbers
                are one feature.
            show_progress: Whether to show a bar over the points; or a `Listener`.
            baselines: As in captum: which prompt features are present at the start of the path (1 =
                present, otherwise absent), shape ``(1, n_features)``; for `LayerGradientShap` ``(n,
                n_features)`` to draw from, or a callable that returns that. Default: none.
            n_steps: Number of points of `LayerIntegratedGradients`. Default: 50.
            method: Its quadrature rule: ``"gausslegendre"`` (default), ``"riemann_trapezoid"`` and
                captum's others.
            internal_batch_size: Maximum number of points per pass; by default as memory allows.
            n_samples: Number of samples of `LayerGradientShap`. Default: 32 (captum's 5 are too
                few).
            stdevs: Standard deviation of the noise that `LayerGradientShap` adds to the present
                activations.
            attribute_to_layer_input: Whether to attribute to the layer's input instead of its
                output.
            grad_kwargs: Passed to `torch.autograd.grad`.
            return_convergence_delta: Not supported: the result's `efficiency_gap` always holds it.
            skip_tokens: Deprecated, from captum up to 0.8: tokens left out of the target.
            **kwargs: Further arguments of the method's own ``attribute``, accepted only if they
                repeat the default.

        Returns:
            The result; its tensors are on the model's device, in float32 (float64 for float64
            models). There are no coalitions: `masks` and `values` hold the two ends of the path,
            and `refit` is not available.

        Raises:
            ValueError: If an argument is out of range or would have no effect, the target is empty
                or outside the vocabulary, prompt and target exceed the model's maximum length, the
                layer is unsuitable, no gradient reaches it, or values are not finite.
            TypeError: If an argument has the wrong type.

        Warns:
            UserWarning: If `n_steps` is too small for completeness; or if the contributions of a
                linear system do not sum to the value, which is not a logit or was computed in half
                precision.
        """
        check_passed_on(kwargs, self.attr_method, GenerationGradientAttribution.attribute)
        arguments = GradientArguments(
            output_unit=output_unit,
            output_baselines=output_baselines,
            seed=seed,
            n_draws=n_draws,
            absent=absent,
            baselines=baselines,
            n_steps=n_steps,
            method=method,
            internal_batch_size=internal_batch_size,
            n_samples=n_samples,
            stdevs=stdevs,
            attribute_to_layer_input=attribute_to_layer_input,
            grad_kwargs=grad_kwargs,
            return_convergence_delta=return_convergence_delta,
        )
        found = self._explain(
            inp,
            target,
            gen_args,
            None,
            arguments,
            feature_mask=feature_mask,
            show_progress=show_progress,
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
        """Attributes spans of the target, such as its sentences, with one backward pass for each.

        The same as ``attribute(…).attribute_span(start, stop)``, which sums token by token, at the
        cost of one gradient of the sum. If a span covers several generated words (`output_unit`
        other than ``"token"`` or None), each word takes its own path and backward pass.

        Args:
            inp, target, gen_args: As for `attribute`.
            spans: Pairs (start, stop) of target positions, negative ones from the end. None: the
                whole target.
            **arguments: The other arguments of `attribute`.

        Returns:
            One attribution for each span. Standard errors are those of the sum or, if it takes
            several paths, their sum, which is an upper bound.

        Raises:
            ValueError: As for `attribute`; or if a span is empty or out of range, if probabilities
                are explained, whose sum has no meaning, or if the method is `LayerSaliency` or
                `EquivalentLinearSystem`: use `attribute`, and `attribute_span` of its result.
            TypeError: If an argument is unknown or has the wrong type.

        Warns:
            UserWarning: As for `attribute`.
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
        others = ("inp", "target", "gen_args", "feature_mask", "show_progress", "skip_tokens")
        found = self._explain(
            **{name: given.pop(name) for name in others},
            spans=[(0, None)] if spans is None else spans,
            arguments=GradientArguments(**given),
        )
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
        arguments: GradientArguments,
        *,
        feature_mask: Tensor | None,
        show_progress: Shown,
        skip_tokens: Skipped | None,
    ) -> "_Found":
        """Gradient attributions of each target token or of the sums over spans."""
        points = arguments.points(self.attr_method)
        generation = None if target is not None else self.generation(gen_args)
        prompt = as_prompt(inp, self.tokenizer, feature_mask)
        prompt.places()  # raises if the input knows none, before the costly part
        present = present_features(
            arguments.baselines, prompt.n_features, is_drawn=points.is_sampled
        )
        run = self._run(prompt, self._scorer(None), arguments.seed)
        context = run.context
        ids = self._target_ids(run, target, gen_args, generation, skip_tokens)
        if generation is not None:
            announce_answer(show_progress, self, context.full, ids, generation)
        generated = self._generated(run, ids, arguments.output_unit, arguments.output_baselines)
        ranges = None if spans is None else _ranges(spans, len(ids))
        deterministic = context.prompt.deterministic and generated.deterministic
        paths = Paths(
            self.model,
            self._layer(),
            points,
            context,
            present,
            scored(self.attr_target),
            of_input=arguments.attribute_to_layer_input,
            n_draws=arguments.n_draws_of(points, deterministic=deterministic),
            absent=arguments.absent,
            seed=arguments.seed,
            most_rows=arguments.internal_batch_size,
            grad_kwargs=arguments.grad_kwargs,
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
        if paths.is_complete:
            _warn_of_gap(solution, arguments.n_steps)
        is_zero = arguments.is_zero(points)
        provenance: dict[str, Any] = {
            **self._provenance(run, generated, generation),
            **_path_provenance(paths),
            "columns": list(context.prompt.columns),
            "contrast": foils and foils.about,
            "absent": _absence(points, arguments.absent),
            "deterministic_baselines": deterministic,
            "n_draws": paths.n_draws,
            "baselines": None if is_zero else repr(context.prompt.own_baseline),
            "matches": context.matches(generated),
            **_linear_provenance(
                paths.unattributed, solution.full_values, is_sum=points.measure == "product"
            ),
        }
        return _Found(
            context.prompt,
            generated,
            solution,
            ranges or [],
            joint,
            paths.n_rows,
            foils,
            provenance,
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
                f"`layer` is {type(layer).__name__}, which is not a module of the model: give one "
                "of its own, such as `model.get_input_embeddings()`."
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
    """The name of what replaces absent features, for provenance."""
    if points.is_local:
        return "nothing"
    return "zero activation" if points.from_zero else absent


def _linear_provenance(
    parts: Mapping[int, Unattributed], values: Tensor, *, is_sum: bool
) -> dict[str, Any]:
    """The parts of a linear system's values that belong to no feature, for provenance.

    Norms have no completeness: for them only the check is recorded.

    Warns:
        UserWarning: If attributions and these parts do not sum to the value.
    """
    if not parts:
        return {}
    each = [parts[t] for t in range(len(values))]
    defect, nonlinear = max(part.defect for part in each), max(abs(part.nonlinear) for part in each)
    if not is_sum:
        return {"reconstruction_error": defect}
    if nonlinear > _MOST_NONLINEAR * float(values.abs().max()):
        warn_user(
            f"attributions of a linear system sum to a logit or a difference of some, not to this "
            f"value, from which they are up to {nonlinear:.2g} apart (see `efficiency_gap`): give "
            '`attr_target="logit"` for a sum that is exact.',
        )
    if defect > _MOST_ROUNDING:
        warn_user(
            f"in this precision the sum of all shares misses the value by up to {defect:.1g} of "
            "it: load the model in float32 for a sum that is exact.",
        )
    return {
        "fixed_attr": [part.fixed for part in each],
        "fixed_share": [part.fixed_share for part in each],
        "constant_attr": [part.constant for part in each],
        "reconstruction_error": defect,
    }


def _warn_of_gap(solution: Solution, n_steps: int | None) -> None:
    explained = solution.full_values - solution.empty_values
    worst, most = float(solution.efficiency_gap.abs().max()), float(explained.abs().max())
    if worst > _WIDE_GAP * most:
        n = 50 if n_steps is None else n_steps
        warn_user(
            f"{n} steps are too few for this path: the attributions miss {worst:.2g} of what they "
            f"explain (up to {most:.2g}; see `efficiency_gap`). Give more `n_steps`, or baselines "
            "that are text of the same kind, from where the path is smoother than from zero.",
        )
