"""Translates the library's messages to the options of the command line."""

import re
from collections.abc import Mapping

# Names of methods, and their classes.
METHODS = {
    "ablation": "captum.attr:FeatureAblation",
    "inclusion": "captum_llm_ext.methods:FeatureInclusion",
    "shapley": "captum.attr:ShapleyValues",
    "sampling": "captum.attr:ShapleyValueSampling",
    "kernel": "captum.attr:KernelShap",
    "lime": "captum.attr:Lime",
    "smile": "captum_llm_ext.methods:Smile",
    "partition": "captum_llm_ext.methods:PartitionShap",
    "hierarchical": "captum_llm_ext.methods:HierarchicalAblation",
    "integrated-gradients": "captum.attr:LayerIntegratedGradients",
    "gradient-shap": "captum.attr:LayerGradientShap",
    "gradient-x-activation": "captum.attr:LayerGradientXActivation",
    "saliency": "captum_llm_ext.methods:LayerSaliency",
    "linear": "captum_llm_ext.methods:EquivalentLinearSystem",
    "attention": "captum_llm_ext.attribution.attention:AttentionWeights",
    "rollout": "captum_llm_ext.attribution.attention:AttentionRollout",
    "alti": "captum_llm_ext.attribution.attention:AttentionRollout",
    "projection": "captum_llm_ext.attribution.attention:AttentionRollout",
}
# Arguments whose option has another name, or that correspond to several options.
_OPTIONS: Mapping[str, str] = {
    "do_sample": "--sample",
    "gen_args": "--max-new-tokens and the like",
    "inp": "the prompt",
    "internal_batch_size": "--batch-size",
    "max_length": "--max-new-tokens",
    "num_trials": "repetitions",
    "stop": "a stopping rule",
    "n_answers": "--answers",
    "perturbations_per_eval": "--batch-size",
    "api_url": "--api",
    "rung": "--rung",
    "labels": "--labels",
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            "attr_target baselines cache checkpoint device_map foils layer max_evaluations "
            "max_new_tokens max_requests n_draws n_samples n_steps output_unit roles scheme seed "
            "share surrogate target temperature tokenizer tol top_logprobs top_p unit"
        ).split()
    },
}
_VALUES: Mapping[str, str] = {
    "CorpusBaselines": "--baselines corpus:FILE",
    "ModelBaselines": "--baselines model",
    "token_attr_se": "the numbers after ±",
    # The first of several names of a class.
    **{path.partition(":")[2]: f"--method {name}" for name, path in reversed(METHODS.items())},
}
# Advice without an option is removed from messages, with its connecting words.
_PHRASES = (
    (
        r"a text baseline names one token, as in captum \(say '<pad>'\)\. For replacement texts "
        r"give a list with one entry per feature",
        "--baselines takes delete, model, a token such as <pad>, corpus:FILE or index:FILE",
    ),
    (
        r", lists \(`baselines=\[\[\.\.\.\], \.\.\.\]`\), a model of this process that proposes "
        r"texts \(`ModelBaselines\(\(model, tokenizer\)\)`\)(?=, or delete)",
        "",
    ),
    (r",? or `feature_mask`", ""),
    (r"(?<=`tol`), `stop`(?= and )", ""),
    (r"(?<=`tol`) and `stop` need\b", " needs"),
    (r"(?<=`tol`) or `stop`: give one of them", ": give it"),
    (r" out of (?:a|the) `\w+Input`", " out"),
    (r" \(see `(?:efficiency_gap|noise_floor|foil_tokens)`\)", ""),
    (r"; see `efficiency_gap`\)", ")"),
    (r"[Gg]ive the input (?=`baselines=)", "Give "),
    (r"`baselines=(?=CorpusBaselines|ModelBaselines)", "`"),
    (r", or give the rendered text to `TextSegmentInput`", ""),
    (r", \(start, stop\) pairs, or a callable `[^`]*`", ""),
    (r"A tuple of units, such as `unit=", "Several, such as `unit="),
    (r", a `predicate` that more texts satisfy,", ""),
    # Of APIs: --rung sets what is explained.
    (r"`attr_target=(?=[\"'](?:label|frequency|similarity)[\"']`)", "`rung="),
    (r"`--", "--"),
)
_NAMED = re.compile(r"`(\w+)(?:=(?P<value>[^`]+)|\([^`]*\))?`")
_QUOTES = re.compile(r"[\"'() ]")


def in_options(text: str) -> str:
    """A message of the library with options instead of arguments.

    Args:
        text: The message; names of arguments, classes and values are in backticks.
    """
    for pattern, instead in _PHRASES:
        text = re.sub(pattern, instead, text)
    return _NAMED.sub(_option, text)


def _option(found: re.Match[str]) -> str:
    name, value = found[1], found["value"]
    if name not in _OPTIONS:
        return _VALUES.get(name, found[0])
    if value is None:
        return _OPTIONS[name]
    option_value = "none" if value == "None" else _QUOTES.sub("", value)
    return f"{_OPTIONS[name]} {option_value}"
