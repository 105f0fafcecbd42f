"""Absence by the model's own distribution, held against plain forward passes of the model."""

import copy
import itertools
import math
import pickle
import random
import re
import unicodedata
import warnings

import pytest
import tiny
import torch
from captum.attr import FeatureAblation, KernelShap, LayerIntegratedGradients, TextTokenInput
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from captum_llm_ext import (
    GenerationAttribution,
    GenerationGradientAttribution,
    ModelBaselines,
    TextSegmentInput,
    load_demo,
)
from captum_llm_ext.model import Likelihood
from captum_llm_ext.model.masked import MaskedProposer
from captum_llm_ext.remote.likelihood import RemoteLikelihood
from captum_llm_ext.text.baselines import draw_generator
from captum_llm_ext.text.baselines.model.alternatives import Alternatives
from captum_llm_ext.text.baselines.model.examples import labels_of_examples
from captum_llm_ext.text.baselines.words import keeps_script

TINY_T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 400}
TINY_BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"


@pytest.fixture(scope="module")
def demo():
    model, tokenizer, _ = load_demo()
    return model, tokenizer


def bound(demo, **options):
    return ModelBaselines(**options).with_model(Likelihood(*demo))


def words(text, tokenizer, baselines, unit="word"):
    return TextSegmentInput(text, tokenizer, unit, baselines=baselines)


def draws(baselines, slot, n=400):
    return [baselines(slot, torch.Generator().manual_seed(i)) for i in range(n)]


def next_word(demo, text, word):
    """Its probability after a text, by one plain forward pass: words are tokens here."""
    model, tokenizer = demo
    *ids, said = tokenizer(f"{text} {word}".strip())["input_ids"]
    with torch.no_grad():
        probabilities = model(torch.tensor([ids])).logits[0, -1].double().softmax(0)
    return float(probabilities[said])


@pytest.mark.parametrize(
    ("word", "after", "pattern"),
    [
        ("Dave", " lives in", "Ġ?[A-Z][a-z]+"),
        ("Palm", "", "Ġ[A-Z][a-z]+"),  # "Coast" is of its phrase
        ("FL", " and is", "Ġ[A-Z][A-Z]+"),
        ("and", " is a", "Ġ[a-z]+"),
        ("lawyer", ".", "Ġ[a-z]+"),
    ],
)
def test_draws_follow_the_models_distribution(demo, word, after, pattern):
    """Its own text included, over all words of its kind, given the text before and the next words.

    By a plain forward pass per word.
    """
    model, tokenizer = demo
    baselines = bound(demo, n_candidates=40)
    inp = words(PROMPT, tokenizer, baselines)
    slot = next(slot for slot in inp.slots if slot.text.strip(" .,") == word)
    before = tokenizer(PROMPT[: PROMPT.index(word)].rstrip())["input_ids"]
    follow = tokenizer(after, add_special_tokens=False)["input_ids"]
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tried = [i for i, piece in enumerate(vocabulary) if re.fullmatch(pattern, piece)]
    rows = torch.tensor([[*before, token, *follow] for token in tried])
    with torch.no_grad():
        log_probs = model(rows).logits.double().log_softmax(2)[:, :-1]
    said = log_probs.gather(2, rows[:, 1:, None])[:, -1 - len(follow) :, 0]
    pieces = [vocabulary[token].removeprefix("Ġ") for token in tried]
    own = max((i for i, p in enumerate(pieces) if p == word), key=lambda i: float(said[i, 0]))
    goes_on = said[:, 1:].sum(1)
    chances = dict.fromkeys(pieces, 0.0)
    fitting = said[:, 0].exp() * (goes_on - goes_on[own]).exp().clamp(max=1)
    if fitting[own] > 0.95 * fitting.sum():  # decided by the words after it alone
        before = said[:, 0].exp()
        fitting *= (before.sum() - before[own]) / (fitting.sum() - fitting[own])
        fitting[own] = before[own]
    for piece, chance in zip(pieces, fitting, strict=True):
        chances[piece] += float(chance)
    total = sum(chances.values())
    found = draws(baselines, slot)
    drawn = [text.strip(" .,").split()[0] for text in found]  # of a name the first word
    for text, chance in chances.items():
        assert drawn.count(text) / len(drawn) == pytest.approx(chance / total, abs=0.08)
    mark = slot.text[-1] if slot.text[-1] in ".," else ""
    assert all(text.endswith(mark) for text in found)


@pytest.mark.parametrize(
    ("prompt", "said", "pattern"),
    [
        # Nobody's interest: how likely such a word is depends on all that stands before.
        (PROMPT, " Palm", "Ġ[A-Z]([a-z].*)?"),
        ("Dave lives in Palm Coast, FL", " and", "Ġ[a-z].*"),
        ("Dave lives in Palm Coast, FL and is a lawyer. He", " lives", "Ġ[a-z].*"),
    ],
)
def test_candidates_are_weighted_by_answer_likelihood(demo, prompt, said, pattern):
    """Each candidate by how likely a word like the answer comes after it, and close to the answer
    by what follows such a word: plain forward passes."""
    model, tokenizer = demo
    [answer] = tokenizer.encode(said, add_special_tokens=False)

    def ids_of(text):
        return tokenizer(text)["input_ids"]

    def log_probs(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(0)

    def alike(ids, n):
        likeliest = log_probs(ids).argsort(descending=True).tolist()
        pieces = {i: tokenizer.convert_ids_to_tokens(i) for i in likeliest}
        return [i for i in likeliest if re.fullmatch(pattern, pieces[i]) and i != answer][:n]

    whole = ids_of(prompt)
    kind = [answer, *alike(whole, 128)]
    follows = int(log_probs([*whole, answer]).argmax())

    def followed(ids, word):
        return float(log_probs([*ids, word])[follows])

    most = followed(whole, answer)

    def goes_on(ids):
        own = [answer, *alike(ids, 4)]
        chances, order = log_probs(ids)[own].softmax(0).sort(descending=True)
        n = 1 + int((chances.cumsum(0) < 0.95).sum())  # words beyond are hardly any of the whole
        chances = chances[:n] / chances[:n].sum()
        return sum(
            float(chance) * math.exp(min(followed(ids, own[i]), most))
            for chance, i in zip(chances, order[:n].tolist(), strict=True)
        )

    inp = words(prompt, tokenizer, ModelBaselines())
    before = bound(demo).matches(inp)
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    result = attribution.attribute(inp, torch.tensor([answer]), output_unit=None)
    n_close = n_far = 0
    for name, slot, old, new in zip(
        inp.names, inp.slots, before, result.provenance["matches"]["prompt"], strict=True
    ):
        own = dict(new["candidates"])
        if len(old.candidates) < 2 or name.strip() in ("Palm", "Coast,"):
            continue
        if len(prompt[slot.stop :].replace("Palm Coast", "Palm").split()) >= 8:  # too far
            assert own == dict(old.candidates)
            n_far += 1
            continue
        core = name.strip(" .,")
        expected = {}
        for text, share in old.candidates:
            ids = ids_of(prompt[: slot.start] + slot.text.replace(core, text) + prompt[slot.stop :])
            expected[text] = share * float(log_probs(ids).exp()[kind].sum())
            first = next(
                (i for i, token in enumerate(whole) if ids[i : i + 1] != [token]), len(whole)
            )
            if first >= len(whole) - 5 and text != core:
                expected[text] *= min(1.0, goes_on(ids) / goes_on(whole))
                n_close += 1
        total = sum(expected.values())
        assert own == pytest.approx({t: e / total for t, e in expected.items()}, abs=1e-4)
    assert n_close or prompt == PROMPT
    assert (n_far > 0) == ("lawyer" in prompt)


def test_candidate_weights_are_cached(demo):
    inp = words(PROMPT, demo[1], ModelBaselines())
    fits = []

    def fit(trials):
        fits.append(len(trials))
        return [-float(len(trial) + i % 3) for i, trial in enumerate(trials)]

    baselines = bound(demo).with_answer(fit, "")
    first = baselines.matches(inp)
    assert first != bound(demo).matches(inp)
    assert baselines.matches(inp) == first
    assert len(fits) == 1


def test_grammatically_determined_words_get_no_attribution():
    """Of a pronoun "because" says that it comes, "Anna" which one."""
    names = {"Anna": "she", "Mary": "she", "Tom": "he", "Raj": "he"}
    endings = ("because {} won", "in Oslo", "in Rome", "at Lima")
    model, tokenizer = counting(
        [f"{n} smiled {e.format(p)}." for n, p in names.items() for e in endings]
    )
    inp = TextSegmentInput("Anna smiled because", tokenizer)
    for method in (FeatureAblation, KernelShap):
        result = GenerationAttribution(method(model), tokenizer).attribute(inp, "she")
        name, verb, conjunction = result.token_attr[0].tolist()
        assert name > 2
        assert max(abs(verb), abs(conjunction)) < name / 5


def test_right_context_selects_candidates():
    """Four other words are likelier after "was", and none of them makes anybody eat."""
    moods = ("hungry", "tired", "sad", "bored")
    states = ("born", "killed", "hired", "married")
    model, tokenizer = counting(
        [f"Anna was {mood}, so she left." for mood in moods]
        + [f"Anna was {state} in May." for state in states for _ in range(9)]
    )
    inp = TextSegmentInput("Anna was hungry, so", tokenizer)
    result = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(inp, "she")
    shares = dict(result.provenance["matches"]["prompt"][2]["candidates"])
    assert shares.keys() == {*moods}
    assert shares["hungry"] < 0.5


def test_where_the_words_after_it_decide_a_word_others_still_fit_them():
    """After "king" most go on otherwise; "heard" is as good as certain before "the news",
    and of all other words only "got" comes before that."""
    sentences = ["the king was born .", "the king of Rome .", "the king is gone ."] * 30
    sentences += ["the king heard the news ."] * 27 + ["the king got the mail ."] * 9
    sentences += ["the king got the news ."] * 1
    model = Likelihood(*counting(sentences))
    text = "the king heard the news"
    found = Alternatives(text, model, 4, (0, len(text))).fitting((9, 14))
    n = len(sentences)
    assert found["heard"] == pytest.approx(27 / n, rel=0.02)
    others = {word: weight for word, weight in found.items() if word != "heard"}
    assert others["got"] / sum(others.values()) > 0.95
    # How certain "heard" is, is for the words before it to tell.
    assert sum(others.values()) == pytest.approx((n - 27) / n, rel=0.02)


def test_labels_of_solved_examples_are_drawn_from_these_labels():
    """By their counts after the item; other words are likelier there."""
    sentences = ["plum - rich .", "plum - ripe .", "plum - sour ."] * 9
    sentences += ["plum - yes ."] * 3 + ["plum - no ."] + ["fig - yes .", "pea - no ."] * 5
    model, tokenizer = counting(sentences)
    baselines = bound((model, tokenizer))
    prompt = "plum - yes\npea - no\nfig - yes\nnut -"
    inp = words(prompt, tokenizer, baselines)
    match = next(
        m for m, name in zip(baselines.matches(inp), inp.names, strict=True) if "yes" in name
    )
    shares = dict(match.candidates)
    assert shares.keys() == {"yes", "no"}
    assert shares["yes"] == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ("fig -> fruit\npea -> plant\nnut -> fruit\nyam ->", "fruit plant fruit"),
        ("Text: so good\nMood: fine.\nText: so bad\nMood: sad.\n" * 2 + "Text: x\nMood:", None),
        ("It was fun. Label: good\nIt was dull. Label: bad\nIt was fair. Label: good\nLabel:", 0),
        ("Rome: Italy\nParis: France\nOslo: Norway\nLima:", ""),  # none recurs
        ("fig -> fruit\nnut -> fruit\nyam -> fruit\npea ->", ""),  # one alone
        ("fig -> fruit\npea -> plant\nyam ->", ""),
        ("Name: Ann\nPet: cat\nName: Bob\nPet: cat\nName: Eve\nPet: dog\nName:", ""),
        ("fig -> fruit\npea -> plant\nnut -> fruit", ""),  # nothing is asked
        ("", ""),
        ("\n:\n:\n:", ""),
    ],
)
def test_which_words_are_labels(prompt, labels):
    wanted = {None: "fine sad fine sad", 0: "good bad good"}.get(labels, labels).split()
    found = labels_of_examples(prompt)
    assert [prompt[slice(*span)] for span in found] == wanted
    assert all(set(others) == set(wanted) for others in found.values())


THINGS = ("cup", "hat", "key", "pen", "map")


@pytest.fixture(scope="module")
def lists():
    """Of three things two are lost, and the third is kept."""
    return counting(
        [
            f"has {', '.join(own)}. Lost {one}, {other}. Only {kept}."
            for own in itertools.permutations(THINGS, 3)
            for one, other, kept in itertools.permutations(own)
        ]
    )


@pytest.mark.parametrize("place", range(3))
def test_answer_word_is_no_candidate_elsewhere(lists, place):
    """Where it stands for another member of the list, the answer is that one."""
    model, tokenizer = lists
    own = ["cup", "hat", "pen"]
    own.insert(place, "key")
    own = own[:3] if place < 3 else own
    lost = [thing for thing in own if thing != "key"]
    inp = TextSegmentInput(f"has {', '.join(own)}. Lost {lost[0]}, {lost[1]}. Only", tokenizer)
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    result = attribution.attribute(inp, "key", output_unit=None)
    assert int(result.token_attr[0].argmax()) == 1 + place
    for name, match in zip(inp.names, result.provenance["matches"]["prompt"], strict=True):
        said = {text for text, _ in match["candidates"]}
        assert ("key" in said) == (name.strip(" ,.") == "key"), name


def test_inflected_answer_word_is_no_candidate(lists):
    model, tokenizer = lists
    asked = bound((model, tokenizer))

    def said(prompt, answer):
        """In the place of the second thing that is lost."""
        inp = words(prompt, tokenizer, ModelBaselines())
        knows = asked.with_answer(lambda trials: [0.0] * len(trials), answer)
        return {text for text, _ in knows.matches(inp)[-2].candidates}

    assert said("has cup, hat, pen. Lost cup, hat. Only", " the") == {"hat", "pen"}
    assert said("has cup, hat, pen. Lost cup, hat. Only", " Pens, and more.") == {"hat"}
    # What the text does not say is no copy.
    assert said("Lost cup, hat. Only", " key") == said("Lost cup, hat. Only", "") > {"key"}


def test_white_space_before_a_number_is_of_its_kind():
    """Where it is a token of its own: after "the" no number comes, but digits follow each other."""
    numbers = [f"in {room} 1{digit}" for room in ("room", "hall") for digit in "234"]
    model, tokenizer = counting_pieces(numbers + ["in the cat", "in the dog"] * 3)
    inp = TextSegmentInput("in room", tokenizer, baselines=ModelBaselines())
    result = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(inp, " 12")
    shares = dict(result.provenance["matches"]["prompt"][1]["candidates"])
    assert shares["hall"] == pytest.approx(0.5, abs=0.01)
    assert shares.get("the", 0.0) < 0.01


@pytest.mark.parametrize("mark", ["'", "’", "-"])
def test_no_word_is_cut_at_a_mark_that_joins_it(mark):
    """Elided words go on after it; a closing quotation mark does not."""
    rests = ("une", "or", "eau")
    model, tokenizer = counting_pieces(
        [f"la vue d{mark}{rest} ici" for rest in rests] + ["la vue de ici"] * 3
    )
    found = Alternatives("la vue de ici", Likelihood(model, tokenizer), 4, (0, 13)).texts((7, 9))
    assert found.keys() - {"de"} <= {f"d{mark}{rest}" for rest in rests} != set()
    assert len(found) == 2
    model, tokenizer = counting_pieces([f"la vue d{mark} ici"] * 3 + ["la vue de ici"] * 3)
    found = Alternatives("la vue de ici", Likelihood(model, tokenizer), 4, (0, 13)).texts((7, 9))
    assert found.keys() == {"de", "d"}


class Asks(Likelihood):
    """Keeps the texts that it is asked to go on from."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.continuation_ids = []

    def log_probs_between(self, beginnings, texts, rests):
        self.continuation_ids += beginnings
        return super().log_probs_between(beginnings, texts, rests)


@pytest.mark.parametrize(
    ("counts", "kept", "asked"),
    [
        # As good as certain.
        ({"hungry": 96, "tired": 4}, {"hungry"}, set()),
        ({"hungry": 90, "tired": 10}, {"hungry", "tired"}, {"hungry", "tired"}),
        # The likeliest go on well: rarer ones are none of the likeliest four, or hardly anything.
        (
            {"tired": 30, "sad": 20, "bored": 16, "ill": 14, "hungry": 12, "mad": 6, "shy": 2},
            {"hungry", "tired", "sad", "bored", "ill"},
            {"hungry", "tired", "sad", "bored", "ill"},
        ),
        # They do not: rarer ones may be all there is.
        (
            {"born!": 30, "hired!": 20, "married!": 16, "killed!": 14, "hungry": 12, "mad": 8},
            {"hungry", "mad"},
            {"born", "hired", "married", "killed", "hungry", "mad"},
        ),
    ],
)
def test_negligible_candidates_are_not_scored(counts, kept, asked):
    """Of "hungry" in its place, by the counts of a world in which "!" is said to be no mood."""
    sentences = [
        f"Anna was {word[:-1]} in May." if word.endswith("!") else f"Anna was {word}, so she left."
        for word, n in counts.items()
        for _ in range(n)
    ]
    model = Asks(*counting(sentences))
    text = "Anna was hungry, so"
    alternatives = Alternatives(text, model, 4, (0, len(text)))
    del model.continuation_ids[:]
    place = text.index("hungry"), text.index(",")
    found = alternatives.fitting(place)
    assert {word.removeprefix("Anna was ") for word in model.continuation_ids} == asked
    # What is as good as nothing is left out where texts are drawn.
    shares = {word: share / sum(found.values()) for word, share in found.items()}
    assert {word for word, share in shares.items() if share > 0.01} == kept
    n = {word.removesuffix("!"): counts[word] for word in counts}
    expected = {word: n[word] / sum(n[w] for w in kept) for word in kept}
    assert {word: shares[word] for word in kept} == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("city", ["Salt Lake City", "Mary Ann Creek"])
def test_later_words_of_a_name_do_not_determine_it(city):
    """Words of a name would each be certain from the others."""
    others = ("Boston", "Reno", "Palm Coast")
    model, tokenizer = counting([f"Tom lives in {c} and is fine." for c in (city, *others)])
    baselines = bound((model, tokenizer))
    inp = words(f"Tom lives in {city} and is fine.", tokenizer, baselines)
    first = baselines.matches(inp)[3]
    assert first.determined < 0.5


def test_word_determined_by_left_context_stays(demo):
    baselines = bound(demo)
    found = baselines.matches(words(PROMPT, demo[1], baselines))
    matches = dict(zip(PROMPT.split(), found, strict=True))
    assert all(matches[word].constant for word in ("lives", "in", "is", "a", "personal"))
    assert not any(matches[word].constant for word in ("Dave", "Palm", "FL", "lawyer."))


def test_phrase_words_are_absent_together(demo):
    """Without "Palm" nothing says "Coast": whichever of the two is absent, both are."""
    inp = words(PROMPT, demo[1], ModelBaselines()).with_model(Likelihood(*demo))
    masks = torch.ones(60, inp.n_features, dtype=torch.bool)
    masks[:30, 3] = False  # Palm
    masks[30:, 4] = False  # Coast
    texts = [demo[1].decode(row.ids) for row in inp.render(masks, torch.Generator().manual_seed(0))]
    for part in (texts[:30], texts[30:]):
        assert len({*part}) > 3
        assert all(("Palm" in text) == ("Coast" in text) for text in part)
        assert all("lives in" in text and ", FL and is a lawyer." in text for text in part)
    assert inp.render(masks[:1] | True, torch.Generator().manual_seed(0))[0].ids == inp.ids


@pytest.mark.parametrize("method", [FeatureAblation, KernelShap])
def test_causes_are_found_without_a_corpus(demo, method):
    """The grammar of the little model: hobbies come of the job, the city, and state and job."""
    model, tokenizer = demo
    inp = words(PROMPT, tokenizer, ModelBaselines())
    result = GenerationAttribution(method(model), tokenizer).attribute(
        inp, gen_args={"max_new_tokens": 5}
    )
    strongest = {
        token: {inp.names[i].strip(" .,") for i in row.topk(2).indices.tolist()}
        for token, row in zip(result.output_tokens, result.token_attr, strict=True)
    }
    assert "lawyer" in strongest["poker"]
    assert strongest["surfing"] == {"Palm", "Coast"}
    assert strongest["history"] == {"FL", "lawyer"}


def test_equal_seeds_give_equal_draws(demo):
    inp = words(PROMPT, demo[1], ModelBaselines())
    masks = torch.rand(20, inp.n_features, generator=torch.Generator().manual_seed(1)) > 0.5
    first, again, other = (
        [row.ids for row in inp.with_model(Likelihood(*demo)).render(masks, generator)]
        for generator in (torch.Generator().manual_seed(seed) for seed in (3, 3, 4))
    )
    assert first == again != other


def test_multi_word_candidates_end_with_the_feature(demo):
    baselines = bound(demo)
    text = "Anna lives in Palm Coast, FL and is a nurse."
    inp = words(text, demo[1], baselines, [(text.index("Palm"), text.index(","))])
    for found in draws(baselines, inp.slots[0], 30):
        assert 1 <= len(found.split()) <= 4
        assert "," not in found
        assert found.split()[0][0].isupper()


@pytest.mark.parametrize(
    "text",
    [
        "Dave",
        "...",
        "Привет мир",
        "1, 2, 3",
        "a\n\n\tb  c",
        "🙂 ok",
        "私は学生です。",
        "“Yes”, he said",
    ],
)
@pytest.mark.parametrize("make", [tiny.byte_level, tiny.metaspace, tiny.word_piece])
def test_any_text_is_supported(text, make):
    tokenizer = make()
    model = tiny.llama(len(tokenizer))
    inp = words(text, tokenizer, ModelBaselines(n_candidates=3)).with_model(
        Likelihood(model, tokenizer)
    )
    masks = ~torch.eye(inp.n_features, dtype=torch.bool)
    rows = inp.render(masks, torch.Generator().manual_seed(0))
    assert all(row.ids for row in rows)
    found = inp.matches()
    assert len(found) == len(inp.slots)
    for match in found:
        assert match.constant or match.n_candidates
        assert "" not in dict(match.candidates)  # never silently deletion
        assert not any("\ufffd" in text for text, _ in match.candidates)


SCRIPTS = {
    "ARABIC": ["باريس مدينة كبيرة", "روما مدينة كبيرة"],
    "HEBREW": ["פריז עיר גדולה", "רומא עיר גדולה"],
    "HANGUL": ["파리 도시 크다", "로마 도시 크다"],
    "DEVANAGARI": ["पेरिस शहर बड़ा", "रोम शहर बड़ा"],
    "CYRILLIC": ["Москва город большой", "Рим город большой"],
    "LATIN": ["Paris town large", "Rome town large"],
    "DIGIT": ["17 town large", "23 town large"],
    "ARABIC-INDIC": ["١٧ مدينة كبيرة", "٢٣ مدينة كبيرة"],
}


def scripts_of(texts):
    return {unicodedata.name(c).split()[0] for text in texts for c in text}


@pytest.mark.parametrize(
    ("text", "own", "keeps"),
    [
        ("ー", "학생", False),
        ("ー", "日", False),
        ("ʰ", "a", False),
        ("ラー", "カ", True),
        ("ー", "々", True),
        ("7", "12", True),
        ("b2", "a", True),
        ("2b", "a", False),
    ],
)
def test_common_script_letters_match_any_script(text, own, keeps):
    assert keeps_script(text, own) == keeps


@pytest.mark.parametrize("script", SCRIPTS)
def test_replacement_keeps_the_script(script):
    """Where nothing comes before a word, all scripts are as likely; so they are as answers."""
    model, tokenizer = counting([text for own in SCRIPTS.values() for text in own])
    first = {text.split()[0] for text in SCRIPTS[script]}
    inp = TextSegmentInput(SCRIPTS[script][0], tokenizer, baselines=ModelBaselines(n_candidates=30))
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer, "contrast")
    result = attribution.attribute(inp, SCRIPTS[script][1].split()[0])
    drawn = {text for text, _ in result.provenance["matches"]["prompt"][0]["candidates"]}
    assert first <= drawn
    assert scripts_of(drawn) == scripts_of(result.foil_tokens[0]) == {script}


@pytest.mark.parametrize("text", ["... ?!", "東京は日本の首都です。", "باريس هي عاصمة", "🙂🙂 🙂"])
def test_feature_without_candidates_stays_and_warns(demo, text):
    model, tokenizer = demo
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    with pytest.warns(UserWarning, match="no alternative for any of the") as told:
        result = attribution.attribute(TextSegmentInput(text, tokenizer), " golf")
    assert told[0].filename == __file__
    prompt = result.provenance["matches"]["prompt"]
    assert all(match["constant"] and match["determined"] == 1 for match in prompt)
    assert all(len(match["candidates"]) == 1 for match in prompt)  # itself: never deletion
    assert not result.token_attr.any()


def test_model_with_constant_prediction(demo):
    """Whatever is absent, "golf" stands there, and the answer is as likely as ever."""
    model, tokenizer = copy.deepcopy(demo[0]), demo[1]
    head = model.get_output_embeddings()
    golf = tokenizer.encode(" golf", add_special_tokens=False)[0]
    with torch.no_grad():
        head.weight.zero_()
        head.bias = nn.Parameter(30.0 * (torch.arange(len(head.weight)) == golf))
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    result = attribution.attribute(TextSegmentInput("Dave lives in", tokenizer), " golf")
    lives = result.provenance["matches"]["prompt"][1]
    assert lives["candidates"][0] == ("golf", pytest.approx(1.0, abs=1e-9))
    assert result.token_attr.abs().max() < 1e-5  # float32 logits of 30


def test_separate_proposal_model(demo):
    """With a tokenizer of its own."""
    tokenizer = tiny.byte_level()
    model = tiny.llama(len(tokenizer))
    asked = ModelBaselines(Likelihood(*demo), n_candidates=12)
    result = GenerationAttribution(FeatureAblation(model), tokenizer).attribute(
        words(PROMPT, tokenizer, asked), "poker"
    )
    examples = [match["examples"] for match in result.provenance["matches"]["prompt"]]
    assert any("Dover" in example for example in examples[3])


def masked(**config):
    """A small masked model of words, and its tokenizer."""
    tokenizer = tiny.word_piece()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=64, **sizes, **config)
    config.initializer_range = 0.5  # for the words to differ in how likely they are
    return BertForMaskedLM(config).eval(), tokenizer


def test_masked_model_proposes_from_both_sides(demo):
    """Held against a plain pass over the text with the word, and the next one, masked."""
    model, tokenizer = masked()
    text = "Dave lives in Austin, TX and is a nurse."
    baselines = ModelBaselines((model, tokenizer), n_candidates=3)
    inp = words(text, demo[1], baselines).with_model(Likelihood(*demo))
    found = inp.matches()
    number = text.split().index("is")
    ids = tokenizer(text)["input_ids"]
    is_at, a_at = (ids.index(tokenizer.convert_tokens_to_ids(word)) for word in ("is", "a"))
    hidden = list(ids)
    hidden[is_at] = hidden[a_at] = tokenizer.mask_token_id
    with torch.no_grad():
        logits = model(torch.tensor([hidden])).logits[0, is_at].double()
    logits[tokenizer.all_special_ids] = -torch.inf
    chances = logits.softmax(0)
    shares = dict(found[number].candidates)
    assert {"is"} < shares.keys()
    known = {word: float(chances[tokenizer.convert_tokens_to_ids(word)]) for word in shares}
    total = sum(known.values())
    assert shares == pytest.approx({w: chance / total for w, chance in known.items()}, abs=1e-5)
    # The text after it counts, too.
    other = words(text.replace("nurse", "lawyer"), demo[1], baselines).with_model(Likelihood(*demo))
    assert dict(other.matches()[number].candidates) != shares


def test_masked_model_likelihood_in_context():
    model, tokenizer = masked()
    beginning, words_between, rest = "Dave lives in", [" Austin", " is a"], ", TX and"
    found = MaskedProposer(model, tokenizer).log_probs_between(
        [beginning] * 2, words_between, [rest] * 2
    )
    for value, text in zip(found.tolist(), words_between, strict=True):
        ids = tokenizer(beginning + text + rest)["input_ids"]
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        first = len(tokenizer(beginning, add_special_tokens=False)["input_ids"]) + 1
        hidden = [*ids[:first], *[tokenizer.mask_token_id] * len(own), *ids[first + len(own) :]]
        assert ids[first : first + len(own)] == own
        with torch.no_grad():
            logits = model(torch.tensor([hidden])).logits[0].double()
        control = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        logits[:, [*control]] = -torch.inf
        told = logits.log_softmax(-1)
        expected = sum(float(told[first + i, token]) for i, token in enumerate(own))
        assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("positions", [512, 12])
def test_masked_model_proposes_for_any_prompt(demo, positions):
    """Also for one longer than its positions."""
    model, tokenizer = masked(max_position_embeddings=positions)
    inp = words(f"{PROMPT}: 3.5 km, 東京 and (no) …", demo[1], ModelBaselines((model, tokenizer)))
    result = GenerationAttribution(FeatureAblation(demo[0]), demo[1]).attribute(inp, "poker")
    assert len(result.provenance["matches"]["prompt"]) == inp.n_features
    assert result.token_attr.abs().max() > 0


def test_proposal_model_with_fewer_positions_than_the_prompt(demo):
    """It then goes by the text before a place, as far as it can."""
    tokenizer = tiny.byte_level()
    model = tiny.llama(len(tokenizer), max_position_embeddings=16)
    text = f"{PROMPT} golf. {PROMPT}"
    found = words(text, demo[1], ModelBaselines((model, tokenizer))).with_model(Likelihood(*demo))
    assert len(tokenizer(text)["input_ids"]) > 2 * 16
    assert dict(found.matches()[-1].candidates).keys() > {"include"}


@pytest.mark.parametrize(
    ("proposer", "told"),
    [
        (lambda: "bert-base-cased", r"give `\(model, tokenizer\)`"),
        (lambda: (masked()[0], tiny.byte_level()), "no mask token"),
        (lambda: (T5ForConditionalGeneration(T5Config(**TINY_T5)), tiny.byte_level()), "encoder"),
        (lambda: (BertModel(BertConfig(**TINY_BERT)), tiny.byte_level()), "no language head"),
        (lambda: tiny.llama(7), r"give `\(proposer, its tokenizer\)`"),
        (lambda: (tiny.llama(), tiny.byte_level(), 1), r"a tuple: give `\(model, tokenizer\)`"),
        (lambda: (tiny.llama(max_position_embeddings=1), tiny.byte_level()), "room for 1 tokens"),
        (lambda: masked(max_position_embeddings=2), "room for 2 tokens; at least 3"),
    ],
)
def test_unusable_proposal_models_are_refused(demo, proposer, told):
    inp = words(PROMPT, demo[1], ModelBaselines(proposer()))
    with pytest.raises((TypeError, ValueError), match=told):
        inp.with_model(Likelihood(*demo))


def test_local_model_proposes_for_a_remote_one(demo):
    baselines = ModelBaselines(demo).with_model(RemoteLikelihood(None, demo[1]))
    assert not baselines.matches(words(PROMPT, demo[1], baselines))[0].constant


@pytest.mark.parametrize("method", [FeatureAblation, KernelShap])
def test_default_baselines_equal_model_baselines(demo, method):
    model, tokenizer = demo
    attribution = GenerationAttribution(method(model), tokenizer)
    said = attribution.attribute(words(PROMPT, tokenizer, ModelBaselines()), "poker")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        unsaid = attribution.attribute(TextSegmentInput(PROMPT, tokenizer), "poker")
    assert not warned
    assert torch.equal(unsaid.full_attr, said.full_attr)
    assert unsaid.provenance["matches"] == said.provenance["matches"]
    tied = torch.tensor([[0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
    inp = TextSegmentInput(PROMPT, tokenizer)
    merged = attribution.attribute(inp, "poker", feature_mask=tied)
    said = attribution.attribute(
        words(PROMPT, tokenizer, ModelBaselines()), "poker", feature_mask=tied
    )
    assert torch.equal(merged.full_attr, said.full_attr)


@pytest.mark.parametrize("baselines", ["delete", None, "<unk>", [""] * 14])
def test_deletion_and_single_token_baselines_warn_once(demo, baselines):
    attribution = GenerationAttribution(FeatureAblation(demo[0]), demo[1])
    with pytest.warns(UserWarning, match="texts that the model never saw.*ModelBaselines") as told:
        attribution.attribute(words(PROMPT, demo[1], baselines), "poker")
    assert len(told) == 1
    assert told[0].filename == __file__


def test_captum_setup_does_not_warn(demo):
    attribution = GenerationAttribution(FeatureAblation(demo[0]), demo[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribution.attribute(TextTokenInput(PROMPT, demo[1]), "poker", output_unit=None)
    with pytest.warns(UserWarning, match="become one and the same token"):
        attribution.attribute(TextTokenInput(PROMPT, demo[1]), "poker")


def test_checkpoint_keeps_scored_rows(demo, tmp_path):
    model, tokenizer = demo
    attribution = GenerationAttribution(KernelShap(model), tokenizer)

    def attribute():
        inp = TextSegmentInput(PROMPT, tokenizer)
        return attribution.attribute(inp, "poker", checkpoint=tmp_path / "run.safetensors")

    n_rows = []
    hook = model.register_forward_pre_hook(
        lambda _, __, arguments: n_rows.append(len(arguments["input_ids"])), with_kwargs=True
    )
    with hook:
        first, n_first = attribute(), sum(n_rows)
        again = attribute()
    assert torch.equal(again.full_attr, first.full_attr)
    assert torch.equal(again.values.nan_to_num(), first.values.nan_to_num())
    assert sum(n_rows) - n_first < n_first / 2  # of the search and the probe


def test_default_gradient_baseline_is_zero(demo):
    method = GenerationGradientAttribution(LayerIntegratedGradients(demo[0], None), demo[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the long path
        unsaid = method.attribute(TextSegmentInput(PROMPT, demo[1]), "poker", n_steps=8)
        deleted = method.attribute(words(PROMPT, demo[1], "delete"), "poker", n_steps=8)
    assert torch.equal(unsaid.full_attr, deleted.full_attr)


class Counts(nn.Module):
    """What comes after the longest ending of a text that its sentences have, by counting."""

    def __init__(self, sentences, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.size, self.counts = size, {}
        for ids in sentences:
            for stop in range(1, len(ids)):
                for start in range(stop):
                    after = self.counts.setdefault(tuple(ids[start:stop]), torch.zeros(size))
                    after[ids[stop]] += 1

    def forward(self, input_ids):
        rows = [[self.after(row[: i + 1]) for i in range(len(row))] for row in input_ids.tolist()]
        return (torch.stack([torch.stack(row) for row in rows]) + 1e-4).log() + self.weight

    def after(self, ids):
        endings = (self.counts.get(tuple(ids[start:])) for start in range(len(ids)))
        found = next((counts for counts in endings if counts is not None), torch.ones(self.size))
        return found / found.sum()


def counting(sentences):
    vocabulary = {word: i for i, word in enumerate(["<s>", "<unk>"])}
    for word in re.findall(r"[^\s.,]+|[.,]", " ".join(sentences)):
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    rows = [[0, *fast.encode(sentence, add_special_tokens=False)] for sentence in sentences]
    return Counts(rows, len(vocabulary)), fast


def counting_pieces(sentences):
    """A model whose tokens are words with the space before them, single digits, and marks."""
    piece = re.compile(r" ?[a-z]+|[^a-z]")
    found = dict.fromkeys(p for sentence in sentences for p in piece.findall(sentence))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = ["".join(s for s, _ in byte_level.pre_tokenize_str(p)) for p in found]
    vocabulary = {p: i for i, p in enumerate(["<s>", *spelled])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    split = pre_tokenizers.Split(Regex(piece.pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<s>")
    rows = [[0, *fast.encode(sentence, add_special_tokens=False)] for sentence in sentences]
    return Counts(rows, len(vocabulary)), fast


PLACES = {
    "Austin": "Texas",
    "Boston": "Massachusetts",
    "Denver": "Colorado",
    "Salem": "Oregon",
    "Lake Placid": "Florida",
}


@pytest.fixture(scope="module")
def places():
    """A world of five cities, each in one state."""
    names = ("Anna", "Tom", "Raj")
    return counting([f"{n} moved to {c}, {s} in May." for n in names for c, s in PLACES.items()])


def rendered(places, *absent, unit="word", n=40, city="Austin"):
    model, tokenizer = places
    text = f"Anna moved to {city}, {PLACES[city]} in May."
    inp = words(text, tokenizer, ModelBaselines(), unit).with_model(Likelihood(model, tokenizer))
    masks = torch.ones(n, inp.n_features, dtype=torch.bool)
    masks[:, [i for i, name in enumerate(inp.names) if name.strip(" ,.") in absent]] = False
    assert not masks[0].all()
    rows = inp.render(masks, torch.Generator().manual_seed(0))
    return {tokenizer.decode(row.ids).replace(" ,", ",") for row in rows}


def test_city_and_state_are_drawn_jointly(places):
    every = {f"Anna moved to {city}, {state} in May" for city, state in PLACES.items()}
    assert {text.removesuffix(" .") for text in rendered(places, "Austin", "Texas")} == every
    alone = {text.removesuffix(" .") for text in rendered(places, "Austin")}
    assert alone == {f"Anna moved to {city}, Texas in May" for city in PLACES}
    assert len(rendered(places, "Texas")) == 1  # the city decides it


@pytest.mark.parametrize("absent", [("Lake",), ("Placid",), ("Lake", "Florida", "Placid")])
def test_phrase_with_tied_features(places, absent):
    found = {text.removesuffix(" .") for text in rendered(places, *absent, city="Lake Placid")}
    state = {city: name if "Florida" in absent else "Florida" for city, name in PLACES.items()}
    assert found == {f"Anna moved to {city}, {state[city]} in May" for city in PLACES}


def found_phrases(sentences, text):
    found = Alternatives(text, Likelihood(*counting(sentences)), 4, (0, len(text)))
    return [text[start:stop] for start, stop in found.phrases]


def test_function_words_end_no_phrase():
    """Nothing but "proud" comes before "of" there, and it is said in other places as well."""
    states = ("proud of", "glad about", "tired from", "sent to")
    named = ("Anna of Oslo", "Tom of Rome", "Raj of Lima", "Anna", "Tom", "Raj")
    sentences = [f"{n} is {s} it" for n in named for s in states]
    assert found_phrases(sentences, "Anna is proud of it") == []
    assert found_phrases(
        [f"{n} is {s} it" for n in named[3:] for s in states], "Anna is proud of it"
    )


def test_function_words_occur_inside_phrases():
    waters = ("Gulf of Oman", "Lake near Lima", "Bay at Rome", "Cape in Kenya")
    named = ("Anna of Oslo", "Tom of Cairo", "Anna", "Tom")
    sentences = [f"{n} saw {w} once" for n in named for w in waters]
    assert found_phrases(sentences, "Anna saw Gulf of Oman once") == ["Gulf of Oman"]


def test_repetition_is_no_phrase():
    """A text that says the same again is sure of it, and was not when it said it first."""
    things = ("cup", "hat", "key", "pen")
    pairs = [(a, b) for a in things for b in things if a != b]
    endings = ("the {0}", "his {1}", "my {1}")
    sentences = [f"the {a} and the {b} or {e.format(a, b)}" for a, b in pairs for e in endings]
    assert found_phrases(sentences, "the cup and the hat or the cup") == []


def test_sentence_draws_tied_words_jointly(places):
    whole = "Anna moved to Austin, Texas in May"
    found = {text.removesuffix(" .") for text in rendered(places, whole, unit="line")}
    names = ("Anna", "Tom", "Raj")
    told = {f"{n} moved to {c}, {s} in May" for n in names for c, s in PLACES.items()}
    assert len(found) > 10
    assert found <= told


def test_sentence_keeps_function_words_and_loses_content(demo):
    """A name and a pronoun, a city and its state change; what they determine does not."""
    text = "Anna lives in Palm Coast, FL and is a nurse. Her personal interests include"
    baselines = bound(demo)
    inp = words(text, demo[1], baselines, "sentence")
    drawn = {baselines(inp.slots[0], draw_generator(0, k, 0)) for k in range(16)}
    assert len(drawn) > 12
    form = re.compile(r"\w+ \w+ in [A-Z][\w ]+, [A-Z]{2} (with|and) is a \w+\.")
    assert all(form.fullmatch(text) for text in drawn)
    match = inp.with_baselines(baselines).matches()[0]
    assert match.determined < 0.01
    assert not match.constant


def test_repeated_name_in_a_feature_is_drawn_once(demo):
    text = "Anna lives in Palm Coast, FL. Anna lives in Palm Coast, FL."
    inp = TextSegmentInput(text, demo[1], groups=[[0, 6]], baselines=bound(demo))
    masks = torch.ones(16, inp.n_features, dtype=torch.bool)
    masks[:, 0] = False
    texts = [demo[1].decode(row.ids) for row in inp.render(masks, torch.Generator().manual_seed(0))]
    assert all(len(set(re.findall(r"(\w+) lives", text))) == 1 for text in texts)
    assert len(set(texts)) > 3


def test_missing_model_is_refused(demo):
    inp = words(PROMPT, demo[1], ModelBaselines())
    with pytest.raises(ValueError, match="asks the model under explanation"):
        inp.to_model_input(torch.zeros(1, inp.n_features))
    with pytest.raises(ValueError, match="give at least 1"):
        ModelBaselines(n_candidates=0)


def test_copies_are_not_bound_to_the_model(demo):
    baselines = pickle.loads(pickle.dumps(bound(demo, n_candidates=3)))
    assert baselines.n_candidates == 3
    inp = words(PROMPT, demo[1], baselines).with_model(Likelihood(*demo))
    slot = inp.slots[random.Random(0).randrange(3)]
    assert inp.matches()[slot.index].level == "model"
    other = pickle.loads(pickle.dumps(ModelBaselines(demo)))
    with pytest.raises(ValueError, match="which is not copied"):
        words(PROMPT, demo[1], other).with_model(Likelihood(*demo))


def test_full_coalition_needs_no_model_call(demo):
    class Silent(Likelihood):
        def likeliest(self, *arguments):
            pytest.fail("the model was asked")

    inp = words(PROMPT, demo[1], ModelBaselines()).with_model(Silent(*demo))
    every = torch.ones(1, inp.n_features, dtype=torch.bool)
    assert inp.render(every, torch.Generator().manual_seed(0))[0].ids == inp.ids


def test_gradient_baselines_replace_words_independently(demo):
    model, tokenizer = demo
    method = LayerIntegratedGradients(model, None)
    result = GenerationGradientAttribution(method, tokenizer).attribute(
        words(PROMPT, tokenizer, ModelBaselines()), "poker", n_steps=32
    )
    assert result.token_attr[0].abs().argmax() == PROMPT.split().index("lawyer.")


def test_remote_model_that_reports_no_other_tokens_is_refused(demo):
    with pytest.raises(ValueError, match="reports no tokens other than those sent"):
        RemoteLikelihood(None, demo[1]).likeliest("a", [(0, 1)], 1, lambda *_: True)


def test_one_pass_proposes_for_all_slots(demo):
    class Counting(Likelihood):
        n_asked = 0

        def likeliest(self, *arguments):
            self.n_asked += 1
            return super().likeliest(*arguments)

    model = Counting(*demo)
    inp = words(PROMPT, demo[1], ModelBaselines()).with_model(model)
    inp.render(~torch.eye(inp.n_features, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert model.n_asked == 1
