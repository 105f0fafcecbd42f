"""What a user gets wrong is told before the model runs: what came, what was wanted, what to do."""

import pytest
import tiny
import torch
import transformers
from captum.attr import (
    FeatureAblation,
    InterpretableInput,
    KernelShap,
    Lime,
    Saliency,
    ShapleyValues,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
)

from captum_llm_ext import GenerationAttribution, TextSegmentInput


@pytest.fixture
def silent_model(tokenizer):
    """A model that must not be run."""
    model = tiny.llama(len(tokenizer), max_position_embeddings=24)

    def fail(*_):
        pytest.fail("the model was run")

    model.register_forward_pre_hook(fail)
    return model


def _attribute(model, tokenizer, *, method=FeatureAblation, prompt="Dave lives in", **arguments):
    inp = arguments.pop("inp", None) or TextSegmentInput(prompt, tokenizer, baselines="delete")
    target = arguments.pop("target", " golf")
    return GenerationAttribution(method(model), tokenizer).attribute(inp, target, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": ""}, ValueError, "the target is empty"),
        ({"target": []}, ValueError, "the target is empty"),
        ({"target": torch.tensor([400])}, ValueError, "id 400 is outside.*vocabulary of 400"),
        ({"target": [-1]}, ValueError, "id -1 is outside"),
        ({"target": torch.tensor([[1, 2], [3, 4]])}, TypeError, r"shape \(2, 2\)"),
        ({"target": torch.tensor([1.5])}, TypeError, "type torch.float32"),
        ({"target": 3}, TypeError, "`target` is a int"),
        ({"target": " golf", "gen_args": {"max_new_tokens": 3}}, ValueError, "would be ignored"),
        ({"prompt": "Dave lives in " * 9}, ValueError, "the model has 24"),
        ({"prompt": "Dave lives in " * 9, "target": None}, ValueError, "the model has 24"),
        (
            {"target": None, "gen_args": {"max_new_tokens": 30}},
            ValueError,
            "and 30 new tokens .* take .* the model has 24",
        ),
        ({"target": " golf" * 20}, ValueError, "the model has 24"),
        ({"output_unit": "phrase"}, ValueError, "unknown unit 'phrase'"),
        ({"output_unit": [(0, 99)]}, ValueError, "leaves the text"),
        ({"output_baselines": ["a"] * 9}, ValueError, r"9 entries for \d features"),
        ({"output_baselines": "nonsense"}, ValueError, "not a token of this vocabulary"),
        ({"num_trials": 0}, ValueError, "`num_trials` is 0"),
        ({"perturbations_per_eval": 0}, ValueError, "`perturbations_per_eval` is 0"),
        ({"method": KernelShap, "n_samples": 0}, ValueError, "`n_samples` is 0"),
        ({"method": KernelShap, "n_samples": 2.5}, ValueError, "`n_samples` is 2.5"),
        ({"method": KernelShap, "n_draws": 3}, ValueError, "`n_draws` has no meaning for Kernel"),
        ({"method": ShapleyValues, "max_exact_features": 20}, ValueError, "give 1 to 16"),
        ({"max_evaluations": 10}, ValueError, "no meaning without `tol`"),
        ({"tol": 0}, ValueError, "`tol` is 0"),
        (
            {"method": Lime, "tol": 0.1, "n_samples": 99},
            ValueError,
            "`tol` and `stop` need standard errors",
        ),
        ({"n_sample": 9}, TypeError, "did you mean 'n_samples'"),
        ({"feature_mask": torch.tensor([[0, 1]])}, ValueError, r"give shape \(1, 3\)"),
        ({"baselines": 3}, TypeError, "'baselines', which would be ignored"),
        ({"inp": "Dave lives"}, TypeError, "`inp` is a str"),
    ],
)
def test_bad_arguments_are_refused(silent_model, tokenizer, arguments, error, message):
    with pytest.raises(error, match=message):
        _attribute(silent_model, tokenizer, **arguments)


def test_baselines_outside_the_vocabulary(silent_model, tokenizer):
    inp = TextTokenInput("Dave lives", tokenizer, baselines=5000)
    with pytest.raises(ValueError, match="token id 5000, outside the model's vocabulary of 400"):
        _attribute(silent_model, tokenizer, inp=inp)


def test_empty_prompts_of_captum_inputs(silent_model, tokenizer):
    inputs = [
        TextTokenInput("", tokenizer, skip_tokens=[1]),
        TextTemplateInput("nothing here", []),
    ]
    for inp in inputs:
        with pytest.raises(ValueError, match="the prompt is empty"):
            _attribute(silent_model, tokenizer, inp=inp)


class Opaque(InterpretableInput):
    """Renders to something that is no model input."""

    n_itp_features = 2
    values = ("a", "b")

    def to_tensor(self):
        return torch.ones(1, 2)

    def to_model_input(self, perturbed_tensor=None):
        return 3


def test_inputs_that_render_to_invalid_ids(silent_model, tokenizer):
    with pytest.raises(TypeError, match="renders to a int"):
        _attribute(silent_model, tokenizer, inp=Opaque())


def test_bad_methods_and_targets(model, tokenizer):
    with pytest.raises(TypeError, match="`attr_method` is a Saliency"):
        GenerationAttribution(Saliency(model), tokenizer)
    with pytest.raises(TypeError, match="`attr_method` is a LlamaForCausalLM"):
        GenerationAttribution(model, tokenizer)
    with pytest.raises(ValueError, match="`attr_target` is 'likelihood'"):
        GenerationAttribution(FeatureAblation(model), tokenizer, attr_target="likelihood")


def test_non_causal_models_are_refused(tokenizer):
    small = {"vocab_size": 400, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    t5 = transformers.T5Config(vocab_size=400, d_model=8, d_ff=8, num_layers=1, num_heads=1)
    bert = transformers.BertConfig(**small, num_attention_heads=1)
    models = [
        (transformers.T5ForConditionalGeneration(t5), "is an encoder-decoder"),
        (transformers.BertForMaskedLM(bert), "generates no text"),
        (tiny.llama(400).model, "generates no text"),
        (lambda ids: ids, "not a `torch.nn.Module`"),
    ]
    for model, message in models:
        with pytest.raises(TypeError, match=message):
            GenerationAttribution(FeatureAblation(model), tokenizer)


def test_models_without_logits_are_refused(tokenizer):
    class Headless(torch.nn.Linear):
        def forward(self, input_ids):
            return torch.zeros(1)

    attribution = GenerationAttribution(FeatureAblation(Headless(1, 1)), tokenizer)
    with pytest.raises(TypeError, match="without `logits`"):
        attribution.attribute(
            TextSegmentInput("Dave lives", tokenizer, baselines="delete"), " golf"
        )


def test_model_without_generate_needs_a_target(tokenizer):
    class Plain(torch.nn.Linear):
        def forward(self, input_ids):
            raise AssertionError("the model was run")

    attribution = GenerationAttribution(FeatureAblation(Plain(1, 1)), tokenizer)
    with pytest.raises(ValueError, match="has no `generate`: give the `target`"):
        attribution.attribute(TextSegmentInput("Dave lives", tokenizer, baselines="delete"))


def test_callable_attr_target_with_wrong_shape(model, tokenizer):
    attribution = GenerationAttribution(
        FeatureAblation(model), tokenizer, attr_target=lambda logits, target: logits.sum(2)[:, :1]
    )
    with pytest.raises(TypeError, match=r"return \(batch, n_target\)"):
        attribution.attribute(
            TextSegmentInput("Dave lives", tokenizer, baselines="delete"), " golf and chess"
        )


def test_nan_values_raise_with_advice(tokenizer):
    model = tiny.llama(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match=r"gives nan to target token 0.*float32"):
        _attribute(model, tokenizer)


def test_small_budget_warning_names_the_needed_budget(model, tokenizer):
    prompt = "one two three four five six seven eight nine ten"
    with pytest.warns(UserWarning, match=r"12 evaluations for \d+ features.*at most 6 features"):
        _attribute(model, tokenizer, method=KernelShap, prompt=prompt, n_samples=12)
    with pytest.warns(UserWarning, match="too few for a reliable estimate"):
        _attribute(model, tokenizer, method=ShapleyValueSampling, prompt=prompt, n_samples=1)
    with pytest.warns(UserWarning, match="too few for a reliable estimate"):
        _attribute(model, tokenizer, method=Lime, prompt=prompt, n_samples=12)


def test_exact_shapley_of_many_features_warns_that_it_samples(model, tokenizer):
    prompt = "one two three four five six seven eight nine ten"
    with pytest.warns(UserWarning, match=r"need 2\^\d+ evaluations: they are estimated from"):
        result = _attribute(
            model, tokenizer, method=ShapleyValues, prompt=prompt, target=" golf and chess and"
        )
    assert result.provenance["estimate"]
    assert result.token_attr_se.gt(0).all()


def test_empty_row_without_bos_is_refused(model, tokenizer):
    bare = tiny.NoOffsets(tokenizer)
    bare.bos_token_id = bare.eos_token_id = None
    inp = TextSegmentInput("Dave lives", bare, add_special_tokens=False, baselines="delete")
    with pytest.raises(ValueError, match="nothing is left before the target"):
        _attribute(model, bare, inp=inp)
    fine = TextSegmentInput("Dave lives", tokenizer, add_special_tokens=False, baselines="delete")
    assert _attribute(model, tokenizer, inp=fine).n_evaluations > 2
