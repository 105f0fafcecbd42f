"""Every line that depends on a version of captum or transformers."""

import inspect
import itertools
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from captum.attr import Lime
from torch import Tensor, nn

_ADVICE = "give a causal language model, such as one from `AutoModelForCausalLM`."


def kept_logits(model: nn.Module) -> str | None:
    """How the model's forward can be asked for the logits of some positions only.

    Returns:
        ``"positions"`` (one row of positions per sequence), ``"count"`` (the last so many), or
        None (all logits always).
    """
    if "logits_to_keep" not in forward_arguments(model):
        return None
    if not is_transformers(model):
        return "count"
    # transformers 5.19 (2026-07): `slice_logits_to_keep` and with it 2-D `logits_to_keep`. Before,
    # a 2-D tensor indexes wrongly without an error. Drop when the lower bound passes it.
    from transformers import modeling_utils

    return "positions" if hasattr(modeling_utils, "slice_logits_to_keep") else "count"


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """Names that the model's forward takes explicitly."""
    return frozenset(_signature(model))


def _signature(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    inner = uncompiled(model)
    inner = inner.module if isinstance(inner, nn.DataParallel) else inner
    return inspect.signature(inner.forward).parameters


def is_transformers(model: nn.Module) -> bool:
    """Whether the model's forward is one of transformers."""
    return getattr(type(uncompiled(model)).forward, "__module__", "").startswith("transformers.")


def uncompiled(model: nn.Module) -> nn.Module:
    """What torch.compile wraps, or the model itself.

    torch 2.13 (2026): what was compiled before does not notice hooks that come later.
    """
    return getattr(model, "_orig_mod", model)


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has been at the model, or at a part of it."""
    if uncompiled(model) is not model:
        return True
    modules = model.modules()
    return any(hasattr(m, "_orig_mod") or vars(m).get("_compiled_call_impl") for m in modules)


def output_layer(model: nn.Module) -> nn.Linear | None:
    """The layer that makes logits, where it is a plain linear one that lies on a CPU."""
    layer = None if is_compiled(model) else embeddings(model, "get_output_embeddings")
    if type(layer) is not nn.Linear:
        return None
    plain = all(type(p) is nn.Parameter and p.device.type == "cpu" for p in layer.parameters())
    return layer if plain else None


def embeddings(model: nn.Module, method: str) -> Any:
    """What a method such as ``get_input_embeddings`` returns; None where the model has none."""
    find = getattr(model, method, None)
    try:
        return find() if callable(find) else None
    except NotImplementedError:  # transformers 5.23 (2026): classes that do not say where it is
        return None


def state_argument(model: nn.Module) -> str | None:
    """Under what name the model takes and returns its state (its cache), or None if it has none."""
    if not is_transformers(model):
        return None
    names = forward_arguments(model)
    # transformers calls it `cache` since 5.24 (2026), and still takes the older names.
    known = ("cache", "past_key_values", "cache_params")
    return next((name for name in known if name in names), None)


def why_not_read_on(model: nn.Module) -> str | None:
    """Why several tokens must not be read on from the model's state; None where nothing is known.

    transformers 5.23 (2026): these take a state to mean that one token follows, and give wrong
    numbers without an error. Drop one when its row in `tests/test_reuse.py` says that it is right.
    """
    kind = getattr(text_config(model), "model_type", None)
    broken = ("mamba", "falcon_mamba", "jamba", "bamba", "recurrent_gemma")
    return f"{kind} reads only one token on from a state" if kind in broken else None


def state_bytes(state: Any) -> int:
    """Size of a model's state."""
    layers = getattr(state, "layers", None) or [state]
    return sum(_tensor_bytes(vars(layer)) for layer in layers)


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_tensor_bytes(item) for item in cast(dict[Any, Any], value).values())
    return 0


def is_list_of_layers(state: Any) -> bool:
    """Whether a state is no more than a list of the states of layers, kept where they are used.

    transformers 5.23 (2026): `DynamicCache`. Others hold states beside, or move layers about.
    """
    plain = type(state).__name__ == "DynamicCache" and is_transformers_object(state)
    return plain and not getattr(state, "offloading", False)


def is_transformers_object(thing: object) -> bool:
    """Whether something is of a class of transformers."""
    return type(thing).__module__.startswith("transformers.")


def growing_layers() -> tuple[type[Any], ...]:
    """Kinds of states of a layer that get new keys and values by concatenation, never in place.

    transformers 5.23 (2026): what they keep beside is in dicts of tensors, which are written to.
    """
    from transformers import cache_utils

    names = ("DynamicLayer", "DynamicSlidingWindowLayer")
    names += (
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    )
    kinds = (getattr(cache_utils, name, None) for name in names)
    return tuple(kind for kind in kinds if kind is not None)


def keeps_every_id(state: Any) -> bool:
    """Whether a state is of keys and values alone, with those of every id that was read."""
    plain = growing_layers()[:1]
    return is_list_of_layers(state) and all(type(layer) in plain for layer in state.layers)


@contextmanager
def attention_of(
    model: nn.Module,
    name: str,
    attention: Callable[..., Any],
    mask: Callable[..., Any],
    instead_of: Collection[str],
) -> Generator[None]:
    """Has a model of transformers attend by other functions, in passes of this thread alone.

    Its configuration stays as it is: what this thread reads of it is another name. Everything is
    put back, come what may.

    Args:
        model: The model.
        name: What the functions are registered as meanwhile, with a number of its own.
        attention, mask: For `AttentionInterface` and `AttentionMaskInterface`.
        instead_of: Names of the implementations that may be replaced.

    Raises:
        NotImplementedError: If the model's attention is another one, or it is compiled: what was
            compiled for one attention would not notice the other.
    """
    # transformers 5.23 (2026): a plain set goes through checks that know their own names only.
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTIONS

    field = "_attn_implementation_internal"
    modules = (module for module in model.modules() if hasattr(module, "config"))
    configs = {id(module.config): module.config for module in modules}
    before = [(config, getattr(config, field, None)) for config in configs.values()]
    used = {str(implementation) for _, implementation in before if implementation is not None}
    if not used or not used <= set(instead_of) or is_compiled(model):
        how = ", ".join(sorted(used)) or "nothing that its configuration tells"
        raise NotImplementedError(f"attention of {type(model).__name__} by {how}")
    registries: list[dict[str, Any]] = [
        cast(Any, registry)._global_mapping for registry in (ATTENTIONS, MASKS)
    ]
    name = f"{name}_{next(_numbers)}"  # there may be another model in another thread
    own = {id(config): name for config, implementation in before if implementation is not None}
    try:
        for registry, function in zip(registries, (attention, mask), strict=True):
            registry[name] = function
        with _read_here_as(own):
            yield
    finally:
        for registry in registries:
            registry.pop(name, None)


class _Here(threading.local):
    """What this thread reads of configurations: names of implementations by a configuration's id.

    The latest come last.
    """

    def __init__(self) -> None:
        self.names: list[dict[int, str]] = []


_here = _Here()
_numbers = itertools.count()
_properties = threading.Lock()
_n_read_here = 0


@contextmanager
def _read_here_as(names: dict[int, str]) -> Generator[None]:
    """Has this thread read other attention implementations of some configurations.

    transformers 5.23 (2026): everything reads `_attn_implementation`, a property.
    """
    global _n_read_here
    from transformers import PreTrainedConfig

    kind: Any = PreTrainedConfig
    field = "_attn_implementation"
    with _properties:
        if _n_read_here == 0:
            setattr(kind, field, _Implementation(vars(kind)[field]))
        _n_read_here += 1
    _here.names.append(names)
    try:
        yield
    finally:
        _here.names.pop()
        with _properties:
            _n_read_here -= 1
            if _n_read_here == 0:
                setattr(kind, field, vars(kind)[field].usual)


class _Implementation:
    """A property that some threads read differently."""

    def __init__(self, usual: Any) -> None:
        self.usual = usual

    def __get__(self, config: Any, kind: Any = None) -> Any:
        for names in reversed(_here.names):
            if id(config) in names:
                return names[id(config)]
        return self.usual.__get__(config, kind)

    def __set__(self, config: Any, value: Any) -> None:
        self.usual.__set__(config, value)


def boolean_mask(*sizes: int, **arguments: Any) -> Tensor:
    """A mask of transformers, True where something is seen."""
    from transformers.masking_utils import sdpa_mask

    return cast(Tensor, cast(Any, sdpa_mask)(*sizes, **arguments))


def fixed_positions(model: nn.Module) -> int | None:
    """Beyond what length rows of several lengths must not even be tried together; None: not known.

    transformers 5.23 (2026): the rope types "dynamic" and "longrope" choose their frequencies by
    the longest row of a batch, for all that is in it.
    """
    config = text_config(model)
    rope: Any = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    most = getattr(config, "max_position_embeddings", None)
    limits = [
        cast(dict[str, Any], part).get("original_max_position_embeddings") or most
        for part in parts
        if cast(dict[str, Any], part).get("rope_type") in ("dynamic", "longrope")
    ]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def why_not_batched(model: nn.Module) -> str | None:
    """Why rows must not even be tried together; None where nothing is known.

    transformers 5.23 (2026): LLM.int8 looks for outliers in all rows of a batch, which a short
    comparison may not meet.
    """
    settings: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(settings, dict):
        is_int8 = cast(dict[str, Any], settings).get("load_in_8bit")
    else:
        is_int8 = getattr(settings, "load_in_8bit", False)
    return "LLM.int8 couples the rows of a batch" if is_int8 else None


def computes_roughly(model: nn.Module) -> bool:
    """Whether anything in a model is known to be coarser than float32: its rounding is measured."""
    fine = (torch.float32, torch.float64)
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    tensors = (*model.parameters(), *model.buffers())
    coarse = any(t.is_floating_point() and t.dtype not in fine for t in tensors)
    # torch 2.13 (2026): what is quantised keeps its weights packed, neither parameters nor buffers.
    packed = any("quantized" in type(module).__module__ for module in model.modules())
    # Others look like float32 and are not; what is only held by several processes is.
    kinds = (type(t.data) for t in tensors if not hasattr(t, "placements"))
    return coarse or packed or settings is not None or any(kind is not Tensor for kind in kinds)


def half_precision(model: nn.Module) -> bool:
    """Whether a model holds numbers of sixteen bits."""
    half = (torch.bfloat16, torch.float16)
    return any(t.dtype in half for t in (*model.parameters(), *model.buffers()))


def has_eager_attention(model: nn.Module) -> bool:
    """Whether the model makes all attention scores of a layer at once."""
    return getattr(text_config(model), "_attn_implementation", None) == "eager"


def free_memory() -> int | None:
    """Bytes of main memory that are free, or None where nobody tells."""
    try:
        import psutil  # accelerate 1.x brings it
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def called(model: nn.Module, ids: Tensor, **arguments: Any) -> Any:
    """What a model returns for ids ``(batch, length)``, whatever its first argument is called."""
    parameters = _signature(model)
    kinds = {parameter.kind for parameter in parameters.values()}
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if "input_ids" not in parameters and kinds & {*positional}:
        return model(ids, **arguments)
    return model(input_ids=ids, **arguments)


def sequence_logits(output: Any) -> Tensor:
    """The logits ``(batch, length, vocabulary)`` of a model's output.

    They are its ``logits``, the output itself where that is a tensor, or the first of a tuple.

    Raises:
        TypeError: If the output holds no such tensor.
    """
    logits = output
    if not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
        if logits is None and isinstance(output, dict):
            logits = cast(dict[str, Any], output).get("logits")
        elif logits is None and isinstance(output, tuple | list):
            logits = next(iter(cast("tuple[Any, ...]", output)), None)
    if isinstance(logits, Tensor) and logits.dim() == 4:
        # captum 0.9 (2026): some Llama 4 checkpoints return (1, 1, length, vocabulary).
        logits = logits[:, 0]
    if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
        shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise TypeError(
            f"the model returned {type(output).__name__}{shape} without `logits` of shape (batch, "
            f"length, vocabulary): {_ADVICE}"
        )
    return logits


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's language part, or None."""
    config: Any = getattr(model, "config", None)
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # transformers 5.23 (2026): several, of which none is known to be meant
        return config


def model_description(model: nn.Module) -> str:
    """A model's class, type of numbers and sizes; nothing that says where it was loaded from."""
    dtype = next((str(p.dtype) for p in model.parameters() if p.is_floating_point()), None)
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    # How it is stored, loaded or run is no part of what it is.
    moving = ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures")
    kept = {k: v for k, v in settings.items() if k not in moving and "distributed" not in k}
    content = repr([(name, kept[name]) for name in sorted(kept)])
    digest = blake2b(content.encode(), digest_size=4).hexdigest()
    # torch 2.13 (2026): fully_shard puts a class FSDPLlama… in the place of the model's own.
    mine = (c for c in type(uncompiled(model)).__mro__ if not _is_wrapped(c))
    return f"{next(mine).__name__} {dtype} {digest}"


def _is_wrapped(cls: type) -> bool:
    return any(base.__name__ == "FSDPModule" for base in cls.__mro__)


def readable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules, each while what it holds is where it can be read.

    accelerate 1.x: what is offloaded is "meta", and its hook brings it for the time of a pass.
    """
    from accelerate.utils import align_module_device

    for name, module in uncompiled(model).named_modules():
        with align_module_device(module):
            yield name.replace("_orig_mod.", ""), module


def summed_over_shards(parameter: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """A sum over a parameter's elements, of which other processes may hold some.

    torch 2.13 (2026): a `DTensor` tells by its placements what each process holds. All of them have
    to come here then.
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
            # One dimension of the mesh after the other: torch warns of several at once.
            how = [Partial() if i == dim else Replicate() for i in range(n)]
            found = cast(Any, DTensor.from_local(found, whole.device_mesh, how)).full_tensor()
    return found


def number_of_layers(model: nn.Module) -> int | None:
    """Number of layers that the model's configuration tells."""
    return getattr(text_config(model), "num_hidden_layers", None)


def outer_layers(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The first and the last layer, where the model can be looked into."""
    if is_compiled(model) or model_ranks(model):
        return None
    n = number_of_layers(model)
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n)
    # Modules come before their parts: layers before the experts of one.
    return next(((layers[0], layers[-1]) for layers in lists), None)


def vocabulary_size(model: nn.Module) -> int | None:
    """Number of token ids the model knows, or None where it does not tell."""
    size = getattr(text_config(model), "vocab_size", None)
    return size if isinstance(size, int) else None


def longest_sequence(model: nn.Module) -> int | None:
    """Number of positions the model was made for, or None where there is no limit."""
    config = text_config(model)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def check_causal(model: Any) -> None:
    """Refuses what is known to be no causal language model; the rest is seen when it is run.

    Raises:
        TypeError: If `model` is no module, is wrapped for training or without weights, or is an
            encoder-decoder, a model for masked words, or one without a language head.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        inner = getattr(model, "model", None)
        advice = f"give its `.model`, a {type(inner).__name__}."
        raise TypeError(
            f"the attribution method was made over a {name}, which is no `torch.nn.Module`: "
            f"{advice if isinstance(inner, nn.Module) else _ADVICE}"
        )
    if name in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise TypeError(
            f"the model is wrapped in {name}, which is made for training: give "
            "`accelerator.unwrap_model(model)`, or the model as it was before `prepare`."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(f"{name} is an encoder-decoder model, which is not supported: {_ADVICE}")
    _check_head(model)
    # accelerate 1.x: what is offloaded is on "meta" as well, until its hook brings it.
    is_empty = any(p.device.type == "meta" for p in model.parameters())
    if is_empty and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise TypeError(
            f"weights of {name} are on the `meta` device, where there are no numbers: load them, "
            "with `from_pretrained` or `model.to_empty(...)` and `load_state_dict`."
        )


def _check_head(model: nn.Module) -> None:
    """Refuses the models of transformers that say no next tokens."""
    inner = uncompiled(model)
    # peft's wrappers, and others that hold one module alone.
    while not is_transformers_object(inner) and len(held := [*inner.children()]) == 1:
        inner = held[0]
    if not is_transformers_object(inner):
        return
    # transformers 5.23 (2026): plain dicts from a model's type to names of classes.
    from transformers.models.auto import modeling_auto

    auto: Any = modeling_auto
    causal: Any = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    name, kind = type(inner).__name__, getattr(getattr(inner, "config", None), "model_type", None)
    if name in causal.values():
        return
    own = causal.get(kind) or next(
        (f"{stem}ForCausalLM" for stem in [name.removesuffix("Model")] if name != stem), None
    )
    own = own if own in causal.values() else None
    advice = f"load it as `{own}`, which `AutoModelForCausalLM` gives." if own else _ADVICE
    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    if name in masked or name.endswith("ForMaskedLM"):
        raise TypeError(
            f"{name} generates no text, it says what stands at a place and not what comes next: "
            f"{advice}"
        )
    bare = {x for names in auto.MODEL_MAPPING_NAMES.values() for x in _tuple(names)}
    if name in bare and name.endswith("Model") and inner is uncompiled(model):
        raise TypeError(f"{name} generates no text, it has no language head: {advice}")


def _tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def language_part(model: nn.Module) -> str | None:
    """Where in a model there is one that generates text, as an attribute; None if there is none."""
    parts = (n for n, child in model.named_children() if callable(getattr(child, "generate", None)))
    return next((f"model.{name}" for name in parts), None)


def input_device(model: nn.Module) -> torch.device:
    """Where the model wants its token ids."""
    embedding = embeddings(model, "get_input_embeddings")
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        # accelerate 1.x: weights may be on "meta" (offloaded) while inputs go to the hook's device.
        return torch.device(device)
    device = getattr(model, "device", None)
    if isinstance(device, torch.device) and device.type != "meta":
        return device
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def process_rank() -> int:
    """The number of this process within the process group."""
    return torch.distributed.get_rank()


def has_process_group() -> bool:
    """Whether torch knows of other processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def process_store(name: str) -> Any:
    """The store of the process group, with keys that begin with a name of their own.

    torch 2.13 (2026) has no public name for it.
    """
    from torch.distributed import distributed_c10d

    distributed: Any = distributed_c10d
    return distributed.PrefixStore(name, distributed._get_default_store())


def process_timeout() -> float:
    """Seconds that the processes of a group wait for one another."""
    store: Any = process_store("")
    return float(store.timeout.total_seconds())


def all_gathered(value: Any) -> list[Any]:
    """What each process of the group gives, by its number."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def model_ranks(model: nn.Module) -> tuple[int, ...]:
    """The processes that hold the model together, this one among them; none where one has it all.

    transformers 5.23 (2026): ``distributed_config=`` makes parameters `DTensor` and keeps the mesh
    of one copy of the model; fully_shard of torch has the parameters' own mesh alone.
    """
    # captum 0.9 (2026): what stands for a model that an API serves has no parameters.
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    meshes = (getattr(p, "device_mesh", None) for p in parameters)
    mesh: Any = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is None:
        return ()
    whole: Any = getattr(uncompiled(model), "_device_mesh", None) or mesh
    ranks = tuple(int(rank) for rank in whole.mesh.flatten().tolist())
    return ranks if len(ranks) > 1 else ()


def end_token_ids(model: nn.Module) -> Any:
    """The model's end-of-text ids as its generation configuration has them, or None."""
    return getattr(getattr(model, "generation_config", None), "eos_token_id", None)


def is_generation_config(thing: object) -> bool:
    """Whether something is a `transformers.GenerationConfig`."""
    return any(base.__name__ == "GenerationConfig" for base in type(thing).__mro__)


def generation_settings(config: Any) -> dict[str, Any]:
    """What a generation configuration says; None says nothing.

    transformers 5.0 (2025): fields that were not given are None. Before, they held defaults.
    """
    if config is None:
        return {}
    hidden = ("transformers_version",)
    items = config.to_dict().items()
    return {k: v for k, v in items if v is not None and not k.startswith("_") and k not in hidden}


def defaults_for_sampling() -> dict[str, Any]:
    """What generation chooses at random by, where nobody says anything.

    transformers 5.23 (2026) has no public name for them.
    """
    from transformers import GenerationConfig

    defaults: dict[str, Any] = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    return {k: v for k, v in defaults.items() if k in ("temperature", "top_k", "top_p")}


def arguments_for_generate(model: nn.Module) -> dict[str, Any]:
    """What keeps ``generate`` from warnings, and from waiting for processes that do not call it."""
    arguments = _padding_for_generate(model)
    if model_ranks(model):
        # transformers 5.23 (2026) asks all processes there are whether they are through, where
        # copies of a model are sharded. Those of one copy draw the same, and end together.
        arguments["synced_gpus"] = False
    return arguments


def _padding_for_generate(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "generation_config", None)
    if config is None or getattr(config, "pad_token_id", None) is not None:
        return {}
    end = end_token_ids(model)
    first = cast(Any, end[0] if isinstance(end, list) and end else end)
    return {} if first is None or isinstance(first, list) else {"pad_token_id": int(first)}


def lime_settings(method: Lime) -> dict[str, Any] | None:
    """Penalty, its weight and the kernel's width of a `Lime`, or None if it is no standard one.

    captum 0.9 (2026) keeps them in the construction arguments of its scikit-learn wrappers and in
    the closure of its kernel; none of scikit-learn is needed to read them.
    """
    standard = Lime(method.forward_func)
    penalties = {"SkLearnLasso": "l1", "SkLearnRidge": "l2", "SkLearnLinearRegression": None}
    model: Any = method.interpretable_model
    arguments = dict(getattr(model, "construct_kwargs", {}))
    alpha = arguments.pop("alpha", 1.0)
    name = type(model).__name__
    kernel: Any = method.similarity_func
    if (
        name not in penalties
        or arguments
        or getattr(kernel, "__qualname__", "") != standard.similarity_func.__qualname__
        or method.perturb_func is not standard.perturb_func
    ):
        return None
    settings = inspect.getclosurevars(kernel).nonlocals
    if settings.get("distance_mode") != "cosine":
        return None
    width = float(settings["kernel_width"])
    return {"penalty": penalties[name], "alpha": float(alpha), "kernel_width": width}


def integration_rules() -> tuple[str, ...]:
    """Names of the rules by which captum integrates."""
    from captum.attr._utils import approximation_methods

    return tuple(approximation_methods.SUPPORTED_METHODS)


def integration_points(rule: str, n_steps: int) -> tuple[list[float], list[float]]:
    """Where between 0 and 1 captum evaluates an integrand by a rule, and the weights of the sum.

    captum 0.9 (2026): `approximation_parameters` is no public name.
    """
    from captum.attr._utils.approximation_methods import approximation_parameters

    weights, points = approximation_parameters(rule)
    return list(points(n_steps)), list(weights(n_steps))


def versions() -> dict[str, str | None]:
    """Versions of the packages that numbers depend on; None for one that is run uninstalled."""
    found: dict[str, str | None] = {}
    for name in ("captum-llm-ext", "captum", "torch", "transformers", "accelerate"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def model_source(model: Any) -> tuple[str | None, str | None]:
    """Where a transformers model came from.

    Returns:
        Its name, of a local folder the last part; and the revision (commit) of the repository
        that it was loaded from. None for what is not known.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None, None
    if Path(name).exists():
        return Path(name).resolve().name, None
    # transformers 5.3 kept the commit; 5.23 (2026) does not: then only the cache tells it.
    revision = getattr(config, "_commit_hash", None) or _only_revision(name)
    return name, revision


def note_revision(model: Any, revision: str) -> None:
    """Lets `model_source` tell the commit that a model was loaded from.

    Args:
        model: One that was just loaded from a repository; nothing is noted of a folder.
        revision: The branch, tag or commit that was asked for.
    """
    from huggingface_hub import try_to_load_from_cache

    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if config is None or not isinstance(name, str) or Path(name).exists():
        return
    # transformers 5.23 (2026) forgets the commit; the cache has it in the path of every file.
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    config._commit_hash = Path(found).parent.name if isinstance(found, str) else revision


def _only_revision(name: str) -> str | None:
    """The one commit of a repository that the cache holds; None if there are none or several."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    found = [path.name for path in folder.glob("*")]
    return found[0] if len(found) == 1 else None
