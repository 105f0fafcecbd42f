"""Every tutorial runs, prints what is committed, and its text quotes what it prints."""

import copy
import os
import re
from pathlib import Path
from shutil import copytree

import nbformat
import pytest
from jupyter_client.provisioning import local_provisioner
from nbclient import NotebookClient
from notebook_kernels import Kernels

# Jupyter's own warnings are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?%?")
# What the text may not quote without its being printed: decimals, percentages, large counts.
QUOTE = re.compile(r"[+-]?\d+\.\d+|\d+%|\d{3,}")
CODE_SPAN = re.compile(r"`[^`]*`")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def kernels():
    """Kernels that need not import torch and transformers, each for itself."""
    kernels = Kernels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_provisioner, "launch_kernel", kernels.launch)
        yield
    kernels.close()


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def committed_and_fresh(request, tmp_path_factory, kernels):
    committed = nbformat.read(request.param, as_version=4)
    fresh = copy.deepcopy(committed)
    folder = tmp_path_factory.mktemp("tutorial")
    # What a real model said, which notebooks read where they are given none.
    copytree(ROOT / "tutorials" / "answers", folder / "answers")
    # Figures are outputs only in the notebook's own backend; the user's IPython start-up is theirs.
    theirs = ("MPLBACKEND", "MODEL")
    environment = {k: v for k, v in os.environ.items() if k not in theirs}
    environment |= {"IPYTHONDIR": str(folder / "ipython"), "HF_HUB_OFFLINE": "1"}
    client = NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)
    return committed, fresh


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    """What a cell prints, and the text of what it shows; not what goes to the error stream."""
    parts = [
        output.get("data", {}).get("text/plain", "")
        if output.output_type != "stream"
        else output.text * (output.name == "stdout")
        for output in cell.get("outputs", ())
    ]
    return "".join(parts)


def shown(cell):
    return [sorted(out.data) for out in cell.outputs if "data" in out]


def differences(committed, fresh):
    """Numbers further apart than one unit of their last place: other machines round otherwise."""
    found = []
    for old, new in zip(NUMBER.findall(committed), NUMBER.findall(fresh), strict=True):
        decimals = len(old.partition(".")[2].rstrip("%"))
        unit = 10.0**-decimals if decimals or "%" in old else 0.0
        if abs(float(old.rstrip("%")) - float(new.rstrip("%"))) > 1.001 * unit:
            found.append((old, new))
    return found


def unprinted_quotes(notebook):
    """Numbers in the text that the code cell before it does not print."""
    found, numbers = [], set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            numbers = set(QUOTE.findall(printed(cell))) or numbers
        else:
            text = CODE_SPAN.sub("", cell.source).replace("−", "-")
            found += [quote for quote in QUOTE.findall(text) if quote not in numbers]
    return found


def test_readme_lists_every_tutorial():
    listed = (ROOT / "tutorials" / "README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) >= 5
    assert all(f"]({path.name}) | " in listed for path in NOTEBOOKS)
    assert listed.count("? | ") == len(NOTEBOOKS)


def test_fresh_run_reproduces_committed_outputs(committed_and_fresh):
    committed, fresh = map(code_cells, committed_and_fresh)
    for old, new in zip(committed, fresh, strict=True):
        assert NUMBER.sub("#", printed(new)) == NUMBER.sub("#", printed(old)), old.source
        assert differences(printed(old), printed(new)) == [], old.source
        assert shown(new) == shown(old), old.source


@each_notebook
def test_quoted_numbers_are_printed(path):
    assert unprinted_quotes(nbformat.read(path, as_version=4)) == []


@each_notebook
def test_committed_cells_are_run_in_order(path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(printed(cell) for cell in cells)
    streams = {out.get("name", out.output_type) for cell in cells for out in cell.outputs}
    assert streams <= {"stdout", "display_data", "execute_result"}
    assert str(ROOT) not in path.read_text(encoding="utf-8")


@each_notebook
def test_committed_notebook_is_small(path):
    notebook = nbformat.read(path, as_version=4)
    pictures = [
        out.data["image/png"]
        for cell in code_cells(notebook)
        for out in cell.outputs
        if "image/png" in out.get("data", {})
    ]
    assert sum(map(len, pictures)) * 3 / 4 < 150_000  # base64
    assert path.stat().st_size <= 300_000


def test_comparison_detects_changed_numbers():
    assert differences("a -0.00 b 12% 7 runs", "a +0.00 b 13% 7 runs") == []
    assert differences("+1.95 ± 0.02, 12%, 7", "+1.97 ± 0.02, 14%, 8") == [
        ("+1.95", "+1.97"),
        ("12%", "14%"),
        ("7", "8"),
    ]


def test_comparison_detects_unprinted_quotes():
    code = nbformat.v4.new_code_cell("print(1)")
    code.outputs = [nbformat.v4.new_output("stream", name="stdout", text="x +4.78 96% 292 runs")]
    text = nbformat.v4.new_markdown_cell("+4.78, 96%, 292 and `1e-4`; but −4.78, 97% and 293")
    notebook = nbformat.v4.new_notebook(cells=[code, text])
    assert unprinted_quotes(notebook) == ["-4.78", "97%", "293"]
