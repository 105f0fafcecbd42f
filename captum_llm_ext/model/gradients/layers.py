"""The layers whose activations are attributed to: read, or replaced.

Only in forward passes of the calling thread; those of others are unaffected.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.exclusive import in_this_thread_only


class Layers:
    """Modules of a model, at their output or their input.

    Args:
        modules: Modules of which none feeds another.
        of_input: Whether to use their input.
    """

    def __init__(self, modules: Sequence[nn.Module], *, of_input: bool = False) -> None:
        self.modules = list(modules)
        self._of_input = of_input

    @contextmanager
    def read(self) -> Generator[list[Tensor]]:
        """Collects the activations of the pass within, one per module.

        Raises:
            ValueError: If a module does not run exactly once, or returns no tensor (batch, length,
                size).
        """
        found: list[list[Tensor]] = [[] for _ in self.modules]
        activations: list[Tensor] = []

        def note(place: int) -> Callable[[Tensor], None]:
            # Later in-place modifications do not belong to the layer's output.
            return lambda activation: found[place].append(activation.detach().clone())

        with self._hooked([note(i) for i in range(len(self.modules))]):
            yield activations
        for module, own in zip(self.modules, found, strict=True):
            if len(own) != 1:
                runs = f"runs {len(own)} times" if own else "does not run"
                raise ValueError(
                    f"layer {type(module).__name__} {runs} in one pass: give a "
                    "layer that runs once, such as the embedding (`layer=None` finds it)."
                )
            activations.append(own[0])

    @contextmanager
    def replaced(self, activations: Sequence[Tensor]) -> Generator[None]:
        """Makes the modules return these activations, one per module, in the passes within.

        Raises:
            ValueError: If a module's own output has another shape.
        """
        with self._hooked([_always(activation) for activation in activations]):
            yield

    @contextmanager
    def _hooked(self, functions: Sequence[Callable[[Tensor], Tensor | None]]) -> Generator[None]:
        with ExitStack() as stack:
            for module, function in zip(self.modules, functions, strict=True):
                stack.callback(self._hook(module, function).remove)
            yield

    def _hook(self, module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> Any:
        name = type(module).__name__
        if not self._of_input:

            def after(_: nn.Module, arguments: Any, output: Any) -> Any:
                return _changed(output, function, f"the output of layer {name}")

            return module.register_forward_hook(in_this_thread_only(after))

        def before(_: nn.Module, arguments: Any, keywords: dict[str, Any]) -> Any:
            what = f"the input of layer {name}"
            if not arguments and "hidden_states" in keywords:
                new = _changed(keywords["hidden_states"], function, what)
                return (arguments, {**keywords, "hidden_states": new})
            return (_changed(arguments, function, what), keywords)

        return module.register_forward_pre_hook(in_this_thread_only(before), with_kwargs=True)


def modules_reading(
    model: nn.Module, ids: Tensor, forward: Callable[[Tensor], object]
) -> list[nn.Module]:
    """The modules that map token ids to vectors, found in one pass of the model.

    Args:
        model: The model.
        ids: Token ids ``(1, length)``, different from position ids, which are embedded too.
        forward: Runs the model on ids.
    """
    main = _compat.embeddings(model, "get_input_embeddings")
    candidates = [m for m in model.modules() if isinstance(m, nn.Embedding) or m is main]
    found: list[nn.Module] = []

    def note(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        read = next(iter([*arguments, *keywords.values()]), None)
        if isinstance(read, Tensor) and not read.is_floating_point() and module not in found:
            same = read.numel() == ids.numel() and torch.equal(read.reshape(-1).cpu(), ids[0].cpu())
            if same:
                found.append(module)

    with ExitStack() as stack:
        for module in candidates:
            hook = module.register_forward_pre_hook(in_this_thread_only(note), with_kwargs=True)
            stack.callback(hook.remove)
        forward(ids)
    # An adapter of an embedding contains it, and returns what the model uses.
    parts = {id(part) for module in found for part in module.modules() if part is not module}
    found = [module for module in found if id(module) not in parts]
    # The main one first, since it is named in messages.
    return sorted(found, key=lambda module: module is not main)


@contextmanager
def without_gradient(
    model: nn.Module, is_held: Callable[[Tensor], bool] | None = None
) -> Generator[list[str]]:
    """Names of layers with weights that no gradient passes in the pass within.

    Gradients along residual connections would otherwise be taken for the whole.

    Args:
        model: The model.
        is_held: Whether a tensor lacks a gradient intentionally. None: never.
    """
    found: list[str] = []

    def hook_of(name: str) -> Callable[..., None]:
        def note(module: nn.Module, given: Any, output: Any) -> None:
            numbers = _numbers(output)
            is_cut = _moves(given) and bool(numbers) and not _moves(output)
            is_cut = is_cut and not (is_held is not None and all(map(is_held, numbers)))
            # Modules without weights compute something else from their input, such as position
            # angles.
            if is_cut and module.state_dict():
                found.append(f"{name} ({type(module).__name__})")

        return note

    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = module.register_forward_hook(in_this_thread_only(hook_of(name)))
            stack.callback(hook.remove)
        yield found


def _numbers(given: Any) -> list[Tensor]:
    parts = cast(tuple[Any, ...], given) if isinstance(given, tuple) else (given,)
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]


def _moves(given: Any) -> bool:
    """Whether it has a gradient; torch gives tensors without one a backward that only warns."""
    moving = [part for part in _numbers(given) if part.requires_grad]
    return any(p.grad_fn is None or "NotImplemented" not in p.grad_fn.name() for p in moving)


def _always(activation: Tensor) -> Callable[[Tensor], Tensor]:
    def put(found: Tensor) -> Tensor:
        if found.shape != activation.shape:
            raise ValueError(
                f"a layer's activation is {tuple(found.shape)} where {tuple(activation.shape)} "
                "was expected: its first axis is not the batch, or its size is not that of a "
                "token. Give another layer, such as the embedding (`layer=None` finds it)."
            )
        return activation.clone()  # models may modify it in place, which a leaf does not allow

    return put


def _changed(given: Any, function: Callable[[Tensor], Tensor | None], what: str) -> Any:
    """A layer's output or its arguments, with a function applied to the first tensor."""
    is_tuple = isinstance(given, tuple)
    parts = cast(tuple[Any, ...], given) if is_tuple else (given,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    activation = parts[0] if parts else None
    if isinstance(activation, Tensor) and not activation.is_floating_point():
        raise ValueError(
            f"{what} holds {activation.dtype}, which have no gradient: attribute to its output "
            "(`attribute_to_layer_input=False`)."
        )
    if not isinstance(activation, Tensor) or activation.dim() != 3 or len(tensors) > 1:
        found = ", ".join(str(tuple(t.shape)) for t in tensors) or type(given).__name__
        raise ValueError(
            f"{what} is {found}: attribution needs one tensor (batch, length, size), such as the "
            "embedding's output or that of a whole decoder layer."
        )
    new = function(activation)
    if new is None:
        return given
    return (new, *parts[1:]) if is_tuple else new
