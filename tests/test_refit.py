"""Answers without another model call, against attributions that did call it."""

import warnings
from types import SimpleNamespace

import pytest
import tiny
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import (
    FeatureAblation,
    KernelShap,
    Lime,
    ShapleyValues,
    ShapleyValueSampling,
    TextTemplateInput,
)
from reference import loop_log_probs, tokens_read

from captum_llm_ext import (
    FeatureInclusion,
    GenerationAttribution,
    GenerationAttributionResult,
    PartitionShap,
    Smile,
    TextSegmentInput,
)
from captum_llm_ext.coalitions import Plan, Scope, plan_pairs, solve_lime
from captum_llm_ext.methods.estimators import _ESTIMATORS, Budget, estimator
from captum_llm_ext.result.refit import SOLVERS, convert

PROMPT = "Dave lives in Austin."
TARGET = " golf and chess"
SHAPLEY = [KernelShap, ShapleyValueSampling, ShapleyValues]


def attribute(model, tokenizer, method, *, prompt=PROMPT, attr_target="log_prob", **arguments):
    inp = arguments.pop("inp", None) or TextSegmentInput(
        prompt, tokenizer, unit=arguments.pop("unit", "word"), baselines="delete"
    )
    method = method if isinstance(method, PartitionShap | Lime) else method(model)
    attribution = GenerationAttribution(method, tokenizer, attr_target=attr_target)
    return attribution.attribute(inp, arguments.pop("target", TARGET), **arguments)


@pytest.mark.parametrize("kind", _ESTIMATORS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("n_features", [3, 30])
@pytest.mark.filterwarnings("ignore:exact Shapley values")
def test_estimators_of_all_methods_can_solve_again(model, tokenizer, kind, n_features):
    """Otherwise sums over words lose their errors, and files cannot be refitted."""
    method = kind(model, tokenizer) if kind is Smile else kind(model)
    tree = ((0, 1), *range(2, n_features))
    found = estimator(method, n_features, Budget(), deterministic=True, tree=tree)
    assert found.name in SOLVERS


@pytest.fixture
def counted(model):
    """How often the model ran."""
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(1))
    yield calls
    handle.remove()


def reloaded(result, tmp_path):
    result.save(tmp_path / "result.safetensors")
    return GenerationAttributionResult.load(tmp_path / "result.safetensors")


# Spans


@pytest.mark.parametrize("method", [KernelShap, ShapleyValueSampling, Lime, PartitionShap])
@pytest.mark.parametrize("output_unit", ["token", "word"])
def test_span_of_one_token_equals_the_token(model, tokenizer, method, output_unit):
    result = attribute(
        model,
        tokenizer,
        method,
        output_unit=output_unit,
        n_samples=12 if method is ShapleyValueSampling else 80,
        prompt="Dave lives in Austin. He has a dog.",
    )
    for t in range(len(result.target)):
        span = result.attribute_span(t)
        assert (span.start, span.stop, span.tokens) == (t, t + 1, [result.output_tokens[t]])
        assert torch.equal(span.values, result.full_attr[t])
        torch.testing.assert_close(
            span.standard_errors, result.full_attr_se[t], equal_nan=True, atol=1e-4, rtol=1e-3
        )
        assert [cause[:2] for cause in span.top(3)] == [c[:2] for c in result.why(t, 3)]
    assert result.attribute_span(-1).start == len(result.target) - 1


@pytest.mark.parametrize("method", SHAPLEY)
def test_span_explains_its_joint_log_probability(model, tokenizer, method):
    """Shapley values are additive: the span's are those of the game of its summed values."""
    result = attribute(model, tokenizer, method, n_samples=None)
    span = result.attribute_span(0, len(result.target))
    total = (result.full_values - result.empty_values).sum()
    torch.testing.assert_close(span.values.sum(), total, atol=1e-4, rtol=1e-5)
    assert "←" in str(span)
    prompt_only = attribute(model, tokenizer, method, output_unit=None)
    whole = prompt_only.attribute_span(0, len(result.target))
    torch.testing.assert_close(whole.values, prompt_only.seq_attr, atol=1e-5, rtol=1e-5)


def test_span_errors_account_for_shared_coalitions(model, tokenizer):
    """Against the spread of the sum over seeds; neither sum nor root of squares of the errors."""
    prompt = "one two three four five six seven eight nine ten eleven"
    found, told, summed = [], [], []
    for seed in range(20):
        result = attribute(
            model, tokenizer, ShapleyValueSampling, prompt=prompt, n_samples=10, seed=seed
        )
        span = result.attribute_span(0, 3)
        found.append(span.values[:11])
        told.append(span.standard_errors[:11])
        summed.append(result.token_attr_se[:3, :11].sum(0))
    spread = torch.stack(found).var(0).mean().sqrt()
    # Errors carry Student's t for five pairs, 2.776 / 1.96.
    stated = torch.stack(told).square().mean().sqrt() / (2.776 / 1.96)
    assert float(stated / spread) == pytest.approx(1, rel=0.3)
    bound = torch.stack(summed).square().mean().sqrt() / (2.776 / 1.96)
    assert stated < 0.95 * bound


def test_span_over_generated_words_has_an_error_bound(model, tokenizer):
    prompt = "one two three four five six seven eight"
    result = attribute(
        model, tokenizer, KernelShap, prompt=prompt, n_samples=60, output_unit="word"
    )
    assert any(column >= 0 for column in result.design.required)  # a word of several tokens
    n_target = len(result.target)
    span = result.attribute_span(0, n_target)
    assert (span.standard_errors <= result.full_attr_se.sum(0) + 1e-5).all()
    assert span.standard_errors[:8].gt(0).all()


def test_invalid_spans_are_refused(model, tokenizer):
    result = attribute(model, tokenizer, KernelShap, attr_target="prob")
    with pytest.raises(ValueError, match='refit\\(attr_target="log_prob"\\)'):
        result.attribute_span(0, 2)
    assert result.attribute_span(1).values.shape == result.full_attr[1].shape
    for start, stop in ((9, None), (3, 2), (2, 2)):
        with pytest.raises(ValueError, match="there is no target token"):
            result.attribute_span(start, stop)
    span = result.refit(attr_target="log_prob").attribute_span(0, 2)
    same = attribute(model, tokenizer, KernelShap).attribute_span(0, 2)
    # Among penalties that fit equally well, rounding chooses: neighbours differ by so much.
    torch.testing.assert_close(span.values, same.values, atol=2e-3, rtol=1e-4)


# Other methods


@pytest.mark.parametrize("output_unit", ["token", "word", None])
@pytest.mark.parametrize(
    "method", [*SHAPLEY, FeatureAblation, PartitionShap], ids=lambda kind: kind.__name__
)
def test_enumeration_refits_every_method_exactly(
    model, tokenizer, method, output_unit, counted, tmp_path
):
    arguments = {"output_unit": output_unit, "unit": ("sentence", "word")}
    prompt = "Dave lives. He won."
    exact = attribute(model, tokenizer, ShapleyValues, prompt=prompt, **arguments)
    many = {} if method in (ShapleyValues, FeatureAblation) else {"n_samples": 10**4}
    expected = attribute(model, tokenizer, method, prompt=prompt, **arguments, **many)
    if method is PartitionShap and output_unit == "word":
        assert expected.provenance["estimator"] == "exact Owen values"
    n_calls = len(counted)
    found = reloaded(exact, tmp_path).refit(method)
    again = found.refit(ShapleyValues)
    assert len(counted) == n_calls
    # The values were stored in float32.
    torch.testing.assert_close(found.full_attr, expected.full_attr, atol=1e-4, rtol=1e-4)
    assert found.full_attr_se.eq(0).all()
    assert found.provenance["method"] == method.__name__
    assert found.provenance["estimate"] is False
    assert found.provenance["refitted_from"] == ["ShapleyValues", "log_prob"]
    torch.testing.assert_close(again.full_attr, exact.full_attr, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.masks, exact.masks)


@pytest.mark.parametrize("planned", [KernelShap, ShapleyValueSampling])
@pytest.mark.parametrize("wanted", SHAPLEY)
def test_samples_of_all_sizes_refit_shapley_values(model, tokenizer, planned, wanted):
    prompt = "Dave lives in Austin. He has a dog"
    exact = attribute(model, tokenizer, ShapleyValues, prompt=prompt, max_exact_features=12)
    n_samples = {KernelShap: 300, ShapleyValueSampling: 30}[planned]
    sampled = attribute(model, tokenizer, planned, prompt=prompt, n_samples=n_samples)
    assert sampled.provenance["estimate"]
    found = sampled.refit(wanted)
    error = (found.full_attr - exact.full_attr).abs()
    assert (error <= 5 * found.full_attr_se + 1e-4).all()
    assert found.full_attr_se.max() < exact.full_attr.abs().max() / 2
    assert found.efficiency_gap.abs().max() < 1e-5
    assert found.provenance["estimate"]


def test_refit_with_the_same_method_is_identical(model, tokenizer, tmp_path):
    prompt = "Dave lives in Austin. He has a dog"
    methods = [
        (KernelShap(model), 100),
        (ShapleyValueSampling(model), 8),
        (Lime(model), 100),
        (Lime(model, interpretable_model=SkLearnRidge(alpha=0.3)), 100),
        (FeatureAblation(model), None),
        (PartitionShap(model), 60),
        (PartitionShap(model, scheme="splits"), 20),
    ]
    inp = TextSegmentInput(prompt, tokenizer, unit=("sentence", "word"), baselines="delete")
    for method, n_samples in methods:
        attribution = GenerationAttribution(method, tokenizer)
        result = attribution.attribute(inp, TARGET, n_samples=n_samples)
        assert result.design.solved in SOLVERS
        for again in (result.refit(), reloaded(result, tmp_path).refit(), result.refit(method)):
            torch.testing.assert_close(again.full_attr, result.full_attr, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(
                again.full_attr_se, result.full_attr_se, atol=1e-4, rtol=1e-3, equal_nan=True
            )


def test_lime_refit_from_all_sizes_equals_lime(model, tokenizer):
    """Weights turn uniform sizes into fair coins: the fit approaches that of enumeration."""
    ridge = Lime(model, interpretable_model=SkLearnRidge(alpha=0.01))
    prompt = "Dave lives in Austin."
    for output_unit in ("token", "word"):
        arguments = {"prompt": prompt, "output_unit": output_unit}
        exact = attribute(model, tokenizer, ShapleyValues, **arguments).refit(ridge)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the budget of a method that enumerates
            walks = attribute(
                model, tokenizer, ShapleyValueSampling, **arguments, n_samples=16, num_trials=40
            )
        if walks.design.planned != "antithetic permutations":
            continue
        found = walks.refit(ridge)
        assert found.design.options["law"] == "uniform"
        error = (found.full_attr - exact.full_attr).abs()
        assert (error <= 5 * found.full_attr_se + 0.02).all()


@pytest.mark.parametrize("required", [False, True])
def test_reweighted_pairs_converge_to_enumerated_lime(required):
    """One target that sees four columns, with or without a fifth that must be present."""
    generator = torch.Generator().manual_seed(0)
    worth = torch.randn(16, generator=generator).double()
    scope = Scope(torch.tensor([4]), torch.tensor([4 if required else -1]))

    def score(masks):
        values = worth[(masks[:, :4].long() << torch.arange(4)).sum(1)]
        return values.masked_fill(~masks[:, 4] & required, torch.nan)[:, None]

    def anchored(masks, draws):
        ends = torch.tensor([[True] * 5, [False] * 4 + [True], [False] * 5])
        masks, n = torch.cat([ends, masks]), len(ends)
        return Plan(masks, torch.cat([torch.arange(n), draws + n]), n_anchors=n)

    codes = torch.arange(32)
    every = (codes[:, None] >> torch.arange(5) & 1).bool()
    plan = anchored(every, codes)
    expected = solve_lime(plan, score(plan.masks), scope, penalty=None).attributions[0, :4]
    pairs = plan_pairs(20, 40000, generator=generator)  # of more features: sizes stay uniform
    plan = anchored(pairs.masks[:, :5], pairs.draws)
    options = {"kernel_width": 1.0, "penalty": None, "alpha": 0.0}
    found = SOLVERS["local linear model"](plan, score(plan.masks), scope, **options, law="uniform")
    error = (found.attributions[0, :4] - expected).abs()
    assert (error <= 4 * found.standard_errors[0, :4]).all()
    assert found.standard_errors.max() < 0.05
    unweighted = SOLVERS["local linear model"](plan, score(plan.masks), scope, **options)
    bias = (unweighted.attributions[0, :4] - expected).abs()
    assert (bias > 4 * unweighted.standard_errors[0, :4]).any()


def test_lime_refit_warns_of_few_effective_coalitions(model, tokenizer):
    prompt = " ".join(f"w{i}" for i in range(24))
    result = attribute(model, tokenizer, KernelShap, prompt=prompt, n_samples=60, output_unit=None)
    with pytest.warns(
        UserWarning, match=r"\d+ coalitions of all sizes are worth about \d+ of Lime"
    ):
        result.refit(Lime)


@pytest.mark.parametrize("planned", [FeatureAblation, Lime, PartitionShap])
def test_refit_without_needed_coalitions_is_refused(model, tokenizer, planned):
    prompt = "Dave lives in Austin. He has a dog"
    arguments = {} if planned is FeatureAblation else {"n_samples": 60}
    result = attribute(
        model, tokenizer, planned, prompt=prompt, unit=("sentence", "word"), **arguments
    )
    for wanted in SHAPLEY:
        with pytest.raises(ValueError, match=f"determine Shapley.*again with {wanted.__name__}"):
            result.refit(wanted)
    if planned is not Lime:
        with pytest.raises(ValueError, match="do not determine Lime's estimates"):
            result.refit(Lime)
    if planned is not FeatureAblation:
        with pytest.raises(ValueError, match=r"absence alone.*again with FeatureAblation"):
            result.refit(FeatureAblation)
    if planned is not PartitionShap:
        with pytest.raises(ValueError, match="do not separate every group"):
            result.refit(PartitionShap)


def test_unsupported_refit_methods_are_refused(model, tokenizer):
    result = attribute(model, tokenizer, KernelShap)

    class Own(FeatureAblation):
        pass

    with pytest.raises(ValueError, match="Own cannot be solved from coalitions: give "):
        result.refit(Own)
    driven = attribute(model, tokenizer, Own)
    with pytest.raises(ValueError, match="cannot be solved again"):
        driven.refit()
    assert driven.attribute_span(0, 2).standard_errors[:4].isnan().all()
    torch.testing.assert_close(
        driven.refit(FeatureAblation).full_attr,
        attribute(model, tokenizer, FeatureAblation).full_attr,
        atol=1e-4,
        rtol=1e-4,
    )

    def kernel(*_, **__):
        return 1.0

    with pytest.raises(ValueError, match="kernel or model of your own"):
        result.refit(Lime(model, similarity_func=kernel))


def test_column_groups_count_once(model, tokenizer):
    inp = TextTemplateInput("{} lives in {} and {}.", ["Dave", "Austin", "Waco"], mask=[0, 1, 0])
    result = attribute(model, tokenizer, ShapleyValues, inp=inp)
    found = result.refit(KernelShap)
    torch.testing.assert_close(found.full_attr, result.full_attr, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.token_attr[:, 0], found.token_attr[:, 2])
    ablated = result.refit(FeatureAblation)
    expected = attribute(model, tokenizer, FeatureAblation, inp=inp)
    torch.testing.assert_close(ablated.full_attr, expected.full_attr, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.attribute_span(0, 2).values, result.full_attr[:2].sum(0))


# Other values


@pytest.mark.parametrize("output_unit", ["token", None])
def test_probabilities_and_log_probabilities_convert(model, tokenizer, output_unit, counted):
    arguments = {"output_unit": output_unit}
    results = {
        unit: attribute(model, tokenizer, ShapleyValues, attr_target=unit, **arguments)
        for unit in ("log_prob", "prob")
    }
    n_calls = len(counted)
    for given, wanted in (("log_prob", "prob"), ("prob", "log_prob")):
        found, expected = results[given].refit(attr_target=wanted), results[wanted]
        torch.testing.assert_close(found.full_attr, expected.full_attr, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(found.full_values, expected.full_values, atol=1e-4, rtol=1e-3)
        assert found.provenance["attr_target"] == wanted
        if output_unit is None or wanted == "log_prob":
            torch.testing.assert_close(found.seq_attr, expected.seq_attr, atol=1e-4, rtol=1e-3)
        else:  # the joint probability with the output held fixed was not scored
            assert found.seq_attr.isnan().all()
    assert len(counted) == n_calls


def test_log_odds_equal_a_plain_forward(model, tokenizer):
    result = attribute(model, tokenizer, FeatureAblation, output_unit=None)
    found = result.refit(attr_target="log_odds")
    target = result.target.tolist()
    read = tokens_read(target, [True] * len(target), None)
    odds = [
        torch.logit(loop_log_probs(model, tokenizer.encode(text), read, target).exp())
        for text in (PROMPT, "Dave lives Austin.")
    ]
    torch.testing.assert_close(
        found.token_attr[:, 2].double(), odds[0] - odds[1], atol=1e-3, rtol=1e-3
    )
    back = found.refit(attr_target="log_prob")
    torch.testing.assert_close(back.token_attr, result.token_attr, atol=1e-4, rtol=1e-4)


def test_conversions_are_accurate_near_zero_and_one():
    log_odds = torch.tensor([-700.0, -30.0, -1.0, 0.0, 1.0, 30.0]).double()
    log_prob = convert(log_odds, "log_odds", "log_prob")
    exact = [-700.0, -30.0, -1.3132616875182228, -0.6931471805599453, -0.31326168751822286]
    assert log_prob.tolist() == pytest.approx([*exact, -9.357622968839299e-14], rel=1e-12)
    torch.testing.assert_close(
        convert(log_prob, "log_prob", "log_odds"), log_odds, rtol=1e-6, atol=1e-9
    )
    certain = convert(torch.zeros(1).double(), "log_prob", "log_odds")
    assert certain.isfinite().all()
    assert convert(torch.zeros(1).double(), "prob", "log_prob").isfinite().all()


def test_impossible_value_conversions_are_refused(model, tokenizer):
    result = attribute(model, tokenizer, FeatureAblation, attr_target="logit")
    with pytest.raises(ValueError, match="values of 'logit' do not determine 'log_prob'"):
        result.refit(attr_target="log_prob")
    with pytest.raises(ValueError, match="holds no values of foils"):
        attribute(model, tokenizer, FeatureAblation).refit(attr_target="contrast")
    assert torch.equal(result.refit(attr_target="logit").full_attr, result.full_attr)


# Files, stopping, printing


def test_convergence_report(model, tokenizer, tmp_path):
    prompt = "one two three four five six seven eight nine"
    arguments = {"prompt": prompt, "n_samples": 40}
    assert attribute(model, tokenizer, KernelShap, **arguments).converged is None
    loose = attribute(model, tokenizer, KernelShap, tol=0.5, **arguments)
    assert loose.converged is True
    tight = attribute(model, tokenizer, KernelShap, tol=1e-9, max_evaluations=100, **arguments)
    assert tight.converged is False
    assert reloaded(tight, tmp_path).converged is False
    assert "`tol` was not met" in str(tight)
    assert "`tol`" not in str(loose)


def test_progress_bar_forecasts_remaining_evaluations(model, tokenizer, capsys):
    result = attribute(
        model,
        tokenizer,
        KernelShap,
        prompt="one two three four five six seven eight nine",
        n_samples=40,
        tol=0.15,
        show_progress=True,
    )
    shown = capsys.readouterr().err
    assert "about" in shown
    assert "more" in shown
    assert f" 100 % ({result.n_evaluations} of {result.n_evaluations}, " in shown.splitlines()[-1]


def test_repeated_coalitions_are_not_rescored(tokenizer):
    model = tiny.llama(len(tokenizer))
    rows: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    inp = TextSegmentInput("one two three four", tokenizer, baselines="delete")
    try:
        result = attribute(
            model,
            tokenizer,
            ShapleyValueSampling,
            inp=inp,
            output_unit=None,
            n_samples=3,
            tol=1e-9,
            max_evaluations=10**4,
        )
    finally:
        handle.remove()
    assert len(result.masks) > 60
    assert result.n_evaluations <= 16
    assert sum(rows) <= 16 + 4 + 36  # comparisons and what the probe looks at included


# One in, and what says the same


@pytest.mark.parametrize("output_unit", ["token", "word", None])
def test_inclusion_equals_the_effect_of_one_feature_alone(model, tokenizer, output_unit, tmp_path):
    arguments = {"output_unit": output_unit}
    found = attribute(model, tokenizer, FeatureInclusion, **arguments)
    n_prompt, target = len(found.input_tokens), found.target.tolist()
    inp = TextSegmentInput(PROMPT, tokenizer, baselines="delete")
    read = tokens_read(target, [True] * len(target), None)  # nothing before the first

    def first_value(mask):
        ids = inp.to_model_input(torch.tensor([mask]).float())[0].tolist()
        return loop_log_probs(model, ids, read[:1], target[:1])[0]

    empty = first_value([0] * n_prompt)
    for feature in range(n_prompt):
        alone = first_value([int(i == feature) for i in range(n_prompt)])
        assert float(found.token_attr[0, feature]) == pytest.approx(float(alone - empty), abs=1e-4)
    assert found.full_attr_se.eq(0).all()
    assert found.provenance["estimate"] is False
    exact = attribute(model, tokenizer, ShapleyValues, **arguments)
    again = reloaded(exact, tmp_path).refit(FeatureInclusion)
    torch.testing.assert_close(again.full_attr, found.full_attr, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="do not hold each feature's presence alone"):
        attribute(model, tokenizer, FeatureAblation, **arguments).refit(FeatureInclusion)
    with pytest.raises(ValueError, match="`n_samples` has no meaning for FeatureInclusion"):
        attribute(model, tokenizer, FeatureInclusion, n_samples=10)


def test_tensor_inclusion_equals_ablation_with_swapped_baselines():
    inputs = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    def forward(x):
        return x.prod(1) + x[:, 0] * 2 + x[:, 1].square()

    found = FeatureInclusion(forward).attribute(inputs, perturbations_per_eval=2)
    assert found.tolist() == [[2.0, 4.0, 0.0], [8.0, 25.0, 0.0]]
    # Alone against zeros is as left out, with inputs and baselines changed over.
    swapped = FeatureAblation(lambda x: -forward(x)).attribute(torch.zeros(2, 3), baselines=inputs)
    torch.testing.assert_close(found, swapped)


def test_redundant_features_warn(tokenizer):
    """A model that adds 3 to every logit's gap if either of two words stands."""

    first, second, third, _ = ids = tokenizer.encode("qxzj", add_special_tokens=False)
    assert len(set(ids)) == 4

    class Either(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            either = ((input_ids == first) | (input_ids == second)).cumsum(1) > 0
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            logits[..., 7] = 3.0 * either + 0.2 * ((input_ids == third).cumsum(1) > 0)
            return SimpleNamespace(logits=logits)

    inp = TextSegmentInput("qxzj", tokenizer, unit="token", add_special_tokens=False, baselines=20)
    result = attribute(Either(), tokenizer, ShapleyValues, inp=inp, target=[7], attr_target="logit")
    (pair,) = result.redundant_pairs()
    assert (pair.target, pair.columns) == (0, (0, 1))
    assert pair.alone == pytest.approx((0, 0), abs=1e-6)
    assert pair.together == pytest.approx(3.0, abs=1e-5)
    assert "say the same" in str(result)
    assert float(result.additivity[0]) < 0.9
    plain = attribute(Either(), tokenizer, FeatureAblation, inp=inp, target=[7])
    assert plain.additivity.isnan().all()
    with pytest.raises(ValueError, match="do not determine which features are redundant"):
        plain.redundant_pairs()
