"""The picture of the page in the README.

    python benchmarks/picture.py

The README's own example, opened in a headless Chromium: `tutorials/images/answer.png`.
"""

import io
import shutil
import tempfile
from pathlib import Path

import torch
from captum.attr import ShapleyValueSampling
from PIL import Image
from playwright.sync_api import sync_playwright

from captum_llm_ext import CorpusBaselines, GenerationAttribution, TextSegmentInput, load_demo

PATH = Path(__file__).parent.parent / "tutorials" / "images" / "answer.png"
PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main() -> None:
    """Writes the picture."""
    torch.set_num_threads(1)
    model, tokenizer, texts = load_demo()
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines=CorpusBaselines(texts))
    attribution = GenerationAttribution(ShapleyValueSampling(model), tokenizer)
    result = attribution.attribute(inp, gen_args={"max_new_tokens": 40}, n_samples=100)
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise SystemExit("there is no chromium to open the page in: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "answer.html"
        result.to_html(path)
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page(
            viewport={"width": 1180, "height": 620}, device_scale_factor=1.5, color_scheme="light"
        )
        tab.goto(path.as_uri())
        tab.locator("#answer .piece").last.wait_for()
        shot = tab.screenshot(clip={"x": 0, "y": 0, "width": 1180, "height": 484})
        browser.close()
    PATH.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(shot)).convert("RGB").save(PATH, optimize=True)
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
