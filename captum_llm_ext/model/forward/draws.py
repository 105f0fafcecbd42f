"""What a forward pass draws at random, and the same draws again from a seed.

Dropout left on by a hook, noise, layers skipped at random: values are then those of one pass, and
another pass gives others. Two equal passes prove little (a layer skipped in one pass of ten is
rarely seen), but torch reports which of its functions draw, and from which generator.
"""

import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, TypeVar
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_llm_ext import _compat
from captum_llm_ext.model.forward.generators import generators_of, states

T = TypeVar("T")

# "seeded": all draws can be repeated from a seed. "free": some cannot. "unseen": equal passes
# differ for reasons unknown to torch, Python and numpy.
Drawing = Literal["seeded", "free", "unseen"]

_RANDOM = torch.Tag.nondeterministic_seeded
# Some functions tagged as random draw only if these arguments are above 0, or true.
_RATES, _SWITCHES = ("dropout_p", "dropout"), ("train", "training")
# This one only chooses which of these is called.
_CHOOSES = ("aten::_fused_sdp_choice",)
# Functions with separate overloads with and without a generator.
_OVERLOADS = {
    "default": "generator",
    "low": "low_generator",
    "low_dtype": "low_generator_dtype",
    "Tensor": "Tensor_generator",
}


class Draws(TorchDispatchMode):
    """Records torch's random draws within, in this thread.

    Args:
        seed: Draw from generators with this seed instead of the global ones. None: unchanged.

    Attributes:
        sources: Per random function a digest of its generator's state.
        are_seeded: Whether everything was drawn from the seed.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.sources: list[bytes] = []
        self.are_seeded = True
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if _is_random(func) and _draws(func, args, named):
            named = dict(named)
            generator = named.get("generator")
            device = _device(args, named)
            if self._seed is not None and generator is None:
                seeding = _with_generator(func)
                if seeding is not None:
                    func, generator = seeding, self._generator(device, self._seed)
                    named["generator"] = generator
            self.are_seeded &= generator is not None and generator in self._generators.values()
            self.sources.append(_state_of(generator or _global_generator(device)))
        return func(*args, **named)

    def _generator(self, device: torch.device, seed: int) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(seed)
        return self._generators[device]


def repeated_draws(seed: int | None, ids: Tensor) -> AbstractContextManager[Any]:
    """Passes over the same ids draw the same within, passes over others something else.

    Args:
        seed: Seed of all passes; None: unchanged.
        ids: Token ids.
    """
    if seed is None:
        return nullcontext()
    return Draws(crc32(repr(ids.tolist()).encode(), seed))


def random_draws(model: nn.Module, run: Callable[[], T]) -> tuple[Drawing | None, T]:
    """Whether a model draws at random in a pass, and whether that can be seeded.

    A model that seeds its own generators in each pass does not.

    Args:
        model: The model.
        run: The pass; run once, and a few times more if it may draw.

    Returns:
        The kind of drawing, or None; and the first result of `run`.
    """
    is_unseen = _compat.runs_past_modes(model)
    own = generators_of(model)

    def generator_states() -> tuple[object, ...]:
        return (*states(own), *_torch_states())

    def moves(meanwhile: Callable[[], object]) -> bool:
        before = generator_states()
        meanwhile()
        return before != generator_states()

    first, before, began = Draws(), generator_states(), time.monotonic()
    if is_unseen:
        result = run()
    else:
        with first:
            result = run()
    took = max(time.monotonic() - began, 0.01)  # seconds; time for another thread to run
    if not first.sources and before == generator_states():
        return None, result
    if is_unseen or not first.sources:
        # Another thread may have drawn meanwhile, but hardly every time; if it draws all the time,
        # generators also change without a pass, and only values can show whether the model draws.
        always = all(moves(run) for _ in range(3))
        return ("free" if always and not moves(lambda: time.sleep(took)) else None), result
    with Draws() as second:
        run()
    if first.sources == second.sources:
        return None, result
    others = states(own)
    with Draws(0) as third:
        run()
    return ("seeded" if third.are_seeded and others == states(own) else "free"), result


@cache
def _is_random(func: Any) -> bool:
    return _RANDOM in func.tags


def _draws(func: Any, args: Any, named: dict[str, Any]) -> bool:
    """Whether a random function draws with these arguments."""
    name, schema = func._schema.name, func._schema.arguments
    given = {a.name: value for a, value in zip(schema, args, strict=False)} | named
    values = {a.name: given.get(a.name, a.default_value) for a in schema}
    if name in _CHOOSES or any(values.get(switch) is False for switch in _SWITCHES):
        return False
    rates = (*_RATES, "p") if "dropout" in name else _RATES
    return all(values.get(rate) != 0 for rate in rates)


def _with_generator(func: Any) -> Any:
    """The overload with an argument `generator`, or None."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    name = _OVERLOADS.get(func._overloadname)
    return None if name is None else getattr(func.overloadpacket, name, None)


def _device(args: Any, named: dict[str, Any]) -> torch.device:
    if named.get("device") is not None:
        return torch.device(named["device"])
    tensor = next((a for a in (*args, *named.values()) if isinstance(a, Tensor)), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _global_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _state_of(generator: torch.Generator) -> bytes:
    state: Any = generator.get_state().numpy()
    return hashlib.blake2b(memoryview(state), digest_size=8).digest()


def _torch_states() -> tuple[object, ...]:
    """The states of torch's global generators."""
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return (_state_of(torch.default_generator), *map(_state_of, cuda))
