"""Exports of a result: plain data, JSON, HTML page, pandas, shap."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from captum_llm_ext.base import files
from captum_llm_ext.base.finite import finite
from captum_llm_ext.base.terminal import one_line
from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.result.causes import joined_name
from captum_llm_ext.result.descriptions import (
    answer_as_data,
    descriptions,
    part_sums,
    reading_aids,
)
from captum_llm_ext.result.foils import other_value
from captum_llm_ext.result.levels import page_levels
from captum_llm_ext.result.plots import DrawnResult
from captum_llm_ext.result.reading import finest_level
from captum_llm_ext.result.shares import share_errors, totals
from captum_llm_ext.result.summed_errors import summed_error_bounds, summed_errors
from captum_llm_ext.text.inputs import Piece

if TYPE_CHECKING:
    from torch import Tensor


_DICT_FORMAT = 1
_INSTALL = "`{method}` needs {package}: pip install 'captum-llm-ext[{package}]'."
# Numbers that change with the kind of value.
_OF_ONE_VALUE = (
    "attr_target token_attr token_attr_se output_attr output_attr_se full_values empty_values"
).split()
_TOLD_OF_IT = ("about", "marked_beyond", "answer")
# Share of full - empty that attributions may miss and still be called a sum; chosen, not measured.
_UNEXPLAINED = 0.01


class ExportedResult(DrawnResult):
    """Conversions of a result for other tools."""

    def to_html(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        title: str | None = None,
        counterfactuals: Iterable[Any] = (),
    ) -> str:
        """One self-contained HTML page: text, attributions on hover, no network access.

        Args:
            path: File to write, if any.
            title: Title of the page.
            counterfactuals: Counterfactuals of the same input and target, from
                `GenerationAttribution.counterfactuals`, or their ``to_dict()``. An iterator is
                exhausted.

        Returns:
            The page.

        Raises:
            ValueError: If a counterfactual is about another answer.
        """
        from captum_llm_ext.result import page as html

        entries = [one if isinstance(one, Mapping) else one.to_dict() for one in counterfactuals]
        page = html.page(self._shown() | {"counterfactuals": entries}, title=title)
        if path is not None:
            files.write(path, page)
        return page

    def _repr_html_(self) -> str:
        from captum_llm_ext.result import page as html

        whole = cast(Any, self)
        return html.fragment(self._shown(), whole.table())

    def _shown(self) -> dict[str, Any]:
        whole = cast(Any, self)
        read = page_levels(whole) | reading_aids(whole)
        n_prompt = len(self.input_tokens)
        read["column_features"] = list(whole.column_features[:n_prompt])
        read["total"] = _totals(whole, read["levels"])
        other = other_value(whole)
        if other is not None:
            found = other.to_dict()
            read["other"] = {name: found[name] for name in (*_OF_ONE_VALUE, *_TOLD_OF_IT)}
            read["other"] |= {"sums": other._sums(read), "noise_floor": None}
            read["other"] |= {"total": _totals(other, read["levels"])}
        return {**self.to_dict(), **read, "sums": self._sums(read)}

    def _sums(self, read: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Standard errors of the sums on a page, if known."""
        if self._is_of_gradients:
            errors, n_prompt = self.full_attr_se, len(self.input_tokens)
            is_sum = self.provenance.get("attr_target") != "prob"
            return summed_error_bounds(errors, n_prompt, read["output_levels"]) if is_sum else []
        if self.design is None or self.provenance.get("attr_target") == "prob":
            return []
        evidence, levels = self._evidence(), (read["levels"], read["output_levels"])
        pieces = self.output_pieces or [Piece("", None)] * len(self.output_tokens)
        n_prompt = len(self.input_tokens)
        found = summed_errors(
            evidence, self._features, n_prompt, pieces, *levels, self.full_attr_se
        )
        known = {(entry["side"], entry["level"]) for entry in found}
        whole = cast(Any, self)
        return found + [e for e in part_sums(whole) if (e["side"], e["level"]) not in known]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the coalitions, as values that JSON can hold."""
        return {
            "format": _DICT_FORMAT,
            "prompt": [p.to_dict() for p in self.prompt_pieces],
            "output": [p.to_dict() for p in self.output_pieces],
            "target": self.target.tolist(),
            "input_tokens": list(self.input_tokens),
            "output_tokens": list(self.output_tokens),
            "output_features": self.output_features,
            "token_attr": lists(self.token_attr),
            "token_attr_se": lists(self.token_attr_se),
            "output_attr": lists(self.output_attr),
            "output_attr_se": lists(self.output_attr_se),
            "seq_attr": lists(self.seq_attr),
            "output_probs": lists(self.output_probs),
            "full_values": lists(self.full_values),
            "empty_values": lists(self.empty_values),
            "efficiency_gap": lists(self.efficiency_gap),
            "levels": [
                {"name": level.name, "parts": level.parts, "part_of": level.part_of}
                for level in self.levels
            ],
            "n_evaluations": self.n_evaluations,
            "attr_target": self.provenance.get("attr_target", "log_prob"),
            "method": self.provenance.get("method", ""),
            "estimate": bool(self.provenance.get("estimate", False)),
            "errors_unknown": int(self.errors_unknown.sum()),
            "foils": self.foil_tokens,
            "is_unsigned": self.is_unsigned,
            "fixed_share": None if self.fixed_share is None else lists(self.fixed_share),
            "provenance": self.provenance,
            **descriptions(self),
        }

    def to_json(
        self, path: str | os.PathLike[str] | None = None, *, indent: int | None = None
    ) -> str:
        """The content of `to_dict` as JSON: all numbers, but not the coalitions.

        `save` and `load` keep the coalitions as well.

        Args:
            path: File to write in UTF-8, if any.
            indent: Spaces per level; None: all on one line.

        Returns:
            The JSON. Non-finite numbers become null.
        """
        text = json.dumps(
            finite(self.to_dict()), ensure_ascii=False, allow_nan=False, indent=indent
        )
        if path is not None:
            files.write(path, text + "\n")
        return text

    def to_dataframe(self, layout: Literal["long", "wide", "answer"] = "long") -> Any:
        """The attributions as a ``pandas.DataFrame``.

        Args:
            layout: ``"answer"``: a row per largest part of the prompt, with its attribution for the
                whole answer (`answer`): ``level``, ``part``, ``attribution``, ``standard_error``
                and ``marked``; no rows if there is none. ``"long"``: a row for every target token
                and possible cause, with the columns ``position`` and ``token`` (of the target),
                ``source`` (``"prompt"`` or ``"output"``), ``column`` (of `full_attr`), ``feature``,
                ``attribution`` and ``standard_error``, ``marked`` (whether it is significant), and
                the unique ``token_name`` and ``feature_name``. ``"wide"``: a row per target token,
                a column per feature, named by source, column and feature, as `full_attr`.

        Returns:
            The frame. Later output, which cannot be a cause, is omitted in the long layout and 0 in
            the wide one.

        Raises:
            ImportError: If pandas is not installed.
            ValueError: If there is no such layout.
        """
        if layout not in ("long", "wide", "answer"):
            raise ValueError(f"`layout` is {layout!r}: give 'long', 'wide' or 'answer'.")
        try:
            import pandas as pd
        except ImportError as error:
            hint = _INSTALL.format(method="to_dataframe", package="pandas")
            raise ImportError(hint) from error
        if layout == "answer":
            answer = answer_as_data(cast(Any, self))
            parts = [] if answer is None else answer["parts"]
            names = ["part", "attribution", "standard_error", "marked"]
            frame = pd.DataFrame([[part[name] for name in names] for part in parts], columns=names)
            frame.insert(0, "level", None if answer is None else answer["level"])
            return frame
        n_prompt, n_columns = len(self.input_tokens), len(self._column_names)
        attr = self.full_attr.detach().cpu()
        source = ["prompt"] * n_prompt + ["output"] * (n_columns - n_prompt)
        if layout == "wide":
            positions = range(len(self.output_tokens))
            return pd.DataFrame(
                attr.numpy(),
                index=pd.MultiIndex.from_arrays(
                    [positions, self.output_tokens], names=["position", "token"]
                ),
                columns=pd.MultiIndex.from_arrays(
                    [source, range(n_columns), self._column_names],
                    names=["source", "column", "feature"],
                ),
            )
        rows, columns = self._possible_causes().nonzero(as_tuple=True)
        shown = self.names
        named = [name.strip() or name for name in (*shown.prompt, *shown.output)]
        return pd.DataFrame(
            {
                "position": rows.numpy(),
                "token": [self.output_tokens[row] for row in rows.tolist()],
                "source": [source[column] for column in columns.tolist()],
                "column": columns.numpy(),
                "feature": [self._column_names[column] for column in columns.tolist()],
                "attribution": attr[rows, columns].numpy(),
                "standard_error": self.full_attr_se.detach().cpu()[rows, columns].numpy(),
                "marked": self.marked.cpu()[rows, columns].numpy(),
                "token_name": [shown.tokens[row] for row in rows.tolist()],
                "feature_name": [named[column] for column in columns.tolist()],
            }
        )

    def to_shap(self) -> Any:
        """The result as a ``shap.Explanation``, for shap's plots.

        ``shap.plots.text(e)`` shows the answer token by token, ``shap.plots.waterfall(e[:, t])``,
        ``shap.plots.bar(e[:, t])`` and others one target token. Features include earlier output;
        columns of one feature (captum's groups) are merged.

        Returns:
            Values ``(n_features, n_target)`` with their standard errors as ``error_std``, the empty
            values as ``base_values`` ``(n_target,)``, the features' text as ``data``.

        Raises:
            ImportError: If shap is not installed.
        """
        try:
            import shap
        except ImportError as error:
            hint = _INSTALL.format(method="to_shap", package="shap")
            raise ImportError(hint) from error
        features = list(range(len(self._column_names))) if self.design is None else self._features
        columns: dict[int, list[int]] = {}
        for column, feature in enumerate(features):
            columns.setdefault(feature, []).append(column)
        chosen = [members[0] for members in columns.values()]
        attr, errors = (
            tensor.detach().cpu().double()[:, chosen].T.contiguous()
            for tensor in (self.full_attr, self.full_attr_se)
        )
        full, empty = (v.detach().cpu().double() for v in (self.full_values, self.empty_values))
        missing = (full - empty - attr.sum(0)).abs()
        if bool((missing > _UNEXPLAINED * (full - empty).abs().max()).any()):
            warn_user(
                f"the attributions of {self.provenance.get('method', 'this method')} do not sum "
                f"to full_values - empty_values (off by up to {float(missing.max()):.3g}), which "
                "shap's plots assume: what they show as f(x) is base value plus sum.",
            )
        n_prompt = len(self.input_tokens)
        texts = self._column_texts()
        names = [
            one_line(joined_name([self._column_names[c] for c in members]).strip())
            + " (output)" * (members[0] >= n_prompt)
            for members in columns.values()
        ]
        import numpy as np

        return shap.Explanation(
            values=attr.numpy(),
            base_values=empty.numpy(),
            data=np.array(["".join(texts[c] for c in m) for m in columns.values()], dtype=object),
            feature_names=names,
            output_names=[one_line(name) for name in self.output_tokens],
            error_std=errors.numpy(),
        )

    def _possible_causes(self) -> "Tensor":
        """Which columns come before a target token, bool ``(n_target, n_columns)``."""
        n_target, n_prompt = len(self.output_tokens), len(self.input_tokens)
        possible = torch.ones(n_target, len(self._column_names), dtype=torch.bool, device="cpu")
        pieces = self.output_pieces or [Piece("", i) for i in range(n_target)]
        last = {piece.feature: t for t, piece in enumerate(pieces) if piece.feature is not None}
        for feature, t in last.items():
            if n_prompt + feature < possible.shape[1]:
                possible[: t + 1, n_prompt + feature] = False
        return possible

    def _column_texts(self) -> list[str]:
        """The text of each column, white space included; its name if the text is unknown."""
        n_prompt, texts = len(self.input_tokens), [""] * len(self._column_names)
        shown: list[tuple[int, Sequence[Piece]]] = [
            (0, self.prompt_pieces),
            (n_prompt, self.output_pieces),
        ]
        for first, pieces in shown:
            for piece in pieces:
                if piece.feature is not None:
                    texts[first + piece.feature] += piece.text
        return [text or name for text, name in zip(texts, self._column_names, strict=True)]


def _totals(result: Any, levels: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Edges of causal chains at every prompt level, with standard errors of shares; or None."""
    names = [finest_level(result), *(level["name"] for level in levels)]
    found = totals(result, names)
    return {
        name: one.links() | {"errors": share_errors(result, one)} for name, one in found.items()
    } or None


def lists(tensor: "Tensor | None") -> Any:
    """Nested lists, with None for non-finite numbers, since JSON has no NaN."""
    if tensor is None:
        return None
    if tensor.dim() > 1:
        return [lists(row) for row in tensor]
    return [
        value if finite else None
        for value, finite in zip(tensor.tolist(), tensor.isfinite().tolist(), strict=True)
    ]
