"""The identity of a model: its structure, weights, buffers and active adapters."""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.base.digest import checksum, digest
from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.model.exclusive import locked

_ADAPTERS = ("disable_adapters", "merged_adapters", "scaling")
_MOST_NAMES = 3  # names shown in a message; chosen, not measured


def model_identity(model: nn.Module) -> dict[str, Any]:
    """What identifies a model, independent of where and how its weights are stored.

    Covers the parameters, buffers and extra state of modules (such as packed weights of quantised
    layers), and the inner tensors of tensor subclasses. Hooks or a custom forward are not covered:
    `check_same` finds these by their effect.

    If several processes hold the model together, all of them must call this.

    Returns:
        ``"model"``: its class, dtype and sizes. ``"weights"``, ``"buffers"``: digests.
        ``"adapters"``: if there are any, a digest of the active ones and their scaling.
        ``"unread"``: names of parts that cannot be read, if any.

    Warns:
        UserWarning: If a part cannot be read.
    """
    kept: dict[str, dict[str, str]] = {"weights": {}, "buffers": {}}
    adapters: dict[str, Any] = {}
    unread: list[str] = []
    with locked(model), torch.no_grad():  # accelerate loads offloaded weights meanwhile
        for prefix, module in _compat.readable_modules(model):
            for kind, name, value in _held(module):
                name = f"{prefix}.{name}"
                try:
                    kept[kind][name] = _as_text(value)
                except Exception:  # tensors that cannot be read may raise anything
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
    """Compares stored values of a row with those of the model now.

    Args:
        now, then: Shape ``(n_target,)``; NaN if undefined.
        tolerance: Allowed difference of each by rounding.
        whose: Name of the stored object, for the message.
        advice: What to do, for the message.

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
            f"{whose} of another model: a row scored again gives {float(now[t]):.6g} for "
            f"{float(then[t]):.6g}, and rounding makes {float(tolerance[t]):.2g} at most. Weights, "
            f"adapters, hooks or a forward of its own may have changed. {advice}"
        )


def _warn_of_unread(names: Sequence[str]) -> None:
    shown = ", ".join(names[:_MOST_NAMES]) + (" …" if len(names) > _MOST_NAMES else "")
    warn_user(
        f"{len(names)} tensors of the model cannot be read ({shown}): a model that differs only "
        "in them is detected only by scoring one row again.",
    )


def _held(module: nn.Module) -> Iterator[tuple[str, str, object]]:
    """A module's own content, without its children: kind, name and value."""
    parameters = dict(module.named_parameters(recurse=False))
    buffers = dict(module.named_buffers(recurse=False))
    yield from (("weights", name, value) for name, value in parameters.items())
    for name, value in buffers.items():
        # transformers 5.23 (2026): rotary embeddings whose base grows with the text overwrite it
        # while running, and keep the original beside it.
        yield "buffers", name, getattr(module, f"original_{name}", value)
    for name, value in _own_state(module).items():
        if name not in parameters and name not in buffers:
            yield "weights", name, value


def _own_state(module: Any) -> Mapping[str, Any]:
    """A module's extra state, as it would be saved."""
    found: dict[str, Any] = {}
    if type(module).state_dict is not nn.Module.state_dict and not any(module.children()):
        return dict(module.state_dict(destination=found, prefix="", keep_vars=True)) | found
    module._save_to_state_dict(found, "", True)
    return found


def _adapters(prefix: str, module: Any) -> dict[str, Any]:
    """The active adapters of a layer, for peft and libraries of the same structure."""
    active = getattr(module, "active_adapters", getattr(module, "active_adapter", None))
    adapters = {name: getattr(module, name, None) for name in _ADAPTERS}
    # transformers' models have methods of these names, and attention layers a scaling.
    if active is None or callable(active):
        return {}
    # A single adapter is active by name only, until another has been activated.
    adapters["active"] = [active] if isinstance(active, str) else active
    kept = {name: value for name, value in adapters.items() if not callable(value)}
    return {f"{prefix}.{name}": value for name, value in kept.items() if value is not None}


def _as_text(value: object) -> str:
    """A text that differs if the value does."""
    if isinstance(value, Tensor):
        total = _compat.summed_over_shards(value, checksum)
        return f"{value.dtype} {tuple(value.shape)} {int(total)}"
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return f"{{{', '.join(f'{key}: {_as_text(part)}' for key, part in items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_as_text(part) for part in cast(Sequence[Any], value))}]"
    return digest(value)


def _digest_of(entries: Mapping[str, str]) -> str:
    found = blake2b(digest_size=8)
    for name in sorted(entries):
        found.update(f"{name} {entries[name]}\n".encode())
    return found.hexdigest()
