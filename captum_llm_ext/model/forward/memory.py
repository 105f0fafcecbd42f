"""How many rows fit into memory, and the fixed cost of a pass: from sizes, not from timing."""

import torch
from torch import nn

from captum_llm_ext import _compat

# A CPU gains nothing from batches beyond its caches, a GPU from larger ones. Chosen, not measured.
_TOKENS_PER_BATCH = {"cpu": 4096}
_TOKENS_ELSEWHERE = 65536  # on other devices; chosen, not measured
_CPU_BUDGET = 2**30  # bytes a batch may take on a CPU at most; chosen, not measured
# Rows of a pack attend one after another, so more gain nothing. Chosen, not measured.
_IDS_PER_PACK = {"cpu": 2048}
# Seconds to start a layer, however small; operations per second; positions whose arithmetic takes
# as long as reading the weights. Orders of magnitude suffice.
_LAYER_START = 3e-4
_SPEED = {"cpu": 8e10}
_SPEED_ELSEWHERE = 2e14
_BALANCE = {"cpu": 32}
_BALANCE_ELSEWHERE = 128


class Memory:
    """Memory limits of a batch.

    Args:
        model: The model.
        device: The model's input device.
        kept: How logits of some positions can be requested, see `_compat.kept_logits`.
        n_target: Number of target tokens that a row predicts.
        state_bytes: Bytes of prefix cache per position; None: estimated from the model's sizes.
        budget: Bytes a batch may take; None: from the free memory.
        shares_cache: Whether rows share the prefix cache without copies.
        makes_logits: Whether logits are materialised.
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
        # Per position: logits, and their reduction.
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
        """Number of rows that fit.

        Args:
            longest: Number of ids of the longest row.
            before: Number of ids in the prefix cache of each.
        """
        new = longest - before
        kept = self._n_target if self._kept == "positions" else new
        # Logits, and a layer's activations: measured peaks are below 24 vectors per token.
        row = kept * self._logits
        row += 24 * new * self._hidden * max(self._itemsize, 4)
        # A mask, and the scores themselves if attention materialises them.
        row += new * longest * (8 + self._eager * self._heads * (self._itemsize + 4))
        budget = self._budget
        if before:
            row += (new if self._shares else longest) * self._state
            budget -= 3 * before * self._state  # the source of the rows' copies, and its source
        return max(1, min(budget // row, self._tokens // new))

    def most_packed(self, longest: int, before: int) -> tuple[int, int]:
        """How many ids and how many rows a pack may have.

        Args:
            longest: Number of ids of the longest row.
            before: Number of ids in the prefix cache of each.
        """
        # As in `most_rows`, plus the mask of each id.
        each = 24 * self._hidden * max(self._itemsize, 4) + self._state + 2 * longest
        each += 0 if self._kept == "positions" else self._logits
        row = max(1, self._n_target * self._logits if self._kept == "positions" else 1)
        half = (self._budget - 3 * before * self._state) // 2
        most_ids = min(half // each, _IDS_PER_PACK.get(self._device.type, self._tokens))
        return max(1, most_ids), max(1, half // row)


def overhead(model: nn.Module, device: torch.device) -> int:
    """Fixed cost of a pass, in positions."""
    return _BALANCE.get(device.type, _BALANCE_ELSEWHERE) + start(model, device)


def start(model: nn.Module, device: torch.device) -> int:
    """Cost of starting every layer once, in positions; about that of a packed row."""
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
