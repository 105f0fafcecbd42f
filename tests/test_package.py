"""The package from outside: what it offers, what importing it does, what the command line says."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import readme as readme_tables
import tiny

import captum_llm_ext
from captum_llm_ext.__main__ import main

PUBLIC = {
    "AnswerAttribution",
    "ActivationPatching",
    "PatchingResult",
    "ApiError",
    "Baseline",
    "BaselineComparison",
    "Cause",
    "AttentionRollout",
    "AttentionWeights",
    "ChatInput",
    "AnthropicProvider",
    "CallableProvider",
    "ChatProvider",
    "Estimate",
    "CoalitionGame",
    "CompletionsProvider",
    "Contrast",
    "CorpusBaselines",
    "DatasetReport",
    "Deletion",
    "EngineProvider",
    "EquivalentLinearSystem",
    "FaithfulnessReport",
    "FeatureInclusion",
    "FixedTexts",
    "GenerationAttentionAttribution",
    "GenerationAttribution",
    "GenerationAttributionResult",
    "GenerationGradientAttribution",
    "HierarchicalAblation",
    "Infilling",
    "LayerSaliency",
    "Match",
    "ModelBaselines",
    "PartitionShap",
    "Precision",
    "StoppingRule",
    "TopCauses",
    "Slot",
    "Redundancy",
    "RemoteGenerationAttribution",
    "SpanAttribution",
    "Route",
    "TotalAttribution",
    "TotalEffect",
    "Counterfactual",
    "CounterfactualSearch",
    "Flip",
    "Smile",
    "TextSegmentInput",
    "TokenBaseline",
    "TokenProvider",
    "UnresolvedGroup",
    "attribute_dataset",
    "compare_baselines",
    "load_demo",
    "measure_faithfulness",
}


def test_public_names():
    assert set(captum_llm_ext.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(captum_llm_ext, name).__doc__


def test_import_is_quiet_and_loads_no_transformers():
    program = (
        "import sys, captum_llm_ext\n"
        "print([n for n in ('transformers', 'accelerate', 'sklearn') if n in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""


def test_demo_needs_no_arguments(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--method", "FeatureAblation"]) == 0
    shown = capsys.readouterr()
    assert "prompt:  Dave lives in Palm Coast, FL and is a lawyer. His personal" in shown.err
    for name in ("demo.html", "demo.png", "demo.safetensors"):
        assert (tmp_path / name).stat().st_size > 1000
        assert name in shown.err
    result = captum_llm_ext.GenerationAttributionResult.load(tmp_path / "demo.safetensors")
    # What is asked for goes to stdout, talk does not.
    assert shown.out == f"{result}\n\n{result.narrative()}\n"
    assert result.output_attr.abs().max() > 1  # the last interest is caused by the first


def test_demo_runs_on_any_model(tmp_path, tokenizer, capsys):
    tiny.llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("\n".join(tiny.TEXTS), encoding="utf-8")
    arguments = ["demo", "--model", str(tmp_path / "model"), "--prompt", "Dave lives. He"]
    more = ["--unit", "sentence", "--max-new-tokens", "3", "--out", str(tmp_path / "out")]
    assert main([*arguments, *more]) == 0
    assert main([*arguments, *more, "--corpus", str(tmp_path / "corpus.txt")]) == 0
    assert "prompt:  Dave lives. He" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--model", "/no/such/model", "--prompt", "x"], 2, "/no/such/model"),
        (["--unit", "phrase"], 2, "unknown unit 'phrase'"),
        (["--prompt", " "], 2, "the prompt is empty"),
        (["--corpus", "/no/such/file"], 2, "/no/such/file"),
    ],
)
def test_command_line_mistakes_are_one_line(tmp_path, capsys, arguments, status, message):
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == status
    said = capsys.readouterr().err.strip().splitlines()
    (error,) = [line for line in said if line.startswith("captum-llm-ext: error:")]
    assert message in error
    # Where the command is wrong, what stands below says where its options are explained.
    assert said[said.index(error) + 1 :] == ["See: captum-llm-ext demo --help"][: status - 1]


def test_demo_of_another_model_needs_a_prompt(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--model", "x"]) == 2
    assert "error: --model needs a --prompt" in capsys.readouterr().err


def test_lazy_names_are_listed_by_dir():
    program = (
        "import sys, captum_llm_ext as c\n"
        "print(sorted(set(c.__all__) - set(dir(c))), 'torch' in sys.modules)\n"
        "from captum_llm_ext import *\n"
        "import captum_llm_ext.result\n"
        "print(load_demo.__name__, captum_llm_ext.Cause is captum_llm_ext.result.Cause)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.split("\n") == ["[] False", "load_demo True", ""]
    with pytest.raises(AttributeError, match="no attribute 'attribute_everything'"):
        captum_llm_ext.attribute_everything  # noqa: B018


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "captum-llm-ext demo" in capsys.readouterr().out


def test_readme_example_prints_what_it_shows(capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code, shown = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", readme, re.DOTALL).groups()
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    number = r"[+-]?\d+\.\d+"
    assert re.sub(number, "#", printed) == re.sub(number, "#", shown)
    pairs = zip(re.findall(number, printed), re.findall(number, shown), strict=True)
    assert all(float(a) == pytest.approx(float(b), abs=0.011) for a, b in pairs)


def test_readme_lists_dependencies():
    root = Path(__file__).parent.parent
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert "pip install -c constraints.txt . && captum-llm-ext demo" in readme
    assert 'pip install -c constraints.txt ".[test]" && pytest' in readme
    assert readme_tables.filled(readme) == readme  # made from the JSON, not by hand
    assert len(readme.splitlines()) < 200
    assert f'"{captum_llm_ext.__version__}"' in (root / "captum_llm_ext/__init__.py").read_text()


def test_map_names_every_module():
    package = Path(captum_llm_ext.__file__).parent
    text = (package / "README.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:tests/)?[a-z_]+/[a-z_/]*(?:\.py)?)`", text)
    assert len(paths) > 40
    roots = {True: Path(__file__).parents[1], False: package}
    assert [path for path in paths if not (roots[path.startswith("tests/")] / path).exists()] == []
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    assert [room for room in sorted(rooms) if f"`{room}/`" not in text] == []
    steps = re.findall(r"^\| `([a-z_/]+\.py)` ((?:`[A-Za-z_.]+`,? ?)+)", text, re.MULTILINE)
    walked = [(path, name) for path, names in steps for name in re.findall(r"`([^`]+)`", names)]
    assert len(walked) > 15
    for path, name in walked:
        source = (package / path).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"(?:def|class) {part}\b|^    {part}: ", source, re.MULTILINE), name


def test_imports_are_acyclic():
    """Those within functions and for type checkers alone, too, which the import contract leaves."""
    root = Path(captum_llm_ext.__file__).parents[1]
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in root.glob("captum_llm_ext/**/*.py")
    }
    files.pop("captum_llm_ext")  # it offers what the others define, and they ask for its rooms

    def imported(path):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        names = (
            (node.module or "", f"{node.module}.{alias.name}")
            for node in froms
            for alias in node.names
        )
        return {name if name in files else module for module, name in names} & {*files}

    graph = {name: imported(path) for name, path in files.items()}
    assert sum(map(len, graph.values())) > 500
    assert len([*TopologicalSorter(graph).static_order()]) == len(files)  # a CycleError names them


def documented(text):
    """Names in the section of arguments of a docstring."""
    section = re.search(r"Args:\n((?: {4}.*\n?|\n)*)", text)
    heads = re.findall(r"^ {4}([*\w][*\w, ]*):", section.group(1) if section else "", re.M)
    return {name.strip().lstrip("*") for head in heads for name in head.split(",")}


def parameters(node):
    """Parameters of a function, or of a class by its constructor or its fields; None if unknown."""
    if isinstance(node, ast.ClassDef):
        own = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
        return parameters(own[0]) if own else fields or None
    args = node.args
    given = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    return {arg.arg for arg in given if arg is not None} - {"self", "cls"}


def test_docstrings_document_the_parameters_that_exist():
    """Of those with a section of arguments: all but private ones, and no others."""
    kinds, n_checked = (ast.FunctionDef, ast.ClassDef), 0
    for path in Path(captum_llm_ext.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = documented(ast.get_docstring(node) or "") if isinstance(node, kinds) else set()
            if names and (known := parameters(node)) is not None:
                n_checked += 1
                private = {name for name in known if name.startswith("_")}
                assert names | private == known, (path.name, node.name)
    assert n_checked > 500
