"""How many rows fit, and what a pass costs beside its positions: from sizes, not from timing."""

import torch
from torch import nn

from captum_llm_ext import _compat

# A CPU gains nothing from batches beyond its caches, a GPU goes on gaining for longer.
_TOKENS_PER_BATCH = {"cpu": 4096}
_TOKENS_ELSEWHERE = 65536
_CPU_BUDGET = 2**30
# In a pack, whose rows attend one after another, there is nothing to gain from more.
_IDS_PER_PACK = {"cpu": 2048}
# Seconds a layer takes to start, however little it does; operations a second; positions whose
# arithmetic takes as long as reading the weights. Orders of magnitude are enough.
_LAYER_START = 3e-4
_SPEED = {"cpu": 8e10}
_SPEED_ELSEWHERE = 2e14
_BALANCE = {"cpu": 32}
_BALANCE_ELSEWHERE = 128


class Memory:
    """What a batch may hold.

    Args:
        model: The model.
        device: Where it reads its ids.
        kept: How many logits it can be asked for, as `_compat.kept_logits` says.
        n_target: Number of target tokens that a row says.
        state_bytes: Bytes the model remembers of one position; None: estimated from its sizes.
        budget: Bytes a batch may take; None: of what is free now.
        shares_cache: Whether rows have no copies of what was read before.
        makes_logits: Whether logits are ever there.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        kept: str | None,
        n_target: int,
        state_bytes: int | None,
        budget: int | None = None,
        shares_cache: bool = False,
        makes_logits: bool = True,
    ) -> None:
        config = _compat.text_config(model)
        self._itemsize = next((p.element_size() for p in model.parameters()), 4)
        self._hidden = int(getattr(config, "hidden_size", 0) or 1024)
        self._heads = int(getattr(config, "num_attention_heads", 0) or 1)
        # Of one position: logits, and what they are reduced in.
        vocabulary = _compat.vocabulary_size(model) or 2**15
        self._logits = vocabulary * (self._itemsize + 6) if makes_logits else 0
        self._eager = _compat.has_eager_attention(model)
        self._shares = shares_cache
        self._device, self._kept, self._n_target = device, kept, n_target
        layers = int(getattr(config, "num_hidden_layers", 0) or 1)
        self._state = state_bytes or 2 * layers * self._hidden * self._itemsize
        self._tokens = _TOKENS_PER_BATCH.get(device.type, _TOKENS_ELSEWHERE)
        self._budget = batch_budget(device) if budget is None else budget

    def most_rows(self, longest: int, before: int) -> int:
        """How many rows fit.

        Args:
            longest: Number of ids of the longest row.
            before: Number of ids of each that the model has read before.
        """
        new = longest - before
        kept = self._n_target if self._kept == "positions" else new
        # Logits, and a layer's activations: measured peaks lie below 24 vectors per token.
        row = kept * self._logits
        row += 24 * new * self._hidden * max(self._itemsize, 4)
        # A mask, and the scores themselves where attention makes them.
        row += new * longest * (8 + self._eager * self._heads * (self._itemsize + 4))
        budget = self._budget
        if before:
            row += (new if self._shares else longest) * self._state
            budget -= 3 * before * self._state  # what the rows are copied from, and what that was
        return max(1, min(budget // row, self._tokens // new))

    def most_packed(self, longest: int, before: int) -> tuple[int, int]:
        """How many ids and how many rows a pack may have.

        Args:
            longest: Number of ids of the longest row.
            before: Number of ids of each that the model has read before.
        """
        # As in `most_rows`, and what is seen of each id.
        each = 24 * self._hidden * max(self._itemsize, 4) + self._state + 2 * longest
        each += 0 if self._kept == "positions" else self._logits
        row = max(1, self._n_target * self._logits if self._kept == "positions" else 1)
        half = (self._budget - 3 * before * self._state) // 2
        most_ids = min(half // each, _IDS_PER_PACK.get(self._device.type, self._tokens))
        return max(1, most_ids), max(1, half // row)


def overhead(model: nn.Module, device: torch.device) -> int:
    """What a pass costs beside its positions, in positions."""
    return _BALANCE.get(device.type, _BALANCE_ELSEWHERE) + start(model, device)


def start(model: nn.Module, device: torch.device) -> int:
    """What starting every layer once costs, in positions; about that of a row that is packed."""
    config = _compat.text_config(model)
    layers = int(getattr(config, "num_hidden_layers", 0) or 1)
    operations = 2 * max(1, sum(p.numel() for p in model.parameters()))
    speed = _SPEED.get(device.type, _SPEED_ELSEWHERE)
    return round(layers * _LAYER_START * speed / operations)


def batch_budget(device: torch.device) -> int:
    """Bytes a batch may take."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + cached) // 2
    free = _compat.free_memory()
    return _CPU_BUDGET if free is None else min(_CPU_BUDGET, free // 4)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("out of memory", "not enough memory", "can't allocate memory")
    )
