import json
import random

import pytest
import torch
from captum.attr import FeatureAblation, KernelShap, LLMAttributionResult

from captum_llm_ext import GenerationAttribution, GenerationAttributionResult, TextSegmentInput

FIELDS = (
    "seq_attr token_attr output_probs token_attr_se output_attr output_attr_se full_values "
    "empty_values efficiency_gap masks values draws target".split()
)


def _result(
    model, tokenizer, method=KernelShap, unit="token", prompt="Dave lives in <b>Austin</b>"
):
    attribution = GenerationAttribution(method(model), tokenizer)
    inp = TextSegmentInput(prompt, tokenizer)
    return attribution.attribute(inp, " golf & chess\n.", output_unit=unit)


def test_fields_have_the_shapes_of_the_contract(model, tokenizer):
    result = _result(model, tokenizer)
    n_target, n_prompt = len(result.target), 4
    n_coalitions = len(result.masks)
    assert isinstance(result, LLMAttributionResult)
    assert result.input_tokens == ["Dave", " lives", " in", " <b>Austin</b>"]
    assert result.seq_attr.shape == (n_prompt,)
    assert result.token_attr.shape == result.token_attr_se.shape == (n_target, n_prompt)
    assert result.output_attr.shape == result.output_attr_se.shape == (n_target, n_target)
    assert result.full_attr.shape == (n_target, n_prompt + n_target)
    for name in ("full_values", "empty_values", "efficiency_gap", "output_probs", "target"):
        assert getattr(result, name).shape == (n_target,)
    assert result.masks.shape == (n_coalitions, n_prompt + n_target)
    assert result.masks.dtype == torch.bool
    assert result.values.shape == (n_coalitions, n_target)
    assert 0 < result.n_evaluations <= n_coalitions
    assert result.output_features == result.output_tokens
    torch.testing.assert_close(result.output_probs, result.full_values.exp())
    torch.testing.assert_close(
        result.efficiency_gap,
        result.full_values - result.empty_values - result.full_attr.sum(1),
        atol=1e-5,
        rtol=0,
    )
    assert result.provenance["versions"]["captum"]


@pytest.mark.parametrize("unit", ["token", "word", None])
def test_a_saved_result_comes_back_bit_for_bit(model, tokenizer, tmp_path, unit):
    result = _result(model, tokenizer, unit=unit)
    result.save(tmp_path / "result.safetensors")
    loaded = GenerationAttributionResult.load(tmp_path / "result.safetensors")
    for name in FIELDS:
        one, other = getattr(result, name), getattr(loaded, name)
        if one is None:
            assert other is None
        else:
            assert one.dtype == other.dtype
            assert torch.equal(one.nan_to_num(nan=7.5), other.nan_to_num(nan=7.5))
    assert json.dumps(loaded.to_dict()) == json.dumps(result.to_dict())
    assert str(loaded) == str(result)
    assert loaded.inp is None


def test_damaged_files_are_told(model, tokenizer, tmp_path):
    path = tmp_path / "result.safetensors"
    _result(model, tokenizer).save(path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for size in [0, 4, 8, 100, *(rng.randrange(len(whole)) for _ in range(30))]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or no saved result"):
            GenerationAttributionResult.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="no saved result"):
        GenerationAttributionResult.load(path)
    with pytest.raises(FileNotFoundError):
        GenerationAttributionResult.load(tmp_path / "nothing")


def test_later_formats_are_refused(model, tokenizer, tmp_path, monkeypatch):
    import captum_llm_ext.result.files as module

    path = tmp_path / "result.safetensors"
    monkeypatch.setattr(module, "FORMAT", 99)
    _result(model, tokenizer).save(path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="later version"):
        GenerationAttributionResult.load(path)


def test_to_dict_is_json_and_tells_the_text(model, tokenizer):
    result = _result(model, tokenizer, FeatureAblation, unit="word")
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert "".join(piece["text"] for piece in data["prompt"]) == "<s>Dave lives in <b>Austin</b>"
    assert "".join(piece["text"] for piece in data["output"]) == " golf & chess\n."
    assert data["output_features"] == [" golf", " &", " chess", "\n."]
    assert [piece["feature"] for piece in data["prompt"]] == [None, 0, 1, 2, 3]
    assert data["token_attr"] == result.token_attr.tolist()
    assert data["method"] == "FeatureAblation"
    assert data["estimate"] is False


def test_top_causes_are_the_largest(model, tokenizer):
    result = _result(model, tokenizer)
    for row, se, causes in zip(result.full_attr, result.full_attr_se, result.top(3), strict=True):
        assert len(causes) == 3
        values = sorted(row.abs().tolist(), reverse=True)[:3]
        assert [abs(cause.attribution) for cause in causes] == pytest.approx(values)
        for cause in causes:
            assert row[cause.column] == cause.attribution
            assert se[cause.column] == cause.standard_error
            assert cause.is_output == (cause.column >= len(result.input_tokens))


def test_why_takes_a_position_or_a_name(model, tokenizer):
    result = _result(model, tokenizer)
    last = len(result.output_tokens) - 1
    assert result.why(last) == result.why(-1) == result.why(result.output_tokens[-1])
    assert result.why(last) == result.top(5)[last]
    with pytest.raises(ValueError, match="0 target tokens are 'nothing'"):
        result.why("nothing")
    with pytest.raises(ValueError, match="there is no token 99"):
        result.why(99)


def test_printing_names_every_target_token(model, tokenizer):
    result = _result(model, tokenizer)
    lines = str(result).splitlines()
    assert len(lines) == 1 + len(result.target)
    assert "(output)" in str(result)
    assert "KernelShap" in repr(result)


def test_plots_and_pages_are_captums_and_more(model, tokenizer, tmp_path):
    result = _result(model, tokenizer)
    fig, ax = result.plot_token_attr()
    assert ax.figure is fig
    fig2, ax2 = result.plot_seq_attr(show=False)
    assert ax2.figure is fig2
    page = result.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert "<b>Austin</b>" not in page
    assert "Austin" in page
    assert result._repr_html_()
    import matplotlib.pyplot as plt

    plt.close("all")
