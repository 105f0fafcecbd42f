"""An attribution as its options describe it."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from captum_llm_ext.attribution.generation import GenerationAttribution
from captum_llm_ext.attribution.gradient import GenerationGradientAttribution
from captum_llm_ext.base.arguments import TARGETS
from captum_llm_ext.cli.api import attribution_of, is_remote, tokenizers_of
from captum_llm_ext.cli.command import UsageError, positive
from captum_llm_ext.cli.loading import DEMO, add_loading, load_model, load_tokenizer, location
from captum_llm_ext.cli.methods import (
    HELP,
    add_method,
    add_settings,
    attribution,
    check_method,
    is_of_gradients,
    is_search,
    method,
)
from captum_llm_ext.cli.torchrun import are_several
from captum_llm_ext.contrast import Contrast
from captum_llm_ext.demo import folder
from captum_llm_ext.text.baselines.corpus.baselines import CorpusBaselines
from captum_llm_ext.text.baselines.model.baselines import ModelBaselines
from captum_llm_ext.text.inputs import ChatInput, TextSegmentInput
from captum_llm_ext.text.segment import segmenter

_NESTED = ("paragraph", "sentence", "word")  # what a search goes down, if nothing else is said
_WITHOUT = "without:"
_BASELINES = """\
baselines: what stands where a word is absent
  delete        nothing (of gradients: the zero vector)
  model         what the model itself would have written there
  <pad>         a token of the vocabulary (token:TEXT where it reads like another line of these)
  corpus:FILE   text from the same surroundings in a file: a document a line, or .jsonl with the
                field "text"; corpus:demo is the tiny model's
  index:FILE    the same from what CorpusBaselines.save wrote
"""
Prompt = str | Mapping[str, Any]
Attribution = GenerationAttribution | GenerationGradientAttribution


def add_job(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Adds the options of a run.

    Args:
        parser: The command's parser.
        several: Whether baselines are given several times; then nothing is required, for there is
            another way to use the command.
    """
    required = not several
    what = parser.add_argument_group("what is explained")
    what.add_argument(
        "--model",
        required=required,
        metavar="NAME",
        help=f"'{DEMO}' (comes with the package), a Hugging Face name, or a folder",
    )
    add_loading(what)
    prompt = what.add_mutually_exclusive_group(required=required)
    prompt.add_argument("--prompt", metavar="TEXT", help="what the model continues")
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same in a file; - is stdin")
    prompt.add_argument(
        "--chat",
        metavar="JSON",
        help='a chat, [{"role": "user", "content": "…"}, …] or {"messages": […], "tools": […]}: '
        "JSON, a file with it, or - for stdin",
    )
    if not several:
        prompt.add_argument(
            "--input",
            metavar="JSONL",
            help='many prompts: a line for each, {"prompt": "…"} or {"messages": […]}, with '
            '"target" and "id" as wanted; needs --out',
        )
    _add_target(what)
    how = parser.add_argument_group("how")
    add_method(how)
    add_settings(how)
    _add_features(how)
    _add_budget(how)
    default = "model; with gradients or --input, delete"
    how.add_argument(
        "--baselines",
        action="append",
        metavar="WHAT",
        help=f"see below{'; twice or more' if several else f' (default: {default})'}",
    )
    parser.epilog = f"{HELP}\n{_BASELINES}\n{parser.epilog}"


def _add_target(group: Any) -> None:
    add = group.add_argument
    add("--target", metavar="TEXT", help="the text to explain (default: what the model generates)")
    add("--max-new-tokens", type=positive, metavar="N", help="generate at most N (default: 25)")
    add("--sample", action="store_true", help="generate at random, seeded (default: greedily)")
    add("--temperature", type=float, metavar="X", help="of --sample")
    add("--top-p", type=float, metavar="X", help="of --sample")


def _add_features(group: Any) -> None:
    add = group.add_argument
    add(
        "--unit",
        metavar="UNIT",
        help="prompt features: token, word, sentence, line, paragraph, block, of a chat also turn; "
        "several from coarse to fine with commas (default: word; of a chat turn; of hierarchical "
        f"{','.join(_NESTED)})",
    )
    add(
        "--output-unit",
        default="token",
        metavar="UNIT",
        help="features of the generated text, or 'none' to hold it fixed (default: token)",
    )
    add("--roles", metavar="ROLES", help="of a chat: whose turns are features (user,system)")


def _add_budget(group: Any) -> None:
    add = group.add_argument
    add(
        "--attr-target",
        choices=TARGETS,
        default="log_prob",
        help="the value that is explained (default: log_prob); contrast: why this word rather than "
        "others that would fit",
    )
    add(
        "--foils",
        action="append",
        metavar="TEXT",
        help="of --attr-target contrast: a text to hold every target token against, or several by "
        "giving it again (default: found; without:FEATURE finds what the model says without it)",
    )
    add("--n-samples", type=positive, metavar="N", help="budget, as of the method in captum")
    add(
        "--n-draws",
        type=positive,
        metavar="N",
        help="draws of random baselines, of methods that enumerate coalitions or take steps",
    )
    add("--tol", type=float, metavar="X", help="sample until the errors are below X of the range")
    add(
        "--max-evaluations", type=positive, metavar="N", help="with --tol: stop there at the latest"
    )
    add("--batch-size", type=positive, metavar="N", help="default: what memory allows")
    add("--seed", type=int, default=0, metavar="N", help="of every random choice (default: 0)")
    add("--quiet", action="store_true", help="no progress bar")


class Job:
    """A run: its prompt, its model, its settings.

    What needs no model is checked on construction, what needs the tokenizer alone before the model
    is loaded.

    Args:
        arguments: Options of `add_job`.

    Raises:
        UsageError: If options contradict one another.
        ValueError: If the prompt, a unit or the model's name is none.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._gen_args = _gen_args(arguments)
        # Of many prompts, each says for itself what it is.
        is_many = getattr(arguments, "input", None) is not None
        self._prompt = "" if is_many else _read_prompt(arguments)
        is_chat = not isinstance(self._prompt, str) or (is_many and bool(arguments.roles))
        self._units = units(arguments.unit, is_chat=is_chat, is_nested=is_search(arguments.method))
        check_method(arguments)
        if is_of_gradients(arguments.method) and are_several() and not is_many:
            raise UsageError(
                f"--method {arguments.method} takes one process for a prompt: start it without "
                "torchrun, or give many prompts with --input, which the processes share."
            )
        self._output_unit = None if arguments.output_unit == "none" else arguments.output_unit
        if self._output_unit not in (None, "token"):
            segmenter(arguments.output_unit)
        if arguments.roles and not is_chat:
            raise UsageError("--roles would be ignored: it is about the turns of a --chat.")
        if arguments.max_evaluations is not None and arguments.tol is None:
            raise UsageError("--max-evaluations has no meaning without --tol.")
        self._explained = _explained(arguments)
        self._is_remote = getattr(arguments, "rung", ()) != () and is_remote(arguments)
        if self._is_remote:
            self._output_unit = None  # most servers tell less
        else:
            location(arguments.model, arguments.revision)

    def prepared(
        self, baselines: Any, accelerator: Any = None
    ) -> tuple[Attribution, TextSegmentInput]:
        """What attributes, and the prompt over these baselines."""
        arguments = self._arguments
        if self._is_remote:
            tokenizer, of_input = tokenizers_of(arguments)
            return attribution_of(arguments, tokenizer), self._input(of_input, baselines)
        tokenizer = load_tokenizer(arguments.model, arguments.revision)
        inp = self._input(tokenizer, baselines)
        return self._attribution(tokenizer, accelerator), inp

    def for_many(self) -> tuple[Attribution, dict[str, Any]]:
        """What attributes, and the arguments of `attribute_dataset` that say what features are."""
        arguments = self._arguments
        chosen: dict[str, Any] = {}
        if arguments.unit or is_search(arguments.method):
            chosen["unit"] = self._units[0] if len(self._units) == 1 else self._units
        if arguments.roles:
            chosen["roles"] = [role.strip() for role in arguments.roles.split(",")]
        tokenizer = load_tokenizer(arguments.model, arguments.revision)
        return self._attribution(tokenizer, None), chosen

    def _attribution(self, tokenizer: Any, accelerator: Any) -> Attribution:
        arguments = self._arguments
        model = load_model(arguments.model, arguments)
        settings = {name: getattr(arguments, name) for name in ("share", "scheme", "layer")}
        attributes = method(arguments.method, model, **settings)
        return attribution(attributes, tokenizer, self._explained, accelerator)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``attribute``."""
        arguments = self._arguments
        if is_of_gradients(arguments.method):
            own = {"n_steps": arguments.n_steps, "internal_batch_size": arguments.batch_size}
        else:
            own = {"tol": arguments.tol, "max_evaluations": arguments.max_evaluations}
            own |= {"perturbations_per_eval": arguments.batch_size}
        return {
            "target": arguments.target,
            "gen_args": self._gen_args,
            "output_unit": self._output_unit,
            "n_samples": arguments.n_samples,
            "n_draws": arguments.n_draws,
            "seed": arguments.seed,
            "show_progress": not arguments.quiet,
            **own,
        }

    def _input(self, tokenizer: Any, baselines: Any) -> TextSegmentInput:
        if isinstance(self._prompt, str):
            return TextSegmentInput(self._prompt, tokenizer, self._units, baselines=baselines)
        roles = (self._arguments.roles or "user,system").split(",")
        return ChatInput(
            self._prompt["messages"],
            tokenizer,
            self._units[0] if len(self._units) == 1 else self._units,
            [role.strip() for role in roles],
            tools=self._prompt.get("tools"),
            baselines=baselines,
        )


def as_baselines(given: str, seed: int) -> Any:
    """What `TextSegmentInput` takes for an entry of ``--baselines``.

    Raises:
        UsageError: If a file is given without saying what it is.
        ValueError, OSError: If the file cannot be read.
    """
    kind, _, name = given.partition(":")
    if given == "delete":
        return None
    if given == "model":
        return ModelBaselines()
    if kind == "token" and name:
        return name
    if kind == "corpus" and name:
        is_demo = name == DEMO and not Path(name).exists()
        return CorpusBaselines(folder() / "corpus.txt" if is_demo else name, seed=seed)
    if kind == "index" and name:
        return CorpusBaselines.load(name, seed=seed)
    if kind.isalpha() and name:
        raise UsageError(
            f"--baselines {given}: before the colon goes corpus, index or token (token:{given} for "
            "a token that reads like that)."
        )
    if Path(given).is_file():
        raise UsageError(
            f"--baselines {given} is a file: say corpus:{given} if it holds texts, index:{given} "
            "if `CorpusBaselines.save` wrote it."
        )
    return given


def _explained(arguments: argparse.Namespace) -> str | Contrast:
    """What ``--attr-target`` and ``--foils`` say.

    Raises:
        UsageError: If foils would be ignored.
    """
    given: list[str] | None = arguments.foils
    if given is None:
        return arguments.attr_target
    if arguments.attr_target != "contrast":
        raise UsageError("--foils would be ignored: it is of --attr-target contrast.")
    feature = given[0].removeprefix(_WITHOUT)
    if feature == given[0]:
        return Contrast(foils=given)
    if len(given) > 1:
        raise UsageError(f"--foils {given[0]} finds all foils: give it alone.")
    return Contrast(without=int(feature) if feature.isdigit() else feature)


def _gen_args(arguments: argparse.Namespace) -> dict[str, Any] | None:
    given = {
        "max_new_tokens": arguments.max_new_tokens,
        "do_sample": arguments.sample or None,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if getattr(arguments, "rung", None) in ("frequency", "similarity"):
        return given  # answers are drawn, whatever the target
    if arguments.target is not None and given:
        raise UsageError(
            f"--{_option(next(iter(given)))} would be ignored: with a --target nothing is "
            "generated."
        )
    for name in ("temperature", "top_p"):
        if name in given and not arguments.sample:
            raise UsageError(f"--{_option(name)} would be ignored without --sample.")
    return None if arguments.target is not None else given


def _option(name: str) -> str:
    return {"do_sample": "sample"}.get(name, name).replace("_", "-")


def units(given: str | None, *, is_chat: bool, is_nested: bool) -> tuple[str, ...]:
    """The units that ``--unit`` names, from coarse to fine.

    Args:
        given: The option; None where it is not given.
        is_chat: Whether turns are the coarsest parts.
        is_nested: Whether the method wants parts in parts.

    Raises:
        UsageError: If they are of no use here.
        ValueError: If one is unknown.
    """
    unsaid = ",".join(_NESTED) if is_nested else "turn" if is_chat else "word"
    units = tuple(unit.strip() for unit in (given or unsaid).split(","))
    if is_nested and (len(units) < 2 and not (is_chat and units != ("turn",))):
        raise UsageError(
            f"--unit {given}: --method hierarchical opens larger parts to smaller ones: give "
            f"several, such as {','.join(_NESTED)}."
        )
    for unit in units:
        if unit == "turn" and not is_chat:
            raise UsageError("--unit turn is about the turns of a --chat.")
        if unit not in ("token", "turn"):
            segmenter(unit)
    # Turns are the coarsest level of a chat anyway.
    return units[1:] if is_chat and len(units) > 1 and units[0] == "turn" else units


def _read_prompt(arguments: argparse.Namespace) -> Prompt:
    if arguments.chat is not None:
        return _chat(arguments.chat)
    if arguments.prompt_file is None:
        return cast(str, arguments.prompt)
    text = _text(arguments.prompt_file)
    # The line break that ends a file's last line is the editor's.
    return text.removesuffix("\n").removesuffix("\r")


def _chat(given: str) -> Mapping[str, Any]:
    is_json = given.lstrip().startswith(("[", "{"))
    where = "--chat" if is_json else f"the chat in {given!r}"
    try:
        found: Any = json.loads(given if is_json else _text(given))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is no JSON ({error}): give a list of messages with 'role' and 'content'."
        ) from error
    chat = cast(Any, found if isinstance(found, dict) else {"messages": found})
    if not isinstance(chat.get("messages"), Sequence) or isinstance(chat["messages"], str):
        raise ValueError(
            f"{where} has no list of messages: give a list of objects with 'role' and 'content', "
            'or an object that holds it as "messages".'
        )
    return chat


def _text(name: str) -> str:
    if name == "-":
        return sys.stdin.read()
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name!r} is no UTF-8 text ({error}).") from error
