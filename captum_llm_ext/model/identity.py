"""Which model it is: what it is made like, what it holds, and which of its adapters are at work."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.base.digest import checksum, digest, stacklevel_of_caller
from captum_llm_ext.model.exclusive import locked

_ADAPTERS = ("disable_adapters", "merged_adapters", "scaling")
_MOST_NAMES = 3  # shown in a message


def model_identity(model: nn.Module) -> dict[str, Any]:
    """What tells a model from another, wherever its weights lie and however they are spread.

    A module holds parameters, buffers and what else it says itself (packed weights of quantised
    layers, extra state); tensors that are made of others hold these. What lies outside, such as
    hooks or a forward of the user's own, is not seen here: `check_same` finds it by its effect.

    Where several processes hold the model together, all of them have to call this.

    Returns:
        ``"model"``: its class, type of numbers and sizes. ``"weights"``, ``"buffers"``: digests.
        ``"adapters"``: where there are any, a digest of which are at work, and how strongly.
        ``"unread"``: where there are any, the names of what cannot be read.

    Warns:
        UserWarning: If something cannot be read.
    """
    kept: dict[str, dict[str, str]] = {"weights": {}, "buffers": {}}
    adapters: dict[str, Any] = {}
    unread: list[str] = []
    with locked(model), torch.no_grad():  # accelerate brings offloaded weights for the time
        for prefix, module in _compat.readable_modules(model):
            for kind, name, value in _held(module):
                name = f"{prefix}.{name}"
                try:
                    kept[kind][name] = _told(value)
                except Exception:  # whatever a kind of tensor does that cannot be read
                    unread.append(name)
            adapters |= _adapters(prefix, module)
    found: dict[str, Any] = {
        "model": _compat.model_description(model),
        **{kind: _digest_of(entries) for kind, entries in kept.items()},
    }
    if adapters:
        found["adapters"] = digest(sorted(adapters.items()))
    if unread:
        found["unread"] = sorted(unread)
        _warn_of_unread(found["unread"])
    return found


def check_same(now: Tensor, then: Tensor, tolerance: Tensor, *, whose: str, advice: str) -> None:
    """Holds values of a row that are stored against those that the model gives it now.

    Args:
        now, then: Shape ``(n_target,)``; NaN where a row gives a token no value.
        tolerance: How far rounding may move each.
        whose: What holds the stored ones.
        advice: What to do.

    Raises:
        ValueError: If they differ.
    """
    now, then = now.double().cpu(), then.double().cpu()
    differ = (now - then).abs()
    differ[now.isnan() & then.isnan()] = 0.0
    beyond = differ.nan_to_num(nan=torch.inf) - tolerance
    if bool((beyond > 0).any()):
        t = int(beyond.argmax())
        raise ValueError(
            f"{whose} of another model: a row scored anew gives {float(now[t]):.6g} for "
            f"{float(then[t]):.6g}, and rounding makes {float(tolerance[t]):.2g} at most. Weights, "
            f"adapters, hooks or a forward of its own may have changed. {advice}"
        )


def _warn_of_unread(names: Sequence[str]) -> None:
    shown = ", ".join(names[:_MOST_NAMES]) + (" …" if len(names) > _MOST_NAMES else "")
    warnings.warn(
        f"{len(names)} tensors of the model cannot be read ({shown}): a model that differs in them "
        "alone is told from this one by a single row that is scored anew, and by nothing else.",
        stacklevel=stacklevel_of_caller(),
    )


def _held(module: nn.Module) -> Iterator[tuple[str, str, object]]:
    """What a module holds itself, without its parts: kind, name and value."""
    parameters = dict(module.named_parameters(recurse=False))
    buffers = dict(module.named_buffers(recurse=False))
    yield from (("weights", name, value) for name, value in parameters.items())
    for name, value in buffers.items():
        # transformers 5.23 (2026): rotary embeddings whose base grows with the text write it anew
        # while they run, and keep beside what they began with.
        yield "buffers", name, getattr(module, f"original_{name}", value)
    for name, value in _own_state(module).items():
        if name not in parameters and name not in buffers:
            yield "weights", name, value


def _own_state(module: Any) -> Mapping[str, Any]:
    """What a module says that its state is, as it would be saved."""
    found: dict[str, Any] = {}
    if type(module).state_dict is not nn.Module.state_dict and not any(module.children()):
        return dict(module.state_dict(destination=found, prefix="", keep_vars=True)) | found
    module._save_to_state_dict(found, "", True)
    return found


def _adapters(prefix: str, module: Any) -> dict[str, Any]:
    """Which adapters of a layer are at work, as peft and what is built like it tell."""
    active = getattr(module, "active_adapters", getattr(module, "active_adapter", None))
    told = {name: getattr(module, name, None) for name in _ADAPTERS}
    # transformers' models have methods of these names, and layers of attention a scaling.
    if active is None or callable(active):
        return {}
    # One adapter is told by its name alone until another has been active.
    told["active"] = [active] if isinstance(active, str) else active
    kept = {name: value for name, value in told.items() if not callable(value)}
    return {f"{prefix}.{name}": value for name, value in kept.items() if value is not None}


def _told(value: object) -> str:
    """A text that differs where what is held does."""
    if isinstance(value, Tensor):
        total = _compat.summed_over_shards(value, checksum)
        return f"{value.dtype} {tuple(value.shape)} {int(total)}"
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return f"{{{', '.join(f'{key}: {_told(part)}' for key, part in items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_told(part) for part in cast(Sequence[Any], value))}]"
    return digest(value)


def _digest_of(entries: Mapping[str, str]) -> str:
    found = blake2b(digest_size=8)
    for name in sorted(entries):
        found.update(f"{name} {entries[name]}\n".encode())
    return found.hexdigest()
