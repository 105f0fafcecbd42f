"""The prompts whose causes are known, and how attributions of them are judged."""

import itertools
import json

import pytest
from real_causes import __main__ as runner
from real_causes import measured as measuring
from real_causes.judged import answer_of, judge, paired, wilson
from real_causes.lists import LISTS, alternatives, bare, by_hand, is_function_word, related_texts
from real_causes.measured import ABSENCES, Measured, makes_sense
from real_causes.prompts import HALVES, Prompt
from real_causes.table import pairs, row
from scipy.stats import binomtest

from captum_llm_ext import TextSegmentInput, load_demo

PROMPTS = [prompt for half in HALVES.values() for prompt in half]
JOB = "Dave lives in Dover, FL and is a {}. His personal interests include"


# Prompts, lists and texts ------------------------------------------------------------------------


def test_prompts_contain_their_cause():
    for prompt in PROMPTS:
        start, stop = prompt.span
        assert prompt.template.count("{}") == 1
        assert prompt.text[start:stop] == prompt.cause
        assert prompt.others
        assert prompt.cause not in prompt.others
        assert prompt.answer not in prompt.others.values()
        assert all(word in prompt.text for word in prompt.selector)


def test_halves_are_disjoint_and_cover_every_kind():
    assert len({prompt.text for prompt in PROMPTS}) == len(PROMPTS)
    kinds = [{prompt.kind for prompt in half} for half in HALVES.values()]
    assert all(one == other for one, other in itertools.combinations(kinds, 2))


def test_leading_prompts_of_a_half_mix_kinds():
    for half in HALVES.values():
        n = len({prompt.kind for prompt in half})
        assert len({prompt.kind for prompt in half[:n]}) == n


def test_every_prompt_word_has_alternatives():
    for prompt in PROMPTS:
        for word in prompt.text.split():
            others = alternatives(word)
            assert bool(others) == bool(bare(word))
            assert bare(word) not in others
        assert not is_function_word(prompt.cause)


def test_alternatives_match_the_case_and_form_of_the_word():
    assert alternatives("Oslo,")[0][0].isupper()
    assert set(alternatives(" The")) == {"A"}
    assert {"dogs", "cats", "dog"} & set(alternatives("cats")) == {"dogs"}
    assert "Lucy" in alternatives("Anna's")
    with pytest.raises(KeyError, match="quark"):
        alternatives("quark")


def test_hand_made_lists_keep_punctuation(tokenizer):
    inp = TextSegmentInput("Anna's cat is a dog. -> red", tokenizer, "word")
    found = dict(zip((slot.text.strip() for slot in inp.slots), by_hand(inp), strict=True))
    assert "Lucy's" in found["Anna's"]
    assert "horse." in found["dog."]
    assert found["->"] == ["->"]


def test_related_texts_use_the_lists_and_exclude_prompts():
    texts = related_texts(n_each=3, without=[prompt.text for prompt in PROMPTS])
    assert texts == related_texts(n_each=3, without=[prompt.text for prompt in PROMPTS])
    assert not any("{" in text for text in texts)
    assert not any(text.startswith(prompt.text) for text in texts for prompt in PROMPTS)
    capitals = dict(zip(LISTS["country"], LISTS["capital"], strict=True))
    said = [text.split() for text in texts if text.startswith("The capital of")]
    stated = [words for words in said if words[3] in capitals and words[4] == "is"]
    assert stated
    assert all(capitals[words[3]] == words[5].strip(".") for words in stated)


# Judging -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_right", "n"), [(0, 7), (3, 35), (28, 35), (35, 35)])
def test_intervals_equal_wilson(n_right, n):
    wanted = binomtest(n_right, n).proportion_ci(method="wilson")
    assert wilson(n_right, n) == pytest.approx((wanted.low, wanted.high), abs=1e-4)


@pytest.mark.parametrize("only_one", range(6))
@pytest.mark.parametrize("only_other", range(4))
def test_paired_comparisons_equal_mcnemar(only_one, only_other):
    one = [True] * only_one + [False] * only_other + [True, False]
    other = [False] * only_one + [True] * only_other + [True, False]
    n = only_one + only_other
    wanted = binomtest(only_one, n).pvalue if n else 1.0
    assert paired(one, other) == pytest.approx(wanted)


BINDING = Prompt("binding", "Anna lives in {}.", "Oslo", "Oslo", {"Rome": "Rome"}, ("Anna",))
SPANS = [(0, 4), (4, 10), (10, 13), (13, 19)]


@pytest.mark.parametrize(
    ("values", "content_only", "strongest", "is_cause", "is_selector"),
    [
        ([0, 0, 0, 1], False, "Oslo.", True, False),
        ([1, 0, 0, -2], False, "Anna", False, True),
        ([0, 1, 2, 0], False, "in", False, False),
        ([0, 1, 2, 0], True, "lives", False, False),
    ],
)
def test_strongest_word_is_compared_with_the_cause(
    values, content_only, strongest, is_cause, is_selector
):
    found = judge(BINDING, SPANS, values, content_only=content_only)
    assert (found.strongest, found.is_cause, found.is_selector) == (
        strongest, is_cause, is_selector,
    )  # fmt: skip


def test_table_counts_causes_selectors_and_content_words():
    def run(*values):
        cost = dict.fromkeys(("positions", "seconds", "search_positions", "search_seconds"), 2)
        by_target = {"log_prob": values}
        told = {"evaluations": 4, "cost": cost, "commit": "c"}
        return {"spans": SPANS, "attributions": by_target} | told

    found = {"one": [(BINDING, run(0, 0, 0, 1)), (BINDING, run(1, 0, 0, 0))]}
    found["other"] = [(BINDING, run(0, 0, 2, 1))]
    table = row(found, "log_prob")
    assert table["all"]["cause"] == pytest.approx(1 / 3)
    assert table["all"]["cause_or_selector"] == pytest.approx(2 / 3)
    assert table["other"]["cause_among_content_words"] == 1.0
    assert table["verdicts"] == {"one": "Cs", "other": "-"}
    assert table["strongest"] == {"one": "Oslo. Anna", "other": "in"}
    assert table["mean_cost"]["evaluations"] == 4
    named = {"method": "m", "attr_target": "log_prob"}
    better = row({"one": [found["one"][0]] * 2, "other": [found["one"][0]]}, "log_prob")
    (pair,) = pairs(
        [named | {"absence": "a"} | table, named | {"absence": "`ModelBaselines`"} | better]
    )
    assert (pair["only_this"], pair["only_other"], pair["p"]) == (0, 2, 0.5)


# The runner --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    model, tokenizer, texts = load_demo()
    hobby = {}
    for job in ("lawyer", "nurse"):
        ids = tokenizer(JOB.format(job), return_tensors="pt")["input_ids"]
        hobby[job] = tokenizer.decode(model.generate(ids, max_new_tokens=1)[0, -1:]).strip()
    return model, tokenizer, texts, hobby


def test_only_correct_answers_are_cases(demo):
    """The little model knows what lawyers do, and that nurses do something else."""
    model, tokenizer, _, hobby = demo

    def asked(answer, others):
        return answer_of(model, tokenizer, Prompt("job", JOB, "lawyer", answer, others))

    right = asked(hobby["lawyer"], {"nurse": hobby["nurse"]})
    assert tokenizer.decode(right).strip() == hobby["lawyer"]
    second = {"doctor": "nonsense", "nurse": hobby["nurse"]}
    assert asked(hobby["lawyer"], second) == right, "one of the others is enough"
    assert asked(hobby["nurse"], {"nurse": hobby["lawyer"]}) is None
    assert asked(hobby["lawyer"], {"nurse": hobby["lawyer"]}) is None, "it does not change"


def test_runner_on_a_tiny_model(demo, tmp_path, monkeypatch, capsys):
    """All absences; a second run finds everything where the first left it."""
    model, tokenizer, texts, hobby = demo
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompt = Prompt("job", JOB, "lawyer", hobby["lawyer"], {"nurse": hobby["nurse"]})
    wrong = Prompt("job", JOB, "lawyer", "nonsense", {"nurse": hobby["nurse"]})
    monkeypatch.setattr(runner, "HALVES", {"looked at": [prompt], "not looked at": [wrong]})
    monkeypatch.setattr(measuring.checkpoints, "unrelated_news", lambda: texts[:50])
    monkeypatch.setattr(measuring, "related_texts", lambda **_: texts)
    monkeypatch.setattr(
        measuring, "by_hand", lambda inp: [["nurse", slot.text] for slot in inp.slots]
    )
    monkeypatch.setattr(measuring, "STEPS", 2)
    out = tmp_path / "found.json"
    arguments = ["--model", str(folder), "--dtype", "float32", "--out", str(out)]
    methods = ["leave-one-out", "integrated gradients"]
    arguments += ["--cache", str(tmp_path / "cache"), *(f"--method={name}" for name in methods)]
    runner.main(arguments)
    (found,) = json.loads(out.read_text(encoding="utf-8"))["models"]
    assert found["model"] == "model"
    assert found["verified"] == {"looked at": 1, "not looked at": 0}
    rows = [r for r in found["rows"] if r["attr_target"] == "log_prob"]
    asked = {(r["method"], r["absence"]): r for r in rows}
    assert set(asked) == {(m, a) for m in methods for a in ABSENCES if makes_sense(m, a)}
    related = asked["leave-one-out", "`CorpusBaselines`, related text"]
    assert related["strongest"]["looked at"] == "lawyer."
    own = asked["leave-one-out", "`ModelBaselines`"]["mean_cost"]
    assert 0 < own["search_positions"] < own["positions"]
    assert asked["leave-one-out", "deletion"]["mean_cost"]["search_positions"] == 0
    assert {p["beside"] for p in found["paired"]} == {"`ModelBaselines`"}

    monkeypatch.setattr(Measured, "model", None)  # nothing is measured twice
    runner.main(arguments)
    assert json.loads(out.read_text(encoding="utf-8"))["models"] == [found]
    capsys.readouterr()
    runner.main([*arguments, "--show", "1", "--absence", "`ModelBaselines`"])
    shown = capsys.readouterr().out
    assert "because of 'lawyer'" in shown
    assert "model" in next(line for line in shown.splitlines() if "  lawyer." in line)
    with pytest.raises(AttributeError):
        runner.main([*arguments, "--again", "deletion"])
