"""Spans tied together, spans never switched, levels, and prompts put together from parts."""

import pytest
import torch
from captum.attr import ShapleyValues, TextTemplateInput
from reference import loop_log_probs, shapley_values

from captum_llm_ext import CorpusBaselines, GenerationAttribution, TextSegmentInput
from captum_llm_ext.text.segment import between, blocks

TEXT = "Dave lives in Austin, TX. He likes TX."
TARGET = " golf"


def _render(inp, *present, seed=0):
    mask = torch.tensor([[name in present for name in inp.names]])
    return inp.render(mask, torch.Generator().manual_seed(seed))[0].ids


def _attribute(model, tokenizer, inp, target=TARGET, **arguments):
    attribution = GenerationAttribution(ShapleyValues(model), tokenizer)
    return attribution.attribute(inp, target, output_unit=None, **arguments)


# --- groups ---------------------------------------------------------------------------------------


def test_tied_spans_form_one_feature_at_the_first_position(tokenizer):
    inp = TextSegmentInput(
        TEXT, tokenizer, groups={"place": ["Austin,", 4, 7], "who": ["Dave", 5]}, baselines="delete"
    )
    assert inp.names == ["who", " lives", " in", "place", " likes"]
    assert [slot.feature for slot in inp.slots] == [0, 1, 2, 3, 3, 0, 4, 3]
    assert tokenizer.decode(_render(inp, "who", " lives", " in", " likes")) == (
        "<s>Dave lives in He likes"
    )
    assert _render(inp, *inp.names) == inp.ids
    unnamed = TextSegmentInput(TEXT, tokenizer, groups=[["Austin,", 4]], baselines="delete")
    assert " Austin, … TX." in unnamed.names


def test_groups_are_efficient_and_counted_once(model, tokenizer):
    groups = [["Austin,", 4, 7], ["Dave", "He"]]
    inp = TextSegmentInput(TEXT, tokenizer, groups=groups, baselines="delete")
    result = _attribute(model, tokenizer, inp)
    assert result.token_attr.shape[1] == inp.n_features == 5
    torch.testing.assert_close(
        result.token_attr.sum(1), result.full_values - result.empty_values, atol=1e-5, rtol=0
    )
    target = result.target.tolist()

    def value(present):
        mask = torch.tensor([[float(i in present) for i in range(5)]])
        prompt = inp.to_model_input(mask)[0].tolist()
        return float(loop_log_probs(model, prompt, [[]], target[:1]))

    assert result.token_attr[0].tolist() == pytest.approx(shapley_values(value, 5), abs=1e-4)


def test_group_members_draw_at_the_same_list_index(tokenizer):
    cities, states = ["Boise,", "Salem,", "Miami,"], ["ID.", "OR.", "FL."]
    entries = ["Ann", "has", "at", cities, states, "He", "likes", states]
    inp = TextSegmentInput(TEXT, tokenizer, baselines=entries, groups=[["Austin,", 4, 7]])
    seen = set()
    for seed in range(12):
        text = tokenizer.decode(
            _render(inp, *(n for n in inp.names if "Austin" not in n), seed=seed)
        )
        city, state, last = text.split()[3], text.split()[4], text.split()[-1]
        assert (city, state) in zip(cities, states, strict=True)
        assert state == last
        seen.add(city)
    assert seen == set(cities)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([["Paris"]], ValueError, "names 'Paris', which is not a span: the spans are 'Dave'"),
        ([["TX."]], ValueError, r"2 spans are: say which by number, one of \[4, 7\]"),
        ([[9]], ValueError, "names span 9: there are 8"),
        ([["Dave", "in"], ["in", "He"]], ValueError, "' in' is in two groups"),
        ([[]], ValueError, "is not a list of spans"),
        (["Dave"], ValueError, "'Dave' is not a list of spans"),
        ([[1.5]], TypeError, "holds 1.5"),
    ],
)
def test_bad_groups_are_refused(tokenizer, groups, error, message):
    with pytest.raises(error, match=message):
        TextSegmentInput(TEXT, tokenizer, groups=groups, baselines="delete")


# --- fixed text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [["Dave lives", "He"], [(0, 10), (26, 28)]])
def test_fixed_text_is_always_present(tokenizer, fixed):
    inp = TextSegmentInput(TEXT, tokenizer, fixed=fixed, baselines="delete")
    assert inp.names == [" in", " Austin,", " TX.", " likes", " TX."]
    assert tokenizer.decode(_render(inp)) == "<s>Dave lives He"


def test_fixed_text_inside_a_feature_keeps_the_rest(tokenizer):
    inp = TextSegmentInput(TEXT, tokenizer, "sentence", fixed=["lives in"], baselines="delete")
    assert inp.names == ["Dave ", " Austin, TX.", " He likes TX."]
    tokens = TextSegmentInput(
        "Dave lives in", tokenizer, "token", fixed=["lives"], baselines="delete"
    )
    assert "".join(tokens.names) == "Dave in"


def test_bad_fixed_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="everything is `fixed`"):
        TextSegmentInput(TEXT, tokenizer, fixed=[TEXT], baselines="delete")
    with pytest.raises(TypeError, match="`fixed` is one string"):
        TextSegmentInput(TEXT, tokenizer, fixed="Dave", baselines="delete")
    with pytest.raises(ValueError, match="Paris"):
        TextSegmentInput(TEXT, tokenizer, fixed=["Paris"], baselines="delete")


# --- levels ---------------------------------------------------------------------------------------


def test_level_attributions_sum_their_children(model, tokenizer):
    inp = TextSegmentInput(TEXT, tokenizer, ("sentence", "word"), baselines="delete")
    result = _attribute(model, tokenizer, inp)
    assert (
        result.input_tokens == TextSegmentInput(TEXT, tokenizer, "word", baselines="delete").names
    )
    parts, attr = result.at_level("sentence")
    assert parts == ["Dave lives in Austin, TX.", " He likes TX."]
    torch.testing.assert_close(attr[:, 0], result.token_attr[:, :5].sum(1))
    torch.testing.assert_close(attr[:, 1], result.token_attr[:, 5:].sum(1))
    with pytest.raises(ValueError, match="no level 'turn': the levels are 'sentence'"):
        result.at_level("turn")


def test_levels_survive_saving(model, tokenizer, tmp_path):
    inp = TextSegmentInput(
        "One. Two.\n\nThree.", tokenizer, ("paragraph", "sentence", "word"), baselines="delete"
    )
    assert [level.name for level in inp.levels] == ["paragraph", "sentence"]
    result = _attribute(model, tokenizer, inp)
    result.save(tmp_path / "result.safetensors")
    loaded = type(result).load(tmp_path / "result.safetensors")
    for name in ("paragraph", "sentence"):
        assert loaded.at_level(name)[0] == result.at_level(name)[0]
        assert torch.equal(loaded.at_level(name)[1], result.at_level(name)[1])


def test_group_across_parts_has_no_level(tokenizer):
    with pytest.raises(ValueError, match="different parts of level 'sentence'"):
        TextSegmentInput(
            TEXT, tokenizer, ("sentence", "word"), groups=[["Dave", "He"]], baselines="delete"
        )


# --- parts, templates, units ----------------------------------------------------------------------


def test_prompts_of_named_parts(model, tokenizer):
    parts = [
        ("instruction", "Answer the question.", True),
        ("passage 1", "Dave lives in Austin."),
        ("passage 2", "Ann is a nurse."),
    ]
    inp = TextSegmentInput.from_parts(parts, tokenizer, joiner="\n", baselines="delete")
    assert inp.names == ["passage 1", "passage 2"]
    assert inp.text == "Answer the question.\nDave lives in Austin.\nAnn is a nurse."
    assert tokenizer.decode(_render(inp)).startswith("<s>Answer the question.")
    assert _attribute(model, tokenizer, inp).input_tokens == ["passage 1", "passage 2"]
    words = TextSegmentInput.from_parts(parts, tokenizer, "word", joiner="\n", baselines="delete")
    assert words.names[:2] == ["Dave", " lives"]
    found = _attribute(model, tokenizer, words)
    assert found.at_level("part")[0] == ["passage 1", "passage 2"]
    named = TextSegmentInput.from_parts(
        parts, tokenizer, ("passage", "sentence"), joiner="\n", baselines="delete"
    )
    assert named.names == ["Dave lives in Austin.", "Ann is a nurse."]
    assert [level.name for level in named.levels] == ["passage"]
    assert (
        TextSegmentInput.from_parts(parts, tokenizer, "example", baselines="delete").names
        == inp.names
    )
    for bad, message in (
        ([("a", " ")], "part 'a' is empty"),
        ([("a", "b", True)], "every part is fixed"),
    ):
        with pytest.raises(ValueError, match=message):
            TextSegmentInput.from_parts(bad, tokenizer, baselines="delete")


def test_template_inputs_on_token_ids(model, tokenizer):
    template, values = "{} lives in {}, {}.", ["Dave", "Palm Coast", "FL"]
    inp = TextSegmentInput.from_template(
        template, values, tokenizer, mask=[0, 1, 1], baselines="delete"
    )
    assert inp.names == ["Dave", "Palm Coast …FL"]
    assert inp.text == "Dave lives in Palm Coast, FL."
    named = TextSegmentInput.from_template(
        lambda city, name: f"{name} lives in {city}.",
        {"city": "Austin", "name": "Dave"},
        tokenizer,
        baselines=["Ann", "Boise"],  # in the order of the text
    )
    assert named.names == ["Dave", "Austin"]
    assert tokenizer.decode(_render(named)) == "<s>Ann lives in Boise."
    with pytest.raises(ValueError, match="cannot be found in the text"):
        TextSegmentInput.from_template(lambda a: a[::-1], ["xy"], tokenizer, baselines="delete")


def test_corpus_baselines_in_captum_templates(model, tokenizer):
    corpus = [f"{n} lives in {c}." for n in ("Ann", "Bob", "Eve") for c in ("Boise", "Salem")] * 9
    inp = TextTemplateInput(
        "{} lives in {}.", values=["Dave", "Austin"], baselines=CorpusBaselines(corpus)
    )
    seen = set()
    attribution = GenerationAttribution(ShapleyValues(model), tokenizer)
    attribution.attribute(
        inp, TARGET, output_unit=None, _inspect_forward=lambda prompt, *_: seen.add(prompt)
    )
    words = {tuple(prompt.removeprefix("<s>").split()) for prompt in seen}
    assert {w[0] for w in words} == {"Dave", "Ann", "Bob", "Eve"}
    assert {w[3] for w in words} == {"Austin.", "Boise.", "Salem."}


@pytest.mark.parametrize(
    ("unit", "names"),
    [
        ("line", ["Q: a?", "\nA: b.", "\nQ: c?"]),
        (blocks("Q:", delimiter_is="following"), ["Q: a?\nA: b.\n", "Q: c?"]),
        (between("Q:", "?"), [" a", " c"]),
    ],
)
def test_every_unit_makes_features(tokenizer, unit, names):
    inp = TextSegmentInput("Q: a?\nA: b.\nQ: c?", tokenizer, unit, baselines="delete")
    assert [name.strip() for name in inp.names] == [name.strip() for name in names]


def test_one_name_per_span(tokenizer):
    inp = TextSegmentInput("Dave lives", tokenizer, names=["who", "what"], baselines="delete")
    assert inp.names == inp.values == ["who", "what"]
    assert inp.slots[1].text == " lives"
    with pytest.raises(ValueError, match="`names` has 1 entries for 2 spans"):
        TextSegmentInput("Dave lives", tokenizer, names=["who"], baselines="delete")
