"""Attributions of the whole answer to the largest parts of the prompt, against plain passes.

The reference is every coalition of the parts, each in one uncached float64 pass over the answer as
it is, and the defining formula of Shapley values.
"""

import json
import re
from functools import cache
from itertools import product

import pytest
import torch
from captum.attr import FeatureAblation, KernelShap, Lime, ShapleyValues, ShapleyValueSampling
from reference import shapley_values

from captum_llm_ext import (
    ChatInput,
    CorpusBaselines,
    FeatureInclusion,
    GenerationAttribution,
    GenerationAttributionResult,
    PartitionShap,
    TextSegmentInput,
    load_demo,
)
from captum_llm_ext.text.inputs import as_prompt

PROMPT = "Dave lives in Palm Coast, FL. He is a lawyer. His personal interests include"
TARGET = " poker, surfing and history."


@pytest.fixture(scope="module")
def demo():
    return load_demo()


def _log_prob(model, ids, target):
    """Of the whole target after a prompt, in one plain pass."""
    row = torch.tensor([[*ids, *target]])
    with torch.no_grad():
        logits = model(input_ids=row, use_cache=False).logits[0, len(ids) - 1 : -1]
    return float(logits.double().log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum())


def _without(tokenizer, sentences, kept):
    """The prompt's ids without those of some sentences, which end before the next one's space."""
    starts = [PROMPT.index(text) - (i > 0) for i, text in enumerate(sentences)]
    encoded = tokenizer(PROMPT, return_offsets_mapping=True)
    part = [sum(start <= a for start in starts) - 1 for a, _ in encoded["offset_mapping"]]
    special = [b == a for a, b in encoded["offset_mapping"]]
    rows = zip(encoded["input_ids"], part, special, strict=True)
    return [token for token, i, is_fixed in rows if is_fixed or i in kept]


SENTENCES = ["Dave lives in Palm Coast, FL.", "He is a lawyer.", "His personal interests include"]


@pytest.fixture(scope="module")
def truth(demo):
    """A value per set of sentences, from a float64 copy of the model."""
    model, tokenizer, _ = load_demo()
    model, target = model.double(), tokenizer(TARGET, add_special_tokens=False)["input_ids"]
    return cache(lambda kept: _log_prob(model, _without(tokenizer, SENTENCES, kept), target))


def _attribute(demo, method=KernelShap, *, unit="word", target=TARGET, baselines="delete", **how):
    model, tokenizer, _ = demo
    inp = TextSegmentInput(PROMPT, tokenizer, unit, baselines=baselines)
    return GenerationAttribution(method(model), tokenizer).attribute(inp, target, **how)


EVERYTHING = frozenset({0, 1, 2})
pytestmark = pytest.mark.filterwarnings("ignore:deleted text:UserWarning")


@pytest.mark.parametrize("method", [KernelShap, ShapleyValueSampling, PartitionShap])
@pytest.mark.parametrize("output_unit", ["token", None])
def test_shapley_values_of_the_whole_answer_are_those_of_all_coalitions(
    demo, truth, method, output_unit
):
    result = _attribute(demo, method, output_unit=output_unit)
    found = result.answer
    assert found.level == "sentence"
    assert found.estimator == "exact"
    expected = shapley_values(truth, 3)
    assert found.attributions.tolist() == pytest.approx(expected, abs=1e-3)  # float32 passes
    assert found.standard_errors.tolist() == [0.0] * 3
    gain = truth(EVERYTHING) - truth(frozenset())
    assert found.gain == pytest.approx(gain, abs=1e-3)
    assert sum(found.attributions.tolist()) == pytest.approx(gain, abs=1e-3)


@pytest.mark.parametrize("method", [FeatureAblation, FeatureInclusion])
def test_one_part_at_a_time_is_that_of_these_rows(demo, truth, method):
    found = _attribute(demo, method).answer
    if method is FeatureAblation:
        expected = [truth(EVERYTHING) - truth(EVERYTHING - {i}) for i in range(3)]
    else:
        expected = [truth(frozenset({i})) - truth(frozenset()) for i in range(3)]
    assert found.attributions.tolist() == pytest.approx(expected, abs=1e-3)
    assert found.gain == pytest.approx(truth(EVERYTHING) - truth(frozenset()), abs=1e-3)


def test_the_rows_at_hand_are_enough_where_they_hold_the_answer(demo, truth):
    result = _attribute(demo, ShapleyValues, unit="sentence", output_unit=None)
    assert result.answer.n_evaluations == 0
    assert result.n_evaluations == 2**3
    expected = shapley_values(truth, 3)
    assert result.answer.attributions.tolist() == pytest.approx(expected, abs=1e-3)
    assert result.answer.gain == pytest.approx(truth(EVERYTHING) - truth(frozenset()), abs=1e-3)


def test_it_costs_little_and_can_be_left_out(demo):
    _, _, texts = demo
    for baselines in ("delete", CorpusBaselines(texts)):
        result = _attribute(demo, baselines=baselines, n_samples=160)
        plain = _attribute(demo, baselines=baselines, n_samples=160, whole_answer=False)
        assert plain.answer is None
        for name in ("token_attr", "output_attr", "token_attr_se", "values", "masks", "draws"):
            assert torch.equal(getattr(plain, name), getattr(result, name))
        more = result.n_evaluations - plain.n_evaluations
        assert 0 < more == result.answer.n_evaluations <= plain.n_evaluations / 8
    # What the coalitions hold in any case is told.
    held = _attribute(demo, unit="sentence", output_unit=None, whole_answer=False)
    assert held.answer is not None


def test_random_replacements_are_averaged_with_an_error_that_holds(demo):
    """Against the mean over draws rendered by the input itself, one pass each."""
    model, tokenizer, texts = demo
    baselines = CorpusBaselines(texts)
    target = tokenizer(TARGET, add_special_tokens=False)["input_ids"]
    inp = TextSegmentInput(PROMPT, tokenizer, ("sentence", "word"), baselines=baselines)
    prompt, n_draws = as_prompt(inp, tokenizer, None), 16
    part_of = torch.tensor(prompt.levels[0].part_of)
    values = {}
    for kept in product((True, False), repeat=3):
        masks = torch.tensor(kept)[part_of].expand(n_draws, -1)
        rows = prompt.render(masks, torch.Generator().manual_seed(5))
        drawn = torch.tensor([_log_prob(model, row.ids, target) for row in rows])
        values[frozenset(i for i in range(3) if kept[i])] = drawn
    expected = shapley_values(lambda kept: float(values[kept].mean()), 3)
    noise = max(float(v.std()) for v in values.values()) / n_draws**0.5
    z = []
    for seed in range(4):
        result = _attribute(demo, baselines=baselines, seed=seed, n_samples=240)
        found = result.answer
        errors = torch.sqrt(found.standard_errors**2 + noise**2)
        z += ((found.attributions - torch.tensor(expected)) / errors).tolist()
        assert bool((found.standard_errors[:2] > 0).all())
        assert found.empty_error > 0
    assert max(map(abs, z)) < 4
    assert sum(abs(x) < 2 for x in z) >= 10  # of 12


def test_chats_and_captums_groups_have_their_own_parts(demo):
    model, tokenizer, _ = demo
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = [{"role": "user", "content": text} for text in ("Dave is a lawyer.", " He sings.")]
    inp = ChatInput(chat, tokenizer, ("turn", "word"), baselines="delete")
    result = GenerationAttribution(KernelShap(model), tokenizer).attribute(inp, " poker")
    assert result.answer.level == "turn"
    sums = shapley_values(
        lambda kept: _log_prob(
            model,
            inp_ids(tokenizer, [chat[i] for i in sorted(kept)]),
            tokenizer(" poker", add_special_tokens=False)["input_ids"],
        ),
        2,
    )
    assert result.answer.attributions.tolist() == pytest.approx(sums, abs=1e-3)


def inp_ids(tokenizer, messages):
    text = "".join(message["content"] for message in messages)
    return tokenizer(text, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]


def test_methods_of_another_kind_and_joint_probabilities_have_none(demo):
    model, tokenizer, _ = demo
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    assert _attribute(demo, Lime, n_samples=64).answer is None
    attribution = GenerationAttribution(KernelShap(model), tokenizer, "prob")
    assert attribution.attribute(inp, TARGET).answer is None


def test_too_many_parts_for_the_budget_are_estimated_or_left_out(demo):
    model, tokenizer, _ = demo
    jobs = "lawyer plumber dancer pilot nurse teacher banker chemist farmer judge".split()
    ten = " ".join(f"He is a {job}." for job in jobs)

    def attribute(n_samples):
        inp = TextSegmentInput(ten, tokenizer, ("sentence", "word"), baselines="delete")
        attribution = GenerationAttribution(KernelShap(model), tokenizer)
        return attribution.attribute(inp, " poker", n_samples=n_samples)

    found = attribute(800).answer
    assert found.estimator == "paired kernel regression"
    assert 80 <= found.n_evaluations <= 102
    assert bool((found.standard_errors > 0).any())
    assert float(found.attributions.sum()) == pytest.approx(found.gain, abs=1e-3)
    assert attribute(200).answer is None


def test_it_is_kept_in_files_and_told_everywhere(demo, tmp_path):
    result = _attribute(demo)
    path = tmp_path / "r.safetensors"
    result.save(path)
    again = GenerationAttributionResult.load(path)
    assert again.answer.to_dict() == result.answer.to_dict()
    assert torch.equal(again.answer.attributions, result.answer.attributions)
    assert json.dumps(again.to_dict()) == json.dumps(result.to_dict())
    told = result.to_dict()["answer"]
    amounts = result.answer.attributions.tolist()
    assert [part["attribution"] for part in told["parts"]] == amounts
    causes = result.causes().prompt
    assert sorted(c.attribution for c in causes) == pytest.approx(sorted(amounts))
    frame = pytest.importorskip("pandas") and result.to_dataframe("answer")
    assert frame["attribution"].tolist() == amounts
    gain = f"of the {result.answer.gain:.1f} nats that the prompt gives the answer"
    line = str(result).splitlines()[1]
    assert line.startswith("whole answer  ←  ")
    assert line.endswith(f"({gain})")
    for x in amounts:
        assert f"{x:+.2f}" in line
        assert f"{x:+.2f}".replace("-", "−") in result.to_html()
    assert gain in result.to_html()
    assert f"as a whole gives the answer {result.answer.gain:.1f} nats: " in result.narrative()
    for amount in re.findall(r"\(([+−]\d+\.\d+)", result.narrative()):
        assert min(abs(float(amount.replace("−", "-")) - x) for x in amounts) < 0.006


def test_another_method_or_value_takes_it_along_only_if_it_is_the_same(demo):
    result = _attribute(demo)
    assert result.refit(ShapleyValues).answer is result.answer
    assert result.refit(attr_target="prob").answer is None
    assert result.refit(attr_target="log_odds").answer is None


def test_a_resumed_run_tells_the_same(demo, tmp_path):
    path = tmp_path / "run.safetensors"
    first, again = (_attribute(demo, checkpoint=path) for _ in range(2))
    assert torch.equal(first.answer.attributions, again.answer.attributions)
    assert first.n_evaluations == again.n_evaluations
