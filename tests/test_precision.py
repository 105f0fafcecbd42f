"""Half precision: how much rounding alone moves a value is measured, told and marked."""

import architectures
import pytest
import tiny
import torch
from captum.attr import FeatureAblation, KernelShap

from captum_llm_ext import GenerationAttribution, GenerationAttributionResult, TextSegmentInput
from captum_llm_ext.model import Scorer, TokenRow

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer."
TARGET = " golf and chess"


def attribute(model, method=FeatureAblation, **arguments):
    tokenizer = tiny.byte_level()
    inp = TextSegmentInput(PROMPT, tokenizer, "word", baselines="delete")
    attribution = GenerationAttribution(method(model), tokenizer)
    return attribution.attribute(inp, TARGET, **arguments)


def rows_of(n_prompt=24, n_target=8):
    ids = torch.randint(4, 400, (n_prompt + n_target,), generator=torch.Generator().manual_seed(0))
    prompt, target = ids[:n_prompt].tolist(), ids[n_prompt:]
    prompts = [prompt, *([*prompt[:i], *prompt[i + 1 :]] for i in range(n_prompt))]
    prompts += [[*prompt[:i], 3, *prompt[i + 1 :]] for i in range(n_prompt)]
    read = target[:-1].tolist()
    rows = [TokenRow((*p, *read), range(len(p) - 1, len(p) + n_target - 1)) for p in prompts]
    return rows, target


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "lfm 2, convolution hybrid", "cohere 2, sliding window"])
def test_runs_with_other_batches_differ_within_the_noise_floor(name, dtype):
    model = architectures.build(name, dtype=dtype)
    rows, target = rows_of()
    scorer = Scorer(model)
    values = scorer.values(rows, target)
    floor = scorer.noise_floor(rows[0], target)
    assert 0 < floor.max() < 16 * torch.finfo(dtype).eps
    for max_rows in (1, 5):
        others = Scorer(model, max_rows=max_rows).values(rows, target)
        assert bool(((others - values).abs().amax(0) <= floor).all())


def test_float32_has_a_negligible_noise_floor():
    result = attribute(tiny.llama())
    assert result.noise_floor is None
    assert result.provenance["noise_floor"] is None
    assert not result.below_noise.any()
    assert "rounding" not in str(result)


def test_attributions_below_the_noise_floor_are_left_out_of_the_table(tmp_path):
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
    result.provenance["noise_floor"] = [3e-5] * len(floor)
    result.token_attr[0, 0] = 1e-5  # shown, it would be 0.00
    assert bool(result.below_noise.any())
    assert "see `below_noise`" not in str(result)
    result.save(tmp_path / "result.safetensors")
    loaded = GenerationAttributionResult.load(tmp_path / "result.safetensors")
    assert torch.equal(loaded.below_noise, result.below_noise)


def test_noise_floor_is_kept_only_in_its_own_unit():
    result = attribute(tiny.llama().bfloat16(), KernelShap, n_samples=64)
    assert result.refit(attr_target="prob").noise_floor is None
    assert torch.equal(result.refit().noise_floor, result.noise_floor)


def test_coupled_rows_run_one_at_a_time():
    model = tiny.llama().bfloat16()
    model.config.quantization_config = {"load_in_8bit": True}
    sizes, forward = [], model.forward

    def counted(input_ids, **arguments):
        sizes.append(len(input_ids))
        return forward(input_ids=input_ids, **arguments)

    model.forward = counted
    result = attribute(model)
    assert sizes.count(1) > len(sizes) - 8  # the probe alone has looked at several
    # The same however often they are computed, but for what eight bits cannot tell.
    assert 0 < result.noise_floor.max() < 0.1
    assert "one row at a time" in result.provenance["batching"]
