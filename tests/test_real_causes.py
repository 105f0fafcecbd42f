"""The prompts whose causes are known, and how attributions of them are judged."""

import itertools

import pytest
import torch
from real_causes.judged import Case, case, judge, paired, wilson
from real_causes.prompts import HALVES, Prompt
from scipy.stats import binomtest

from captum_llm_ext import TextSegmentInput, load_demo

PROMPTS = [prompt for half in HALVES.values() for prompt in half]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.text[-30:])
def test_prompts_hold_their_cause(prompt):
    start, stop = prompt.span
    assert prompt.template.count("{}") == 1
    assert prompt.text[start:stop] == prompt.cause
    assert prompt.cause != prompt.other
    assert prompt.answer != prompt.other_answer
    assert all(word in prompt.text for word in prompt.selector)


def test_halves_share_no_prompt():
    assert len({prompt.text for prompt in PROMPTS}) == len(PROMPTS)


@pytest.mark.parametrize(("n_right", "n"), [(0, 7), (3, 35), (28, 35), (35, 35)])
def test_intervals_are_wilsons(n_right, n):
    wanted = binomtest(n_right, n).proportion_ci(method="wilson")
    assert wilson(n_right, n) == pytest.approx((wanted.low, wanted.high), abs=1e-4)


@pytest.mark.parametrize("only_one", range(6))
@pytest.mark.parametrize("only_other", range(4))
def test_paired_comparisons_are_mcnemars(only_one, only_other):
    one = [True] * only_one + [False] * only_other + [True, False]
    other = [False] * only_one + [True] * only_other + [True, False]
    n = only_one + only_other
    wanted = binomtest(only_one, n).pvalue if n else 1.0
    assert paired(one, other) == pytest.approx(wanted)


def test_only_what_a_model_answers_right_is_a_case():
    """The little model knows what lawyers do, and that farmers do something else."""
    model, tokenizer, _ = load_demo()
    template = "Dave lives in Dover, FL and is a {}. His personal interests include"
    hobby = {
        job: tokenizer.decode(
            model.generate(
                tokenizer(template.format(job), return_tensors="pt")["input_ids"], max_new_tokens=1
            )[0, -1:]
        ).strip()
        for job in ("lawyer", "nurse")
    }
    right = Prompt("job", template, "lawyer", hobby["lawyer"], "nurse", hobby["nurse"])
    found = case(model, tokenizer, right)
    assert isinstance(found, Case)
    assert tokenizer.decode(found.target).strip() == hobby["lawyer"]
    wrong = Prompt("job", template, "lawyer", hobby["nurse"], "nurse", hobby["lawyer"])
    assert case(model, tokenizer, wrong) is None


@pytest.mark.parametrize(
    ("strongest", "is_cause", "is_right"),
    [("Oslo", True, True), ("Anna", False, True), ("in", False, False)],
)
def test_the_strongest_word_is_held_against_the_cause(tokenizer, strongest, is_cause, is_right):
    prompt = Prompt("binding", "Anna lives in {}.", "Oslo", "Oslo", "Rome", "Rome", ("Anna",))
    inp = TextSegmentInput(prompt.text, tokenizer, "word", baselines="delete")
    values = torch.tensor([float(name.strip(" .") == strongest) for name in inp.names])
    found = judge(prompt, inp, values)
    assert (found.is_cause, found.is_right) == (is_cause, is_right)


def test_every_kind_is_in_both_halves():
    kinds = [{prompt.kind for prompt in half} for half in HALVES.values()]
    assert all(one == other for one, other in itertools.combinations(kinds, 2))
