"""The command line as it is typed: on the shipped model, in process and in processes of its own."""

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import architectures
import pytest
import tiny
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    LLMAttribution,
    LLMGradientAttribution,
    ShapleyValues,
    ShapleyValueSampling,
    TextTokenInput,
)
from captum.attr._utils.attribution import PerturbationAttribution
from reference import loop_log_probs

import captum_llm_ext
from captum_llm_ext import (
    AttentionRollout,
    AttentionWeights,
    ChatInput,
    CorpusBaselines,
    EquivalentLinearSystem,
    FeatureInclusion,
    GenerationAttentionAttribution,
    GenerationAttribution,
    GenerationAttributionResult,
    GenerationGradientAttribution,
    HierarchicalAblation,
    LayerSaliency,
    TextSegmentInput,
    load_demo,
)
from captum_llm_ext.cli import checkup, main
from captum_llm_ext.cli import self_check as probe
from captum_llm_ext.cli.command import UsageError
from captum_llm_ext.cli.job import as_baselines
from captum_llm_ext.cli.methods import METHODS, method
from captum_llm_ext.demo import PROMPT, folder

QUICK = ["--model", "demo", "--quiet", "--method", "ablation"]
WEIGHTS = folder() / "model.safetensors"
ATTRIBUTE = ["attribute", *QUICK, "--prompt", PROMPT]
MANY = ["--input", str(folder() / "corpus.txt"), "--out", "nowhere"]
IG, GXA = ["--method", "integrated-gradients"], ["--method", "gradient-x-activation"]
SMILE = ["--method", "smile"]
CAPTUMS = (FeatureAblation, ShapleyValues, ShapleyValueSampling, KernelShap, Lime)
GRADIENTS = (LayerIntegratedGradients, LayerGradientShap, LayerGradientXActivation)
COMMANDS = ("demo", "attribute", "counterfactual", "show", "compare", "doctor")


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture(scope="module")
def attribution(demo):
    model, tokenizer, _ = demo
    return GenerationAttribution(FeatureAblation(model), tokenizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two results of one answer, written by the command."""
    at = tmp_path_factory.mktemp("saved")
    more = ["--max-new-tokens", "5", "--save"]
    assert main([*ATTRIBUTE, "--baselines", "delete", *more, str(at / "deleted.st")]) == 0
    assert main([*ATTRIBUTE, "--baselines", "corpus:demo", *more, str(at / "corpus.st")]) == 0
    return at / "deleted.st", at / "corpus.st"


def run(*arguments, **settings):
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "captum_llm_ext", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **settings,
    )


def printed(result):
    """What is told of a result in a file or a pipe."""
    return f"{result}\n\n{result.narrative()}\n"


def test_saved_result_equals_library_result(saved, demo, attribution):
    _, tokenizer, texts = demo
    result = GenerationAttributionResult.load(saved[1])
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=CorpusBaselines(texts))
    expected = attribution.attribute(inp, gen_args={"max_new_tokens": 5})
    assert torch.equal(result.target, expected.target)
    torch.testing.assert_close(result.full_attr, expected.full_attr)
    assert result.provenance["command"].startswith("captum-llm-ext attribute --model demo")


def test_attribute_options_are_passed_to_the_library(tmp_path, demo):
    model, tokenizer, _ = demo
    options = "--method sampling --n-samples 4 --unit sentence,word --output-unit word --seed 3"
    options += " --sample --temperature 1.5 --top-p 0.9 --max-new-tokens 4 --attr-target prob"
    options += f" --dtype float64 --batch-size 3 --baselines <unk> --save {tmp_path / 'r.st'}"
    assert main([*ATTRIBUTE, *options.split()]) == 0
    result = GenerationAttributionResult.load(tmp_path / "r.st")
    inp = TextSegmentInput(PROMPT, tokenizer, ("sentence", "word"), baselines="<unk>")
    generation = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_new_tokens": 4}
    model = type(model).from_pretrained(folder(), dtype=torch.float64)
    expected = GenerationAttribution(ShapleyValueSampling(model), tokenizer, "prob").attribute(
        inp, gen_args=generation, output_unit="word", n_samples=4, seed=3
    )
    assert torch.equal(result.target, expected.target)
    torch.testing.assert_close(result.full_attr, expected.full_attr)
    assert result.full_attr.dtype == torch.float64
    assert [level.name for level in result.levels] == ["sentence"]


def test_target_option_is_explained_verbatim(capsys, attribution, demo):
    target = " golf and chess."
    assert main([*ATTRIBUTE, "--target", target, "--output-unit", "none", "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["target"] == demo[1].encode(target, add_special_tokens=False)
    expected = attribution.attribute(TextSegmentInput(PROMPT, demo[1]), target, output_unit=None)
    torch.testing.assert_close(torch.tensor(shown["token_attr"]), expected.token_attr)
    assert shown["output_attr"] is None


def test_results_go_to_stdout_and_messages_to_stderr(saved, capsys):
    assert main([*ATTRIBUTE, "--max-new-tokens", "5", "--baselines", "corpus:demo"]) == 0
    shown = capsys.readouterr()
    assert shown.out == printed(GenerationAttributionResult.load(saved[1]))
    assert "answer: " in shown.err
    assert "note:" not in shown.err
    assert main([*ATTRIBUTE, "--max-new-tokens", "2", "--baselines", "delete"]) == 0
    assert "note: Absent features are deleted: attributions" in capsys.readouterr().err


def test_result_file_is_written_to_a_pipe(saved):
    shown = run("show", saved[1], "--json", "-")
    assert shown.returncode == 0
    assert shown.stderr == ""
    assert json.loads(shown.stdout)["output_tokens"][2] == "surfing"


def test_progress_is_drawn_unless_quiet(capsys):
    arguments = [part for part in ATTRIBUTE if part != "--quiet"]
    assert main([*arguments, "--max-new-tokens", "2"]) == 0
    shown = capsys.readouterr()
    assert "model evaluations" in shown.err
    assert "model evaluations" not in shown.out
    assert main([*ATTRIBUTE, "--max-new-tokens", "2"]) == 0
    assert "model evaluations" not in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_prompt_file_loses_its_trailing_newline(tmp_path, ending, capsys):
    path = tmp_path / "prompt.txt"
    path.write_bytes(f"{PROMPT}\n{ending}".encode())
    arguments = ["attribute", *QUICK, "--max-new-tokens", "2", "--json", "-"]
    assert main([*arguments, "--prompt-file", str(path)]) == 0
    pieces = json.loads(capsys.readouterr().out)["prompt"]
    text = "".join(piece["text"] for piece in pieces).removeprefix("<s>")
    assert text == (PROMPT + "\n" if ending else PROMPT)


def test_prompt_is_read_from_stdin(monkeypatch, capsys, attribution, demo):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Ann lives in Austin, TX."))
    arguments = ["attribute", *QUICK, "--max-new-tokens", "2", "--json", "-"]
    assert main([*arguments, "--prompt-file", "-"]) == 0
    inp = TextSegmentInput("Ann lives in Austin, TX.", demo[1], baselines="delete")
    expected = attribution.attribute(inp, gen_args={"max_new_tokens": 2})
    assert json.loads(capsys.readouterr().out)["target"] == expected.target.tolist()


@pytest.mark.parametrize("how", ["json", "file", "object", "stdin"])
def test_chat_messages_are_explained(tmp_path, monkeypatch, capsys, attribution, demo, how):
    messages = [
        {"role": "system", "content": "Dave lives in Palm Coast, FL and is a lawyer."},
        {"role": "user", "content": "His personal interests include"},
    ]
    text = json.dumps({"messages": messages} if how == "object" else messages)
    (tmp_path / "chat.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    given = {"file": str(tmp_path / "chat.json"), "stdin": "-"}.get(how, text)
    more = ["--unit", "turn,word", "--roles", "system", "--max-new-tokens", "3", "--json", "-"]
    assert main(["attribute", *QUICK, "--chat", given, *more]) == 0
    shown = json.loads(capsys.readouterr().out)
    inp = ChatInput(messages, demo[1], "word", ["system"])
    expected = attribution.attribute(inp, gen_args={"max_new_tokens": 3})
    assert shown["input_tokens"] == expected.input_tokens
    torch.testing.assert_close(torch.tensor(shown["token_attr"]), expected.token_attr)


@pytest.mark.parametrize(
    ("messages", "features"),
    [
        (["Ann lives in Austin."], ["Ann", "lives", "in", "Austin."]),  # one turn tells nothing
        (["Ann lives.", "Bob lives."], ["user: Ann lives.", "user: Bob lives."]),
    ],
)
def test_turns_are_the_default_features_of_a_chat(capsys, messages, features):
    turns = [{"role": "user", "content": text} for text in messages]
    arguments = ["attribute", *QUICK, "--chat", json.dumps(turns), "--max-new-tokens", "2"]
    assert main([*arguments, "--json", "-"]) == 0
    shown = [name.strip() for name in json.loads(capsys.readouterr().out)["input_tokens"]]
    assert shown == features


def test_html_and_plot_files_are_written(saved, tmp_path, capsys):
    result = GenerationAttributionResult.load(saved[1])
    files = [tmp_path / name for name in ("r.html", "r.png", "r.json")]
    options = zip(("--html", "--png", "--json"), map(str, files), strict=True)
    arguments = ["show", str(saved[1]), *(part for option in options for part in option)]
    assert main(arguments) == 0
    assert files[0].read_text(encoding="utf-8") == result.to_html()
    assert files[1].read_bytes().startswith(b"\x89PNG")
    written = json.loads(files[2].read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result.to_dict()))
    shown = capsys.readouterr()
    assert shown.out == printed(result)
    assert all(f"written: {name}" in shown.err for name in files)


def test_causes_of_one_token_are_printed(saved, capsys):
    result = GenerationAttributionResult.load(saved[1])
    for given, token in (("surfing", "surfing"), ("2", 2), ("-3", -3)):
        assert main(["show", str(saved[1]), f"--token={given}", "--top", "4"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "surfing  ←"
        assert lines[1:] == [f"  {cause}" for cause in result.why(token, 4)]
        assert "Palm" in lines[1]
    assert main(["show", str(saved[1]), "--token", "0:3", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["poker , surfing  ←", *(f"  {c}" for c in result.attribute_span(0, 3).top(2))]


def test_top_limits_the_causes_shown(saved, capsys):
    assert main(["show", str(saved[0]), "--top", "1"]) == 0
    shown = capsys.readouterr().out
    result = GenerationAttributionResult.load(saved[0])
    assert shown == f"{result.table(1)}\n\n{result.narrative()}\n"
    for line in result.table(1).splitlines()[4:]:
        for block in line.partition("←")[2].split(" | "):
            assert len(re.findall(r" [+-]\d+\.\d\d", block)) <= 1


def test_colours_follow_terminal_and_environment(saved, capsys, monkeypatch):
    lowered = int(GenerationAttributionResult.load(saved[0]).full_attr.amin(1).argmin())

    def shown():
        assert main(["show", str(saved[0])]) == 0
        assert main(["show", str(saved[0]), f"--token={lowered}", "--top=99"]) == 0
        return capsys.readouterr().out

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    plain = shown()
    assert "\x1b" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "4000")
    coloured = shown()
    assert "\x1b[94m" in coloured  # raises
    assert "\x1b[91m" in coloured  # lowers
    for code in ("\x1b[94m", "\x1b[91m", "\x1b[1m", "\x1b[2m", "\x1b[0m"):
        coloured = coloured.replace(code, "")
    assert coloured == plain
    monkeypatch.setenv("TERM", "dumb")
    assert shown() == plain
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == plain


def test_compare_reads_saved_results(saved, tmp_path, capsys):
    files = ["--png", str(tmp_path / "c.png"), "--json", str(tmp_path / "c.json")]
    assert main(["compare", *map(str, saved), "--token", "surfing", *files]) == 0
    shown = capsys.readouterr().out
    results = {path.stem: GenerationAttributionResult.load(path) for path in saved}
    comparison = captum_llm_ext.BaselineComparison(results)
    assert shown.startswith(f"{comparison.summary()}\nsurfing:\n")
    assert all(f"{change.kind} {change}" in shown for change in comparison.changes("surfing"))
    assert "surfing  ←  deleted: ',' (output); corpus: Palm" in shown  # the known cause is Palm
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "c.json").read_text("utf-8"))["names"] == ["deleted", "corpus"]


def test_compare_distinguishes_equal_file_names(saved, tmp_path, capsys):
    other = tmp_path / "deleted.st"
    other.write_bytes(saved[1].read_bytes())
    assert main(["compare", str(saved[0]), str(other)]) == 0
    assert f"BaselineComparison({saved[0]}, {other}:" in capsys.readouterr().out


def test_compare_runs_several_baselines(saved, capsys):
    several = ["--baselines", "delete", "--baselines", "corpus:demo"]
    arguments = ["compare", *QUICK, "--prompt", PROMPT, *several, "--max-new-tokens", "5"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    results = [GenerationAttributionResult.load(path) for path in saved]
    names = ("delete", "corpus:demo")
    comparison = captum_llm_ext.BaselineComparison(dict(zip(names, results, strict=True)))
    assert shown == f"{comparison.summary()}\n"


def test_baselines_are_named_in_comparisons(tmp_path, demo):
    (tmp_path / "texts.txt").write_text("\n".join(tiny.TEXTS), encoding="utf-8")
    corpus = as_baselines(f"corpus:{tmp_path / 'texts.txt'}", 5)
    assert corpus.seed == 5
    corpus.save(tmp_path / "index")
    index = as_baselines(f"index:{tmp_path / 'index'}", 7)
    assert repr(index) == repr(corpus)
    assert index.seed == 7
    assert repr(as_baselines("corpus:demo", 0)) == repr(CorpusBaselines(demo[2]))
    assert as_baselines("delete", 0) is None
    assert as_baselines("<unk>", 0) == "<unk>"
    assert as_baselines("token:delete", 0) == "delete"
    with pytest.raises(UsageError, match="index:"):
        as_baselines(str(tmp_path / "index"), 0)
    with pytest.raises(UsageError, match="before the colon"):
        as_baselines("coprus:x", 0)


def test_method_names_cover_every_method(model):
    for name, path in METHODS.items():
        assert type(method(name, model)).__name__ == path.partition(":")[2]
    assert {path.partition(":")[2] for path in METHODS.values()} == {
        cls.__name__ for cls in (*CAPTUMS, *GRADIENTS, *every_method_of_the_package())
    } | {"EquivalentLinearSystem", "LayerSaliency", "AttentionRollout", "AttentionWeights"}


def test_compare_reports_the_whole_answer(capsys):
    short = ["--model", "demo", "--prompt", PROMPT, "--unit", "sentence", "--n-samples", "8"]
    more = [*SMILE, "--max-new-tokens", "3", "--quiet"]
    assert main(["attribute", *short, *more, "--baselines", "delete", "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    model, tokenizer, _ = load_demo()
    inp = TextSegmentInput(PROMPT, tokenizer, "sentence", baselines="delete")
    ours = GenerationAttribution(captum_llm_ext.Smile(model), tokenizer)
    found = ours.attribute(inp, gen_args={"max_new_tokens": 3}, n_samples=8)
    assert told["token_attr"] == pytest.approx(found.token_attr.numpy(), abs=1e-6)
    both = ["--baselines", "delete", "--baselines", "<unk>"]
    assert main(["compare", *short, *more, *both]) == 0
    assert "(the whole answer)" in capsys.readouterr().out
    status, error = mistake(capsys, ["attribute", "--api", "http://h/v1", *short, *more])
    assert status == 2
    assert "--method lime --rung similarity" in error


def every_method_of_the_package():
    public = [getattr(captum_llm_ext, name) for name in captum_llm_ext.__all__]
    return [c for c in public if isinstance(c, type) and issubclass(c, PerturbationAttribution)]


def test_hierarchical_search_equals_the_library(tmp_path, demo):
    model, tokenizer, _ = demo
    prompt = "Ann lives in Austin, TX. She likes tennis.\n\nBob lives in Dallas, TX. He likes"
    command = ["attribute", "--model", "demo", "--quiet", "--prompt", prompt, "--target", " chess"]
    more = ["--method", "hierarchical", "--share", "0.5", "--save", str(tmp_path / "r.st")]
    assert main([*command, *more]) == 0
    result = GenerationAttributionResult.load(tmp_path / "r.st")
    inp = TextSegmentInput(prompt, tokenizer, ("paragraph", "sentence", "word"))
    expected = GenerationAttribution(HierarchicalAblation(model, 0.5), tokenizer)
    expected = expected.attribute(inp, " chess")
    torch.testing.assert_close(result.full_attr, expected.full_attr)
    assert "at least 0.5 of the largest" in result.provenance["rule"]
    assert [level.name for level in result.levels] == ["paragraph", "sentence"]


def test_inclusion_equals_the_library(tmp_path, demo, capsys):
    model, tokenizer, _ = demo
    more = ["--method", "inclusion", "--target", " golf", "--n-draws", "3", "--json", "-"]
    assert main([*ATTRIBUTE, "--baselines", "corpus:demo", *more]) == 0
    shown = json.loads(capsys.readouterr().out)
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=CorpusBaselines(demo[2]))
    expected = GenerationAttribution(FeatureInclusion(model), tokenizer)
    expected = expected.attribute(inp, " golf", n_draws=3)
    torch.testing.assert_close(torch.tensor(shown["token_attr"]), expected.token_attr)


@pytest.mark.filterwarnings("ignore:.*steps are too few:UserWarning")
@pytest.mark.parametrize(
    ("name", "kind", "given", "layer"),
    [
        ("integrated-gradients", LayerIntegratedGradients, {"n_steps": 9}, "model.embed_tokens"),
        ("integrated-gradients", LayerIntegratedGradients, {}, "model.layers.1"),
        ("gradient-x-activation", LayerGradientXActivation, {}, "model.layers.0.mlp"),
    ],
)
def test_gradient_methods_equal_the_library(tmp_path, demo, name, kind, given, layer):
    """With the output held fixed, token by token, they are those of captum's own class."""
    model, tokenizer, _ = demo
    path, target = str(tmp_path / "r.st"), " golf and chess."
    more = ["--method", name, "--layer", layer, "--target", target, "--save", path]
    more += ["--unit", "token", "--output-unit", "none", *options_of(given)]
    if kind is LayerIntegratedGradients:
        more += ["--baselines", "<unk>"]
    assert main([*ATTRIBUTE, *more]) == 0
    result = GenerationAttributionResult.load(path)
    captums = LLMGradientAttribution(kind(model, model.get_submodule(layer)), tokenizer)
    unk = tokenizer.convert_tokens_to_ids("<unk>")
    inp = TextTokenInput(PROMPT, tokenizer, baselines=unk, skip_tokens=["<s>"])
    expected = captums.attribute(inp, target, **given).token_attr
    assert (result.token_attr != 0).any()
    # float32, in other batches; attributions are up to 10
    torch.testing.assert_close(result.token_attr, expected, atol=2e-5, rtol=1e-5)
    assert result.provenance["layer"] == [layer]


def options_of(given):
    return [part for name, n in given.items() for part in (f"--{name.replace('_', '-')}", str(n))]


def test_gradient_options_are_passed_to_the_library(tmp_path, demo):
    model, tokenizer, texts = demo
    files = {kind: tmp_path / f"r.{kind}" for kind in ("save", "html", "png", "json")}
    more = [part for kind, path in files.items() for part in (f"--{kind}", str(path))]
    more += ["--method", "LayerGradientShap", "--n-samples", "7", "--seed", "3"]
    more += ["--attr-target", "logit", "--output-unit", "word", "--batch-size", "2"]
    more += ["--max-new-tokens", "4"]
    assert main([*ATTRIBUTE, "--baselines", "corpus:demo", *more]) == 0
    result = GenerationAttributionResult.load(files["save"])
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=CorpusBaselines(texts, seed=3))
    expected = GenerationGradientAttribution(
        LayerGradientShap(model, None), tokenizer, attr_target="logit"
    ).attribute(inp, gen_args={"max_new_tokens": 4}, output_unit="word", n_samples=7, seed=3)
    torch.testing.assert_close(result.full_attr, expected.full_attr)
    torch.testing.assert_close(result.full_attr_se, expected.full_attr_se)
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert json.loads(files["json"].read_text("utf-8"))["output_attr"] is not None
    assert files["html"].read_text(encoding="utf-8") == result.to_html()


def test_n_draws_of_integrated_gradients(tmp_path, demo, capsys):
    model, tokenizer, texts = demo
    more = ["--method", "integrated-gradients", "--target", " golf", "--n-draws", "3"]
    assert main([*ATTRIBUTE, "--baselines", "corpus:demo", *more, "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=CorpusBaselines(texts))
    expected = GenerationGradientAttribution(LayerIntegratedGradients(model, None), tokenizer)
    expected = expected.attribute(inp, " golf", n_draws=3)
    torch.testing.assert_close(torch.tensor(shown["token_attr"]), expected.token_attr)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("saliency", LayerSaliency),
        ("linear", EquivalentLinearSystem),
        ("attention", AttentionWeights),
        ("rollout", AttentionRollout),
        ("alti", lambda model: AttentionRollout(model, "alti")),
        ("projection", lambda model: AttentionRollout(model, "projection")),
    ],
)
def test_white_box_methods_equal_the_library(demo, capsys, name, kind):
    model, tokenizer, _ = demo
    assert main([*ATTRIBUTE, "--method", name, "--target", " golf", "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    method = kind(model)
    inside = isinstance(method, AttentionRollout | AttentionWeights)
    of = GenerationAttentionAttribution if inside else GenerationGradientAttribution
    inp = TextSegmentInput(PROMPT, tokenizer, baselines="delete")
    expected = of(method, tokenizer).attribute(inp, " golf")
    torch.testing.assert_close(torch.tensor(shown["token_attr"]), expected.token_attr)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["linear", "--baselines", "delete"], "it looks at the text as it is"),
        (["alti", "--attr-target", "logit"], "attention knows of no value"),
        (["saliency", "--batch-size", "2"], "it has one row to run"),
        (["rollout", "--n-samples", "2"], "it belongs to --method"),
        (["attention", "--checkpoint", "x"], "other than gradients and attention"),
    ],
)
def test_white_box_methods_refuse_options_they_would_ignore(capsys, given, said):
    assert main([*ATTRIBUTE, "--method", *given]) == 2
    assert said in capsys.readouterr().err


def test_note_names_the_baseline_of_gradient_methods(capsys):
    for name, said in (
        ("integrated-gradients", "note: the zero vector stands where a word is absent"),
        ("gradient-x-activation", None),
    ):
        assert main([*ATTRIBUTE, "--method", name, "--max-new-tokens", "2"]) == 0
        shown = capsys.readouterr().err
        assert "is deleted" not in shown
        assert said is None or said in shown


@pytest.mark.filterwarnings("ignore:.*steps are too few:UserWarning")
def test_compare_runs_gradients_under_several_baselines(demo, capsys):
    model, tokenizer, texts = demo
    several = ["--baselines", "delete", "--baselines", "corpus:demo", "--max-new-tokens", "5"]
    arguments = ["compare", *QUICK, "--method", "integrated-gradients", "--prompt", PROMPT]
    assert main([*arguments, *several]) == 0
    attribution = GenerationGradientAttribution(LayerIntegratedGradients(model, None), tokenizer)
    comparison = captum_llm_ext.compare_baselines(
        attribution,
        TextSegmentInput(PROMPT, tokenizer, baselines="delete"),
        {"delete": None, "corpus:demo": CorpusBaselines(texts)},
        gen_args={"max_new_tokens": 5},
    )
    assert capsys.readouterr().out == f"{comparison.summary()}\n"


def test_demo_runs_gradient_methods(tmp_path, capsys):
    options = ["--method", "integrated-gradients", "--max-new-tokens", "4", "--out", str(tmp_path)]
    assert main(["demo", *options]) == 0
    assert "surfing  ←  Palm" in capsys.readouterr().out


def test_gradients_of_one_prompt_refuse_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, error = mistake(capsys, [*ATTRIBUTE, "--method", "gradient-shap"])
    assert status == 2
    assert "takes one process for a prompt" in error


def mistake(capsys, arguments):
    """Exit status and error line of a command that cannot be carried out."""
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    errors = [line for line in shown.err.splitlines() if "error: " in line]
    assert len(errors) == 1
    return status, errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--baselines", "<nothing>"], "'<nothing>' is not a token"),
        (["--prompt", "x " * 400], "shorten the prompt"),
        (
            ["--prompt", "x", "--method", "integrated-gradients", "--layer", "model.layer.1"],
            "the model has no such module; it has model.layers.1, ",
        ),
        (
            ["--prompt", "x", "--method", "integrated-gradients", "--n-draws", "3"],
            "every draw of these baselines is the same",
        ),
    ],
)
def test_failures_are_one_line(capsys, arguments, message):
    status, error = mistake(capsys, ["attribute", *QUICK, *arguments])
    assert status == 1
    assert error.startswith("captum-llm-ext: error: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attribute", "--prompt", "x"], "required: --model NAME, or --gguf FILE"),
        (["attribute", *QUICK], "--prompt --prompt-file --chat --input is required"),
        ([*ATTRIBUTE, "--chat", "[]"], "not allowed with"),
        ([*ATTRIBUTE, "--method", "magic"], "'ablation', 'inclusion', 'shapley'"),
        ([*ATTRIBUTE, "--share", "0.1"], "--share would be ignored: it belongs to --met"),
        ([*ATTRIBUTE, "--scheme", "splits"], "--scheme would be ignored"),
        ([*ATTRIBUTE, "--n-samples", "9"], "--n-samples would be ignored"),
        ([*ATTRIBUTE, "--surrogate", "bf16"], "--surrogate would be ignored"),
        ([*ATTRIBUTE, "--method", "lime", "--n-draws", "9"], "--n-draws would be ignored"),
        ([*ATTRIBUTE, "--method", "hierarchical", "--share", "2"], "2 is not between 0 and 1"),
        ([*ATTRIBUTE, "--method", "hierarchical", "--unit", "word"], "paragraph,sentence,word"),
        ([*ATTRIBUTE, "--n-steps", "9"], "belongs to --method integrated-gradients."),
        (
            [*ATTRIBUTE, "--layer", "lm_head"],
            "belongs to --method integrated-gradients, gradient-sh",
        ),
        ([*ATTRIBUTE, *IG, "--n-samples", "9"], "it has --n-steps"),
        ([*ATTRIBUTE, *IG, "--tol", "0.1"], "--tol would be ignored by --method integrated-grad"),
        ([*ATTRIBUTE, *IG, "--checkpoint", "x.safetensors"], "which evaluate no coalitions"),
        ([*ATTRIBUTE, *IG, "--share", "0.1"], "--share would be ignored: it belongs to --"),
        ([*ATTRIBUTE, "--method", "gradient-shap", "--n-draws", "9"], "--n-samples is a draw"),
        ([*ATTRIBUTE, *SMILE, "--attr-target", "prob"], "compares whole answers"),
        ([*ATTRIBUTE, *SMILE, "--output-unit", "token"], "compares whole answers"),
        ([*ATTRIBUTE, *SMILE, "--checkpoint", "x.safetensors"], "compares whole answers"),
        ([*ATTRIBUTE, *GXA, "--n-samples", "9"], "belongs to --method shapley, sampling"),
        ([*ATTRIBUTE, *GXA, "--batch-size", "9"], "it has one row to run"),
        ([*ATTRIBUTE, *GXA, "--baselines", "<unk>"], "it compares with the activation 0"),
        ([*ATTRIBUTE, "--max-new-tokens", "0"], "0 is below 1"),
        ([*ATTRIBUTE, "--max-new", "3"], "unrecognized arguments: --max-new"),
        ([*ATTRIBUTE, "--target", "x", "--sample"], "--sample would be ignored"),
        ([*ATTRIBUTE, "--top-p", "0.5"], "--top-p would be ignored without --sample"),
        ([*ATTRIBUTE, "--max-evaluations", "9"], "no meaning without --tol"),
        ([*ATTRIBUTE, "--roles", "user"], "--roles would be ignored"),
        ([*ATTRIBUTE, "--unit", "turn"], "--unit turn needs a --chat"),
        ([*ATTRIBUTE, "--baselines", "delete", "--baselines", "<unk>"], "2 --baselines"),
        ([*ATTRIBUTE, "--baselines", str(folder() / "corpus.txt")], "give corpus:"),
        (["attribute", *QUICK, "--prompt", " "], "the prompt is empty"),
        (["attribute", *QUICK, "--chat", "[{"], "--chat is not JSON"),
        (["attribute", *QUICK, "--chat", '{"role": "user"}'], "has no list of messages"),
        (["attribute", *QUICK, "--chat", "[3]"], "message 1 has no role"),
        (
            ["attribute", *QUICK, "--chat", '[{"role": "user"}]'],
            "message 1 (user) has no 'content'",
        ),
        (["attribute", *QUICK, "--chat", "[]"], "it has no message"),
        (["attribute", *QUICK, "--chat", "nothing"], "--chat nothing: there is no such file"),
        (["attribute", *QUICK, "--chat", str(folder() / "corpus.txt")], "is not JSON"),
        (["attribute", *QUICK, "--prompt-file", "nothing"], "--prompt-file nothing: there is no"),
        (["attribute", *QUICK, "--prompt-file", str(folder())], "that is a folder"),
        (["attribute", *QUICK, "--prompt-file", str(WEIGHTS)], "is not UTF-8 text"),
        ([*ATTRIBUTE, "--context", "nothing"], "--context nothing: there is no such file"),
        ([*ATTRIBUTE, "--baselines", "corpus:nothing"], "corpus:nothing: there is no such file"),
        ([*ATTRIBUTE, "--baselines", "index:nothing"], "index:nothing: there is no such file"),
        ([*ATTRIBUTE, "--baselines", "corpus"], "is incomplete: give corpus:FILE"),
        ([*ATTRIBUTE, "--baselines", "delet"], "did you mean delete?"),
        ([*ATTRIBUTE, "--html", "nowhere/x.html"], "give a file in a folder that is there"),
        ([*ATTRIBUTE, "--save", "."], "is a folder"),
        ([*ATTRIBUTE, "--html", "x.png"], "give a file that ends in .html, or say --png x.png"),
        ([*ATTRIBUTE, "--save", "x.json"], "ends in .safetensors, or say --json x.json"),
        ([*ATTRIBUTE, "--htlm", "x.html"], "--htlm x.html: did you mean --html?"),
        (["attribute", *QUICK, "--promt", "x"], "--promt: did you mean --prompt?"),
        ([*ATTRIBUTE, "--device-map", "cuda:9x"], "give cpu, cuda:0, auto, or a JSON object"),
        ([*ATTRIBUTE, "--gguf", "x.gguf"], "--model demo would be ignored"),
        ([*ATTRIBUTE, "--api", "localhost:8000"], "give a URL such as http://localhost:8000/v1"),
        ([*ATTRIBUTE, "--unit", "phrase"], "unknown unit 'phrase'"),
        ([*ATTRIBUTE, "--unit", "passage"], "--unit passage needs --context"),
        ([*ATTRIBUTE, "--unit", "word,turn"], "--unit turn needs a --chat"),
        ([*ATTRIBUTE, "--output-unit", "phrase"], "unknown unit 'phrase'"),
        ([*ATTRIBUTE, "--level", "phrase"], "--level phrase: give one of"),
        ([*ATTRIBUTE, "--level", "passage"], "passages are those of --context"),
        ([*ATTRIBUTE, "--level", "turn"], "turns are those of a --chat"),
        ([*ATTRIBUTE, "--device-map", "{"], "is not JSON"),
        ([*ATTRIBUTE, "--quantize", "{"], "give 8bit, 4bit, torchao:CLASS or a JSON object"),
        ([*ATTRIBUTE, "--quantize", "8bits"], "give 8bit, 4bit, torchao:CLASS or a JSON object"),
        ([*ATTRIBUTE, "--quantize", '{"quant_method": "magic"}'], "--quantize"),
        ([*ATTRIBUTE, "--gguf", "weights.bin"], "ends in .gguf"),
        ([*ATTRIBUTE, "--target", ""], "--target is empty"),
        ([*ATTRIBUTE, "--sample", "--temperature", "0"], "0 is not above 0"),
        ([*ATTRIBUTE, "--sample", "--temperature", "nan"], "nan is not above 0"),
        ([*ATTRIBUTE, "--sample", "--top-p", "1.5"], "1.5 is not above 0 and at most 1"),
        ([*ATTRIBUTE, "--tol", "-1"], "-1 is not above 0"),
        ([*ATTRIBUTE, "--tol", "much"], "much is not a number"),
        ([*ATTRIBUTE, "--png", "x.svg"], "give a file that ends in .png, or say --svg x.svg"),
        ([*ATTRIBUTE, "--svg", "x"], "--svg x: give a file that ends in .svg."),
        ([*ATTRIBUTE, "--pdf", "x.PNG"], "give a file that ends in .pdf, or say --png x.PNG"),
        ([*ATTRIBUTE, "--system", " "], "--system is empty"),
        ([*ATTRIBUTE, "--context", "a.txt", "a.txt"], "a file is given twice"),
        (["attribute", *QUICK, "--chat", "[]", "--context", "a"], "--context would be ignored"),
        (["attribute", *QUICK, "--chat", "[]", "--as-chat"], "--as-chat would be ignored"),
        ([*ATTRIBUTE, "--seed", "1.5"], "1.5 is not an integer"),
        ([*ATTRIBUTE, "--max-new-tokens", "many"], "many is not an integer"),
        (["attribute", *QUICK, *MANY, "--system", "x"], "--system would be ignored"),
        (["attribute", *QUICK, *MANY, "--dry-run"], "for one prompt"),
        (["show", "a.st", "--level", "word", "--token", "0"], "--level would be ignored"),
        (["compare"], "nothing to compare"),
        (["compare", "a"], "at least two"),
        (["compare", "a", "a"], "at least two"),
        (["compare", "a", "b", "--seed", "3"], "--seed would be ignored"),
        (["compare", *QUICK, "--prompt", "x"], "several --baselines"),
        (["compare", *QUICK, "--prompt", "x", "--baselines", "delete"], "1 different --baselines"),
        (["show"], "required: RESULT"),
        (["explain"], "invalid choice: 'explain'"),
    ],
)
def test_usage_errors_exit_with_status_2(capsys, arguments, message):
    status, error = mistake(capsys, arguments)
    assert status == 2
    assert message in error


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/folder", "there is no model folder"),
        ("", "there is no model folder"),
        ("folder/", "there is no model folder"),
        ("no/such-model", "the tokenizer of 'no/such-model' cannot be loaded"),
        ("EMPTY", "holds no model (no config.json)"),
        ("EMPTY/file", "is a file: give the folder"),
        ("TORN", "the model of"),
    ],
)
def test_unusable_models_are_refused(tmp_path, capsys, tokenizer, model, message):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY" / "file").touch()
    if model == "TORN":
        tiny.llama(len(tokenizer)).save_pretrained(tmp_path / "TORN")
        tokenizer.save_pretrained(tmp_path / "TORN")
        weights = tmp_path / "TORN" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:2000])
    name = str(tmp_path / model) if model[:1].isupper() else model
    status, error = mistake(capsys, ["attribute", "--model", name, "--prompt", "Dave lives."])
    assert status == (1 if "loaded" in message or model == "TORN" else 2)
    assert message in error


def test_damaged_or_missing_result_files_are_refused(saved, tmp_path, capsys):
    torn = tmp_path / "torn.st"
    torn.write_bytes(saved[0].read_bytes()[:3000])
    text = tmp_path / "text.st"
    text.write_text("no result at all", encoding="utf-8")
    for name, message, expected in (
        (torn, "damaged", 1),
        (text, "damaged or not a saved result", 2),
        (tmp_path / "none", "no such file", 2),
        (tmp_path, "a folder", 2),
    ):
        status, error = mistake(capsys, ["show", str(name)])
        assert (status, message in error) == (expected, True)
    for token in ("9", "-9", "nobody", "9:12"):
        status, error = mistake(capsys, ["show", str(saved[0]), f"--token={token}"])
        assert status == 2
        assert "token" in error


def test_compare_refuses_different_answers(saved, tmp_path, capsys):
    other = str(tmp_path / "other.st")
    assert main([*ATTRIBUTE, "--max-new-tokens", "2", "--save", other]) == 0
    capsys.readouterr()
    status, error = mistake(capsys, ["compare", str(saved[0]), other])
    assert status == 1
    assert "have different targets" in error


def test_traceback_is_printed_on_request(capsys):
    assert main([*ATTRIBUTE, "--unit", "phrase", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-2].startswith("captum-llm-ext: error: unknown unit")


def test_unexpected_errors_name_their_type(saved, capsys, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(GenerationAttributionResult, "load", fails)
    assert main(["show", str(saved[0])]) == 1
    assert capsys.readouterr().err == "captum-llm-ext: error: ZeroDivisionError: by zero\n"


def test_saved_command_omits_folders(tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(tiny.TEXTS), encoding="utf-8")
    path = str(tmp_path / "r.st")
    more = ["--baselines", f"corpus:{tmp_path}/texts.txt", f"--html={tmp_path}/x.html"]
    assert main([*ATTRIBUTE, *more, "--max-new-tokens", "1", "--save", path]) == 0
    command = GenerationAttributionResult.load(path).provenance["command"]
    assert str(tmp_path) not in command
    assert command.endswith(
        "--baselines corpus:texts.txt --html=x.html --max-new-tokens 1 --save r.st"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    _, _, examples = shown.partition("examples:\n")
    lines = examples.splitlines()
    assert len(lines) >= 3
    assert all(line.startswith(f"  captum-llm-ext {command}") for line in lines)


def test_no_command_prints_help(capsys):
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert all(f"    {command}" in shown.err for command in COMMANDS)
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"captum-llm-ext {captum_llm_ext.__version__}\n"


def test_bad_checkpoint_path_is_refused_before_loading(capsys, tmp_path):
    assert main([*ATTRIBUTE, "--checkpoint", str(tmp_path / "run.st")]) == 2
    said = capsys.readouterr().err
    assert "give a file that ends in .safetensors, or a folder" in said
    assert "loading" not in said


@contextmanager
def _interruptible():
    """Processes begun within hear Ctrl-C, also where this one does not: in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_run_cleanly():
    command = [sys.executable, "-m", "captum_llm_ext", *ATTRIBUTE, "--method", "sampling"]
    with _interruptible():
        process = subprocess.Popen(
            [*command, "--n-samples", "5000", "--baselines", "delete"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    try:
        told = b""
        while b"Absent features" not in told:  # it is about to ask the model
            line = process.stderr.readline()
            assert line, told
            told += line
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert error.decode().splitlines()[-1] == "captum-llm-ext: interrupted"
    assert b"Traceback" not in error
    assert out == b""


def test_ctrl_c_during_import_is_one_line():
    command = [sys.executable, "-X", "importtime", "-m", "captum_llm_ext", *ATTRIBUTE]
    with _interruptible():
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        told = b""
        while b"torch" not in told:  # told of each import as it ends
            told = process.stderr.readline()
            assert told
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    lines = [line for line in error.splitlines() if not line.startswith(b"import time:")]
    assert lines == [b"captum-llm-ext: interrupted"]
    assert out == b""


def test_closed_stdout_pipe_is_no_error(saved):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        process = subprocess.run(
            [sys.executable, "-m", "captum_llm_ext", "show", str(saved[0])],
            stdout=closed,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert process.returncode == 141
    assert process.stderr == b""


# doctor ------------------------------------------------------------------------------------------


def test_doctor_checks_the_demo_model(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch           {torch.__version__}" in text
    assert "LlamaForCausalLM" in text
    assert "right  values" in text


def test_probe_measures_error_of_captums_default(tokenizer, model):
    found = probe.probe(model, tokenizer)
    target = tokenizer.encode(probe._ANSWER, add_special_tokens=False)[: probe._SHORT_ANSWER]
    ids = tokenizer.encode(probe._TEXT, add_special_tokens=False)[: probe._SHORT_PROMPT]
    inp = TextTokenInput(tokenizer.decode(ids), tokenizer)
    default = LLMAttribution(FeatureAblation(model), tokenizer).attribute(inp, torch.tensor(target))
    read = [target[:t] for t in range(len(target))]
    prompt = inp.to_model_input()[0].tolist()
    rows = [[*prompt[:i], 0, *prompt[i + 1 :]] for i in range(len(prompt))]
    full = loop_log_probs(model, prompt, read, target)
    right = torch.stack([full - loop_log_probs(model, row, read, target) for row in rows], dim=1)
    off = float((default.token_attr - right).abs().max())
    assert found.captum_error == pytest.approx(off, abs=1e-4)
    assert found.captum_is_right == (off <= 2e-4)
    assert found.is_right


def test_probe_reports_prefix_sharing(tokenizer):
    found = probe.probe(architectures.build("qwen 3"), tokenizer)
    assert 0.2 < found.shared < 1
    assert found.why_not_shared is None
    assert found.no_copy_is_exact
    assert found.packed_is_exact
    found = probe.probe(architectures.build("mamba"), tokenizer)
    assert found.shared is None
    assert found.no_copy_is_exact is None
    assert found.packed_is_exact is None
    assert "reads only one token on" in found.why_not_shared
    assert found.is_right


def test_probe_detects_wrong_batches(tokenizer, monkeypatch, capsys):
    model = tiny.llama(len(tokenizer))
    forward = model.forward

    @functools.wraps(forward)
    def off_in_batches(*arguments, **named):
        output = forward(*arguments, **named)
        if len(output.logits) > 16:  # more than are looked at
            output.logits[..., 5] += 3
        return output

    model.forward = off_in_batches
    monkeypatch.setattr(checkup, "load_model", lambda *_: model)
    monkeypatch.setattr(checkup, "load_tokenizer", lambda *_: tokenizer)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "WRONG  values" in shown.out
    assert "note   the shape of a batch changes values" in shown.out
    assert "gives equal rows values up to" in shown.err


def test_doctor_in_half_precision(capsys):
    assert main(["doctor", "demo", "--dtype", "bfloat16", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["machine"]["torch"] == torch.__version__
    assert shown["model"]["class"] == "LlamaForCausalLM"
    assert shown["probe"]["is_right"]
    assert shown["probe"]["dtype"] == "bfloat16"
    assert "in bfloat16" in shown["model"]["parameters"]


def test_contrast_output_names_its_foils(tmp_path, capsys):
    file = tmp_path / "c.safetensors"
    options = ["--target", " poker, surfing", "--attr-target", "contrast"]
    main([*ATTRIBUTE, *options, "--save", str(file), "--html", str(tmp_path / "c.html")])
    found = GenerationAttributionResult.load(file)
    assert f"(rather than {', '.join(found.foil_tokens[0][:3])}, …)" in capsys.readouterr().out
    assert '"other":{"attr_target":"log_prob"' in (tmp_path / "c.html").read_text("utf-8")
    main(["show", str(file), "--token", "surfing", "--top", "2"])
    foils = found.foil_tokens[2]
    assert f"rather than {', '.join(foils[:2])}, …" in capsys.readouterr().out
    given = [*ATTRIBUTE, *options, "--foils", "golf", "--foils", "tennis"]
    main([*given, "--save", str(file)])
    assert GenerationAttributionResult.load(file).foil_tokens == [["golf", "tennis"]] * 3
    main([*ATTRIBUTE, *options, "--foils", "without:Palm", "--save", str(file), *GXA])
    found = GenerationAttributionResult.load(file)
    assert found.provenance["contrast"]["without"] == "Palm"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--foils", "golf"], "--foils would be ignored: it belongs to --attr-target contrast"),
        (
            ["--attr-target", "contrast", "--foils", "without:Palm", "--foils", "golf"],
            "--foils without:Palm finds all foils: give it alone",
        ),
    ],
)
def test_foils_without_contrast_are_refused(options, message, capsys):
    assert main([*ATTRIBUTE, *options]) == 2
    assert message in capsys.readouterr().err


def test_figures_are_closed(capsys, tmp_path):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    kept = tmp_path / "kept.safetensors"
    assert (
        main(
            [
                "attribute",
                "--model",
                "demo",
                "--prompt",
                "Dave lives in",
                "--method",
                "ablation",
                "--max-new-tokens",
                "2",
                "--save",
                str(kept),
            ]
        )
        == 0
    )
    pictures = [f"--{kind}={tmp_path / kind}.{kind}" for kind in ("png", "svg", "pdf")]
    assert main(["show", str(kept), *pictures]) == 0
    assert all(
        (tmp_path / f"{kind}.{kind}").stat().st_size > 1000 for kind in ("png", "svg", "pdf")
    )
    assert pyplot.get_fignums() == before
