"""Half precision: how much rounding alone moves a value is measured, told and marked."""

import pytest
import tiny
import torch
from captum.attr import FeatureAblation, KernelShap

from captum_llm_ext import GenerationAttribution, GenerationAttributionResult, TextSegmentInput
from captum_llm_ext.scoring import Scorer, TokenRow

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer."
TARGET = " golf and chess"


def attribute(model, method=FeatureAblation, **arguments):
    tokenizer = tiny.byte_level()
    inp = TextSegmentInput(PROMPT, tokenizer, "word")
    attribution = GenerationAttribution(method(model), tokenizer)
    return attribution.attribute(inp, TARGET, **arguments)


@torch.no_grad()
def spread(model, row, target):
    """Largest difference between values of one row, by plain passes over batches of four shapes."""
    longer, places = [*row.ids, *row.ids[:7]], list(row.positions)
    said = []
    for n, length in ((1, 40), (2, 40), (8, 40), (2, 47)):
        ids = torch.tensor([longer[:length]] * n)
        logits = model(
            input_ids=ids, use_cache=False, logits_to_keep=torch.tensor([places] * n)
        ).logits.float()
        own = logits.gather(2, target.expand(n, -1)[..., None])[..., 0]
        said.append((own - logits.logsumexp(2)).double())
    said = torch.cat(said)
    return said.amax(0) - said.amin(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_floor_is_what_plain_passes_of_several_shapes_differ_by(dtype):
    model = tiny.llama(hidden_size=256, intermediate_size=512, initializer_range=0.1).to(dtype)
    ids = torch.randint(4, 400, (40,), generator=torch.Generator().manual_seed(0))
    row, target = TokenRow(tuple(ids.tolist()), range(30, 40)), ids[:10]
    floor = Scorer(model).noise_floor(row, target)
    assert torch.allclose(floor, spread(model, row, target), atol=1e-5)
    assert floor.max() < 64 * torch.finfo(dtype).eps


def test_better_precision_has_no_floor_worth_telling():
    result = attribute(tiny.llama())
    assert result.noise_floor is None
    assert result.provenance["noise_floor"] is None
    assert not result.below_noise.any()
    assert "rounding" not in str(result)


def test_attributions_below_the_floor_are_marked_and_left_out_of_the_table(tmp_path):
    result = attribute(tiny.llama().bfloat16())
    assert len(result.provenance["noise_floor"]) == len(result.output_tokens)
    # What is marked follows from what was measured, whatever that is on this machine.
    floor = [0.5] * len(result.output_tokens)
    result.provenance["noise_floor"] = floor
    expected = [[abs(a) <= 0.5 for a in row] for row in result.full_attr.tolist()]
    assert result.below_noise.tolist() == expected
    shown = str(result)
    assert "see `below_noise`" in shown
    for row in result.top(3):
        for cause in row:
            if 0 < abs(cause.attribution) <= 0.5:
                assert f"{cause.attribution:+.2f}" not in shown.split("\n", 1)[1].split("see `")[0]
    result.save(tmp_path / "result.safetensors")
    loaded = GenerationAttributionResult.load(tmp_path / "result.safetensors")
    assert torch.equal(loaded.below_noise, result.below_noise)


def test_the_floor_is_that_of_the_unit_it_was_measured_in():
    result = attribute(tiny.llama().bfloat16(), KernelShap, n_samples=64)
    assert result.refit(attr_target="prob").noise_floor is None
    assert torch.equal(result.refit().noise_floor, result.noise_floor)


def test_one_row_at_a_time_where_rows_change_each_other():
    model = tiny.llama().bfloat16()
    model.config.quantization_config = {"load_in_8bit": True}
    sizes, forward = [], model.forward

    def counted(input_ids, **arguments):
        sizes.append(len(input_ids))
        return forward(input_ids=input_ids, **arguments)

    model.forward = counted
    result = attribute(model)
    assert set(sizes) == {1}
    assert result.noise_floor is None
    assert "one row at a time" in result.provenance["batching"]
