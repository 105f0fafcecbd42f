"""Runs the model on points of a path, and every target token's value back to the layer."""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.gradient.layers import Layers
from captum_llm_ext.scoring import AttrTarget
from captum_llm_ext.scoring.logits import wanted_values
from captum_llm_ext.scoring.memory import batch_budget, is_out_of_memory

_logger = logging.getLogger(__name__)
# Tokens of a pass beyond which a device has enough to do: more rows, or more target tokens at once,
# gain nothing.
_TOKENS = {"cpu": 4096}
_TOKENS_ELSEWHERE = 65536
# What a pass needs beside what it keeps for the way back, as a multiple of that.
_WORKING = 1.5
# Largest relative difference between gradients that other shapes of the same products make.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}
_ROUNDING_HALF = 0.1

# From some of the points: per layer their activations, and what gradients are multiplied by, each
# (n_points, length, size).
Points = Callable[[slice], tuple[list[Tensor], list[Tensor]]]


@dataclass(frozen=True)
class Row:
    """What the model reads, and what it is asked for.

    Attributes:
        ids: Token ids ``(1, length)``, on the device where the model reads them.
        at: ``(n_target,)``: the place whose logits predict each target token.
        target: Token ids ``(n_target,)``.
    """

    ids: Tensor
    at: Tensor
    target: Tensor

    @property
    def length(self) -> int:
        """Number of ids."""
        return self.ids.shape[1]


class Reader:
    """The model's forward on token ids, with the logits of some places.

    Args:
        model: The model, in evaluation mode whenever it is called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept = _compat.kept_logits(model)
        self._arguments = _compat.forward_arguments(model)

    def logits(self, ids: Tensor, at: Tensor) -> Tensor:
        """Logits ``(batch, n, vocabulary)`` at places ``at (n,)`` of ``ids (batch, length)``."""
        arguments: dict[str, Any] = {"use_cache": False} if "use_cache" in self._arguments else {}
        if self._kept == "positions":
            arguments["logits_to_keep"] = at.to(ids.device).expand(len(ids), -1)
        elif self._kept == "count":
            arguments["logits_to_keep"] = ids.shape[1] - int(at.min())
        logits = _compat.sequence_logits(self.model(input_ids=ids, **arguments))
        places = self.places(at, ids.shape[1], logits.shape[1])
        return logits if places is None else logits[:, places.to(logits.device)]

    def places(self, at: Tensor, length: int, n_kept: int) -> Tensor | None:
        """Where the logits of these places are among those that the model gives; None: in order."""
        return None if self._kept == "positions" else at - (length - n_kept)


class Slopes:
    """Values of target tokens at points of a path, and their gradients with respect to a layer.

    One forward pass serves all target tokens of a point. On the way back each token has its own
    pass, but not through the head: what a token's logits are made from is one place of the last
    layer, so that a single pass through the head finds the beginning of all the others. Where the
    model does otherwise, which a comparison on the first point shows, each goes all the way.

    Args:
        reader: The model's forward.
        layers: What the gradients are with respect to.
        row: What is read.
        attr_target: What a value is.
        is_joint: Whether the one value is the product over the target tokens.
        most_rows: At most so many points in a pass. By default what memory allows.
        grad_kwargs: Passed on to `torch.autograd.grad`.

    Attributes:
        n_rows: Points that the model was run on.
    """

    def __init__(
        self,
        reader: Reader,
        layers: Layers,
        row: Row,
        attr_target: AttrTarget,
        *,
        is_joint: bool = False,
        most_rows: int | None = None,
        grad_kwargs: Mapping[str, Any] | None = None,
        on_rows: Callable[[int], None] | None = None,
    ) -> None:
        self._reader, self._layers, self.row = reader, layers, row
        self._attr_target, self._is_joint = attr_target, is_joint
        self._grad_kwargs = dict(grad_kwargs or {})
        self._on_rows = on_rows
        self.n_rows = 0
        self.n_values = 1 if is_joint else len(row.target)
        self._tokens = _TOKENS.get(row.ids.device.type, _TOKENS_ELSEWHERE)
        most = self._tokens // row.length
        # Rows of LLM.int8 depend on one another.
        couples = _compat.couples_rows(reader.model)
        self._most_rows = 1 if couples else max(1, min(most, most_rows or most))
        self._was_measured = most_rows is not None or couples
        self._was_compared = False
        # A callable may make a token's value from the logits of any other.
        self._splits = isinstance(attr_target, str) and self.n_values > 1
        self._batches = True

    def values(self, n_points: int, points: Points) -> Tensor:
        """Values at points, float64 on the CPU, shape ``(n_points, n_values)``.

        Raises:
            ValueError: If one is not finite.
            TypeError: If a callable `attr_target` gives the wrong shape.
        """

        def found(rows: slice) -> Tensor:
            with torch.no_grad(), self._layers.replaced(points(rows)[0]):
                return self._values(rows.stop - rows.start)[0]

        values = torch.cat([values for _, values in self._in_batches(n_points, found)])
        if not values.isfinite().all():
            bad = int((~values.isfinite()).nonzero()[0][1])
            raise ValueError(
                f"the model gives {float(values[:, bad].sum())} to target token {bad} (id "
                f"{int(self.row.target[bad])}) on the path from absent to present. Values must be "
                "finite: load half-precision models in bfloat16 or float32, check the weights for "
                "NaN, and do not explain a token that the model rules out."
            )
        return values

    def products(self, n_points: int, points: Points) -> Iterator[tuple[slice, Tensor]]:
        """Gradients at points, multiplied and summed over the layer's size.

        Yields:
            Which points, and ``(n_points, n_values, length)``, float64 on the CPU.

        Raises:
            ValueError: If no gradient reaches the layer, or one is not finite.
        """
        if not self._was_measured and n_points > 1:
            self._measure(points(slice(0, 1))[0])

        def found(rows: slice) -> Tensor:
            return self._products(*points(rows))

        for rows, products in self._in_batches(n_points, found):
            if not products.isfinite().all():
                raise ValueError(
                    "the model's gradients are not finite: load half-precision models in bfloat16 "
                    "or float32, and check the weights for NaN."
                )
            yield rows, products

    def _in_batches(
        self, n_points: int, found: Callable[[slice], Tensor]
    ) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        while start < n_points:
            rows = slice(start, min(n_points, start + self._most_rows))
            n_rows = rows.stop - start
            try:
                tensor = found(rows)
            except RuntimeError as error:
                if n_rows == 1 or not is_out_of_memory(error):
                    raise
                self._most_rows = n_rows // 2
                continue
            self.n_rows += n_rows
            if self._on_rows is not None:
                self._on_rows(n_rows)
            yield rows, tensor
            start = rows.stop

    def _values(self, n_rows: int) -> tuple[Tensor, Tensor | None]:
        """Values ``(n_rows, n_values)``, and what the head made the logits from."""
        with self._heard() as heard:
            logits = self._reader.logits(self.row.ids.expand(n_rows, -1), self.row.at)
        target = self.row.target.to(logits.device)
        if callable(self._attr_target):
            values = called(logits, target, self._attr_target)
        else:
            values = wanted_values(logits, target.expand(n_rows, -1), self._attr_target)
        if self._is_joint:
            values = values.prod(1, keepdim=True)
        return values, heard[0] if len(heard) == 1 else None

    @contextmanager
    def _heard(self) -> Generator[list[Tensor]]:
        """What the model's head is given in the pass within."""
        given = getattr(self._reader.model, "get_output_embeddings", None)
        head = given() if callable(given) and self._splits else None
        heard: list[Tensor] = []
        if not isinstance(head, nn.Module):
            yield heard
            return

        def note(_: nn.Module, arguments: Any) -> None:
            heard.extend(a for a in arguments[:1] if isinstance(a, Tensor) and a.dim() == 3)

        hook = head.register_forward_pre_hook(note)
        try:
            yield heard
        finally:
            hook.remove()

    @torch.enable_grad()
    def _products(self, points: list[Tensor], factors: list[Tensor]) -> Tensor:
        points = [point.detach().requires_grad_() for point in points]
        n_rows, length = points[0].shape[:2]
        dtype = torch.promote_types(points[0].dtype, torch.float32)
        factors = [factor.to(dtype) for factor in factors]
        with self._layers.replaced(points):
            values, before_head = self._values(n_rows)
        if not values.requires_grad:
            raise ValueError(
                "no gradient reaches the layer: the model runs without gradients there (quantised "
                "or offloaded layers, `torch.no_grad` or an integer cast in its forward). Load it "
                "in float32 or bfloat16, or use `GenerationAttribution`, which needs no gradient."
            )
        back = self._way_back(values, before_head, points)
        products = torch.zeros(n_rows, self.n_values, length, dtype=dtype, device=points[0].device)
        for start, gradients in back:
            for gradient, factor in zip(gradients, factors, strict=True):
                found = (gradient.to(dtype) * factor).sum(-1).detach()
                stop = start + len(found)
                products[:, start:stop] += found.transpose(0, 1).to(products.device)
        return products.double() if products.device.type == "cpu" else products.cpu().double()

    def _way_back(
        self, values: Tensor, before_head: Tensor | None, points: list[Tensor]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Gradients of some values after others: the first one's number, ``(n, n_rows, …)`` each.

        The gradient of a value summed over rows is that of each row: they do not see one another.
        """
        outputs, begin = values, self._at_values(values)
        if self._splits and before_head is not None and before_head.requires_grad:
            outputs, begin = before_head, self._at_head(values, before_head)
        size = max(1, self._tokens // (len(values) * self.row.length)) if self._batches else 1
        if not self._was_compared:
            if not self._agree(values, outputs, begin, points, size):
                self._splits = self._batches = False
                outputs, begin, size = values, self._at_values(values), 1
            elif not self._batches:
                size = 1
            self._was_compared = True
        for start in range(0, self.n_values, size):
            numbers = range(start, min(start + size, self.n_values))
            yield start, self._gradients(outputs, begin, points, numbers)

    def _gradients(
        self,
        outputs: Tensor,
        begin: Callable[[int], Tensor],
        points: list[Tensor],
        numbers: range,
    ) -> list[Tensor]:
        """Gradients of several values, ``(len(numbers), n_rows, length, size)`` per layer."""
        if len(numbers) > 1 and self._batches:
            try:
                given = torch.stack([begin(number) for number in numbers])
                return _gradients(outputs, points, given, True, self._grad_kwargs)
            except RuntimeError as error:  # an operation that knows no batches of gradients
                if is_out_of_memory(error):
                    raise
                self._batches = False
                _logger.info("gradients of one token after another (%s).", error)
        each = [
            _gradients(outputs, points, begin(number), False, self._grad_kwargs)
            for number in numbers
        ]
        return [torch.stack(own) for own in zip(*each, strict=True)]

    def _agree(
        self,
        values: Tensor,
        outputs: Tensor,
        begin: Callable[[int], Tensor],
        points: list[Tensor],
        size: int,
    ) -> bool:
        """Whether the short way gives the gradient of the plain one, for the last token."""
        last = self.n_values - 1
        if outputs is values and size == 1:
            return True
        plain = _gradients(values, points, self._at_values(values)(last), False, self._grad_kwargs)
        numbers = range(max(0, last + 1 - min(size, 2)), last + 1)
        short = self._gradients(outputs, begin, points, numbers)
        tolerance = _ROUNDING.get(points[0].dtype, _ROUNDING_HALF)
        worst = max(
            float((a[-1] - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny))
            for a, b in zip(short, plain, strict=True)
        )
        if not worst <= tolerance:
            _logger.info("every token goes back through the head (%.2g apart).", worst)
        return worst <= tolerance

    def _at_values(self, values: Tensor) -> Callable[[int], Tensor]:
        def begin(number: int) -> Tensor:
            given = torch.zeros_like(values)
            given[:, number] = 1
            return given

        return begin

    def _at_head(self, values: Tensor, before_head: Tensor) -> Callable[[int], Tensor]:
        (slope,) = torch.autograd.grad(values.sum(), before_head, retain_graph=True)
        n_kept = before_head.shape[1]
        places = self._reader.places(self.row.at, self.row.length, n_kept)
        order = list(range(n_kept)) if places is None else places.tolist()

        def begin(number: int) -> Tensor:
            given = torch.zeros_like(slope)
            given[:, order[number]] = slope[:, order[number]]
            return given

        return begin

    def _measure(self, points: list[Tensor]) -> None:
        """Finds how many points fit, from what one keeps for the way back."""
        own = {p.untyped_storage().data_ptr() for p in self._reader.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        points = [point.detach().requires_grad_() for point in points]
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with torch.enable_grad(), self._layers.replaced(points), hooks:
            values = self._values(1)
        del values
        budget = batch_budget(self.row.ids.device)
        self._row_bytes = max(1, sum(kept.values()))
        most = int(budget / (_WORKING * self._row_bytes))
        self._most_rows = max(1, min(self._most_rows, most))
        self._was_measured = True


def called(
    logits: Tensor, target: Tensor, attr_target: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Values of a user's callable, ``(batch, n_target)``, float64, with their gradient.

    Raises:
        TypeError: If the callable returns anything else.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    found = attr_target(logits, target)
    if not isinstance(found, Tensor) or found.shape != (len(logits), len(target)):
        raise TypeError(
            f"`attr_target` returned {getattr(found, 'shape', type(found).__name__)} for logits of "
            f"shape {tuple(logits.shape)}: return (batch, n_target)."
        )
    return found.double().cpu()


def _gradients(
    outputs: Tensor,
    points: list[Tensor],
    given: Tensor,
    are_batched: bool,
    grad_kwargs: Mapping[str, Any],
) -> list[Tensor]:
    found: Any = torch.autograd.grad(
        outputs,
        points,
        grad_outputs=given,
        retain_graph=True,
        is_grads_batched=are_batched,
        **grad_kwargs,
    )
    shape = given.shape[:1] if are_batched else ()
    return [
        point.new_zeros(*shape, *point.shape) if own is None else own
        for own, point in zip(found, points, strict=True)
    ]
