"""One answer over four passages as displayed by other tools: pictures for tutorials/images/peers.

    PYTHONPATH=benchmarks python benchmarks/peer_pictures.py --model FOLDER      # all that is here
    PYTHONPATH=benchmarks python benchmarks/peer_pictures.py captum shap         # some: no model

captum and shap draw the very numbers of tests/data/rag.safetensors, by their own code. inseq and
context-cite have no way to show others' numbers and explain the same model themselves: inseq the
same prompt and answer, by input × gradient; context-cite the same passages and question, in its own
template and so with its own answer, by 64 ablations of sentences. Each is drawn where it is
installed (inseq 0.7.1 wants an environment of its own), the others are named. The pictures are
output of captum (BSD-3-Clause), shap (MIT), inseq (Apache-2.0) and context-cite (MIT).
"""

import argparse
import io
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from PIL import Image
from real_causes.checkpoints import folder
from real_results import LAKES

ROOT = Path(__file__).parents[1]
OUT = ROOT / "tutorials" / "images" / "peers"
RESULT = ROOT / "tests" / "data" / "rag.safetensors"
ANSWER = "The answer to your question is: 1642 meters."
WIDTH, LEAST_HEIGHT, MOST_HEIGHT = 1080, 200, 1600
TOKEN = "6"  # of 1642: in shap's plot one clicks on a token to see its causes
N_ABLATIONS = 64


def shown(html: str, clicked: str | None = None) -> Image.Image:
    """Screenshot of a piece of HTML after a click on this text."""
    from looking import FLAGS, chromium
    from playwright.sync_api import sync_playwright

    # shap 0.51 and inseq 0.7.1 write numpy 2's names of numbers into colours, which then are none.
    html = re.sub(r"np\.float(?:32|64)\(([^)]*)\)", r"\1", html)
    page = f"<!DOCTYPE html><meta charset=utf-8><body style='font-family:sans-serif'>{html}"
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        path = Path(place) / "peer.html"
        path.write_text(page, encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        tab = browser.new_page(viewport={"width": WIDTH, "height": LEAST_HEIGHT})
        tab.goto(path.as_uri())
        if clicked is not None:
            tab.get_by_text(clicked, exact=True).first.click()
            tab.mouse.move(1, 1)
        tab.wait_for_timeout(500)
        picture = tab.screenshot(full_page=True)
        browser.close()
    return _cut(Image.open(io.BytesIO(picture)))


def _cut(picture: Image.Image) -> Image.Image:
    return picture.crop((0, 0, picture.width, min(picture.height, MOST_HEIGHT)))


def of_captum() -> Image.Image:
    """captum's plot of tokens: its own drawing of these numbers."""
    from captum.attr import LLMAttributionResult

    from captum_llm_ext import GenerationAttributionResult

    result = GenerationAttributionResult.load(RESULT)
    theirs = LLMAttributionResult(
        input_tokens=result.input_tokens,
        output_tokens=result.output_tokens,
        seq_attr=result.seq_attr,
        token_attr=result.token_attr,
    )
    figure, _ = theirs.plot_token_attr(show=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=60, bbox_inches="tight", format="png")
    return Image.open(picture)


def of_shap() -> Image.Image:
    """shap's text plot, of the same numbers as an Explanation."""
    import shap

    from captum_llm_ext import GenerationAttributionResult

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explanation = GenerationAttributionResult.load(RESULT).to_shap()
        plot = shap.plots.text(explanation, display=False)
    return shown(shap.getjs() + plot, TOKEN)


def of_inseq(model: str) -> Image.Image:
    """inseq's heat map of tokens, of an attribution of its own."""
    import inseq
    from transformers import AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(model).apply_chat_template(
        [{"role": "user", "content": LAKES}], tokenize=False, add_generation_prompt=True
    )
    found = inseq.load_model(model, "input_x_gradient", device="cpu").attribute(
        prompt, prompt + ANSWER, attribute_target=True, show_progress=False
    )
    return shown(found.show(display=False, return_html=True))


def of_context_cite(model: str) -> Image.Image:
    """context-cite's table of sources, of ablations of its own."""
    from context_cite import ContextCiter
    from context_cite.context_partitioner import SimpleContextPartitioner
    from pandas.io.formats.style import Styler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Sentences(SimpleContextPartitioner):
        """Cut at full stops: nltk's sentences take a download."""

        def split_context(self) -> None:
            lines = [line for line in self.context.split("\n") if line]
            parts = [f"{s.rstrip('.')}." for line in lines for s in line.split(". ")]
            self._cache = {"parts": parts, "separators": [" "] * len(parts)}

    if not hasattr(Styler, "applymap"):  # context-cite 0.0.4 asks for what pandas 3 calls map
        Styler.applymap = Styler.map  # pyright: ignore[reportAttributeAccessIssue]
    context, question = LAKES.rsplit("\n\n", 1)
    citer = ContextCiter(
        AutoModelForCausalLM.from_pretrained(model),
        AutoTokenizer.from_pretrained(model),
        context,
        question.removeprefix("Question: "),
        generate_kwargs={"max_new_tokens": 28, "do_sample": False},
        num_ablations=N_ABLATIONS,
        partitioner=Sentences(context),
    )
    table = citer.get_attributions(as_dataframe=True, verbose=False)
    return shown(f"<p>{citer.response}</p>{table.to_html()}")


PICTURES: dict[str, Callable[..., Image.Image]] = {
    "captum": of_captum,
    "shap": of_shap,
    "inseq": of_inseq,
    "context_cite": of_context_cite,
}
OF_MODELS = ("inseq", "context_cite")


def main() -> None:
    """Draws the pictures whose packages are installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("--model", default="smollm2")
    arguments = parser.parse_args()
    mpl.use("Agg")
    OUT.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or PICTURES:
        given: list[Any] = [folder(arguments.model)] if name in OF_MODELS else []
        try:
            picture = PICTURES[name](*given)
        except ImportError as error:
            print(f"{name}: not here ({error})")
            continue
        path = OUT / f"{name}.png"
        picture.convert("RGB").quantize(256).save(path, optimize=True)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
