"""The residual stream: the hidden states between two layers, to be read or patched.

Only in forward passes of the calling thread; those of others are unaffected.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.exclusive import in_this_thread_only

# Modifies a stream (batch, length, size); None leaves it unchanged.
_Change = Callable[[Tensor], Tensor | None]

_NO_LAYERS = (
    "{name} does not expose its decoder layers (or is sharded across several processes, which no "
    "stream can be read from): give them in order, `layers=[...]`, each a module that is given and "
    "gives back the stream (batch, length, size)."
)
_COMPILED = (
    "parts of {name} are compiled (`torch.compile`), and compiled code notices no hooks that are "
    "put on later: give the model as it was before."
)


@dataclass(frozen=True)
class Patch:
    """Replacement vectors at some positions of one row's stream.

    Attributes:
        layer: Index of the stream: 0 enters the first layer.
        places: Positions in the row.
        vectors: Shape ``(n_places, size)``.
    """

    layer: int
    places: tuple[int, ...]
    vectors: Tensor


class ResidualStream:
    """The streams of a decoder: number 0 enters the first layer, ``n_layers`` leaves the last.

    Args:
        model: The model.
        layers: Its layers in order; None: found automatically.

    Raises:
        ValueError: If they cannot be found, or hooks on them would have no effect.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module] | None = None) -> None:
        name = type(model).__name__
        if _compat.is_compiled(model):
            raise ValueError(_COMPILED.format(name=name))
        found = _compat.decoder_layers(model) if layers is None else list(layers)
        if not found:
            raise ValueError(_NO_LAYERS.format(name=name))
        own = {id(module) for module in model.modules()}
        if any(id(layer) not in own for layer in found):
            raise ValueError(f"`layers` holds a module that is none of {name}'s: give its own.")
        self._layers, self._name = found, name
        self._embedding = _compat.embeddings(model, "get_input_embeddings")

    @property
    def n_layers(self) -> int:
        """Number of layers; there is one more stream."""
        return len(self._layers)

    @contextmanager
    def read(self, *, with_gradients: bool = False) -> Generator[list[Tensor]]:
        """Collects the streams of the pass within, ``(batch, length, size)`` each.

        Args:
            with_gradients: Whether they are part of the autograd graph, whose leaf is the first.

        Raises:
            ValueError: If a layer does not run exactly once, or returns no such stream.
        """
        found: list[list[Tensor]] = [[] for _ in range(self.n_layers + 1)]
        streams: list[Tensor] = []

        def note(number: int) -> _Change:
            def change(stream: Tensor) -> Tensor | None:
                if not with_gradients:
                    # Later in-place modifications do not belong to the layer's output.
                    found[number].append(stream.detach().clone())
                    return None
                own = stream if number else stream.detach().requires_grad_()
                found[number].append(own)
                return own.clone()

            return change

        with self._hooked({number: note(number) for number in range(self.n_layers + 1)}):
            yield streams
        for number, own in enumerate(found):
            if len(own) != 1:
                layer = type(self._layers[max(number - 1, 0)]).__name__
                runs = f"runs {len(own)} times" if own else "does not run"
                raise ValueError(f"layer {layer} of {self._name} {runs} in one pass: {_WANTED}")
            streams.append(own[0])

    @contextmanager
    def patched(self, patches: Sequence[Patch | None]) -> Generator[None]:
        """Makes passes within continue from patched streams.

        Args:
            patches: One for each row of these passes; None leaves a row unchanged.
        """
        by_layer: dict[int, list[tuple[int, Patch]]] = {}
        for row, patch in enumerate(patches):
            if patch is not None:
                by_layer.setdefault(patch.layer, []).append((row, patch))

        def put(own: list[tuple[int, Patch]]) -> _Change:
            def change(stream: Tensor) -> Tensor:
                _check_rows(stream, len(patches))
                changed = stream.clone()
                for row, patch in own:
                    changed[row, list(patch.places)] = patch.vectors.to(changed)
                return changed

            return change

        with self._hooked({layer: put(own) for layer, own in by_layer.items()}):
            yield

    def embedded(self, ids: Tensor) -> Tensor:
        """The embeddings of ids ``(1, length)``: ``(1, length, size)``.

        Raises:
            ValueError: If the model's embedding cannot be found.
        """
        return self._embedding_layer()(ids).detach()

    @contextmanager
    def noised(self, noise: Sequence[Tensor | None]) -> Generator[None]:
        """Adds noise to the embeddings in the passes within.

        Args:
            noise: One for each row of these passes, ``(length, size)``; None adds nothing.

        Raises:
            ValueError: If the model's embedding cannot be found, or is not used.
        """
        if all(own is None for own in noise):
            yield
            return
        n_runs = 0

        def after(_: nn.Module, arguments: Any, output: Any) -> Any:
            nonlocal n_runs
            n_runs += 1
            _check_rows(output, len(noise))
            changed = output.clone()
            for row, own in enumerate(noise):
                if own is not None:
                    length = min(len(own), changed.shape[1])  # a row may be truncated, or padded
                    changed[row, :length] += own[:length].to(changed)
            return changed

        hook = self._embedding_layer().register_forward_hook(in_this_thread_only(after))
        try:
            yield
        finally:
            hook.remove()
        if n_runs == 0:
            raise ValueError(
                f"{self._name} does not use the embedding that it declares: noise cannot be added "
                'to it. Use `kind="replacement"`.'
            )

    def _embedding_layer(self) -> nn.Module:
        if not isinstance(self._embedding, nn.Module):
            raise ValueError(
                f"{self._name} does not expose its embedding (`get_input_embeddings`), to which "
                'noise would be added: use `kind="replacement"`.'
            )
        return self._embedding

    @contextmanager
    def _hooked(self, changes: Mapping[int, _Change]) -> Generator[None]:
        with ExitStack() as stack:
            for number, change in changes.items():
                stack.callback(self._hook(number, change).remove)
            yield

    def _hook(self, number: int, change: _Change) -> Any:
        if number:
            layer = self._layers[number - 1]
            what = f"what layer {type(layer).__name__} gives"

            def after(_: nn.Module, arguments: Any, output: Any) -> Any:
                return _changed(output, change, what)

            # Before other hooks: their changes apply to the stream as well.
            return layer.register_forward_hook(in_this_thread_only(after), prepend=True)

        first = self._layers[0]
        what = f"what layer {type(first).__name__} is given"

        def before(_: nn.Module, arguments: Any, keywords: dict[str, Any]) -> Any:
            if not arguments:
                name = "hidden_states" if "hidden_states" in keywords else next(iter(keywords), "")
                new = _changed(keywords.get(name), change, what)
                return (arguments, {**keywords, name: new})
            return (_changed(arguments, change, what), keywords)

        return first.register_forward_pre_hook(in_this_thread_only(before), with_kwargs=True)


_WANTED = (
    "activation patching needs layers that run once and are given and give back one stream "
    "(batch, length, size), as the decoder layers of most models do."
)


def _changed(given: Any, change: _Change, what: str) -> Any:
    """A layer's output or its arguments, with the stream, which is the first, modified."""
    parts = cast("tuple[Any, ...]", given) if isinstance(given, tuple | list) else (given,)
    stream = parts[0] if parts else None
    if not isinstance(stream, Tensor) or stream.dim() != 3 or not stream.is_floating_point():
        shape = tuple(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__
        raise ValueError(f"{what} is {shape}: {_WANTED}")
    new = change(stream)
    if new is None:
        return given
    if isinstance(given, Tensor):
        return new
    changed = (new, *parts[1:])
    return changed if type(given) is tuple else type(given)(changed)


def _check_rows(stream: Tensor, n_rows: int) -> None:
    if stream.dim() != 3 or len(stream) != n_rows:
        raise ValueError(
            f"a pass over {n_rows} rows has a stream of shape {tuple(stream.shape)}: {_WANTED}"
        )


def same_streams(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """At which positions two rows have equal streams, bool ``(n_layers + 1, length)`` on the CPU.

    Args:
        one, other: The streams of each, ``(length, size)``.
    """
    each = [(a == b).all(-1).cpu() for a, b in zip(one, other, strict=True)]
    return torch.stack(each)
