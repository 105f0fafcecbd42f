"""With the output held fixed the numbers are captum's, on every input that captum has."""

import argparse
import inspect
from functools import partial

import pytest
import torch
from captum._utils.models.linear_model import SkLearnLasso
from captum.attr import (
    FeatureAblation,
    ImageMaskInput,
    KernelShap,
    Lime,
    LLMAttribution,
    LLMAttributionResult,
    ProductBaselines,
    ShapleyValues,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
)
from PIL import Image
from transformers import BertConfig, BertLMHeadModel, XLNetConfig, XLNetLMHeadModel

from captum_llm_ext import (
    FeatureInclusion,
    GenerationAttribution,
    HierarchicalAblation,
    PartitionShap,
    TextSegmentInput,
    attribute_dataset,
)

# Absent is deleted: what comes of it is known.
attribute_dataset = partial(attribute_dataset, baselines="delete")

TARGET = " golf and chess."
RIGHT = {"use_cached_outputs": False}  # captum's default is wrong: see test_upstream.py


def _both(model, tokenizer, method, inp, *, attr_target="log_prob", text=TARGET, **arguments):
    target = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    captums = LLMAttribution(method(model), tokenizer, attr_target=attr_target)
    ours = GenerationAttribution(method(model), tokenizer, attr_target=attr_target)
    return (
        captums.attribute(inp, target, **RIGHT, **arguments),
        ours.attribute(inp, target, output_unit=None, **arguments),
    )


def _assert_same(captums: LLMAttributionResult, ours: LLMAttributionResult) -> None:
    assert ours.input_tokens == captums.input_tokens
    assert ours.output_tokens == captums.output_tokens
    assert ours.token_attr.dtype == captums.token_attr.dtype
    assert ours.token_attr.device == captums.token_attr.device
    torch.testing.assert_close(ours.token_attr, captums.token_attr, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.seq_attr, captums.seq_attr, atol=3e-4, rtol=1e-4)


def _template(**changes):
    settings = {
        "template": "{} lives in {}, {} and is a {}. {} interests include",
        "values": ["Dave", "Palm Coast", "FL", "lawyer", "His"],
        "baselines": ["Ann", "Austin", "TX", "nurse", "Her"],
    }
    return TextTemplateInput(**settings | changes)


def _joined(*values):
    return " ".join(value for value in values if value)


INPUTS = {
    "tokens": lambda tok: TextTokenInput("Dave lives in", tok, baselines=3),
    "tokens, BOS skipped": lambda tok: TextTokenInput("Dave lives in", tok, skip_tokens=[1]),
    "template": lambda tok: _template(),
    "template, deletion": lambda tok: _template(baselines=None),
    "template, named": lambda tok: TextTemplateInput(
        "{name} lives in {city}.", {"name": "Dave", "city": "Austin"}, {"name": "Ann", "city": "X"}
    ),
    "template function": lambda tok: _template(template=_joined),
    "template, grouped": lambda tok: _template(mask=[0, 1, 1, 2, 0]),
    "template, groups by name": lambda tok: _template(mask=["b", "a", "a", "c", "b"]),
}


@pytest.mark.parametrize("method", [FeatureAblation, ShapleyValues])
@pytest.mark.parametrize("name", INPUTS)
def test_numbers_equal_captum(model, tokenizer, method, name):
    inp = INPUTS[name](tokenizer)
    target = TARGET
    if method is ShapleyValues:
        # Captum runs n·n! evaluations, each one forward per target token.
        target = " go"
        if inp.n_itp_features > 4:
            pytest.skip("minutes in captum")
    _assert_same(*_both(model, tokenizer, method, inp, text=target))


def test_probabilities_equal_captum(model, tokenizer):
    captums, ours = _both(model, tokenizer, FeatureAblation, _template(), attr_target="prob")
    torch.testing.assert_close(ours.token_attr, captums.token_attr, atol=1e-5, rtol=1e-4)
    # The joint probability is far below single precision's absolute steps: compare relatively.
    torch.testing.assert_close(ours.seq_attr, captums.seq_attr, atol=0.0, rtol=1e-2)


class LassoOfTheirOwn(Lime):
    """A subclass is run through its own ``attribute``, and draws what captum draws."""


@pytest.mark.parametrize("inp", ["template", "template, grouped"])
def test_lasso_of_the_whole_answer_equals_captum(model, tokenizer, inp):
    pytest.importorskip("sklearn")
    inp = INPUTS[inp](tokenizer)
    method = LassoOfTheirOwn(model, interpretable_model=SkLearnLasso(alpha=0.02))
    target, arguments = torch.tensor([50, 60, 70, 80]), {"n_samples": 30}
    torch.manual_seed(5)
    truth = LLMAttribution(method, tokenizer).attribute(inp, target, **RIGHT, **arguments)
    ours = GenerationAttribution(method, tokenizer)
    found = ours.attribute(inp, target, output_unit=None, seed=5, **arguments)
    torch.testing.assert_close(found.seq_attr, truth.seq_attr, atol=1e-4, rtol=1e-4)
    assert truth.token_attr is None
    assert (found.token_attr.sum(0) - truth.seq_attr).abs().max() > 0.01


@pytest.mark.parametrize("alpha", [0.002, 0.02, 0.3])
def test_lasso_of_package_coalitions_equals_captum(model, tokenizer, alpha):
    pytest.importorskip("sklearn")
    method = Lime(model, interpretable_model=SkLearnLasso(alpha=alpha))
    attribution = GenerationAttribution(method, tokenizer)
    arguments = {"n_samples": 40, "output_unit": None}
    result = attribution.attribute(_template(), torch.tensor([50, 60, 70, 80]), **arguments)
    masks, values = result.masks[result.design.n_anchors :].float(), result.values.sum(1)
    coalitions = dict(zip(map(tuple, result.masks.tolist()), values.tolist(), strict=True))

    def ours(_inputs, **_):
        yield from masks[:, None]

    captums = Lime(
        lambda mask: coalitions[tuple((mask[0] > 0).tolist())],
        interpretable_model=SkLearnLasso(alpha=alpha),
        perturb_func=ours,
    )
    truth = captums.attribute(torch.ones(1, masks.shape[1]), n_samples=len(masks))[0]
    torch.testing.assert_close(result.seq_attr, truth, atol=1e-4, rtol=1e-3)  # sklearn's tolerance
    again = result.refit().seq_attr  # what a file holds is solved alike
    torch.testing.assert_close(again, result.seq_attr, atol=1e-6, rtol=1e-6)


def test_joint_probability_with_fixed_output_equals_captum(model, tokenizer):
    method = ShapleyValues(model)
    captums = LLMAttribution(method, tokenizer, attr_target="prob")
    ours = GenerationAttribution(method, tokenizer, attr_target="prob")
    inp = _template(mask=[0, 1, 1, 2, 0])
    truth = captums.attribute(inp, torch.tensor([50, 60]), **RIGHT).seq_attr
    found = ours.attribute(inp, torch.tensor([50, 60])).seq_attr  # output tokens are features
    torch.testing.assert_close(found, truth, atol=0.0, rtol=1e-3)


def test_feature_mask_groups_as_in_captum(model, tokenizer):
    mask = torch.tensor([[0, 1, 1, 2, 0]])
    both = _both(model, tokenizer, FeatureAblation, _template(), feature_mask=mask)
    _assert_same(*both)
    assert both[1].token_attr[0, 0] == both[1].token_attr[0, 4]


def test_product_baselines_use_the_given_generator(model, tokenizer):
    choices = [["Ann", "Bob"], ["Austin", "Dallas"], ["TX"], ["nurse", "pilot"], ["Her"]]
    inp = _template(baselines=ProductBaselines(choices))
    ours = GenerationAttribution(FeatureAblation(model), tokenizer)
    one = ours.attribute(inp, TARGET, output_unit=None, n_draws=4)
    again = ours.attribute(inp, TARGET, output_unit=None, n_draws=4)
    assert torch.equal(one.token_attr, again.token_attr)
    possible = LLMAttribution(FeatureAblation(model), tokenizer)
    target = one.target
    for column, alternatives in enumerate(choices):
        found = []
        for text in alternatives:
            fixed = ["Ann", "Austin", "TX", "nurse", "Her"]
            fixed[column] = text
            found.append(possible.attribute(_template(baselines=fixed), target, **RIGHT).token_attr)
        low = torch.stack(found).amin(0)[:, column] - 1e-4
        high = torch.stack(found).amax(0)[:, column] + 1e-4
        mean = one.token_attr[:, column]
        assert ((low <= mean) & (mean <= high)).all()


class SeeingModel(torch.nn.Module):
    """A language model whose first layer also sees an image."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.look = torch.nn.Linear(12, inner.config.hidden_size)
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask=None, pixel_values=None, token_type_ids=None, **_):
        assert token_type_ids is None or token_type_ids.shape == input_ids.shape
        seen = self.look(pixel_values.flatten(1))[:, None]
        embedded = self.inner.get_input_embeddings()(input_ids) + seen
        return self.inner(inputs_embeds=embedded, use_cache=False)


@pytest.mark.parametrize("types", [False, True])
def test_inputs_that_render_to_a_mapping(model, tokenizer, types):
    torch.manual_seed(1)
    seeing = SeeingModel(model).eval()
    image = Image.new("RGB", (2, 2), (10, 200, 90))

    def processor(image):
        import numpy as np

        pixels = torch.tensor(np.array(image)).float().permute(2, 0, 1)[None] / 100
        ids = torch.tensor([tokenizer.encode("Dave lives in")])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        return given | ({"token_type_ids": torch.zeros_like(ids)} if types else {})

    mask = torch.tensor([[0, 1], [2, 2]])
    inp = ImageMaskInput(image, mask=mask, processor_fn=processor)
    target = torch.tensor(tokenizer.encode(TARGET, add_special_tokens=False))
    ours = GenerationAttribution(FeatureAblation(seeing), tokenizer)
    found = ours.attribute(inp, target)
    plain = ImageMaskInput(
        image,
        mask=mask,
        processor_fn=lambda i: {k: v for k, v in processor(i).items() if k != "token_type_ids"},
    )
    truth = LLMAttribution(FeatureAblation(seeing), tokenizer).attribute(plain, target, **RIGHT)
    torch.testing.assert_close(found.token_attr, truth.token_attr, atol=1e-4, rtol=1e-4)
    assert found.plot_image_heatmap() is not None


class SeesAhead(torch.nn.Module):
    """As small as the models of captum's own tests: no config, and attention both ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = torch.nn.Embedding(400, 8)
        self.layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.5)
        self.head = torch.nn.Linear(8, 400)

    def forward(self, input_ids, **_):
        return argparse.Namespace(logits=self.head(self.layer(self.embedding(input_ids))))


def _encoder():
    """`AutoModelForCausalLM` gives it, with a line in the log that it should be a decoder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.5,
        pad_token_id=0,
    )
    return BertLMHeadModel(config)


def _of_permutations():
    torch.manual_seed(0)
    return XLNetLMHeadModel(
        XLNetConfig(
            vocab_size=400, d_model=32, n_layer=2, n_head=4, d_inner=64, initializer_range=0.5
        )
    )


@pytest.mark.parametrize("name", ["tokens, BOS skipped", "template, deletion"])
@pytest.mark.parametrize("make", [SeesAhead, _encoder, _of_permutations])
def test_module_that_sees_ahead_is_scored_step_by_step(tokenizer, make, name):
    both = _both(make().eval(), tokenizer, FeatureAblation, INPUTS[name](tokenizer))
    _assert_same(*both)


def test_inspect_forward_receives_captums_arguments(model, tokenizer):
    def seen_by(attribution, **arguments):
        seen = {}
        attribution.attribute(
            _template(),
            torch.tensor([50, 60]),
            _inspect_forward=lambda prompt, response, p: seen.update({(prompt, response): p}),
            **arguments,
        )
        return seen

    truth = seen_by(LLMAttribution(FeatureAblation(model), tokenizer), **RIGHT)
    ours = GenerationAttribution(FeatureAblation(model), tokenizer)
    found = seen_by(ours, output_unit=None)
    assert truth.keys() <= found.keys()
    for key, probabilities in truth.items():
        assert found[key] == pytest.approx(probabilities, rel=1e-3)


def test_positional_order_equals_captum(model, tokenizer):
    ours = GenerationAttribution(FeatureAblation(model), tokenizer)
    inp = TextTokenInput("Dave lives", tokenizer)
    seen = []
    result = ours.attribute(
        inp, None, 2, {"max_new_tokens": 2}, True, lambda *a: seen.append(a), False
    )
    assert isinstance(result, LLMAttributionResult)
    assert len(result.target) == 2
    assert seen


def test_skip_tokens_warns_of_deprecation(model, tokenizer):
    ours = GenerationAttribution(FeatureAblation(model), tokenizer)
    inp = TextTokenInput("Dave lives", tokenizer)
    with pytest.warns(DeprecationWarning, match="skip_tokens"):
        result = ours.attribute(inp, torch.tensor([1, 50, 60, 2]), skip_tokens=["<s>", "</s>"])
    assert result.target.tolist() == [50, 60]


def test_skip_tokens_accepts_single_values_and_any_sequence(model, tokenizer):
    ours = GenerationAttribution(FeatureAblation(model), tokenizer)
    inp = TextTokenInput("Dave lives", tokenizer)
    for skipped in ([1, 2], torch.tensor([1, 2]), {"<s>", "</s>"}, ("<s>", 2)):
        with pytest.warns(DeprecationWarning, match="skip_tokens"):
            result = ours.attribute(inp, torch.tensor([1, 50, 60, 2]), skip_tokens=skipped)
        assert result.target.tolist() == [50, 60]
    for skipped in ("</s>", 2, torch.tensor(2)):
        with pytest.warns(DeprecationWarning, match="skip_tokens"):
            result = ours.attribute(inp, torch.tensor([1, 50, 60, 2]), skip_tokens=skipped)
        assert result.target.tolist() == [1, 50, 60]
    assert ours.attribute(inp, [50, 2], skip_tokens=[]).target.tolist() == [50, 2]


def _defaults(method):
    parameters = inspect.signature(method.attribute).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@pytest.mark.parametrize(
    "method",
    [
        FeatureAblation,
        FeatureInclusion,
        HierarchicalAblation,
        KernelShap,
        Lime,
        PartitionShap,
        ShapleyValueSampling,
        ShapleyValues,
    ],
)
def test_arguments_equal_to_defaults_change_nothing(model, tokenizer, method, tmp_path):
    ours = GenerationAttribution(method(model), tokenizer)
    inp = TextSegmentInput(
        "Dave lives. Go.", tokenizer, unit=("sentence", "word"), baselines="delete"
    )
    given = _defaults(method)
    assert {"baselines", "additional_forward_args", "perturbations_per_eval"} <= set(given)
    of_captum = {"n_samples": given["n_samples"]} if given.get("n_samples") else {}
    truth = ours.attribute(inp, [50, 60], perturbations_per_eval=1, **of_captum)
    del given["target"]  # it has another meaning here
    assert torch.equal(ours.attribute(inp, [50, 60], **given).full_attr, truth.full_attr)
    for zero in (0, 0.0, torch.zeros(1, 3), (torch.zeros(1, 3),)):
        found = ours.attribute(inp, [50, 60], **given | {"baselines": zero, "use_futures": None})
        assert torch.equal(found.full_attr, truth.full_attr)
    records = [{"id": "a", "prompt": "Dave lives. Go.", "target": " golf"}]
    units = ("sentence", "word")
    options = {"unit": units, "additional_forward_args": None, "use_futures": None}
    assert attribute_dataset(records, ours, tmp_path / "all", **options).n_written == 1
    with pytest.raises(TypeError, match=r"'forward_arg'.* which `attribute` lacks"):
        attribute_dataset(records, ours, tmp_path / "none", forward_arg=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"return_input_shape": False}, "would be ignored: coalitions or points of KernelShap"),
        ({"baselines": 3}, "What stands for absent features is set by the input"),
        ({"baselines": torch.tensor([[0, 1, 0]])}, "is set by the input"),
        ({"additional_forward_args": (1,)}, "is set by the input"),
        ({"use_futures": True}, "'use_futures', which KernelShap does not take: leave it out"),
        ({"n_sample": None}, "did you mean 'n_samples'"),
        ({"inputs": None}, "'inputs', which would be ignored"),
    ],
)
def test_unsupported_argument_values_are_refused(model, tokenizer, given, message):
    ours = GenerationAttribution(KernelShap(model), tokenizer)
    with pytest.raises(TypeError, match=message):
        ours.attribute(TextTokenInput("Dave lives", tokenizer), [50], **given)


def test_n_samples_of_exact_methods_warns(model, tokenizer):
    ours = GenerationAttribution(FeatureAblation(model), tokenizer)
    inp = TextTokenInput("Dave lives", tokenizer)
    with pytest.warns(UserWarning, match="`n_samples` has no meaning for FeatureAblation and is"):
        found = ours.attribute(inp, [50, 60], n_samples=9)
    assert torch.equal(found.full_attr, ours.attribute(inp, [50, 60]).full_attr)


def test_provenance_says_how_to_get_captums_quantity(model, tokenizer):
    ours = GenerationAttribution(FeatureAblation(model), tokenizer)
    inp = TextTokenInput("Dave lives", tokenizer)
    pointer = "`output_unit=None` holds it fixed and gives captum's own quantity"
    assert pointer in repr(ours.attribute(inp, [50, 60]))
    assert pointer not in repr(ours.attribute(inp, [50, 60], output_unit=None))
    assert pointer not in repr(ours.attribute(inp, [50]))  # no output is earlier than the first
