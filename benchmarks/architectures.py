"""The probe's findings for every causal language model of transformers, and the error of values.

    python benchmarks/architectures.py

Small models with random weights, in float32 on the CPU: those that the tests know, and one of every
class in `MODEL_FOR_CAUSAL_LM_MAPPING`, made small by the same sizes wherever its configuration has
them and by its own where these do not do. About 28 rows each (tokens of the prompt replaced and
deleted, earlier output replaced and deleted) are scored as ever, and held against one plain,
uncached forward of batch 1 per target token, with nothing after it where the probe says that the
model sees it, log-softmax in float64. A class that cannot be built is named with the reason.
"""

import argparse
import inspect
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from architectures import CONFIGS, build
from environment import environment

from captum_llm_ext.model import Scorer, TokenRow

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 400
# What configurations call their sizes; each takes those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "n_embed": 32,
    "dim": 32,
    "embed_dim": 32,
    "emb_dim": 32,
    "dim_model": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "dim_ff": 48,
    "d_inner": 48,
    "n_inner": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "dim_head": 8,
    "d_kv": 8,
    "d_head": 8,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "sliding_window": 6,
    "attention_window_size": 6,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "num_experts_per_token": 2,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "zero_expert_num": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
    "mamba_dt_rank": 4,
    "mamba_d_ssm": 64,
    "state_size": 8,
    "chunk_size": 4,
    "word_embed_proj_dim": 32,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "dropout": 0.0,
}
MAMBA_2 = {"num_heads": 8, "state_size": 8, "n_groups": 1, "head_dim": 8, "chunk_size": 4}
# model type -> settings beside these; None takes one away, so that the default stands.
LATENT = {"num_key_value_heads": 4, "head_dim": None}
OWN: dict[str, dict[str, Any]] = {
    "mamba2": MAMBA_2,
    **dict.fromkeys(
        [
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "youtu",
            "minicpm3",
        ],
        LATENT,
    ),
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_expand": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
    },
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 1,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,
        "feed_forward_size": 48,
        "attention_head_size": 8,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "kimi_linear": {"head_dim": None, "num_key_value_heads": 4, "q_lora_rank": None},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
}
# What decides how a model is asked.
FOUND = ("sees_ahead", "couples_rows", "mixes_lengths", "last_only", "draws", "jumps")
# The language part of those that may have any.
OF_ANY = {"fuyu": "persimmon"}


def rows() -> tuple[list[TokenRow], torch.Tensor]:
    """28 rows: tokens of prompt and output, replaced and deleted."""
    ids = torch.randint(4, VOCABULARY - 20, (18,), generator=torch.Generator().manual_seed(0))
    prompt, target = ids[:12].tolist(), ids[12:].tolist()
    found: list[TokenRow] = []

    def add(before: list[int], read: list[list[int]]) -> None:
        flat, places = list(before), []
        for piece in [*read, []]:
            places.append(len(flat) - 1)
            flat += piece
        found.append(TokenRow(tuple(flat), places))

    whole = [[token] for token in target[:-1]]
    add(prompt, whole)
    for i in range(1, len(prompt)):
        add([*prompt[:i], 3, *prompt[i + 1 :]], whole)
        add([*prompt[:i], *prompt[i + 1 :]], whole)
    for j in range(len(whole)):
        add(prompt, [*whole[:j], [3] if j % 2 else [], *whole[j + 1 :]])
    return found, torch.tensor(target)


@torch.no_grad()
def plain(
    model: torch.nn.Module, given: list[TokenRow], target: torch.Tensor, *, apart: bool
) -> torch.Tensor:
    """One uncached forward of batch 1 per row, or per target token if these are scored
    separately."""
    takes = "use_cache" in inspect.signature(model.forward).parameters
    arguments = {"use_cache": False} if takes else {}
    values = []
    for row in given:
        if apart:
            ids = [row.ids[: place + 1] for place in row.positions]
            logits = [model(input_ids=torch.tensor([x]), **arguments).logits[0, -1] for x in ids]
            said = torch.stack(logits)
        else:
            logits = model(input_ids=torch.tensor([row.ids]), **arguments).logits[0]
            said = logits[list(row.positions)]
        values.append(said.double().log_softmax(-1).gather(1, target[:, None])[:, 0])
    return torch.stack(values)


def small(kind: type) -> dict[str, Any]:
    """Settings of a small configuration of a class, and of its nested configurations."""
    own = OWN.get(kind.model_type, {})
    names = set(inspect.signature(kind.__init__).parameters) | {
        name for base in kind.__mro__ for name in vars(base).get("__annotations__", {})
    }
    names |= set(getattr(kind, "attribute_map", {}))
    given = {name: value for name, value in SIZES.items() if name in names}
    for name, sub in getattr(kind, "sub_configs", {}).items():
        sub = CONFIG_MAPPING[OF_ANY[kind.model_type]] if kind.model_type in OF_ANY else sub
        if getattr(sub, "model_type", None):
            given[name] = {**small(sub), "model_type": sub.model_type}
    return {k: v for k, v in (given | own).items() if v is not None}


def made(kind: type, model_class: Any) -> torch.nn.Module:
    # Of a model that also sees, the language part alone may be what the class takes.
    own = getattr(model_class, "config_class", None)
    kind = kind if own is None or issubclass(kind, own) else own
    config = kind(**small(kind))
    text = config.get_text_config()
    # Random weights of the usual size make a model that answers the same to everything.
    for name in ("initializer_range", "init_std", "initializer_factor"):
        if hasattr(text, name):
            setattr(text, name, 0.3)
    with torch.device("meta"):
        n = sum(p.numel() for p in model_class(config).parameters())
    if n > 100e6:
        raise ValueError(f"{n / 1e6:.0f} million parameters: a size has another name")
    torch.manual_seed(0)
    return model_class(config).eval()


def measured(model: torch.nn.Module) -> dict[str, Any]:
    """Findings of the probe, and the largest difference of values from plain forwards."""
    given, target = rows()
    scorer = Scorer(model, overhead=3)
    values = scorer.values(given, target)
    found = scorer.findings
    assert found is not None
    truth = plain(model, given, target, apart=found.step_by_step)
    ahead = plain(model, given[:1], target, apart=True)
    whole = plain(model, given[:1], target, apart=False)
    floor = scorer.noise_floor(given[0], target)
    return {
        "error": float((values - truth).abs().max()),
        # By plain forwards alone: how much what follows changes what is said.
        "ahead_by_plain_forwards": float((ahead - whole).abs().max()),
        **{
            name: getattr(found, name) for name in (*FOUND, "ahead", "coupling", "rounding", "kept")
        },
        "noise_floor": None if floor is None else float(floor.max()),
        "reads_on": scorer.n_positions < scorer.n_row_positions and not scorer.uses_packing,
        "packs": scorer.uses_packing,
    }


def main() -> None:
    """Prints one line per class and writes the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", help="model types; nothing is written then")
    chosen = parser.parse_args().only
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    todo: list[tuple[str, Any]] = [] if chosen else [(n, lambda n=n: build(n)) for n in CONFIGS]
    for kind, classes in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        for model_class in classes if isinstance(classes, tuple) else (classes,):
            if not chosen or kind.model_type in chosen:
                make = lambda kind=kind, cls=model_class: made(kind, cls)  # noqa: E731
                todo.append((f"{model_class.__name__} ({kind.model_type})", make))
    for name, make in todo:
        started = time.perf_counter()
        try:
            model = make()
            said = plain(model, *(lambda r, t: (r[:1], t))(*rows()), apart=True)
            if not bool(said.isfinite().all()):
                raise ValueError("values that are not finite")
        except Exception as error:  # whatever a class says of these sizes is the reason
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:250]
            print(f"{name:60} not built: {failed[name]}", flush=True)
            continue
        try:
            row = {"name": name, **measured(model)}
        except Exception as error:
            row = {"name": name, "failure": f"{type(error).__name__}: {error}"[:300]}
        found.append(row)
        seconds = time.perf_counter() - started
        if "failure" in row:
            print(f"{name:60} FAILED: {row['failure']}", flush=True)
            continue
        ways = [k for k in (*FOUND, "packs") if row[k]]
        print(f"{name:60} {row['error']:.1e} {' '.join(ways)}  {seconds:.0f} s", flush=True)
    errors = [row["error"] for row in found if "error" in row]
    print(
        f"{len(found)} models, {len(failed)} not built; largest error {max(errors, default=0):.1e}"
    )
    if not chosen:
        report = {**environment(seed=0), "unit": "nats", "rows": found, "not_built": failed}
        path = RESULTS / "architectures.json"
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
