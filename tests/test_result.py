import json
import os
import pickle
import random
import shutil
import stat
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import damaged_bytes
import pytest
import tiny
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LLMAttributionResult,
    ShapleyValues,
    TextTokenInput,
)
from safetensors import safe_open
from safetensors.torch import save_file

from captum_llm_ext import GenerationAttribution, GenerationAttributionResult, TextSegmentInput
from captum_llm_ext.text.inputs import Piece

FIELDS = (
    "seq_attr token_attr output_probs token_attr_se output_attr output_attr_se full_values "
    "empty_values efficiency_gap masks values draws target".split()
)


DATA = Path(__file__).parent / "data"


def _result(
    model, tokenizer, method=KernelShap, unit="token", prompt="Dave lives in <b>Austin</b>"
):
    attribution = GenerationAttribution(method(model), tokenizer)
    inp = TextSegmentInput(prompt, tokenizer, baselines="delete")
    return attribution.attribute(inp, " golf & chess\n.", output_unit=unit)


def test_fields_have_documented_shapes(model, tokenizer):
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
    n_of_answer = result.answer.n_evaluations if result.answer else 0
    assert 0 < result.n_evaluations - n_of_answer <= n_coalitions
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
def test_saved_result_round_trips_bit_for_bit(model, tokenizer, tmp_path, unit):
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


def test_damaged_files_are_refused(model, tokenizer, tmp_path):
    path = tmp_path / "result.safetensors"
    _result(model, tokenizer).save(path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for size in [0, 4, 8, 100, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(100))]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or not a saved result"):
            GenerationAttributionResult.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="not a saved result"):
        GenerationAttributionResult.load(path)
    with pytest.raises(FileNotFoundError):
        GenerationAttributionResult.load(tmp_path / "nothing")


def test_later_formats_are_refused(model, tokenizer, tmp_path, monkeypatch):
    import captum_llm_ext.result.files as module

    path = tmp_path / "result.safetensors"
    monkeypatch.setattr(module, "KIND", replace(module.KIND, format=99))
    _result(model, tokenizer).save(path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"later version \(format 99, this one reads up to 7"):
        GenerationAttributionResult.load(path)


def _rewritten(path, version, change, to):
    """The file with another format number and other JSON, and a digest where one belongs."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        rest = json.loads(file.metadata()["captum_llm_ext"])
    change(rest)
    text = json.dumps(rest | {"format": version})
    digest = {"sha256": damaged_bytes.digest(tensors, text)} if version >= 3 else {}
    save_file(tensors, to, metadata={"captum_llm_ext": text} | digest)
    return to


def _warned_of_no_digest(version):
    if version >= 3:
        return nullcontext()
    return pytest.warns(UserWarning, match=rf"format {version}, which has no digest.*`save`")


def test_written_format_equals_the_documented_one(tmp_path):
    """Roles are told by the number: readers that know none refuse it as one of a later version."""
    result = GenerationAttributionResult.load(DATA / "result_format_3.safetensors")
    result.save(tmp_path / "again")
    with safe_open(tmp_path / "again", framework="pt") as file:
        rest = json.loads(file.metadata()["captum_llm_ext"])
    assert rest["format"] == 7
    roles = [piece[2] for piece in rest["prompt_pieces"] if len(piece) == 3]
    assert set(roles) == {"template", "user"}
    assert [p.role for p in result.prompt_pieces] == roles


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", ["prompt_pieces", "output_pieces"])
@pytest.mark.parametrize(
    "piece",
    [
        ["x", 0],
        ["x", 0, "user"],
        *(["x"], ["x", 0, "user", 1], ["x", 0, 7], ["x", "0"], ["x", True], ["x", 99], ["x", -1]),
        *([1, 0], "xy", 3),
    ],
    ids=str,
)
def test_piece_fields_follow_the_format_version(version, name, piece, tmp_path):
    def change(rest):
        rest[name][0] = piece

    path = _rewritten(DATA / "result_format_2.safetensors", version, change, tmp_path / "r")
    if piece == ["x", 0] or (piece == ["x", 0, "user"] and version >= 3):
        with _warned_of_no_digest(version):
            loaded = GenerationAttributionResult.load(path, unverified=True)
        assert getattr(loaded, name)[0] == Piece(*piece)
    else:
        with pytest.raises(ValueError, match=r"damaged \(.*give a file written by"):
            GenerationAttributionResult.load(path, unverified=True)


@pytest.mark.parametrize("version", [0, -1, 2.0, True, "2", None])
def test_format_versions_are_integers(version, tmp_path):
    with safe_open(DATA / "result_format_2.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        rest = json.loads(file.metadata()["captum_llm_ext"])
    text = json.dumps(rest | {"format": version})
    save_file(tensors, tmp_path / "r", metadata={"captum_llm_ext": text})
    with pytest.raises(ValueError, match=r"damaged or not a saved result \(its format is"):
        GenerationAttributionResult.load(tmp_path / "r")


def test_damage_never_changes_a_number(model, tokenizer, tmp_path):
    """A changed byte is told, or it changes nothing (blanks in the header)."""
    path = tmp_path / "result.safetensors"
    result = _result(model, tokenizer)
    result.save(path)
    whole, rng = path.read_bytes(), random.Random(1)
    told = []
    for _ in range(300):
        torn = bytearray(whole)
        for _ in range(rng.choice([1, 1, 8])):
            torn[rng.randrange(len(torn))] = rng.randrange(256)
        path.write_bytes(torn)
        try:
            found = GenerationAttributionResult.load(path)
        except ValueError as error:
            told.append(str(error))
        else:
            assert found.to_dict() == result.to_dict()
            assert torch.equal(found.values, result.values)
    assert len(told) > 250
    assert all("damaged" in error or "not a saved result" in error for error in told)


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_files_of_earlier_versions_are_read(version, tmp_path):
    """Written by those versions, with what they told of them as JSON."""
    path = DATA / f"result_format_{version}.safetensors"
    told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    if version < 3:
        with pytest.raises(ValueError, match=r"no digest.*give `unverified=True`"):
            GenerationAttributionResult.load(path)
    with _warned_of_no_digest(version):
        result = GenerationAttributionResult.load(path, unverified=True)
    data = json.loads(json.dumps(result.to_dict()))
    assert {name: data[name] for name in told} == told
    assert (result.design is None) == (version == 1)
    if version == 1:
        with pytest.raises(ValueError, match="written by an earlier version"):
            result.refit(ShapleyValues)
    result.save(tmp_path / "again")
    assert GenerationAttributionResult.load(tmp_path / "again").to_dict() == result.to_dict()
    assert str(result) == str(result.table())
    assert [
        [c for c in result.why(t, 9) if not c.is_output] for t in range(len(result.target))
    ] == [[c for c in causes if not c.is_output] for causes in result.top(9)]


@pytest.mark.parametrize("content", ["null", "3", "[]", "{}", '{"format": "x"}', '{"format": 2}'])
def test_foreign_files_are_refused(content, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other"
    save_file({"masks": torch.ones(2, 2)}, path, metadata={"captum_llm_ext": content})
    with pytest.raises(ValueError, match="damaged"):
        GenerationAttributionResult.load(path)


def test_pickles_are_never_opened(tmp_path):
    path, trace = tmp_path / "pickle", tmp_path / "executed"
    path.write_bytes(pickle.dumps(_Payload(trace)))
    for content in (path.read_bytes(), None):
        if content is None:
            torch.save({"x": torch.ones(3)}, path)
        with pytest.raises(ValueError, match="damaged or not a saved result"):
            GenerationAttributionResult.load(path)
    assert not trace.exists()


class _Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_file_is_replaced_atomically(model, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "result"
    result = _result(model, tokenizer)
    result.save(path)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match=f"No space.*{path}"):
            result.save(path)
    result.provenance["me"] = object()
    with pytest.raises(TypeError, match="cannot be saved"):
        result.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["result"]


def test_provenance_holds_model_revision_and_command(tokenizer, tmp_path, monkeypatch):
    """A cache as Hugging Face lays it out."""
    home, revision = tmp_path / "models--me--tiny", "0123456789abcdef0123456789abcdef01234567"
    tiny.llama(len(tokenizer)).save_pretrained(home / "snapshots" / revision)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = type(tiny.llama(len(tokenizer))).from_pretrained("me/tiny", cache_dir=tmp_path).eval()
    monkeypatch.setattr(sys, "argv", ["/home/me/explain.py", "--out", str(tmp_path / "x y")])
    told = _result(loaded, tokenizer).provenance
    assert (told["model"], told["revision"]) == ("me/tiny", revision)
    assert told["command"] == "explain.py --out 'x y'"
    assert (told["seed"], told["versions"]["torch"]) == (0, torch.__version__)
    local = shutil.copytree(home / "snapshots" / revision, tmp_path / "mine")
    told = _result(type(loaded).from_pretrained(local), tokenizer).provenance
    assert (told["model"], told["revision"]) == ("mine", None)


def test_to_dict_is_json_with_the_text(model, tokenizer):
    result = _result(model, tokenizer, FeatureAblation, unit="word")
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert "".join(piece["text"] for piece in data["prompt"]) == "<s>Dave lives in <b>Austin</b>"
    assert "".join(piece["text"] for piece in data["output"]) == " golf & chess\n."
    assert data["output_features"] == [" golf", " &", " chess", "\n."]
    assert [piece["feature"] for piece in data["prompt"]] == [None, 0, 1, 2, 3]
    assert data["token_attr"] == result.token_attr.tolist()
    assert data["method"] == "FeatureAblation"
    assert data["estimate"] is False


def test_top_causes_are_the_largest_of_each_block(model, tokenizer):
    result = _result(model, tokenizer)
    n_prompt = len(result.input_tokens)
    for t, causes in enumerate(result.top(3)):
        blocks = ((result.token_attr[t], 0), (result.output_attr[t], n_prompt))
        expected = [
            (first + column, float(attr[column]))
            for attr, first in blocks
            for column in attr.abs().argsort(descending=True)[:3].tolist()
            if attr[column] != 0
        ]
        assert [(cause.column, cause.attribution) for cause in causes] == expected
        assert [cause.is_output for cause in causes] == [
            column >= n_prompt for column, _ in expected
        ]
        for cause in causes:
            assert result.full_attr_se[t, cause.column] == cause.standard_error
            assert cause.is_marked == bool(result.marked[t, cause.column])


def test_why_accepts_position_or_name(model, tokenizer):
    result = _result(model, tokenizer)
    last = len(result.output_tokens) - 1
    assert result.why(last) == result.why(-1) == result.why(result.output_tokens[-1])
    assert result.why(last) == result.top(5)[last]
    with pytest.raises(ValueError, match="0 target tokens are 'nothing'"):
        result.why("nothing")
    with pytest.raises(ValueError, match="there is no target token 99"):
        result.why(99)


def test_printing_names_every_target_token(model, tokenizer):
    result = _result(model, tokenizer)
    rows = result.table(unit="token").splitlines()[4:]
    assert [row.split("  ←  ")[0].strip() for row in rows] == result.names.tokens
    assert any(" | so far: " in row for row in rows)
    assert "KernelShap" in str(result)
    assert "KernelShap" in repr(result)
    assert str(result).splitlines()[1].startswith("whole answer  ←  ")


def test_captum_plots_and_pages(model, tokenizer, tmp_path):
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


# print -------------------------------------------------------------------------------------------


@pytest.fixture
def as_terminal(monkeypatch):
    """stdout as a terminal of so many columns."""
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)

    def set_up(columns):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", str(columns))

    return set_up


def _plain(text):
    for code in ("94", "91", "1", "2", "0"):
        text = text.replace(f"\x1b[{code}m", "")
    return text


def test_terminal_output_has_colours_and_fits_its_width(model, tokenizer, as_terminal, monkeypatch):
    result = _result(model, tokenizer)
    whole = str(result)
    assert "\x1b" not in whole
    as_terminal(400)
    assert _plain(str(result)) == whole
    assert "\x1b[94m" in str(result)
    assert f"{result}" == whole  # for logs
    for columns in (70, 50, 40):
        as_terminal(columns)
        lines = _plain(str(result)).splitlines()
        assert max(map(len, lines)) <= columns
        rows = [line for line in lines if "←" in line][-3:]
        for line, full in zip(rows, whole.splitlines()[-3:], strict=True):
            assert full.startswith(line.removesuffix(" …")) or "…" in line
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in str(result)


def test_names_are_escaped_for_terminals(model, tokenizer, as_terminal):
    result = _result(model, tokenizer)
    evil = "evil\x1b[2J\u202e\n名字名字名字名字名字名字名字名字名字名字名字名字"
    result.input_tokens[:] = [f" {evil}{i}" for i in range(len(result.input_tokens))]
    as_terminal(60)
    lines = _plain(str(result)).splitlines()
    assert any("evil\\x1b" in line for line in lines)
    assert not any(char in line for line in lines for char in "\x1b\u202e")
    wide = [sum(2 if char in "名字" else 1 for char in line) for line in lines]
    assert max(wide) <= 60


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # shap's own
def test_columns_of_one_feature_form_one_cause(model, tokenizer):
    inp = TextTokenInput("Dave lives here", tokenizer)
    n = len(inp.values)
    mask = torch.tensor([[0, 1, 1, *range(2, n - 1)]])
    result = GenerationAttribution(KernelShap(model), tokenizer).attribute(
        inp, " golf.", feature_mask=mask, output_unit=None
    )
    for row, causes in zip(result.token_attr, result.top(99), strict=True):
        assert sum(cause.attribution for cause in causes) == pytest.approx(
            float(row.sum() - row[2]), abs=1e-5
        )
        (joint,) = [cause for cause in causes if cause.column == 1]
        assert joint.name == f"{inp.values[1].strip()} + {inp.values[2].strip()}"
    assert len(result.attribute_span(0, 2).top(99)) == n - 1
    assert result.to_shap().values.shape == (n - 1, len(result.target))


def test_fewer_than_one_cause_is_refused(model, tokenizer):
    result = _result(model, tokenizer)
    for asked in (lambda: result.top(0), lambda: result.why(0, -1), lambda: result.table(0)):
        with pytest.raises(ValueError, match="at least 1"):
            asked()


# Other tools -------------------------------------------------------------------------------------


def test_to_json_equals_to_dict(model, tokenizer, tmp_path):
    result = _result(model, tokenizer)
    text = result.to_json(tmp_path / "r.json", indent=1)
    assert json.loads(text) == json.loads(json.dumps(result.to_dict()))
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == json.loads(text)
    assert len(result.to_json().splitlines()) == 1


@pytest.mark.parametrize("unit", ["token", "word", None])
def test_to_pandas_holds_every_possible_cause(model, tokenizer, unit):
    result = _result(model, tokenizer, unit=unit)
    frame = result.to_dataframe()
    wide = result.to_dataframe("wide")
    assert torch.equal(torch.tensor(wide.to_numpy()), result.full_attr)
    assert wide.columns.get_level_values("feature").tolist() == [
        *result.input_tokens,
        *(result.output_features or ()),
    ]
    assert wide.index.get_level_values("token").tolist() == result.output_tokens
    sums = torch.tensor(frame.groupby("position")["attribution"].sum().to_numpy())
    torch.testing.assert_close(sums, result.full_values - result.empty_values, atol=1e-4, rtol=0)
    row = frame.iloc[-1]
    assert result.full_attr[row["position"], row["column"]] == pytest.approx(row["attribution"])
    assert result.full_attr_se[row["position"], row["column"]] == pytest.approx(
        row["standard_error"]
    )
    later = frame[frame["source"] == "output"]
    last = {piece.feature: t for t, piece in enumerate(result.output_pieces)}
    n_prompt = len(result.input_tokens)
    assert all(last[c - n_prompt] < p for p, c in zip(later.position, later.column, strict=True))
    missing = result.full_attr.abs().sum() - frame["attribution"].abs().sum()
    assert float(missing) == pytest.approx(0.0, abs=1e-4)
    with pytest.raises(ValueError, match="'long', 'wide' or 'answer'"):
        result.to_dataframe("tall")


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # shap's own
def test_to_shap_explanation_can_be_plotted(model, tokenizer):
    shap = pytest.importorskip("shap")
    import matplotlib.pyplot as plt

    result = _result(model, tokenizer)
    explanation = result.to_shap()
    assert isinstance(explanation, shap.Explanation)
    torch.testing.assert_close(
        torch.tensor(explanation.base_values + explanation.values.sum(0)).float(),
        result.full_values,
        atol=1e-4,
        rtol=0,
    )
    assert "".join(explanation.data) == "Dave lives in <b>Austin</b> golf & chess\n."
    shap.plots.waterfall(explanation[:, 2], show=False)
    shap.plots.bar(explanation[:, 2], show=False)
    names = {text.get_text().rpartition("= ")[2] for text in plt.gcf().axes[0].get_yticklabels()}
    assert {"Dave", "lives"} & names
    plt.close("all")
    page = shap.plots.text(explanation, display=False)
    assert all(name in page for name in ("Dave", "lf", "ches", "Austin"))
    ablation = _result(model, tokenizer, FeatureAblation)
    with pytest.warns(UserWarning, match="FeatureAblation do not sum"):
        ablation.to_shap()


@pytest.mark.parametrize("package", ["pandas", "shap"])
def test_missing_packages_are_named(model, tokenizer, monkeypatch, package):
    result = _result(model, tokenizer)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'captum-llm-ext\[{package}\]'"):
        (result.to_dataframe if package == "pandas" else result.to_shap)()
