"""Pictures of results of a real model: page and plots.

    python benchmarks/gallery.py               # all, into tutorials/images
    python benchmarks/gallery.py answer flow   # some of them

The results are those of tests/data (what was measured how: real_results.py) and tutorials/answers,
of SmolLM2-135M-Instruct; no model is loaded but the demo's, for `inside`. Pages need playwright and
a Chromium.
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from fact_grammar import Grammar, corpus, load
from ground_truth import METHODS, absences, attribute, attribute_inside, documents
from looking import FLAGS, chromium
from matplotlib import pyplot as plt
from PIL import Image

from captum_llm_ext import GenerationAttributionResult

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "tutorials" / "images"
WIDTH = 1080
COLOURS = 256  # enough for letters and two shades
RARE = Image.Quantize.MAXCOVERAGE  # the median cut bands the legend, which is small


def loaded(name: str) -> GenerationAttributionResult:
    folders = (ROOT / "tests" / "data", ROOT / "tutorials" / "answers")
    paths = (folder / f"{name}.safetensors" for folder in folders)
    return GenerationAttributionResult.load(next(path for path in paths if path.exists()))


def page(name: str, height: int, *, through: bool = False, **context: Any) -> Image.Image:
    """Screenshot of a result's page, initially or with total shares."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        size = {"width": context.pop("width", WIDTH), "height": height}
        tab = browser.new_page(viewport=size, **context)
        tab.set_content(loaded(name).to_html())
        tab.wait_for_selector("#answer .piece")
        if through:
            tab.check("#effect input[value=through]", force=True)
        picture = tab.screenshot()
        browser.close()
    return Image.open(io.BytesIO(picture))


def plot(draw: Callable[[], Any], dpi: int = 110) -> Image.Image:
    """Picture of a matplotlib plot."""
    figure = draw()[0]
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi, bbox_inches="tight", format="png")
    return Image.open(picture)


def inside(word: str = "D") -> Any:
    """One word of the demo's answer by four methods; its one cause is A, which stands before it."""
    known = absences(Grammar(), corpus())
    document = documents(2, seed=11)[1]
    place = [segment.slot for segment in document.segments("continuation")].index(word)
    asked = ("saliency, L2", "linear system", "rollout of projections", "leave-one-out")
    figure, axes = plt.subplots(len(asked), figsize=(8, 9), layout="constrained")
    for method, ax in zip(asked, axes, strict=True):
        if method in METHODS:
            slots = known["same slot, `CorpusBaselines`"]
            result = attribute(*load(), document, method, slots)
        else:
            result = attribute_inside(*load(), document, method, known)
        token = [piece.feature for piece in result.output_pieces].index(place)
        result.plot_text(token, ax=ax)
        ax.set_title(method, loc="left")
    return figure, axes


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "answer": lambda: page("lakes", 800),
    "answer_dark": lambda: page("lakes", 800, color_scheme="dark"),
    "answer_phone": lambda: page("lakes", 844, width=390),
    "rag": lambda: page("rag", 920),
    "through": lambda: page("rag", 920, through=True),
    "chat": lambda: page("chat", 860),
    "few_shot": lambda: page("few_shot", 860),
    "heat_map": lambda: plot(loaded("lakes").plot_token_attr),
    "text": lambda: plot(loaded("chat").plot_text),
    "flow": lambda: plot(loaded("chat").plot_flow),
    "convergence": lambda: plot(loaded("rag").plot_convergence),
    "inside": lambda: plot(inside),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    wanted = parser.parse_args().names or list(PICTURES)
    mpl.use("Agg")
    IMAGES.mkdir(exist_ok=True)
    for name in wanted:
        path = IMAGES / f"{name}.png"
        PICTURES[name]().convert("RGB").quantize(COLOURS, RARE).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
