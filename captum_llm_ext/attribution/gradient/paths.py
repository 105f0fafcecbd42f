"""Attributions of target tokens by gradients along paths from absent to present."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.attribution.gradient.path_groups import (
    Absent,
    Apart,
    Features,
    PathGroup,
    absent_embeddings,
    features,
    held_positions,
    path_groups,
)
from captum_llm_ext.coalitions import Solution
from captum_llm_ext.methods.path_methods import Points
from captum_llm_ext.model import AttrTarget, TokenRow
from captum_llm_ext.model.exclusive import exclusive_use
from captum_llm_ext.model.forward.rounding import rounding
from captum_llm_ext.model.gradients.backward import Linear, TargetGradients, initial_plan
from captum_llm_ext.model.gradients.forward_mode import n_extra_passes
from captum_llm_ext.model.gradients.forward_pass import ForwardPass, Row
from captum_llm_ext.model.gradients.frozen import check_sum, culprit
from captum_llm_ext.model.gradients.layers import Layers, modules_reading
from captum_llm_ext.model.probe import Findings, findings
from captum_llm_ext.text.baselines import draw_generator
from captum_llm_ext.text.inputs import Context, GeneratedText


class Unattributed(NamedTuple):
    """The parts of a value that a linear system attributes to no feature.

    Attributes:
        fixed: Contribution of fixed text, in the unit of the value.
        fixed_share: Its share of all tokens' contributions, by absolute value.
        constant: Contribution of biases, position tables and other constants.
        defect: Relative error of the sum of all contributions.
        nonlinear: The value minus that sum, if it is neither a logit nor a difference of logits.
    """

    fixed: float
    fixed_share: float
    constant: float
    defect: float
    nonlinear: float


class Paths:
    """The paths of one prompt through one model.

    Args:
        model: The model.
        layer: The layer whose activations are interpolated; None: everything that embeds token ids.
        points: Points of the path, and their weights.
        context: The prompt.
        kept: Prompt features that stay present, bool ``(n, n_features)``; with several rows each
            sampled point draws one.
        attr_target: The kind of value.
        of_input: Whether to attribute to the layer's input.
        n_draws: Draws of random baselines that are averaged.
        absent: What replaces absent features.
        seed: Seeds all draws.
        most_rows: Maximum number of points per pass.
        grad_kwargs: Passed to `torch.autograd.grad`.

    Attributes:
        n_draws: Draws of the baselines.
        n_rows: Number of points evaluated.
        found: Findings of the probe; None before the first target.
        unattributed: Per target token the parts that a linear system attributes to no feature.
        on_total: Called with a target's total number of points, before the first.
        on_rows: Called with the number of points of every pass.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | None,
        points: Points,
        context: Context,
        kept: Tensor,
        attr_target: AttrTarget,
        *,
        of_input: bool,
        n_draws: int,
        absent: Absent,
        seed: int,
        most_rows: int | None,
        grad_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self._model, self._layer, self.points = model, layer, points
        self._prompt, self._prompt_ids = context.prompt, context.full.ids
        self._kept = kept
        self._attr_target, self._of_input = attr_target, of_input
        self.n_draws = len(points.alphas) if points.is_sampled and n_draws > 1 else n_draws
        self._absent: Absent = "zero" if points.from_zero else absent
        self._seed, self._grad_kwargs = seed, grad_kwargs
        self._reader = ForwardPass(_compat.uncompiled(model))
        self._plan = initial_plan(_compat.input_device(model), most_rows)
        self._embeddings: Layers | None = None
        self._layers: Layers | None = None
        self.found: Findings | None = None
        self.n_rows = self._n_ids = 0
        self.unattributed: dict[int, Unattributed] = {}
        self.on_total: Callable[[int], None] | None = None
        self.on_rows: Callable[[int], None] | None = None

    @property
    def layer_names(self) -> list[str]:
        """Names of the attributed modules."""
        modules = self._layers.modules if self._layers else []
        names = {id(module): name for name, module in self._reader.model.named_modules()}
        return [names[id(module)] + ".input" * self._of_input for module in modules]

    @property
    def is_complete(self) -> bool:
        """Whether attributions sum to full minus empty values up to the quadrature error."""
        points = self.points
        whole = self._layers is self._embeddings and points.multiplies
        return whole and not points.is_sampled and not points.from_zero

    def attribute(
        self,
        generated: GeneratedText,
        foils: Tensor | None = None,
        *,
        is_joint: bool = False,
        spans: Sequence[range] | None = None,
    ) -> Solution:
        """Attributions of a target, float64 on the CPU, features of the prompt first.

        Standard errors are 0 if nothing is random.

        Args:
            generated: The target as features.
            foils: Foils of its tokens, ``(n_target, n_foils)``, for a contrast.
            is_joint: Whether the value is the product over all target tokens.
            spans: Target tokens whose values are summed, with one backward pass per sum; one row of
                the solution each. If a span takes several paths, its errors are their sum, an upper
                bound. None: a row for each target token.

        Raises:
            ValueError: If the layer is unsuitable, or values or gradients are not finite.
        """
        start = len(self._prompt_ids)
        if any(parameter.is_inference() for parameter in self._model.parameters()):
            raise ValueError(
                "the model's weights were made inside `torch.inference_mode()`, where there are "
                "no gradients: load the model outside of it, or take `GenerationAttribution`, "
                "which needs none."
            )
        with exclusive_use(self._model):
            target = generated.target
            ids = torch.tensor(
                [[*self._prompt_ids, *generated.ids[:-1]]], dtype=torch.int64, device="cpu"
            )
            ids = ids.to(_compat.input_device(self._model))
            self._n_ids = ids.shape[1]
            at = torch.arange(start - 1, start - 1 + len(target), device="cpu")
            whole = Row(ids, at, target, foils)
            found = self._probe(whole)
            last = whole.of([len(target) - 1], ids.shape[1])
            self._find_layers(last if found.last_only else whole)
        # Baselines may call a model, perhaps another one, so no lock is held meanwhile.
        own = features(
            self._prompt,
            start,
            generated,
            n_draws=self.n_draws,
            absent=self._absent,
            seed=self._seed,
        )
        with exclusive_use(self._model):
            return self._summed(generated, whole, own, is_joint, spans)

    def _summed(
        self,
        generated: GeneratedText,
        whole: Row,
        own: Features,
        is_joint: bool,
        spans: Sequence[range] | None,
    ) -> Solution:
        """Attributions summed over all path groups."""
        n_target, start = len(whole.target), own.start
        step_by_step = self.found is not None and self.found.step_by_step and n_target > 1
        if is_joint and step_by_step:
            raise ValueError(
                f"{type(self._model).__name__} is scored one token per pass: there is no joint "
                'probability to differentiate. Use `attr_target="log_prob"`.'
            )
        if spans is None:
            spans = [range(n_target)] if is_joint else [range(t, t + 1) for t in range(n_target)]
        summed = Solution.blank(len(spans), own.n_features)

        def spans_of(targets: Sequence[int]) -> list[int]:
            return [i for i, span in enumerate(spans) if any(t in span for t in targets)]

        apart: Apart = "always" if step_by_step else "never" if is_joint else "cheapest"
        groups = path_groups(
            generated,
            n_before=start,
            apart=apart,
            chosen=sorted({t for span in spans for t in span}),
            n_backward=lambda targets: self._n_backward(own, len(spans_of(targets))),
        )
        if self.on_total is not None:
            n_ends = 0 if self.points.is_local else self._n_baselines
            self.on_total(len(groups) * (1 + n_ends + len(self.points.alphas)))
        for group in groups:
            row = whole.of(list(group.targets), start + group.n_read)
            if callable(self._attr_target) and not (is_joint or step_by_step):
                row = replace(whole, chosen=group.targets)  # checked for all of them
            rows = spans_of(group.targets)
            sums = None
            if not is_joint:
                sums = [[i for i, t in enumerate(group.targets) if t in spans[s]] for s in rows]
            explain = self._local_attributions if self.points.is_local else self._path_attributions
            solution = explain(group, row, own, sums)
            summed.attributions[rows] += solution.attributions
            summed.standard_errors[rows] += solution.standard_errors
            summed.full_values[rows] += solution.full_values
            summed.empty_values[rows] += solution.empty_values
        # A token is not caused by itself or later ones: what models give these is rounding.
        n_before = torch.tensor(
            [0 if is_joint else max(generated.n_visible[t] for t in span) for span in spans],
            dtype=torch.int64,
            device="cpu",
        )
        later = torch.arange(own.n_features, device="cpu") >= n_before[:, None] + own.n_prompt
        summed.attributions[later] = 0.0
        summed.standard_errors[later] = 0.0
        return summed

    def _n_backward(self, own: Features, n_values: int) -> float:
        """Estimated number of passes beside the forward pass for this many values."""
        kept = int(self._kept.all(0).sum())
        is_plain = isinstance(self._attr_target, str) and not self.points.is_local
        return n_extra_passes(own.n_features - kept if is_plain else None, n_values)

    def _probe(self, whole: Row) -> Findings:
        """Probes the model: batch size and prefix handling depend on what it does."""
        row = TokenRow(tuple(whole.ids[0].tolist()), whole.at.tolist())
        with torch.no_grad():
            found = findings(_compat.uncompiled(self._model), [row])
        if found.kept is None:
            self._reader.keep_all()
        if found.apart:
            self._plan.most_rows = 1
        self._reader.seed = 0 if found.seeds else None
        self.found = found
        return found

    def _gradients(
        self, points: Points, layers: Layers, row: Row, sums: list[list[int]] | None
    ) -> TargetGradients:
        return TargetGradients(
            self._reader,
            layers,
            row,
            self._attr_target,
            self._plan,
            is_joint=sums is None,
            sums=sums,
            measure=points.measure,
            is_frozen=points.is_frozen,
            grad_kwargs=self._grad_kwargs,
            on_rows=self.on_rows,
        )

    def _path_attributions(
        self, group: PathGroup, row: Row, own: Features, sums: list[list[int]] | None
    ) -> Solution:
        """Attributions along a path.

        Args:
            group: The explained target tokens.
            row: The token row.
            own: The features.
            sums: Which tokens' values are summed; None: the value is their product.
        """
        points, layers = self.points, self._layers
        assert layers is not None
        present = self._read(layers, row)
        begin, free = self._baseline_activations(group, row, own, present)
        gradients = self._gradients(points, layers, row, sums)

        def between(rows: slice) -> tuple[list[Tensor], list[Tensor]]:
            return self._interpolated(present, begin(rows), free, rows)

        full = gradients.values(1, lambda _: (present, []))[0]
        empty = gradients.values(self._n_baselines, lambda rows: (begin(rows), [])).mean(0)
        # Positions that stay present need no derivative.
        owners = own.owners(row.length).where(free.any(0), own.n_features)
        each: list[Tensor] = []
        total = torch.zeros(gradients.n_values, own.n_features, dtype=torch.float64, device="cpu")
        for rows, summed in gradients.products(len(points.alphas), between, owners, own.n_features):
            total += torch.einsum("r,rtf->tf", points.weights[rows], summed)
            if points.is_sampled:
                each.append(summed)
        self.n_rows += gradients.n_rows
        return Solution(total, self._errors(each, total), full, empty)

    def _local_attributions(
        self, group: PathGroup, row: Row, own: Features, sums: list[list[int]] | None
    ) -> Solution:
        """Attributions from gradients at the original text, without a path."""
        points, layers = self.points, self._layers
        assert layers is not None
        present = self._read(layers, row)
        gradients = self._gradients(points, layers, row, sums)
        full = gradients.values(1, lambda _: (present, []))[0]
        owners = own.owners(row.length)
        owners[held_positions(group, own, self._kept, row.length)[0]] = own.n_features
        found = gradients.products(1, lambda _: (present, present), owners, own.n_features + 1)
        ((_, (summed,)),) = found
        self.n_rows += gradients.n_rows
        empty = torch.full_like(full, torch.nan)
        if gradients.linear is not None:
            is_fixed = owners == own.n_features
            self._note(group, row, gradients.linear, is_fixed, is_joint=sums is None)
        if points.measure != "product":
            # A mean, so that a feature of many tokens is not more salient than each of them.
            summed /= owners.bincount(minlength=own.n_features + 1).clamp(min=1)
        elif gradients.linear is not None:
            full, empty = gradients.linear.values, gradients.linear.constants + summed[:, -1]
        return Solution(summed[:, :-1], torch.zeros_like(summed[:, :-1]), full, empty)

    def _note(
        self,
        group: PathGroup,
        row: Row,
        linear: Linear,
        is_fixed: Tensor,
        *,
        is_joint: bool,
    ) -> None:
        """Records the parts of a linear system's values that belong to no feature.

        Raises:
            ValueError: If the contributions do not sum to the values.
        """
        model = self._reader.model
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

        def find(tolerance: float) -> str | None:
            return culprit(model, lambda: self._reader.logits(row.ids, row.at), tolerance)

        shares = linear.shares
        summed = shares.sum(1) + linear.constants
        apart = check_sum(summed, linear.expected, linear.sizes, dtype, find)
        if is_joint:
            return
        fixed = shares[:, is_fixed]
        whole = shares.abs().sum(1).clamp(min=torch.finfo(shares.dtype).tiny)
        for i, target in enumerate(group.targets):
            self.unattributed[target] = Unattributed(
                float(fixed[i].sum()),
                float(fixed[i].abs().sum() / whole[i]),
                float(linear.constants[i]),
                float(apart[i]),
                float((linear.values - linear.expected)[i]),
            )

    def _errors(self, each: list[Tensor], total: Tensor) -> Tensor:
        """Standard errors of a total, from the attributions of its samples if there are several."""
        n_samples = sum(len(some) for some in each)
        if n_samples > 1:
            return torch.cat(each).std(0) / n_samples**0.5
        # Neither a single sample nor an average over baseline draws gives a standard error.
        unknown = n_samples == 1 or self.n_draws > 1
        return torch.full_like(total, torch.nan if unknown else 0.0)

    def _interpolated(
        self, present: list[Tensor], absent: list[Tensor], free: Tensor, rows: slice
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Activations at some points, and their derivative along the path."""
        points = self.points
        free = _select_rows(free, rows)[..., None]
        activations: list[Tensor] = []
        changes: list[Tensor] = []
        for number, (end, begin) in enumerate(zip(present, absent, strict=True)):
            wide = torch.promote_types(end.dtype, torch.float32)
            target, begin = end.to(wide).expand(rows.stop - rows.start, -1, -1), begin.to(wide)
            if points.noise:
                target = target + points.noise * self._noise(end, number, rows) * free.to(end)
            change = target - begin
            alphas = points.alphas[rows].to(end.device, wide)[:, None, None]
            activations.append((begin + alphas * change).to(end.dtype))
            changes.append(change if points.multiplies else torch.ones_like(change))
        return activations, changes

    def _noise(self, end: Tensor, layer: int, rows: slice) -> Tensor:
        """Gaussian noise ``(n, length, size)``; equal for a point in every pass."""
        length, size = end.shape[1:]
        each = [
            torch.randn(
                (max(length, self._n_ids), size),  # independent of how much of the text is read
                generator=draw_generator(self._seed, point, layer),
                dtype=torch.float32,
                device="cpu",
            )[:length]
            for point in range(rows.start, rows.stop)
        ]
        return torch.stack(each).to(end.device)

    @property
    def _n_baselines(self) -> int:
        """Number of starts of the path: one, unless each sampled point has its own."""
        is_one = self.n_draws == 1 and len(self._kept) == 1
        return len(self.points.alphas) if self.points.is_sampled and not is_one else 1

    def _baseline_activations(
        self, group: PathGroup, row: Row, own: Features, present: list[Tensor]
    ) -> tuple[Callable[[slice], list[Tensor]], Tensor]:
        """Activations at some points with features absent, ``(1 or n, length, size)`` each.

        Also which positions may change, bool ``(1 or n_points, length)``.
        """
        layers, embeddings = self._layers, self._embeddings
        assert layers is not None
        assert embeddings is not None
        free = ~held_positions(group, own, self._drawn_kept(), row.length)
        free &= own.owners(row.length) < own.n_features
        if self.points.from_zero:
            zero = [a * ~free[..., None].to(a.device) for a in present]
            return lambda _: zero, free
        embedded = present if layers is embeddings else self._read(embeddings, row)

        def found(rows: slice) -> list[Tensor]:
            mask, some = _select_rows(free, rows)[..., None], own
            if self.points.is_sampled and len(own.draws) > 1:
                some = replace(own, draws=own.draws[rows])
            absent: list[Tensor] = []
            for module, vectors in zip(embeddings.modules, embedded, strict=True):
                given = absent_embeddings(module, vectors, some, self._model)
                if not self.points.is_sampled:
                    wide = torch.promote_types(given.dtype, torch.float32)
                    given = given.to(wide).mean(0, keepdim=True).to(given.dtype)
                absent.append(torch.where(mask.to(vectors.device), given, vectors))
            return absent if layers is embeddings else self._layer_activations(absent, row)

        free_there = free if layers is embeddings else torch.ones_like(free)
        if self._n_baselines > 1:  # per pass: all of them may not fit into memory
            return found, free_there
        once = found(slice(0, 1))
        return lambda _: once, free_there

    def _drawn_kept(self) -> Tensor:
        if len(self._kept) == 1:
            return self._kept
        generator = draw_generator(self._seed, len(self._kept))
        drawn = torch.randint(
            len(self._kept), (len(self.points.alphas),), generator=generator, device="cpu"
        )
        return self._kept[drawn]

    def _read(self, layers: Layers, row: Row) -> list[Tensor]:
        with layers.read() as activations:
            self._reader.logits(row.ids, row.at)
        return activations

    def _layer_activations(self, embedded: list[Tensor], row: Row) -> list[Tensor]:
        """Activations of the layer for given embeddings."""
        layers, embeddings = self._layers, self._embeddings
        assert layers is not None
        assert embeddings is not None
        with embeddings.replaced(embedded), layers.read() as activations:
            self._reader.logits(row.ids.expand(len(embedded[0]), -1), row.at)
        return activations

    def _find_layers(self, row: Row) -> None:
        """Finds the embedding modules, and whether the layer is one of them.

        Raises:
            ValueError: If the model also reads token ids other than through the layer.
        """
        if self._layers is not None:
            return
        modules = modules_reading(
            self._model, row.ids, lambda ids: self._reader.logits(ids, row.at)
        )
        layer, name = self._layer, type(self._model).__name__
        if not modules:
            raise ValueError(
                f"no module of {name} receives the token ids and returns vectors (an "
                "`nn.Embedding`, or what `get_input_embeddings()` returns, called with the ids): "
                "let the model call one, or use `GenerationAttribution`, which needs none."
            )
        self._embeddings = Layers(modules)
        if layer is None or (layer in modules and not self._of_input):
            if layer is not None and len(modules) > 1:
                raise ValueError(
                    f"{name} embeds token ids in {len(modules)} modules: attributions to one of "
                    "them miss the effect of the others. Give None as the layer: all of them."
                )
            self._layers = self._embeddings
            if not self._all_is_embedded(row):
                raise ValueError(
                    f"{name} reads token ids also past its embeddings: gradients of these would "
                    "be incomplete. Use `GenerationAttribution`."
                )
        else:
            self._layers = Layers([layer], of_input=self._of_input)
            self._check_length(self._layers, row)

    def _check_length(self, layers: Layers, row: Row) -> None:
        """Checks that the layer has an activation per position, or requests all logits for it.

        Raises:
            ValueError: If the layer has no activation for every position of the row.
        """
        last = replace(row, at=row.at[-1:], target=row.target[-1:])
        shape = self._read(layers, last)[0].shape
        if shape[1] != row.length:
            self._reader.keep_all()
            shape = self._read(layers, last)[0].shape
        if shape[:2] != (1, row.length):
            what = "input" if self._of_input else "output"
            raise ValueError(
                f"the {what} of layer {type(self._layer).__name__} is {tuple(shape)} for one row "
                f"of {row.length} token ids: attribution needs (batch, length, size), an "
                "activation for each token, such as the embedding's output or that of a whole "
                "decoder layer."
            )

    def _all_is_embedded(self, row: Row) -> bool:
        """Whether other ids with equal embeddings give equal logits: nothing else reads ids."""
        embeddings = self._layers
        assert embeddings is not None
        with embeddings.read() as vectors:
            logits = self._reader.logits(row.ids, row.at)
        with embeddings.replaced(vectors):
            others = self._reader.logits(row.ids.roll(1, 1), row.at)
        return _are_close(logits, others)


def _select_rows(tensor: Tensor, rows: slice) -> Tensor:
    """Some rows of a tensor, or the only one that it has."""
    return tensor if len(tensor) == 1 else tensor[rows]


def _are_close(logits: Tensor, others: Tensor) -> bool:
    """Whether logits are equal up to rounding."""
    apart = (logits.double().log_softmax(-1) - others.double().log_softmax(-1)).abs()
    return bool((apart <= rounding(logits.dtype)).all())
