"""Runs the model at points of a path, with backward passes from target tokens to the layer."""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.exclusive import in_this_thread_only
from captum_llm_ext.model.forward.logits import AttrTarget
from captum_llm_ext.model.forward.memory import batch_budget, is_out_of_memory
from captum_llm_ext.model.gradients.differentiable_values import values_by_callable, values_by_name
from captum_llm_ext.model.gradients.forward_mode import FeatureDerivatives, n_extra_passes
from captum_llm_ext.model.gradients.forward_pass import ForwardPass, Row
from captum_llm_ext.model.gradients.frozen import frozen, is_stopped
from captum_llm_ext.model.gradients.layers import Layers, without_gradient

_logger = logging.getLogger(__name__)
# What is computed from a gradient: its product with a difference, or its norm.
Measure = Literal["product", "l1", "l2"]
# Tokens per pass beyond which a device is busy: more rows, or more target tokens at once, gain
# nothing (measured on a CPU; beyond 2048 they lose by cache misses).
_TOKENS = {"cpu": 1024}
_TOKENS_ELSEWHERE = 65536  # on other devices; chosen, not measured
# Memory of a pass in addition to what it stores for the backward pass, as a multiple of that.
# Chosen, not measured.
_WORKING = 1.5
# Largest relative difference between gradients due to other shapes of the same products.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}
_ROUNDING_HALF = 0.1  # of half precision; chosen, not measured

_NO_GRADIENT = (
    "no gradient reaches the layer: the model runs without gradients there (quantised or offloaded "
    "layers, `torch.no_grad` or an integer cast in its forward), or does not use the layer. Load "
    "it in float32 or bfloat16, or use `GenerationAttribution`, which needs no gradient."
)
_NO_SHARE = (
    "nothing of what the layer gives goes on to the value: the model runs without gradients there "
    "(quantised layers, an integer cast), or it feeds what a linear system holds alone (attention "
    "weights, norms, gates). Give the embedding (`layer=None` finds it) or a whole decoder layer, "
    "and load the model in float32 or bfloat16."
)
# For some of the points: per layer their activations, and the factors of gradients, each (n_points,
# length, size).
Points = Callable[[slice], tuple[list[Tensor], list[Tensor]]]


@dataclass
class BackwardPlan:
    """How a model is best run, as found while running it.

    Attributes:
        most_tokens: Number of token ids that fit into a pass with gradients.
        most_rows: Maximum number of rows per pass.
        was_tried: Whether the following entries are known.
        splits: Whether one backward pass through the head serves all target tokens.
        batches: Whether backward passes of several target tokens can be batched.
        forward_mode: Whether forward-mode derivatives are correct; None if not tried.
        row_bytes: Bytes that the tried row stores for the backward pass.
    """

    most_tokens: int
    most_rows: int | None = None
    was_tried: bool = False
    splits: bool = True
    batches: bool = True
    forward_mode: bool | None = None
    row_bytes: int = 0


def initial_plan(device: torch.device, most_rows: int | None) -> BackwardPlan:
    """What is known before the first pass.

    Args:
        device: The model's input device.
        most_rows: The user's limit; None: as memory allows.
    """
    return BackwardPlan(_TOKENS.get(device.type, _TOKENS_ELSEWHERE), most_rows)


class Linear(NamedTuple):
    """The values of a frozen model at a point, ``(n_values,)`` unless stated, float64 on the CPU.

    Attributes:
        values: The values.
        expected: The expected sum of all contributions: the value itself if it is a logit or a
            difference of logits, otherwise its gradient along the logits.
        sizes: Magnitude of the logits of each value.
        constants: Contribution of biases, position tables and other constants.
        shares: Contribution of each position, ``(n_values, length)``.
    """

    values: Tensor
    expected: Tensor
    sizes: Tensor
    constants: Tensor
    shares: Tensor


class _Passed(NamedTuple):
    """A pass with gradients: values ``(n_rows, n_values)``, and what they were computed from."""

    values: Tensor
    logits: Tensor
    before_head: Tensor | None
    unit: Tensor | None


def storage_of(tensor: Tensor) -> tuple[int, int]:
    """The storage of a tensor, and its size in bytes; 0 if it has none of its own.

    Quantised weights of torchao and other wrappers consist of tensors with their own storage.
    """
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except RuntimeError:
        return 0, 0


class TargetGradients:
    """Values of target tokens at points of a path, and their gradients with respect to a layer.

    One forward pass serves all target tokens of a point. Each token has its own backward pass, but
    not through the head: a token's logits depend on one position of the last layer, so that a
    single pass through the head gives the start of all others. If a comparison at the first point
    shows that this does not hold for the model, each backward pass is complete.

    Args:
        reader: The model's forward.
        layers: The layers of the gradients.
        row: The token row.
        attr_target: The kind of value.
        plan: How the model is run; updated by experience.
        is_joint: Whether the value is the product over all target tokens.
        sums: Which target tokens' values are summed, by index among those with a value; None: each
            is a value of its own. A sum takes one backward pass.
        measure: What is computed from a token's gradient.
        is_frozen: Whether passes with gradients are those of a frozen model (see
            `gradients.frozen`), with a single point.
        grad_kwargs: Passed to `torch.autograd.grad`.
        on_rows: Called with the number of points of every pass.

    Attributes:
        n_rows: Number of points evaluated.
        linear: The frozen model's values at the point.
    """

    def __init__(
        self,
        reader: ForwardPass,
        layers: Layers,
        row: Row,
        attr_target: AttrTarget,
        plan: BackwardPlan,
        *,
        is_joint: bool = False,
        sums: Sequence[Sequence[int]] | None = None,
        measure: Measure = "product",
        is_frozen: bool = False,
        grad_kwargs: Mapping[str, Any] | None = None,
        on_rows: Callable[[int], None] | None = None,
    ) -> None:
        self._reader, self._layers, self.row = reader, layers, row
        self._measure, self._is_frozen = measure, is_frozen
        self.linear: Linear | None = None
        self._attr_target, self._plan, self._is_joint = attr_target, plan, is_joint
        self._grad_kwargs, self._on_rows = dict(grad_kwargs or {}), on_rows
        self.n_rows = 0
        n_single = 1 if is_joint else row.n_values
        self._members = [[i] for i in range(n_single)] if sums is None else [list(s) for s in sums]
        self.n_values = len(self._members)
        # A callable may use the logits of all tokens for each value.
        self._may_split = isinstance(attr_target, str) and self.n_values > 1

    def values(self, n_points: int, points: Points) -> Tensor:
        """Values at points, float64 on the CPU, shape ``(n_points, n_values)``.

        Raises:
            ValueError: If one is not finite.
            TypeError: If a callable `attr_target` returns the wrong shape.
        """

        def found(rows: slice) -> Tensor:
            with torch.no_grad(), self._layers.replaced(points(rows)[0]):
                return self._summed(self._passed(rows.stop - rows.start).values)

        values = torch.cat([values for _, values in self._in_batches(n_points, found)])
        if not values.isfinite().all():
            bad = int((~values.isfinite()).nonzero()[0][1])
            given = float(values[:, bad].sum())
            bad = self._members[bad][0]
            bad = bad if self.row.chosen is None else self.row.chosen[bad]
            raise ValueError(
                f"the model gives {given} to target token {bad} (id "
                f"{int(self.row.target[bad])}) on the path from absent to present. Values must be "
                "finite: load half-precision models in bfloat16 or float32, check the weights for "
                "NaN, and do not explain a token that the model rules out."
            )
        return values

    def products(
        self, n_points: int, points: Points, owners: Tensor, n_owners: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """Gradients at points, multiplied and summed over a feature's positions, or their norm.

        Args:
            n_points: Their number.
            points: Returns some of them.
            owners: The feature of each position, int64 ``(length,)``.
            n_owners: Number of features; positions of higher indices are left out.

        Yields:
            A slice of points, and ``(n_points, n_values, n_owners)``, float64 on the CPU.

        Raises:
            ValueError: If no gradient reaches the layer, or one is not finite.
        """
        plan = self._plan
        if not plan.was_tried:
            self._try(points(slice(0, 1))[0])
        derivatives = self._derivatives(owners, n_owners)
        if derivatives is not None and plan.forward_mode is None:
            plan.forward_mode = self._forward_mode_agrees(derivatives, *points(slice(0, 1)))

        def found(rows: slice) -> Tensor:
            if derivatives is not None and plan.forward_mode:
                return derivatives.products(*points(rows))
            products = self._products(*points(rows))
            summed = products.new_zeros(*products.shape[:2], max(n_owners, int(owners.max()) + 1))
            return summed.index_add(2, owners, products)[..., :n_owners]

        for rows, products in self._in_batches(n_points, found):
            if not products.isfinite().all():
                raise ValueError(
                    "the model's gradients are not finite: load half-precision models in bfloat16 "
                    "or float32, and check the weights for NaN."
                )
            yield rows, products

    def _summed(self, values: Tensor) -> Tensor:
        """The explained values, from those of single tokens ``(n_rows, n)``."""
        return torch.stack([values[:, own].sum(1) for own in self._members], 1)

    def _derivatives(self, owners: Tensor, n_owners: int) -> FeatureDerivatives | None:
        """Forward-mode derivatives along features, if cheaper than backward passes."""
        n_features = len(owners[owners < n_owners].unique())
        is_plain = self._measure == "product" and not self._is_frozen and self._reader.seed is None
        may = is_plain and self._may_split and self._plan.splits
        if not may or n_extra_passes(n_features, self.n_values) == self.n_values:
            return None
        return FeatureDerivatives(
            self._reader,
            self._layers,
            self.row,
            self._members,
            lambda n_rows: self._passed(n_rows).values,
            owners,
            n_owners,
            self._plan.most_tokens,
        )

    def _forward_mode_agrees(
        self, derivatives: FeatureDerivatives, points: list[Tensor], factors: list[Tensor]
    ) -> bool:
        """Whether forward mode gives the gradient, for the last value at one point."""
        try:
            found = derivatives.products(points, factors)[0, -1]
        except Exception as error:  # operations without forward mode may raise anything
            if is_out_of_memory(error):
                raise
            _logger.info("no forward-mode derivatives (%s).", error)
            return False
        points = [point.detach().requires_grad_() for point in points]
        with torch.enable_grad(), self._layers.replaced(points):
            values = self._passed(1).values
        given = self._at_values(values)(self.n_values - 1)
        gradients = _gradients(values, points, None, given, False, self._grad_kwargs)[:-1]
        each = [
            (gradient.double() * factor.double()).sum(-1)[0].cpu()
            for gradient, factor in zip(gradients, factors, strict=True)
        ]
        is_owned = derivatives.owners < derivatives.n_owners
        along = torch.stack(each).sum(0)[is_owned]
        wanted = torch.zeros_like(found).index_add(0, derivatives.owners[is_owned], along)
        # transformers computes norms in float32 even for float64 weights.
        is_half = points[0].dtype.itemsize < torch.float32.itemsize
        tolerance = _ROUNDING_HALF if is_half else _ROUNDING[torch.float32]
        worst = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))
        if not worst <= tolerance:
            _logger.info("forward-mode derivatives are not used (%.2g apart).", worst)
        return worst <= tolerance

    def _in_batches(
        self, n_points: int, found: Callable[[slice], Tensor]
    ) -> Iterator[tuple[slice, Tensor]]:
        start, plan = 0, self._plan
        while start < n_points:
            most = max(1, plan.most_tokens // self.row.length)
            rows = slice(start, min(n_points, start + min(most, plan.most_rows or most)))
            n_rows = rows.stop - start
            try:
                tensor = found(rows)
            except RuntimeError as error:
                if n_rows == 1 or not is_out_of_memory(error):
                    raise
                plan.most_tokens = n_rows // 2 * self.row.length
                continue
            self.n_rows += n_rows
            if self._on_rows is not None:
                self._on_rows(n_rows)
            yield rows, tensor
            start = rows.stop

    def _passed(self, n_rows: int) -> _Passed:
        how = frozen(self.row.ids.device, self._reader.model) if self._is_frozen else nullcontext()
        with self._hooked_head() as head_inputs, how as unit:
            logits = self._reader.logits(self.row.ids.expand(n_rows, -1), self.row.at)
        target = self.row.target.to(logits.device)
        if callable(self._attr_target):
            values = values_by_callable(logits, target, self._attr_target)
        else:
            values = values_by_name(logits, target, self._attr_target, self.row.foils)
        if self.row.chosen is not None:
            values = values[:, list(self.row.chosen)]
        if self._is_joint:
            values = values.prod(1, keepdim=True)
        return _Passed(values, logits, head_inputs[0] if len(head_inputs) == 1 else None, unit)

    @contextmanager
    def _hooked_head(self) -> Generator[list[Tensor]]:
        """Captures the input of the model's head in the pass within."""
        head = _compat.embeddings(self._reader.model, "get_output_embeddings")
        head_inputs: list[Tensor] = []
        if not isinstance(head, nn.Module) or not self._may_split:
            yield head_inputs
            return

        def note(_: nn.Module, arguments: Any) -> None:
            head_inputs.extend(a for a in arguments[:1] if isinstance(a, Tensor) and a.dim() == 3)

        hook = head.register_forward_pre_hook(in_this_thread_only(note))
        try:
            yield head_inputs
        finally:
            hook.remove()

    @torch.enable_grad()
    def _products(self, points: list[Tensor], factors: list[Tensor]) -> Tensor:
        points = [point.detach().requires_grad_() for point in points]
        n_rows, length = points[0].shape[:2]
        dtype = torch.promote_types(points[0].dtype, torch.float32)
        factors = [factor.to(dtype) for factor in factors]
        with self._layers.replaced(points):
            passed = self._passed(n_rows)
        values = passed.values
        if not values.requires_grad and callable(self._attr_target):
            raise ValueError(
                "the values that `attr_target` returned have no gradient: it must be made of "
                "differentiable operations on the logits (no argmax, rounding, `.item()` or "
                "`.detach()`), and the model must run with gradients."
            )
        if not values.requires_grad:
            raise ValueError(_NO_SHARE if self._is_frozen else _NO_GRADIENT)
        blank = torch.zeros(n_rows, self.n_values, length, dtype=dtype, device=points[0].device)
        products, shares = blank.clone(), blank
        constants = torch.zeros(self.n_values, dtype=torch.float64, device="cpu")
        for start, (*gradients, of_unit) in self._backward_pass(passed, points):
            stop = start + len(of_unit)
            for gradient, factor in zip(gradients, factors, strict=True):
                found = self._measured(gradient.to(dtype), factor).detach()
                products[:, start:stop] += found.transpose(0, 1).to(products.device)
                if self._is_frozen:
                    found = (gradient.to(dtype) * factor).sum(-1).detach()
                    shares[:, start:stop] += found.transpose(0, 1).to(shares.device)
            constants[start:stop] = of_unit.detach().double().cpu()
        if self._measure == "l2":
            products = products.sqrt()
        if self._is_frozen:
            self.linear = self._linear(passed, constants, shares[0])
        return products.double() if products.device.type == "cpu" else products.cpu().double()

    def _measured(self, gradient: Tensor, factor: Tensor) -> Tensor:
        """The measure of a gradient per token; for the L2 norm its square."""
        if self._measure == "l1":
            return gradient.abs().sum(-1)
        return (gradient.square() if self._measure == "l2" else gradient * factor).sum(-1)

    def _linear(self, passed: _Passed, constants: Tensor, shares: Tensor) -> Linear:
        values, logits = passed.values, passed.logits
        wide = logits.detach().double()
        sizes = wide[0].square().mean(-1).sqrt().cpu()
        if self._is_joint or callable(self._attr_target):
            sizes = sizes.max().expand(self.n_values)
            gradients = (
                torch.autograd.grad(values[:, t].sum(), logits, retain_graph=True)[0]
                for t in range(self.n_values)
            )
            expected = torch.stack(
                [(gradient.double() * wide).sum() for gradient in gradients]
            ).cpu()
        else:  # each depends on the logits of its own position
            (gradient,) = torch.autograd.grad(values.sum(), logits, retain_graph=True)
            expected = (gradient.double() * wide).sum((0, 2)).cpu()
        shares = shares.cpu().double()
        return Linear(values.detach()[0], expected, sizes, constants, shares)

    def _backward_pass(
        self, passed: _Passed, points: list[Tensor]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Yields gradients of some values after others: first index, and ``(n, n_rows, …)`` each.

        The gradient of a value summed over rows is that of each row, since rows are independent.
        The last entry is that of the unit, ``(n,)``, 0 if nothing is frozen.
        """
        outputs, begin = self._starts(passed)
        size = self._tokens_at_once(len(passed.values))
        for start in range(0, self.n_values, size):
            numbers = range(start, min(start + size, self.n_values))
            yield start, self._gradients(outputs, begin, points, passed.unit, numbers)

    def _tokens_at_once(self, n_rows: int) -> int:
        """Number of target tokens whose backward passes are batched: as far as passes are small."""
        room = self._plan.most_tokens // (n_rows * self.row.length)
        return max(1, room) if self._plan.batches else 1

    def _starts(self, passed: _Passed) -> tuple[Tensor, Callable[[int], Tensor]]:
        """The tensors and gradients at which backward passes start, for every value."""
        values, before_head = passed.values, passed.before_head
        if self._plan.splits and before_head is not None and before_head.requires_grad:
            return before_head, self._at_head(values, before_head)
        return values, self._at_values(values)

    def _gradients(
        self,
        outputs: Tensor,
        begin: Callable[[int], Tensor],
        points: list[Tensor],
        unit: Tensor | None,
        numbers: range,
    ) -> list[Tensor]:
        """Gradients of several values, ``(len(numbers), n_rows, length, size)`` per layer.

        Also those with respect to the unit, ``(len(numbers),)``.
        """
        if len(numbers) > 1 and self._plan.batches:
            try:
                given = torch.stack([begin(number) for number in numbers])
                return _gradients(outputs, points, unit, given, True, self._grad_kwargs)
            except RuntimeError as error:  # an operation that does not support batched gradients
                if is_out_of_memory(error):
                    raise
                self._plan.batches = False
                _logger.info("gradients are computed token by token (%s).", error)
        each = [
            _gradients(outputs, points, unit, begin(number), False, self._grad_kwargs)
            for number in numbers
        ]
        return [torch.stack(own) for own in zip(*each, strict=True)]

    @torch.enable_grad()
    def _try(self, points: list[Tensor]) -> None:
        """Finds on one point how many fit, and whether the short backward passes are correct."""
        own = {storage_of(parameter)[0] for parameter in self._reader.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            start, n_bytes = storage_of(tensor)
            if start not in own:
                kept[start] = n_bytes
            return tensor

        points = [point.detach().requires_grad_() for point in points]
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        held = is_stopped if self._is_frozen else None
        with (
            self._layers.replaced(points),
            hooks,
            without_gradient(self._reader.model, held) as cut,
        ):
            passed = self._passed(1)
        if cut:
            raise ValueError(
                f"no gradient goes through {cut[0]}, or {len(cut) - 1} other layers: they are "
                "quantised in a way that has none, or run without. Load the model in float32 or "
                "bfloat16, or use `GenerationAttribution`, which needs no gradient."
            )
        values = passed.values
        plan = self._plan
        plan.row_bytes = max(1, sum(kept.values()))
        most = batch_budget(self.row.ids.device) / (_WORKING * plan.row_bytes)
        if plan.most_rows is None:
            plan.most_tokens = max(1, min(plan.most_tokens, int(most * self.row.length)))
        if values.requires_grad and not self._agree(passed, points):
            plan.splits = plan.batches = False
        # With a single value there was no short pass to try.
        plan.was_tried |= self.n_values > 1

    def _agree(self, passed: _Passed, points: list[Tensor]) -> bool:
        """Whether the short pass gives the gradient of the complete one, for the last token."""
        last = self.n_values - 1
        at_once = min(2, self.n_values, self._tokens_at_once(1))
        values, unit = passed.values, passed.unit
        given = self._at_values(values)(last)
        plain = _gradients(values, points, unit, given, False, self._grad_kwargs)
        numbers = range(last + 1 - at_once, last + 1)
        try:
            outputs, begin = self._starts(passed)
            short = self._gradients(outputs, begin, points, unit, numbers)
        except ValueError:  # the layer is the head, or after it
            return False
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return False
        tolerance = _ROUNDING.get(points[0].dtype, _ROUNDING_HALF)
        worst = max(
            float((a[-1] - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny))
            for a, b in zip(short, plain, strict=True)
        )
        if not worst <= tolerance:
            _logger.info("one backward pass through the head per token (%.2g apart).", worst)
        return worst <= tolerance

    def _at_values(self, values: Tensor) -> Callable[[int], Tensor]:
        def begin(number: int) -> Tensor:
            given = torch.zeros_like(values)
            given[:, self._members[number]] = 1
            return given

        return begin

    def _at_head(self, values: Tensor, before_head: Tensor) -> Callable[[int], Tensor]:
        (gradient,) = torch.autograd.grad(values.sum(), before_head, retain_graph=True)
        order = self._reader.order(self.row.at, self.row.length, before_head.shape[1])

        def begin(number: int) -> Tensor:
            given = torch.zeros_like(gradient)
            places = [order[member] for member in self._members[number]]
            given[:, places] = gradient[:, places]
            return given

        return begin


def _gradients(
    outputs: Tensor,
    points: list[Tensor],
    unit: Tensor | None,
    given: Tensor,
    are_batched: bool,
    grad_kwargs: Mapping[str, Any],
) -> list[Tensor]:
    # A frozen model without biases does not use the unit.
    settings = {**grad_kwargs, **({} if unit is None else {"allow_unused": True})}
    try:
        found: Any = torch.autograd.grad(
            outputs,
            points if unit is None else [*points, unit],
            grad_outputs=given,
            retain_graph=True,
            is_grads_batched=are_batched,
            **settings,
        )
        is_unused = any(own is None for own in found[: len(points)])
    except RuntimeError as error:
        if "not have been used" not in str(error):
            raise
        raise ValueError(f"{_NO_GRADIENT} (`allow_unused` of `grad_kwargs` makes it 0.)") from error
    if is_unused and not grad_kwargs.get("allow_unused"):
        raise ValueError(_NO_SHARE if unit is not None else _NO_GRADIENT)
    shape = given.shape[:1] if are_batched else ()
    leaves = [*points, points[0].new_zeros(()) if unit is None else unit]
    found = [*found, None] if unit is None else found
    return [
        leaf.new_zeros((*shape, *leaf.shape)) if own is None else own
        for own, leaf in zip(found, leaves, strict=True)
    ]
