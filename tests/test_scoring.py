"""Values from logits, how many rows fit, and rows that are scored once."""

import pytest
import tiny
import torch
from reference import loop_log_probs

from captum_llm_ext import _compat
from captum_llm_ext.scoring import Scorer, TokenRow, logits, memory
from captum_llm_ext.scoring.memory import Memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("piece", [1, 7, 40, 10**6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_values_are_those_of_a_whole_softmax(monkeypatch, piece, dtype):
    monkeypatch.setitem(logits._PIECE, "cpu", piece)
    generator = torch.Generator().manual_seed(0)
    given = (30 * torch.randn(3, 5, 11, generator=generator)).to(dtype)
    wanted = torch.randint(0, 11, (3, 5), generator=generator)
    own = given.double().gather(2, wanted[..., None])[..., 0]
    truth = given.double().log_softmax(2).gather(2, wanted[..., None])[..., 0]
    for name, expected in (("log_prob", truth), ("prob", truth.exp()), ("logit", own)):
        found = logits.wanted_values(given, wanted, name)
        assert found.dtype == torch.float64
        # Reduced in float32 at least, whatever the model's dtype.
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_logits_are_left_as_they_are():
    given = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    before = given.clone()
    logits.wanted_values(given, torch.zeros(2, 3, dtype=torch.long), "log_prob")
    assert torch.equal(given, before)


def test_a_callable_of_the_wrong_shape_is_told():
    with pytest.raises(TypeError, match=r"return \(batch, n_target\)"):
        logits.called_values(torch.zeros(2, 3, 5), torch.zeros(3), lambda given, target: given)


def most_rows(model, longest, before=0, *, n_target=8, state_bytes=None):
    fits = Memory(model, CPU, kept="positions", n_target=n_target, state_bytes=state_bytes)
    return fits.most_rows(longest, before)


def test_fewer_rows_fit_the_more_each_takes(monkeypatch):
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


def test_the_scores_of_eager_attention_are_counted(monkeypatch):
    monkeypatch.setattr(memory, "_CPU_BUDGET", 2**24)
    sizes = [
        most_rows(tiny.llama(attn_implementation=name), 300, n_target=1)
        for name in ("sdpa", "eager")
    ]
    assert sizes[0] > sizes[1]


def test_passes_of_small_models_cost_more_positions():
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
def test_running_out_of_memory_is_known_by_its_words(error, expected):
    assert memory.is_out_of_memory(error) is expected


def test_a_lasting_lack_of_memory_is_told(monkeypatch):
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


def test_rows_of_models_that_couple_them_run_alone(monkeypatch):
    model = tiny.llama()
    model.config.quantization_config = {"load_in_8bit": True}
    sizes, forward = [], model.forward

    def seen(input_ids, **arguments):
        sizes.append(len(input_ids))
        return forward(input_ids=input_ids, **arguments)

    scorer = Scorer(model, max_rows=8)
    monkeypatch.setattr(model, "forward", seen)
    rows = [TokenRow((1, 5, 6 + i), (1, 2)) for i in range(4)]
    scorer.values(rows, torch.tensor([6, 7]))
    assert sizes == [1, 1, 1, 1]


@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_written_to_the_same_memory_and_the_layer_is_left_as_found(bias, monkeypatch):
    model = tiny.llama().double()
    if bias:
        model.lm_head = torch.nn.Linear(32, 400).double()
    rows = [TokenRow(tuple(range(10 + i, 20 + i)), [8, 9]) for i in range(12)]
    target = torch.tensor([3, 4])
    where, product = set(), model.forward

    def forward(**arguments):
        output = product(**arguments)
        where.add(output.logits.data_ptr())
        return output

    monkeypatch.setattr(model, "forward", forward)
    scorer = Scorer(model, max_rows=1, reuse="off")
    values = scorer.values(rows, target)
    assert len(where) == 1
    assert "forward" not in vars(model.lm_head)
    monkeypatch.undo()
    expected = [loop_log_probs(model, row.ids[:9], ([], row.ids[9:]), [3, 4]) for row in rows]
    assert float((values - torch.stack(expected)).abs().max()) < 1e-11


def test_logits_that_a_callable_keeps_stay_its_own():
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


def test_the_output_layer_is_left_as_found_by_failures(monkeypatch):
    model = tiny.llama()
    monkeypatch.setattr(model.lm_head, "weight", torch.nn.Parameter(torch.ones(400, 5)))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Scorer(model).values([TokenRow((5, 6, 7), [2])], torch.tensor([3]))
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("scale", [0.1, 3, 30])
@pytest.mark.parametrize("vocabulary", [7, 50_000])
def test_log_sum_exps_are_those_of_float64(scale, vocabulary):
    generator = torch.Generator().manual_seed(0)
    given = scale * torch.randn(40, vocabulary, generator=generator) + 50
    given[:, 0] = -torch.inf  # ids that a model rules out
    wanted = torch.randint(1, vocabulary, (40,), generator=generator)
    values = logits.wanted_values(given, wanted, "log_prob")
    expected = given.double().log_softmax(1).gather(1, wanted[:, None])[:, 0]
    assert float((values - expected).abs().max()) < 1e-5 * max(1, scale)
