"""Values of the target tokens, from logits or from the input of the LM head."""

import math
from collections.abc import Callable
from itertools import repeat

import torch
from torch import Tensor, nn

AttrTarget = str | Callable[[Tensor, Tensor], Tensor]

# Logits are reduced piece by piece: only a float32 copy of each piece is made. On a CPU a piece
# fits into its cache. Chosen, not measured.
_PIECE = {"cpu": 2**19}
_PIECE_ELSEWHERE = 2**27  # on other devices; chosen, not measured
# Positions per reading of a layer's weights. Chosen, not measured.
_PLACES = 2048
_LOG2_E = math.log2(math.e)


def logits_of(vectors: Tensor, where: Tensor, wanted: Tensor, layer: nn.Linear | None) -> Tensor:
    """Logits of ids at positions.

    Args:
        vectors: Logits ``(n_places, vocabulary)``, or the input of a layer that computes them.
        where: Indices of positions, int64 ``(n,)``.
        wanted: Token ids ``(n,)``.
        layer: The layer. None: `vectors` are logits.

    Returns:
        Shape ``(n,)``, float64 on the CPU.
    """
    if layer is None:
        return vectors[where.to(vectors.device), wanted.to(vectors.device)].cpu().double()
    found = (vectors[where] * layer.weight[wanted]).sum(1, dtype=torch.float64)
    bias = bias_of(layer)
    return found if bias is None else found + bias[wanted]


def bias_of(layer: nn.Linear) -> Tensor | None:
    """A layer's bias ``(out_features,)``, if any."""
    return getattr(layer, "bias", None)


def log_probs(logits: Tensor, where: Tensor, wanted: Tensor) -> Tensor:
    """Log-probabilities of ids at positions.

    Args:
        logits: Shape ``(n_places, vocabulary)``.
        where: Indices of positions, int64 ``(n,)``.
        wanted: Token ids ``(n,)``.

    Returns:
        Shape ``(n,)``, float64 on the CPU. Softmax and sums are taken in float32 at least.
    """
    return logits_of(logits, where, wanted, None) - _logsumexp(logits)[where]


def log_probs_of_product(
    vectors: Tensor, where: Tensor, wanted: Tensor, layer: nn.Linear
) -> Tensor:
    """Like `log_probs`, without materialising all logits.

    Args:
        vectors: Input of `layer`, ``(n_places, size)``.
        where: Indices of positions, int64 ``(n,)``; each position occurs at least once.
        wanted: Token ids ``(n,)``.
        layer: A plain linear layer.
    """
    own = logits_of(vectors, where, wanted, layer)
    # Powers are relative to a requested logit: sums of larger ones are then at least 1, and the
    # largest logit need not be found first.
    level = own.new_full((len(vectors),), -torch.inf).scatter_reduce_(0, where, own, "amax")
    level = (level * _LOG2_E).to(vectors.dtype)
    found = (level.double() + _sums_of_powers(vectors, level, layer).log2()) / _LOG2_E
    if len(beyond := (~found.isfinite()).nonzero()[:, 0]):  # larger by more than 88 nats
        for some in beyond.split(max(1, _PIECE["cpu"] // layer.out_features)):
            found[some] = _logsumexp(layer(vectors[some]))
    return (own - found[where]).clamp_(max=0)


def _sums_of_powers(vectors: Tensor, level: Tensor, layer: nn.Linear) -> Tensor:
    """Sums over the vocabulary of the powers of 2 of ``logits / ln 2 - level``, piece by piece.

    Args:
        vectors: Input of `layer`, ``(n, size)``.
        level: Shape ``(n,)``.
        layer: A plain linear layer.

    Returns:
        Shape ``(n,)``, float64.
    """
    found: list[Tensor] = []
    for some, below in zip(vectors.split(_PLACES), level.split(_PLACES), strict=True):
        n, size = len(some), max(1, _PIECE["cpu"] // len(some))
        piece = some.new_empty(n * size)
        sums = some.new_zeros(n, dtype=torch.float64)
        # Vocabulary as rows: with the larger dimension first, the product takes a tenth less.
        columns = (some * _LOG2_E).t().contiguous()
        whole = bias_of(layer)
        biases = repeat(None) if whole is None else whole.split(size)
        for weight, bias in zip(layer.weight.split(size), biases, strict=False):
            powers = piece[: len(weight) * n].view(len(weight), n)
            if bias is None:
                torch.addmm(below, weight, columns, beta=-1, out=powers)
            else:
                torch.sub(bias[:, None] * _LOG2_E, below, out=powers).addmm_(weight, columns)
            sums += powers.exp2_().sum(0)
        found.append(sums)
    return torch.cat(found)


def _logsumexp(logits: Tensor) -> Tensor:
    """Log-sum-exps ``(n,)`` of logits ``(n, vocabulary)``, float64 on the CPU.

    On CPUs ``torch.logsumexp`` takes nearly twice the time, because of its exponential.
    """
    n, vocabulary = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    size = max(1, _PIECE.get(logits.device.type, _PIECE_ELSEWHERE) // vocabulary)
    piece = logits.new_empty(min(n, size), vocabulary, dtype=dtype)
    sums, largest = logits.new_empty(2, n, dtype=dtype)
    for i in range(0, n, size):
        some = logits[i : i + size]
        level = some.amax(1, keepdim=True).to(dtype)
        largest[i : i + size] = level[:, 0]
        powers = torch.sub(some, level, out=piece[: len(some)]).mul_(_LOG2_E).exp2_()
        torch.sum(powers, 1, out=sums[i : i + size])
    return largest.cpu().double() + sums.cpu().double().log()


def called_values(
    logits: Tensor, target: Tensor, attr_target: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Values of a user's callable, row by row.

    Args:
        logits: Shape ``(batch, n_target, vocabulary)``.
        target: Token ids ``(n_target,)``.
        attr_target: ``(logits (batch, n_target, vocabulary), target) -> (batch, n_target)``.

    Returns:
        Shape ``(batch, n_target)``, float64 on the CPU.

    Raises:
        TypeError: If the callable returns anything else.
    """
    target = target.to(logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows: list[Tensor] = []
    for row in logits.split(1):
        row = row.to(dtype)
        found = attr_target(row, target)
        if not isinstance(found, Tensor) or found.shape != (1, len(target)):
            raise TypeError(
                f"`attr_target` returned {getattr(found, 'shape', type(found).__name__)} "
                f"for logits of shape {tuple(row.shape)}: return (batch, n_target)."
            )
        rows.append(found.detach())
    return torch.cat(rows).double().cpu()
