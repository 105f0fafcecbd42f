"""Forward passes that are linear in the input, with the model's own output.

In passes of this thread, the scales of norms, attention weights, gates and routers are frozen: the
output is then a linear function of the embeddings, plus contributions of biases and position tables
(arXiv 2505.24293). Torch functions are intercepted when called, so the model is not modified
(except for linear attention, for which transformers has its own functions): an activation ``f(x)``
with ``f(0) = 0`` becomes ``x * stop(f(x) / x)``, any other one ``stop(f(x))``, and in a product of
two factors that both depend on the input, the one from an activation is stopped.

Every call verifies that nothing nonlinear was missed (`check_sum`); if so, each module is tried to
find it (`culprit`).
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from captum_llm_ext import _compat
from captum_llm_ext.model.exclusive import in_this_thread_only

# Names of torch's functions, as functions, methods and operators.
_STOPPED = frozenset(
    "softmax log_softmax sigmoid exp exp2 expm1 softplus rsqrt sqrt reciprocal log log1p "
    "logsigmoid logsumexp cos sin norm vector_norm var std rpow cumprod prod softmin".split()
)
_ACTIVATIONS = frozenset(
    "silu gelu relu relu6 mish elu selu celu leaky_relu hardswish tanh erf pow square abs softsign "
    "tanhshrink hardshrink softshrink threshold".split()
)
_BOUNDS = frozenset("clamp clamp_min clamp_max clip hardtanh".split())
_PRODUCTS = frozenset("mul multiply matmul rmatmul mm bmm einsum baddbmm dot outer linear".split())
_SUMS = frozenset("add sub subtract rsub addmm baddbmm cat concat concatenate stack".split())
_WITH_BIAS = frozenset("linear conv1d conv2d".split())
# The outputs of these are not gates, whatever the inputs.
_MIXES = frozenset(
    "matmul rmatmul mm bmm einsum baddbmm addmm linear conv1d conv2d grouped_mm embedding "
    "linalg_solve_triangular "
    "scaled_dot_product_attention sum mean".split()
)
# Double precision is not reduced on the way.
_CASTS = frozenset("to float type".split())
_GATE = "_captum_llm_ext_gate"
_STOPPED_INPUT = "_captum_llm_ext_stopped"
# Allowed rounding error of a sum of contributions, relative to the value (measured on 25 families:
# 2e-15, 9e-7 and 2e-2; nonlinear functions begin at 1e-3).
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_TOLERANCE_HALF = 0.06  # of half precision: three times the largest measured
# Allowed relative nonlinearity of a module: rounding of half precision, or of the input of int8
# weights (chosen, not measured; ReLU and GELU deviate by more than a half).
_LINEAR_TOLERANCE = 0.05
_MOST_CASTS = 3  # before a function; chosen, not measured


@contextmanager
def frozen(device: torch.device | str, model: Any = None) -> Generator[Tensor]:
    """Makes passes within linear in the activations whose gradient is computed, and in the unit.

    Args:
        device: Device of the unit.
        model: The model, whose transformers module has further functions.

    Yields:
        The unit, a 1 by which all biases and constants are multiplied: a value's gradient with
            respect to it is their contribution to the value.
    """
    unit = torch.ones((), dtype=torch.float64, device=device, requires_grad=True)
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(_compat.values_mixed_by(model, _stopped))
        hook = register_module_forward_hook(in_this_thread_only(_rescaled_function))
        stack.callback(hook.remove)
        stack.enter_context(_Freezing(unit))
        yield unit


class _Freezing(TorchFunctionMode):
    def __init__(self, unit: Tensor) -> None:
        super().__init__()
        self._unit = unit

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        named = dict(kwargs or {})
        if name == "__set__" or not torch.is_grad_enabled():
            return func(*args, **named)
        if name == "__get__":
            return _property(func, args, named)
        # Weights are constants here, whether or not they require gradients.
        args, named = _mapped(args, _stopped_weight), _mapped_by_name(named, _stopped_weight)
        given = list(_tensors([*args, *named.values()]))
        moving = [tensor for tensor in given if tensor.requires_grad]
        name = _plain_name(name)
        if not moving:
            if name in _MIXES and any(tensor.dtype == torch.float64 for tensor in given):
                args, named = _in_double(name, args, named)
            return _alike(func(*args, **named), given, may_be_gate=name not in _MIXES)
        if any(tensor.dtype == torch.float64 for tensor in moving):
            args, named = _in_double(name, args, named)
        found = self._frozen(func, name, args, named, moving)
        # An output of which everything was stopped still depends on the input: it is not a bias.
        for tensor in _tensors([found]):
            if not tensor.requires_grad and tensor.is_floating_point():
                setattr(tensor, _STOPPED_INPUT, True)
        return found

    def _frozen(
        self,
        func: Callable[..., Any],
        name: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        moving: Sequence[Tensor],
    ) -> Any:
        """The output of a function with at least one argument that depends on the input."""
        if name == "float" and moving[0].dtype == torch.float64:
            return moving[0]
        if name in _STOPPED or (name == "pow" and not _is_positive(args, kwargs)):
            return _mark(
                _stopped(func(*_mapped(args, _stopped), **_mapped_by_name(kwargs, _stopped)))
            )
        if name in _ACTIVATIONS or name in _BOUNDS:
            found = _rescaled(func, args, kwargs)
            return _mark(found) if name in _ACTIVATIONS or _is_gate(moving[0]) else found
        if name == "scaled_dot_product_attention":
            args, kwargs = _with_stopped(args, kwargs, ("query", "key"))
            return func(*args, **kwargs)
        if name == "layer_norm":
            return _layer_norm(args, kwargs, self._scaled)
        if name == "rms_norm":
            return _rescaled(func, args, kwargs)
        if name in ("div", "true_divide", "divide", "rdiv", "rtruediv"):
            return self._quotient(func, name, args, kwargs)
        is_gate = name not in _MIXES and all(map(_is_gate, moving))
        if name in _PRODUCTS and len(moving) > 1:
            stop = _to_be_stopped(moving)
            args, kwargs = _mapped(args, stop), _mapped_by_name(kwargs, stop)
        if name in _SUMS:
            args = self._scaled_constants(name, args)
        if name in _WITH_BIAS:
            args, kwargs = self._scaled_bias(args, kwargs)
        found = func(*args, **kwargs)
        if name in ("mul", "multiply") and not is_gate:
            # A gate has the size of what it gates, unlike the scale of a norm or of a router.
            constants = [t for t in _tensors(args) if not t.requires_grad]
            is_gate = any(_is_gate(t) and t.shape == found.shape for t in constants)
        return _mark(found) if is_gate else found

    def _scaled(self, constant: Any) -> Any:
        """A constant as a multiple of the unit."""
        if isinstance(constant, Tensor):
            if not constant.is_floating_point() or getattr(constant, _STOPPED_INPUT, False):
                return constant
            return constant * self._unit.to(constant.device, constant.dtype)
        return constant * self._unit if isinstance(constant, int | float) else constant

    def _scaled_constants(self, name: str, args: Sequence[Any]) -> Sequence[Any]:
        def scaled(given: Any) -> Any:
            return (
                given if isinstance(given, Tensor) and given.requires_grad else self._scaled(given)
            )

        if not args:  # positional names only: anything missed is found by `check_sum`
            return args
        if name in ("cat", "concat", "concatenate", "stack"):
            return [[scaled(part) for part in args[0]], *args[1:]]
        n_terms = 1 if name in ("addmm", "baddbmm") else 2
        return [*(scaled(term) for term in args[:n_terms]), *args[n_terms:]]

    def _scaled_bias(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        if kwargs.get("bias") is not None:
            return args, {**kwargs, "bias": self._scaled(kwargs["bias"])}
        return [*args[:2], *(self._scaled(bias) for bias in args[2:3]), *args[3:]], kwargs

    def _quotient(
        self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Stops the divisor."""
        if len(args) < 2:
            args = [*args, kwargs.pop("other")]
        first, second, *others = args
        if name in ("rdiv", "rtruediv"):
            return _mark(func(_stopped(first), second, *others, **kwargs))
        found = func(first, _stopped(second), *others, **kwargs)
        return _mark(found) if _is_gate(first) else found


def _property(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A property of a tensor: another tensor, such as `weight.T`, is marked like the tensor."""
    found = func(*args, **kwargs)
    if not isinstance(found, Tensor) or not isinstance(args[0], Tensor):
        return found
    found = found.detach() if isinstance(args[0], nn.Parameter) else found
    if found.requires_grad:
        return _mark(found) if _is_gate(args[0]) else found
    return _alike(found, args[:1], may_be_gate=True)


def _plain_name(name: str) -> str:
    """The name of the out-of-place variant of an operator or function."""
    plain = name.strip("_")
    is_written_to = name.startswith("__i") and plain[1:] in _PRODUCTS | _SUMS | {"truediv", "div"}
    plain = plain[1:] if is_written_to else plain
    return {"truediv": "div", "radd": "add", "rmul": "mul"}.get(plain, plain)


def _tensors(given: Iterable[Any]) -> Iterable[Tensor]:
    for part in given:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, list | tuple):
            yield from (one for one in cast("list[Any]", part) if isinstance(one, Tensor))


def _mapped(given: Sequence[Any], function: Callable[[Any], Any]) -> list[Any]:
    """Arguments with a function applied to each tensor, including lists."""
    return [_mapped_one(part, function) for part in given]


def _mapped_by_name(given: Mapping[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: _mapped_one(part, function) for name, part in given.items()}


def _mapped_one(part: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(part, Tensor):
        return function(part)
    if type(part) in (list, tuple) and any(isinstance(one, Tensor) for one in part):
        return type(part)(function(one) if isinstance(one, Tensor) else one for one in part)
    return part


def _stopped_weight(tensor: Tensor) -> Tensor:
    return tensor.detach() if isinstance(tensor, nn.Parameter) and tensor.requires_grad else tensor


def _stopped(given: Any) -> Any:
    """The same without a gradient; its mark remains."""
    if isinstance(given, tuple | list):
        return type(given)(_stopped(part) for part in cast("list[Any]", given))
    if not isinstance(given, Tensor) or not given.requires_grad:
        return given
    found = given.detach()
    setattr(found, _STOPPED_INPUT, True)
    return _mark(found) if _is_gate(given) else found


def is_stopped(tensor: Tensor) -> bool:
    """Whether a tensor of a frozen pass depends on the input, and is held constant."""
    return getattr(tensor, _STOPPED_INPUT, False)


def _to_be_stopped(moving: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Which factors are stopped: the gates; all, if none is a gate (scores, squares)."""
    gates = [tensor for tensor in moving if _is_gate(tensor)]
    if len(gates) == len(moving):
        gates = gates[1:]
    ids = {id(tensor) for tensor in gates or moving}
    return lambda tensor: _stopped(tensor) if id(tensor) in ids else tensor


def _mark(found: Any) -> Any:
    for tensor in _tensors([found]):
        setattr(tensor, _GATE, True)
    return found


def _alike(found: Any, given: Iterable[Tensor], *, may_be_gate: bool) -> Any:
    """The result of constants, marked like these."""
    marks = [_STOPPED_INPUT, *([_GATE] if may_be_gate else [])]
    for mark in marks:
        if any(getattr(tensor, mark, False) for tensor in given):
            for tensor in _tensors([found]):
                if tensor.is_floating_point():  # the choice of an expert is not part of its bias
                    setattr(tensor, mark, True)
    return found


def _in_double(
    name: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Sequence[Any], dict[str, Any]]:
    """Arguments that keep double precision."""
    if name in _CASTS:
        return (
            [torch.float64 if part is torch.float32 else part for part in args],
            {key: torch.float64 if part is torch.float32 else part for key, part in kwargs.items()},
        )
    if name in _MIXES:
        return _mapped(args, _doubled), _mapped_by_name(kwargs, _doubled)
    return args, kwargs


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype == torch.float32 else tensor


def _is_gate(tensor: Any) -> bool:
    return getattr(tensor, _GATE, False)


def _is_positive(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the input is raised to a power that maps 0 to 0."""
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    return isinstance(exponent, int | float) and exponent > 0 and isinstance(args[0], Tensor)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rescaled(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """``x * stop(f(x) / x)``."""
    named = not args
    x: Tensor = kwargs["input"] if named else args[0]
    with torch.no_grad():
        given, others = _mapped(args, _stopped), _mapped_by_name(kwargs, _stopped)
        found = cast(Tensor, func(*given, **others))
        ratio = _wide(found) / _wide(x)
        ratio.masked_fill_(x == 0, 0.0)
    return (_wide(x) * ratio).to(found.dtype)


def _rescaled_function(module: nn.Module, given: tuple[Any, ...], output: Any) -> Tensor | None:
    """The output of an activation with its own backward function, which no torch function shows."""
    if not isinstance(output, Tensor) or not isinstance(output.grad_fn, BackwardCFunction):
        return None
    is_alone = len(given) == 1 and isinstance(given[0], Tensor) and given[0].shape == output.shape
    if not is_alone or not _is_made_of(output, given[0]):
        return None
    if _multiplies(module, given[0]):
        return None  # its own backward function defines it, as for quantised weights
    found = output.detach()

    def again(_: Tensor) -> Tensor:
        return found

    return _mark(_rescaled(again, given, {}))


def _is_made_of(output: Tensor, given: Tensor) -> bool:
    """Whether only casts are between a module's input and its own backward function.

    A block that ends with such a function is not one itself.
    """
    node: Any = output.grad_fn
    for _ in range(_MOST_CASTS):
        node = next((before for before, _ in node.next_functions if before is not None), None)
        if node is None or node is given.grad_fn:
            return node is not None
        if not node.name().startswith("ToCopy"):
            return False
    return False


def _multiplies(module: nn.Module, given: Tensor) -> bool:
    """Whether a module is linear up to a constant: at such multiples, no activation or norm is.

    Called without its hooks, of which this is one.
    """
    with torch.no_grad():
        x = given.detach()
        nothing, once, twice, back = (module.forward(x * by).float() for by in (0, 1, 2, -1))
        off = torch.stack([once + back - 2 * nothing, twice - 2 * once + nothing]).norm()
        return bool(off <= _LINEAR_TOLERANCE * (once - nothing).norm())


def _layer_norm(
    args: Sequence[Any],
    kwargs: dict[str, Any],
    scaled: Callable[[Any], Any],
) -> Tensor:
    """The deviation is stopped, the mean is not."""
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, shape = _wide(given["input"]), given["normalized_shape"]
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    with torch.no_grad():
        scale = (centred.square().mean(dims, keepdim=True) + given.get("eps", 1e-5)).rsqrt()
        if given.get("weight") is not None:
            scale = scale * given["weight"]
    found = centred * scale
    if given.get("bias") is not None:
        found = found + scaled(_wide(given["bias"]))
    return found.to(given["input"].dtype)


def _with_stopped(
    args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]
) -> tuple[list[Any], dict[str, Any]]:
    n = len(names)
    stopped = [_stopped(part) for part in args[:n]]
    others = {name: _stopped(part) if name in names else part for name, part in kwargs.items()}
    return [*stopped, *args[n:]], others


def check_sum(
    summed: Tensor,
    expected: Tensor,
    size: Tensor,
    dtype: torch.dtype,
    find: Callable[[float], str | None] = lambda _: None,
) -> Tensor:
    """The relative errors of sums of all contributions.

    Args:
        summed: Summed contributions of all tokens and of constants, ``(n,)``.
        expected: The values, ``(n,)``.
        size: Magnitude of the logits, ``(n,)``, since a value near 0 may be their difference.
        dtype: The model's dtype.
        find: Returns the name of the responsible layer for a rounding tolerance.

    Raises:
        ValueError: If errors are larger than rounding.
    """
    apart = (summed - expected).abs() / torch.maximum(expected.abs(), size)
    tolerance = _TOLERANCE.get(dtype, _TOLERANCE_HALF)
    if not bool((apart <= tolerance).all()):
        layer = find(tolerance)
        raise ValueError(
            f"the shares of all tokens miss the value by {float(apart.max()):.1g} of it: "
            + (f"{layer} is" if layer else "the model is")
            + " not linear in its input once norms, attention weights and gates are held, as "
            "recurrent layers, custom kernels and flash attention are not. Load it with "
            '`attn_implementation="sdpa"`, or take captum\'s `LayerIntegratedGradients`.'
        )
    return apart


def culprit(model: nn.Module, forward: Callable[[], object], tolerance: float) -> str | None:
    """Name of the smallest module that is not linear when frozen, the first of them.

    Each module is run alone on its input of a pass.

    Args:
        model: The model.
        forward: Runs it.
        tolerance: Allowed rounding error relative to a module's output.
    """
    return _culprit("", model, forward, tolerance)


def _culprit(
    name: str, module: nn.Module, forward: Callable[[], object], tolerance: float
) -> str | None:
    children = [(f"{name}.{own}".lstrip("."), part) for own, part in _parts(module)]
    given = _inputs([part for _, part in children], forward)
    for own, part in children:
        if id(part) not in given:
            continue
        is_linear = _is_linear(part, *given[id(part)], tolerance)
        # A module that cannot be tried as a whole may contain some that can.
        inner = None if is_linear else _culprit(own, part, forward, tolerance)
        if inner or is_linear is False:
            return inner or f"{own} ({type(part).__name__})"
    return None


def _parts(module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The children of a module, including those in its lists."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from ((f"{name}.{own}", part) for own, part in _parts(child))
        else:
            yield name, child


def _inputs(
    modules: Sequence[nn.Module], forward: Callable[[], object]
) -> dict[int, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The first inputs of modules in a pass."""
    found: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(id(module), (args, kwargs))

    with ExitStack() as stack:
        for module in modules:
            hook = module.register_forward_pre_hook(in_this_thread_only(note), with_kwargs=True)
            stack.callback(hook.remove)
        with torch.no_grad():
            forward()
    return found


def _is_linear(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tolerance: float
) -> bool | None:
    """Whether a frozen module's output equals what its gradient, its input and the unit give.

    Only the first argument is considered (not masks, angles, shared keys); None: unknown.
    """
    named = "hidden_states" if not args and "hidden_states" in kwargs else None
    given = kwargs[named] if named else args[0] if args else None
    if not isinstance(given, Tensor) or not given.is_floating_point():
        return None
    with torch.enable_grad(), frozen(given.device, module) as unit:
        x = given.detach().clone().requires_grad_()
        x_alone = x * 1
        out: Any = (
            module(**{**kwargs, named: x_alone}) if named else module(x_alone, *args[1:], **kwargs)
        )
        out = cast(Any, out)[0] if isinstance(out, tuple) else out
        if not isinstance(out, Tensor) or not out.requires_grad:
            return None
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu")
    weights = weights.to(out.device, out.dtype)
    gradients: list[Any] = [*torch.autograd.grad(out, [x, unit], weights, allow_unused=True)]
    terms = [
        0.0 if s is None else float((s.double() * v.detach().double()).sum())
        for s, v in zip(gradients, (x, unit), strict=True)
    ]
    whole = float((out.detach().double() * weights.double()).sum())
    return abs(sum(terms) - whole) <= tolerance * float((out.detach() * weights).double().norm())
