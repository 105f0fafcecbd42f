"""An attribution job, built from the options of the command line."""

import argparse
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_llm_ext.base.arguments import TARGETS
from captum_llm_ext.cli.api import is_remote
from captum_llm_ext.cli.command import UsageError, above_zero, note, positive, share, whole
from captum_llm_ext.cli.input_files import check_there
from captum_llm_ext.cli.loading import DEMO, add_loading, load_model, load_tokenizer, place_of
from captum_llm_ext.cli.methods import (
    HELP,
    add_method,
    add_settings,
    attribution,
    check_method,
    is_of_answers,
    is_of_attention,
    is_of_gradients,
    is_search,
    is_white_box,
    method,
)
from captum_llm_ext.cli.prompt import NESTED, add_prompt, prompt_of, units
from captum_llm_ext.cli.torchrun import are_several, is_main
from captum_llm_ext.demo import folder
from captum_llm_ext.text.segment import segmenter

if TYPE_CHECKING:
    from captum_llm_ext.cli.methods import Attribution
    from captum_llm_ext.cli.progress import CheaperRun
    from captum_llm_ext.contrast import Contrast
    from captum_llm_ext.text.inputs import TextSegmentInput

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


def add_job(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Adds the options of an attribution.

    Args:
        parser: The command's parser.
        several: Whether baselines are given several times; then nothing is required, since the
            command has another use.
    """
    _add_what(parser, is_required=not several, has_many=not several)
    how = parser.add_argument_group("how")
    add_method(how)
    add_settings(how)
    _add_features(how)
    _add_output_unit(how)
    _add_budget(how)
    _add_run(how)
    default = "model; with gradients, delete"
    how.add_argument(
        "--baselines",
        action="append",
        metavar="WHAT",
        help=f"see below{'; twice or more' if several else f' (default: {default})'}",
    )
    parser.epilog = f"{HELP}\n{_BASELINES}\n{parser.epilog}"


def add_question(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a `Job` without attributions: model, prompt, features and baselines."""
    _add_what(parser, is_required=True, has_many=False)
    how = parser.add_argument_group("how")
    _add_features(how)
    how.add_argument(
        "--baselines", action="append", metavar="WHAT", help="see below (default: model)"
    )
    _add_run(how)
    # The other options of `add_job`, with their defaults.
    defaults = argparse.ArgumentParser(add_help=False)
    for add in (add_method, add_settings, _add_output_unit, _add_budget):
        add(defaults)
    parser.set_defaults(**vars(defaults.parse_args([])))
    parser.epilog = f"{_BASELINES}\n{parser.epilog}"


def _add_what(parser: argparse.ArgumentParser, *, is_required: bool, has_many: bool) -> None:
    what = parser.add_argument_group("what is explained")
    what.add_argument(
        "--model",
        metavar="NAME",
        help=f"'{DEMO}' (comes with the package), a Hugging Face name, or a folder",
    )
    add_loading(what)
    add_prompt(what, is_required=is_required, has_many=has_many)
    _add_target(what)


def _add_target(group: Any) -> None:
    add = group.add_argument
    add("--target", metavar="TEXT", help="the text to explain (default: what the model generates)")
    add("--max-new-tokens", type=positive, metavar="N", help="generate at most N (default: 25)")
    add("--sample", action="store_true", help="generate at random, seeded (default: greedily)")
    add("--temperature", type=above_zero, metavar="X", help="with --sample")
    add("--top-p", type=share, metavar="X", help="with --sample")


def _add_features(group: Any) -> None:
    add = group.add_argument
    add(
        "--unit",
        metavar="UNIT",
        help="prompt features: token, word, sentence, line, paragraph, block, of a chat also turn, "
        "of --context also passage; several from coarse to fine with commas (default: word; of a "
        "chat of several turns turn; of --context passage,sentence; of hierarchical "
        f"{','.join(NESTED)})",
    )
    add("--roles", metavar="ROLES", help="of a chat: whose turns are features (user,system)")


def _add_output_unit(group: Any) -> None:
    group.add_argument(
        "--output-unit",
        metavar="UNIT",
        help="token, word, …: earlier words of the answer count as causes, for 'which word led to "
        "the next?'; none: the answer is held fixed, for 'which passage did it come from?' "
        "(default: token; with --context none)",
    )


def _add_budget(group: Any) -> None:
    add = group.add_argument
    add(
        "--attr-target",
        choices=TARGETS,
        help="the value that is explained (default: log_prob, of linear logit); contrast: why this "
        "word rather than others that would fit",
    )
    add(
        "--foils",
        action="append",
        metavar="TEXT",
        help="of --attr-target contrast: a text to compare every target token with, or several "
        "by giving it again (default: found; without:FEATURE finds what the model says "
        "without it)",
    )
    add("--n-samples", type=positive, metavar="N", help="budget, as in captum's method")
    add(
        "--n-draws",
        type=positive,
        metavar="N",
        help="draws of random baselines, for methods that enumerate coalitions or take steps",
    )
    add(
        "--tol",
        type=above_zero,
        metavar="X",
        help="sample until the errors are below X of the range",
    )
    add("--max-evaluations", type=positive, metavar="N", help="with --tol: at most N evaluations")
    add(
        "--surrogate",
        choices=("bf16", "float16"),
        help="score most coalitions by a copy of the model in this type; the model corrects it",
    )


def _add_run(group: Any) -> None:
    add = group.add_argument
    add("--batch-size", type=positive, metavar="N", help="default: what memory allows")
    add(
        "--seed", type=whole, default=0, metavar="N", help="seed of all random choices (default: 0)"
    )
    add("--quiet", action="store_true", help="no progress bar")


class Job:
    """An attribution job: prompt, model and settings.

    What needs no model is checked on construction, what needs only the tokenizer before the model
    is loaded.

    Args:
        arguments: Options of `add_job`.

    Raises:
        UsageError: If options contradict one another.
        ValueError: If the prompt, a unit or the model's name is invalid.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._gen_args = _gen_args(arguments)
        self._prompt = prompt_of(arguments)
        is_many = self._prompt.is_many
        self._units = self._checked_units(arguments.unit)
        check_method(arguments)
        if is_white_box(arguments.method) and are_several() and not is_many:
            raise UsageError(
                f"--method {arguments.method} takes one process for a prompt: start it without "
                "torchrun, or give many prompts with --input, which the processes share."
            )
        self._output_unit = self._chosen_output_unit()
        if arguments.max_evaluations is not None and arguments.tol is None:
            raise UsageError("--max-evaluations has no meaning without --tol.")
        _check_foils(arguments)
        for given in arguments.baselines or ():
            _check_baselines(given)
        self._is_remote = getattr(arguments, "rung", ()) != () and is_remote(arguments)
        if self._is_remote:
            if arguments.output_unit is None:
                self._output_unit = None  # most servers report less
            if arguments.model is None:
                raise UsageError("required: --model NAME, as the API calls it.")
        else:
            self._place = place_of(arguments)

    def _checked_units(self, given: str | None) -> tuple[str, ...]:
        # Many prompts may include chats.
        n_turns = 2 if self._prompt.is_many and self._arguments.roles else self._prompt.n_turns
        is_nested = is_search(self._arguments.method)
        has_passages = bool(self._prompt.passages)
        return units(given, n_turns=n_turns, has_passages=has_passages, is_nested=is_nested)

    def _chosen_output_unit(self) -> str | None:
        given = self._arguments.output_unit
        if is_of_answers(self._arguments.method):
            return None
        if given is None:
            # With passages, the question is which of them the answer came from, not which word led
            # to the next.
            return None if self._prompt.passages else "token"
        if given not in ("none", "token"):
            try:
                segmenter(given)
            except ValueError as error:
                raise UsageError(f"--output-unit: {error}") from error
        return None if given == "none" else given

    def prepared(
        self, baselines: Any, accelerator: Any = None
    ) -> "tuple[Attribution, TextSegmentInput]":
        """The attribution object, and the input with these baselines."""
        arguments = self._arguments
        if self._is_remote:
            from captum_llm_ext.cli.remote import attribution_of, tokenizers_of

            tokenizer, of_input = tokenizers_of(arguments)
            remote = attribution_of(arguments, tokenizer, _explained(arguments))
            return remote, self._input(of_input, baselines)
        tokenizer = load_tokenizer(self._place)
        if arguments.target is None and is_main():
            self._prompt.note_template(tokenizer, self._place.shown)
        if arguments.unit is None and self._units == ("turn",) and is_main():
            note("the parts of a chat are its turns: --unit sentence or word looks into them.")
        inp = self._input(tokenizer, baselines)
        return self._attribution(tokenizer, accelerator), inp

    def for_many(self) -> "tuple[Attribution, dict[str, Any]]":
        """The attribution object, and the arguments of `attribute_dataset` on features."""
        arguments = self._arguments
        chosen: dict[str, Any] = {}
        if arguments.unit or is_search(arguments.method):
            chosen["unit"] = self._units[0] if len(self._units) == 1 else self._units
        if arguments.roles:
            chosen["roles"] = [role.strip() for role in arguments.roles.split(",")]
        tokenizer = load_tokenizer(self._place)
        return self._attribution(tokenizer, None), chosen

    def _attribution(self, tokenizer: Any, accelerator: Any) -> "Attribution":
        arguments = self._arguments
        model = load_model(self._place, arguments)
        settings = {name: getattr(arguments, name) for name in ("share", "scheme", "layer")}
        attributes = method(arguments.method, model, **settings)
        surrogate = arguments.surrogate
        explained = _explained(arguments)
        return attribution(attributes, tokenizer, explained, accelerator, surrogate)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``attribute``."""
        arguments = self._arguments
        if is_of_attention(arguments.method):
            return {
                "target": arguments.target,
                "gen_args": self._gen_args,
                "output_unit": self._output_unit,
                "seed": arguments.seed,
                "show_progress": not arguments.quiet,
            }
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

    def cheaper(self, tokenizer: Any, n_tokens: int) -> "Iterator[CheaperRun]":
        """Other commands with about the same answer and fewer evaluations.

        Args:
            tokenizer: The model's tokenizer.
            n_tokens: Length of the answer.
        """
        from captum_llm_ext.cli.progress import CheaperRun

        arguments = self._arguments
        n_prompt = self._prompt.input(tokenizer, self._units, None).n_features
        n_output = 0
        if self._output_unit is not None:  # the last one causes nothing
            n_output = max(n_tokens - 1, 0)
        n_features = n_prompt + n_output
        if arguments.n_samples is None:
            for unit in self._coarser():
                n = self._prompt.input(tokenizer, (unit,), None).n_features
                if 1 < n < 0.8 * n_prompt:
                    yield CheaperRun(f"--unit {unit}", (n + n_output) / n_features, f"{n} parts")
            if n_output > 0.2 * n_features:
                means = "asks which part of the prompt it came from, not which word led to the next"
                yield CheaperRun("--output-unit none", n_prompt / n_features, means)
        if arguments.method in ("kernel", "lime", "partition") and arguments.tol is None:
            n_samples = (arguments.n_samples or 16 * n_features) // 2
            if n_samples >= 4 * n_features:
                means = "errors about 1.4 times as large"
                yield CheaperRun(f"--n-samples {n_samples}", 0.5, means)
        if not is_search(arguments.method) and n_prompt > 40:
            yield CheaperRun("--method hierarchical", None, "opens only the parts that matter")

    def _coarser(self) -> tuple[str, ...]:
        """Units coarser than that of the features."""
        if is_search(self._arguments.method):
            return ()
        levels = ("passage",) if self._prompt.passages else ("paragraph",)
        levels = (*levels, "sentence", "word", "token")
        finest = self._units[-1]
        return levels[: levels.index(finest)][::-1] if finest in levels else ()

    def _input(self, tokenizer: Any, baselines: Any) -> "TextSegmentInput":
        return self._prompt.input(tokenizer, self._units, baselines)


def baselines_of(arguments: argparse.Namespace) -> Any:
    """The ``baselines`` argument of `TextSegmentInput` for at most one ``--baselines``.

    Raises:
        UsageError, ValueError, OSError: As for `as_baselines`.
    """
    if arguments.baselines:
        return as_baselines(arguments.baselines[0], arguments.seed)
    from captum_llm_ext.text.baselines import Default

    return Default()


def as_baselines(given: str, seed: int) -> Any:
    """The ``baselines`` argument of `TextSegmentInput` for an entry of ``--baselines``.

    Raises:
        UsageError: If a file is given without its kind.
        ValueError, OSError: If the file cannot be read.
    """
    _check_baselines(given)
    kind, _, name = given.partition(":")
    if given == "delete":
        return None
    if given == "model":
        from captum_llm_ext.text.baselines.model.baselines import ModelBaselines

        return ModelBaselines()
    if kind == "token" and name:
        return name
    if kind in ("corpus", "index") and name:
        from captum_llm_ext.text.baselines.corpus.baselines import CorpusBaselines

        if kind == "index":
            return CorpusBaselines.load(name, seed=seed)
        is_demo = name == DEMO and not Path(name).exists()
        return CorpusBaselines(folder() / "corpus.txt" if is_demo else name, seed=seed)
    return given


def _check_baselines(given: str) -> None:
    """Checks the syntax of an entry of ``--baselines``; no file is read.

    Raises:
        UsageError: If a file is given without its kind or does not exist, or a word is mistyped.
    """
    kind, _, name = given.partition(":")
    if given in ("corpus", "corpus:", "index", "index:", "token:"):
        raise UsageError(
            f"--baselines {given} is incomplete: give "
            f"{kind}:{'TEXT' if kind == 'token' else 'FILE'}."
        )
    if kind in ("corpus", "index") and name and not (kind == "corpus" and name == DEMO):
        check_there("--baselines", name, shown=given)
    if kind in ("corpus", "index", "token") and name:
        return
    close = get_close_matches(given, ("delete", "model"), n=1, cutoff=0.7)
    if given.isalpha() and close and given != close[0]:
        raise UsageError(
            f"--baselines {given}: did you mean {close[0]}? (token:{given} for the token of that "
            "name)"
        )
    if kind.isalpha() and name:
        raise UsageError(
            f"--baselines {given}: the part before the colon is corpus, index or token "
            f"(token:{given} for the token of that name)."
        )
    if Path(given).is_file():
        raise UsageError(
            f"--baselines {given} is a file: give corpus:{given} if it holds texts, index:{given} "
            "if `CorpusBaselines.save` wrote it."
        )


def _check_foils(arguments: argparse.Namespace) -> None:
    """Checks that foils have an effect.

    Raises:
        UsageError: If they have none.
    """
    given: list[str] | None = arguments.foils
    if given is None:
        return
    if arguments.attr_target != "contrast":
        raise UsageError("--foils would be ignored: it belongs to --attr-target contrast.")
    if given[0].startswith(_WITHOUT) and len(given) > 1:
        raise UsageError(f"--foils {given[0]} finds all foils: give it alone.")


def _explained(arguments: argparse.Namespace) -> "str | Contrast":
    """The value to explain, from ``--attr-target`` and ``--foils``."""
    given: list[str] | None = arguments.foils
    if given is None:
        usual = "logit" if arguments.method == "linear" else "log_prob"
        return arguments.attr_target or usual
    from captum_llm_ext.contrast import Contrast

    feature = given[0].removeprefix(_WITHOUT)
    if feature == given[0]:
        return Contrast(foils=given)
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
        return given  # answers are sampled, whatever the target
    if arguments.target is not None and not arguments.target:
        raise UsageError("--target is empty: give the text to explain, or leave it out.")
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
