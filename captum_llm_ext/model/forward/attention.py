"""Attention of many rows to shared keys and to their own, each with its own softmax.

The two are merged by their log-sum-exps: with ``l`` that of all scores, the weights are
``exp(l_shared - l)`` and ``exp(l_own - l)``. The shared keys are read in place, without a copy per
row. `merged_attention` is for a batch of rows with one common prefix, `packed_attention` for rows
in one sequence (see `packing`). Supports grouped heads, windows, soft caps, sinks and values of
another size than keys; anything else that a model requests raises an error.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.forward.packing import Pack, Segment, ends
from captum_llm_ext.model.forward.prefix_cache import shared_with
from captum_llm_ext.model.forward.stacking import Stack, stacks

# Which keys are visible: by a mask, or a bias, with which every query sees some of them; or those
# at the queries' own positions up to each.
_Seen = Tensor | Literal["before"] | None

_NAME = "captum_llm_ext_merged"
_PACKED = "captum_llm_ext_packed"
_SIDES = "_captum_llm_ext_sides"
# Maximum number of scores in memory if no kernel avoids them. Chosen, not measured.
_MOST_SCORES = 2**25
# Up to this many queries, masking is cheaper than merging two softmaxes. Chosen, not measured.
_SHORT = 256
# Arguments of models that do not affect scores, or are part of the mask already.
_HARMLESS = frozenset(
    "sliding_window position_ids cache_position output_attentions use_cache cache past_key_values "
    "output_hidden_states return_dict output_router_logits layer_idx labels logits_to_keep "
    "input_ids num_items_in_batch cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k".split()
)
_KNOWN = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")


@contextmanager
def merged_attention(model: nn.Module) -> Generator[None]:
    """Makes the model attend like this; its configuration and the registry are restored.

    Raises:
        NotImplementedError: If the model's attention is unknown, or compiled.
    """
    attend = partial(_attend, _attend_shared)
    with _compat.attention_of(model, _NAME, attend, _mask, _KNOWN):
        yield


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **arguments: Any,
) -> Tensor:
    """The visible keys, ``(1, 1, q_length, kv_length)``; equal in all rows, without padding."""
    if attention_mask is not None:
        raise NotImplementedError("an attention mask")
    arguments["allow_is_causal_skip"] = arguments["allow_is_bidirectional_skip"] = False
    return _compat.boolean_mask(1, q_length, kv_length, q_offset, kv_offset, **arguments)


class _Scores(NamedTuple):
    """How queries and keys are scored.

    Attributes:
        scale: Factor of the products.
        softcap: Bound of the scores, if any.
        sink: A score per head without a value.
    """

    scale: float
    softcap: float | None
    sink: Tensor | None


def _attend(
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, _Scores], Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; ``(batch, heads, length, size)`` each.

    Raises:
        NotImplementedError: If something unsupported is requested.
    """
    unknown = [name for name, given in others.items() if given is not None]
    unknown = [name for name in unknown if name not in _HARMLESS]
    if unknown or dropout or is_causal is False or getattr(module, "is_causal", True) is False:
        raise NotImplementedError(f"attention with {unknown or 'dropout, or that sees ahead'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    found = attention(query, key, value, attention_mask, _Scores(scale, softcap, s_aux))
    return found.to(query.dtype).transpose(1, 2).contiguous(), None


def _attend_shared(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: _Scores
) -> Tensor:
    if mask is None or mask.dtype != torch.bool:
        raise NotImplementedError("attention without a causal mask")
    if mask.shape[:2] != (1, 1):
        raise NotImplementedError("a mask for each row or head")
    shared = shared_with(key)
    n_shared = 0 if shared is None else shared.keys.shape[-2]
    if mask.shape[-1] != n_shared + key.shape[-2]:
        # Keys that were transformed on the way have lost their link to the shared ones.
        raise NotImplementedError("keys other than those of the cache")
    seen_of_shared, seen_of_own = _sides(mask, n_shared)
    parts = [_part(query, key, value, seen_of_own, scores)]
    if shared is not None:
        shared.was_used = True
        parts.append(_part(query, shared.keys, shared.values, seen_of_shared, scores))
    return _merged(parts, scores.sink)


@dataclass
class Packing:
    """State of one pass over a pack.

    Attributes:
        pack: The rows.
        n_layers: Number of attention layers.
        last: The segments as far as the last layer needs them.
        n_attended: Number of layers that have attended so far.
    """

    pack: Pack
    n_layers: int | None
    last: Sequence[Segment]
    n_attended: int = 0
    _kinds: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    _stacks: dict[tuple[int, ...], list[Stack]] = field(
        default_factory=dict[tuple[int, ...], list[Stack]]
    )
    _sides: dict[tuple[int, ...], tuple[_Seen, _Seen]] = field(
        default_factory=dict[tuple[int, ...], tuple[_Seen, _Seen]]
    )

    def is_before(self) -> bool:
        """Whether no layer has attended yet."""
        return self.n_attended == 0

    def is_through(self) -> bool:
        """Whether all layers have attended."""
        return self.n_attended == self.n_layers

    def mask(
        self, attention_mask: Tensor | None = None, device: Any = "cpu", **arguments: Any
    ) -> Tensor:
        """A placeholder for the mask of a kind of layers, which is computed later.

        Raises:
            NotImplementedError: If some tokens of the sequence are padding.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise NotImplementedError("an attention mask")
        arguments["allow_is_causal_skip"] = arguments["allow_is_bidirectional_skip"] = False
        for name in ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset"):
            arguments.pop(name, None)
        self._kinds.append(arguments | {"device": device})
        return torch.full((1, 1, 1, 1), len(self._kinds) - 1, dtype=torch.int64, device=device)

    @property
    def segments(self) -> Sequence[Segment]:
        """The segments needed by the current layer."""
        return self.last if self.is_through() else self.pack.segments

    def stacks(self, kind: int, n_gone: int, like: Tensor, per_group: int) -> list[Stack]:
        """The short segments, stacked.

        Args:
            kind: Index of the placeholder from `mask`.
            n_gone: Number of first ids that the state no longer holds.
            like: Dtype and device of biases.
            per_group: Heads per group of equal keys, whose queries are concatenated.
        """
        key = (kind, n_gone, per_group, int(self.is_through()))
        if key not in self._stacks:
            short = [one for one in self.segments if one.stop - one.start <= _SHORT]

            def seen(n_queries: int, n_keys: int, depth: int) -> Tensor:
                sizes = 1, n_queries, n_keys, depth, n_gone
                return _compat.boolean_mask(*sizes, **self._kinds[kind])[0, 0]

            found = stacks(short, self.pack.n_read, n_gone, seen, like)
            self._stacks[key] = [
                replace(one, bias=one.bias.repeat(1, 1, per_group, 1)) for one in found
            ]
        return self._stacks[key]

    def sides(self, kind: int, segment: Segment, n_gone: int) -> tuple[_Seen, _Seen]:
        """What a segment sees of its path, and of itself."""
        key = (kind, segment.stop - segment.start, segment.depth, n_gone)
        if key not in self._sides:
            whole = self._seen(kind, segment, n_gone)
            before = segment.depth - n_gone
            path, own = whole[..., :before], whole[..., before:]
            is_plain = torch.equal(own[0, 0], torch.ones_like(own[0, 0]).tril())
            seen_of_path = None if bool(path.all()) else path
            self._sides[key] = seen_of_path, "before" if is_plain else own
        return self._sides[key]

    def _seen(self, kind: int, segment: Segment, n_gone: int) -> Tensor:
        length = segment.stop - segment.start
        kv_length = segment.depth - n_gone + length
        return _compat.boolean_mask(
            1, length, kv_length, segment.depth, n_gone, **self._kinds[kind]
        )


@contextmanager
def packed_attention(model: nn.Module, pack: Pack, needed: Tensor) -> Generator[Packing]:
    """Makes every token of a pack see only those of its own row.

    Args:
        model: The model, whose configuration and registries are restored.
        pack: The pack, for a single pass within.
        needed: Sorted positions of the requested tokens: the last layer's attention of others is 0
            if there are many of them.

    Raises:
        NotImplementedError: If the model's attention is unknown, or compiled.
    """
    packing = Packing(pack, _compat.number_of_layers(model), ends(pack, needed))
    attend = partial(_attend, partial(_attend_packed, packing))
    with _compat.attention_of(model, _PACKED, attend, packing.mask, _KNOWN):
        yield packing


def _attend_packed(
    packing: Packing,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scores: _Scores,
) -> Tensor:
    if mask is None or mask.shape != (1, 1, 1, 1):
        raise NotImplementedError("attention without a causal mask")
    pack, n_kept = packing.pack, key.shape[2] - query.shape[2]
    n_gone = pack.n_read - n_kept
    if n_kept < 0 or n_gone < 0 or query.shape[2] != len(pack.ids) or len(query) != 1:
        raise NotImplementedError("keys other than those of the cache")
    packing.n_attended += 1
    kind, (heads, groups) = int(mask), (query.shape[1], key.shape[1])
    # In the order in which it is needed, to avoid a copy.
    found = query.new_zeros(query.shape[2], heads, value.shape[-1])
    for stack in packing.stacks(kind, n_gone, query, heads // groups):
        own, places = stack.own
        found[places] = _attend_stacked(stack, query, key, value, scores).flatten(0, 1)[own]
    found = found[None].transpose(1, 2)
    for segment in packing.segments:
        if segment.stop - segment.start <= _SHORT:
            continue
        here = slice(segment.start - pack.n_read, segment.stop - pack.n_read)
        own = (segment.start - n_gone, segment.stop - n_gone)
        path = [(max(0, start - n_gone), stop - n_gone) for start, stop in segment.path]
        path = [(start, stop) for start, stop in path if stop > start]
        of_path, of_own = packing.sides(kind, segment, n_gone)
        keys, values = _along(key, [own]), _along(value, [own])
        parts = [_part(query[:, :, here], keys, values, of_own, scores)]
        if path:
            keys, values = _along(key, path), _along(value, path)
            parts.append(_part(query[:, :, here], keys, values, of_path, scores))
        found[:, :, here] = _merged(parts, scores.sink)
    return found


def _attend_stacked(
    stack: Stack, query: Tensor, key: Tensor, value: Tensor, scores: _Scores
) -> Tensor:
    """Attention of the queries of a stack, ``(n_segments, length, heads, size)``."""
    queries, keys, values = (
        x[0].transpose(0, 1)[places].transpose(1, 2)
        for x, places in ((query, stack.queries), (key, stack.keys), (value, stack.keys))
    )
    part = _part(queries, keys, values, stack.bias, scores)
    return _merged([part], scores.sink).transpose(1, 2).to(query.dtype)


def _along(x: Tensor, path: Sequence[tuple[int, int]]) -> Tensor:
    """Entries at positions of a sequence, ``(1, heads, n, size)``."""
    pieces = [x[:, :, start:stop] for start, stop in path]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def _merged(parts: Sequence[tuple[Tensor, Tensor]], sink: Tensor | None) -> Tensor:
    """Attention to all keys, merged from parts of the keys, ``(batch, heads, length, size)``.

    Args:
        parts: Attention, and log-sum-exps ``(batch, heads, length)``; one part or two.
        sink: A score per head without a value.
    """
    found, total = parts[0]
    for other, size in parts[1:]:
        found = found.lerp(other, (size - total).sigmoid()[..., None])
        total = torch.logaddexp(total, size)
    if sink is not None:
        both = torch.logaddexp(total, sink.to(total).view(1, -1, 1))
        found = found * (total - both).exp()[..., None]
    return found


def _part(
    query: Tensor, key: Tensor, value: Tensor, seen: _Seen, scores: _Scores
) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys, and the log-sum-exp ``(batch, heads, length)`` of the scores.

    Args:
        query: ``(batch, heads, length, size)``.
        key, value: ``(batch or 1, groups, n, …)``.
        seen: bool or a bias, ``(1, 1, length, n)``, or per batch entry a bias repeated for the
            heads of a group; None: everything; "before": as many keys as queries, causal.
        scores: How scores are computed, without the sink.

    Returns:
        Both in float32 at least; 0 and minus infinity if nothing is visible.
    """
    scale, softcap = scores.scale, scores.softcap
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    per_group = heads // groups
    if isinstance(seen, str):
        if not softcap and query.device.type == "cpu":  # half of the scores are not computed
            if per_group > 1:
                key, value = (x.repeat_interleave(per_group, 1) for x in (key, value))
            return _on_cpu(query, key, value, seen, scale)
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    # The heads of a group become additional queries; with one set of keys, so do the rows.
    folded = query.view(batch, groups, per_group, length, size)
    together = seen is None and len(key) == 1
    if together:
        folded = folded.permute(1, 2, 0, 3, 4).reshape(1, groups, -1, size)
    else:
        folded = folded.reshape(batch, groups, -1, size)
        key, value = key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
    if seen is not None and seen.shape[2] != folded.shape[2]:
        seen = seen.repeat(1, 1, per_group, 1)
    kernel = None if softcap else _kernel(folded, key)
    if kernel is not None:
        found, total = kernel(folded, key, value, seen, scale)
    else:
        found, total = _by_hand(folded, key, value, seen, scale, softcap)
    if seen is not None and seen.dtype == torch.bool:
        blind = ~seen.any(-1)
        total = total.masked_fill(blind, -torch.inf)
        found = found.masked_fill(blind[..., None], 0.0)
    if together:
        found = found.view(groups, per_group, batch, length, -1).permute(2, 0, 1, 3, 4)
        total = total.view(groups, per_group, batch, length).permute(2, 0, 1, 3)
    return found.reshape(batch, heads, length, -1), total.reshape(batch, heads, length)


def _sides(mask: Tensor, n_shared: int) -> list[Tensor | None]:
    """The visible shared keys and own keys; None if all are.

    Computed once per mask, which all layers of a kind share.
    """
    known: dict[int, list[Tensor | None]] = getattr(mask, _SIDES, {})
    setattr(mask, _SIDES, known)
    if n_shared not in known:
        sides = mask[..., :n_shared], mask[..., n_shared:]
        known[n_shared] = [None if bool(side.all()) else side for side in sides]
    return known[n_shared]


def _kernel(query: Tensor, key: Tensor) -> Any:
    """torch's kernel that also returns log-sum-exps, or None."""
    if query.device.type == "cpu":
        n_scores = query.numel() // query.shape[-1] * key.shape[-2]
        is_coarse = query.dtype == torch.bfloat16 and n_scores <= _MOST_SCORES
        return _products if is_coarse else _on_cpu
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        return _on_cuda
    return None


def _on_cpu(
    query: Tensor, key: Tensor, value: Tensor, seen: _Seen, scale: float
) -> tuple[Tensor, Tensor]:
    size, out = query.shape[-1], value.shape[-1]
    if out != size:  # zero padding changes neither scores nor sums
        wide = max(size, out)
        query, key, value = (
            nn.functional.pad(x, (0, wide - x.shape[-1])) for x in (query, key, value)
        )
    bias = None
    if isinstance(seen, Tensor) and seen.is_floating_point():
        bias = seen
    elif isinstance(seen, Tensor):
        bias = torch.zeros(seen.shape, dtype=query.dtype, device="cpu").masked_fill_(
            ~seen, -torch.inf
        )
    attention: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    is_causal = isinstance(seen, str)
    found, total = attention(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)
    return found[..., :out].to(total.dtype), total


def _products(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """By matrix products in 16 bits, which torch's kernel does not use on most CPUs.

    It takes half the time. Scores are rounded as in eager attention; SmolLM2's log-probabilities
    were no further from those of the same weights in float32 than with the kernel (.039 and .041).
    """
    scores = (query @ key.transpose(-1, -2)).float().mul_(scale)
    if seen is not None and seen.is_floating_point():
        scores += seen
    elif seen is not None:
        scores.masked_fill_(~seen, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    powers = scores.sub_(largest).exp_()
    sums = powers.sum(-1, keepdim=True)
    found = (powers.to(query.dtype) @ value).float() / sums
    return found, (largest + sums.log())[..., 0]


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if seen is not None or query.shape[-1] != value.shape[-1] or query.shape[-1] > 256:
        return _by_hand(query, key, value, seen, scale, None)
    attention: Any = torch.ops.aten._scaled_dot_product_flash_attention
    found, total = attention(query, key, value, scale=scale)[:2]
    return found.to(total.dtype), total


def _by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Splits by rows, or by queries if all are in one row.
    dim = 0 if len(query) > 1 else 2
    per = query.numel() // query.shape[-1] // query.shape[dim] * key.shape[-2]
    found: list[Tensor] = []
    totals: list[Tensor] = []
    step = max(1, _MOST_SCORES // per)
    for start in range(0, query.shape[dim], step):
        piece = query.narrow(dim, start, min(step, query.shape[dim] - start)).to(dtype)
        rows = slice(start, start + step) if dim == 0 else slice(None)
        scores = piece @ key[rows].to(dtype).transpose(-1, -2) * scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        if seen is not None:
            part = seen.narrow(dim, start, piece.shape[dim]) if seen.shape[dim] > 1 else seen
            scores = (
                scores + part if part.is_floating_point() else scores.masked_fill(~part, -torch.inf)
            )
        total = scores.logsumexp(-1)
        found.append((scores - total[..., None]).exp() @ value[rows].to(dtype))
        totals.append(total)
    return torch.cat(found, dim), torch.cat(totals, dim)
