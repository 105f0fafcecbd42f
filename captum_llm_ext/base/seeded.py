"""Makes other code's draws from torch's global generator come from a seeded one."""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_MAKE = frozenset("rand randn randint randperm normal".split())
_DRAW = frozenset(
    "multinomial bernoulli bernoulli_ binomial poisson exponential_ uniform_ normal_ random_ "
    "geometric_ cauchy_ log_normal_ _standard_gamma _sample_dirichlet".split()
)
# torch 2.6 (2025) had no generator argument for these.
_LIKE = {"rand_like": torch.rand, "randn_like": torch.randn, "randint_like": torch.randint}


def seeded(seed: int) -> AbstractContextManager[Any]:
    """Code within draws as it would after ``torch.manual_seed(seed)``.

    The global generators are neither read nor changed, so other threads are unaffected. Random
    functions called within torch itself (dropout) still use them.
    """
    return _Seeded(seed)


def seeded_rows(seeds: Sequence[int]) -> AbstractContextManager[Any]:
    """Rows of a batch are sampled within as each would be alone.

    Args:
        seeds: One per row: row ``i`` draws what it would in a batch of one within
            ``seeded(seeds[i])``. Only for `torch.multinomial`, which `generate` uses.
    """
    return _SeededRows(seeds)


@contextmanager
def reseeded(model: nn.Module, seed: int) -> Generator[None]:
    """Seeds the global generators and restores them afterwards, for code compiled by torch."""
    used = {parameter.device for parameter in model.parameters()}
    devices = sorted({device.index or 0 for device in used if device.type == "cuda"})
    with torch.random.fork_rng(devices):
        # Not `torch.manual_seed`, which would affect devices that are not restored.
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


class _Seeded(TorchFunctionMode):
    """A torch function mode, active in this thread only."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, named = getattr(func, "__name__", ""), dict(kwargs or {})
        if (name in _MAKE or name in _DRAW or name in _LIKE) and named.get("generator") is None:
            tensor = next((a for a in (*args, *named.values()) if isinstance(a, Tensor)), None)
            if name in _LIKE and tensor is not None:
                func, args = cast(Callable[..., Any], _LIKE[name]), (*args[1:], tensor.shape)
                named = {"dtype": tensor.dtype, "device": tensor.device, **named}
                named.pop("memory_format", None)
            named["generator"] = self._generator(_device(tensor, named.get("device")))
        return func(*args, **named)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


class _SeededRows(TorchFunctionMode):
    """A torch function mode, active in this thread only."""

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        self._rows = [_Seeded(seed) for seed in seeds]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, named = getattr(func, "__name__", ""), dict(kwargs or {})
        if name != "multinomial" or named.get("generator") is not None:
            return self._rows[0].__torch_function__(func, types, args, kwargs)
        weights: Tensor = args[0] if args else named.pop("input")
        drawn = [
            row.__torch_function__(func, types, (own[None], *args[1:]), named)
            for row, own in zip(self._rows, weights, strict=True)
        ]
        return torch.cat(drawn)


def _device(tensor: Tensor | None, named: Any) -> torch.device:
    """The device of a draw."""
    if named is not None:
        return torch.device(named)
    return torch.get_default_device() if tensor is None else tensor.device
