"""What if the prompt had been another: counterfactuals, total effects, and answers as wholes."""

import json
from itertools import combinations

import pytest
import tiny
import torch
from captum.attr import FeatureAblation
from fact_grammar import Grammar, corpus, load
from ground_truth import Absence, as_input, by_hand, documents

from captum_llm_ext import (
    CorpusBaselines,
    Counterfactual,
    GenerationAttribution,
    RemoteGenerationAttribution,
    Smile,
    TextSegmentInput,
)
from captum_llm_ext.attribution.total_effect import places
from captum_llm_ext.coalitions import Scope, cosine_kernel, plan_anchors, solve_lime
from captum_llm_ext.coalitions.plans import Plan
from captum_llm_ext.methods.smile import wasserstein
from captum_llm_ext.model import Scorer, TokenRow, planned_generation
from captum_llm_ext.remote import CallableProvider
from captum_llm_ext.result.page.changes import change_sentences


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.byte_level()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.llama(len(tokenizer), seed=3)


@pytest.fixture(scope="module")
def known():
    return load()


TEXT = "Dave lives in Austin. He has a dog."
OTHERS = ["Ann", " won", " by", " Paris.", " She", " was", " the", " cat."]


def attribution(model, tokenizer):
    return GenerationAttribution(FeatureAblation(model), tokenizer)


def plain(model, ids, target):
    """Log-probabilities where each target token is said, by one uncached forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *target[:-1]]])).logits[0, len(ids) - 1 :]
    return logits.double().log_softmax(-1)


# Counterfactuals


def brute_force(model, prompts, target, max_size, flips):
    """Minimal sets per token, by trying all; `prompts` renders a set."""
    n, found = len(OTHERS), set()
    for size in range(1, max_size + 1):
        for chosen in combinations(range(n), size):
            flipped = flips(plain(model, prompts(chosen), target))
            for t in flipped:
                if not any(u == t and set(s) <= set(chosen) for u, s in found):
                    found.add((t, chosen))
    return found


@pytest.mark.parametrize("flips", ["argmax", 2.0])
def test_counterfactuals_equal_brute_force(model, tokenizer, flips):
    inp = TextSegmentInput(TEXT, tokenizer, baselines=OTHERS)
    whole = attribution(model, tokenizer)
    search = whole.counterfactuals(inp, flips=flips, max_size=2, gen_args={"max_new_tokens": 3})
    found = list(search)
    target = whole.attribute(inp, gen_args={"max_new_tokens": 3}).target.tolist()

    def prompts(chosen):
        mask = torch.ones(1, inp.n_features, dtype=torch.bool)
        mask[0, list(chosen)] = False
        return inp.render(mask, torch.Generator())[0].ids

    before = plain(model, prompts(()), target)
    own = before[range(len(target)), target]

    def flipped(log_probs):
        if flips == "argmax":
            return (log_probs.argmax(1) != torch.tensor(target)).nonzero()[:, 0].tolist()
        return (own - log_probs[range(len(target)), target] >= flips).nonzero()[:, 0].tolist()

    expected = brute_force(model, prompts, target, 2, flipped)
    assert {(one.token, one.features) for one in found} == expected
    assert {len(one.features) for one in found} >= {1}
    assert all(one.proven_minimal for one in found)
    assert search.proven_up_to == 2
    for one in found:
        log_probs = plain(model, prompts(one.features), target)[one.token]
        told = torch.tensor(one.values[1:], dtype=torch.float64)
        new = log_probs[[target[one.token], int(log_probs.argmax())]]
        torch.testing.assert_close(told, new, atol=1e-5, rtol=0)
        said = model.generate(
            torch.tensor([prompts(one.features)]), do_sample=False, max_new_tokens=3
        )
        assert one.answer == tokenizer.decode(said[0, len(prompts(one.features)) :])
        assert Counterfactual.from_dict(json.loads(json.dumps(one.to_dict()))) == one
        old, new = one.replacements[0]
        assert old in TEXT
        assert new in "".join(OTHERS)
        assert f"→ ‘{new}’" in str(one)


def test_single_feature_counterfactuals_find_known_causes(known):
    right = told = true = 0
    for document in documents(2, seed=21):
        inp, _ = as_input(document, known[1], Absence(by_hand("prompt"), by_hand("continuation")))
        search = attribution(*known).counterfactuals(inp, document.continuation, max_size=1)
        prompt, cut = document.segments("prompt"), len(document.prompt)
        stops = known[1](
            document.continuation, add_special_tokens=False, return_offsets_mapping=True
        )["offset_mapping"]
        slot_at = {
            t: next(
                s.slot for s in document.segments("continuation") if s.start < stop + cut <= s.stop
            )
            for t, (_, stop) in enumerate(stops)
        }
        found = {(slot_at[one.token], prompt[one.features[0]].slot) for one in search}
        other = {slot_at[t] for t in search.already_other}
        given = {segment.slot for segment in prompt}
        expected = {
            (word, cause)
            for word, causes in document.causes.items()
            for cause in causes
            if cause in given and word not in other
        }
        right += len(found & expected)
        told, true = told + len(found), true + len(expected)
    assert right / told >= 0.95
    assert right / true >= 0.95


def test_unsearched_sets_are_reported(model, tokenizer):
    inp = TextSegmentInput(TEXT, tokenizer, baselines=OTHERS)
    whole = attribution(model, tokenizer)
    search = whole.counterfactuals(inp, " won a dog", flips=50.0, max_size=2, budget=20)
    assert list(search) == []
    assert search.proven_up_to == 1
    assert search.n_evaluations <= 20
    n, of = search.tried[2]
    assert 0 < n < of == 28
    assert search.summary.startswith("none up to 1 feature with one draw (of 2 features")
    early = whole.counterfactuals(inp, " won a dog", flips=0.5, order=range(8), max_size=1)
    first = next(early)
    assert first.n_evaluations <= early.n_evaluations <= 9


def test_flips_callable_defines_a_counterfactual(model, tokenizer):
    inp = TextSegmentInput(TEXT, tokenizer, baselines=OTHERS)
    asked = []

    def shorter(flip):
        asked.append(flip)
        return len(flip.new_token) < len(flip.token) and flip.new_log_prob < flip.log_prob

    for one in attribution(model, tokenizer).counterfactuals(
        inp, flips=shorter, max_size=1, gen_args={"max_new_tokens": 4}
    ):
        assert len(one.new_token) < len(one.name)
        assert one.values[1] < one.values[0]
    assert {flip.position for flip in asked} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("token", "said"),
    [("\n", "‘\\n’"), ("\n\n", "‘\\n\\n’"), (" ", "‘␣’"), (" Palm", "‘Palm’"), ("", "nothing")],
)
def test_white_space_token_is_displayed(token, said):
    found = Counterfactual(
        token=0,
        name=token,
        features=(0,),
        names=("FL",),
        replacements=(("FL", ""),),
        new_token=token,
        values=(-0.1, -3.0, -0.2),
        prompt_text="Palm",
        answer="a",
        old_answer="b",
        share_of_draws=1.0,
        proven_minimal=True,
        n_evaluations=1,
    )
    amounts = f"({said} 90 % → 5 %, {said} 82 %; in 100% of draws)"
    assert str(found).startswith(f"‘FL’ → nothing: {said} → {said} {amounts}")
    data = {
        "counterfactuals": [found.to_dict()],
        "output": [{"text": "b"}],
        "output_tokens": ["b"],
        "input_tokens": ["FL"],
    }
    (shown,) = change_sentences(data)
    quoted = said.translate(str.maketrans("‘’", "“”"))
    assert f"{quoted} (82 %) is likelier than {quoted}" in shown["said"]


def test_invalid_arguments_are_refused(model, tokenizer):
    inp = TextSegmentInput(TEXT, tokenizer, baselines=OTHERS)
    whole = attribution(model, tokenizer)
    for arguments, said in (
        ({"flips": -1.0}, "`flips` is -1.0"),
        ({"flips": "other"}, "'argmax', a number"),
        ({"order": "size"}, "`order` is 'size'"),
        ({"order": [1.0]}, "`order` has 1 numbers for 8"),
        ({"token": 9}, "there is no token 9"),
        ({"max_size": 0}, "`max_size`"),
    ):
        with pytest.raises(ValueError, match=said):
            whole.counterfactuals(inp, " won", **arguments)


# Total effects


def test_token_positions_in_another_answer():
    assert places([1, 2, 3], [1, 2, 3]) == [(0, 0), (1, 0), (2, 0)]
    # What is said otherwise is read as the target says it; what comes after, as the answer does.
    assert places([1, 2, 3, 4], [1, 8, 9, 7, 4]) == [(0, 0), (1, 0), (1, 1), (4, 0)]
    assert places([1, 2], [1]) == [(0, 0), (1, 0)]


def test_total_effect_equals_marginalised_generation(known):
    """D depends on A alone, A on the occupation: exactly, by trying every A."""
    model, tokenizer = known
    document, grammar = documents(2, seed=3)[1], Grammar()
    ending = document.slot("D").text
    rest = document.continuation[len(f" {document.slot('A').text}") :].split(ending)[0].rstrip()

    def log_prob(text, said):
        before = tokenizer(text)["input_ids"]
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        return float(plain(model, before, ids)[range(len(ids)), ids].sum())

    def expected(prompt):
        weights, values = [], []
        for interest in grammar.words.interests:
            weights.append(log_prob(prompt, f" {interest},"))
            values.append(log_prob(f"{prompt} {interest}{rest}", f" {ending}"))
        share = torch.tensor(weights).softmax(0)
        return float((share * torch.tensor(values)).sum())

    slot = document.slot("occupation")
    jobs = [job for job in slot.alternatives if job != slot.text][:2]
    others = [document.edited("occupation", job).prompt for job in jobs]
    exact = expected(document.prompt) - sum(map(expected, others)) / len(others)
    lists = by_hand("prompt")(document)
    job = next(i for i, s in enumerate(document.segments("prompt")) if s.slot == "occupation")
    lists[job] = tuple(f" {other}." for other in jobs)
    inp, _ = as_input(document, tokenizer, Absence(lambda _: lists, by_hand("continuation")))
    found = attribution(*known).total_effect(
        inp, document.continuation, feature=[job, 0], n_samples=12
    )
    rows = [t for t, name in enumerate(found.output_tokens) if name in ending.split()]
    error = found.standard_errors[0, rows].sum()
    assert abs(float(found.values[0, rows].sum()) - exact) < 2 * float(error)
    assert float(found.values[0, rows].sum()) > float(error)
    assert found.direct[:, rows].abs().max() < 0.01
    assert found.values[1, rows].abs().max() < 0.1  # the name leads to none of it
    assert found.is_regenerated == [True, False]
    assert "directly" in str(found)
    json.dumps(found.to_dict())


def test_first_token_has_only_a_direct_effect(model, tokenizer):
    inp = TextSegmentInput(TEXT, tokenizer, baselines=OTHERS)
    found = attribution(model, tokenizer).total_effect(inp, " won a dog", n_samples=3)
    torch.testing.assert_close(found.values[:, 0], found.direct[:, 0], atol=1e-5, rtol=0)
    assert found.values.shape == (8, len(found.output_tokens))
    with pytest.raises(ValueError, match="there is no feature 8"):
        attribution(model, tokenizer).total_effect(inp, " won", feature=8)


def test_other_sampling_settings_regenerate_without_weights(model, tokenizer):
    inp = TextSegmentInput(TEXT, tokenizer, baselines=OTHERS)
    found = attribution(model, tokenizer).total_effect(
        inp, " won a dog", n_samples=2, again={"do_sample": False}
    )
    assert found.is_regenerated == [True] * 8


def test_word_errors_account_for_token_covariance(known):
    document = documents(2, seed=3)[1]
    inp, _ = as_input(document, known[1], Absence(by_hand("prompt"), by_hand("continuation")))
    job = next(i for i, s in enumerate(document.segments("prompt")) if s.slot == "occupation")
    found = attribution(*known).total_effect(inp, document.continuation, feature=job, n_samples=6)
    for t in range(len(found.output_tokens)):
        value, error = found.span(t, t + 1)
        torch.testing.assert_close(value, found.values[:, t])
        torch.testing.assert_close(error, found.standard_errors[:, t])
    value, error = found.span()
    torch.testing.assert_close(value, found.values.sum(1))
    # Within what they can be: as if all tokens varied as one.
    assert 0 < float(error) < float(found.standard_errors.sum())


# Answers to several prompts


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.5, "top_k": 0},
        {"do_sample": True, "temperature": 3.0, "top_k": 4, "repetition_penalty": 1.3},
        {"do_sample": False, "num_beams": 2},  # of which rows of a batch cannot be told apart
    ],
    ids=["greedy", "sampled", "of a few", "beams"],
)
def test_batched_answers_equal_single_answers(known, monkeypatch, how):
    model, tokenizer = known
    texts = [document.prompt for document in documents(6, seed=8)]
    # Some end by themselves, others do not, and lengths differ.
    rows = [TokenRow(tuple(tokenizer(text)["input_ids"]), ()) for text in (*texts, *texts[:3])]
    generation = planned_generation(model, tokenizer, {"max_new_tokens": 24, **how})
    seeds = list(range(len(rows)))
    alone = [
        Scorer(model).generate(row, generation.arguments, seed).tolist()
        for row, seed in zip(rows, seeds, strict=True)
    ]
    calls = []
    generate = type(model).generate
    monkeypatch.setattr(
        type(model),
        "generate",
        lambda self, **given: calls.append(len(given["input_ids"])) or generate(self, **given),
    )
    told = []
    found = Scorer(model).generate_each(rows, generation, seeds, told.append)
    assert [ids.tolist() for ids in found] == alone
    assert len({len(ids) for ids in alone}) > 1
    assert sum(told) == sum(calls) == len(rows)
    assert (max(calls) > 1) == ("num_beams" not in how)


def test_custom_generate_is_called_row_by_row(model, tokenizer):
    class Own(type(model)):
        def generate(self, input_ids, **_):
            assert len(input_ids) == 1
            return torch.cat([input_ids, input_ids[:, :2]], 1)

    own = Own(model.config).eval()
    rows = [TokenRow((5, 6, 7), ()), TokenRow((8, 6, 7), ())]
    generation = planned_generation(own, tokenizer, {"max_new_tokens": 2})
    found = Scorer(own).generate_each(rows, generation, [0, 0])
    assert [ids.tolist() for ids in found] == [[5, 6], [8, 6]]


# Smile


def test_smile_with_indicator_distance_equals_lime(model, tokenizer):
    inp = TextSegmentInput(TEXT, tokenizer, baselines=OTHERS)
    smile = Smile(model, lambda a, b: float(a != b))
    result = GenerationAttribution(smile, tokenizer).attribute(
        inp, gen_args={"max_new_tokens": 1}, n_samples=40
    )
    answers = []
    for mask in result.masks:
        ids = inp.render(mask[None], torch.Generator())[0].ids
        said = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=1)
        answers.append(tokenizer.decode(said[0, len(ids) :], skip_special_tokens=True))
    same = torch.tensor([[float(answer == answers[0])] for answer in answers]).double()
    assert 0 < same[2:].mean() < 1
    plan = Plan(result.masks, result.draws, plan_anchors(8).masks.shape[0])
    expected = solve_lime(plan, same, Scope.of_all(1, 8), penalty=None, kernel=cosine_kernel)
    found = result.token_attr.double()
    torch.testing.assert_close(found, expected.attributions, atol=1e-5, rtol=1e-5)
    assert result.token_attr.shape == (1, 8)
    assert result.token_attr_se.gt(0).all()
    assert result.output_attr is None


def test_text_only_api():
    def ask(messages, **_):
        return "yes" if "Dave" in messages[-1]["content"] else "no"

    inp = TextSegmentInput("Dave lives here", None, baselines="delete")
    method = Smile(RemoteGenerationAttribution.placeholder_model, lambda a, b: float(a != b))
    remote = RemoteGenerationAttribution(method, None, CallableProvider(ask))
    with pytest.warns(UserWarning, match="the same answer to an open question each time"):
        result = remote.attribute(inp, n_samples=24)
    assert result.token_attr[0].argmax() == 0
    assert float(result.token_attr[0, 0]) == pytest.approx(1, abs=0.05)


def test_embedding_distance(known):
    model, tokenizer = known
    generator = torch.Generator().manual_seed(0)
    linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment
    a, b = (torch.randn(9, 5, generator=generator) for _ in range(2))
    cost = 1 - torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    rows, columns = linear_sum_assignment(cost.numpy())
    exact = float(cost[rows, columns].mean())
    assert exact <= wasserstein(a, b) + 1e-6
    assert wasserstein(a, b) == pytest.approx(exact, rel=0.03)
    assert wasserstein(a, a.flip(0)) == pytest.approx(0, abs=1e-3)
    for kind in ("tokens", "words"):
        between = Smile(model, kind).distance_function(model, tokenizer)
        assert between("golf and chess", "golf and chess") == pytest.approx(0, abs=1e-6)
        assert between("golf and chess", "golf") > 0
        assert between("", "golf") == 1


def test_smile_finds_known_causes(known):
    document = documents(1, seed=5)[0]
    facts = [s for s in document.segments() if s.slot]
    inp = TextSegmentInput(
        document.prompt,
        known[1],
        [(s.start, s.stop) for s in facts],
        baselines=CorpusBaselines(corpus()),
    )
    result = GenerationAttribution(Smile(known[0]), known[1]).attribute(
        inp, gen_args={"max_new_tokens": 8}, n_samples=16
    )
    # Of the few words that are written, the first interest and the second.
    strongest = result.token_attr[0].topk(2).indices.tolist()
    assert {facts[i].slot for i in strongest} == {"occupation", "city"}


def test_smile_refuses_unused_arguments(model, tokenizer):
    inp = TextSegmentInput(TEXT, tokenizer, baselines=OTHERS)
    whole = GenerationAttribution(Smile(model), tokenizer)
    with pytest.raises(ValueError, match="`output_unit` would be ignored"):
        whole.attribute(inp, output_unit="word")
    with pytest.raises(ValueError, match="`checkpoint` would be ignored"):
        whole.attribute(inp, checkpoint="x.safetensors")
    with pytest.raises(ValueError, match="`distance` is 'letters'"):
        Smile(model, "letters")
    with pytest.raises(TypeError, match="plain tensors do not have"):
        Smile(model).attribute(torch.ones(1, 2))
