"""One small model with random weights per kind of architecture."""

import torch
import transformers

_COMMON = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# name -> (configuration class, settings beside the common ones; None removes one)
CONFIGS = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "llama": ("LlamaConfig", {}),
    "mistral, sliding window": ("MistralConfig", {"sliding_window": 6}),
    "gemma 2, sliding window": (
        "Gemma2Config",
        {"sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 30.0},
    ),
    "gemma 3, sliding window": (
        "Gemma3TextConfig",
        {"sliding_window": 6, "query_pre_attn_scalar": 8, "num_hidden_layers": 3},
    ),
    "qwen 3": ("Qwen3Config", {}),
    "qwen 3, mixture of experts": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "opt": (
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "intermediate_size": None, "dropout": 0.0},
    ),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "falcon-h1, recurrent hybrid": (
        "FalconH1Config",
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 4,
        },
    ),
    "lfm 2, convolution hybrid": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    ),
    "recurrentgemma, recurrent hybrid": (
        "RecurrentGemmaConfig",
        {"lru_width": 32, "attention_window_size": 6, "num_hidden_layers": 3},
    ),
    "mamba 2": (
        "Mamba2Config",
        {"num_heads": 8, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 4},
    ),
}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    config_name, settings = CONFIGS[name]
    given = {k: v for k, v in (_COMMON | settings).items() if v is not None}
    config = getattr(transformers, config_name)(**given)
    # Random weights of the usual size make a model that answers the same to everything.
    config.initializer_range = 0.3
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()
