"""A captum forward function over tensors as a game: coalitions of features in, outputs out."""

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from captum._utils.common import (
    _expand_additional_forward_args,  # pyright: ignore[reportPrivateUsage]
    _expand_target,  # pyright: ignore[reportPrivateUsage]
    _format_additional_forward_args,  # pyright: ignore[reportPrivateUsage]
    _format_feature_mask,  # pyright: ignore[reportPrivateUsage]
    _run_forward,  # pyright: ignore[reportPrivateUsage]
)
from captum.attr._utils.common import (
    _format_input_baseline,  # pyright: ignore[reportPrivateUsage]
)
from torch import Tensor

from captum_llm_ext.coalitions import Plan, Scope, Solution, join_plans, plan_anchors

Tensors = Tensor | tuple[Tensor, ...]
Score = Callable[[Plan], Tensor]


class TensorGame:
    """Switches elements of the inputs between their own value and the baseline's.

    Args:
        forward: A forward function as in captum: returns ``(batch, …)``, or one value for all rows.
        inputs: One tensor or a tuple, the batch first.
        baselines: A number or a tensor, or a tuple of them. None: 0.
        target: The output to explain, as in captum.
        additional_forward_args: As in captum.
        feature_mask: Elements with equal numbers form one feature. None: every element is a
            feature.
        perturbations_per_eval: Coalitions per call of the forward function.
        show_progress: Whether to show a bar over the calls.

    Attributes:
        features: The numbers of `feature_mask`, ascending: column j of masks is the j-th.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        inputs: Tensors,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Tensors | None = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> None:
        if not isinstance(perturbations_per_eval, int) or perturbations_per_eval < 1:
            raise ValueError(
                f"`perturbations_per_eval` is {perturbations_per_eval!r}: give an integer of at "
                "least 1."
            )
        self._forward, self._target, self._show_progress = forward, target, show_progress
        self._is_tuple = isinstance(inputs, tuple)
        self._inputs, given = _format_input_baseline(cast(Any, inputs), baselines)
        self._baselines = [
            torch.as_tensor(b, dtype=x.dtype, device=x.device)
            for b, x in zip(given, self._inputs, strict=True)
        ]
        self._arguments = _format_additional_forward_args(additional_forward_args)
        masks = _format_feature_mask(cast(Any, feature_mask), self._inputs)
        numbers, places = torch.cat([m.flatten().cpu() for m in masks]).unique(return_inverse=True)
        self.features: list[int] = numbers.tolist()
        columns = places.split([m.numel() for m in masks])
        self._columns = [c.view(m.shape) for c, m in zip(columns, masks, strict=True)]
        self._batch_size = perturbations_per_eval
        self._known: dict[bytes, Tensor] = {}
        first = self._run(torch.ones(1, len(self.features), dtype=torch.bool, device="cpu"))
        self._shape = first.shape if first.dim() else torch.Size([1])
        self._dtype = first.dtype if first.is_floating_point() else torch.float32
        self._check_batches()

    def attribute(
        self,
        run: Callable[[Score, Scope], tuple[Plan, Tensor]],
        solve: Callable[[Plan, Tensor, Scope], Solution],
    ) -> Tensors:
        """Attributions to every element of the inputs.

        Args:
            run: Takes a scoring function and the scope of each output; returns a plan and its
                values.
            solve: Attributions from the anchors followed by that plan, and the values of both.

        Returns:
            One tensor or a tuple, as the inputs. Shapes are the inputs' if the forward function
            returns one value per row, as in captum; otherwise the shape of its output replaces the
            batch.
        """
        anchors = plan_anchors(len(self.features))
        ends = self.values(anchors)
        scope = Scope.of_all(ends.shape[1], len(self.features))
        plan, values = run(self.values, scope)
        solution = solve(join_plans([anchors, plan]), torch.cat([ends, values]), scope)
        return self._at_elements(solution.attributions)

    def values(self, plan: Plan) -> Tensor:
        """Outputs ``(n_coalitions, n_outputs)``, float64 on the CPU; each coalition is run once."""
        keys = [mask.numpy().tobytes() for mask in plan.masks]
        todo = {k: mask for k, mask in zip(keys, plan.masks, strict=True) if k not in self._known}
        waiting = list(todo)
        for start in self._with_progress(range(0, len(waiting), self._batch_size)):
            batch = waiting[start : start + self._batch_size]
            output = self._run(torch.stack([todo[key] for key in batch]))
            if output.numel() != len(batch) * self._shape.numel():
                raise ValueError(
                    f"the forward returned shape {tuple(output.shape)} for {len(batch)} "
                    f"coalitions, and {tuple(self._shape)} for one: give `perturbations_per_eval=1`"
                    " if it returns one value for all rows of a batch."
                )
            rows = output.detach().cpu().double().reshape(len(batch), -1)
            self._known.update(zip(batch, rows, strict=True))
        return torch.stack([self._known[key] for key in keys])

    def _at_elements(self, found: Tensor) -> Tensors:
        """Attributions ``(n_outputs, n_features)`` copied to every element of the inputs."""
        spread = tuple(
            self._scatter(found, columns).to(x.device, self._dtype)
            for columns, x in zip(self._columns, self._inputs, strict=True)
        )
        return spread if self._is_tuple else spread[0]

    def _scatter(self, found: Tensor, columns: Tensor) -> Tensor:
        shape = (*self._shape, *columns.shape[1:])
        if len(columns) == 1:
            return found[:, columns.flatten()].reshape(shape)
        per_row = found.view(len(columns), -1, found.shape[1])
        index = columns.flatten(1)[:, None].expand(-1, per_row.shape[1], -1)
        return per_row.gather(2, index).reshape(shape)

    def _run(self, masks: Tensor) -> Tensor:
        """The forward function's output for coalitions ``(n, n_features)``, batch by batch."""
        n = len(masks)
        inputs = tuple(
            torch.where(masks[:, columns].to(x.device), x, baseline).flatten(0, 1)
            for x, baseline, columns in zip(
                self._inputs, self._baselines, self._columns, strict=True
            )
        )
        arguments = _expand_additional_forward_args(self._arguments, n)
        with torch.no_grad():
            output = _run_forward(self._forward, inputs, _expand_target(self._target, n), arguments)
        return (
            output
            if isinstance(output, Tensor)
            else torch.tensor(output, dtype=torch.float32, device="cpu")
        )

    def _check_batches(self) -> None:
        n_rows = len(self._inputs[0])
        if len(self._shape) and self._shape[0] == n_rows:
            return
        if self._batch_size > 1:
            raise ValueError(
                f"the forward returns shape {tuple(self._shape)} for {n_rows} rows, not a value "
                "for each: give `perturbations_per_eval=1`."
            )
        if any(len(columns) > 1 for columns in self._columns):
            raise ValueError(
                f"the forward returns shape {tuple(self._shape)} for {n_rows} rows, not a value "
                "for each: give a `feature_mask` of batch size 1."
            )

    def _with_progress(self, batches: range) -> Any:
        if not self._show_progress:
            return batches
        from tqdm.auto import tqdm  # a dependency of captum

        return tqdm(batches, desc="forward calls", file=sys.stderr)
