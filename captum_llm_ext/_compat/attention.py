"""Replaces the attention function of a transformers model, in one thread only."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from captum_llm_ext._compat.model import is_compiled, text_config

_FIELD = "_attn_implementation"


def has_eager_attention(model: nn.Module) -> bool:
    """Whether the model computes attention scores as one matrix (eager attention)."""
    return getattr(text_config(model), "_attn_implementation", None) == "eager"


def boolean_mask(*sizes: int, **arguments: Any) -> Tensor:
    """The mask function of transformers whose mask is True where a position is attended to."""
    from transformers.masking_utils import sdpa_mask

    return cast(Tensor, cast(Any, sdpa_mask)(*sizes, **arguments))


@contextmanager
def attention_of(
    model: nn.Module,
    name: str,
    attention: Callable[..., Any],
    mask: Callable[..., Any],
    instead_of: Collection[str],
) -> Generator[None]:
    """Uses other attention and mask functions in forward passes of this thread.

    The configuration is unchanged; only this thread reads another name from it. Everything is
    restored in any case.

    Args:
        model: The model.
        name: Name under which the functions are registered meanwhile, with a unique number.
        attention, mask: For `AttentionInterface` and `AttentionMaskInterface`.
        instead_of: Names of the implementations that may be replaced.

    Raises:
        NotImplementedError: If the model has another attention, or is compiled, since compiled code
            would ignore the change.
    """
    # transformers 5.23 (2026): assigning a plain name is checked against known names only.
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTIONS

    field = "_attn_implementation_internal"
    modules = (module for module in model.modules() if hasattr(module, "config"))
    configs = {id(module.config): module.config for module in modules}
    before = [(config, getattr(config, field, None)) for config in configs.values()]
    used = {str(implementation) for _, implementation in before if implementation is not None}
    if not used or not used <= set(instead_of) or is_compiled(model):
        how = ", ".join(sorted(used)) or "nothing that its configuration tells"
        raise NotImplementedError(f"attention of {type(model).__name__} by {how}")
    registries: list[dict[str, Any]] = [
        cast(Any, registry)._global_mapping for registry in (ATTENTIONS, MASKS)
    ]
    name = f"{name}_{next(_numbers)}"  # another thread may use another model
    own = [config for config, implementation in before if implementation is not None]
    try:
        for registry, function in zip(registries, (attention, mask), strict=True):
            registry[name] = function
        with _read_here_as(dict.fromkeys(map(id, own), name), {type(config) for config in own}):
            yield
    finally:
        for registry in registries:
            registry.pop(name, None)


class _Here(threading.local):
    """Names of attention implementations seen by this thread, by a configuration's id.

    The latest come last.
    """

    def __init__(self) -> None:
        self.names: list[dict[int, str]] = []


_here = _Here()
_numbers = itertools.count()
_properties = threading.Lock()
_n_readers = Counter[type]()  # users of each class's property


@contextmanager
def _read_here_as(names: dict[int, str], kinds: Collection[type]) -> Generator[None]:
    """Overrides the attention implementation of some configurations, in this thread.

    transformers 5.23 (2026): everything reads `_attn_implementation`, a property, which some
    configuration classes override.

    Args:
        names: Implementation names by the configuration's id.
        kinds: The classes of the configurations.
    """
    owners = {next(base for base in kind.__mro__ if _FIELD in vars(base)) for kind in kinds}
    with _properties:
        for owner in owners:
            if _n_readers[owner] == 0:
                setattr(owner, _FIELD, _Implementation(vars(owner)[_FIELD]))
            _n_readers[owner] += 1
    _here.names.append(names)
    try:
        yield
    finally:
        _here.names.pop()
        with _properties:
            for owner in owners:
                _n_readers[owner] -= 1
                if _n_readers[owner] == 0:
                    setattr(owner, _FIELD, vars(owner)[_FIELD].usual)
                    del _n_readers[owner]


class _Implementation:
    """A property whose value differs between threads."""

    def __init__(self, usual: Any) -> None:
        self.usual = usual

    def __get__(self, config: Any, kind: Any = None) -> Any:
        for names in reversed(_here.names):
            if id(config) in names:
                return names[id(config)]
        return self.usual.__get__(config, kind)

    def __set__(self, config: Any, value: Any) -> None:
        self.usual.__set__(config, value)


def additive_mask(*sizes: int, **arguments: Any) -> Tensor:
    """The mask function of transformers whose mask is added to scores (eager attention)."""
    from transformers.masking_utils import eager_mask

    return cast(Tensor, cast(Any, eager_mask)(*sizes, **arguments))
