"""``captum-llm-ext demo``: an attribution with the package's own model."""

import argparse
from pathlib import Path
from typing import Any

from captum_llm_ext.cli.command import UsageError, add_command, positive, say, whole
from captum_llm_ext.cli.input_files import check_there
from captum_llm_ext.cli.loading import DEMO, add_loading, load_model, load_tokenizer, place_of
from captum_llm_ext.cli.methods import add_method, attribution, is_search, method
from captum_llm_ext.cli.outputs import write_picture
from captum_llm_ext.cli.prompt import units
from captum_llm_ext.cli.report import report
from captum_llm_ext.demo import PROMPT, folder

EXAMPLES = (
    "demo",
    'demo --prompt "Ann lives in Austin, TX and is a nurse."',
    'demo --model Qwen/Qwen3-0.6B --prompt "The capital of France is" --max-new-tokens 5',
    'demo --model ./my-model --prompt "Dear" --corpus letters.txt --out out',
)
_TOP = 3  # causes per token
_DESCRIPTION = """\
Attributes a generated text to its prompt and to itself, word by word and token by token.

Without --model it runs on a tiny language model that comes with the package: invented biographies
in which the true cause of every word is known. Nothing is downloaded.
"""


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "demo",
        run,
        summary="see it work",
        description=_DESCRIPTION,
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("--model", metavar="PATH_OR_NAME", help="a Hugging Face causal language model")
    add_loading(parser)
    add("--prompt", metavar="TEXT", help="what the model continues")
    add(
        "--unit",
        help="prompt features: token, word (default), sentence, line, paragraph, block; several "
        "from coarse to fine with commas",
    )
    add("--max-new-tokens", type=positive, default=40, metavar="N", help="default 40")
    add("--corpus", metavar="FILE", help="text to draw replacements from, a document a line")
    add_method(parser, more="see attribute --help")
    add("--seed", type=whole, default=0, metavar="N", help="default 0")
    add("--out", default="captum-llm-ext-demo", metavar="DIR", help="default ./captum-llm-ext-demo")


def run(arguments: argparse.Namespace) -> None:
    """Generates, attributes, prints a table and writes a picture, a page and the numbers."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.prompt is None and arguments.model is not None:
        raise UsageError("--model needs a --prompt to continue.")
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UsageError("the prompt is empty: give --prompt a text with at least one word.")
    if arguments.corpus is not None:
        check_there("--corpus", arguments.corpus)
    # A wrong name is reported before a model is loaded.
    parts = units(arguments.unit, is_nested=is_search(arguments.method))
    result = _attribute(arguments, parts)
    print(report(result, _TOP), flush=True)
    result.to_html(out / "demo.html", title="captum-llm-ext demo")
    write_picture(out / "demo.png", result.plot_token_attr()[0])
    result.save(out / "demo.safetensors")
    say("\nwritten:")
    say(f"  {out / 'demo.html'}          the text, with causes on hover: open it in a browser")
    say(f"  {out / 'demo.png'}           the heat map")
    say(f"  {out / 'demo.safetensors'}   the numbers: captum-llm-ext show reads them")


def _attribute(arguments: argparse.Namespace, parts: tuple[str, ...]) -> Any:
    own = arguments.model is None and arguments.gguf is None
    if own:
        arguments.model = DEMO
    place = place_of(arguments)
    from captum_llm_ext.text.baselines import Default
    from captum_llm_ext.text.baselines.corpus.baselines import CorpusBaselines
    from captum_llm_ext.text.inputs import TextSegmentInput

    corpus = arguments.corpus or (folder() / "corpus.txt" if own else None)
    prompt = PROMPT if arguments.prompt is None else arguments.prompt
    baselines = Default() if corpus is None else CorpusBaselines(corpus, seed=arguments.seed)
    tokenizer = load_tokenizer(place)
    inp = TextSegmentInput(prompt, tokenizer, parts, baselines=baselines)
    attributes = method(arguments.method, load_model(place, arguments))
    say(f"model:   {'the tiny one that comes with the package' if own else place.shown}")
    say(f"prompt:  {prompt}")
    result = attribution(attributes, tokenizer).attribute(
        inp,
        gen_args={"max_new_tokens": arguments.max_new_tokens},
        seed=arguments.seed,
        show_progress=True,
    )
    say(f"answer: {''.join(piece.text for piece in result.output_pieces)}\n")
    return result
