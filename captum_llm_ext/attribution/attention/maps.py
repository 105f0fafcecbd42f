"""Attention maps of every layer: how much each position of a text takes from each other one.

Where a model leaves attention to functions of transformers, the eager one is used, which computes
weights. Maps are reduced layer by layer, since those of a long text would not fit into memory
together. `Contributions` says what a map is made of: the weights, or the norms of the parts that a
layer's output is the sum of.
"""

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.attribution.attention.layer import (
    Contributions,
    Heads,
    LayerAttention,
    flat,
)
from captum_llm_ext.attribution.attention.products import AttentionProducts, Mixed
from captum_llm_ext.model.exclusive import exclusive_use, in_this_thread_only

_ATTENTION_NAME = "captum_llm_ext_maps"
_SUPPORTED_ATTENTION = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")
_MOST_TOLD = 3  # layers listed in a message
_N_COMPARED = 32  # tokens on which logits are compared; chosen, not measured
# Allowed difference of logits between two attention implementations: rounding in float32 or in half
# precision (measured on 30 architectures and two checkpoints: at most 1.2e-6 and .021; the float32
# limit allows for GPUs that round products to TF32).
_SAME_TOLERANCE, _SAME_TOLERANCE_HALF = 1e-3, 0.1


def each_map(
    model: nn.Module,
    ids: Tensor,
    contributions: Contributions,
    heads: Heads,
    take: Callable[[int, Tensor], None],
) -> None:
    """Calls `take` with the map of every layer, from the first to the last.

    Args:
        model: A transformers model.
        ids: Token ids ``(1, length)``, on the model's input device.
        contributions: What a map is made of.
        heads: How the heads' weights are combined; parts are summed over heads.
        take: Called with a layer's index and its map ``(length, length)``, float64 on the CPU: row
            i holds what position i takes from each position up to it. Rows sum to 1, those of
            weights to 1 minus the share of attention sinks.

    Raises:
        ValueError: If some layer has no attention, or one of a kind that has no map.
    """
    _each(model, ids, lambda layer, after: layer.map(after, contributions, heads), take)


def each_row(
    model: nn.Module, ids: Tensor, place: int, take: Callable[[int, Tensor], None]
) -> None:
    """Calls `take` with every head's weights at one position, layer by layer.

    Args:
        model: A transformers model.
        ids: Token ids ``(1, length)``, on the model's input device.
        place: The position.
        take: Called with a layer's index and the weights ``(heads, length)``. Rows sum to 1 minus
            the share of attention sinks.

    Raises:
        ValueError: If some layer has no attention, or one of a kind that has no map.
    """
    _each(model, ids, lambda layer, _: layer.weights_at(place), take)


def _each(
    model: nn.Module,
    ids: Tensor,
    read: Callable[[LayerAttention, Tensor], Tensor],
    take: Callable[[int, Tensor], None],
) -> None:
    """Calls `take` with what `read` makes of every layer's recorded attention and output."""
    layers = _compat.decoder_layers(model)
    if layers is None:
        raise ValueError(
            f"{type(model).__name__} does not expose its layers (or is compiled), and attention "
            "cannot be read from it: use a method of gradients, or `GenerationAttribution`."
        )
    watch = _LayerHooks(model, layers, read, take)
    arguments = {**_compat.uncached(model)}
    kept = _compat.kept_logits(model)
    at = torch.tensor([[ids.shape[1] - 1]], dtype=torch.int64, device=ids.device)
    arguments |= _compat.keeping_logits(kept, at, ids)
    with exclusive_use(model), ExitStack() as stack:
        beginning = ids[:, :_N_COMPARED]
        own = _logits(model, beginning)
        try:
            attend, mask = watch.attend, _compat.additive_mask
            stack.enter_context(
                _compat.attention_of(model, _ATTENTION_NAME, attend, mask, _SUPPORTED_ATTENTION)
            )
            _check_same(model, own, _logits(model, beginning))
            stack.enter_context(watch.watched())
            stack.enter_context(AttentionProducts(ids.shape[1], watch.mixed))
            _compat.called(model, ids, **arguments)
        except NotImplementedError as error:
            watch.check_attended(model)
            raise ValueError(f"attention cannot be read here: {error}.") from error
    watch.check_attended(model)
    if watch.n_run != len(layers):
        raise ValueError(
            f"{watch.n_run} layers of {type(model).__name__} ran, and it has {len(layers)}: what "
            "passes through the others cannot be read."
        )


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of all positions, ``(length, vocabulary)``."""
    return _compat.sequence_logits(_compat.called(model, ids, **_compat.uncached(model)))[0]


def _check_same(model: nn.Module, own: Tensor, watched: Tensor) -> None:
    """Checks that eager attention gives the logits of the model's own attention.

    It does not for Falcon with alibi (transformers 5.23, 2026). Compares the median over positions,
    since rounding may make a router choose another expert.
    """
    off = ((watched - own).float().norm(dim=-1) / own.float().norm(dim=-1)).median()
    is_half = any(weight.dtype.itemsize < 4 for weight in model.parameters())
    if float(off) > (_SAME_TOLERANCE_HALF if is_half else _SAME_TOLERANCE):
        raise NotImplementedError(
            "eager attention, which returns its weights, gives other logits than the attention "
            f"that {type(model).__name__} runs with (by {float(off):.1%}). Load it with "
            '`attn_implementation="eager"` if those are what is to be explained'
        )


class _LayerHooks:
    """Hooks that record the attention of all layers in one forward pass."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        read: Callable[[LayerAttention, Tensor], Tensor],
        take: Callable[[int, Tensor], None],
    ) -> None:
        self._layers, self._read, self._take = layers, read, take
        self._names = {id(module): name for name, module in model.named_modules()}
        self._not_attended: list[nn.Module] = []
        self.n_run = 0  # layers run so far
        self._now: LayerAttention | None = None
        self._running: list[nn.Module] = []  # running modules of the layer, outermost first

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """An attention function for transformers: the model's eager one, observed."""
        plain = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if plain is None:
            name = self._names.get(id(module), type(module).__name__)
            raise NotImplementedError(f"{name} has no plain attention function")
        return plain(module, query, key, value, attention_mask, **others)[0], None

    def mixed(self, mixed: Mixed) -> None:
        """Records attention within a layer; attention outside layers is ignored."""
        if self._now is not None:
            self._now.attended(self._running[-1], mixed)

    def check_attended(self, model: nn.Module) -> None:
        """Whether all layers that have run so far computed attention.

        Raises:
            ValueError: If some did not; the message names them and their modules.
        """
        if not self._not_attended:
            return
        listed = ", ".join(
            f"{self._names[id(layer)]} ({type(layer).__name__}: "
            f"{', '.join(type(part).__name__ for part in layer.children())})"
            for layer in self._not_attended[:_MOST_TOLD]
        )
        more = len(self._not_attended) - _MOST_TOLD
        raise ValueError(
            f"{listed}{f' and {more} more' if more > 0 else ''} of {type(model).__name__} did not "
            "attend: no softmax weights multiplied the values of positions (state-space or "
            "linear attention, convolutions), so what each position takes from others cannot be "
            "read. Use a method of gradients, or `GenerationAttribution`."
        )

    @contextmanager
    def watched(self) -> Generator[None]:
        """Installs hooks on the layers and their modules, for the pass within."""
        with ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                self._watch(stack, number, layer)
            yield

    def _watch(self, stack: ExitStack, number: int, layer: nn.Module) -> None:
        def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._now = LayerAttention(self._names[id(layer)], flat(hidden))
            self._running = [layer]

        def end(_m: Any, _a: Any, output: Any) -> None:
            now, self._now = self._now, None
            self.n_run += 1
            if now is None or not now.has_attended:  # reported later, all together
                self._not_attended.append(layer)
                return
            after = flat(output[0] if isinstance(output, tuple) else output)
            self._take(number, self._read(now, after))

        hook = layer.register_forward_pre_hook(in_this_thread_only(begin), with_kwargs=True)
        stack.callback(hook.remove)
        stack.callback(layer.register_forward_hook(in_this_thread_only(end)).remove)

        def enter(module: nn.Module, _: tuple[Any, ...]) -> None:
            self._running.append(module)

        def leave(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            self._running.pop()
            if self._now is not None:
                given = next((a for a in [*args, *kwargs.values()] if _is_hidden(a)), None)
                output = output[0] if isinstance(output, tuple) else output
                if given is not None and _is_hidden(output):
                    self._now.note(module, given, output)

        for module in layer.modules():
            if module is not layer:
                hook = module.register_forward_pre_hook(in_this_thread_only(enter))
                stack.callback(hook.remove)
                hook = module.register_forward_hook(in_this_thread_only(leave), with_kwargs=True)
                stack.callback(hook.remove)


def _is_hidden(given: Any) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point() and given.dim() >= 2
