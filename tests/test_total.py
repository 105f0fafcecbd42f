"""What led to a token in the end: shares of the prompt through all that was written before."""

from itertools import product
from pathlib import Path

import pytest
import tiny
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    ShapleyValueSampling,
)
from fact_grammar import Grammar, corpus, load
from ground_truth import absences, attribute, documents

from captum_llm_ext import (
    AttentionRollout,
    AttentionWeights,
    EquivalentLinearSystem,
    FeatureInclusion,
    GenerationAttentionAttribution,
    GenerationAttribution,
    GenerationAttributionResult,
    GenerationGradientAttribution,
    HierarchicalAblation,
    LayerSaliency,
    PartitionShap,
    Smile,
    TextSegmentInput,
)
from captum_llm_ext.result.influence import (
    flow_towards,
    influence,
    passed_back,
    strongest_chains,
    total_influence,
)

N_PROMPT, N_OUTPUT = 4, 6
DATA = Path(__file__).parent / "data"


def random_graph(seed=0, dead=()):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(N_OUTPUT, N_PROMPT + N_OUTPUT, generator=generator, dtype=torch.float64)
    values[:, N_PROMPT:] = values[:, N_PROMPT:].tril(-1)
    values[:, 0] = values[:, 0].abs()  # something led to every token
    values[list(dead)] = 0
    return influence(values, torch.ones_like(values, dtype=torch.bool), N_PROMPT)


@pytest.mark.parametrize("dead", [(), (2,), (0, 3)])
def test_total_equals_the_token_recursion(dead):
    graph = random_graph(1, dead)
    prompt, own = passed_back(graph, graph)
    known = []
    for t in range(N_OUTPUT):
        row = [float(share) for share in graph.prompt[t]] + [0.0] * N_OUTPUT
        for j in range(t):
            # What nothing led to is where chains begin.
            passed = known[j] if j not in dead else [float(i == N_PROMPT + j) for i in range(10)]
            row = [a + float(graph.output[t, j]) * b for a, b in zip(row, passed, strict=True)]
        known.append(row)
    expected = torch.tensor(known, dtype=torch.float64)
    torch.testing.assert_close(torch.cat([prompt, own], 1), expected, atol=1e-9, rtol=0)
    sums = expected.sum(1)
    assert sums[list(dead)].eq(0).all()
    alive = [t for t in range(N_OUTPUT) if t not in dead]
    torch.testing.assert_close(sums[alive], torch.ones(len(alive), dtype=torch.float64))


def test_total_equals_the_sum_over_chains():
    graph = random_graph(2)
    powers = torch.eye(N_OUTPUT, dtype=torch.float64)
    summed = torch.zeros_like(powers)
    for _ in range(N_OUTPUT + 1):
        summed, powers = summed + powers, powers @ graph.output
    assert powers.eq(0).all()
    found, _ = total_influence(graph)
    torch.testing.assert_close(found, summed @ graph.prompt, atol=1e-9, rtol=0)


def chains_to(graph, node):
    """All of them, by trying every set of tokens between."""
    found = {}
    for used in product((False, True), repeat=node):
        through = tuple(j for j in range(node) if used[j])
        links = [*through, node]
        share = 1.0
        for a, b in zip(through, links[1:], strict=True):
            share *= float(graph.output[b, a])
        for p in range(N_PROMPT):
            found[True, p, through] = share * float(graph.prompt[links[0], p])
        if through and not graph.has_cause[through[0]]:
            found[False, through[0], through[1:]] = share
    return {chain: share for chain, share in found.items() if share > 0}


@pytest.mark.parametrize("dead", [(), (1,), (0, 3)])
def test_strongest_chains_equal_brute_force(dead):
    graph = random_graph(3, dead)
    expected = chains_to(graph, 5)
    found = strongest_chains(graph, 5, graph, 10**4)
    told = {(c.begins_in_prompt, c.first, c.through): c.share for c in found}
    assert told == pytest.approx(expected, abs=1e-12)
    assert sum(told.values()) == pytest.approx(1)
    assert [c.share for c in found] == sorted(told.values(), reverse=True)
    assert strongest_chains(graph, 5, graph, 3) == found[:3]


def test_link_flow_equals_the_sum_of_chains_through_it():
    graph = random_graph(4, dead=(1,))
    edges = flow_towards(graph, 5, graph)
    expected = torch.zeros(N_OUTPUT, N_PROMPT + N_OUTPUT, dtype=torch.float64)
    for (begins, first, through), share in chains_to(graph, 5).items():
        places = [first if begins else N_PROMPT + first]
        for node in (*through, 5):
            expected[node, places[-1]] += share
            places.append(N_PROMPT + node)
    found = torch.cat([edges.prompt, edges.output], 1)
    torch.testing.assert_close(found[:5], expected[:5])
    torch.testing.assert_close(found[-1], expected[5])


# On models


@pytest.fixture(scope="module")
def known():
    return load()


@pytest.fixture(scope="module")
def absent():
    return absences(Grammar(), corpus())["same slot, `CorpusBaselines`"]


@pytest.mark.parametrize("method", ["leave-one-out", "Shapley, permutations", "Shapley, kernel"])
def test_last_word_total_is_attributed_to_the_occupation(known, absent, method):
    """Directly it depends on interest A alone, which the answer wrote; A on the occupation."""
    for document in documents(2, seed=11)[1:]:
        result = attribute(*known, document, method, absent)
        total = result.total()
        prompt, output = document.segments("prompt"), document.segments("continuation")
        place = {segment.slot: i for i, segment in enumerate(output)}
        job = next(i for i, segment in enumerate(prompt) if segment.slot == "occupation")
        rows = [t for t, p in enumerate(result.output_pieces) if p.feature == place["D"]]
        shares, begins = total.span(rows[0], rows[-1] + 1)
        assert shares[job] > 0.95
        assert total.direct[rows[0]].sum() < 0.05
        route = total.route(rows[0], 1)[0]
        assert (route.column, route.through) == (job, (place["A"],))
        assert route == result.route(rows[0])[0]
        assert total.why(rows[0])[0].column == job
        assert float(shares.sum() + begins.sum()) == pytest.approx(1)
        # A link of six standard errors lies three above what counts: lost in one draw of hundreds.
        assert (total.shares_se[rows[0], job] < 0.15).all()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.byte_level()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.llama(len(tokenizer), seed=1)


TARGET = " Ann is a nurse and Dave"


def explained(model, tokenizer, method=FeatureAblation, *, baselines="delete", **arguments):
    text = "Dave lives in Austin. He has a dog."
    inp = TextSegmentInput(text, tokenizer, ("sentence", "word"), baselines=baselines)
    return GenerationAttribution(method(model), tokenizer).attribute(inp, TARGET, **arguments)


@pytest.mark.parametrize("output_unit", ["token", "word", None])
@pytest.mark.parametrize("method", [FeatureAblation, ShapleyValueSampling])
def test_shares_of_every_unit_equal_the_definition(model, tokenizer, method, output_unit):
    result = explained(model, tokenizer, method, output_unit=output_unit)
    total = result.total(floor=0.5, n_resamples=0)
    rows = result.full_attr.double()
    rows = rows.clamp_min(0)
    n_prompt = len(result.input_tokens)
    feature_of = [piece.feature for piece in result.output_pieces]
    words: dict[int, torch.Tensor] = {}
    for t, feature in enumerate(feature_of):
        if feature is None:
            continue
        words[feature] = words.get(feature, 0) + result.full_attr[t].double()

    def led_to(row):
        row = row.clamp_min(0)
        found = torch.zeros(n_prompt + len(words), dtype=torch.float64)
        if row.sum() < 0.5:
            return None
        row = row / row.sum()
        found[:n_prompt] = row[:n_prompt]
        for j in range(len(words)):
            if row[n_prompt + j] > 0:
                own = led_to(words[j])
                if own is None:
                    found[n_prompt + j] += row[n_prompt + j]
                else:
                    found += row[n_prompt + j] * own
        return found

    if bool(result.full_attr_se.eq(0).all()):
        for t, row in enumerate(rows):
            expected = led_to(row)
            expected = torch.zeros_like(total.full_shares[t]) if expected is None else expected
            torch.testing.assert_close(total.full_shares[t], expected, atol=1e-6, rtol=0)
    sums = total.full_shares.sum(1)
    alive = total.strength > 0
    torch.testing.assert_close(sums[alive], torch.ones_like(sums[alive]))
    assert sums[~alive].eq(0).all()
    assert (total.shares >= 0).all()
    if output_unit is None:
        torch.testing.assert_close(total.shares, total.direct)
    assert str(total).count("⇐") == len(result.output_tokens)


def test_span_shares_leave_out_what_is_within_the_span():
    """By all chains into the span, of words of one and of two tokens."""
    result = GenerationAttributionResult.load(DATA / "rag.safetensors")
    total = result.total(level="paragraph", n_resamples=0)
    pieces = [piece.feature for piece in result.output_pieces]
    nodes = total.links()["features"]

    def to(columns, shares, features, others):
        found = torch.zeros(len(total.names), dtype=torch.float64)
        found[columns] += torch.tensor(shares, dtype=torch.float64)
        for feature, share in zip(features, others, strict=True):
            found += share * to(*nodes[feature])
        return found

    rows = total.links()["tokens"]
    for start, stop in ((6, 14), (0, 28), (13, 20), (8, 9)):
        whole, found = 0.0, torch.zeros(len(total.names), dtype=torch.float64)
        within = {f for f in pieces[start:stop] if f not in pieces[:start] + pieces[stop:]}
        for t in range(start, stop):
            columns, shares, features, others = rows[t]
            kept = [(f, s) for f, s in zip(features, others, strict=True) if f not in within]
            strength = float(total.strength[t])
            whole += strength * (sum(shares) + sum(s for _, s in kept))
            found += strength * to(columns, shares, [f for f, _ in kept], [s for _, s in kept])
        # The links of a page have five digits.
        assert total.span(start, stop)[0].tolist() == pytest.approx(
            (found / whole).tolist(), abs=1e-4
        )


def test_whole_answer_shares_are_close_to_its_exact_attribution():
    """Of the answer held as it is, by all coalitions of the passages."""
    result = GenerationAttributionResult.load(DATA / "rag.safetensors")
    exact = result.answer.attributions / result.answer.attributions.sum()
    shares = result.total(level="paragraph").span()[0]
    assert shares.argmax() == exact.argmax()
    assert float((shares - exact).abs().max()) < 0.05


def test_sentence_shares_sum_before_clipping(model, tokenizer):
    result = explained(model, tokenizer)
    total = result.total(level="sentence")
    names, sums = result.at_level("sentence")
    assert total.names == names
    first = sums[1].clamp_min(0).double()
    assert len(names) == 2
    assert first.sum() > total.floor
    output = result.output_attr[1].clamp_min(0).double().sum()
    torch.testing.assert_close(total.direct[1], first / (first.sum() + output))
    with pytest.raises(ValueError, match="there is no level 'page'"):
        result.total(level="page")


def test_omitted_amount_is_reported(model, tokenizer):
    result = explained(model, tokenizer)
    total = result.total()
    sizes = result.full_attr.double()
    negative = sizes.clamp_max(0).abs().sum(1) / sizes.abs().sum(1)
    torch.testing.assert_close(total.negative, negative)
    assert "for their sign" in str(total)
    assert total.uncertain.eq(0).all()
    assert total.shares_se.eq(0).all()
    assert result.total(floor=1e6).shares.eq(0).all()
    assert "nothing in particular" in str(result.total(floor=1e6))


def test_constant_slots_have_zero_share(known, absent, tmp_path):
    """A regression does not have to find out what replacements say."""
    (document,) = documents(1, seed=4)
    result = attribute(*known, document, "Shapley, kernel", absent)
    matches = [m for part in ("prompt", "output") for m in result.provenance["matches"][part]]
    constant = [column for column, match in enumerate(matches) if match["constant"]]
    assert len(constant) > 5
    assert (result.full_attr[:, constant] == 0).all()
    assert (result.full_attr_se[:, constant] == 0).all()
    assert result.efficiency_gap.abs().max() < 1e-4
    result.save(tmp_path / "result.safetensors")
    again = GenerationAttributionResult.load(tmp_path / "result.safetensors")
    for refitted in (result.refit(KernelShap), again.refit(KernelShap)):
        torch.testing.assert_close(refitted.full_attr, result.full_attr)
        torch.testing.assert_close(refitted.full_attr_se, result.full_attr_se)


@pytest.mark.parametrize(
    ("method", "n_samples"), [(ShapleyValueSampling, 24), (KernelShap, 24 * 12)]
)
def test_errors_equal_the_spread_over_seeds(model, tokenizer, method, n_samples):
    found, told, wholes, of_wholes = [], [], [], []
    for seed in range(6):
        result = explained(
            model, tokenizer, method, baselines="<unk>", n_samples=n_samples, seed=seed
        )
        total = result.total(floor=0, n_resamples=8)
        found.append(total.shares)
        told.append(total.shares_se)
        wholes.append(total.span()[0])
        of_wholes.append(total.span_se()[0])
    for shares, errors in ((found, told), (wholes, of_wholes)):
        spread = torch.stack(shares).std(0).square().mean().sqrt()
        stated = torch.stack(errors).square().mean().sqrt()
        assert 0.5 < float(stated / spread) < 2.5  # without interactions it is larger


def test_equal_seeds_resample_equal_groups(model, tokenizer, tmp_path):
    result = explained(model, tokenizer, ShapleyValueSampling, n_samples=10)
    result.save(tmp_path / "r.safetensors")
    again = GenerationAttributionResult.load(tmp_path / "r.safetensors").total()
    assert torch.equal(result.total().shares_se, again.shares_se)
    assert again.shares_se.gt(0).any()
    assert result.total(n_resamples=0).shares_se.isnan().any()


INSIDE = {
    "gradients": lambda model: LayerIntegratedGradients(model, None),
    "expected gradients": lambda model: LayerGradientShap(model, None),
    "gradient x activation": lambda model: LayerGradientXActivation(model, None),
    "saliency": LayerSaliency,
    "linear": EquivalentLinearSystem,
    "slope": lambda model: EquivalentLinearSystem(model, norm="l2"),
    "weights": AttentionWeights,
    "alti": lambda model: AttentionRollout(model, "alti"),
}
OUTSIDE = {
    "kernel": KernelShap,
    "lime": Lime,
    "inclusion": FeatureInclusion,
    "partition": PartitionShap,
    "hierarchical": HierarchicalAblation,
    "smile": lambda model: Smile(model, lambda a, b: float(a != b)),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [*INSIDE, *OUTSIDE])
def test_every_method_has_totals_at_every_level(model, tokenizer, name):
    text = "Dave lives in Austin. He has a dog."
    inp = TextSegmentInput(text, tokenizer, ("sentence", "word"), baselines="<unk>")
    method = (INSIDE | OUTSIDE)[name](model)
    if isinstance(method, AttentionRollout | AttentionWeights):
        of = GenerationAttentionAttribution
    else:
        of = GenerationGradientAttribution if name in INSIDE else GenerationAttribution
    arguments = {"n_samples": 24} if name in ("kernel", "lime", "smile", "partition") else {}
    result = of(method, tokenizer).attribute(inp, " He won", **arguments)
    held = max(len(result.output_features or ()), 0)
    for level, n_parts in ((None, 8), ("sentence", 2)):
        total = result.total(level=level, n_resamples=0)
        assert len(total.names) == n_parts
        assert (total.full_shares >= 0).all()
        sums, alive = total.full_shares.sum(1), total.strength > 0
        assert alive.any() or name == "smile"  # of which few samples tell nothing for certain
        torch.testing.assert_close(sums, alive.double())
        # The recursion: of what is written, what led to it; else it begins there itself.
        for t in range(len(sums)):
            expected = torch.cat([total.direct[t], torch.zeros(held, dtype=torch.float64)])
            for j in range(held):
                own = total.full_shares[j] if alive[j] else torch.eye(n_parts + held)[n_parts + j]
                expected = expected + total.direct_output[t, j] * own.double()
            torch.testing.assert_close(total.full_shares[t], expected, atol=1e-9, rtol=0)
        assert total.to_dict()["names"] == total.names
        assert str(total).count("⇐") == len(sums)


def test_total_plots(model, tokenizer):
    result = explained(model, tokenizer, output_unit="word")
    total = result.total()
    for draw in (total.plot, lambda: result.plot_flow(-1, total=True), total.plot_flow):
        figure, axes = draw()
        assert axes.figure is figure
    few, more = (len(result.plot_flow(total=True, most=most)[1].patches) for most in (1, 2))
    assert few < more
    assert total.plot(cmap="Greens")[1].images[0].cmap.name == "Greens"
    token = max(t for t in range(len(total.strength)) if total.strength[t] > 0)
    prompt, output = total.flow(token)
    assert float(prompt.sum()) + float(total.output_shares[token].sum()) == pytest.approx(1)
    assert float(prompt[token].sum() + output[token].sum()) == pytest.approx(1)


def test_bad_arguments_are_refused(model, tokenizer):
    result = explained(model, tokenizer)
    with pytest.raises(ValueError, match="`floor` is -1"):
        result.total(-1)
    with pytest.raises(ValueError, match="`n_resamples` is 1"):
        result.total(n_resamples=1)
    with pytest.raises(ValueError, match="there is no target token 99"):
        result.route(99)
    words = explained(model, tokenizer, output_unit="word").refit(attr_target="prob")
    with pytest.raises(ValueError, match='refit\\(attr_target="log_prob"\\)'):
        words.total()
    assert result.refit(attr_target="prob").total().shares.gt(0).any()


def test_total_html_repr_is_a_table(model, tokenizer):
    """The names of the largest shares, escaped, in the order of `why`."""
    import html
    import re

    inp = TextSegmentInput("Ann <b>& Bob met. They are", tokenizer, baselines="delete")
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    found = attribution.attribute(inp, gen_args={"max_new_tokens": 4}).total()
    rows = re.findall(r"<tr><th[^>]*>(.*?)</th><td[^>]*>(.*?)</td></tr>", found._repr_html_())
    assert len(rows) == len(found.output_tokens)
    for t, (_, told) in enumerate(rows):
        percents = [int(n) for n in re.findall(r"<b>(\d+)\u00a0%</b>", told)]
        expected = [share for share in found.why(t, 3) if share.share >= 0.005]
        assert percents == [round(100 * share.share) for share in expected]
        if not expected:
            assert told == "nothing in particular"
        for share in expected:
            assert html.escape(" ".join(share.name.split())) in told
