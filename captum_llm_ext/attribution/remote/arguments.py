"""Checks arguments of `RemoteGenerationAttribution` before any request."""

from typing import Any, Literal, get_args

from captum.attr._utils.attribution import PerturbationAttribution

from captum_llm_ext.attribution.remote.rung_choice import RungName
from captum_llm_ext.base.arguments import check_counts
from captum_llm_ext.contrast import Contrast
from captum_llm_ext.remote.chat_endpoint import ChatEndpoint
from captum_llm_ext.remote.providers import OnMismatch, adapt_provider
from captum_llm_ext.remote.similarities import SIMILAR

RemoteTarget = Literal["log_prob", "prob", "contrast", "auto", "label", "frequency", "similarity"]


def check_method(attr_method: object, accelerator: object) -> None:
    """Checks that the method is a perturbation method, and that no accelerator is given.

    Raises:
        TypeError: If not.
    """
    if not isinstance(attr_method, PerturbationAttribution):
        raise TypeError(
            f"`attr_method` is a {type(attr_method).__name__}: give one of captum's "
            "perturbation methods, such as "
            "`ShapleyValueSampling(RemoteLLMAttribution.placeholder_model)`."
        )
    if accelerator is not None:
        raise TypeError(
            "`accelerator` has no use here: one process sends the requests, in `max_concurrency` "
            "threads."
        )


def check_settings(
    attr_target: object,
    max_concurrency: object,
    missing: object,
    on_mismatch: object,
    similarity: object,
    n_answers: int | None,
    top_logprobs: int,
) -> None:
    """Checks that settings are in range.

    Raises:
        ValueError: If one is out of range.
    """
    if not isinstance(attr_target, Contrast) and attr_target not in get_args(RemoteTarget):
        raise ValueError(
            f"`attr_target` is {attr_target!r}: an API returns log-probabilities, so give "
            "'log_prob', 'prob' or a contrast; or 'label', 'frequency', 'similarity' or "
            "'auto'. Logits and callables need the model itself: `GenerationAttribution`."
        )
    if max_concurrency is not None and not (
        isinstance(max_concurrency, int) and max_concurrency > 0
    ):
        raise ValueError(f"`max_concurrency` is {max_concurrency!r}: give at least 1.")
    if missing is not None and not (isinstance(missing, int | float) and -9999 < missing <= 0):
        raise ValueError(f"`missing` is {missing!r}: give nats between -9999 and 0.")
    if on_mismatch not in ("error", "warn"):
        raise ValueError(f"`on_mismatch` is {on_mismatch!r}: give 'error' or 'warn'.")
    if not callable(similarity) and similarity not in SIMILAR:
        raise ValueError(
            f"`similarity` is {similarity!r}: give 'lexical', 'f1', 'difflib' or a function of "
            "two texts."
        )
    check_counts(top_logprobs=top_logprobs, n_answers=n_answers)


def check_provider(
    provider: Any,
    tokenizer: Any,
    explained: object,
    max_concurrency: int | None,
    on_mismatch: OnMismatch,
) -> None:
    """Checks that the provider can report what is explained, and that no argument lacks an effect.

    Raises:
        TypeError: If it is not a provider.
        ValueError: If it cannot, or an argument would have no effect.
    """
    takes_ids = False
    if not isinstance(provider, ChatEndpoint):
        takes_ids = adapt_provider(provider, tokenizer, max_concurrency, on_mismatch).takes_ids
        if takes_ids and on_mismatch != "error":
            raise ValueError(
                f"`on_mismatch` would be ignored: {type(provider).__name__} takes ids, which "
                "are read as they are."
            )
    if isinstance(explained, Contrast):
        _check_contrast(explained, provider, takes_ids)


def check_rung(rung: object, attr_target: object, predicate: object, labels: Any) -> None:
    """Checks that a rung can explain `attr_target`, and that its arguments have an effect.

    Raises:
        ValueError: If it cannot, or `predicate` or `labels` would have no effect.
    """
    if predicate is not None and attr_target not in ("frequency", "auto"):
        raise ValueError('`predicate` would be ignored: it belongs to `attr_target="frequency"`.')
    if labels is not None and (attr_target != "label" or len(labels) != 2):
        raise ValueError(
            f"`labels` is {labels!r}: it is a pair, the label that is explained and the one "
            'that it is compared with, of `attr_target="label"`.'
        )
    if rung is None:
        return
    if rung not in get_args(RungName):
        known = ", ".join(map(repr, get_args(RungName)))
        raise ValueError(f"`rung` is {rung!r}: give one of {known}.")
    of = rung if rung in ("label", "frequency", "similarity") else "log_prob"
    if attr_target not in ("auto", of) and not (of == "log_prob" and attr_target == "prob"):
        raise ValueError(f"`rung={rung!r}` reports {of!r}, and `attr_target` is {attr_target!r}.")


def _check_contrast(contrast: Contrast, provider: Any, takes_ids: bool) -> None:
    """Checks before any request that the provider can score the foils of a contrast.

    Raises:
        ValueError: If it cannot.
    """
    if not takes_ids:
        raise ValueError(
            "a contrast needs log-probabilities of foils, which a provider that takes texts does "
            f"not return ({type(provider).__name__}): give one that takes ids, such as "
            "`CompletionsProvider`."
        )
    if contrast.is_found and getattr(provider, "top_logprobs", None) == 0:
        raise ValueError(
            f"{type(provider).__name__} returns log-probabilities of no tokens but those sent, so "
            "no foils can be found: give `top_logprobs=20`, or give them (`Contrast(foils=…)`)."
        )
