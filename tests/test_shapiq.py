"""The game behind an attribution, played by other packages."""

import pytest
import torch
from captum.attr import FeatureAblation, ShapleyValues
from reference import loop_log_probs, tokens_read

from captum_llm_ext import CoalitionGame, GenerationAttribution, TextSegmentInput

np = pytest.importorskip("numpy")
PROMPT = "Dave lives in Austin."
TARGET = " golf and."


def make(model, tokenizer, *, baselines=None, attr_target="log_prob", **arguments):
    attribution = GenerationAttribution(ShapleyValues(model), tokenizer, attr_target=attr_target)
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=baselines)
    return attribution.to_game(inp, TARGET, **arguments), attribution, inp


def every(n):
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)


def test_values_equal_plain_forwards(model, tokenizer):
    game, _, inp = make(model, tokenizer, token=2, normalize=False)
    target = tokenizer.encode(TARGET, add_special_tokens=False)
    assert isinstance(game, CoalitionGame)
    assert game.n_players == 4 + 2
    assert game.player_names[:4] == ["Dave", " lives", " in", " Austin."]
    coalitions = every(6)[[0, 5, 18, 40, 63]]
    found = game(coalitions)
    assert found.dtype == np.float64
    assert found.shape == (5,)
    for coalition, value in zip(coalitions.tolist(), found, strict=True):
        prompt = inp.to_model_input(torch.tensor([coalition[:4]]).float())[0].tolist()
        read = tokens_read(target, [*coalition[4:], True, True], None)
        expected = loop_log_probs(model, prompt, [read[2]], [target[2]])
        assert value == pytest.approx(float(expected), abs=1e-4)
    assert game(coalitions[1]).shape == (1,)
    assert game.grand_coalition_value == pytest.approx(found[-1])


def test_normalised_empty_coalition_is_zero(model, tokenizer):
    game, _, _ = make(model, tokenizer, token=1)
    plain, _, _ = make(model, tokenizer, token=1, normalize=False)
    coalitions = every(game.n_players)
    assert game(coalitions)[0] == 0
    assert plain.normalization_value == 0
    shift = plain.empty_coalition_value
    np.testing.assert_allclose(game(coalitions), plain(coalitions) - shift, atol=1e-12)


def test_span_game_holds_its_own_tokens_fixed(model, tokenizer):
    whole, attribution, inp = make(model, tokenizer)
    assert whole.player_names == ["Dave", " lives", " in", " Austin."]
    fixed = attribution.attribute(inp, TARGET, output_unit=None)
    rest = FeatureAblation(model)
    total = GenerationAttribution(rest, tokenizer).attribute(inp, TARGET, output_unit=None)
    gains = [whole(np.ones((1, 4), bool)) - whole(~np.eye(4, dtype=bool)[[i]]) for i in range(4)]
    np.testing.assert_allclose(np.concatenate(gains), total.seq_attr.numpy(), atol=1e-4)
    assert whole.grand_coalition_value == pytest.approx(float(fixed.full_values.sum()), abs=1e-4)
    probability, _, _ = make(model, tokenizer, attr_target="prob", normalize=False)
    np.testing.assert_allclose(
        np.log(probability(every(4))), whole(every(4)) + whole.empty_coalition_value, atol=1e-4
    )
    last, _, _ = make(model, tokenizer, token=-1)
    first_two, _, _ = make(model, tokenizer, token=(1, 3))
    assert (last.n_players, first_two.n_players) == (4 + 3, 4 + 1)


def test_random_baselines_give_a_deterministic_game(model, tokenizer):
    names = [["Ann", "Bob", "Eve"], ["has", "won"], "in", "Waco."]
    game, _, _ = make(model, tokenizer, baselines=names, token=0, n_draws=4)
    coalitions = every(4)
    first = game(coalitions)
    np.testing.assert_array_equal(game(coalitions), first)
    np.testing.assert_array_equal(game(coalitions[::-1])[::-1], first)
    assert len(np.unique(first.round(6))) > 4


def test_bad_arguments_are_refused(model, tokenizer):
    game, _, _ = make(model, tokenizer, token=0)
    with pytest.raises(ValueError, match=r"give \(n_coalitions, 4\)"):
        game(np.ones((2, 5), bool))
    assert game(np.ones((0, 4), bool)).shape == (0,)
    for token in (9, -9, (2, 2), (8, 9)):
        with pytest.raises(ValueError, match="give the position of one of"):
            make(model, tokenizer, token=token)
    with pytest.raises(ValueError, match="`n_draws` is 0"):
        make(model, tokenizer, n_draws=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_shapiq_accepts_the_game(model, tokenizer):
    shapiq = pytest.importorskip("shapiq")
    game, attribution, inp = make(model, tokenizer, token=2)
    n = game.n_players
    result = attribution.attribute(inp, TARGET)
    expected = result.full_attr[2, :n].numpy()
    exact = shapiq.ExactComputer(game=game, n_players=n)("SV").get_n_order_values(1)
    np.testing.assert_allclose(exact, expected, atol=1e-4)
    for approximator in (
        shapiq.KernelSHAP(n, random_state=0),
        shapiq.UnbiasedKernelSHAP(n, random_state=0),
    ):
        found = approximator.approximate(2**n, game).get_n_order_values(1)
        # With every coalition affordable both are exact.
        np.testing.assert_allclose(found, expected, atol=1e-3)
    pairs = shapiq.KernelSHAPIQ(n, max_order=2, index="k-SII", random_state=0)
    interactions = pairs.approximate(2**n, game).get_n_order_values(2)
    truth = shapiq.ExactComputer(game=game, n_players=n)("k-SII", order=2).get_n_order_values(2)
    np.testing.assert_allclose(interactions, truth, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_proxyspex_accepts_the_game(model, tokenizer):
    shapiq = pytest.importorskip("shapiq")
    pytest.importorskip("lightgbm")
    game, _, _ = make(model, tokenizer, token=2)
    proxy = shapiq.ProxySPEX(n=game.n_players, max_order=2, index="k-SII", random_state=0)
    found = proxy.approximate(64, game)
    assert found.n_players == game.n_players
    assert np.abs(found.get_n_order_values(1)).max() > 0
