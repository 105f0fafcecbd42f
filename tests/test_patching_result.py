"""`PatchingResult` alone: tokens by name, and files whose parts do not fit together."""

from dataclasses import replace

import pytest
import torch

from captum_llm_ext import PatchingResult

RESULT = PatchingResult(
    effects=torch.tensor([[[0.0, 2.0], [1.0, 0.0]], [[0.5, 0.0], [0.0, 0.0]]]),
    clean_values=torch.tensor([-1.0, -2.0]),
    corrupted_values=torch.tensor([-4.0, -2.5]),
    target=torch.tensor([7, 8]),
    said_at=torch.tensor([1, 1]),
    places=[[0], [1]],
    place_names=["Dave", " lives"],
    replaced=[0],
    feature=["Dave"],
    replacements=["Ann"],
    output_tokens=[" in", " a"],
    n_evaluations=9,
)


def test_result_round_trips_through_a_file(tmp_path):
    ranked = replace(
        RESULT,
        effects_se=torch.zeros(2, 2, 2),
        ranks=torch.tensor([[0, 1], [-1, 2]]),
        provenance={"attr_target": "log_prob"},
    )
    for result in (RESULT, ranked):
        result.save(tmp_path / "patched.safetensors")
        found = PatchingResult.load(tmp_path / "patched.safetensors")
        assert str(found) == str(result)
        for name in ("effects", "effects_se", "ranks", "said_at"):
            own, read = getattr(result, name), getattr(found, name)
            assert (own is None and read is None) or torch.equal(own, read)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"places": [[0]]}, "its places are not as many"),
        ({"place_names": ["Dave"]}, "its places are not as many"),
        ({"said_at": torch.tensor([1])}, "its target tokens are not as many"),
        ({"output_tokens": [" in"]}, "its target tokens are not as many"),
        ({"effects_se": torch.zeros(2, 2)}, "its standard errors are not as many"),
        ({"ranks": torch.zeros(1, 2, dtype=torch.int64)}, "its ranks are not as many"),
        ({"replaced": ["first"]}, "its places are not numbers"),
    ],
)
def test_inconsistent_parts_are_refused(tmp_path, changes, message):
    """What another program may have written; the digest is right."""
    path = tmp_path / "patched.safetensors"
    replace(RESULT, **changes).save(path)
    with pytest.raises(ValueError, match=message) as error:
        PatchingResult.load(path)
    assert repr(str(path)) in str(error.value)


def test_token_is_selected_by_position_or_name():
    assert RESULT.strongest(" in", 1) == RESULT.strongest(0, 1) == [(0, 1, 2.0)]
    assert RESULT.strongest(-1) == RESULT.strongest("a") == [(0, 0, 0.5)]
    assert "' in': gain +3.00; +2.00 at ' lives' in stream 0" in str(RESULT)
    with pytest.raises(ValueError, match="there is no target token 2: there are 2"):
        RESULT.strongest(2)
    with pytest.raises(ValueError, match="0 target tokens are 'an': give the position of one of"):
        RESULT.strongest("an")
    with pytest.raises(ValueError, match=r"2 target tokens are 'a': .* one of \[0, 1\]"):
        replace(RESULT, output_tokens=[" a", " a"]).strongest("a")
