"""What it costs to look at a result: the page, its hover, the heat map, the file.

    python benchmarks/looking.py

The page of 200 prompt features × 100 output tokens: its size and the time to build it. That of
2,000 × 500 in a headless Chromium (where there is one): the time until it stands, and the time from
pointing at a token until what it shows is painted. The heat map of 60 × 100, beside captum's own
`plot_token_attr` of the same numbers. Saving and loading 10,000 coalitions × 500 features × 200
target tokens. One process, one thread; medians; processor seconds where the work is Python's.
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
from typing import Any, cast

import matplotlib
import torch
from captum.attr import LLMAttributionResult
from environment import environment

from captum_llm_ext import GenerationAttributionResult, html
from captum_llm_ext.inputs import Piece

RESULTS = Path(__file__).parent / "results"
WORDS = "the model wrote a sentence about golf and chess because earlier words said so .".split()
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# From the pointer's move to the frame after the one that shows what it changed.
HOVER = """(i) => new Promise((done) => {
  const piece = document.querySelectorAll("#answer .piece")[i], start = performance.now();
  piece.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  const name = document.getElementById("chosen-place").textContent;
  requestAnimationFrame(() => setTimeout(() => done([performance.now() - start, name])));
})"""


def result(
    n_prompt: int, n_target: int, *, n_coalitions: int = 1, seed: int = 0
) -> GenerationAttributionResult:
    """Random attributions, a few of them large, with errors; earlier output is a cause as well."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        small = 0.05 * torch.randn(*shape, generator=generator)
        large = 5 * torch.randn(*shape, generator=generator)
        return torch.where(torch.rand(*shape, generator=generator) < 0.01, large, small)

    prompt, output = ([" " + WORDS[i % len(WORDS)] for i in range(n)] for n in (n_prompt, n_target))
    token_attr, output_attr = draw(n_target, n_prompt), draw(n_target, n_target).tril(-1)
    empty = -5 - torch.rand(n_target, generator=generator)
    full = empty + token_attr.sum(1) + output_attr.sum(1)
    masks = torch.rand(n_coalitions, n_prompt + n_target, generator=generator) < 0.5
    return GenerationAttributionResult(
        input_tokens=prompt,
        output_tokens=[word.strip() for word in output],
        seq_attr=token_attr.sum(0),
        token_attr=token_attr,
        output_features=output,
        output_attr=output_attr,
        token_attr_se=torch.full_like(token_attr, 0.05),
        output_attr_se=torch.full_like(output_attr, 0.05).tril(-1),
        full_values=full,
        empty_values=empty,
        efficiency_gap=torch.zeros(n_target),
        n_evaluations=n_coalitions,
        masks=masks,
        values=torch.randn(n_coalitions, n_target, generator=generator),
        draws=torch.arange(n_coalitions),
        target=torch.arange(n_target),
        prompt_pieces=[Piece(text, i) for i, text in enumerate(prompt)],
        output_pieces=[Piece(text, i) for i, text in enumerate(output)],
        provenance={"method": "KernelShap", "attr_target": "log_prob", "unit": "word"},
    )


def seconds(function: Callable[[], object], runs: int) -> list[float]:
    """Processor seconds of every run."""
    taken: list[float] = []
    for _ in range(runs):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return taken


def page(runs: int) -> dict[str, Any]:
    shown = result(200, 100)
    times = seconds(shown.to_html, runs)
    size = len(shown.to_html().encode())
    return {"bytes": size, "frame_bytes": len(shown._repr_html_().encode()), "build_s": times}


def hover(runs: int) -> dict[str, Any]:
    """The large page in a browser; why not, where there is none."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return {"skipped": "playwright is not installed: pip install playwright"}
    if program is None:
        return {"skipped": "there is no chromium: apt-get install chromium"}
    flags = ["--no-sandbox", "--disable-gpu"]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "page.html"
        text = html.page(result(2000, 500).to_dict())
        path.write_text(text, encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        tab = browser.new_page()
        start = time.perf_counter()
        tab.goto(path.as_uri(), wait_until="load")
        tab.locator("#answer .piece").last.wait_for()
        opened = time.perf_counter() - start
        places = [(37 * i + 11) % 500 for i in range(4 * runs)]
        answers = [tab.evaluate(HOVER, place) for place in places]
        wrong = [
            name
            for place, (_, name) in zip(places, answers, strict=True)
            if name != f"token {place + 1} of 500"
        ]
        version = browser.version
        browser.close()
    if wrong:
        raise RuntimeError(f"the page did not show the token pointed at, but {wrong[0]!r}.")
    times = [milliseconds for milliseconds, _ in answers]
    return {"chromium": version, "bytes": len(text), "open_s": opened, "hover_ms": times}


def heat_map(runs: int) -> dict[str, Any]:
    """60 tokens × 100 prompt features, drawn and written as PNG."""
    from matplotlib import pyplot as plt

    cells = result(100, 60)
    captums = LLMAttributionResult(
        input_tokens=cells.input_tokens,
        output_tokens=cells.output_tokens,
        seq_attr=cast(Any, cells.seq_attr),
        token_attr=cast(Any, cells.token_attr),
    )
    cells.output_attr = cells.output_attr_se = cells.output_features = None  # as captum's
    cells.output_pieces = [Piece(piece.text, None) for piece in cells.output_pieces]

    def draw(shown: LLMAttributionResult) -> Callable[[], None]:
        def function() -> None:
            figure, _ = cast(Any, shown.plot_token_attr(show=False))
            figure.savefig(io.BytesIO(), format="png")
            plt.close(figure)

        return function

    ours = seconds(draw(cells), runs)
    return {"cells": [60, 100], "s": ours, "captum_s": seconds(draw(captums), 1)}


def file(runs: int) -> dict[str, Any]:
    kept = result(300, 200, n_coalitions=10_000)  # 500 features, generated ones included
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.safetensors"
        times: list[float] = []
        for _ in range(runs):
            start = time.perf_counter()
            kept.save(path)
            loaded = GenerationAttributionResult.load(path)
            times.append(time.perf_counter() - start)
        assert torch.equal(loaded.masks, kept.masks)
        assert torch.equal(loaded.values, kept.values)
        size = path.stat().st_size
    return {"coalitions": 10_000, "features": 500, "targets": 200, "bytes": size, "wall_s": times}


def main(argv: list[str] | None = None) -> None:
    """Prints the numbers and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    matplotlib.use("Agg")
    measured = {
        "environment": environment(seed=0),
        "page_200x100": page(arguments.runs),
        "page_2000x500": hover(arguments.runs),
        "heat_map_60x100": heat_map(arguments.runs),
        "save_and_load": file(arguments.runs),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "looking.json"
    path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    small, large = measured["page_200x100"], measured["page_2000x500"]
    print(f"page 200 × 100: {small['bytes']:,} bytes, {median(small['build_s']):.2f} s")
    if "skipped" in large:
        print(f"page 2,000 × 500: {large['skipped']}")
    else:
        times = large["hover_ms"]
        print(
            f"page 2,000 × 500: {large['bytes']:,} bytes, stands after {large['open_s']:.1f} s, "
            f"hover {median(times):.0f} ms (at most {max(times):.0f})"
        )
    drawn = measured["heat_map_60x100"]
    print(f"heat map 60 × 100: {median(drawn['s']):.2f} s, captum {median(drawn['captum_s']):.1f}")
    print(f"save and load: {median(measured['save_and_load']['wall_s']):.2f} s")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
