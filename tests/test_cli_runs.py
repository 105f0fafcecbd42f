"""The command line during a run: order of output, progress, estimates, errors that come first."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
import webbrowser
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from captum_llm_ext import (
    ChatInput,
    GenerationAttribution,
    GenerationAttributionResult,
    TextSegmentInput,
    load_demo,
)
from captum_llm_ext.attribution.quotient import most_evaluations
from captum_llm_ext.cli import main
from captum_llm_ext.cli.progress import RunProgress
from captum_llm_ext.cli.wording import in_options
from captum_llm_ext.demo import PROMPT
from captum_llm_ext.methods import HierarchicalAblation
from captum_llm_ext.model.scoring import progress
from captum_llm_ext.model.scoring.progress import ProgressBar, duration

DEMO = ["attribute", "--model", "demo", "--baselines", "corpus:demo"]
ATTRIBUTE = [*DEMO, "--prompt", PROMPT]
FACTS = {
    "ann.txt": "Ann lives in Austin, TX and is a nurse.",
    "bob.txt": "Bob lives in Dallas, TX.",
}
QUESTION = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture
def facts(tmp_path):
    for name, text in FACTS.items():
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    return [str(tmp_path / name) for name in FACTS]


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if name not in ("answered", "begins", "announce", "advance", "note", "ends"):
            raise AttributeError(name)
        return lambda *given: self.calls.append((name, *given))


@pytest.mark.parametrize("n", [4, 40])
def test_progress_callback_receives_the_answer_before_evaluations(demo, n):
    from captum.attr import FeatureAblation

    model, tokenizer, _ = demo
    inp = TextSegmentInput(PROMPT, tokenizer, baselines="<unk>")
    heard = Heard()
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    result = attribution.attribute(inp, gen_args={"max_new_tokens": n}, show_progress=heard)
    ids = model.generate(torch.tensor([inp.ids]), max_new_tokens=n, do_sample=False)[0]
    ids = ids[len(inp.ids) :].tolist()
    is_cut = ids[-1] != tokenizer.eos_token_id
    assert heard.calls[:2] == [
        ("answered", tokenizer.decode(ids), len(ids), is_cut),
        ("begins", "model evaluations", "row"),
    ]
    assert is_cut == (n == 4)
    told = [call for call in heard.calls if call[0] == "advance"]
    assert sum(n for _, n in told) == result.n_evaluations
    assert heard.calls[-1] == ("ends",)


def test_output_order_is_answer_estimate_table(capsys):
    assert main([*ATTRIBUTE, "--max-new-tokens", "4"]) == 0
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    kinds = [line.partition(":")[0] for line in lines]
    assert kinds.index("answer") < kinds.index("estimate") < kinds.index("model evaluations")
    assert "the answer was cut after 4 tokens: a larger --max-new-tokens" in shown.err
    assert "of it the model" in shown.err
    assert "surfing" in shown.out
    assert main([*ATTRIBUTE, "--quiet", "--method", "ablation"]) == 0
    whole = capsys.readouterr().err
    assert "was cut" not in whole
    assert "estimate" not in whole


def test_dry_run_stops_after_the_first_batch(capsys, tmp_path):
    page = tmp_path / "r.html"
    assert main([*ATTRIBUTE, "--dry-run", "--batch-size", "8", "--html", str(page)]) == 0
    shown = capsys.readouterr()
    assert "answer: " in shown.err
    assert " in all (the first 8 took" in shown.out  # none of it is kept
    assert not page.exists()
    ways = [line for line in shown.out.splitlines() if line.startswith("cheaper: ")]
    assert [way.split(": ")[1] for way in ways] == [
        "--unit sentence",
        "--output-unit none",
        "--n-samples 224",  # half of 16 for each of 14 words, and tokens but the last
    ]


@pytest.mark.parametrize("options", [[], ["--unit", "sentence"], ["--output-unit", "none"]])
def test_estimates_of_cheaper_options_are_accurate(capsys, tmp_path, options):
    """Within a fifth: coalitions that come twice are not known beforehand."""
    short = [*ATTRIBUTE, "--max-new-tokens", "6"]
    assert main([*short, "--dry-run"]) == 0
    told = {}
    for line in capsys.readouterr().out.splitlines():
        kind, _, rest = line.partition(": ")
        if kind == "estimate":
            told[""] = int(rest.split()[0])
            assert f"at most {most_evaluations(told[''])} for the whole answer" in rest
        elif kind == "cheaper":
            way, _, numbers = rest.partition(": ")
            told[way] = int(numbers.split(",")[0])
    path = str(tmp_path / "r.safetensors")
    assert main([*short, "--quiet", *options, "--save", path]) == 0
    found = GenerationAttributionResult.load(path)
    more, own = found.answer.n_evaluations, told[" ".join(options)]
    assert own == pytest.approx(found.n_evaluations - more, rel=0.2)
    assert more <= most_evaluations(1.2 * own)


def test_value_dependent_cost_is_estimated_as_open(capsys):
    two = "Ann lives in Austin, TX. She likes tennis.\n\nBob lives in Dallas, TX. He likes"
    search = [*DEMO, "--prompt", two, "--max-new-tokens", "2", "--method", "hierarchical"]
    assert main([*search, "--dry-run"]) == 0
    assert "to begin with; the values decide how many more" in capsys.readouterr().out


def test_progress_without_terminal_is_a_line_per_tenth(capsys):
    bar = ProgressBar("rows", "row", is_shown=True)
    with bar.shown():
        bar.announce(40)
        for _ in range(20):
            bar.advance(2)
    shown = capsys.readouterr().err
    assert "\r" not in shown
    lines = shown.splitlines()
    assert [int(line.split()[1]) for line in lines] == [*range(10, 101, 10)]
    assert all(f"of 40, {line.split(', ')[1].split()[0]} rows a second" in line for line in lines)
    assert all(line.endswith(" left") for line in lines[:-1])


def test_progress_bar_counts_from_the_start_of_evaluations(monkeypatch):
    """What was prepared before tells no rate."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = []
    monkeypatch.setattr("builtins.print", lambda text, **_: lines.append(text))
    bar = ProgressBar("rows", "row", is_shown=True)
    with bar.shown():
        clock[0] += 50
        bar.announce(10)
        clock[0] += 2
        bar.advance(5)
        assert lines.pop() == "rows: 50 % (5 of 10, 2.5 rows a second), 2 s left"
        bar.announce(9990)
        clock[0] += 2
        bar.advance(4995)
        assert lines.pop() == "rows: 50 % (5000 of 10000, 1,250 rows a second), 4 s left"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.42, "0.42 s"), (8, "8 s"), (59.4, "59 s"), (59.9, "1 min 00 s"), (125, "2 min 05 s")],
)
def test_durations_are_formatted(seconds, said):
    assert duration(seconds) == said
    assert duration(4800) == "1 h 20 min"


def test_terminal_progress_bar_shows_a_rate():
    command = [sys.executable, "-m", "captum_llm_ext", *ATTRIBUTE, "--max-new-tokens", "3"]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        read = b""
        try:
            while part := os.read(ours, 4096):
                read += part
        except OSError:  # how Linux tells that the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    bars = [line for line in read.decode().split("\r") if "row/s" in line]
    assert bars
    assert all("?row/s" not in line for line in bars)  # it begins with the first batch


def test_passages_are_named_by_file(facts, capsys, demo):
    more = ["--context", *facts, "--prompt", QUESTION, "--target", " poker", "--quiet"]
    for unit in ("passage", "passage,sentence", "sentence"):
        assert main([*DEMO, *more, "--unit", unit, "--json", "-"]) == 0
        shown = json.loads(capsys.readouterr().out)
        names = [level["parts"] for level in shown["levels"] if level["name"] == "passage"]
        found = names[0] if names else shown["input_tokens"]
        assert found == ["ann.txt", "bob.txt", "question"]
        assert shown["output_attr"] is None  # who has passages asks which of them
        text = "".join(piece["text"] for piece in shown["prompt"]).removeprefix("<s>")
        assert text == "\n\n".join([*FACTS.values(), QUESTION])


@pytest.mark.parametrize("asked", [["--as-chat"], ["--system", "Be brief."]])
def test_passages_of_a_chat_are_named_by_file(asked, facts, capsys):
    more = ["--context", *facts, "--prompt", QUESTION, "--target", " poker", "--quiet", *asked]
    assert main([*DEMO, *more, "--unit", "passage", "--method", "ablation", "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    before = ["system"] if "--system" in asked else []
    assert shown["input_tokens"] == [*before, "ann.txt", "bob.txt", "question"]


def test_sentences_are_named_with_their_file(facts, capsys):
    more = ["--context", *facts, "--prompt", QUESTION, "--target", " poker", "--quiet"]
    assert main([*DEMO, *more, "--unit", "sentence", "--method", "ablation"]) == 0
    shown = capsys.readouterr().out
    named = re.findall(r"([\w.]+): sentence (\d) “(\w+ \w+)", shown)
    where = {"1": ("ann.txt", "Ann lives"), "2": ("bob.txt", "Bob lives")}
    where |= {"3": ("question", "Dave lives"), "4": ("question", "His personal")}
    assert named
    assert all(where[number] == (file, text) for file, number, text in named)


def test_passages_and_question_in_a_chat(facts, capsys, demo):
    more = ["--context", *facts, "--prompt", QUESTION, "--system", "Be brief.", "--quiet"]
    assert main([*DEMO, *more, "--target", " poker", "--method", "ablation", "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    [level] = [level for level in shown["levels"] if level["name"] == "passage"]
    assert level["parts"] == ["system", "ann.txt", "bob.txt", "question"]
    content = "\n\n".join([*FACTS.values(), QUESTION])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
    ]
    inp = ChatInput(messages, demo[1], "sentence")
    assert "".join(p["text"] for p in shown["prompt"]) == "".join(p.text for p in inp.pieces)
    assert len(shown["input_tokens"]) == inp.n_features


def test_as_chat_applies_the_chat_template(capsys, demo):
    given = ["--prompt", QUESTION, "--target", " poker", "--quiet", "--method", "ablation"]
    assert main([*DEMO, *given, "--as-chat", "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    inp = ChatInput([{"role": "user", "content": QUESTION}], demo[1], "word")
    assert shown["input_tokens"] == inp.names
    assert main([*DEMO, *given, "--system", "Be brief.", "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [name.split(":")[0] for name in shown["input_tokens"]] == ["system", "user"]


def test_system_option_precedes_a_chat(capsys):
    chat = '[{"role": "user", "content": "Ann lives in Austin."}]'
    more = ["--system", "Be brief.", "--target", " poker", "--quiet", "--method", "ablation"]
    assert main([*DEMO, "--chat", chat, *more, "--json", "-"]) == 0
    told = capsys.readouterr()
    assert "its turns: --unit sentence or word looks into them" in told.err
    names = json.loads(told.out)["input_tokens"]
    assert names == ["system: Be brief.", "user: Ann lives in Austin."]
    both = '[{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]'
    assert main([*DEMO, "--chat", both, *more]) == 2
    assert "has a message of the system already" in capsys.readouterr().err


def test_level_option_sums_causes(facts, capsys, tmp_path):
    saved = str(tmp_path / "r.safetensors")
    more = ["--context", *facts, "--prompt", QUESTION, "--target", " poker", "--quiet"]
    assert main([*DEMO, *more, "--unit", "word", "--level", "passage", "--save", saved]) == 0
    shown = capsys.readouterr().out
    result = GenerationAttributionResult.load(saved)
    names, _ = result.at_level("passage")
    assert names == ["ann.txt", "bob.txt", "question"]
    assert result.answer.level == "passage"
    for name, value in zip(names, result.answer.attributions.tolist(), strict=True):
        assert any(name in line and f"{value:+.2f}" in line for line in shown.splitlines())
    assert main(["show", saved, "--level", "turn"]) == 0  # there are none: the table is not lost
    told = capsys.readouterr()
    assert "there is no level 'turn'" in told.err
    assert "poker" in told.out


def test_input_option_writes_a_json_line_per_prompt(tmp_path, capsys):
    prompts = [PROMPT, "Ann lives in Austin, TX and is a nurse. Her personal interests include"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
    many = ["attribute", "--model", "demo", "--quiet", "--method", "ablation"]
    many += ["--max-new-tokens", "2", "--input", str(path), "--out", str(tmp_path / "out")]
    assert main([*many, "--json", "-"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = ["".join(piece["text"] for piece in line["prompt"]) for line in lines]
    assert [text.removeprefix("<s>") for text in texts] == prompts
    # As of a single prompt: what is absent is what the model would have written.
    assert {line["provenance"]["absence"]["prompt"] for line in lines} == {"model"}
    assert main([*many, "--json", str(tmp_path / "all.jsonl")]) == 0
    written = (tmp_path / "all.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in written] == lines


@pytest.mark.parametrize(
    ("kind", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_plot_format_follows_file_name(tmp_path, kind, begins):
    path = tmp_path / f"r.{kind}"
    more = ["--target", " poker", "--quiet", "--method", "ablation"]
    assert main([*ATTRIBUTE, *more, f"--{kind}", str(path)]) == 0
    assert path.read_bytes().startswith(begins)


def test_open_option_opens_the_page(tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda uri: opened.append(uri) or len(opened) < 2)
    more = ["--target", " poker", "--quiet", "--method", "ablation", "--open"]
    page = tmp_path / "r.html"
    assert main([*ATTRIBUTE, *more, "--html", str(page)]) == 0
    assert opened == [page.resolve().as_uri()]
    assert main([*ATTRIBUTE, *more]) == 0
    assert opened[1].endswith("/answer.html")
    assert "there is no browser to open it with: " in capsys.readouterr().err


def test_library_messages_name_options(demo, capsys):
    """Whatever a mistake, no argument of Python's stands in what is said of it."""
    model, tokenizer, _ = demo
    inp = TextSegmentInput(PROMPT, tokenizer, ("sentence", "word"), baselines="delete")
    attribution = GenerationAttribution(HierarchicalAblation(model), tokenizer)
    with pytest.raises(ValueError, match="`tol`, `stop` and `num_trials`") as raised:
        attribution.attribute(inp, " poker", tol=0.1)
    assert "--tol" in in_options(str(raised.value))
    mistakes = [
        ["--method", "lime", "--n-samples", "3"],
        ["--method", "partition", "--n-samples", "3"],
        ["--max-new-tokens", "100000"],
        ["--method", "sampling", "--n-samples", "1"],
        ["--method", "shapley", "--max-new-tokens", "1"],
        ["--baselines", "delete"],
        ["--method", "ablation", "--tol", "0.1", "--baselines", "corpus:demo", "--n-draws", "1"],
        ["--method", "integrated-gradients", "--n-steps", "1"],
    ]
    options = ["attribute", "--model", "demo", "--quiet", "--prompt", PROMPT]
    for mistake in mistakes:
        more = [] if "--max-new-tokens" in mistake else ["--target", " poker"]
        main([*options, *mistake, *more])
        said = capsys.readouterr().err
        assert "note: " in said or "error: " in said, mistake
        assert "`" not in said, said


@pytest.mark.parametrize(
    ("said", "instead"),
    [
        ("give `n_samples=4`", "give --n-samples 4"),
        ("`output_unit=None`", "--output-unit none"),
        ('`attr_target="logit"`', "--attr-target logit"),
        ('`unit=("sentence", "word")`', "--unit sentence,word"),
        ("`CorpusBaselines(texts)`", "--baselines corpus:FILE"),
        ("`HierarchicalAblation`", "--method hierarchical"),
        ("`perturbations_per_eval=1` may help", "--batch-size 1 may help"),
        ("`chat.json`", "`chat.json`"),
        ("`tol`, `stop` and `n_draws` would", "--tol and --n-draws would"),
        ("without `tol` or `stop`: give one of them.", "without --tol: give it."),
    ],
)
def test_argument_names_become_options(said, instead):
    assert in_options(said) == instead


def test_candidate_search_reports_progress_before_evaluations(demo):
    from captum.attr import FeatureAblation

    model, tokenizer, _ = demo
    inp = TextSegmentInput(PROMPT, tokenizer)  # absent words are what the model would have written
    heard = Heard()
    attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
    result = attribution.attribute(inp, gen_args={"max_new_tokens": 4}, show_progress=heard)
    told = [call for call in heard.calls if call[0] in ("begins", "ends")]
    assert told == [
        ("begins", "model evaluations", "row"),
        ("begins", "candidates for absent words", "row"),
        ("ends",),
        ("ends",),
    ]
    ends = heard.calls.index(("ends",))
    announced, done = (
        [n for kind, n in (call for call in heard.calls[:ends] if len(call) == 2) if kind == name]
        for name in ("announce", "advance")
    )
    assert sum(announced) == sum(done) > 0
    later = [call[1] for call in heard.calls[ends:] if call[0] == "advance"]
    assert sum(later) == result.n_evaluations  # what was tried before is none of them


def test_candidate_search_progress_is_printed(capsys):
    searching = ["attribute", "--model", "demo", "--prompt", PROMPT, "--max-new-tokens", "4"]
    assert main([*searching, "--method", "ablation"]) == 0
    kinds = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    at = [kinds.index(kind) for kind in ("candidates for absent words", "estimate")]
    assert at == sorted(at)
    assert main([*searching, "--method", "ablation", "--quiet"]) == 0
    assert "candidates" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "package"),
    [
        ("8bit", "bitsandbytes"),
        ("4bit", "bitsandbytes"),
        ("torchao:Int8WeightOnlyConfig", "torchao"),
        ('{"quant_method": "quanto", "weights": "int8"}', "optimum-quanto"),
        ('{"quant_method": "hqq", "nbits": 4}', "hqq"),
    ],
)
def test_missing_quantization_package_fails_before_loading(capsys, how, package):
    if find_spec(package.replace("optimum-quanto", "optimum")) is not None:
        pytest.skip(f"{package} is installed")
    assert main([*ATTRIBUTE, "--quantize", how]) == 1
    said = capsys.readouterr().err
    assert f"needs another package: pip install {package}\n" in said
    assert "loading" not in said


def test_counterfactuals_are_printed_and_on_the_page(capsys, tmp_path):
    page, kept, numbers = (str(tmp_path / name) for name in ("a.html", "a.safetensors", "a.json"))
    short = [*ATTRIBUTE, "--max-new-tokens", "4", "--quiet", "--method", "ablation"]
    written = ["--html", page, "--save", kept, "--json", numbers]
    assert main([*short, "--counterfactuals", "200", *written]) == 0
    out = capsys.readouterr().out
    assert "‘Palm’ → " in out
    assert "what would change it: " in out
    found = json.loads(Path(numbers).read_text(encoding="utf-8"))["counterfactuals"]
    assert any(name.strip() == "lawyer." for one in found for name in one["names"])
    shown = Path(page).read_text(encoding="utf-8")
    assert all(" ".join(one["answer"].split()) in shown for one in found)
    again = str(tmp_path / "b.html")
    assert main(["show", kept, "--counterfactuals", numbers, "--html", again]) == 0
    assert Path(again).read_text(encoding="utf-8") == shown
    assert "‘Palm’ → " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "messages"),
    [
        (
            ["--system", "Dave lives in Palm Coast, FL.", "--prompt", "He is a lawyer."],
            [("system", "Dave lives in Palm Coast, FL."), ("user", "He is a lawyer.")],
        ),
        (["--as-chat", "--prompt", PROMPT], [("user", PROMPT)]),
        (["--chat", json.dumps([{"role": "user", "content": PROMPT}])], [("user", PROMPT)]),
    ],
)
def test_chat_counterfactuals_equal_the_library(demo, asked, messages, capsys, tmp_path):
    from captum.attr import FeatureAblation

    out = str(tmp_path / "found.json")
    common = ["--model", "demo", "--unit", "word", "--max-new-tokens", "3", "--max-size", "1"]
    more = ["--baselines", "delete", "--dtype", "float32", "--json", out]
    assert main(["counterfactual", *common, *asked, *more]) == 0
    told = json.loads(Path(out).read_text(encoding="utf-8"))
    model, tokenizer, _ = demo
    chat = [{"role": role, "content": content} for role, content in messages]
    inp = ChatInput(chat, tokenizer, "word", baselines="delete")
    search = GenerationAttribution(FeatureAblation(model), tokenizer).counterfactuals(
        inp, max_size=1, gen_args={"max_new_tokens": 3}
    )
    expected = [(one.token, list(one.features), one.new_token, one.answer) for one in search]
    found = [
        (one["token"], one["features"], one["new_token"], one["answer"]) for one in told["found"]
    ]
    assert found == expected
    assert found
    assert search.summary in capsys.readouterr().out


def test_counterfactual_command_has_only_options_it_uses(capsys):
    """What would be ignored is not offered: methods, budgets, values, many prompts."""
    with pytest.raises(SystemExit):
        main(["counterfactual", "--help"])
    shown = capsys.readouterr().out
    for option in ("--method", "--n-samples", "--attr-target", "--output-unit", "--input", "--tol"):
        assert option not in shown
    for option in ("--system", "--as-chat", "--context", "--dtype", "--gguf", "--baselines"):
        assert option in shown


@pytest.mark.parametrize(
    "options",
    [["--method", "gradient-x-activation"], ["--method", "smile"], ["--dry-run"]],
)
def test_counterfactuals_option_that_would_be_ignored_is_refused(capsys, options):
    assert main([*ATTRIBUTE, "--counterfactuals", *options]) == 2
    assert "--counterfactuals would be ignored" in capsys.readouterr().err


def test_show_reports_missing_counterfactuals(capsys, tmp_path):
    kept, other = str(tmp_path / "a.safetensors"), tmp_path / "b.json"
    assert main([*ATTRIBUTE, "--max-new-tokens", "2", "--quiet", "--save", kept]) == 0
    other.write_text("[1]", encoding="utf-8")
    assert main(["show", kept, "--counterfactuals", str(other)]) == 1
    assert "that holds none" in capsys.readouterr().err


@pytest.mark.parametrize(("n_tokens", "is_cut"), [(1, False), (1, True), (2, False)])
def test_empty_answer_is_reported(capsys, n_tokens, is_cut):
    quiet = {"is_dry": False, "is_quiet": True, "is_open": False}
    quiet |= {"uses_proposals": False, "attributes_answer": False}
    RunProgress(None, **quiet, cheaper=lambda _: ()).answered("</s>", n_tokens, is_cut)
    is_empty = n_tokens == 1 and not is_cut
    assert ("the model ended at once" in capsys.readouterr().err) == is_empty


# Written wrongly in the option itself, in what it is given, and by what stands beside it.
WRONG = (
    ["--nosuch"],
    ["attribute"],
    ["attribute", "--model", "demo"],
    [*ATTRIBUTE, "--n-samples", "0"],
    [*ATTRIBUTE, "--method", "kernal"],
    [*ATTRIBUTE, "--unit", "phrase"],
    [*ATTRIBUTE, "--output-unit", "phrase"],
    [*ATTRIBUTE[:3], "--prompt-file", "nothing"],
    [*ATTRIBUTE[:3], "--chat", "[]"],
    [*ATTRIBUTE[:3], "--input", "nothing", "--out", "folder"],
    [*ATTRIBUTE[:3], "--prompt", PROMPT, "--baselines", "delet"],
    [*ATTRIBUTE[:3], "--prompt", PROMPT, "--baselines", "corpus:nothing"],
    [*ATTRIBUTE, "--html", "a.png"],
    [*ATTRIBUTE, "--html", "nowhere/a.html"],
    [*ATTRIBUTE, "--device-map", "cuda:9x"],
    [*ATTRIBUTE, "--gguf", "nothing.gguf"],
    ["attribute", "--gguf", "nothing.gguf", "--prompt", PROMPT],
    ["attribute", "--model", "folder/", "--prompt", PROMPT],
    ["attribute", "--model", "m", "--api", "localhost:8000", "--prompt", PROMPT],
    ["show", "nothing.safetensors"],
    ["compare", "nothing.safetensors", "nowhere.safetensors"],
    [*ATTRIBUTE, "--png", "a.pdf"],
    [*ATTRIBUTE, "--save", "-"],
    [*ATTRIBUTE, "--foils", "a"],
    [*ATTRIBUTE, "--attr-target", "contrast", "--foils", "without:a", "--foils", "b"],
    [*ATTRIBUTE, "--temperature", "1"],
    [*ATTRIBUTE, "--method", "ablation", "--n-samples", "8"],
    [*ATTRIBUTE, "--method", "saliency", "--counterfactuals"],
    [*ATTRIBUTE, "--level", "phrase"],
    [*ATTRIBUTE, "--checkpoint", "run.st"],
    [*ATTRIBUTE, "--dtype", "float12"],
    [*ATTRIBUTE, "--baselines", "corpus:demo"],
    [*ATTRIBUTE[:3], "--prompt", PROMPT, "--baselines", "corpsu:demo"],
    [*ATTRIBUTE, "--rung", "label"],
    [*ATTRIBUTE, "--api", "http://localhost", "--method", "saliency"],
    [*ATTRIBUTE, "--system", " "],
    [*DEMO, "--chat", "[", "--unit", "turn"],
    [*DEMO, "--input", "prompts.jsonl"],
    ["attribute", "--prompt", PROMPT],
    ["counterfactual", "--model", "demo", "--prompt", PROMPT, "--n-samples", "8"],
    ["counterfactual", "--model", "demo", "--prompt", PROMPT, "--baselines", "corpsu:demo"],
    ["show"],
    ["show", "dave.safetensors", "--level", "word", "--token", "1"],
    ["compare"],
    ["compare", "dave.safetensors"],
    ["compare", *ATTRIBUTE[1:], "--baselines", "corpsu:demo"],
    ["demo", "--model", "demo"],
    ["doctor", "demo", "--revision", "v1"],
)


def test_usage_errors_come_before_importing_torch(tmp_path):
    """Torch and captum take seconds to import, which a slip of the pen need not wait for."""
    told = "import json, sys\n" + _TOLD_EARLY
    done = subprocess.run(
        [sys.executable, "-c", told, json.dumps(WRONG)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert [status for status, _ in found] == [2] * len(WRONG)
    assert [heavy for _, heavy in found] == [[]] * len(WRONG)


_TOLD_EARLY = """
from captum_llm_ext.cli import main

def status(command):
    try:
        return main(command)
    except SystemExit as ended:
        return ended.code

found = []
for command in json.loads(sys.argv[1]):
    heavy = ("torch", "captum", "transformers", "accelerate", "matplotlib", "numpy")
    found.append([status(command), [name for name in heavy if name in sys.modules]])
print(json.dumps(found))
"""
