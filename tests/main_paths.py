"""What users do with the package, as functions that return numbers: for runs under other settings.

What stands around a call (a default of torch's, a mode, another thread) must not change them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    LimeBase,
    Occlusion,
    ShapleyValues,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
)
from remote_server import Server

from captum_llm_ext import (
    ChatInput,
    CompletionsProvider,
    CorpusBaselines,
    FeatureInclusion,
    GenerationAttribution,
    GenerationAttributionResult,
    GenerationGradientAttribution,
    HierarchicalAblation,
    PartitionShap,
    RemoteGenerationAttribution,
    TextSegmentInput,
    attribute_dataset,
    compare_baselines,
    measure_faithfulness,
)
from captum_llm_ext.model import Scorer, TokenRow

PROMPT = "Dave lives in Palm Coast, FL."
TARGET = " golf and"
TEXTS = [
    "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include golf and chess.",
    "Ann lives in Austin, TX and is a nurse! Her interests include tennis, music and cooking.",
    "Bob lives in Salt Lake City, UT and is a judge. His interests include golf and music.",
]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


class Drawn(ShapleyValueSampling):
    """One that the package does not know: it draws from torch's global generator."""


class Fitted(LimeBase):
    """The same of a fit for each target."""

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(
            forward_func,
            Line(),
            lambda original, perturbed, interpretable, **_: torch.ones(1),
            lambda original, **_: torch.bernoulli(torch.full(original.shape, 0.5)),
            perturb_interpretable_space=True,
            from_interp_rep_transform=lambda interpretable, *_, **__: interpretable,
            to_interp_rep_transform=None,
        )


class Line:
    """A ridge."""

    def fit(self, data: Any) -> dict[str, float]:
        x, y, _ = next(iter(data))
        x, y = x.double(), y.double().reshape(-1)
        gram = x.T @ x + 0.1 * torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
        self._weights = torch.linalg.solve(gram, x.T @ y)
        return {}

    def representation(self) -> torch.Tensor:
        return self._weights[None]


def _drawn(result: GenerationAttributionResult) -> None:
    result.plot_token_attr()
    result.plot_seq_attr()
    result.plot_text(1)
    result.plot_flow(1)
    plt.close("all")


def _numbers(result: Any) -> list[Any]:
    told = [result.token_attr, result.seq_attr, result.full_values, result.empty_values]
    told += [result.token_attr_se, result.output_attr, result.masks, result.values]
    return [one for one in told if one is not None]


def paths(model: Any, tokenizer: Any, folder: Path) -> dict[str, Callable[[], list[Any]]]:
    """Functions by name, each of which makes all that it needs anew.

    Args:
        model: In float32.
        tokenizer: Its tokenizer.
        folder: Where files may be written.
    """

    def segments(baselines: Any = None, unit: Any = "word") -> TextSegmentInput:
        return TextSegmentInput(PROMPT, tokenizer, unit, baselines=baselines)

    def corpus(**options: Any) -> CorpusBaselines:
        return CorpusBaselines(TEXTS, seed=0, **{"min_candidates": 0, **options})

    def result(method: Any, baselines: Any = None, target: Any = TARGET, **options: Any) -> Any:
        unit = options.pop("unit", "word")
        attribution = GenerationAttribution(
            method(model) if isinstance(method, type) else method,
            tokenizer,
            options.pop("attr_target", "log_prob"),
        )
        return attribution.attribute(segments(baselines, unit), target, **options)

    def attributed(*arguments: Any, **options: Any) -> Callable[[], list[Any]]:
        return lambda: _numbers(result(*arguments, **options))

    def corpus_of(method: Any, how: dict[str, Any], **options: Any) -> Callable[[], list[Any]]:
        return lambda: _numbers(result(method, corpus(**how), **options))

    def gradients(method: Any, make: Callable[[], Any], **options: Any) -> Callable[[], list[Any]]:
        def found() -> list[Any]:
            attribution = GenerationGradientAttribution(method(), tokenizer)
            return _numbers(attribution.attribute(make(), TARGET, **options))

        return found

    tokens = TextTokenInput(PROMPT, tokenizer, skip_tokens=[1])

    def captum_inputs() -> list[Any]:
        attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
        template = TextTemplateInput("{} lives in {}.", ["Dave", "Palm Coast"], ["Ann", "Austin"])
        mask = torch.tensor([[0, 0, 1]], device="cpu")
        three = TextTemplateInput("{} lives in {}, {}.", ["Dave", "Palm Coast", "FL"])
        return [
            *_numbers(attribution.attribute(template, TARGET)),
            *_numbers(attribution.attribute(tokens, TARGET)),
            *_numbers(attribution.attribute(three, TARGET, feature_mask=mask)),
        ]

    def chat() -> list[Any]:
        messages = [
            {"role": "system", "content": "Be brief. Be kind."},
            {"role": "user", "content": "Who plays golf?"},
        ]
        before, tokenizer.chat_template = tokenizer.chat_template, TEMPLATE
        try:
            inp = ChatInput(messages, tokenizer, "sentence", baselines="delete")
            attribution = GenerationAttribution(ShapleyValues(model), tokenizer)
            return _numbers(attribution.attribute(inp, TARGET))
        finally:
            tokenizer.chat_template = before

    def generated() -> list[Any]:
        sampled = {"max_new_tokens": 5, "do_sample": True}
        found = [
            result(FeatureAblation, target=None, gen_args=arguments, seed=3)
            for arguments in (None, sampled)
        ]
        return [number for one in found for number in (one.target, *_numbers(one))]

    def game() -> list[Any]:
        attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
        players = attribution.to_game(segments(corpus()), TARGET, n_draws=2)
        masks = np.arange(24)[:, None] >> np.arange(players.n_players) & 1
        return [players(masks.astype(bool)), players.draw_values(masks[:3].astype(bool))]

    def faithfulness() -> list[Any]:
        attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
        explained = attribution.attribute(segments(), TARGET)
        report = measure_faithfulness(
            attribution, segments(corpus()), explained, n_draws=2, n_coalitions=24, n_orders=3
        )
        report.plot()
        plt.close("all")
        return [str(report), report.curves[report.names[0]]["removal"].values.value]

    def comparison() -> list[Any]:
        attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
        both = {"deletion": None, "corpus": corpus()}
        found = compare_baselines(attribution, segments(), both, target=TARGET, n_draws=2)
        found.plot()
        plt.close("all")
        return [str(found), *_numbers(found.results["corpus"])]

    def again() -> list[Any]:
        shap = result(KernelShap, n_samples=64)
        lime = result(Lime, n_samples=48, output_unit=None)
        span = shap.attribute_span(1, 3)
        return [
            *_numbers(shap.refit(ShapleyValueSampling(model))),
            *_numbers(shap.refit(Lime)),
            *_numbers(shap.refit(attr_target="prob")),
            span.values,
            span.standard_errors,
            lime.contextcite().values,
            shap.additivity,
            str(shap.redundant_pairs(2)),
            shap.below_noise,
            str(shap.top(2)),
        ]

    def redundant() -> list[Any]:
        found = result(ShapleyValues, unit=[(0, 4), (4, 13), (13, 28), (28, 29)])
        return [found.additivity, str(found.redundant_pairs(2)), *_numbers(found.refit(KernelShap))]

    def shown() -> list[Any]:
        found = result(ShapleyValueSampling, n_samples=12)
        _drawn(found)
        found.plot_convergence()
        plt.close("all")
        page, table = found.to_html(), found.table()
        return [table, len(page), found.to_json(), found.to_dataframe().to_numpy()[:, -2:]]

    def kept() -> list[Any]:
        path = folder / "kept.safetensors"
        result(KernelShap, n_samples=48, output_unit=None).save(path)
        loaded = GenerationAttributionResult.load(path)
        index = folder / "corpus.index"
        corpus().save(index)
        again = result(FeatureAblation, CorpusBaselines.load(index), n_draws=2)
        checkpoint = folder / "run.safetensors"
        twice = [result(FeatureAblation, checkpoint=checkpoint) for _ in range(2)]
        for one in (path, index, checkpoint):
            one.unlink()
        return [*_numbers(loaded), *_numbers(loaded.refit()), *_numbers(again), *_numbers(twice[1])]

    def dataset() -> list[Any]:
        out = folder / "results"
        attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
        records = [{"prompt": PROMPT, "target": TARGET}, {"prompt": PROMPT[:14]}]
        reports = [
            attribute_dataset(records, attribution, out, baselines=corpus(), n_draws=2)
            for _ in range(2)
        ]
        files = sorted(out.glob("*.safetensors"))
        found = [GenerationAttributionResult.load(path) for path in files]
        for path in out.iterdir():
            path.unlink()
        return [str(reports[1]), *(number for one in found for number in _numbers(one))]

    def remote() -> list[Any]:
        with Server(model, tokenizer) as server:
            provider = CompletionsProvider(server.url, "tiny")
            placeholder = RemoteGenerationAttribution.placeholder_model
            attribution = RemoteGenerationAttribution(KernelShap(placeholder), tokenizer, provider)
            return _numbers(attribution.attribute(segments(), TARGET, n_samples=64))

    def ways_of_reading() -> list[Any]:
        ids, target = tokenizer.encode(PROMPT), tokenizer.encode(TARGET, add_special_tokens=False)
        prompts = [ids[:i] + ids[i + 1 :] for i in range(1, len(ids))]
        rows = [
            TokenRow((*own, *target[:-1]), range(len(own) - 1, len(own) - 1 + len(target)))
            for own in prompts
        ]
        wanted = torch.tensor(target, device="cpu")
        ways = ("off", "copy", "share", "pack")
        return [Scorer(model, reuse=way, overhead=0).values(rows, wanted) for way in ways]

    layer = model.get_input_embeddings()
    exact = [(0, 4), (4, 13), (13, 28), (28, 29)]
    return {
        "leave-one-out": attributed(FeatureAblation),
        "leave-one-out of probabilities": attributed(FeatureAblation, attr_target="prob"),
        "leave-one-out of logits": attributed(FeatureAblation, attr_target="logit"),
        "leave-one-out of a callable": attributed(FeatureAblation, attr_target=_margin),
        "exact": attributed(ShapleyValues, unit=exact, output_unit=None),
        "orders": attributed(ShapleyValueSampling, n_samples=6),
        "orders to a tolerance": attributed(
            ShapleyValueSampling, n_samples=4, tol=0.5, max_evaluations=300
        ),
        "pairs": attributed(KernelShap, n_samples=64),
        "trials of pairs": corpus_of(KernelShap, {}, n_samples=64, num_trials=2),
        "lime": attributed(Lime, n_samples=64),
        "lasso": attributed(Lime, n_samples=64, output_unit=None),
        "Owen values": attributed(PartitionShap, unit=("sentence", "word"), n_samples=120),
        "inclusion": attributed(FeatureInclusion),
        "hierarchical": attributed(HierarchicalAblation, unit=("sentence", "word"), n_samples=40),
        "driven orders": attributed(Drawn, n_samples=3),
        "driven windows": lambda: _numbers(
            result(Occlusion, sliding_window_shapes=(2,), perturbations_per_eval=4)
        ),
        "driven fits": lambda: _numbers(result(Fitted(model), n_samples=20)),
        "sentences": attributed(KernelShap, n_samples=64, output_unit="word"),
        "a corpus": corpus_of(FeatureAblation, {}, n_draws=2),
        "a corpus and lengths": corpus_of(ShapleyValueSampling, {"match": "length"}, n_samples=4),
        "a corpus and tokens": corpus_of(FeatureAblation, {"same_n_tokens": True}, n_draws=2),
        "a corpus and the model": corpus_of(FeatureAblation, {"match": "model"}, n_draws=2),
        "integrated gradients": gradients(
            lambda: LayerIntegratedGradients(model, layer), segments, n_steps=120
        ),
        "gradient x activation": gradients(lambda: LayerGradientXActivation(model, None), segments),
        "expected gradients": gradients(
            lambda: LayerGradientShap(model, None),
            lambda: segments(corpus()),
            n_samples=4,
            stdevs=0.01,
        ),
        "gradients further up": gradients(
            lambda: LayerIntegratedGradients(model, model.model.layers[0]), segments, n_steps=8
        ),
        "captum's inputs": captum_inputs,
        "chat": chat,
        "generated": generated,
        "game": game,
        "faithfulness": faithfulness,
        "comparison": comparison,
        "solved again": again,
        "redundancy": redundant,
        "shown": shown,
        "kept": kept,
        "data set": dataset,
        "remote": remote,
        "ways of reading": ways_of_reading,
    }


def _margin(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    said = logits.gather(2, target.expand(len(logits), -1)[..., None])[..., 0]
    return said - logits.mean(2)


def same(found: list[Any], expected: list[Any]) -> None:
    """Fails unless both hold the same: plans exactly, numbers up to a last digit of float32."""
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        if isinstance(own, torch.Tensor):
            assert own.device == other.device, (own.device, other.device)
            assert own.dtype == other.dtype, (own.dtype, other.dtype)
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5, equal_nan=True)
        elif isinstance(own, np.ndarray) and own.dtype != object:
            np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-5)
        elif isinstance(own, np.ndarray):
            assert own.tolist() == other.tolist()
        else:
            assert own == other
