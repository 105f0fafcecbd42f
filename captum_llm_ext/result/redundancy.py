"""Consistency of redundant numbers in a result: finds damage in files without a digest.

Only what all versions have written identically is compared, within rounding of its dtype: an
undamaged file never fails. Most numbers, such as single values, are stored only once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Sums of floats agree within this many last digits of what they sum. Chosen, not measured.
_DIGITS = 64
_EXACT = ("torch.float32", "torch.float64")


def check_redundancy(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Checks that redundant numbers agree and that no number is impossible.

    Args:
        tensors: Tensors by the names of the result's fields, with consistent shapes.
        rest: The other content of the file, with the types of its format.

    Raises:
        ValueError: If numbers contradict each other.
    """
    _check_possible(tensors, rest)
    _check_counts(tensors, rest)
    attr, full = tensors["token_attr"], tensors["full_values"]
    if rest["provenance"].get("attr_target") != "prob":
        _check_sum("`seq_attr` is not the sum of `token_attr`", tensors["seq_attr"], attr.unbind(0))
    every = _of_features(tensors, rest)
    if every is not None:
        parts = [full, -tensors["empty_values"], *(-every).unbind(1)]
        gap = tensors["efficiency_gap"]
        _check_sum("`efficiency_gap` is not what the attributions leave", gap, parts)
    if rest["provenance"].get("dtype") in _EXACT:
        # One row, computed once.
        for row in tensors["values"][tensors["masks"].all(1)]:
            _check_sum("`full_values` are not those of the full coalition", row, [full])
    if "output_probs" in tensors:
        _check_probabilities(tensors["output_probs"], full, rest["provenance"].get("attr_target"))


def _check_probabilities(found: Tensor, full: Tensor, attr_target: object) -> None:
    # Log-odds, to which a result was refitted, belong to probabilities computed before.
    if attr_target not in ("log_prob", "prob"):
        return
    expected, sizes = full.double(), full.double()
    if attr_target == "log_prob":
        expected = full.double().exp()
        sizes = expected * (1 + full.double().abs())  # rounded before the exponential
    if _any_apart(found, expected, _within(found, [sizes])):
        raise ValueError("`output_probs` are not the probabilities that follow from `full_values`")


def _check_possible(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and bool(tensor.isinf().any()):
            raise ValueError(f"`{name}` holds an infinite number")
        is_count = name in ("target", "draws")
        if (is_count or name.endswith("_se")) and bool((tensor < 0).any()):
            raise ValueError(f"`{name}` holds a negative number")
    unseen = _unseen([piece[1] for piece in rest["output_pieces"]], rest["output_features"])
    for name in ("output_attr", "output_attr_se"):
        if name in tensors and unseen is not None and bool((tensors[name][unseen] != 0).any()):
            raise ValueError(f"`{name}` attributes to features after a token")


def _check_counts(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    for name, n in (
        ("n_coalitions", len(tensors["masks"])),
        ("n_evaluations", rest["n_evaluations"]),
    ):
        if rest["provenance"].get(name, n) != n:
            raise ValueError(f"`{name}` of `provenance` is {rest['provenance'][name]!r}, not {n}")


def _unseen(groups: Sequence[int | None], features: Sequence[str] | None) -> Tensor | None:
    """Generated features that contain the target token or a later one, bool ``(T, G)``."""
    if not groups or features is None:
        return None
    before, seen = 0, list[int]()
    for group in groups:
        seen.append(before if group is None else group)
        before = before if group is None else group + 1
    numbers = torch.arange(len(features), device="cpu")
    return numbers >= torch.tensor(seen, dtype=torch.int64, device="cpu")[:, None]


def _of_features(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Tensor | None:
    """Attributions ``(T, n_features)``; None if it is unknown which columns share a feature."""
    attr, output = tensors["token_attr"], tensors.get("output_attr")
    design = rest.get("design") or {}
    columns = design.get("columns", rest["provenance"].get("columns"))
    if columns is None:
        n_output = 0 if output is None else output.shape[1]
        if attr.shape[1] + n_output != tensors["masks"].shape[1]:
            return None
        columns = range(attr.shape[1])
    first = [*{feature: i for i, feature in reversed([*enumerate(columns)])}.values()]
    own = attr[:, torch.tensor(first, dtype=torch.int64, device="cpu")]
    return own if output is None else torch.cat([own, output], dim=1)


def _check_sum(otherwise: str, found: Tensor, parts: Sequence[Tensor]) -> None:
    """Raises a ValueError if something is not the sum of its parts."""
    total = torch.stack([part.double() for part in parts]).sum(0)
    if _any_apart(found, total, _within(found, parts)):
        raise ValueError(otherwise)


def _within(found: Tensor, parts: Sequence[Tensor]) -> Tensor:
    size = torch.stack([part.double().abs() for part in parts]).sum(0)
    dtypes = {found.dtype, *(part.dtype for part in parts)}
    info = [torch.finfo(dtype) for dtype in dtypes]
    digit, tiny = max(one.eps for one in info), max(one.tiny for one in info)
    return _DIGITS * (digit * size + tiny)


def _any_apart(one: Tensor, other: Tensor, within: Tensor) -> bool:
    one, other = one.double(), other.double()
    apart = (one - other).abs() > within.nan_to_num(nan=0.0)
    return bool((apart | (one.isnan() != other.isnan())).any())
