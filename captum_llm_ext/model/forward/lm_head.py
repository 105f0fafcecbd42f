"""The LM head: values of logits computed without materialising them.

Logits are by far the largest tensors of a pass, and only a number or two per position are needed.
If a model's logits are the output of a plain linear layer, values are computed from its input, by
products that stay in the processor's cache until they are reduced: the forward pass of cut
cross-entropy (Wijmans et al., arXiv 2411.09009, section 4.2).
"""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext import _compat
from captum_llm_ext.model.forward.logits import bias_of, log_probs, log_probs_of_product, logits_of

# Positions at a time with all logits in float32, to find the likeliest. Chosen, not measured.
_PLACES = 64
# Lower precision rounds logits, and values are those of the rounded ones.
_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class HeadOutput:
    """The model's output at some positions.

    Attributes:
        vectors: Logits ``(…, vocabulary)``, or the input of the last layer.
        layer: The last layer. None: `vectors` are logits.
    """

    vectors: Tensor
    layer: nn.Linear | None = None

    def at(self, places: Tensor) -> "HeadOutput":
        """Output at positions ``(batch, n)`` of sequences ``(batch, length)``."""
        index = places.to(self.vectors.device)[..., None]
        return HeadOutput(
            self.vectors.gather(1, index.expand(-1, -1, self.vectors.shape[2])), self.layer
        )

    def logits(self) -> Tensor:
        """Shape ``(…, vocabulary)``."""
        return self.vectors if self.layer is None else self.layer(self.vectors)

    def likeliest(self, where: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens at positions, the likeliest first.

        Args:
            where: Indices of positions, int64 ``(n_places,)``.
            n: Number of tokens.

        Returns:
            Log-probabilities, float64, and token ids, each ``(n_places, n)`` on the CPU; padded
            with -inf and -1.
        """
        vectors = self.vectors.reshape(-1, self.vectors.shape[-1])
        shape = len(where), n
        log_probs = torch.full(shape, -torch.inf, dtype=torch.float64, device="cpu")
        ids = torch.full(shape, -1, dtype=torch.int64, device="cpu")
        for start in range(0, len(where), _PLACES):
            some = slice(start, start + _PLACES)
            logits = HeadOutput(vectors[where[some].to(vectors.device)], self.layer).logits()
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            best = logits.topk(min(n, logits.shape[1]), dim=1)
            found = best.values - logits.logsumexp(1, keepdim=True)
            log_probs[some, : found.shape[1]] = found.double().cpu()
            ids[some, : found.shape[1]] = best.indices.cpu()
        return log_probs, ids

    def values(self, where: Tensor, wanted: Tensor, attr_target: str) -> Tensor:
        """Values of ids at positions.

        Args:
            where: Indices of positions, int64 ``(n,)``.
            wanted: Token ids ``(n,)``.
            attr_target: ``"log_prob"``, ``"prob"`` or ``"logit"``.

        Returns:
            Shape ``(n,)``, float64 on the CPU, rounded to float32 unless vectors have higher
            precision. Softmax and sums are taken in float32 at least.
        """
        vectors = self.vectors.reshape(-1, self.vectors.shape[-1])
        if attr_target == "logit":
            found = logits_of(vectors, where, wanted, self.layer)
        elif self.layer is None:
            found = log_probs(vectors, where, wanted)
        else:
            found = log_probs_of_product(vectors, where, wanted, self.layer)
        found = found.exp() if attr_target == "prob" else found
        # As stored in results, so that later computations use the same numbers.
        return found.to(torch.promote_types(vectors.dtype, torch.float32)).double()


class LMHead:
    """Captures the input of a model's last layer, and checks whether its output is the logits.

    Args:
        model: The model; its last layer is not modified. If that is not a plain linear layer on a
            CPU, or the model's code is not that of transformers, which does the same in every pass,
            logits are computed as usual.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._layer = model, _compat.output_layer(model)
        self._is_last = False  # unknown before the first pass
        self._withheld = False
        self._given: Tensor | None = None
        self._returned: Tensor | None = None
        self._version = 0
        self._memory = torch.empty(0, dtype=torch.float32, device="cpu")

    @property
    def makes_logits(self) -> bool:
        """Whether passes compute logits, as far as is known."""
        return not (self._is_last and self._is_known())

    @contextmanager
    def watched(self) -> Generator[None]:
        """The single pass within may skip logits: `output_of` has their content.

        Passes of other threads compute theirs.
        """
        layer, self._given = self._layer, None
        if layer is None or not _is_plain(layer):
            yield
            return
        self._withheld = self._is_last and self._is_known()

        owner, usual = threading.get_ident(), layer.forward

        def forward(*arguments: Any, **named: Any) -> Tensor:
            if threading.get_ident() != owner:
                return usual(*arguments, **named)
            return watched(*arguments, **named)

        def watched(input: Tensor) -> Tensor:
            if self._withheld:  # code that uses them nevertheless gets a visible result
                returned = input.new_full((*input.shape[:-1], 1), torch.nan)
            else:
                returned = self._product(layer, input)
            self._given, self._returned = input, returned
            self._version = returned._version
            return returned

        layer.forward = forward
        try:
            yield
        finally:
            del layer.forward

    def output_of(self, logits: Tensor) -> HeadOutput:
        """The output of a pass within `watched`.

        Args:
            logits: As returned by the model, ``(batch, length, vocabulary)``.

        Returns:
            At all positions with logits; valid until the next pass.
        """
        given, returned = self._given, self._returned
        self._given = self._returned = None
        if given is None:
            return HeadOutput(logits)
        is_last = logits is returned and logits._version == self._version
        if self._withheld and not is_last:
            raise RuntimeError("the model no longer returns the output of its last layer.")
        self._is_last = is_last and given.dtype in _DTYPES
        if not self.makes_logits:
            self._memory = torch.empty(0, dtype=torch.float32, device="cpu")
        # From the vectors even if there are logits: observing must not change a digit.
        return HeadOutput(given, self._layer) if self._is_last else HeadOutput(logits)

    def _is_known(self) -> bool:
        return _compat.is_transformers(self._model) and _is_plain(self._model)

    def _product(self, layer: nn.Linear, input: Tensor) -> Tensor:
        """The layer's logits, written into the memory of the previous ones.

        Newly allocated memory is mapped page by page while it is written, which costs a quarter of
        the product itself.
        """
        flat = input.reshape(-1, input.shape[-1])
        n = len(flat) * layer.out_features
        if self._memory.numel() < n or self._memory.dtype != input.dtype:
            self._memory = torch.empty(0, dtype=torch.float32, device="cpu")  # not both at a time
            self._memory = input.new_empty(n)
        out = self._memory[:n].view(len(flat), layer.out_features)
        if (bias := bias_of(layer)) is None:
            torch.mm(flat, layer.weight.t(), out=out)
        else:
            torch.addmm(bias, flat, layer.weight.t(), out=out)
        return out.view(*input.shape[:-1], layer.out_features)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what its class defines, on possibly modified input."""
    changes = vars(module)["_forward_hooks"] or "forward" in vars(module)
    return not (changes or torch.is_autocast_enabled("cpu") or torch.is_grad_enabled())
