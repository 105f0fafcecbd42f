"""What a model's last layer does after its attention, for some tokens alone.

Of all others the last layer's keys and values are needed, and nothing that comes after them: no
token sees another one there any more.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def for_some(
    layer: nn.Module, needed: Tensor, length: int, has_attended: Callable[[], bool]
) -> Generator[None]:
    """Has the weights of a layer see some of the tokens alone; the others are 0 to what follows.

    Args:
        layer: The last one. Its hooks are taken off again.
        needed: Places of these tokens, int64 ``(n,)``.
        length: Number of tokens of the one sequence that is read meanwhile.
        has_attended: Whether the layer has.

    Raises:
        NotImplementedError: If what a module returns is not one vector per token.
    """
    cut: set[nn.Module] = set()

    def before(module: nn.Module, args: Any, arguments: Any) -> Any:
        x = args[0] if len(args) == 1 and not arguments else None
        if not isinstance(x, Tensor) or x.shape[:2] != (1, length) or not has_attended():
            return None
        cut.add(module)
        return (x.index_select(1, needed.to(x.device)),), {}

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if module not in cut:
            return None
        cut.remove(module)
        if not isinstance(output, Tensor) or output.shape[:2] != (1, len(needed)):
            raise NotImplementedError(f"a {type(module).__name__} that returns more than vectors")
        whole = output.new_zeros(1, length, *output.shape[2:])
        return whole.index_copy_(1, needed.to(output.device), output)

    hooks: list[RemovableHandle] = []
    try:
        # Vectors that are added or multiplied are not worth it.
        for module in layer.modules():
            if module is not layer and any(p.dim() > 1 for p in module.parameters()):
                hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
                hooks.append(module.register_forward_hook(after))
        yield
    finally:
        for hook in hooks:
            hook.remove()
