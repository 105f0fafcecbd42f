"""Generation settings: the user's arguments, the model's configuration, and defaults."""

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.base.digest import describe

_DEFAULT_LENGTH = 25  # captum's default
_LENGTHS = ("max_new_tokens", "max_length")
_CHOOSE_AT_RANDOM = ("temperature", "top_p", "top_k")
_SAMPLING = (*_CHOOSE_AT_RANDOM, "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# values with which sampling is unmodified
_NEUTRAL = (None, 0, 1)
_TEXT = (
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "cache_position",
    "token_type_ids",
    "past_key_values",
    "cache",
    "cache_params",
    "decoder_input_ids",
    "encoder_outputs",
)
# Arguments with which rows of a batch are generated as each alone: independent of other rows.
_BY_ROW = frozenset(
    {*_LENGTHS, *_SAMPLING, "do_sample", "min_new_tokens", "repetition_penalty"}
    | {"no_repeat_ngram_size", "eos_token_id", "pad_token_id", "bos_token_id", "use_cache"}
)
# Arguments on additional outputs, which change no token.
_NO_SETTINGS = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "streamer",
    "synced_gpus",
    "tokenizer",
    "assistant_tokenizer",
    "num_return_sequences",
    "use_cache",
    "bos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class Generation:
    """How a text is generated.

    Attributes:
        arguments: Arguments of the model's ``generate``, besides the prompt.
        settings: All settings as JSON values: the user's, the defaults, and those of the model's
            own generation configuration.
        max_new_tokens: Maximum number of new tokens; None if `max_length` limits it.
        max_length: Maximum length including the prompt, or None.
        ends: End tokens, if several prompts can be answered in one batch; None if not.
    """

    arguments: Mapping[str, Any]
    settings: Mapping[str, str]
    max_new_tokens: int | None = None
    max_length: int | None = None
    ends: frozenset[int] | None = None

    def cuts(self, ids: Tensor, n_prompt: int, ends: Collection[int]) -> bool:
        """Whether an answer was truncated by the maximum length.

        Args:
            ids: The answer, ``(n_target,)``.
            n_prompt: Length of the prompt.
            ends: The model's end tokens.
        """
        longest = None if self.max_length is None else self.max_length - n_prompt
        most = self.max_new_tokens or longest
        return most is not None and len(ids) >= most and int(ids[-1]) not in ends


def planned_generation(
    model: nn.Module, tokenizer: Any, gen_args: Mapping[str, Any] | None
) -> Generation:
    """The generation settings for a user's arguments.

    Greedy with 25 new tokens, unless the arguments or a ``generation_config`` among them say
    otherwise. Everything else follows the model's own generation configuration.

    Args:
        model: The model.
        tokenizer: Its tokenizer, needed for ``stop_strings``.
        gen_args: Arguments of the model's ``generate``, or None.

    Raises:
        ValueError: If the model cannot generate, the arguments imply several answers or another
            prompt, or an argument would have no effect.
        TypeError: If ``generation_config`` is not a generation configuration.
    """
    _check_model(model)
    given = dict(gen_args or {})
    config = given.pop("generation_config", None)
    if config is not None and not _compat.is_generation_config(config):
        raise TypeError(
            f"`gen_args` has a {type(config).__name__} as `generation_config`: give a "
            "`transformers.GenerationConfig`, or its fields as `gen_args` themselves."
        )
    settings = _compat.generation_settings(config)
    settings |= {name: value for name, value in given.items() if value is not None}
    _check_given(given, settings)
    arguments = given | _defaults(model, settings)
    effective = _compat.defaults_for_sampling()
    effective |= _compat.generation_settings(getattr(model, "generation_config", None))
    effective |= settings | arguments
    effective = {name: value for name, value in effective.items() if value is not None}
    _check_effective(effective)
    if "tokenizer" not in given and ("stop_strings" in effective or "assistant_tokenizer" in given):
        arguments["tokenizer"] = tokenizer
    arguments |= _known(model, _compat.arguments_for_generate(model), settings)
    if config is not None:
        arguments = _as_configuration(config, arguments)
    new, length = (_count(name, effective) for name in _LENGTHS)
    ends = _ends(effective) if _compat.generates_by_row(model) else None
    return Generation(arguments, _settings(effective), new, None if new else length, ends)


def _ends(effective: Mapping[str, Any]) -> frozenset[int] | None:
    if not {name for name, value in effective.items() if value not in _NEUTRAL} <= _BY_ROW:
        return None
    ends = effective.get("eos_token_id")
    return frozenset() if ends is None else frozenset(ends if isinstance(ends, list) else [ends])


def _as_configuration(config: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments merged into a copy of a configuration: transformers accepts only one of both."""
    config = copy.deepcopy(config)
    rest = config.update(**{name: v for name, v in arguments.items() if v is not None})
    # Entries missing in a configuration are filled in from the model's own.
    neutral = _compat.defaults_for_sampling()
    taken_back = {name for name, value in arguments.items() if value is None}
    config.update(**{name: neutral[name] for name in taken_back & set(neutral)})
    return {**rest, "generation_config": config}


def _check_model(model: nn.Module) -> None:
    # A custom one may, which `can_generate` does not know.
    if callable(getattr(model, "generate", None)):
        return
    part = _compat.language_part(model)
    other = "" if part is None else f", or make the attribution over what it wraps (`{part}`)"
    raise ValueError(
        f"{type(model).__name__} has no `generate`: give the `target` to explain, as text or as "
        f"token ids{other}."
    )


def _check_given(given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    for name in _TEXT:
        if given.get(name) is not None:
            raise ValueError(
                f"`gen_args` has `{name}`, which would replace the prompt: the prompt is what "
                "`inp` renders to. Leave it out."
            )
    if settings.get("token_healing"):
        raise ValueError(
            "`token_healing` regenerates the end of the prompt, so that the answer does not "
            "follow this prompt: leave it out."
        )
    if "do_sample" not in settings:
        ignored = [name for name in _SAMPLING if given.get(name) not in _NEUTRAL]
        if ignored:
            raise ValueError(
                f"`{ignored[0]}` would be ignored: without `do_sample` generation is greedy. Give "
                '"do_sample": True as well, or leave it out.'
            )


def _check_effective(effective: Mapping[str, Any]) -> None:
    n = effective.get("num_return_sequences") or 1
    if n > 1:
        raise ValueError(
            f"`num_return_sequences` is {n}, and one answer is explained at a time: give 1, or "
            "generate the answers yourself and give each as `target`."
        )
    least, most = effective.get("min_new_tokens"), effective.get("max_new_tokens")
    if least is not None and most is not None and least > most:
        raise ValueError(
            f"`min_new_tokens` is {least} and `max_new_tokens` {most}: give a larger "
            "`max_new_tokens`."
        )


def _defaults(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults for arguments that were not given; None overrides the model's own setting."""
    found: dict[str, Any] = {}
    if not any(name in settings for name in _LENGTHS):
        found["max_new_tokens"] = _DEFAULT_LENGTH
    if "do_sample" not in settings:
        found["do_sample"] = False
    if not settings.get("do_sample"):
        # These have no effect then, and transformers warns of each.
        found |= {name: None for name in _CHOOSE_AT_RANDOM if name not in settings}
    return _known(model, found, settings)


def _known(
    model: nn.Module, arguments: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Those defaults that were not given by the user and that the model's ``generate`` accepts."""
    names = _parameters(model)
    return {
        name: value
        for name, value in arguments.items()
        # A custom `generate` need not accept None.
        if name not in settings and (names is None or (name in names and value is not None))
    }


def _settings(effective: Mapping[str, Any]) -> dict[str, str]:
    greedy = () if effective.get("do_sample") else _SAMPLING
    return {
        name: _shown(value)
        for name, value in effective.items()
        if name not in _NO_SETTINGS and name not in greedy and value is not None
    }


def _shown(value: object) -> str:
    text = describe(value)
    return text if isinstance(text, str) and text != value else repr(text)


def _count(name: str, effective: Mapping[str, Any]) -> int | None:
    value = effective.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def continued(model: nn.Module, ids: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The ids that a model continues a prompt with, ``(n_target,)``.

    Args:
        model: The model, in evaluation mode and without gradients.
        ids: The prompt, shape ``(1, length)``.
        arguments: Arguments of its ``generate``.

    Raises:
        ValueError: If there are several answers, or they do not begin with the prompt.
    """
    return _written(model, ids, arguments)[0]


def continued_by_row(
    model: nn.Module, ids: Tensor, arguments: Mapping[str, Any], ends: Collection[int]
) -> list[Tensor]:
    """The ids that a model continues each of several prompts with, each ``(n_target,)``.

    Args:
        model: The model, in evaluation mode and without gradients.
        ids: Prompts of one length, ``(n_prompts, length)``.
        arguments: Arguments of its ``generate`` under which rows are independent.
        ends: The end tokens.

    Raises:
        ValueError: As for `continued`.
    """
    answers: list[Tensor] = []
    for row in _written(model, ids, arguments):
        # After its end a row is padded.
        stop = next((i + 1 for i, token in enumerate(row.tolist()) if token in ends), len(row))
        answers.append(row[:stop])
    return answers


def _written(model: nn.Module, ids: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    generate: Callable[..., Any] = cast(Any, model).generate
    names = _parameters(model)
    given = dict(arguments)
    if names is None or "attention_mask" in names:
        given.setdefault("attention_mask", torch.ones_like(ids))
    if names is None or "input_ids" in names:
        output = generate(input_ids=ids, **given)
    else:
        output = generate(ids, **given)
    found: Tensor = getattr(output, "sequences", output)
    n, length = ids.shape
    if len(found) != n:
        raise ValueError(
            f"`generate` gave {len(found)} answers to {n} prompts, and one to each is explained: "
            "give each as `target`."
        )
    if not torch.equal(found[:, :length].to(ids), ids):
        raise ValueError(
            "what `generate` gave does not begin with the prompt's token ids, so the start of "
            "the answer is unknown: generate it yourself and give it as `target`."
        )
    return found[:, length:].long()


def _parameters(model: nn.Module) -> frozenset[str] | None:
    """Names of arguments of the model's ``generate``; None: any."""
    parameters = inspect.signature(cast(Any, model).generate).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)
