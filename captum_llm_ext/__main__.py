"""The command line: ``captum-llm-ext``, also ``python -m captum_llm_ext``."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_llm_ext.demo import PROMPT, folder
from captum_llm_ext.segment import segmenter

_METHODS = ("ShapleyValueSampling", "KernelShap", "FeatureAblation", "Lime")
_DEMO = """\
Attributes a generated text to its prompt and to itself, word by word and token by token.

Without --model it runs on a tiny language model that comes with the package: invented biographies
in which the true cause of every word is known. Nothing is downloaded.
"""
_EXAMPLES = """\
examples:
  captum-llm-ext demo
  captum-llm-ext demo --prompt "Ann lives in Austin, TX and is a nurse."
  captum-llm-ext demo --model Qwen/Qwen3-0.6B --prompt "The capital of France is" --max-new-tokens 5
  captum-llm-ext demo --model ./my-model --prompt "Dear" --corpus letters.txt --out out
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        Exit status: 0, or 1 where the command could not be carried out.
    """
    arguments = _parser().parse_args(argv)
    try:
        demo(arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"captum-llm-ext: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("captum-llm-ext: interrupted", file=sys.stderr)
        return 130
    return 0


def demo(arguments: argparse.Namespace) -> None:
    """Generates, attributes, prints a table and writes a picture, a page and the numbers."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.unit != "token":
        segmenter(arguments.unit)  # a name that is none is told before a model is loaded
    own = arguments.model is None
    if arguments.prompt is None and not own:
        raise ValueError("--model needs a --prompt to continue.")
    corpus = arguments.corpus or (folder() / "corpus.txt" if own else None)
    result = _attribute(arguments, str(folder()) if own else arguments.model, corpus)
    print(f"\n{result}\n")
    result.to_html(out / "demo.html", title="captum-llm-ext demo")
    figure, _ = result.plot_token_attr()
    figure.savefig(out / "demo.png", dpi=150, bbox_inches="tight")
    result.save(out / "demo.safetensors")
    print("written:")
    print(f"  {out / 'demo.html'}          the text, with causes on hover: open it in a browser")
    print(f"  {out / 'demo.png'}           the heat map")
    print(f"  {out / 'demo.safetensors'}   the numbers: GenerationAttributionResult.load(…)")


def _attribute(arguments: argparse.Namespace, name: str, corpus: Any) -> Any:
    import captum.attr
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from captum_llm_ext import CorpusBaselines, GenerationAttribution, TextSegmentInput

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    prompt = PROMPT if arguments.prompt is None else arguments.prompt
    baselines = None if corpus is None else CorpusBaselines(corpus, seed=arguments.seed)
    inp = TextSegmentInput(prompt, tokenizer, arguments.unit, baselines=baselines)
    method = getattr(captum.attr, arguments.method)(model)
    print(f"model:   {arguments.model or 'the tiny one that comes with the package'}")
    print(f"prompt:  {prompt}")
    with warnings.catch_warnings():
        warnings.simplefilter("once", UserWarning)
        warnings.showwarning = _note
        result = GenerationAttribution(method, tokenizer).attribute(
            inp,
            gen_args={"max_new_tokens": arguments.max_new_tokens},
            seed=arguments.seed,
            show_progress=True,
        )
    print(f"answer: {tokenizer.decode(result.target, skip_special_tokens=True)}")
    return result


def _note(message: Warning | str, *_: object) -> None:
    """A warning as a reader of the command line wants it: the sentence, not where it was said."""
    print(f"note: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="captum-llm-ext",
        description="Why did the language model write that?",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="see it work",
        description=_DEMO,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = demo.add_argument
    add("--model", metavar="PATH_OR_NAME", help="a Hugging Face causal language model")
    add("--prompt", metavar="TEXT", help="what the model continues")
    add(
        "--unit",
        default="word",
        help="prompt features: token, word (default), sentence, line, paragraph, block",
    )
    add("--max-new-tokens", type=int, default=40, metavar="N", help="default 40")
    add("--corpus", metavar="FILE", help="text to draw replacements from, a document a line")
    add("--method", choices=_METHODS, default=_METHODS[0], help=f"default {_METHODS[0]}")
    add("--seed", type=int, default=0, metavar="N", help="default 0")
    add("--out", default="captum-llm-ext-demo", metavar="DIR", help="default ./captum-llm-ext-demo")
    return parser


if __name__ == "__main__":
    sys.exit(main())
