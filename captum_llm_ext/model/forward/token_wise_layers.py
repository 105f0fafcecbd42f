"""The two ends of a model, where tokens are independent: equal ones are computed once.

Before the first attention a token depends only on its id and position, so equal ones are computed
once. After the last attention only tokens with a request are needed.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_llm_ext.model.exclusive import in_this_thread_only
from captum_llm_ext.model.forward.prefixes import distinct_pairs

# Expands the output of a layer's weights for some tokens, ``(…, n_some, size)``, to all.
Spread = Callable[[Tensor], Tensor]


def representatives(ids: Tensor, places: Tensor) -> tuple[Tensor, Spread]:
    """Representatives of the tokens of one sequence with equal id and equal position in their row.

    Args:
        ids, places: int64 ``(length,)``.

    Returns:
        Their positions, int64 ``(n,)``, and the expansion to all tokens.
    """
    pairs, back = distinct_pairs(ids, places)
    some = back.new_empty(pairs.shape[1])
    some[back] = torch.arange(len(back), device="cpu")
    return some, lambda x: x.index_select(-2, back.to(x.device))


def queried(some: Tensor, length: int) -> tuple[Tensor, Spread]:
    """Tokens of one sequence with a request; all others become 0 afterwards.

    Args:
        some: Their positions, int64 ``(n,)``.
        length: Length of the sequence.

    Returns:
        As for `representatives`.
    """

    def spread(x: Tensor) -> Tensor:
        whole = x.new_zeros(*x.shape[:-2], length, x.shape[-1])
        return whole.index_copy_(-2, some.to(x.device), x)

    return some, spread


@contextmanager
def computed_for_some(
    layer: nn.Module, some: Tensor, spread: Spread, length: int, is_time: Callable[[], bool]
) -> Generator[None]:
    """Computes a layer's weights for some of the tokens only, in passes of this thread.

    Args:
        layer: The layer; hooks are removed again.
        some: Positions of these tokens, int64 ``(n,)``.
        spread: Expands the result to all tokens.
        length: Number of tokens of the sequence read meanwhile.
        is_time: Returns whether the pass is at that end of the model.

    Raises:
        NotImplementedError: If a module does not return one vector per token.
    """
    cut: set[nn.Module] = set()

    def before(module: nn.Module, args: Any, arguments: Any) -> Any:
        x = args[0] if len(args) == 1 and not arguments else None
        if not isinstance(x, Tensor) or x.shape[:2] != (1, length) or not is_time():
            return None
        cut.add(module)
        return (x.index_select(1, some.to(x.device)),), {}

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if module not in cut:
            return None
        cut.remove(module)
        first, *others = output if isinstance(output, tuple) else (output,)  # scores of experts
        if not isinstance(first, Tensor) or first.dim() < 2 or first.shape[-2] != len(some):
            raise NotImplementedError(f"a {type(module).__name__} that returns no vector per token")
        return (spread(first), *others) if isinstance(output, tuple) else spread(first)

    on_entry, on_exit = in_this_thread_only(before), in_this_thread_only(after)
    hooks: list[RemovableHandle] = []
    try:
        # Elementwise parameters are not worth it.
        for module in layer.modules():
            if module is not layer and any(p.dim() > 1 for p in module.parameters()):
                hooks.append(module.register_forward_pre_hook(on_entry, with_kwargs=True))
                hooks.append(module.register_forward_hook(on_exit))
        yield
    finally:
        for hook in hooks:
            hook.remove()
