"""Captum's methods: settings without public names."""

import inspect
from typing import Any

from captum.attr import Lime


def lime_settings(method: Lime) -> dict[str, Any] | None:
    """Penalty, its weight and the kernel's width of a `Lime`, or None if it is not standard.

    captum 0.9 (2026) keeps them in the constructor arguments of its scikit-learn wrappers and in
    the closure of its kernel; scikit-learn is not needed to read them.
    """
    standard = Lime(method.forward_func)
    penalties = {"SkLearnLasso": "l1", "SkLearnRidge": "l2", "SkLearnLinearRegression": None}
    model: Any = method.interpretable_model
    arguments = dict(getattr(model, "construct_kwargs", {}))
    alpha = arguments.pop("alpha", 1.0)
    name = type(model).__name__
    kernel: Any = method.similarity_func
    if (
        name not in penalties
        or arguments
        or getattr(kernel, "__qualname__", "") != standard.similarity_func.__qualname__
        or method.perturb_func is not standard.perturb_func
    ):
        return None
    settings = inspect.getclosurevars(kernel).nonlocals
    if settings.get("distance_mode") != "cosine":
        return None
    width = float(settings["kernel_width"])
    return {"penalty": penalties[name], "alpha": float(alpha), "kernel_width": width}


def integration_rules() -> tuple[str, ...]:
    """Names of captum's integration rules."""
    from captum.attr._utils import approximation_methods

    return tuple(approximation_methods.SUPPORTED_METHODS)


def integration_points(rule: str, n_steps: int) -> tuple[list[float], list[float]]:
    """Points in [0, 1] and weights of one of captum's quadrature rules.

    captum 0.9 (2026): `approximation_parameters` is not public.
    """
    from captum.attr._utils.approximation_methods import approximation_parameters

    weights, points = approximation_parameters(rule)
    return list(points(n_steps)), list(weights(n_steps))


def selected(output: Any, target: Any) -> Any:
    """The outputs that captum's `target` argument selects.

    captum 0.9 (2026): `_select_targets` is not public.
    """
    from captum._utils.common import _select_targets  # pyright: ignore[reportPrivateUsage]

    return _select_targets(output, target)
