"""Process groups of torch: communication between processes, and sharded models."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_llm_ext._compat.model import uncompiled


def process_rank() -> int:
    """The rank of this process."""
    return torch.distributed.get_rank()


def has_process_group() -> bool:
    """Whether a process group is initialised."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def process_store(name: str) -> Any:
    """The store of the process group, with a prefix for keys.

    torch 2.13 (2026) has no public name for it.
    """
    from torch.distributed import distributed_c10d

    distributed: Any = distributed_c10d
    return distributed.PrefixStore(name, distributed._get_default_store())


def process_timeout() -> float:
    """Timeout of the process group, in seconds."""
    store: Any = process_store("")
    return float(store.timeout.total_seconds())


def all_gathered(value: Any) -> list[Any]:
    """The value of every process, by rank (all-gather)."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def model_ranks(model: nn.Module) -> tuple[int, ...]:
    """Ranks among which the model is sharded; empty if each has all of it.

    transformers 5.23 (2026): ``distributed_config=`` makes parameters `DTensor` and keeps the mesh
    of one copy of the model; fully_shard of torch has the parameters' own mesh alone.
    """
    # captum 0.9 (2026): the placeholder of an API's model has no parameters.
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    meshes = (getattr(p, "device_mesh", None) for p in parameters)
    mesh: Any = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is None:
        return ()
    whole: Any = getattr(uncompiled(model), "_device_mesh", None) or mesh
    ranks = tuple(int(rank) for rank in whole.mesh.flatten().tolist())
    return ranks if len(ranks) > 1 else ()


def summed_over_shards(parameter: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum over all shards of a parameter, from that of this one.

    torch 2.13 (2026): the placements of a `DTensor` define what each process holds. All of them
    must call this.
    """
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return total(parameter)
    from torch.distributed.tensor import DTensor, Partial, Replicate

    whole: Any = cast(Any, parameter)
    found: Tensor = total(whole.to_local())
    n = len(placements)
    for dim, placement in enumerate(placements):
        if not placement.is_replicate():
            # One mesh dimension after another, since torch warns of several at once.
            how = [Partial() if i == dim else Replicate() for i in range(n)]
            found = cast(Any, DTensor.from_local(found, whole.device_mesh, how)).full_tensor()
    return found
