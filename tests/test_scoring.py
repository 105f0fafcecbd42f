"""Values from logits, how many rows fit, and rows that are scored once."""

import functools

import architectures
import pytest
import tiny
import torch
from reference import loop_log_probs

from captum_llm_ext import _compat
from captum_llm_ext.model import Scorer, TokenRow
from captum_llm_ext.model.exclusive import exclusive_use
from captum_llm_ext.model.forward import logits, memory
from captum_llm_ext.model.forward.lm_head import HeadOutput
from captum_llm_ext.model.forward.memory import Memory
from captum_llm_ext.model.probe import findings

CPU = torch.device("cpu")


@pytest.mark.parametrize("piece", [1, 7, 40, 10**6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_values_equal_a_full_log_softmax(monkeypatch, piece, dtype):
    monkeypatch.setitem(logits._PIECE, "cpu", piece)
    generator = torch.Generator().manual_seed(0)
    given = (30 * torch.randn(3, 5, 11, generator=generator)).to(dtype)
    wanted = torch.randint(0, 11, (3, 5), generator=generator)
    own = given.double().gather(2, wanted[..., None])[..., 0]
    truth = given.double().log_softmax(2).gather(2, wanted[..., None])[..., 0]
    for name, expected in (("log_prob", truth), ("prob", truth.exp()), ("logit", own)):
        found = HeadOutput(given).values(torch.arange(15), wanted.flatten(), name).view(3, 5)
        assert found.dtype == torch.float64
        # Reduced in float32 at least, whatever the model's dtype.
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_logits_are_unchanged():
    given = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    before = given.clone()
    HeadOutput(given).values(torch.arange(6), torch.zeros(6, dtype=torch.long), "log_prob")
    assert torch.equal(given, before)


def test_callable_with_wrong_shape_is_refused():
    with pytest.raises(TypeError, match=r"return \(batch, n_target\)"):
        logits.called_values(torch.zeros(2, 3, 5), torch.zeros(3), lambda given, target: given)


def most_rows(model, longest, before=0, *, n_target=8, state_bytes=None):
    fits = Memory(model, CPU, kept="positions", n_target=n_target, state_bytes=state_bytes)
    return fits.most_rows(longest, before)


def test_batch_size_falls_with_row_memory(monkeypatch):
    model = tiny.llama()
    monkeypatch.setattr(memory, "_CPU_BUDGET", 2**24)
    monkeypatch.setattr(_compat, "free_memory", lambda: None)
    at_all = most_rows(model, 100)
    assert at_all > most_rows(model, 200) > most_rows(model, 400)
    assert at_all > most_rows(model, 100, n_target=800)
    # What has been read before takes memory of its own, and of the budget.
    assert most_rows(model, 200, 150, state_bytes=100) > most_rows(model, 200, 150, state_bytes=900)
    assert most_rows(model, 10**6) == 1  # there is always a try
    monkeypatch.setattr(_compat, "free_memory", lambda: 2**22)
    assert most_rows(model, 100) < at_all


def test_eager_attention_memory_is_counted(monkeypatch):
    monkeypatch.setattr(memory, "_CPU_BUDGET", 2**24)
    sizes = [
        most_rows(tiny.llama(attn_implementation=name), 300, n_target=1)
        for name in ("sdpa", "eager")
    ]
    assert sizes[0] > sizes[1]


def test_pass_overhead_of_small_models_is_larger():
    small, large = tiny.llama(), tiny.llama(hidden_size=256, intermediate_size=512)
    assert memory.overhead(small, CPU) > memory.overhead(large, CPU) > 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_out_of_memory_errors_are_recognised(error, expected):
    assert memory.is_out_of_memory(error) is expected


def test_persistent_out_of_memory_is_raised(monkeypatch):
    model = tiny.llama()

    def full(**arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", full)
    rows = [TokenRow((1, 5, 6, 7 + i), (1, 2, 3)) for i in range(5)]
    with pytest.raises(torch.OutOfMemoryError):
        Scorer(model).values(rows, torch.tensor([6, 7, 8]))


def test_equal_rows_are_scored_once():
    model = tiny.llama()
    scorer = Scorer(model)
    row, other = TokenRow((1, 5, 6), (1, 2)), TokenRow((1, 9, 6), (1, 2))
    target = torch.tensor([6, 7])
    values = scorer.values([row, other, row], target)
    assert torch.equal(values[0], values[2])
    assert scorer.n_evaluations == 2
    again = scorer.values([other], target)
    assert torch.equal(again[0], values[1])
    assert (scorer.n_evaluations, scorer.n_row_positions, scorer.n_positions) == (2, 6, 6)


@pytest.mark.parametrize("reuse", ["off", "copy", "pack"])
@pytest.mark.parametrize("look", [{}, {"load_in_8bit": True}])
def test_likeliest_tokens_of_a_batch_equal_single_rows(reuse, look):
    model = tiny.llama()
    if look:
        model.config.quantization_config = look
    beginning = tuple(range(20, 60))
    rows = [TokenRow((*beginning, 70 + i, 5 * i), (len(beginning) - 1, 41)) for i in range(5)]
    rows.append(TokenRow((7, 8, 9), (-1, 2)))
    log_probs, ids = Scorer(model, reuse=reuse).likeliest(rows, 6)
    assert log_probs.shape == ids.shape == (len(rows), 2, 6)
    with torch.no_grad():
        for row, own_log_probs, own_ids in zip(rows, log_probs, ids, strict=True):
            said = model(torch.tensor([row.ids])).logits[0].double().log_softmax(1)
            for t, place in enumerate(row.positions):
                if place >= 0:
                    best = said[place].topk(6)
                    assert own_ids[t].tolist() == best.indices.tolist()
                    torch.testing.assert_close(own_log_probs[t], best.values, atol=1e-5, rtol=0)


def test_likeliest_tokens_are_bounded_by_the_vocabulary():
    model = tiny.llama(40)
    log_probs, ids = Scorer(model).likeliest([TokenRow((1, 2), (1,))], 50)
    assert sorted(ids[0, 0, :40].tolist()) == [*range(40)]
    assert float(log_probs[0, 0, :40].exp().sum()) == pytest.approx(1, abs=1e-5)
    assert ids[0, 0, 40:].tolist() == [-1] * 10
    assert (log_probs[0, 0, 40:] == -torch.inf).all()


def test_coupled_rows_run_alone(monkeypatch):
    model = tiny.llama()
    model.config.quantization_config = {"load_in_8bit": True}
    sizes, forward = [], model.forward

    def seen(input_ids, **arguments):
        sizes.append(len(input_ids))
        return forward(input_ids=input_ids, **arguments)

    scorer = Scorer(model, max_rows=8)
    rows = [TokenRow((1, 5, 6 + i), (1, 2)) for i in range(5)]
    scorer.values(rows[4:], torch.tensor([6, 7]))  # the model is looked at
    monkeypatch.setattr(model, "forward", seen)
    scorer.values(rows[:4], torch.tensor([6, 7]))
    assert sizes == [1, 1, 1, 1]


def some_rows(n):
    rows = [TokenRow(tuple(range(10 + i, 20 + i)), [8, 9]) for i in range(n)]
    return rows, torch.tensor([3, 4])


def plain_values(model, rows, target):
    ids = target.tolist()
    return torch.stack([loop_log_probs(model, row.ids[:9], ([], row.ids[9:]), ids) for row in rows])


def with_bias(model):
    model.lm_head = torch.nn.Linear(32, 400).double()
    return model


def seen_by(model, monkeypatch):
    """The logits that the class's forward returns, as they are later added."""
    with exclusive_use(model):
        findings(model, some_rows(1)[0])  # once for this model
    seen, forward = [], type(model).forward

    @functools.wraps(forward)
    def watching(self, **arguments):
        output = forward(self, **arguments)
        seen.append(output.logits)
        return output

    monkeypatch.setattr(type(model), "forward", watching)
    return seen


@pytest.mark.parametrize("change", [lambda model: model, with_bias])
def test_full_logits_are_materialised_only_in_the_first_pass(change, monkeypatch):
    model = change(tiny.llama().double())
    rows, target = some_rows(12)
    seen = seen_by(model, monkeypatch)
    scorer = Scorer(model, max_rows=1, reuse="off")
    values = scorer.values(rows, target)
    assert [logits.shape[-1] for logits in seen] == [400] + [1] * 11
    assert "forward" not in vars(model.lm_head)
    monkeypatch.undo()
    assert float((values - plain_values(model, rows, target)).abs().max()) < 1e-11


@pytest.mark.parametrize("name", ["gemma 2, sliding window", "cohere 2, sliding window"])
def test_logits_postprocessed_by_the_model_reuse_memory(name):
    model = architectures.build(name, dtype=torch.float64)
    rows, target = some_rows(12)
    scorer = Scorer(model, max_rows=1, reuse="off")
    memory = set()
    for row in rows:
        scorer.values([row], target)
        memory.add(scorer._passes._head._memory.data_ptr())
    assert len(memory) == 1
    values = scorer.values(rows, target)
    assert float((values - plain_values(model, rows, target)).abs().max()) < 1e-11


def test_custom_forward_gets_full_logits():
    model = tiny.llama().double()
    forward, calls = model.forward, []

    def moody(**arguments):
        output = forward(**arguments)
        calls.append(output.logits.shape[-1])
        if len(calls) % 3 == 0:
            output.logits.mul_(0.5)
        elif len(calls) > 5:
            output.logits = output.logits * 0.5
        return output

    rows, target = some_rows(8)
    scorer = Scorer(model, max_rows=1, reuse="off")
    scorer.values(some_rows(9)[0][8:], target)  # the model is looked at
    model.forward = moody
    values = scorer.values(rows, target)
    assert set(calls) == {400}
    del model.forward
    ids = torch.tensor([row.ids for row in rows])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, 8:10]
    cooled = [False, False, True, False, False, True, True, True]
    logits[torch.tensor(cooled)] *= 0.5
    own = logits.log_softmax(-1)[:, [0, 1], target]
    torch.testing.assert_close(values, own, atol=1e-11, rtol=0)


def test_hooks_on_the_lm_head_get_full_logits(monkeypatch):
    model = tiny.llama()
    heard = []
    rows, target = some_rows(3)
    scorer = Scorer(model, max_rows=1, reuse="off")
    scorer.values(some_rows(4)[0][3:], target)  # the model is looked at
    handle = model.lm_head.register_forward_hook(lambda *given: heard.append(given[2].clone()))
    values = scorer.values(rows, target)
    handle.remove()
    own = torch.stack([logits[0].log_softmax(-1)[[0, 1], target] for logits in heard])
    torch.testing.assert_close(values, own.double(), atol=1e-5, rtol=0)


def test_missing_logits_raise(monkeypatch):
    model = tiny.llama()
    seen = seen_by(model, monkeypatch)
    watching = type(model).forward

    @functools.wraps(watching)
    def moody(self, **arguments):
        output = watching(self, **arguments)
        if len(seen) > 2:
            output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(type(model), "forward", moody)
    rows, target = some_rows(4)
    with pytest.raises(RuntimeError, match="no longer returns the output of its last layer"):
        Scorer(model, max_rows=1, reuse="off").values(rows, target)
    assert "forward" not in vars(model.lm_head)


def test_autocast_logits_keep_their_dtype():
    model = tiny.llama()
    rows, target = some_rows(2)
    with torch.autocast("cpu", torch.bfloat16):
        values = Scorer(model, max_rows=1, reuse="off").values(rows, target)
        ids = torch.tensor([row.ids for row in rows])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, 8:10]
    assert logits.dtype == torch.bfloat16
    own = logits.float().log_softmax(-1)[:, [0, 1], target]
    torch.testing.assert_close(values, own.double(), atol=0.05, rtol=0)


@pytest.mark.parametrize("piece", [1, 40, 2**19])
@pytest.mark.parametrize("bias", [None, "small", "rules words out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_without_materialised_logits(monkeypatch, piece, bias, dtype):
    monkeypatch.setitem(logits._PIECE, "cpu", piece)
    monkeypatch.setattr(logits, "_PLACES", 4)
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(6, 50, bias=bias is not None, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(torch.randn(50, 6, generator=generator))
    if bias is not None:
        layer.bias.copy_(torch.randn(50, generator=generator))
    if bias == "rules words out":
        layer.bias[40:] = -torch.inf
    # From flat to such that what is wanted is 100 nats and more below the likeliest.
    scale = torch.tensor([0.01, 1, 5, 50, 200, 1, 30])[:, None]
    vectors = (scale * torch.randn(7, 6, generator=generator)).to(dtype)
    where = torch.arange(7).repeat(2)
    wanted = torch.randint(0, 40, (14,), generator=generator)
    made = torch.nn.functional.linear(vectors.double(), layer.weight.double())
    made = made if bias is None else made + layer.bias.double()
    expected = made.log_softmax(1)[where, wanted]
    assert expected.min() < -100
    tolerance = 1e-12 if dtype == torch.float64 else 2e-7  # of the largest logits
    said = HeadOutput(vectors, layer)
    for name, truth in (
        ("log_prob", expected),
        ("prob", expected.exp()),
        ("logit", made[where, wanted]),
    ):
        found = said.values(where, wanted, name)
        assert found.dtype == torch.float64
        size = made[where].abs().nan_to_num(posinf=0).amax(1)
        assert bool(((found - truth).abs() <= tolerance * (4 + size)).all())
    assert bool((said.values(where, wanted, "log_prob") <= 0).all())
    torch.testing.assert_close(said.logits(), made.to(dtype), atol=1e-4, rtol=1e-5)


def test_nan_and_minus_infinity_are_kept():
    layer = torch.nn.Linear(3, 9).requires_grad_(False)
    layer.bias[8] = -torch.inf
    vectors = torch.ones(2, 3)
    vectors[1] = torch.nan
    found = HeadOutput(vectors, layer).values(
        torch.tensor([0, 0, 1]), torch.tensor([8, 2, 2]), "log_prob"
    )
    assert found.isneginf().tolist() == [True, False, False]
    assert found.isnan().tolist() == [False, False, True]


def test_logits_kept_by_a_callable_are_not_overwritten():
    model = tiny.llama()
    kept = []

    def keeping(logits, target):
        kept.append(logits)
        return logits[:, range(len(target)), target]

    rows = [TokenRow(tuple(range(10 + i, 20 + i)), [8, 9]) for i in range(3)]
    values = Scorer(model, attr_target=keeping, max_rows=1, reuse="off").values(
        rows, torch.tensor([3, 4])
    )
    again = torch.cat([logits[:, [0, 1], [3, 4]] for logits in kept])
    assert torch.equal(values, again.double())


def test_lm_head_is_restored_after_failures(monkeypatch):
    model = tiny.llama()
    monkeypatch.setattr(model.lm_head, "weight", torch.nn.Parameter(torch.ones(400, 5)))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Scorer(model).values([TokenRow((5, 6, 7), [2])], torch.tensor([3]))
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("scale", [0.1, 3, 30])
@pytest.mark.parametrize("vocabulary", [7, 50_000])
def test_log_sum_exp_equals_float64(scale, vocabulary):
    generator = torch.Generator().manual_seed(0)
    given = scale * torch.randn(40, vocabulary, generator=generator) + 50
    given[:, 0] = -torch.inf  # ids that a model rules out
    wanted = torch.randint(1, vocabulary, (40,), generator=generator)
    values = logits.log_probs(given, torch.arange(40), wanted)
    expected = given.double().log_softmax(1).gather(1, wanted[:, None])[:, 0]
    assert float((values - expected).abs().max()) < 1e-5 * max(1, scale)
