"""Rows in one sequence: each token sees those of its own row alone, and none comes twice."""

import logging
import math
from itertools import pairwise

import architectures
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prefix_reuse import difference, loop, make_rows, n_reused

from captum_llm_ext import _compat
from captum_llm_ext.model import Scorer, TokenRow
from captum_llm_ext.model.forward import attention
from captum_llm_ext.model.forward.packing import pack
from captum_llm_ext.model.forward.prefixes import (
    common_length,
    heavy_paths_first,
    shared_prefix_lengths,
    sort_by_prefix,
)
from captum_llm_ext.model.forward.schedule import distinct_positions, plan_forked, plan_packed
from captum_llm_ext.model.forward.stacking import stacks

WINDOWS = (
    "mistral, sliding window",
    "gemma 3, sliding window",
    "gpt-oss",
    "llama 4, chunked attention",
    "deepseek v3, latent attention",
    "gpt2",
)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=24))
@settings(max_examples=200, deadline=None)
def test_pack_holds_every_row_and_each_prefix_once(rows):
    rows = sorted(rows)
    packed = pack(rows)
    ids = torch.tensor(packed.ids)
    assert [ids[places].tolist() for places in packed.places] == rows
    assert len(packed.ids) == distinct_positions(rows)
    assert [(a.stop, b.start) for a, b in pairwise(packed.segments)] == [
        (a.stop, a.stop) for a in packed.segments[:-1]
    ]
    for segment in packed.segments:
        places = [i for stretch in segment.path for i in range(*stretch)]
        assert len(places) == segment.depth
        # What comes before in the row comes before in the pack, at depths 0, 1, 2 and so on.
        assert [packed.depths[i] for i in places] == list(range(segment.depth))
        assert all(i < segment.start for i in places)
        own = range(segment.start, segment.stop)
        assert [packed.depths[i] - segment.depth for i in own] == list(range(len(own)))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=24))
@settings(max_examples=200, deadline=None)
def test_row_prefix_lies_in_logarithmically_many_segments(rows):
    """In a tree of n rows, a way down leaves the heavy path log2 n times at most."""
    rows = [list(row) for row in {tuple(row) for row in rows}]
    by_content = sort_by_prefix(rows, [len(row) for row in rows])
    order, shared = heavy_paths_first(*by_content)
    assert sorted(order) == list(range(len(rows)))
    assert shared == shared_prefix_lengths([rows[i] for i in order])
    assert sum(shared) == sum(by_content[1])  # in the order of content nothing comes twice
    packed = pack([rows[i] for i in order])
    most = 1 + math.log2(len(rows))
    assert all(len(segment.path) <= most for segment in packed.segments)


def test_leave_one_out_rows_attend_to_one_segment():
    whole = list(range(10, 60))
    rows = [whole, *([*whole[:i], i % 2, *whole[i + 1 :]] for i in range(1, 50))]
    root = plan_packed(rows, overhead=1, most_ids=10**6, most_rows=10**6)
    (batch,) = root.batches
    segments = pack([rows[i] for i in batch]).segments
    assert max(len(segment.path) for segment in segments) == 1


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=9), min_size=1, max_size=24),
    st.integers(1, 30),
    st.integers(1, 5),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_packs_respect_limits_and_position_counts(rows, most_ids, most_rows, chained):
    root = plan_packed(
        rows,
        overhead=1,
        most_ids=most_ids,
        most_rows=most_rows,
        most_head=2,
        chained=chained,
    )
    lengths = [len(row) for row in rows]
    assert sorted(i for batch in root.batches for i in batch) == list(range(len(rows)))
    positions = root.stop
    last = None
    for batch in root.batches:
        assert all(rows[i][: root.stop] == rows[batch[0]][: root.stop] for i in batch)
        n_read = root.read_before(batch, lengths)
        if n_read != root.stop:  # what the row before has read
            assert chained
            assert root.stop < n_read <= 2
            assert rows[last][:n_read] == rows[batch[0]][:n_read]
        last = batch[-1]
        n_ids = len(pack([rows[i] for i in batch], n_read).ids)
        assert n_ids == root.positions_of(batch, lengths)
        assert len(batch) <= most_rows
        assert n_ids <= most_ids or len(batch) == 1
        positions += n_ids
    assert root.positions(lengths) == positions
    assert root.n_passes() == len(root.batches) + (root.stop > 0)


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=24),
    st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_packed_tokens_attend_to_their_own_row_only(rows, n_read):
    """Whatever the shapes: what a token sees, in order, is its row up to itself."""
    head = [7, 8, 9][:n_read]
    rows = [[*head, *row] for row in rows]
    order, _ = sort_by_prefix(rows, [len(row) for row in rows])
    rows = [rows[i] for i in order]
    packed = pack(rows, n_read)
    content = [*head, *packed.ids]

    def causal(n_queries, n_keys, depth):
        return torch.arange(n_keys) <= depth + torch.arange(n_queries)[:, None]

    seen: dict[int, list[int]] = {}
    for stack in stacks(packed.segments, n_read, 0, causal, torch.empty(0)):
        own, places = stack.own
        bias = stack.bias.flatten(0, 2)
        keys = stack.keys.repeat_interleave(stack.queries.shape[1], 0)
        for query, place in zip(own.tolist(), places.tolist(), strict=True):
            assert place not in seen
            seen[place] = [content[k] for k in keys[query][bias[query] == 0].tolist()]
    assert len(seen) == len(packed.ids)
    for row, places in zip(rows, packed.places, strict=True):
        for i, place in enumerate(places.tolist()):
            if place >= n_read:
                assert seen[place - n_read] == row[: i + 1]


def test_attention_calls_are_independent_of_row_count(monkeypatch):
    model = tiny.llama().double()
    calls, part = [], attention._part
    monkeypatch.setattr(attention, "_part", lambda *given: calls.append(1) or part(*given))
    ids = [5 * i % 90 + 3 for i in range(40)]

    def n_calls(n_rows):
        rows = [[*ids[:20], 100 + i, *ids[21:]] for i in range(n_rows)]
        packed = pack(rows)
        needed = torch.tensor([int(places[-1]) for places in packed.places]).sort().values
        passes = Scorer(model, reuse="pack")._passes
        calls.clear()
        with torch.no_grad():
            passes._read_pack(packed, needed, None)
        return len(calls)

    few, many = n_calls(6), n_calls(96)
    assert few == many
    assert many <= 3 * model.config.num_hidden_layers


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("head", [5, 30])
def test_packs_continue_from_a_cached_prefix(name, head):
    """Heads shorter and longer than windows, of which a state keeps the end alone."""
    model = architectures.build(name)
    rows, target = make_rows(n_prompt=12)
    ids = tuple(range(20, 20 + head))
    rows = [TokenRow(ids + row.ids, [head + p for p in row.positions]) for row in rows]
    scorer = Scorer(model, overhead=3, reuse="pack", max_rows=9)
    values = [scorer.values(rows[:20], target), scorer.values(rows[20:], target)]
    assert difference(torch.cat(values), loop(model, rows, target)) < 1e-4
    assert scorer.uses_packing
    assert len(scorer._batching._head[0]) >= head // 2 * 2


@pytest.mark.parametrize("attr_target", ["log_prob", "prob", "logit", "callable"])
@pytest.mark.parametrize("kept", ["positions", "count", None])
def test_every_kind_of_value(attr_target, kept, monkeypatch):
    def against_next(logits, target):
        own = logits.gather(2, target.view(1, -1, 1))[:, :, 0]
        return own - logits.mean((1, 2))[:, None]

    chosen = against_next if attr_target == "callable" else attr_target
    monkeypatch.setattr(_compat, "kept_logits", lambda model: kept)
    model = tiny.llama().double()
    rows, target = make_rows()
    alone = Scorer(model, attr_target=chosen, reuse="off", max_rows=1).values(rows, target)
    scorer = Scorer(model, attr_target=chosen, overhead=3, reuse="pack")
    assert difference(scorer.values(rows, target), alone) < 1e-11
    assert scorer.uses_packing


def test_plan_accounts_for_positions_saved_in_outer_layers(monkeypatch):
    """Packs that compute as many positions as batches cost less by about a layer."""
    model = architectures.build("llama")
    ids = [7 * i % 90 + 3 for i in range(60)]
    changed = [(*ids[:i], ids[i] - 1, *ids[i + 1 :]) for i in range(50)]
    rows = [TokenRow(one, range(50, 60)) for one in (tuple(ids), *changed)]
    target = torch.arange(5, 15)
    scorer = Scorer(model, overhead=16)
    assert difference(scorer.values(rows, target), loop(model, rows, target)) < 1e-4
    assert scorer.uses_packing
    monkeypatch.setattr(_compat, "outer_layers", lambda model: None)
    scorer = Scorer(model, overhead=16)
    scorer.values(rows, target)
    assert not scorer.uses_packing


@pytest.mark.parametrize("overhead", [0, 5, 1000])
@pytest.mark.parametrize("max_rows", [1, 3, None])
def test_values_are_independent_of_packing(overhead, max_rows):
    model = tiny.llama().double()
    rows, target = make_rows(n_prompt=24, seed=2)
    scorer = Scorer(model, overhead=overhead, max_rows=max_rows, reuse="pack")
    assert difference(scorer.values(rows, target), loop(model, rows, target)) < 1e-11
    assert scorer.n_evaluations == len({row.ids for row in rows})


def test_positions_are_computed_once_beside_the_comparison():
    model = tiny.llama().double()
    rows, target = make_rows()
    scorer = Scorer(model, overhead=0, reuse="pack")
    scorer.values(rows, target)
    assert n_reused(scorer) > 0
    longest = max(len(row.ids) for row in rows)
    assert scorer.n_positions <= distinct_positions([row.ids for row in rows]) + 3 * longest


@pytest.mark.parametrize("max_rows", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packs_continue_from_earlier_packs(name, max_rows):
    model = architectures.build(name).double()
    rows, target = make_rows()
    scorer = Scorer(model, overhead=0, reuse="pack", max_rows=max_rows)
    assert difference(scorer.values(rows, target), loop(model, rows, target)) < 1e-11
    # None of them reads again what the last one has read before the target.
    longest = max(len(row.ids) for row in rows)
    n_packs = -(-scorer.n_evaluations // max_rows)
    least = distinct_positions([row.ids for row in rows])
    assert scorer.n_positions <= least + 3 * longest + n_packs * len(target)


def test_rows_diverge_inside_the_cached_prefix():
    model = tiny.llama().double()
    ids, target = tuple(range(10, 22)), torch.tensor([5, 6])
    rows = [TokenRow((*ids[:n], 7, *ids[n + 1 :]), [10, 11]) for n in (9, 8, 6, 3, 1)]
    scorer = Scorer(model, overhead=0, reuse="pack", max_rows=2)
    assert difference(scorer.values(rows, target), loop(model, rows, target)) < 1e-11
    assert scorer.uses_packing


@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=7),
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=9), st.integers(0, 9)),
        min_size=1,
        max_size=16,
    ),
    st.integers(1, 20),
    st.integers(1, 5),
)
@settings(max_examples=300, deadline=None)
def test_forked_rows_reuse_the_longest_allowed_prefix(text, given, most_ids, most_rows):
    """What a row is asked about is in its pack, and all before it is its own beginning."""
    rows = [row for row, _ in given]
    begun = [min(common_length(row, text), first, len(row) - 1) for row, first in given]
    root = plan_forked(rows, begun, len(text), most_ids=most_ids, most_rows=most_rows)
    assert sorted(i for batch in root.batches for i in batch) == list(range(len(rows)))
    lengths = [len(row) for row in rows]
    for batch in root.batches:
        packed = pack([rows[i] for i in batch], len(text), [begun[i] for i in batch])
        assert len(packed.ids) == root.positions_of(batch, lengths)
        assert len(packed.ids) <= sum(lengths[i] - begun[i] for i in batch)
        assert len(batch) <= most_rows
        assert len(packed.ids) <= most_ids or len(batch) == 1
        ids = torch.tensor([*text, *packed.ids])
        for i, places in zip(batch, packed.places, strict=True):
            assert ids[places].tolist() == rows[i]
            assert (places[begun[i] :] >= len(text)).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", *WINDOWS])
def test_rows_continue_from_any_position_of_a_text(name):
    """Also rows that are asked about the text itself; models that forget some read it anew."""
    model = architectures.build(name)
    generator = torch.Generator().manual_seed(0)
    text, *ends = torch.randint(4, 400, (25, 30), generator=generator).tolist()
    rows = [TokenRow((*text[:n], *end[:3]), [n, n + 1]) for n, end in enumerate(ends)]
    rows += [TokenRow(tuple(text[: n + 2]), [n, n + 1]) for n in (3, 12, 28)]
    target = torch.tensor([5, 6])
    scorer, other = (Scorer(model, overhead=3, reuse="pack") for _ in range(2))
    scorer.expect(text)
    for some in (rows[i::6] for i in range(6)):
        for each in (scorer, other):
            assert difference(each.values(some, target), loop(model, some, target)) < 1e-4
    if scorer._passes.chains:
        assert scorer.n_positions < other.n_positions - 2 * len(text)
    log_probs, ids = scorer.likeliest(rows, 1)
    with torch.no_grad():
        for row, [best, _] in zip(rows, ids[:, :, 0].tolist(), strict=True):
            assert model(torch.tensor([row.ids])).logits[0, row.positions[0]].argmax() == best
    assert (log_probs < 0).all()
    assert scorer._passes.chains or name not in ("llama", "gpt2")


def sizes_seen(module, monkeypatch):
    """How many tokens a module is given, pass by pass, from now on."""
    sizes, forward = [], module.forward

    def counting(x):
        sizes.append(x.shape[1])
        return forward(x)

    monkeypatch.setattr(module, "forward", counting)
    return sizes


def test_first_and_last_layers_compute_only_needed_tokens(monkeypatch):
    """Of those alike before the first attention one; after the last one, those asked about."""
    model = tiny.llama().double()
    rows, target = make_rows(n_prompt=60)
    layers = model.model.layers
    modules = (layers[0].self_attn.q_proj, layers[0].mlp, layers[-1].mlp)
    first, middle, last = (sizes_seen(module, monkeypatch) for module in modules)
    scorer = Scorer(model, overhead=0, reuse="pack")
    values = scorer.values(rows, target)
    assert sum(last) < 0.4 * sum(middle)
    assert sum(first) < 0.5 * sum(middle)
    assert difference(values, loop(model, rows, target)) < 1e-11
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_that_need_all_tokens_get_them(layer, monkeypatch):
    model = tiny.llama().double()
    rows, target = make_rows(n_prompt=60)
    lengths = sizes_seen(model.model.embed_tokens, monkeypatch)
    chosen = model.model.layers[1].mlp if layer else model.model.layers[0].self_attn.q_proj
    forward = chosen.forward
    monkeypatch.setattr(chosen, "forward", lambda x: forward(x).view(len(x), lengths[-1], -1))
    scorer = Scorer(model, overhead=0, reuse="pack")
    assert difference(scorer.values(rows, target), loop(model, rows, target)) < 1e-11
    assert scorer.uses_packing
    assert scorer._passes._ends_of_model is None


def test_undefined_values_stay_nan():
    model = tiny.llama().double()
    rows, target = make_rows()
    holes = [TokenRow(row.ids, [-1, *row.positions[1:-1], row.positions[-1]]) for row in rows]
    values = Scorer(model, overhead=3, reuse="pack").values(holes, target)
    assert values[:, 0].isnan().all()
    assert difference(values[:, 1:], loop(model, rows, target)[:, 1:]) < 1e-11


def test_one_position_predicts_several_target_tokens():
    """Where generated tokens are deleted, one place is asked for more than one target token."""
    model = tiny.llama().double()
    ids, target = tuple(range(10, 22)), torch.tensor([5, 6, 7])
    rows = [
        TokenRow(ids, [9, 10, 11]),
        TokenRow(ids[:11], [9, 10, 10]),
        TokenRow(ids[:10], [9] * 3),
    ]
    scorer = Scorer(model, overhead=0, reuse="pack")
    assert difference(scorer.values(rows, target), loop(model, rows, target)) < 1e-11


@pytest.mark.parametrize("layer", [0, 1])
def test_models_that_misread_packs_get_separate_rows(layer, monkeypatch, caplog):
    model = tiny.llama().double()
    rows, target = make_rows()
    mlp = model.model.layers[layer].mlp
    forward = mlp.forward

    def mixing(x):  # what a convolution does: a token sees the one before it in the sequence
        return forward(x + 0.1 * torch.cat([x[:, :1], x[:, :-1]], 1))

    monkeypatch.setattr(mlp, "forward", mixing)
    scorer = Scorer(model, overhead=3, reuse="pack")
    with caplog.at_level(logging.INFO):
        assert difference(scorer.values(rows, target), loop(model, rows, target)) < 1e-11
    assert not scorer.uses_packing
    assert "values differ by" in caplog.text


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packing_restores_model_and_registries(attention, monkeypatch):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTIONS

    model = tiny.llama(attn_implementation=attention)
    rows, target = make_rows()
    names, n_packs = (set(ATTENTIONS), set(MASKS)), 0
    forward = model.forward

    def full(input_ids, **arguments):
        nonlocal n_packs
        output = forward(input_ids=input_ids, **arguments)
        n_packs += model.config._attn_implementation != attention
        if n_packs == 2:
            raise KeyboardInterrupt
        return output

    scorer = Scorer(model, overhead=3, reuse="pack", max_rows=8)
    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(KeyboardInterrupt):
        scorer.values(rows, target)
    assert n_packs == 2  # the comparison, and the first of the packs
    assert model.config._attn_implementation == attention
    assert (set(ATTENTIONS), set(MASKS)) == names


def test_out_of_memory_halves_packs(monkeypatch):
    model = tiny.llama().double()
    rows, target = make_rows()
    truth = loop(model, rows, target)
    sizes, forward = [], model.forward

    def small(input_ids, **arguments):
        sizes.append(input_ids.numel())
        if input_ids.numel() > 130:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids=input_ids, **arguments)

    scorer = Scorer(model, overhead=3, reuse="pack")
    monkeypatch.setattr(model, "forward", small)
    assert difference(scorer.values(rows, target), truth) < 1e-11
    failures = [size for size in sizes if size > 130]
    assert failures == sorted(set(failures), reverse=True)
    assert scorer.uses_packing
    assert scorer.n_evaluations == len({row.ids for row in rows})


def test_packs_are_chosen_for_large_layers():
    """On a CPU, where rows are many and differ late."""
    rows, target = make_rows(n_prompt=60)
    for model, packs in (
        (tiny.llama(), False),
        (tiny.llama(hidden_size=512, intermediate_size=2048), True),
    ):
        scorer = Scorer(model.double())
        assert difference(scorer.values(rows, target), loop(model, rows, target)) < 1e-9
        assert scorer.uses_packing == packs
