"""Arrays as needed for plotting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def numbers(values: Any) -> Array:
    """The values as a float64 array of any shape."""
    if hasattr(values, "detach"):  # a tensor: numpy supports neither bfloat16 nor gradients
        values = values.detach().double().cpu()
    return np.asarray(values, dtype=np.float64)


def array(name: str, values: Any, shape: tuple[int, ...]) -> Array:
    """The values as a float64 array of the shape that the labels require."""
    array = numbers(values)
    if array.shape != shape and (array.size or math.prod(shape)):
        raise ValueError(
            f"`{name}` has shape {array.shape}, the labels ask for {shape}: give one label per "
            "row and column."
        )
    return array.reshape(shape)


def standard_errors(name: str, errors: Any, values: Array) -> Array:
    """Standard errors of the shape of the values; NaN if there are none."""
    return np.full_like(values, np.nan) if errors is None else array(name, errors, values.shape)


def output_array(values: Any, labels: Sequence[str] | None, n_target: int) -> Array:
    """Attributions to earlier output; no columns if it was held fixed."""
    if (values is None) != (labels is None):
        raise ValueError(
            "`output_attr` and `output_feature_labels` belong together: give both, or neither "
            "where the output was held fixed."
        )
    if values is None or labels is None:
        return np.zeros((n_target, 0))
    return array("output_attr", values, (n_target, len(labels)))


def open_columns(output: Array, features: Sequence[int | None] | None) -> npt.NDArray[np.intp]:
    """How many of the generated columns lie wholly before each row's token, shape (n_target,)."""
    n_target, n_output = output.shape
    if not n_output:  # held fixed: there are no columns
        return np.zeros(n_target, dtype=np.intp)
    if features is None:
        if n_target == n_output:
            return np.arange(n_target)
        last = np.where(np.nan_to_num(output, nan=1.0) != 0, np.arange(1, n_output + 1), 0)
        return np.maximum.accumulate(last.max(axis=1, initial=0))
    if len(features) != n_target:
        raise ValueError(
            f"`output_features` has {len(features)} entries for {n_target} rows: give the column "
            "of every explained token, or None."
        )
    ends = np.zeros(n_output, dtype=np.intp)  # the last token of each column
    for token, feature in enumerate(features):
        if feature is None:
            continue
        if not 0 <= feature < n_output:
            raise ValueError(
                f"`output_features` says column {feature} of token {token}, `output_attr` has "
                f"{n_output} columns: give numbers from 0, or None."
            )
        ends[feature] = token
    return (ends[None, :] < np.arange(n_target)[:, None]).sum(axis=1)


def scale(*parts: Array) -> float:
    """The largest magnitude, so that zero is the middle of the colour map."""
    known = np.concatenate([part[np.isfinite(part)] for part in parts])
    return float(np.abs(known).max(initial=0.0)) or 1.0


def notable(values: Array) -> list[int]:
    """Columns by decreasing magnitude, down to a fifth of the largest: those to label first."""
    peaks = np.abs(np.nan_to_num(np.atleast_2d(values))).max(axis=0, initial=0)
    order = np.argsort(-peaks, kind="stable")
    least = max(0.2 * float(peaks.max(initial=0)), np.finfo(float).tiny)
    return [int(column) for column in order if peaks[column] >= least]
