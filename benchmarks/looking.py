"""Costs of displaying and saving a result: the page, the heat map, the file.

    python benchmarks/looking.py            # the numbers, into results/looking.json

Results with random numbers, whose sizes alone matter here:

* the page of 200 prompt features and 100 output tokens: its size, and processor time to build it;
* the page of 2,000 and 500 in headless Chromium: time until it is drawn, and from a pointer that
  enters a token of the answer to the end of the frame that shows its causes (and the processor
  time of the page's thread per token, with the scrolling to it);
* the heat map of 60 target tokens and 100 prompt features, beside captum's own of the same
  numbers, both drawn to the last pixel;
* a file of 10,000 coalitions, 500 features (300 of the prompt, 200 generated) and 200 target
  tokens, saved and loaded.

The second measurement needs playwright and a Chromium.
"""

import argparse
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import torch
from captum.attr import LLMAttributionResult
from environment import environment

from captum_llm_ext import (
    GenerationAttributionResult,
)
from captum_llm_ext.result import page as html
from captum_llm_ext.text.inputs import Piece

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
FLAGS = ["--no-sandbox", "--disable-gpu"]

HOVER = """async (i) => {
  const piece = document.querySelectorAll("#answer .piece")[i];
  piece.scrollIntoView({ block: "center" });
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  await frame();
  const start = performance.now();
  piece.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  const script = performance.now() - start;
  await frame();
  return [script, performance.now() - start];
}"""


def made(n_prompt: int, n_target: int, n_coalitions: int = 16) -> GenerationAttributionResult:
    """A complete result with random numbers."""
    draw = torch.Generator().manual_seed(0)
    words = [f" word{i}" for i in range(n_prompt)], [f" said{i}" for i in range(n_target)]
    attr = torch.randn(n_target, n_prompt, generator=draw)
    output = torch.randn(n_target, n_target, generator=draw).tril(-1)
    empty = torch.randn(n_target, generator=draw) - 5
    n = n_prompt + n_target
    return GenerationAttributionResult(
        input_tokens=words[0],
        output_tokens=[word.strip() for word in words[1]],
        output_features=words[1],
        seq_attr=attr.sum(0),
        token_attr=attr,
        token_attr_se=torch.rand(n_target, n_prompt, generator=draw) / 3,
        output_attr=output,
        output_attr_se=torch.rand(n_target, n_target, generator=draw).tril(-1) / 3,
        full_values=empty + attr.sum(1) + output.sum(1),
        empty_values=empty,
        efficiency_gap=torch.zeros(n_target),
        n_evaluations=n_coalitions,
        masks=torch.rand(n_coalitions, n, generator=draw) < 0.5,
        values=torch.randn(n_coalitions, n_target, generator=draw),
        draws=torch.arange(n_coalitions),
        target=torch.arange(n_target),
        prompt_pieces=[Piece(word, i) for i, word in enumerate(words[0])],
        output_pieces=[Piece(word, i) for i, word in enumerate(words[1])],
        provenance={"attr_target": "log_prob", "unit": "word"},
    )


def seconds(function: Callable[[], object], runs: int) -> list[float]:
    """Processor seconds of each run, after one that warms up."""
    function()
    taken: list[float] = []
    for _ in range(runs):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return taken


def page(runs: int) -> dict[str, Any]:
    result = made(200, 100)
    built = seconds(result.to_html, runs)
    return {
        "size": [200, 100],
        "bytes": len(result.to_html().encode()),
        "notebook_bytes": len(html.fragment(result.to_dict()).encode()),
        "seconds": built,
        "wanted": "<= 1 MB, <= 1 s",
    }


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


def opened(folder: Path) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    path = folder / "long.html"
    result = made(2000, 500)
    built = seconds(lambda: result.to_html(path), 1)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        tab = browser.new_page()
        start = time.perf_counter()
        tab.goto(path.as_uri())
        tab.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        open_s = time.perf_counter() - start
        devtools = tab.context.new_cdp_session(tab)
        devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
        before = worked(devtools)
        hovers = [tab.evaluate(HOVER, i) for i in range(20, 500, 20)]
        busy_ms = 1000 * (worked(devtools) - before) / len(hovers)
        version = browser.version
        browser.close()
    frames = sorted(hover[1] for hover in hovers)
    return {
        "size": [2000, 500],
        "bytes": path.stat().st_size,
        "build_seconds": built,
        "chromium": version,
        "open_seconds": open_s,
        "hover_script_ms": [hover[0] for hover in hovers],
        "hover_frame_ms": [hover[1] for hover in hovers],
        "hover_processor_ms": busy_ms,
        "hover_frame_ms_median": median(frames),
        "hover_frame_ms_p95": frames[int(0.95 * len(frames))],
        "wanted": "<= 100 ms from pointer to picture",
    }


def worked(devtools: Any) -> float:
    """Processor seconds of the page's thread so far, independent of other programs."""
    metrics = devtools.send("Performance.getMetrics")["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def heat_map(runs: int, with_captum: bool) -> dict[str, Any]:
    result = made(100, 60)
    own = seconds(lambda: drawn(result), runs)
    report: dict[str, Any] = {"size": [100, 60], "seconds": own, "wanted": "<= 2 s"}
    if with_captum:
        theirs = LLMAttributionResult(
            input_tokens=result.input_tokens,
            output_tokens=result.output_tokens,
            seq_attr=result.seq_attr,
            token_attr=result.token_attr,
        )
        start = time.process_time()
        drawn(theirs)
        report["captum_seconds"] = [time.process_time() - start]
    return report


def drawn(result: Any) -> None:
    from matplotlib import pyplot as plt

    figure, _ = result.plot_token_attr(show=False)
    figure.savefig(io.BytesIO())
    plt.close(figure)


def kept(folder: Path, runs: int) -> dict[str, Any]:
    result, path = made(300, 200, 10_000), folder / "result.safetensors"

    def save_and_load() -> None:
        result.save(path)
        GenerationAttributionResult.load(path)

    taken = seconds(save_and_load, runs)
    loaded = GenerationAttributionResult.load(path)
    assert torch.equal(loaded.masks, result.masks)
    assert torch.equal(loaded.values, result.values)
    return {
        "size": {"coalitions": 10_000, "features": 500, "targets": 200},
        "bytes": path.stat().st_size,
        "seconds": taken,
        "wanted": "<= 3 s",
    }


def main(argv: list[str] | None = None) -> None:
    """Prints the numbers and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-captum", action="store_true", help="leave captum's heat map out")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    mpl.use("Agg")
    with tempfile.TemporaryDirectory() as folder:
        report: dict[str, Any] = {
            **environment(seed=0),
            "page": page(arguments.runs),
            "long_page": opened(Path(folder)) if chromium() else None,
            "heat_map": heat_map(arguments.runs, not arguments.no_captum),
            "file": kept(Path(folder), arguments.runs),
        }
    one, long, drawing, file = (report[k] for k in ("page", "long_page", "heat_map", "file"))
    print(f"page 200 x 100: {one['bytes'] / 1e6:.2f} MB, {median(one['seconds']):.2f} s")
    if long:
        took = f"{long['hover_frame_ms_median']:.0f} ms (95 %: {long['hover_frame_ms_p95']:.0f} ms)"
        print(
            f"page 2,000 x 500: {long['bytes'] / 1e6:.0f} MB, "
            f"opens in {long['open_seconds']:.1f} s, a hover takes {took}, "
            f"{long['hover_processor_ms']:.0f} ms of the processor"
        )
    beside = [f", captum {s:.1f} s" for s in drawing.get("captum_seconds", ())]
    print(f"heat map 60 x 100: {median(drawing['seconds']):.2f} s{''.join(beside)}")
    print(f"save and load: {file['bytes'] / 1e6:.0f} MB, {median(file['seconds']):.2f} s")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "looking.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
