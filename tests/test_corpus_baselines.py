"""Replacements from a corpus, held against grammars whose slots are known."""

import json
import random
import re
import unicodedata
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_llm_ext.text.baselines import words
from captum_llm_ext.text.baselines.corpus.baselines import CorpusBaselines
from captum_llm_ext.text.baselines.slot import Baseline, Slot

MEN = tuple("Dave Tom Carl Ivan Omar Paul Hugo Liam".split())
WOMEN = tuple("Anna Beth Cora Dina Emma Faye Gina Iris".split())
SPORTS = tuple("golf surfing tennis rowing hiking boxing skiing judo".split())
THINGS = tuple("clubs wetsuits rackets oars boots gloves poles belts".split())

PEOPLE = {
    "name": MEN + WOMEN,
    "age": tuple(map(str, range(18, 80))),
    "city": ("Palm Coast", "Boston", "Cedar Falls", "Salt Lake City", "Reno", "Tulsa", "El Paso"),
    "state": tuple("FL NC TX OH UT WA OR ME GA".split()),
    "job": tuple("lawyer nurse baker pilot teacher farmer plumber singer".split()),
    "pet": tuple("dog cat parrot rabbit".split()),
    "his": ("His", "Her"),
    "he": ("He", "She"),
    "a": SPORTS,
    "b": ("chess", "cooking", "reading", "painting", "pottery", "bird watching"),
    "c": tuple("jazz opera poetry theatre cinema ballet".split()),
    "d": THINGS,
}
GOODS = {
    "colour": tuple("red blue green black white yellow".split()),
    "vehicle": tuple("bicycle tractor truck scooter van boat".split()),
    "town": tuple("Oslo Turin Lyon Porto Graz Ghent".split()),
    "firm": ("Acme", "Volta Works", "Nordic Motors", "Kappa", "Alder & Sons", "Helix"),
    "price": tuple(f"{n},{m}00" for n in range(1, 8) for m in range(1, 6)),
    "kg": tuple(map(str, range(100, 150))),
    "p1": (parts := tuple("brakes seats lights wheels mirrors roof horn pedals".split())),
    "p2": parts,
    "p3": parts,
    "day": tuple("Monday Tuesday Wednesday Thursday Friday".split()),
    "buyer": MEN + WOMEN,
}


def filled(template, facts):
    """The text, and per slot its name and place."""
    text, places, done = "", [], 0
    for gap in re.finditer(r"\{(\w+)\}", template):
        text += template[done : gap.start()]
        places.append((gap[1], len(text), len(text) + len(facts[gap[1]])))
        text += facts[gap[1]]
        done = gap.end()
    return text + template[done:], places


def person(rng):
    facts = {slot: rng.choice(fillers) for slot, fillers in PEOPLE.items()}
    facts["his"], facts["he"] = ("His", "He") if facts["name"] in MEN else ("Her", "She")
    facts["d"] = THINGS[SPORTS.index(facts["a"])]
    return facts


def rigid(rng):
    """One order and one wording; half of the documents tell the age."""
    age = ", {age}," if rng.random() < 0.5 else ""
    return filled(
        "{name}" + age + " lives in {city}, {state} and is a {job}. {his} personal interests "
        "include {a}, {b} and {c}. {he} also owns {d}.",
        person(rng),
    )


def varied(rng):
    """Sentences in any order, two wordings each, every fact missing in a quarter of the texts."""
    sentences = [
        ("{S} lives in {city}.", "{S} comes from {city}."),
        ("{S} pays taxes in {state}.", "{S} votes in {state}."),
        ("{S} is a {job}.", "{S} works as a {job}."),
        ("{S} has a {pet}.", "{S} keeps a {pet}."),
        ("{S} is {age} years old.", "{S} turned {age}."),
    ]
    told = [rng.choice(wordings) for wordings in sentences if rng.random() > 0.25]
    rng.shuffle(told)
    told.append(rng.choice(("{his} interests include {a}, {b} and {c}.", "{S} likes {a} and {b}.")))
    told.append(rng.choice(("{he} owns {d}.", "{he} bought {d}.")))
    subjects = ["{name}"] + ["{he}"] * len(told)
    text = " ".join(s.replace("{S}", who) for s, who in zip(told, subjects, strict=False))
    return filled(text, person(rng))


def advert(rng):
    """Adjacent slots, one list for three slots, numbers in two slots, optional sentences."""
    sentences = [
        ("It was built in {town} by {firm}.", "{firm} made it in {town}."),
        ("It costs {price} dollars.", "The price is {price} dollars."),
        ("It weighs {kg} kg.", "Its weight is {kg} kg!"),
        ("Buyers praise the {p1} and the {p2}, not the {p3}.",),
        ("{buyer} bought it on {day}.", "On {day}, {buyer} bought it."),
    ]
    told = [rng.choice(wordings) for wordings in sentences if rng.random() > 0.25]
    rng.shuffle(told)
    text = " ".join(["This {colour} {vehicle} is for sale:", *told])
    return filled(text, {slot: rng.choice(fillers) for slot, fillers in GOODS.items()})


GRAMMARS = {"rigid": (rigid, PEOPLE), "varied": (varied, PEOPLE), "advert": (advert, GOODS)}


def texts_of(sample, n, seed=0):
    rng = random.Random(seed)
    return [sample(rng)[0] for _ in range(n)]


@pytest.fixture(scope="module", params=GRAMMARS)
def grammar(request):
    sample, fillers = GRAMMARS[request.param]
    return sample, fillers, CorpusBaselines(texts_of(sample, 1000))


@pytest.fixture(scope="module")
def biographies():
    return CorpusBaselines(texts_of(rigid, 1000))


def features(text, places):
    """A feature per slot and per other word, punctuation attached; with the slot's name or None."""
    done = 0
    for word in re.finditer(r"\s*\S+", text):
        if word.end() <= done:
            continue
        slot = next((p for p in places if p[1] < word.end() and word.start() < p[2]), None)
        done = re.compile(r"\S*").match(text, max(word.end(), slot[2] if slot else 0)).end()
        yield Slot(text, word.start(), done, unit="word"), slot


def slot_at(text, part, unit="word"):
    start = text.index(part)
    return Slot(text, start, start + len(part), unit=unit)


def draws(baselines, slot, n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [baselines(slot, generator) for _ in range(n)]


# Against the grammars


def test_slot_value_is_replaced_by_another_of_its_slot(grammar):
    sample, fillers, baselines = grammar
    rng = random.Random(1)
    hits = Counter()
    for text, places in (sample(rng) for _ in range(12)):
        for slot, found in features(text, places):
            if found is None:
                continue
            name, start, stop = found
            before, after = text[slot.start : start], text[stop : slot.stop]
            others = {before + other + after for other in fillers[name]} - {slot.text}
            hits.update(drawn in others for drawn in draws(baselines, slot, n=4))
    assert hits[True] / hits.total() >= 0.97


def test_constant_template_words_stay(biographies):
    rng = random.Random(2)
    kept = Counter()
    for text, places in (rigid(rng) for _ in range(12)):
        for slot, found in features(text, places):
            if found is None:
                kept[draws(biographies, slot, n=1) == [slot.text]] += 1
                assert biographies.explain(slot).constant
    assert kept[True] / kept.total() >= 0.97


def test_replacement_is_independent_of_facts_that_depend_on_the_original(biographies):
    # The pronoun is told by the name and the thing owned by the sport, and both stand in the text.
    text = "Dave lives in Reno, FL and is a nurse. His personal interests include golf, chess and "
    text += "jazz. He also owns clubs."
    assert set(draws(biographies, slot_at(text, "Dave"), 400)) == {*MEN, *WOMEN} - {"Dave"}
    sports = {f" {sport}," for sport in SPORTS} - {" golf,"}
    assert set(draws(biographies, slot_at(text, " golf,"), 400)) == sports


def test_two_word_city_is_replaced_by_cities_of_other_lengths(biographies):
    text = "Dave lives in Palm Coast, FL and is a lawyer."
    drawn = set(draws(biographies, slot_at(text, " Palm Coast,"), 400))
    assert drawn == {f" {city}," for city in PEOPLE["city"]} - {" Palm Coast,"}


def test_draw_frequencies_equal_corpus_frequencies():
    corpus = [f"I saw {what} there." for what in ["a"] * 30 + ["b"] * 60 + ["c"] * 10]
    drawn = draws(CorpusBaselines(corpus), slot_at("I saw c there.", " c"), 3000)
    # Four standard errors of a share of one third of 3,000.
    assert drawn.count(" a") / 3000 == pytest.approx(1 / 3, abs=0.035)
    assert set(drawn) == {" a", " b"}


def test_included_original_is_drawn_at_its_corpus_frequency():
    corpus = [f"I saw {what} there." for what in ["a"] * 30 + ["b"] * 60 + ["c"] * 10]
    baselines = CorpusBaselines(corpus, exclude_original=False)
    drawn = draws(baselines, slot_at("I saw b there.", " b"), 3000)
    assert drawn.count(" b") / 3000 == pytest.approx(0.6, abs=0.036)  # four standard errors


def test_sentence_is_replaced_by_a_sentence(biographies):
    text = "Dave lives in Reno, FL and is a nurse. His personal interests include golf, chess and "
    text += "jazz. He also owns clubs."
    middle = " His personal interests include golf, chess and jazz."
    sentence = re.compile(r" (His|Her) personal interests include [\w, ]+\.")
    assert all(sentence.fullmatch(s) for s in draws(biographies, slot_at(text, middle, "sentence")))
    first = re.compile(r"\w+(, \d+,)? lives in [\w, ]+ and is a \w+\.")
    opening = slot_at(text, "Dave lives in Reno, FL and is a nurse.", "sentence")
    assert all(first.fullmatch(s) for s in draws(biographies, opening))


def test_generated_last_word_is_matched_by_left_context(biographies):
    text = "Dave lives in Reno, FL and is a nurse. His personal interests include golf"
    slot = Slot(text, text.index(" golf"), len(text), unit="word", generated=True)
    assert biographies.explain(slot).level == "left"
    assert set(draws(biographies, slot, 300)) == {f" {s}" for s in SPORTS} - {" golf"}


def test_word_fragment_is_replaced_by_fragments_of_the_slot(biographies):
    text = "Dave lives in Reno, FL and is a lawyer. His"
    for part in (" law", "yer"):
        for drawn in draws(biographies, slot_at(text, part, "token")):
            ends = "startswith" if part == " law" else "endswith"
            assert any(getattr(job, ends)(drawn.strip()) for job in PEOPLE["job"])
            assert drawn.startswith(" ") == part.startswith(" ")


def test_slot_with_few_occurrences_backs_off_to_shorter_context():
    # "quietly" follows one name only: with it asked for, nobody else could stand there.
    corpus = [*texts_of(rigid, 300), "Dave lives quietly in Reno, FL and is a nurse."]
    match = CorpusBaselines(corpus).explain(slot_at(corpus[-1], "Dave"))
    assert match.level == "both"
    assert "quietly" not in match.surroundings
    assert match.n_occurrences >= 10
    assert set(match.examples) <= {*MEN, *WOMEN}


# What is told about a match


def test_explain_counts_occurrences():
    corpus = [
        f"{n} sheep {v} home." for n, v in [("Ten", "go"), ("Six", "go"), ("Ten", "stay")] * 9
    ]
    match = CorpusBaselines(corpus).explain(slot_at("Ten sheep go home.", "Ten"))
    # "stay" stands in place of "go" and never beside it: the two are one class of surroundings.
    assert (match.level, match.n_occurrences, match.n_candidates) == ("both", 27, 1)
    assert (match.constant, match.examples) == (False, ("Six",))


def test_slot_is_constant_only_if_seen_often_enough():
    same = [*["The cat sat on the mat."] * 30, "A dog ran."]
    match = CorpusBaselines(same).explain(slot_at(same[0], " sat"))
    assert (match.level, match.constant, match.n_candidates) == ("both", True, 0)
    few = CorpusBaselines(same[-4:], min_candidates=0)
    assert not few.explain(slot_at(same[0], " sat")).constant
    assert " sat" not in draws(few, slot_at(same[0], " sat"))


def test_min_occurrences_bounds_matches():
    corpus = [f"She said {word} twice." for word in ("yes", "no", "maybe", "never")]
    slot = slot_at("She said yes twice.", " yes")
    # Of four sentences nobody knows which words are their frame.
    assert CorpusBaselines(corpus, min_occurrences=4).explain(slot).level == "kinds"
    strict = CorpusBaselines(corpus, min_occurrences=5, min_candidates=0)
    assert strict.explain(slot).level == "shape"


SHARING = """Salt Lake City, Kansas City, Fort Lee City, Lake Placid, Boston, Austin, Palm Coast,
New York, New Haven, University of Utah, Gulf of Aden, Reno""".replace("\n", " ").split(", ")


@pytest.mark.parametrize("frame", ["{} lives in {} and is a nurse.", "Name: {}\nCity: {}\nOk."])
def test_words_shared_by_phrases_are_no_template_words(frame):
    rng = random.Random(0)
    corpus = [frame.format(rng.choice(MEN + WOMEN), rng.choice(SHARING)) for _ in range(500)]
    # "of" and "City" stand between slots, too.
    corpus += [f"The City of {rng.choice(THINGS)} is {rng.choice(SPORTS)}." for _ in range(500)]
    baselines = CorpusBaselines(corpus)
    for place in SHARING:
        text = frame.format("Zoe", place)
        start = text.index(place)
        for word in re.finditer(r"\S+", place):
            stop = start + word.end()
            slot = Slot(text, start + word.start() - 1, stop, unit="word")
            parts = {drawn.strip() for drawn in draws(baselines, slot, n=12)}
            assert word.group() not in parts
            others = [other.split() for other in SHARING]
            assert all(any(is_part(part.split(), other) for other in others) for part in parts)


@pytest.mark.parametrize(
    ("places", "frame"),
    [
        (("Fort Lee", "Palm Coast"), "{} went to {} by {}."),
        (("Red Square", "Green Park", "Hyde Park"), "{} was at {} with {}."),
        (("Line 12", "Route 7"), "{} takes {} to {}."),
        (("Fort Lee", "Palm Coast"), "From {} to {} and {}."),
        (("red wine", "green tea"), "{} drinks {} with {}."),
        (("red wine", "white wine", "green tea"), "{} drinks {} with {}."),
        (("by train", "by night bus", "on foot"), "{} went home {} at {}."),
        (("very good", "rather poor"), "The mark of {} was {} in {}."),
    ],
)
def test_slot_values_of_two_or_three_words_are_no_paraphrases(places, frame):
    """Each of their words is likely in its place, and none is ever absent if it stays."""
    rng = random.Random(0)
    corpus = [
        frame.format(rng.choice(MEN + WOMEN), rng.choice(places), rng.choice(THINGS))
        for _ in range(400)
    ]
    baselines = CorpusBaselines(corpus, min_candidates=0)
    for place in places:
        text = frame.format("Zoe", place, THINGS[0])
        for word in place.split():
            start = text.index(word)
            slot = Slot(text, start - 1, start + len(word), unit="word")
            assert {drawn.strip() for drawn in draws(baselines, slot, n=12)}.isdisjoint([word])


def test_paraphrases_stay_unreplaced():
    rng = random.Random(0)
    corpus = [
        f"{rng.choice(MEN)} {rng.choice(('lives in', 'resides at'))} {rng.choice(SPORTS)} now."
        for _ in range(400)
    ]
    baselines = CorpusBaselines(corpus, min_candidates=0)
    text = f"Zoe lives in {SPORTS[0]} now."
    for word in ("lives", "in"):
        start = text.index(f" {word} ")
        slot = Slot(text, start, start + len(word) + 1, unit="word")
        assert {drawn.strip() for drawn in draws(baselines, slot, n=12)} == {word}


def is_part(words, text):
    return any(text[i : i + len(words)] == words for i in range(len(text)))


def test_optional_insertion_is_no_alternative():
    rng = random.Random(0)
    corpus = [
        f"{rng.choice(MEN)} from {rng.choice(('Rome', 'Oslo', 'Bern', 'Kyiv', 'Graz', 'Lyon'))}"
        f"{rng.choice(('', ' with a ' + rng.choice(THINGS)))} and a {rng.choice(SPORTS)} fan left."
        for _ in range(600)
    ]
    baselines = CorpusBaselines(corpus)
    text = "Dave from Rome with a boots and a golf fan left."
    for word in (" from", " with", " and", " fan", " left"):
        assert baselines.explain(slot_at(text, word)).constant, word


def test_few_candidates_warn_once_per_slot(recwarn):
    corpus = [f"I saw {what} there." for what in ["a", "b"] * 20]
    baselines = CorpusBaselines(corpus, min_candidates=2)
    with pytest.warns(UserWarning, match=r"1 other texts for 'a'.*`min_candidates`=2"):
        baselines.explain(slot_at("I saw a there.", " a"))
    draws(baselines, slot_at("I saw a there.", " a"))
    assert not recwarn.list


# The way down where surroundings do not help


def test_match_backs_off_from_context_to_shape_to_any():
    corpus = ["abc DEF 12 Ghi jkl", "mno PQR 345 Stu vwx"]
    baselines = CorpusBaselines(corpus, min_candidates=0)
    for word, alike in (("77", {"12", "345"}), ("XYZ", {"DEF", "PQR"}), ("Zzz", {"Ghi", "Stu"})):
        slot = slot_at(f"unheard of {word} said nobody", f" {word}")
        assert baselines.explain(slot).level == "shape"
        assert {text.strip() for text in draws(baselines, slot)} == alike
    only_lower = CorpusBaselines(["abc def"], min_candidates=0)
    slot = slot_at("unheard of 77 said nobody", " 77")
    assert only_lower.explain(slot).level == "length"
    assert set(draws(only_lower, slot)) == {" abc", " def"}


def test_feature_longer_than_the_corpus():
    slot = slot_at("x " + "very " * 400 + "long", " " + "very " * 400 + "long")
    baselines = CorpusBaselines(["one two three", "four five"], min_candidates=0)
    assert baselines.explain(slot).level == "any"
    known = {"one two three", "one two", "two three", *"one two three four five".split()}
    assert {text.strip() for text in draws(baselines, slot)} <= known | {"four five"}


def test_match_length_keeps_the_word_count():
    corpus = texts_of(rigid, 100)
    slot = slot_at("Dave lives in Palm Coast, FL", " Palm Coast,")
    by_length = {len(text.split()) for text in draws(CorpusBaselines(corpus, match="length"), slot)}
    by_any = {len(text.split()) for text in draws(CorpusBaselines(corpus, match="any"), slot)}
    assert by_length == {2}
    assert by_any == {1, 2, 3, 4}


def test_corpus_without_alternatives_keeps_the_feature_and_warns():
    baselines = CorpusBaselines(["echo"])
    with pytest.warns(UserWarning, match="0 other texts for 'echo'"):
        match = baselines.explain(slot_at("echo echo", " echo"))
    assert (match.n_candidates, match.constant) == (0, False)
    assert set(draws(baselines, slot_at("echo echo", " echo"))) == {" echo"}


def test_white_space_is_kept(biographies):
    slot = Slot("Dave \n\n lives", 4, 8)
    assert draws(biographies, slot, 3) == [" \n\n "] * 3
    assert biographies.explain(slot).level == "blank"


# Seeds


def test_draws_depend_on_the_generator_alone(biographies):
    slot = slot_at("Dave lives in Reno, FL and is a nurse.", " FL")
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state()
    first = draws(biographies, slot, seed=7)
    random.seed(6)
    assert torch.equal(before, torch.get_rng_state())
    assert draws(biographies, slot, seed=7) == first
    assert draws(biographies, slot, seed=8) != first
    assert isinstance(biographies, Baseline)


@pytest.mark.parametrize("match", ["context", "length", "any"])
def test_equal_corpus_and_seed_give_equal_draws(match):
    corpus = texts_of(rigid, 100)
    slots = [slot for slot, _ in features(*rigid(random.Random(3)))]
    one, two = (CorpusBaselines(iter(corpus), match=match, seed=4) for _ in range(2))
    # Asked in another order.
    reverse = [draws(two, slot, 5) for slot in slots[::-1]]
    assert [draws(one, slot, 5) for slot in slots] == reverse[::-1]


# Text of every kind


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_atoms_cover_all_but_white_space(text):
    found = [atom for atom in words.atoms(text) if atom.stop > atom.start]
    assert all(text[atom.start : atom.stop] == atom.text for atom in found)
    assert "".join(atom.text for atom in found) == "".join(text.split())


@pytest.mark.parametrize(
    ("text", "atoms"),
    [
        ("Isn't it 3.5, Mr. X-Ray?", ["Isn't", "it", "3.5", ",", "Mr", ".", "X-Ray", "?"]),
        ("北京的小西。", ["北", "京", "的", "小", "西", "。"]),
        (unicodedata.normalize("NFD", "café né"), ["cafe\u0301", "ne\u0301"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("👨‍👩‍👧👍🏽🇫🇷🇩🇪", ["👨‍👩‍👧", "👍🏽", "🇫🇷", "🇩🇪"]),
        ("a\r\nb", ["a", "\n", "b"]),
    ],
)
def test_atom_boundaries(text, atoms):
    assert [atom.text for atom in words.atoms(text)] == atoms


def test_scripts_without_spaces_have_slots():
    rng = random.Random(0)
    cities, jobs = ("北京", "上海", "广州", "成都"), ("律师", "医生", "老师")
    corpus = [f"{rng.choice(cities)}的小李是{rng.choice(jobs)}。" for _ in range(200)]
    baselines = CorpusBaselines(corpus)
    text = "北京的小李是律师。"
    assert set(draws(baselines, slot_at(text, "北京"), 100)) == {*cities} - {"北京"}
    assert set(draws(baselines, slot_at(text, "律师。"), 100)) == {"医生。", "老师。"}
    assert baselines.explain(slot_at(text, "是")).constant


def test_emoji_and_combining_marks_are_replaced_whole():
    moods, names = ("👍🏽", "👨‍👩‍👧", "🇫🇷"), ("Zoe\u0308", "Rene\u0301", "Ann")
    corpus = [f"{name} sent {mood} today." for name in names for mood in moods] * 5
    baselines = CorpusBaselines(corpus)
    text = "Zoe\u0308 sent 👍🏽 today."
    assert set(draws(baselines, slot_at(text, " 👍🏽"))) == {" 👨‍👩‍👧", " 🇫🇷"}
    assert set(draws(baselines, slot_at(text, "Zoe\u0308"))) == {"Rene\u0301", "Ann"}


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\u2028"])
def test_every_line_break_counts_as_context(line_break):
    corpus = [f"Q: Capital?{line_break}A: {city}" for city in ("Oslo", "Rome", "Bern", "Riga") * 5]
    text = f"Q: Capital?{line_break}A: Oslo{line_break}Q:"
    slot = slot_at(text, " Oslo")
    assert set(draws(CorpusBaselines(corpus), slot)) == {" Rome", " Bern", " Riga"}


def test_single_document_corpus():
    book = " ".join(texts_of(rigid, 200))
    slot = slot_at("Dave lives in Reno, FL and is a lawyer. His", " lawyer.")
    jobs = {f" {job}." for job in PEOPLE["job"]} - {" lawyer."}
    assert set(draws(CorpusBaselines([book]), slot, 300)) == jobs


# Files and what is wrong with them


def test_corpus_file_equals_a_list(tmp_path):
    corpus = texts_of(rigid, 60)
    (tmp_path / "lines.txt").write_bytes("\r\n".join(corpus).encode("utf-8-sig"))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in corpus))
    slots = [slot for slot, _ in features(*rigid(random.Random(3)))]
    wanted = [draws(CorpusBaselines(corpus), slot, 3) for slot in slots]
    for source in (tmp_path / "lines.txt", str(tmp_path / "lines.jsonl")):
        baselines = CorpusBaselines(source)
        assert [draws(baselines, slot, 3) for slot in slots] == wanted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n\n", "holds no text"),
        ("binary.txt", b"abc\x00def", "binary: a zero byte at offset 3"),
        ("latin.txt", b"caf\xe9 noir", r"byte 0xe9 at offset 3.*errors=\"replace\""),
        ("bad.jsonl", b'{"text": "a"}\n{"text', "line 2, is not JSON"),
        ("other.jsonl", b'{"body": "a"}', 'line 1, has no string under "text"'),
    ],
)
def test_bad_corpus_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        CorpusBaselines(tmp_path / name)


def test_invalid_bytes_are_replaced_on_request(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    baselines = CorpusBaselines(tmp_path / "latin.txt", errors="replace", match="length")
    drawn = set(draws(baselines, slot_at("un thé", " thé")))
    assert drawn == {" caf", " \ufffd", " noir"}


@pytest.mark.parametrize(
    ("corpus", "error", "message"),
    [
        ([], ValueError, "holds no text"),
        (["", " \n"], ValueError, "holds no text"),
        (["a", 3], TypeError, "Document 1 of the corpus is a int"),
        (b"text", TypeError, "`corpus` is a bytes"),
        ({"text": "a"}, TypeError, "`corpus` is a dict"),
        (None, TypeError, "`corpus` is a NoneType"),
        ("Dave lives in Reno.", FileNotFoundError, "Texts themselves go into a list"),
        ("long " * 2000, FileNotFoundError, "Texts themselves go into a list"),
    ],
)
def test_bad_corpus_is_refused(corpus, error, message):
    with pytest.raises(error, match=message):
        CorpusBaselines(corpus)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"match": "closest"}, "`match` is 'closest'"),
        ({"errors": "ignore"}, "`errors` is 'ignore'"),
        ({"min_occurrences": 0}, "`min_occurrences` is 0"),
    ],
)
def test_unknown_option_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CorpusBaselines(["text"], **arguments)
