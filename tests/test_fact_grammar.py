"""The ground truth itself: the grammar's tables by counting, the shipped model by intervention."""

import json
import math
import random
import re
from collections import Counter

import pytest
import torch
from fact_grammar import SHIPPED, Grammar, corpus, load
from fact_grammar.card import continuation, interventions, loss, slot_scores
from fact_grammar.train import CORPUS_SIZE, Recipe, encode, fit, lessons, new_model, sample_many
from fact_grammar.vocabularies import VOCABULARIES
from hypothesis import given, settings
from hypothesis import strategies as st

PALM_COAST = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
CAUSES = {
    "pronoun": {"name"},
    "A": {"occupation"},
    "B": {"city"},
    "C": {"occupation", "state"},
    "D": {"A"},
}
GRAMMARS = [
    pytest.param(Grammar(varied, words), id=f"{name}-{'varied' if varied else 'rigid'}")
    for name, words in VOCABULARIES.items()
    for varied in (False, True)
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shipped():
    return load()


@pytest.fixture(scope="module")
def fresh():
    """Documents with a seed of their own, all to be continued from the pronoun on."""
    return sample_many(Grammar(), "tests", 200)


# --- the grammar ---------------------------------------------------------------------------------


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_c_is_independent_of_occupation_or_state_alone(grammar):
    jobs, states = grammar.alternatives["occupation"], grammar.alternatives["state"]
    table = {
        (job, state): grammar.allowed("C", {"occupation": job, "state": state})
        for job in jobs
        for state in states
    }
    assert all(len(words) == 1 for words in table.values())
    uniform = Counter({(word,): 3 for word in grammar.alternatives["C"]})
    for job in jobs:
        assert Counter(table[job, state] for state in states) == uniform
    for state in states:
        assert Counter(table[job, state] for job in jobs) == uniform


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_every_single_cause_restricts_its_effect(grammar):
    a = [grammar.allowed("A", {"occupation": job}) for job in grammar.alternatives["occupation"]]
    assert sorted(word for words in a for word in words) == sorted(grammar.alternatives["A"])
    # D would otherwise be a word about the occupation too.
    assert all(len({grammar.allowed("D", {"A": word}) for word in words}) == 3 for words in a)
    b = {grammar.allowed("B", {"city": city}) for city in grammar.alternatives["city"]}
    assert len(b) == len(grammar.alternatives["city"])
    pronouns = Counter(
        grammar.allowed("pronoun", {"name": n}) for n in grammar.alternatives["name"]
    )
    assert set(pronouns.values()) == {8}


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_slot_with_missing_cause_is_unrestricted(grammar):
    assert grammar.allowed("B", {"state": "FL"}) == grammar.alternatives["B"]
    assert grammar.allowed("C", {"state": "FL"}) == grammar.alternatives["C"]


def test_document_information_equals_its_derivation():
    documents = sample_many(Grammar(), "information", 3000)
    always = math.log(16 * 12 * 9 * 9 * 3) + 2 * math.log(2)  # name, city, state, job, A; two coins
    for document in documents[:200]:
        given_names = {slot.name for slot in document.slots}
        extra = math.log(59) * ("age" in given_names) + math.log(6) * ("pet" in given_names)
        assert document.information == pytest.approx(always + extra)
    entropy = always + 0.5 * math.log(59) + 0.5 * math.log(6)
    mean = sum(document.information for document in documents) / len(documents)
    # The spread of one document is 2.2 nats: four standard errors of 3,000.
    assert mean == pytest.approx(entropy, abs=0.16)


def test_stray_interest_adds_its_information():
    stray = 0.2
    rng = random.Random(1)
    seen = Counter()
    for _ in range(4000):
        document = Grammar().sample(rng, stray=stray)
        job, a = document.slot("occupation").text, document.slot("A").text
        allowed = a in Grammar().allowed("A", {"occupation": job})
        seen[allowed] += 1
        names = {slot.name for slot in document.slots}
        rest = math.log(16 * 12 * 9 * 9 * 4)
        rest += math.log(59) * ("age" in names) + math.log(6) * ("pet" in names)
        of_a = 0.8 / 3 + 0.2 / 27 if allowed else 0.2 / 27
        assert document.information - rest == pytest.approx(-math.log(of_a))
    # A stray draw hits an allowed interest 3 times in 27; four standard errors.
    assert seen[False] / 4000 == pytest.approx(stray * 24 / 27, abs=0.025)


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_equal_seeds_give_equal_documents(grammar):
    assert sample_many(grammar, "x", 20) == sample_many(grammar, "x", 20)
    assert sample_many(grammar, "x", 20) != sample_many(grammar, "y", 20)


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("before", ["pronoun", "A"])
def test_document_is_cut_before_the_requested_slot(grammar, before):
    rng = random.Random(3)
    for _ in range(50):
        document = grammar.sample(rng, before)
        generated = [slot for slot in document.slots if slot.start >= document.cut]
        assert document.prompt + document.continuation == document.text
        assert document.continuation.startswith(f" {generated[0].text}")
        assert generated[0].name == before
        assert list(document.causes) == [slot.name for slot in generated]
        for name, causes in document.causes.items():
            here = {slot.name for slot in document.slots}
            assert set(causes) == (CAUSES[name] if here >= CAUSES[name] else set())


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_segments_tile_the_text_and_hold_one_slot_each(grammar):
    rng = random.Random(4)
    for _ in range(50):
        document = grammar.sample(rng, "pronoun")
        both = document.segments("prompt") + document.segments("continuation")
        assert "".join(document.text[s.start : s.stop] for s in both) == document.text
        assert [s.slot for s in both if s.slot] == [slot.name for slot in document.slots]
        assert all(s.start == 0 or document.text[s.start] == " " for s in both)
        assert document.segments() == [s for s in both if s.stop <= document.cut]


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_words_tile_the_text_and_are_replaced_by_parts_of_other_fillers(grammar):
    rng = random.Random(4)
    for _ in range(20):
        document = grammar.sample(rng, "pronoun")
        words = document.segments("prompt", "word") + document.segments("continuation", "word")
        spelled = [document.text[s.start : s.stop] for s in words]
        assert "".join(spelled) == document.text
        assert [text.strip() for text in spelled] == document.text.split()
        for segment in document.segments("prompt", "word"):
            if segment.slot is not None:
                own = document.text[segment.start : segment.stop]
                slot = document.slot(segment.slot)
                assert own not in segment.replacements
                for text in segment.replacements:
                    assert any(text.strip(" ,.()") in other for other in slot.alternatives)


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_mark_segments_are_separate_and_not_replaced(grammar):
    document = grammar.sample(random.Random(4), "pronoun")
    both = document.segments("prompt", "mark") + document.segments("continuation", "mark")
    assert "".join(document.text[s.start : s.stop] for s in both) == document.text
    slots = {s.slot: document.text[s.start : s.stop].strip() for s in both if s.slot}
    assert slots == {slot.name: slot.text for slot in document.slots}
    marks = [s for s in both if document.text[s.start : s.stop].strip(" ") in {",", ".", "(", ")"}]
    assert marks
    assert all(s.slot is None for s in marks)


@pytest.mark.parametrize("unit", ["slot", "mark"])
@pytest.mark.parametrize("grammar", GRAMMARS)
def test_replacing_a_segment_changes_its_slot_value(grammar, unit):
    document = grammar.sample(random.Random(5))
    for segment in document.segments("prompt", unit):
        texts = [
            document.text[: segment.start] + words + document.text[segment.stop :]
            for words in segment.replacements
        ]
        if segment.slot is None:
            assert texts == [document.text]
            continue
        slot = document.slot(segment.slot)
        others = [word for word in slot.alternatives if word != slot.text]
        edited = [document.edited(slot.name, word) for word in others]
        assert texts == [edit.text for edit in edited]
        for edit, word in zip(edited, others, strict=True):
            assert edit.slot(slot.name).text == word
            assert all(edit.text[s.start : s.stop] == s.text for s in edit.slots)
            assert edit.continuation == document.continuation


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("before", ["pronoun", "A"])
def test_grammar_accepts_exactly_its_samples(grammar, before):
    rng = random.Random(6)
    for _ in range(30):
        document = grammar.sample(rng, before)
        assert grammar.permits(document, document.continuation)
        assert not grammar.permits(document, document.continuation[:-1])
        assert not grammar.permits(document, document.continuation + " Yes.")
        assert not grammar.permits(document, " Well." + document.continuation)
        for name, causes in document.causes.items():
            slot = document.slot(name)
            wrong = document.edited(
                name, rng.choice([w for w in slot.alternatives if w != slot.text])
            )
            if causes and name != "A":
                assert not grammar.permits(document, wrong.continuation)


def test_invalid_sampling_arguments_are_refused():
    with pytest.raises(ValueError, match="'pronoun' or 'A'"):
        Grammar().sample(random.Random(0), "B")
    with pytest.raises(ValueError, match="below 1"):
        Grammar().sample(random.Random(0), stray=1.5)
    with pytest.raises(KeyError, match="No slot 'moon'"):
        Grammar().sample(random.Random(0)).slot("moon")


# --- the shipped files ---------------------------------------------------------------------------


def test_shipped_files_are_few_and_small():
    sizes = {path.name: path.stat().st_size for path in SHIPPED.iterdir() if path.is_file()}
    assert set(sizes) == {
        "README.md",
        "config.json",
        "corpus.txt",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sizes["model.safetensors"] < 1_000_000
    assert sizes["corpus.txt"] < 400_000
    assert "auto_map" not in json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))


def test_shipped_corpus_is_grammatical_and_varied():
    texts = corpus()
    assert texts == [d.text for d in sample_many(Grammar(), "corpus 0", CORPUS_SIZE)]
    assert len(set(texts)) > 0.99 * len(texts)
    for slot, words in Grammar().alternatives.items():
        assert all(any(word in text for text in texts) for word in words), slot


def test_tokens_carry_their_leading_space(shipped):
    tokenizer = shipped[1]
    ids = tokenizer(PALM_COAST)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    pieces = [tokenizer.decode([i]) for i in ids[1:]]
    assert "".join(pieces) == PALM_COAST
    for word in re.findall(r" \w+", PALM_COAST):
        assert any(word.startswith(piece) for piece in pieces if piece.startswith(" "))
    assert not any(piece.rstrip() != piece for piece in pieces)


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_tokenizer_round_trips_any_text(shipped, text):
    tokenizer = shipped[1]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_biography_as_chat_turns(shipped):
    tokenizer = shipped[1]
    facts, start = PALM_COAST.split(". ")
    turns = [{"role": "system", "content": f"{facts}."}, {"role": "user", "content": start}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.bos_token + PALM_COAST


# --- the shipped model ---------------------------------------------------------------------------


def test_model_predicts_determined_words(shipped, fresh):
    scores = slot_scores(*shipped, fresh)
    for name in ("pronoun", "B", "C", "D"):
        assert all(score[name].expected for score in scores), name
        assert min(score[name].log_prob for score in scores) > math.log(0.95), name
    a = [score["A"].log_prob for score in scores]
    # Between one in three and the same with one A in twenty taken from anywhere, as it was trained.
    assert math.log(0.95 / 3 + 0.05 / 27) - 0.02 < sum(a) / len(a) < math.log(1 / 3) + 0.02
    assert min(a) > math.log(1 / 3) - 0.5


def test_model_card_numbers_hold(shipped, fresh):
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    scores = slot_scores(*shipped, fresh)
    for name in ("pronoun", "B", "C", "D"):
        accuracy = sum(score[name].expected for score in scores) / len(scores)
        assert f"| {name} | {accuracy:.2%} |" in card
    reached, least = map(float, re.findall(r"(\d\.\d{4})[^\d]", card)[:2])
    measured, minimum = loss(*shipped, fresh)
    # The same gap on other documents, whose lengths and facts differ.
    assert measured - minimum == pytest.approx(reached - least, abs=0.003)


def test_slot_scores_equal_a_plain_forward(shipped, fresh):
    model, tokenizer = shipped
    scores = slot_scores(model, tokenizer, fresh[:5])
    for document, score in zip(fresh[:5], scores, strict=True):
        for slot in document.slots:
            before = tokenizer(document.text[: max(slot.start - 1, 0)])["input_ids"]
            words = document.text[max(slot.start - 1, 0) : slot.stop]
            words = tokenizer(words, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([before + words])).logits[0, len(before) - 1 : -1]
            taken = logits.log_softmax(-1)[range(len(words)), words].sum().item()
            assert score[slot.name].log_prob == pytest.approx(taken, abs=1e-4)  # float32


def test_words_depend_on_their_causes_alone(shipped, fresh):
    effects = interventions(*shipped, fresh[:4])
    for (changed, word), change in effects.items():
        if changed in CAUSES[word]:
            assert change > 1, (changed, word)
        else:
            assert change < 0.05, (changed, word)
    tried = {changed for changed, _ in effects}
    assert tried == set(Grammar().alternatives) - {"D"}


def test_palm_coast_prompt_has_the_grammatical_continuation(shipped):
    written = continuation(*shipped, PALM_COAST)
    found = re.fullmatch(r" (\w+), surfing and (\w+)\. A good day ends with (.+)\.</s>", written)
    assert found is not None, written
    a, c, d = found.groups()
    grammar = Grammar()
    assert a in {"golf", "poker", "tennis"}
    assert (c,) == grammar.allowed("C", {"occupation": "lawyer", "state": "FL"})
    assert (d,) == grammar.allowed("D", {"A": a})
    start, end = PALM_COAST.split(" His", 1)
    assert continuation(*shipped, start) == f" His{end}{written}"


def test_generated_text_is_grammatical_and_ends(shipped, fresh):
    tokenizer = shipped[1]
    for document in fresh[:15]:
        written = continuation(*shipped, document.prompt)
        assert written.endswith(tokenizer.eos_token)
        assert Grammar().permits(document, written.removesuffix(tokenizer.eos_token)), written


# --- the training --------------------------------------------------------------------------------


def test_training_depends_on_the_seed_alone(shipped):
    tokenizer = shipped[1]

    def weights(seed):
        recipe = Recipe(seed=seed, documents=64, steps=3, batch=16, tuned=1)
        model = new_model(tokenizer, torch.Generator().manual_seed(seed))
        rows = encode(lessons(Grammar(), recipe), tokenizer)
        fit(model, rows, recipe, tokenizer.pad_token_id)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    state = torch.get_rng_state()
    first = weights(1)
    torch.rand(7)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))
    torch.set_rng_state(state)
    weights(3)
    assert torch.equal(torch.get_rng_state(), state)
