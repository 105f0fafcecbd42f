"""Attention maps of every layer: how much each position of a text takes from each other.

Attention is computed by the model's own eager function, which returns its weights. They are reduced
layer by layer, since all maps of a long text together would not fit into memory. `Contributions`
names what is kept of a layer: the weights, or the norms of the parts that its output is a sum of.
"""

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.exclusive import exclusive_use, in_this_thread_only

Contributions = Literal["weights", "values", "alti", "projection"]
Heads = Literal["mean", "max"] | int

_ATTENTION_NAME = "captum_llm_ext_maps"
_SUPPORTED_ATTENTION = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")
_MAX_PART_NUMBERS = 2**24  # numbers of the parts that exist at once
# By how much a row of weights may miss 1: rounding of float32 (1e-7) adds up to 1e-4 over a
# million tokens; in half precision a few of its steps (4e-3), a guess. Sinks miss far more.
_ROW_SUM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_ROW_SUM_TOLERANCE_HALF = 0.01
# How far parts may be from what they are parts of, relative to it: sums of some thousand products
# in the same types; in half precision a guess.
_DECOMPOSITION_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_DECOMPOSITION_TOLERANCE_HALF = 0.05
_MIN_FACTOR = 0.01  # by which a layer multiplies its attention


def each_map(
    model: nn.Module,
    ids: Tensor,
    contributions: Contributions,
    heads: Heads,
    take: Callable[[int, Tensor], None],
) -> None:
    """Calls `take` with the map of every layer, from the first to the last.

    Args:
        model: A model of transformers.
        ids: Token ids ``(1, length)``, on the device where the model reads them.
        contributions: What a map tells.
        heads: How the heads' weights become one; parts are summed over heads.
        take: Called with a layer's number and its map ``(length, length)``, float64 where the model
            is, else float32: row i tells what place i takes from each place up to it. Rows sum to
            1.

    Raises:
        ValueError: If not all layers attend, or do so in a way that no map can tell.
    """
    _each(model, ids, lambda layer, after: layer.map(after, contributions, heads), take)


def each_row(
    model: nn.Module, ids: Tensor, place: int, take: Callable[[int, Tensor], None]
) -> None:
    """Calls `take` with every head's weights at one position, layer by layer.

    Args:
        model: A model of transformers.
        ids: Token ids ``(1, length)``, on the device where the model reads them.
        place: The place.
        take: Called with a layer's number and ``(heads, length)``: what each head weighs each
            place by. Rows sum to 1.

    Raises:
        ValueError: If not all layers attend, or do so in a way that no map can tell.
    """
    _each(model, ids, lambda layer, _: layer.weights_at(place), take)


def _each(
    model: nn.Module,
    ids: Tensor,
    read: Callable[["_Layer", Tensor], Tensor],
    take: Callable[[int, Tensor], None],
) -> None:
    """Gives what is read of every layer once it has run, whose output `read` is given too."""
    layers = _compat.decoder_layers(model)
    if layers is None:
        raise ValueError(
            f"{type(model).__name__} does not tell its layers (or is compiled), and attention "
            "cannot be read from it: use a method of gradients, or `GenerationAttribution`."
        )
    watch = _LayerHooks(model, layers, read, take)
    arguments = {**_compat.uncached(model)}
    kept = _compat.kept_logits(model)
    at = torch.tensor([[ids.shape[1] - 1]], dtype=torch.int64, device=ids.device)
    arguments |= _compat.keeping_logits(kept, at, ids)
    with exclusive_use(model), ExitStack() as stack:
        try:
            attend, mask = watch.attend, _compat.additive_mask
            stack.enter_context(
                _compat.attention_of(model, _ATTENTION_NAME, attend, mask, _SUPPORTED_ATTENTION)
            )
            stack.enter_context(watch.watched())
            _compat.called(model, ids, **arguments)
        except NotImplementedError as error:
            raise ValueError(f"attention cannot be read here: {error}.") from error
    missing = sorted(set(range(len(layers))) - watch.seen)
    if missing:
        names = ", ".join(map(str, missing[:5]))
        raise ValueError(
            f"layers {names} of {type(model).__name__} do not attend in the way of transformers' "
            "attention functions (state-space or linear attention, or attention of their own): "
            "what they take from where cannot be read. Use a method of gradients, or "
            "`GenerationAttribution`."
        )


class _LayerHooks:
    """Hooks that record the layers' attention in one forward pass."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        read: Callable[["_Layer", Tensor], Tensor],
        take: Callable[[int, Tensor], None],
    ) -> None:
        self._layers, self._read, self._take = layers, read, take
        self._names = {id(module): name for name, module in model.named_modules()}
        self._number = {
            id(module): number for number, layer in enumerate(layers) for module in layer.modules()
        }
        self.seen: set[int] = set()
        self._now: _Layer | None = None

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """An attention function of transformers: the model's plain one, watched."""
        plain = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        name = self._names.get(id(module), type(module).__name__)
        if plain is None or id(module) not in self._number:
            raise NotImplementedError(f"{name} has no plain attention function")
        found, weights = plain(module, query, key, value, attention_mask, **others)
        weights = cast(Tensor, weights)[0]
        most = _ROW_SUM_TOLERANCE.get(weights.dtype, _ROW_SUM_TOLERANCE_HALF)
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        if not bool(((weights.sum(-1) - 1).abs() < most).all()):
            raise NotImplementedError(f"the weights of {name} do not sum to 1 (attention sinks)")
        number = self._number[id(module)]
        if number in self.seen:
            raise NotImplementedError(f"layer {number} attends twice")
        self.seen.add(number)
        if self._now is not None:
            self._now.attended(module, weights, value[0], cast(Tensor, found))
        return found, None

    @contextmanager
    def watched(self) -> Generator[None]:
        """Hooks on the layers, and on what is in them, for the pass within."""
        with ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                self._watch(stack, number, layer)
            yield

    def _watch(self, stack: ExitStack, number: int, layer: nn.Module) -> None:
        def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._now = _Layer(layer, self._names[id(layer)], _flat(hidden))

        def end(_m: Any, _a: Any, output: Any) -> None:
            now, self._now = self._now, None
            if now is None or number not in self.seen:  # told of later, all together
                return
            after = _flat(output[0] if isinstance(output, tuple) else output)
            self._take(number, self._read(now, after))

        hook = layer.register_forward_pre_hook(in_this_thread_only(begin), with_kwargs=True)
        stack.callback(hook.remove)
        stack.callback(layer.register_forward_hook(in_this_thread_only(end)).remove)

        def note(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if self._now is not None:
                given = next((a for a in [*args, *kwargs.values()] if _is_hidden(a)), None)
                output = output[0] if isinstance(output, tuple) else output
                if given is not None and _is_hidden(output):
                    self._now.note(module, given, output)

        for module in layer.modules():
            if module is not layer:
                hook = module.register_forward_hook(in_this_thread_only(note), with_kwargs=True)
                stack.callback(hook.remove)


class _Layer:
    """One layer in one pass: what its attention is made of, and where that goes."""

    def __init__(self, layer: nn.Module, name: str, before: Tensor) -> None:
        self._layer, self._name, self._before = layer, name, before
        self._attention: nn.Module | None = None
        self._weights = self._values = self._mixed = self._attended = before
        self._projection: nn.Module | None = None
        self._calls: list[tuple[Tensor, Tensor]] = []
        self._is_done = False

    def attended(self, module: nn.Module, weights: Tensor, values: Tensor, mixed: Tensor) -> None:
        """The attention function was called."""
        self._attention, self._weights = module, weights
        n_heads = len(weights)
        self._values = values.repeat_interleave(n_heads // len(values), 0)
        self._mixed = mixed

    def note(self, module: nn.Module, given: Tensor, output: Tensor) -> None:
        """A module within was called."""
        if self._attention is None:
            return
        inside = {id(part) for part in self._attention.modules()}
        if module is self._attention:
            self._attended, self._is_done = _flat(output), True
        elif id(module) in inside:
            is_whole = given.numel() == self._mixed.numel()
            mixed = self._mixed.reshape(-1, given.shape[-1]) if is_whole else None
            # The last one, for a projection with an adapter ends after what is within it.
            if mixed is not None and torch.equal(_flat(given), mixed):
                self._projection = module
        elif self._is_done:
            self._calls.append((_flat(given), _flat(output)))

    def weights_at(self, place: int) -> Tensor:
        """Attention weights of each head at one position, ``(heads, length)``."""
        row = self._weights[:, place]
        return row / row.sum(-1, keepdim=True)

    def map(self, after: Tensor, kind: Contributions, heads: Heads) -> Tensor:
        """How much each position takes from each, ``(length, length)``, rows summing to 1.

        Args:
            after: What the layer gives.
            kind: What the map tells.
            heads: How weights of heads become one.

        Raises:
            NotImplementedError: If the layer is more than attention and what follows place by
                place, as far as can be seen, or the parts do not sum to what its attention adds.
        """
        scale, summed = self._added(after)
        if kind == "weights":
            found = _reduce_heads(self._weights, heads, self._name)
            return found / found.sum(-1, keepdim=True)
        length, size = self._before.shape
        per_head, constant = self._per_head()
        found = self._before.new_zeros(length, length, dtype=per_head.dtype)
        rows = max(1, _MAX_PART_NUMBERS // (length * size))
        for start in range(0, length, rows):
            here = slice(start, min(start + rows, length))
            # No place sees those after it.
            weights = self._weights[:, here, : here.stop].to(per_head.dtype)
            parts = torch.einsum("hij,hjd->ijd", weights, per_head[:, : here.stop])
            parts *= scale[here, None]
            whole = parts.sum(1) + constant * scale[here]
            self._check(whole, summed[here])
            if kind == "values":
                found[here, : here.stop] = torch.linalg.vector_norm(parts, dim=-1)
                continue
            own = torch.arange(here.start, here.stop, dtype=torch.int64, device=parts.device)
            parts[own - here.start, own] += self._before[here]
            whole = self._before[here] + summed[here]
            if kind == "alti":
                rest = torch.linalg.vector_norm(whole[:, None] - parts, ord=1, dim=-1)
                sizes = whole.abs().sum(-1, keepdim=True) - rest
            else:
                sizes = torch.einsum("ijd,id->ij", parts, whole)
            found[here, : here.stop] = sizes.clamp(min=0) * self._seen(here)
        return found / found.sum(-1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)

    def _seen(self, here: slice) -> Tensor:
        """What a place can take something from: what follows it is nothing to it."""
        places = torch.arange(here.stop, dtype=torch.int64, device=self._before.device)
        return (
            places
            <= torch.arange(here.start, here.stop, dtype=torch.int64, device=places.device)[:, None]
        )

    def _per_head(self) -> tuple[Tensor, Tensor]:
        """Values after the output projection, ``(heads, length, size)``, and its bias ``(size,)``.

        Raises:
            NotImplementedError: If what attention mixed does not go to a projection as it is.
        """
        projection, values = self._projection, self._values
        if projection is None:
            raise NotImplementedError(
                f"what {self._name} attends to goes on by no projection of its own"
            )
        n_heads, length, size = values.shape
        wide = values.new_zeros(1, length, n_heads * size)
        constant = projection(wide[:, :1])[0, 0]
        found: list[Tensor] = []
        for head in range(n_heads):
            own = slice(head * size, (head + 1) * size)
            wide[..., own] = values[head]
            found.append(projection(wide)[0] - constant)
            wide[..., own] = 0
        dtype = torch.promote_types(values.dtype, torch.float32)
        return torch.stack(found).to(dtype), constant.to(dtype)

    def _added(self, after: Tensor) -> tuple[Tensor, Tensor]:
        """How the layer adds its attention to what it was given: a factor, and what is added.

        A norm after attention is a factor of its own for every place and size. In layers whose
        attention and gated part stand side by side what is added is seen at the end.

        Raises:
            NotImplementedError: If it is added in another way.
        """
        scale, added = torch.ones_like(self._attended), self._attended
        for given, output in self._calls:  # norms and dropout that attention goes through
            if given.shape == added.shape and torch.equal(given, added):
                ratio = output / given
                scale = scale * ratio.masked_fill(given == 0, 0.0)
                added = output
        if not bool(added.any()):
            return self._wide(scale), self._wide(added)
        candidates = [given for given, _ in self._calls]
        candidates += [after - output for _, output in self._calls if output.shape == after.shape]
        for whole in candidates:
            if not whole.shape == added.shape == self._before.shape:
                continue
            change = whole - self._before
            factor = float((change * added).sum() / added.square().sum())
            if abs(factor) < _MIN_FACTOR:  # what stands beside attention is given what it is given
                continue
            rounding = torch.finfo(change.dtype).eps * float(self._before.norm())
            if _is_close(change, factor * added, beyond=8 * rounding):
                return self._wide(scale * factor), self._wide(factor * added)
        raise NotImplementedError(f"{self._name} does not add its attention to what it was given")

    def _check(self, whole: Tensor, expected: Tensor) -> None:
        if not _is_close(whole, expected, self._before.dtype):
            raise NotImplementedError(
                f"the parts of what {self._name} attends to do not sum to what it adds (those of "
                "quantised weights do not)"
            )

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _is_close(
    found: Tensor, expected: Tensor, dtype: torch.dtype | None = None, beyond: float = 0.0
) -> bool:
    tolerance = _DECOMPOSITION_TOLERANCE.get(dtype or expected.dtype, _DECOMPOSITION_TOLERANCE_HALF)
    return float((found - expected).norm()) <= tolerance * float(expected.norm()) + beyond


def _reduce_heads(weights: Tensor, heads: Heads, name: str) -> Tensor:
    """Weights ``(heads, length, length)`` as one map."""
    if heads == "mean":
        return weights.mean(0)
    if heads == "max":
        return weights.amax(0)
    if not -len(weights) <= heads < len(weights):
        raise ValueError(f"`heads` is {heads}: {name} has {len(weights)} heads.")
    return weights[heads]


def _is_hidden(given: Any) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point() and given.dim() >= 2


def _flat(hidden: Tensor) -> Tensor:
    """Hidden states of one text, ``(length, size)``."""
    return hidden.reshape(-1, hidden.shape[-1])
