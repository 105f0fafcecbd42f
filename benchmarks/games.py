"""Games with known Shapley values, to measure estimators on.

`DEVELOPED_ON` are the games that choices in the estimators were made with. `HELD_OUT` were written
down, seeds and all, before; no choice was made with them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

REFERENCE_ORDERS = 1000

Worth = Callable[[Tensor], Tensor]  # bool (n_coalitions, n_features) -> (n_coalitions,)


@dataclass(frozen=True)
class Game:
    """A worth of coalitions and its Shapley values."""

    worth: Worth
    truth: Tensor


def terms(n: int, generator: Generator, skew: float = 2.0, scattered: float = 0.5) -> Game:
    """As many AND and OR terms as features, of 2-8 neighbours or scattered, with heavy tails.

    A term of k features is as frequent as ``k ** -skew``.
    """
    member = torch.zeros(n, n, dtype=torch.bool)
    frequency = torch.arange(2.0, 9.0).pow(-skew)
    for row in member:
        size = 2 + int(torch.multinomial(frequency, 1, generator=generator))
        start = int(torch.randint(n - size + 1, (), generator=generator))
        anywhere = torch.randperm(n, generator=generator)[:size]
        near = torch.rand((), generator=generator) >= scattered
        row[torch.arange(start, start + size) if near else anywhere] = True
    weight = _heavy(n, generator)
    any_will_do = torch.rand(n, generator=generator) < 0.5
    size, columns = member.sum(1), member.T.double()

    def worth(masks: Tensor) -> Tensor:
        present = masks.double() @ columns
        return torch.where(any_will_do, present > 0, present == size).double() @ weight

    return Game(worth, columns @ (weight / size))


def long_terms(n: int, generator: Generator) -> Game:
    """All sizes equally frequent: harder than what estimators are usually shown."""
    return terms(n, generator, skew=0.0)


def trees(n: int, generator: Generator) -> Game:
    """Thirty oblivious trees of depth 4."""
    features = torch.randint(n, (30, 4), generator=generator)
    leaves = torch.randn(30, 16, generator=generator).double()
    leaves *= torch.randn(30, 1, generator=generator).double().exp()

    def worth(masks: Tensor) -> Tensor:
        leaf = (masks[:, features].long() << torch.arange(4)).sum(2)
        return leaves[torch.arange(30), leaf].sum(1)

    return _measured(worth, n, generator)


def network(n: int, generator: Generator) -> Game:
    """A sparse hidden layer of tanh units; features of log-normal size."""
    into = torch.randn(n, 40, generator=generator).double()
    into *= torch.rand(n, 40, generator=generator) < 0.15
    into *= torch.randn(n, 1, generator=generator).double().exp()
    bias = torch.randn(40, generator=generator).double() - into.sum(0) / 2
    out = torch.randn(40, generator=generator).double()
    return _measured(lambda masks: torch.tanh(masks.double() @ into + bias) @ out, n, generator)


def classifier(n: int, generator: Generator) -> Game:
    """Log-probability of one of 20 classes, logits additive."""
    logits = torch.randn(n, 20, generator=generator).double() / 2
    logits *= torch.randn(n, 1, generator=generator).double().exp()
    return _measured(
        lambda masks: torch.log_softmax(masks.double() @ logits, 1)[:, 0], n, generator
    )


def attention(n: int, generator: Generator) -> Game:
    """Eight heads attend to the present features; log-probability of one of 30 classes."""
    salience = (2 * torch.randn(8, n, generator=generator).double()).exp()
    content = torch.randn(8, n, 6, generator=generator).double()
    out = 0.6 * torch.randn(48, 30, generator=generator).double()

    def worth(masks: Tensor) -> Tensor:
        seen = salience * masks[:, None, :].double()
        share = seen / (1 + seen.sum(2, keepdim=True))
        state = torch.einsum("rhn,hnd->rhd", share, content).flatten(1)
        return torch.log_softmax(torch.tanh(state) @ out, 1)[:, 0]

    return _measured(worth, n, generator)


def scattered_terms(n: int, generator: Generator) -> Game:
    """AND and OR of 2-8 features anywhere, all sizes equally frequent."""
    return terms(n, generator, skew=0.0, scattered=1.0)


def parities(n: int, generator: Generator) -> Game:
    """Single features and parities of two or three: what is exclusive, and no monotone term."""
    members = torch.stack([torch.randperm(n, generator=generator)[:3] for _ in range(n // 2)])
    size = 2 + torch.randint(2, (n // 2,), generator=generator)
    inside = torch.arange(3) < size[:, None]
    alone, weight = _heavy(n, generator), _heavy(n // 2, generator)

    def worth(masks: Tensor) -> Tensor:
        odd = (masks[:, members] & inside).sum(2) % 2
        return masks.double() @ alone + odd.double() @ weight

    # Two that cancel are worth nothing together; three share equally.
    share = torch.where(size == 3, weight / 3, 0)[:, None].expand(-1, 3)
    return Game(worth, alone.index_add(0, members.flatten(), share.flatten()))


def cuts(n: int, generator: Generator) -> Game:
    """Three edges per feature of a directed graph, worth something where only the tail is there."""
    tail = torch.arange(n).repeat(3)
    head = (tail + 1 + torch.randint(n - 1, (3 * n,), generator=generator)) % n
    weight = _heavy(3 * n, generator)

    def worth(masks: Tensor) -> Tensor:
        return (masks[:, tail] & ~masks[:, head]).double() @ weight

    truth = torch.zeros(n).double().index_add(0, tail, weight / 2)
    return Game(worth, truth.index_add(0, head, -weight / 2))


def votes(n: int, generator: Generator) -> Game:
    """Twelve committees decide by weighted majority, each with a quota of its own."""
    weights = torch.rand(n, 12, generator=generator).double().pow(4)
    weights *= torch.rand(n, 12, generator=generator) < 0.4
    quota = weights.sum(0) * (0.2 + 0.6 * torch.rand(12, generator=generator).double())
    worths = torch.randn(12, generator=generator).double()
    return _measured(
        lambda masks: (masks.double() @ weights > quota).double() @ worths, n, generator
    )


def perceptron(n: int, generator: Generator) -> Game:
    """Two hidden layers of rectified units on the mask."""
    first = torch.randn(n, 32, generator=generator).double() * (2 / n) ** 0.5
    first *= 3 * torch.rand(n, 1, generator=generator).double().square()
    bias = torch.randn(32, generator=generator).double() / 2
    second = torch.randn(32, 16, generator=generator).double() / 4
    out = torch.randn(16, generator=generator).double()
    return _measured(
        lambda masks: ((masks.double() @ first + bias).relu() @ second).relu() @ out, n, generator
    )


def sparse(n: int, generator: Generator) -> Game:
    """A tenth of the features matter; a few pairs of them are worth more or less together."""
    few = torch.randperm(n, generator=generator)[: max(n // 10, 4)]
    alone = torch.zeros(n).double()
    alone[few] = _heavy(len(few), generator)
    pairs = few[torch.stack([torch.randperm(len(few), generator=generator)[:2] for _ in few])]
    weight = _heavy(len(few), generator)

    def worth(masks: Tensor) -> Tensor:
        return masks.double() @ alone + masks[:, pairs].all(2).double() @ weight

    share = (weight / 2)[:, None].expand(-1, 2)
    return Game(worth, alone.index_add(0, pairs.flatten(), share.flatten()))


def _heavy(n: int, generator: Generator) -> Tensor:
    normal = torch.randn(n, 4, generator=generator).double()
    return normal[:, 0] / normal[:, 1:].square().mean(1).sqrt()  # Student's t, 3 degrees


def _measured(worth: Worth, n: int, generator: Generator) -> Game:
    """Shapley values as means over antithetic orders."""
    total = torch.zeros(n).double()
    for _ in range(REFERENCE_ORDERS // 2):
        order = torch.randperm(n, generator=generator)
        walk = order.argsort() < torch.arange(n + 1)[:, None]
        for ranks, masks in ((order, walk), (order.flip(0), ~walk.flip(0))):
            total[ranks] += worth(masks).diff()
    return Game(worth, total / REFERENCE_ORDERS)


DEVELOPED_ON = {
    "terms": terms,
    "long terms": long_terms,
    "trees": trees,
    "network": network,
    "classifier": classifier,
    "attention": attention,
}
HELD_OUT = {
    "scattered terms": scattered_terms,
    "parities": parities,
    "cuts": cuts,
    "votes": votes,
    "perceptron": perceptron,
    "sparse": sparse,
}
