"""Names of methods on the command line, and the options of each."""

import argparse
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from captum_llm_ext.cli.command import UsageError, from_0_to_1, positive
from captum_llm_ext.cli.wording import METHODS

if TYPE_CHECKING:
    from torch import nn

    from captum_llm_ext.attribution.attention import GenerationAttentionAttribution
    from captum_llm_ext.attribution.generation import GenerationAttribution
    from captum_llm_ext.attribution.gradient import GenerationGradientAttribution
    from captum_llm_ext.contrast import Contrast

    Attribution = (
        GenerationAttribution | GenerationGradientAttribution | GenerationAttentionAttribution
    )

HELP = """\
methods: what an attribution is, of n features (captum's names of classes mean the same)
  ablation               what is lost without the feature: n + 1 evaluations
  inclusion              what the feature alone gains: n + 1 evaluations
  shapley                Shapley values, exact: 2^n evaluations
  kernel                 Shapley values by regression over random coalitions: the most accurate at
                         its cost (default)
  sampling               Shapley values from random orders of the features
  lime                   LIME's linear model
  smile                  LIME's of how near the whole answer stays to what it was: each coalition
                         is answered anew
  partition              Owen values: Shapley values of orders that keep to the nesting of --unit
  hierarchical           ablation of long prompts: only parts that matter are opened to their words
  integrated-gradients   gradients at --n-steps points from absent to present, which add up
  gradient-shap          gradients at --n-samples random points from random baselines, with errors
  gradient-x-activation  one gradient where all is present, times the activation: a first look
  saliency               the size of that gradient, without a sign
  linear                 what each token adds to a logit where the model is held at what it does
  attention, rollout, alti, projection
                         what a token's place draws on, by attention: one pass, for looking
"""
_ATTENTION = ("attention", "rollout", "alti", "projection")
_GRADIENTS = (
    "integrated-gradients",
    "gradient-shap",
    "gradient-x-activation",
    "saliency",
    "linear",
)
# These use the original text: nothing is absent.
_LOCAL = ("gradient-x-activation", "saliency", "linear", *_ATTENTION)
_INSIDE = (*_GRADIENTS, *_ATTENTION)
_COALITIONS = tuple(name for name in METHODS if name not in _INSIDE)
_SEVERAL = tuple(name for name in METHODS if name not in _LOCAL)
_EACH = ("ablation", "inclusion")
# Options of single methods, and their methods.
_OWNERS = {
    "share": ("hierarchical",),
    "scheme": ("partition",),
    "n_steps": ("integrated-gradients",),
    "layer": _GRADIENTS,
    "n_samples": (*(name for name in _COALITIONS if name not in _EACH), "gradient-shap"),
    "n_draws": (*_EACH, "shapley", "partition", "hierarchical", "integrated-gradients"),
    "surrogate": ("kernel", "shapley", "sampling", "partition"),
    "tol": _COALITIONS,
    "max_evaluations": _COALITIONS,
    "checkpoint": _COALITIONS,
    "baselines": _SEVERAL,
    "batch_size": _SEVERAL,
    "attr_target": tuple(name for name in METHODS if name not in _ATTENTION),
}
# Options that do not apply to whole answers, or have no effect on them.
_NOT_OF_ANSWERS = {
    "attr_target": (None, "log_prob"),
    "output_unit": (None, "none"),
    "checkpoint": (None,),
}
_INSTEAD = {
    ("n_samples", "integrated-gradients"): "it has --n-steps",
    ("n_draws", "gradient-shap"): "each of its --n-samples is a draw",
    ("baselines", "gradient-x-activation"): "it compares with the activation 0, whatever the text",
    **{("baselines", name): "it looks at the text as it is" for name in _LOCAL[1:]},
    **{("batch_size", name): "it has one row to run" for name in _LOCAL},
    **{("attr_target", name): "attention knows of no value" for name in _ATTENTION},
}


def add_method(group: Any, *, more: str = "see below") -> None:
    """Adds the option that names the method.

    Args:
        group: A parser or a group of its options.
        more: Reference to more information.
    """
    group.add_argument(
        "--method",
        type=method_name,
        choices=METHODS,
        metavar="METHOD",
        default="kernel",
        help=f"{', '.join(METHODS)}: {more} (default: kernel)",
    )


def add_settings(group: Any) -> None:
    """Adds the options of particular kinds of methods."""
    add = group.add_argument
    add(
        "--share",
        type=from_0_to_1,
        metavar="X",
        help="of hierarchical: a part is split if its absence changes a token's value by this "
        "share of the largest change, from 0 to 1 (default: 0.05)",
    )
    add(
        "--scheme",
        choices=("orders", "splits"),
        help="of partition: random orders (default), or the group that adds most is split first, "
        "for budgets below an evaluation per feature",
    )
    add(
        "--n-steps",
        type=positive,
        metavar="N",
        help="of integrated-gradients: points between absent and present (default: 50)",
    )
    add(
        "--layer",
        metavar="NAME",
        help="of gradients: the module of the model whose activations are attributed, such as "
        "model.layers.0 (default: the embeddings of tokens)",
    )


def method_name(text: str) -> str:
    """A key of `METHODS`; captum's class names are accepted too."""
    classes = {path.partition(":")[2]: name for name, path in reversed(METHODS.items())}
    return classes.get(text, text)


def is_search(name: str) -> bool:
    """Whether the method needs nested units."""
    return name == "hierarchical"


def is_of_parts(name: str) -> bool:
    """Whether a method attributes the whole answer to the largest parts of the prompt as well."""
    return name in _COALITIONS and name not in ("lime", "smile")


def is_of_gradients(name: str) -> bool:
    """Whether the method uses gradients."""
    return name in _GRADIENTS


def is_white_box(name: str) -> bool:
    """Whether the method uses gradients or attention, and therefore a single process."""
    return name in _INSIDE


def is_of_attention(name: str) -> bool:
    """Whether the method uses attention."""
    return name in _ATTENTION


def is_of_answers(name: str) -> bool:
    """Whether the method compares whole answers, without values per token."""
    return name == "smile"


def zero_baseline_note(name: str) -> str | None:
    """A note on the default baseline of gradients, the zero vector; None for other methods."""
    if not is_of_gradients(name) or name in _LOCAL:
        return None
    return (
        "the zero vector stands where a word is absent, which no text of the model holds: "
        "--baselines corpus:FILE puts the embeddings of other text of the same kind there."
    )


def check_method(arguments: argparse.Namespace) -> None:
    """Checks that no option is given that has no effect on the method.

    Raises:
        UsageError: If there is one.
    """
    name = arguments.method
    if is_of_answers(name):
        for setting, nothing in _NOT_OF_ANSWERS.items():
            if getattr(arguments, setting, None) not in nothing:
                option = f"--{setting.replace('_', '-')}"
                raise UsageError(
                    f"{option} would be ignored by --method {name}, which compares whole answers."
                )
    for setting, owners in _OWNERS.items():
        if getattr(arguments, setting, None) is None or name in owners:
            continue
        option = f"--{setting.replace('_', '-')}"
        instead = _INSTEAD.get((setting, name))
        if instead is not None:
            raise UsageError(f"{option} would be ignored by --method {name}: {instead}.")
        listed = ", ".join(owners)
        if owners == _COALITIONS:
            listed = "methods other than gradients and attention, which evaluate no coalitions"
            raise UsageError(f"{option} would be ignored by --method {name}: it is of {listed}.")
        raise UsageError(f"{option} would be ignored: it belongs to --method {listed}.")


def method(name: str, model: "nn.Module", *, layer: str | None = None, **settings: Any) -> Any:
    """The attribution method over a model; settings that are None keep their defaults.

    Raises:
        ValueError: If the model has no such layer.
    """
    module, _, cls = METHODS[name].partition(":")
    kind = getattr(import_module(module), cls)
    if name in ("alti", "projection"):
        return kind(model, name)
    if is_of_attention(name):
        return kind(model)
    if is_of_gradients(name):
        return kind(model, None if layer is None else _module(model, layer))
    given = {key: value for key, value in settings.items() if value is not None}
    return kind(model, **given)


def attribution(
    attributes: Any,
    tokenizer: Any,
    attr_target: "str | Contrast" = "log_prob",
    accelerator: Any = None,
    surrogate: str | None = None,
) -> "Attribution":
    """The attribution object for a method.

    Args:
        attributes: The result of `method`.
        tokenizer: The model's tokenizer.
        attr_target: The value that is explained.
        accelerator: The processes; not for gradients and attention.
        surrogate: As for `GenerationAttribution`; not for gradients and attention.
    """
    from captum_llm_ext.attribution.attention import (
        AttentionRollout,
        AttentionWeights,
        GenerationAttentionAttribution,
    )
    from captum_llm_ext.attribution.generation import GenerationAttribution
    from captum_llm_ext.attribution.gradient import GenerationGradientAttribution

    if isinstance(attributes, AttentionRollout | AttentionWeights):
        return GenerationAttentionAttribution(attributes, tokenizer)
    if type(attributes) in GenerationGradientAttribution.SUPPORTED_METHODS:
        return GenerationGradientAttribution(attributes, tokenizer, attr_target=attr_target)
    return GenerationAttribution(
        attributes, tokenizer, attr_target, accelerator=accelerator, surrogate=surrogate
    )


def _module(model: "nn.Module", layer: str) -> "nn.Module":
    modules = dict(model.named_modules())
    if layer in modules:
        return modules[layer]
    close = get_close_matches(layer, modules, n=3, cutoff=0.5)
    listed = ", ".join(close or [name for name in modules if name][:5])
    raise ValueError(f"--layer {layer}: the model has no such module; it has {listed}, …")
