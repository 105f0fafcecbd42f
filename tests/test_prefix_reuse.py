"""Prefix reuse: shared ids are computed once, and values equal those of a plain loop."""

import logging
import random
import shutil

import architectures
import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_llm_ext import _compat
from captum_llm_ext.model import Scorer, TokenRow
from captum_llm_ext.model.forward.schedule import distinct_positions, plan

UNK = 3
# These read several tokens on from a state wrongly; the first five without an error.
WRONG = {
    "mamba",
    "falcon mamba",
    "jamba, recurrent hybrid",
    "bamba, recurrent hybrid",
    "recurrentgemma, recurrent hybrid",
    "minimax, lightning attention",
}
# These keep states or softmax in float32 whatever the model's dtype: in float64 that is refused.
FLOAT32_INSIDE = {
    "gemma 2, sliding window",
    "bloom",
    "falcon-h1, recurrent hybrid",
    "granite 4, recurrent hybrid",
    "qwen 3 next, linear attention",
    "qwen 3.5, linear attention",
    "deepseek v3, latent attention",
}
# Whatever is done with these in float64, their own float32 parts differ by batch and padding.
ROUGH = {"mamba", "falcon mamba", "mamba 2", "nemotron-h, recurrent hybrid", "bloom"} | {
    "gemma 2, sliding window",
    "llama 4, chunked attention",
    "deepseek v3, latent attention",
}

# Their keys and values are no plain list beside the attention's: rows are given copies.
NOT_SHARED = {"bloom", "mamba 2", "deepseek v3, latent attention"}
# Not all of their layers attend, or tokens are not told their places: rows are not packed.
NOT_PACKED = {name for name in architectures.CONFIGS if "hybrid" in name or "linear" in name} | {
    "bloom",
    "mamba",
    "falcon mamba",
    "mamba 2",
    "minimax, lightning attention",
}


def make_rows(n_prompt=18, n_target=5, seed=0, n_random=6):
    """Replaced, deleted and sampled prompt tokens, deleted generated ones: rows of all lengths."""
    draw = random.Random(seed)
    ids = [draw.randrange(4, 400) for _ in range(n_prompt + n_target)]
    prompt, target = ids[:n_prompt], ids[n_prompt:]
    prompts = [prompt]
    for i in range(n_prompt):
        prompts += [[*prompt[:i], UNK, *prompt[i + 1 :]], [*prompt[:i], *prompt[i + 1 :]]]
    prompts += [[x for x in prompt if draw.random() < 0.6] or [UNK] for _ in range(n_random)]
    rows = [TokenRow((*p, *target[:-1]), range(len(p) - 1, len(p) - 1 + n_target)) for p in prompts]
    for absent in range(n_target - 1):
        read, positions = list(prompt), []
        for place, token in enumerate(target):
            positions.append(len(read) - 1)
            read += [] if place == absent else [token]
        rows.append(TokenRow(tuple(read[: positions[-1] + 1]), positions))
    return rows, torch.tensor(target)


@torch.no_grad()
def loop(model, rows, target):
    """One uncached, unpadded forward of batch 1 for every row."""
    values = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        said = logits[list(row.positions)].double().log_softmax(-1)
        values.append(said.gather(1, target[:, None])[:, 0])
    return torch.stack(values)


def difference(values, truth):
    return float((values - truth).abs().max())


def n_reused(scorer):
    return scorer.n_row_positions - scorer.n_positions


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_float32_values_equal_a_plain_loop(name):
    model = architectures.build(name)
    rows, target = make_rows()
    truth = loop(model, rows, target)
    for reuse in ("copy", "share"):
        scorer = Scorer(model, overhead=3, reuse=reuse)
        assert difference(scorer.values(rows, target), truth) < 1e-4
        assert (n_reused(scorer) > 0) == (name not in WRONG)
        assert scorer.shares_cache == (reuse == "share" and name not in WRONG | NOT_SHARED)
    scorer = Scorer(model, overhead=3, reuse="pack")
    assert difference(scorer.values(rows, target), truth) < 1e-4
    assert scorer.uses_packing == (name not in NOT_PACKED)


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_float64_values_equal_a_plain_loop(name):
    model = architectures.build(name, dtype=torch.float64)
    rows, target = make_rows(seed=1)
    truth = loop(model, rows, target)
    for reuse in ("copy", "share"):
        scorer = Scorer(model, overhead=3, reuse=reuse)
        error = difference(scorer.values(rows, target), truth)
        assert error < (5e-6 if name in ROUGH else 1e-9)
        if name not in ROUGH:
            assert (n_reused(scorer) > 0) == (name not in WRONG | FLOAT32_INSIDE)
            assert scorer.shares_cache == (reuse == "share" and n_reused(scorer) > 0)
    scorer = Scorer(model, overhead=3, reuse="pack")
    assert difference(scorer.values(rows, target), truth) < (5e-6 if name in ROUGH else 1e-9)
    if name not in ROUGH:
        assert scorer.uses_packing == (name not in NOT_PACKED | FLOAT32_INSIDE)


def test_custom_attention_is_left_alone():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTIONS

    model = tiny.llama().double()
    rows, target = make_rows()
    truth = loop(model, rows, target)
    AttentionInterface.register("my_own", ATTENTIONS["sdpa"])
    AttentionMaskInterface.register("my_own", MASKS["sdpa"])
    try:
        model.config._attn_implementation = "my_own"
        scorer = Scorer(model, overhead=3, reuse="share")
        assert difference(scorer.values(rows, target), truth) < 1e-9
        assert not scorer.shares_cache
        assert n_reused(scorer) > 0
    finally:
        AttentionInterface._global_mapping.pop("my_own")
        AttentionMaskInterface._global_mapping.pop("my_own")


class OwnProperty(transformers.LlamaConfig):
    """Tells by a property of its own what the model attends by, as HRM's does."""

    @property
    def _attn_implementation(self):
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value):
        self._attn_implementation_internal = value


@pytest.mark.parametrize("reuse", ["share", "pack"])
def test_config_with_attn_implementation_property(reuse):
    torch.manual_seed(0)
    config = OwnProperty(**tiny.llama().config.to_dict())
    model = transformers.LlamaForCausalLM(config).double().eval()
    usual = vars(OwnProperty)["_attn_implementation"]
    rows, target = make_rows()
    scorer = Scorer(model, overhead=0, reuse=reuse)
    assert difference(scorer.values(rows, target), loop(model, rows, target)) < 1e-9
    assert scorer.uses_packing or scorer.shares_cache
    assert vars(OwnProperty)["_attn_implementation"] is usual


def test_altered_keys_are_not_shared(caplog):
    model = tiny.llama().double()
    rows, target = make_rows()
    truth = loop(model, rows, target)
    layer = model.model.layers[1].self_attn
    forward = layer.forward

    name = _compat.state_argument(model)

    def altered(*args, **kwargs):
        state = kwargs[name]

        class Touched:
            def update(self, keys, values, *rest, **more):
                keys, values = state.update(keys, values, *rest, **more)
                return keys * 1.0, values

        return forward(*args, **kwargs | {name: state and Touched()})

    layer.forward = altered
    scorer = Scorer(model, overhead=3, reuse="share")
    with caplog.at_level(logging.INFO):
        assert difference(scorer.values(rows, target), truth) < 1e-11
    assert not scorer.shares_cache
    assert "keys other than those of the cache" in caplog.text


@pytest.mark.parametrize("name", sorted(WRONG))
def test_comparison_detects_wrong_prefix_continuation(name, monkeypatch, caplog):
    monkeypatch.setattr(_compat, "why_no_prefix_reuse", lambda model: None)
    model = architectures.build(name)
    rows, target = make_rows()
    scorer = Scorer(model, overhead=3)
    with caplog.at_level(logging.WARNING):
        values = [scorer.values(rows[:30], target), scorer.values(rows[30:], target)]
    assert difference(torch.cat(values), loop(model, rows, target)) < 1e-4
    assert n_reused(scorer) < 0  # the comparison came on top
    assert [r.name for r in caplog.records if r.name.startswith("captum_llm_ext")] == [
        "captum_llm_ext.model.scoring.batching"
    ]


def wide_rows(head, n_rows, n_target=3):
    """Rows of one long beginning that differ after it, the last ones shorter."""
    shared = [4 + i * 7 % 390 for i in range(head)]
    rows = []
    for i in range(n_rows):
        ids = (*shared, 4 + i, 9, *([11] if i < n_rows // 2 else []), 12, 13)
        rows.append(TokenRow(ids, range(len(ids) - n_target, len(ids))))
    return rows, torch.tensor([12, 13, 14])


def test_long_prefixes_are_shared_and_short_ones_copied():
    model = tiny.llama(max_position_embeddings=400).double()
    for head, shares_cache in ((20, False), (340, True)):
        rows, target = wide_rows(head, 24)
        scorer = Scorer(model, overhead=0)
        scorer._batching._packs = False  # as on a GPU
        assert difference(scorer.values(rows, target), loop(model, rows, target)) < 1e-11
        assert scorer.shares_cache == shares_cache


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sharing_restores_model_and_registries(attention, monkeypatch):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTIONS

    model = tiny.llama(attn_implementation=attention)
    rows, target = make_rows()
    names, seen = (set(ATTENTIONS), set(MASKS)), set()
    forward = model.forward

    def full(input_ids, **arguments):
        seen.add(model.config._attn_implementation)
        output = forward(input_ids=input_ids, **arguments)
        if len(seen) > 1:
            raise KeyboardInterrupt
        return output

    scorer = Scorer(model, overhead=3, reuse="share")
    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(KeyboardInterrupt):
        scorer.values(rows, target)
    assert len(seen) == 2  # it was interrupted while sharing
    assert model.config._attn_implementation == attention
    assert (set(ATTENTIONS), set(MASKS)) == names


def test_unexpected_attention_falls_back_to_copied_caches(monkeypatch, caplog):
    model = tiny.llama().double()
    rows, target = make_rows()
    truth = loop(model, rows, target)
    forward = model.forward

    def strange(input_ids, **arguments):
        if len(input_ids) > 2 and model.config._attn_implementation != "sdpa":
            raise NotImplementedError("so many rows")
        return forward(input_ids=input_ids, **arguments)

    scorer = Scorer(model, overhead=3, reuse="share")
    monkeypatch.setattr(model, "forward", strange)
    with caplog.at_level(logging.INFO):
        assert difference(scorer.values(rows, target), truth) < 1e-11
    assert not scorer.shares_cache
    assert [record.getMessage() for record in caplog.records] == [
        "LlamaForCausalLM gets copies of the shared prefix (so many rows)."
    ]


@pytest.mark.parametrize("overhead", [0, 1, 5, 30, 1000])
@pytest.mark.parametrize("max_rows", [1, 3, None])
def test_values_are_independent_of_batching(overhead, max_rows):
    model = tiny.llama().double()
    rows, target = make_rows(n_prompt=24, seed=2)
    scorer = Scorer(model, overhead=overhead, max_rows=max_rows)
    values = scorer.values(rows, target)
    assert difference(values, loop(model, rows, target)) < 1e-11
    assert scorer.n_evaluations == len({row.ids for row in rows})


@pytest.mark.parametrize("kept", ["count", None])
def test_models_with_full_logits_reuse_prefixes(kept, monkeypatch):
    monkeypatch.setattr(_compat, "kept_logits", lambda model: kept)
    model = tiny.llama().double()
    rows, target = make_rows()
    scorer = Scorer(model, overhead=3)
    assert difference(scorer.values(rows, target), loop(model, rows, target)) < 1e-11
    assert n_reused(scorer) > 0


@pytest.mark.parametrize("attr_target", ["prob", "logit", "callable"])
def test_attr_targets_are_equal_without_reuse(attr_target):
    def against_next(logits, target):  # looks at the logits of all target tokens at once
        own = logits.gather(2, target.view(1, -1, 1))[:, :, 0]
        return own - logits.mean((1, 2))[:, None]

    chosen = against_next if attr_target == "callable" else attr_target
    model = tiny.llama().double()
    rows, target = make_rows()
    alone = Scorer(model, attr_target=chosen, reuse="off", max_rows=1).values(rows, target)
    scorer = Scorer(model, attr_target=chosen, overhead=3)
    assert difference(scorer.values(rows, target), alone) < 1e-11
    assert n_reused(scorer) > 0


def test_undefined_values_stay_nan():
    model = tiny.llama().double()
    rows, target = make_rows()
    holes = [TokenRow(row.ids, [-1, *row.positions[1:-1], row.positions[-1]]) for row in rows]
    values = Scorer(model, overhead=3).values(holes, target)
    assert values[:, 0].isnan().all()
    assert difference(values[:, 1:], loop(model, rows, target)[:, 1:]) < 1e-11


def test_fixed_prefix_is_computed_once_per_run():
    model = tiny.llama().double()
    rows, target = make_rows(n_prompt=12)
    head = tuple(range(20, 100))
    rows = [TokenRow(head + row.ids, [80 + p for p in row.positions]) for row in rows]
    scorer = Scorer(model, overhead=3)
    first = scorer.values(rows[:15], target)
    before = scorer.n_positions
    second = scorer.values(rows[15:], target)
    assert difference(torch.cat([first, second]), loop(model, rows, target)) < 1e-11
    assert scorer.n_positions - before <= sum(len(row.ids) - 80 for row in rows[15:])
    # Rows that begin otherwise are right as well.
    other = [TokenRow(row.ids[40:], [p - 40 for p in row.positions]) for row in rows]
    assert difference(scorer.values(other, target), loop(model, other, target)) < 1e-11


def test_out_of_memory_keeps_values(monkeypatch):
    model = tiny.llama().double()
    rows, target = make_rows()
    truth = loop(model, rows, target)
    sizes, forward = [], model.forward

    def small(input_ids, **arguments):
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids=input_ids, **arguments)

    scorer = Scorer(model, overhead=20)
    monkeypatch.setattr(model, "forward", small)
    assert difference(scorer.values(rows, target), truth) < 1e-11
    failures = [size for size in sizes if size > 3]
    probed = failures.pop(0)  # rows that the model is looked at with
    assert probed == 4
    assert failures == sorted(set(failures), reverse=True)  # halved each time, decided once
    assert scorer.n_evaluations == len({row.ids for row in rows})


def test_rows_run_without_cache_when_memory_is_short(monkeypatch):
    model = tiny.llama().double()
    rows, target = make_rows()
    truth = loop(model, rows, target)
    forward = model.forward

    def stateless(input_ids, use_cache=False, **arguments):
        if use_cache:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids=input_ids, use_cache=False, **arguments)

    scorer = Scorer(model, overhead=3)
    monkeypatch.setattr(model, "forward", stateless)
    assert difference(scorer.values(rows, target), truth) < 1e-11


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(attention):
    model = tiny.llama(attn_implementation=attention).double()
    rows, target = make_rows()
    # Eager attention takes its softmax in float32.
    tolerance = 1e-5 if attention == "eager" else 1e-11
    truth = loop(model, rows, target)
    for reuse in ("off", "copy", "share"):
        scorer = Scorer(model, overhead=3, reuse=reuse)
        assert difference(scorer.values(rows, target), truth) < tolerance


@pytest.mark.skipif(not shutil.which("g++"), reason="flex attention is compiled, by g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's and transformers' own
def test_flex_attention():
    model = tiny.llama(attn_implementation="flex_attention", hidden_size=64)  # heads of 16 at least
    rows, target = make_rows()
    truth = loop(tiny.llama(hidden_size=64), rows, target)
    scorer = Scorer(model, overhead=3, reuse="pack")  # every other shape is compiled anew
    assert difference(scorer.values(rows, target), truth) < 1e-4
    assert scorer.uses_packing
    assert model.config._attn_implementation == "flex_attention"


def test_compiled_models():
    model = tiny.llama().double()
    rows, target = make_rows()
    truth = loop(model, rows, target)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    scorer = Scorer(compiled, overhead=3)
    # A graph takes a second, and other kinds of passes want others: the rest runs as it is.
    with torch._dynamo.config.patch(recompile_limit=2):
        assert difference(scorer.values(rows, target), truth) < 1e-11
    assert n_reused(scorer) > 0


def test_bfloat16_models_reuse_prefixes():
    model = architectures.build("llama", dtype=torch.bfloat16)
    rows, target = make_rows()
    scorer = Scorer(model, overhead=3)
    values = scorer.values(rows, target)
    assert n_reused(scorer) > 0
    # Logits near 6 are multiples of 1/32 in bfloat16.
    assert difference(values, loop(model, rows, target)) < 0.25


def test_length_dependent_positions_are_not_mixed():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 20,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    }
    model = tiny.llama(rope_parameters=rope, max_position_embeddings=80).double()
    rows, target = make_rows(n_prompt=24)  # rows of both kinds
    values = Scorer(model, overhead=3).values(rows, target)
    assert difference(values, loop(model, rows, target)) < 1e-6  # frequencies are float32


def test_user_cache_and_model_are_unchanged():
    model = tiny.llama().train()
    model.config.use_cache = False
    rows, target = make_rows()
    ids = torch.tensor([rows[0].ids])
    with torch.no_grad():
        state = model(input_ids=ids, use_cache=True)[_compat.state_argument(model)]
    kept = [layer.keys.clone() for layer in state.layers]
    scorer = Scorer(model, overhead=3)
    scorer.values(rows, target)
    assert n_reused(scorer) > 0
    for layer, keys in zip(state.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys)
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        scorer.values([*rows, TokenRow((*rows[0].ids[:-1], 4000), rows[0].positions)], target)
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.config.use_cache is False
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_short_rows_of_small_models_skip_reuse():
    model = tiny.llama()
    rows, target = make_rows()
    scorer = Scorer(model)
    scorer.values(rows, target)
    assert n_reused(scorer) <= 0


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=24),
    st.integers(0, 4),
    st.integers(1, 5),
)
@settings(max_examples=200, deadline=None)
def test_schedule_completes_every_row_once(rows, overhead, most):
    shareable = [max(0, len(row) - 2) for row in rows]
    root = plan(
        rows,
        shareable,
        overhead=overhead,
        most_padding=overhead,
        most_rows=lambda longest, before: most,
        most_head=99,
    )
    ends = []
    for branch in root.walk():
        assert all(
            rows[i][: branch.stop] == rows[branch.rows[0]][: branch.stop] for i in branch.rows
        )
        # A single token is read on by other code in some models.
        assert all(grown.start == branch.stop <= grown.stop - 2 for grown in branch.branches)
        for batch in branch.batches:
            ends += batch
            lengths = [len(rows[i]) for i in batch]
            assert lengths == sorted(lengths, reverse=True)
            assert branch.stop == 0 or branch.stop <= lengths[-1] - 2
            assert len(batch) <= most
            assert sum(lengths[0] - length for length in lengths) <= overhead
    assert sorted(ends) == list(range(len(rows)))
    assert distinct_positions(rows) == len({tuple(r[: i + 1]) for r in rows for i in range(len(r))})


def test_zero_overhead_schedule_computes_positions_once():
    rows = [row.ids for row in make_rows()[0]]
    rows = list(dict.fromkeys(rows))
    root = plan(
        rows,
        [len(row) - 2 for row in rows],
        overhead=0,
        most_padding=0,
        most_rows=lambda longest, before: 99,
        most_head=99,
    )
    # Stretches have two tokens at least: up to two of a row's own come twice.
    lengths = [len(row) for row in rows]
    assert root.positions(lengths) <= distinct_positions(rows) + 2 * len(rows)
    assert root.positions(lengths) < 0.7 * sum(lengths)


def test_schedule_is_near_the_minimum_of_positions():
    prompt = list(range(100, 228))
    tail = list(range(300, 331))
    rows = [prompt + tail] + [[*prompt[:i], UNK, *prompt[i + 1 :], *tail] for i in range(128)]
    root = plan(
        rows,
        [len(row) - 2 for row in rows],
        overhead=40,
        most_padding=40,
        most_rows=lambda longest, before: 4096 // (longest - before),
    )
    assert root.positions([len(row) for row in rows]) <= 1.15 * distinct_positions(rows)
