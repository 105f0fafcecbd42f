"""Seeded draws of torch, for calls that a user's code makes."""

import pytest
import torch

from captum_llm_ext.base.seeded import reseeded, seeded, seeded_rows


@pytest.mark.parametrize(
    ("like", "plain"),
    [
        (torch.rand_like, torch.rand),
        (torch.randn_like, torch.randn),
    ],
)
def test_rand_like_functions_keep_shape_and_dtype(like, plain):
    base = torch.zeros(3, 4, dtype=torch.float64)
    with seeded(5):
        found = like(base)
    with seeded(5):
        expected = plain(3, 4, dtype=torch.float64)
    assert torch.equal(found, expected)
    assert found.dtype == torch.float64
    with seeded(6):
        assert not torch.equal(like(base), expected)


def test_explicit_generator_is_respected():
    with seeded(5):
        found = torch.rand(4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found, torch.rand(4, generator=torch.Generator().manual_seed(1)))


def test_compiled_code_uses_a_restored_global_generator():
    model = torch.nn.Linear(2, 2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with reseeded(model, 5):
        found = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found, torch.rand(4, generator=torch.Generator().manual_seed(5)))


def test_rows_have_their_own_seeds():
    """Whatever else is in the batch."""
    chances = torch.full((3, 50), 1 / 50)
    with seeded_rows([1, 2, 3]):
        together = torch.multinomial(chances, 1)
    for row, seed in enumerate((1, 2, 3)):
        with seeded(seed):
            assert torch.equal(together[row : row + 1], torch.multinomial(chances[:1], 1))
