"""What stands where a feature is absent: lists, labels, generators, tied places, the model."""

import copy
import pickle
import random
import warnings
from collections import Counter

import pytest
import tiny
import torch
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    ProductBaselines,
    ShapleyValueSampling,
    TextTemplateInput,
)
from fact_grammar.vocabularies import BIOGRAPHIES

from captum_llm_ext import (
    CorpusBaselines,
    GenerationAttribution,
    Infilling,
    Slot,
    TextSegmentInput,
    load_demo,
)
from captum_llm_ext.model.likelihood import Likelihood

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer."
CITIES = {
    "Dover": "DE",
    "Reno": "NV",
    "Tulsa": "OK",
    "Boise": "ID",
    "Palm Coast": "FL",
    "Salem": "OR",
    "Iron Ridge": "WY",
    "Austin": "TX",
    "Macon": "GA",
}
NAMES = ("Ann", "Bob", "Cleo", "Dave", "Ella", "Finn", "Gina", "Hugo")
JOBS = ("lawyer", "nurse", "pilot", "baker", "farmer", "singer", "plumber")


def towns(n=400, seed=0):
    """Every city with its own state."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        city = rng.choice(list(CITIES))
        texts.append(
            f"{rng.choice(NAMES)} lives in {city}, {CITIES[city]} and is a {rng.choice(JOBS)}."
        )
    return texts


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.byte_level()


@pytest.fixture(scope="module")
def demo():
    return load_demo()


def absent_texts(inp, tokenizer, off, n=60, seed=0):
    """The texts that are rendered with some features absent, each row another draw."""
    masks = torch.ones(n, inp.n_features, dtype=torch.bool)
    masks[:, off] = False
    rows = inp.render(masks, torch.Generator().manual_seed(seed))
    return [tokenizer.decode(list(row.ids), skip_special_tokens=True) for row in rows]


def word(inp, text):
    return next(slot for slot in inp.slots if slot.text.strip() == text)


# Lists, mappings, captum's products


@pytest.mark.parametrize("key", ["name", 0, "Dave"])
def test_mapping_keys_are_labels_indices_or_text(tokenizer, key):
    inp = TextSegmentInput(
        "Dave sings.",
        tokenizer,
        labels=["name", None],
        baselines={key: ["Ann", "Bob"], "sings.": "hums."},
    )
    assert set(absent_texts(inp, tokenizer, [0])) == {"Ann sings.", "Bob sings."}
    assert set(absent_texts(inp, tokenizer, [1])) == {"Dave hums."}


@pytest.mark.parametrize(
    ("baselines", "message"),
    [
        ({"Dave": ["Ann"]}, r"has nothing for \['sings.'\]"),
        ({"Dave": "Ann", "sings.": "hums.", "Bob": "x"}, r"names \['Bob'\], no features"),
        ({"Dave": [], "sings.": "hums."}, "'Dave' is an empty list"),
        (
            ProductBaselines({("a", "b"): [("x", "y")]}),
            "are separate features",
        ),
    ],
)
def test_mapping_keys_must_match_features(tokenizer, baselines, message):
    with pytest.raises(ValueError, match=message):
        TextSegmentInput("Dave sings.", tokenizer, baselines=baselines, labels=["a", "b"])


def test_product_baselines_by_template_value(tokenizer):
    values = {"name": "Dave", "city": "Palm Coast", "state": "FL"}
    products = ProductBaselines(
        {"name": ["Ann", "Bob"], ("city", "state"): [("Dover", "DE"), ("Reno", "NV")]}
    )
    inp = TextSegmentInput.from_template(
        "{name} lives in {city}, {state}.",
        values,
        tokenizer,
        mask={"name": 0, "city": 1, "state": 1},
        baselines=products,
    )
    assert set(absent_texts(inp, tokenizer, [1])) == {
        "Dave lives in Dover, DE.",
        "Dave lives in Reno, NV.",
    }
    assert set(absent_texts(inp, tokenizer, [0])) == {
        "Ann lives in Palm Coast, FL.",
        "Bob lives in Palm Coast, FL.",
    }


# A generator of the user's own


def test_infilling_callable_is_called_once_per_slot(tokenizer):
    asked = []

    def generate(left, right, n_tokens):
        asked.append((left, right, n_tokens))
        return ["Ann", "Bob", "Dave"]

    inp = TextSegmentInput(PROMPT, tokenizer, baselines=Infilling(generate))
    first = {text.split()[0] for text in absent_texts(inp, tokenizer, [0])}
    assert first == {"Ann", "Bob"}  # never the original
    assert asked == [("", PROMPT.removeprefix("Dave"), len(inp.slots[0].ids))]


def test_infilling_that_returns_the_original_keeps_the_text(tokenizer):
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=Infilling(lambda *_: "Dave"))
    assert absent_texts(inp, tokenizer, [0], n=1) == [PROMPT]


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [([], ValueError, "no text for 'Dave'"), ([3], TypeError, r"returned \[3\] for 'Dave'")],
)
def test_infilling_must_return_texts(tokenizer, returned, error, message):
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=Infilling(lambda *_: returned))
    with pytest.raises(error, match=message):
        absent_texts(inp, tokenizer, [0], n=1)


def test_infilling_must_be_callable():
    with pytest.raises(TypeError, match=r"\(left, right, n_tokens\) -> texts"):
        Infilling(["Ann"])


# Labels of a corpus baseline


def test_labelled_slots_draw_from_lists_and_others_from_the_corpus(tokenizer):
    baselines = CorpusBaselines(towns(), labels={"who": ["Zoe", "Yan"], "lawyer": ["judge"]})
    inp = TextSegmentInput(PROMPT, tokenizer, labels={"Dave": "who"}, baselines=baselines)
    assert {t.split()[0] for t in absent_texts(inp, tokenizer, [0])} == {"Zoe", "Yan"}
    assert {t.split()[-1] for t in absent_texts(inp, tokenizer, [9])} == {"judge."}
    assert baselines.explain(word(inp, "lawyer.")).level == "label"
    assert baselines.explain(word(inp, "lives")).constant


def test_label_is_inferred_from_a_single_list(tokenizer):
    baselines = CorpusBaselines(towns(), labels={"city": list(CITIES), "name": NAMES})
    inp = TextSegmentInput(PROMPT, tokenizer, [(0, 4), (13, 24)], baselines=baselines)
    drawn = {t.removeprefix("Dave lives in") for t in absent_texts(inp, tokenizer, [1], n=200)}
    others = CITIES.keys() - {"Palm Coast"}
    assert drawn == {f" {city}, FL and is a lawyer." for city in others}


def test_template_value_names_are_labels(tokenizer):
    baselines = CorpusBaselines(towns(), labels={"city": ["Rome", "Oslo"]})
    inp = TextSegmentInput.from_template(
        "Ann lives in {city}.", {"city": "Paris"}, tokenizer, baselines=baselines
    )
    assert set(absent_texts(inp, tokenizer, [0])) == {"Ann lives in Rome.", "Ann lives in Oslo."}


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (["x"], ValueError, "1 entries for 10 spans"),
        ({"Zed": "name"}, ValueError, "'Zed', which is not a span"),
        ({0: 3}, TypeError, "a label is a text"),
    ],
)
def test_bad_input_labels_are_refused(tokenizer, labels, error, message):
    with pytest.raises(error, match=message):
        TextSegmentInput(PROMPT, tokenizer, labels=labels, baselines="delete")


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (["Rome"], TypeError, "`labels` is a list"),
        ({"city": []}, ValueError, "'city' is an empty list"),
        ({"city": [1]}, TypeError, "or a list of texts"),
    ],
)
def test_bad_corpus_labels_are_refused(labels, error, message):
    with pytest.raises(error, match=message):
        CorpusBaselines(["a text"], labels=labels)


# As many tokens


def test_same_n_tokens_keeps_the_token_count(tokenizer):
    baselines = CorpusBaselines(towns(), same_n_tokens=True)
    inp = TextSegmentInput(PROMPT, tokenizer, [(0, 4), (13, 24)], baselines=baselines)
    masks = torch.eye(inp.n_features).repeat(20, 1) == 0
    rows = inp.render(masks, torch.Generator().manual_seed(0))
    assert {len(row.ids) for row in rows} == {len(inp.ids)}
    assert len({row.ids for row in rows}) > 3


def test_same_n_tokens_without_candidates_keeps_the_original_and_warns(tokenizer):
    corpus = [f"{name} sings." for name in ["A", "Bartholomew-Maximilian"] * 20]
    baselines = CorpusBaselines(corpus, same_n_tokens=True)
    inp = TextSegmentInput("Dave sings.", tokenizer, baselines=baselines)
    assert len(inp.slots[0].ids) not in (1, len(tokenizer.encode("Bartholomew-Maximilian")) - 1)
    with pytest.warns(UserWarning, match="has as many tokens: its text stays"):
        assert absent_texts(inp, tokenizer, [0], n=1) == ["Dave sings."]


# Places of one feature


def test_tied_slots_are_replaced_from_one_document(tokenizer):
    inp = TextSegmentInput(
        PROMPT,
        tokenizer,
        [(0, 4), (14, 24), (26, 28), (38, 44)],
        groups={"place": ["Palm Coast", "FL"]},
        baselines=CorpusBaselines(towns()),
    )
    drawn = set(absent_texts(inp, tokenizer, [1], n=300))
    others = {(city, state) for city, state in CITIES.items() if state != "FL"}
    assert drawn == {f"Dave lives in {city}, {state} and is a lawyer." for city, state in others}


def test_untied_slots_are_replaced_independently(tokenizer):
    inp = TextSegmentInput(
        PROMPT, tokenizer, [(14, 24), (26, 28)], baselines=CorpusBaselines(towns())
    )
    drawn = absent_texts(inp, tokenizer, [0, 1], n=100)
    pairs = {tuple(text.split(" in ")[1].split(" and ")[0].split(", ")) for text in drawn}
    assert pairs - CITIES.items()  # a city with another's state


def test_features_merged_by_a_mask_share_a_document(demo):
    model, tokenizer, _ = demo
    seen = Counter()

    class Spy(CorpusBaselines):
        def __call__(self, slot=None, generator=None):
            drawn = super().__call__(slot, generator)
            seen[slot.text.strip(), drawn.strip()] += 1
            return drawn

    spans = [(14, 24), (26, 28)]
    inp = TextSegmentInput(PROMPT, tokenizer, spans, baselines=Spy(towns()))
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    attribution.attribute(
        inp, " and", feature_mask=torch.tensor([[0, 0]]), output_unit=None, n_draws=40
    )
    cities = {drawn: n for (text, drawn), n in seen.items() if text == "Palm Coast"}
    states = {drawn: n for (text, drawn), n in seen.items() if text == "FL"}
    assert {CITIES[city]: n for city, n in cities.items()} == states
    assert len(cities) > 1


def test_tied_slots_keep_entities_of_one_document_apart(tokenizer):
    rng = random.Random(1)
    documents = []
    for _ in range(60):
        some = rng.sample(list(CITIES.items()), 3)
        documents.append(" ".join(f"Ann lives in {c}, {s} and is happy." for c, s in some))
    inp = TextSegmentInput(
        "Ann lives in Palm Coast, FL and is happy.",
        tokenizer,
        [(13, 23), (25, 27)],
        groups=[[0, 1]],
        baselines=CorpusBaselines(documents),
    )
    for text in set(absent_texts(inp, tokenizer, [0], n=200)):
        city, state = text.split(" in ")[1].split(" and ")[0].split(", ")
        assert CITIES[city] == state


def test_tied_slots_that_never_co_occur_are_drawn_apart_with_a_warning(tokenizer):
    corpus = [f"{n} sings well." for n in NAMES] + [f"They heard {n} today." for n in NAMES]
    corpus *= 10
    inp = TextSegmentInput(
        "Dave sings well. They heard Dave today.",
        tokenizer,
        groups=[[0, 5]],
        baselines=CorpusBaselines(corpus),
    )
    with pytest.warns(UserWarning, match=r"No document .* 'Dave … Dave': each place"):
        drawn = set(absent_texts(inp, tokenizer, [0], n=100))
    assert len(drawn) > 3


def test_tied_label_lists_are_drawn_at_one_index(tokenizer):
    labels = {"city": list(CITIES), "state": list(CITIES.values())}
    inp = TextSegmentInput(
        PROMPT,
        tokenizer,
        [(14, 24), (26, 28)],
        groups=[[0, 1]],
        labels=["city", "state"],
        baselines=CorpusBaselines(["nothing of use"], labels=labels),
    )
    drawn = set(absent_texts(inp, tokenizer, [0], n=200))
    others = {(city, state) for city, state in CITIES.items() if state != "FL"}
    assert drawn == {f"Dave lives in {city}, {state} and is a lawyer." for city, state in others}


# Captum's own template input, in captum's own attribution


def template(baselines, **arguments):
    return TextTemplateInput(
        "{name} lives in {city}, {state} and is a lawyer.",
        {"name": "Dave", "city": "Palm Coast", "state": "FL"},
        baselines=baselines,
        **arguments,
    )


def test_captum_template_draws_values():
    inp = template(CorpusBaselines(towns(), seed=3))
    off = torch.zeros(1, 3)
    drawn = {inp.to_model_input(off) for _ in range(100)}
    for text in drawn:
        facts = text.replace(" and is a lawyer.", "").replace(" lives in", ",").split(", ")
        assert facts[0] in set(NAMES) - {"Dave"}
        assert facts[1] in CITIES.keys() - {"Palm Coast"}
        assert facts[2] in set(CITIES.values()) - {"FL"}
    assert len(drawn) > 20
    twice = [template(CorpusBaselines(towns(), seed=3)).to_model_input(off) for _ in range(2)]
    assert twice[0] == twice[1]


def test_captum_template_draws_groups_from_one_document():
    mask = {"name": 0, "city": 1, "state": 1}
    inp = template(CorpusBaselines(towns()), mask=mask)
    for _ in range(40):
        text = inp.to_model_input(torch.zeros(1, 2))
        city, state = text.split(" in ")[1].split(" and ")[0].split(", ")
        assert CITIES[city] == state


def test_captum_llm_attribution_accepts_corpus_baselines(demo):
    model, tokenizer, texts = demo
    prompt = "{name} lives in {city}, {state} and is a {job}. His personal interests include"
    inp = TextTemplateInput(
        prompt,
        {"name": "Dave", "city": "Palm Coast", "state": "FL", "job": "lawyer"},
        baselines=CorpusBaselines(texts),
    )
    found = LLMAttribution(ShapleyValueSampling(model), tokenizer).attribute(
        inp, target=" poker", num_trials=3, use_cached_outputs=False
    )
    assert found.seq_attr.argmax() == 3  # the occupation
    ours = GenerationAttribution(ShapleyValueSampling(model), tokenizer).attribute(
        inp, target=" poker", num_trials=3
    )
    assert ours.seq_attr.argmax() == 3


def test_call_without_arguments_outside_captum_raises():
    with pytest.raises(TypeError, match="not by a `TextTemplateInput`"):
        CorpusBaselines(["a text"])()


# The model's own likelihood


@torch.no_grad()
def text_log_probability(model, tokenizer, text):
    """One uncached float64 forward."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    logits = model.double()(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return float(logits.gather(1, ids[0, 1:, None]).sum())


def test_likelihoods_equal_a_plain_forward(demo):
    model, tokenizer, texts = demo
    model = copy.deepcopy(model)
    given = [texts[0], texts[1][:30], "Dave", texts[2]]
    found = Likelihood(model, tokenizer).log_likelihoods(given)
    expected = [text_log_probability(model, tokenizer, text) for text in given]
    assert found.tolist() == pytest.approx(expected, abs=1e-3)  # float32 against float64


def test_candidates_are_weighted_by_likelihood_in_place(demo):
    model, tokenizer, texts = demo
    baselines = CorpusBaselines(texts, match="model").with_model(Likelihood(model, tokenizer))
    # The pronoun stands to the right: a name must fit it.
    prompt = "Dave lives in Dover, FL and is a lawyer. His personal interests include"
    slot = TextSegmentInput(prompt, tokenizer, baselines="delete").slots[0]
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(baselines(slot, generator) for _ in range(2000))
    reference = copy.deepcopy(model)
    names = [name for name in BIOGRAPHIES.names if name != "Dave"]
    scores = torch.tensor(
        [text_log_probability(reference, tokenizer, prompt.replace("Dave", n)) for n in names]
    )
    expected = dict(zip(names, scores.softmax(0).tolist(), strict=True))
    for name, share in expected.items():
        # Four standard errors of a share of 2,000.
        assert drawn[name] / 2000 == pytest.approx(share, abs=4 * (share / 2000) ** 0.5 + 1e-3)
    assert sum(drawn[name] for name in ("Anna", "Emma", "Sara")) < 20


def test_generated_token_is_drawn_from_the_models_distribution(demo):
    model, tokenizer, texts = demo
    prompt = "Dave lives in Dover, FL and is a lawyer. His personal interests include"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits[0, -1].softmax(-1)
    said = tokenizer.encode(" poker", add_special_tokens=False)
    assert len(said) == 1
    probabilities[said[0]] = 0
    expected = probabilities / probabilities.sum()
    inp = TextSegmentInput(prompt, tokenizer, baselines=CorpusBaselines(texts, match="model"))
    drawn = Counter()

    class Spy:
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, slot, generator):
            found = self.inner(slot, generator)
            if slot.text == " poker":
                drawn.update(found)
            return found

        def with_model(self, model):
            return Spy(self.inner.with_model(model))

    GenerationAttribution(FeatureAblation(model), tokenizer).attribute(
        inp,
        " poker and",
        output_baselines=Spy(CorpusBaselines(texts, match="model")),
        n_draws=1000,
    )
    assert said[0] not in drawn
    total = drawn.total()
    assert total >= 1000
    for token in expected.topk(3).indices.tolist():
        share = float(expected[token])
        assert drawn[token] / total == pytest.approx(share, abs=4 * (share / total) ** 0.5)


def test_generated_word_of_several_tokens_is_resampled(demo):
    model, tokenizer, texts = demo
    prompt = "Dave lives in Dover, FL and is a lawyer. His personal interests include"
    inp = TextSegmentInput(prompt, tokenizer, baselines=CorpusBaselines(texts, match="model"))
    result = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(
        inp, " table tennis, fencing and history.", output_unit=[(0, 14)], n_draws=8
    )
    match = result.provenance["matches"]["output"][0]
    assert match["level"] == "model"
    # What else a lawyer may have for a first interest, by the grammar: golf or poker.
    assert set(match["examples"][:2]) & {"golf", "poker"}
    assert "table tennis" not in match["examples"]


def test_match_model_needs_a_model(tokenizer):
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=CorpusBaselines(towns(), match="model"))
    with pytest.raises(ValueError, match="use these baselines in an input of"):
        absent_texts(inp, tokenizer, [0], n=1)


def test_model_matching_leaves_model_and_baselines_unchanged(demo):
    model, tokenizer, texts = demo
    model = copy.deepcopy(model).train()
    baselines = CorpusBaselines(texts, match="model")
    inp = TextSegmentInput("Dave lives in Dover, FL", tokenizer, baselines=baselines)
    state = torch.get_rng_state()
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    first = attribution.attribute(inp, " and is", n_draws=2)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    again = attribution.attribute(inp, " and is", n_draws=2)
    assert torch.equal(first.token_attr, again.token_attr)
    with pytest.raises(ValueError, match="asks the model"):
        inp.render(torch.zeros(1, 5, dtype=torch.bool), torch.Generator())


# Kept and told


def test_saved_corpus_draws_the_same(tokenizer, tmp_path):
    made = CorpusBaselines(towns(), seed=5, labels={"name": NAMES, 3: ["x"]}, min_occurrences=7)
    made.save(tmp_path / "towns.index")
    read = CorpusBaselines.load(tmp_path / "towns.index")
    changed = CorpusBaselines.load(tmp_path / "towns.index", labels=None, match="any")
    texts = [
        absent_texts(TextSegmentInput(PROMPT, tokenizer, baselines=b), tokenizer, [0, 4, 9])
        for b in (made, read, pickle.loads(pickle.dumps(made)), copy.deepcopy(made), changed)
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3] != texts[4]
    assert (read.min_occurrences, read.seed, changed.match) == (7, 5, "any")
    with pytest.raises(TypeError, match="'corpus' cannot be changed on loading"):
        CorpusBaselines.load(tmp_path / "towns.index", corpus=["x"])


def test_matches_report_how_each_feature_was_matched(tokenizer):
    baselines = CorpusBaselines(towns())
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=baselines)
    matches = baselines.matches(inp)
    assert [match.constant for match in matches] == [
        text in ("lives", "in", "and", "is", "a") for text in PROMPT.split()
    ]
    assert str(matches[1]).startswith("constant in")
    assert "candidates by both in" in str(matches[0])


def test_result_records_replacement_matches(demo):
    model, tokenizer, texts = demo
    inp = TextSegmentInput("Dave lives in", tokenizer, baselines=CorpusBaselines(texts))
    result = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(inp, " Dover, FL")
    told = result.provenance["matches"]
    assert [entry["constant"] for entry in told["prompt"]] == [False, True, True]
    # The last of the output has nothing after it: it is never absent.
    assert len(told["output"]) == result.output_attr.shape[1] - 1
    plain = TextSegmentInput("Dave lives in", tokenizer, baselines="delete")
    other = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(plain, " Dover")
    assert other.provenance["matches"] == {"prompt": None, "output": None}


# Poor corpora


def test_corpus_of_copies_warns():
    with pytest.warns(UserWarning, match="All 30 documents of the corpus are identical"):
        CorpusBaselines(["The cat sat on the mat."] * 30)


def test_unrelated_corpus_warns_at_the_callers_line(demo):
    model, tokenizer, _ = demo
    baselines = CorpusBaselines(news())
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=baselines)
    # Each surrounded by small words, capitals and commas like those of the news.
    assert {match.level for match in baselines.matches(inp)} <= {"kinds", "shape"}
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # as Python has it: equal warnings of one line once
        for _ in range(2):
            attribution.attribute(inp, " His", n_draws=2)
    told = [w for w in caught if "have no similar context in this corpus" in str(w.message)]
    assert len(told) == 2
    assert str(told[0].message).startswith("10 of 10 features")
    assert {w.filename for w in told} == {__file__}


def test_related_corpus_or_match_any_does_not_warn(demo):
    model, tokenizer, texts = demo
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    for baselines in (
        CorpusBaselines(texts),
        CorpusBaselines(news(), match="any"),
        CorpusBaselines(news(), min_candidates=0),
    ):
        inp = TextSegmentInput(PROMPT, tokenizer, baselines=baselines)
        attribution.attribute(inp, " His", n_draws=2)  # warnings are errors here


def test_captum_template_warns_once_of_an_unrelated_corpus(tokenizer):
    inp = TextTemplateInput("{} lives in {}.", ["Dave", "Dover"], CorpusBaselines(news()))
    with pytest.warns(UserWarning, match="2 of 2 features have no similar context"):
        inp.to_model_input(torch.tensor([[0, 1]]))
    inp.to_model_input(torch.tensor([[1, 0]]))


def news():
    """Sentences that have nothing but kinds of words in common with biographies."""
    rng = random.Random(0)
    word = ["".join(rng.choices("aeioubdfgklmnprstvz", k=rng.randint(2, 8))) for _ in range(2_000)]

    def sentence():
        drawn = rng.choices(word, k=rng.randint(6, 14))
        drawn[::3] = map(str.capitalize, drawn[::3])
        return " ".join(drawn) + rng.choice((", ", ". ")) + rng.choice(word)

    return [f"{sentence()}. {sentence()}." for _ in range(400)]


def test_adjacent_slots_form_one_phrase(tokenizer):
    places = ("Lake of Pines", "Dover", "Salem", "Reno", "Boise", "Tulsa", "Macon", "Iron Ridge")
    corpus = [f"{name} lives in {place} now." for place in places for name in NAMES] * 3
    text = "Ann lives in Lake of Pines now."
    inp = TextSegmentInput(text, tokenizer, groups=[[3, 4, 5]], baselines=CorpusBaselines(corpus))
    assert not any(match.constant for match in inp.own_baseline.matches(inp)[3:6])
    masks = torch.tensor([[feature != 3 for feature in range(inp.n_features)]]).expand(60, -1)
    rows = inp.render(masks, torch.Generator().manual_seed(0))
    shown = {tokenizer.decode(row.ids, skip_special_tokens=True) for row in rows}
    assert shown == {f"Ann lives in {place} now." for place in places[1:]}


def test_word_determined_by_its_phrase_is_replaced_from_other_phrases():
    places = ("Lake of Pines", "Dover", "Salem", "Reno", "Boise", "Tulsa", "Macon", "Iron Ridge")
    corpus = [f"{name} lives in {place} now." for place in places for name in NAMES] * 3
    baselines = CorpusBaselines(corpus)
    text = "Ann lives in Lake of Pines now."
    for word, part in ((" Lake", 0), (" of", 1), (" Pines", 2)):
        slot = Slot(text, text.index(word), text.index(word) + len(word))
        generator = torch.Generator().manual_seed(0)
        drawn = {baselines(slot, generator).strip() for _ in range(300)}
        ridge = ("Iron", "Iron Ridge", "Ridge")[part]
        assert drawn == {*places[1:7], ridge}
    assert baselines.explain(Slot(text, 3, 9)).constant
