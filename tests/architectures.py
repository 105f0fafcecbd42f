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

_NO_ATTENTION = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"))
_MAMBA_2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
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
    "mamba": ("MambaConfig", {"state_size": 4, **_NO_ATTENTION}),
    "falcon mamba": ("FalconMambaConfig", {"state_size": 4, **_NO_ATTENTION}),
    "jamba, recurrent hybrid": (
        "JambaConfig",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "bamba, recurrent hybrid": (
        "BambaConfig",
        {"attn_layer_indices": [1], "mamba_chunk_size": 4, **_MAMBA_2},
    ),
    "granite 4, recurrent hybrid": (
        "GraniteMoeHybridConfig",
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
            "mamba_expand": 2,
            "mamba_chunk_size": 4,
            **_MAMBA_2,
        },
    ),
    "nemotron-h, recurrent hybrid": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "num_hidden_layers": None,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 4,
        },
    ),
    "qwen 3 next, linear attention": (
        "Qwen3NextConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            **_LINEAR,
        },
    ),
    "qwen 3.5, linear attention": ("Qwen3_5TextConfig", _LINEAR),
    "minimax, lightning attention": (
        "MiniMaxConfig",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 4,
        },
    ),
    "deepseek v3, latent attention": (
        "DeepseekV3Config",
        {
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "head_dim": None,
            "num_key_value_heads": 4,
        },
    ),
    "llama 4, chunked attention": (
        "Llama4TextConfig",
        {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 6,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 4,
        },
    ),
    "gemma 3n, shared states": (
        "Gemma3nTextConfig",
        {
            "sliding_window": 6,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 400,
            "num_kv_shared_layers": 2,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [48] * 4,
        },
    ),
    "phi 3": ("Phi3Config", {}),
    "cohere 2, sliding window": ("Cohere2Config", {"sliding_window": 6}),
}

# Attention by lines of their own, not by transformers' attention functions.
OWN_ATTENTION = {
    "falcon": ("FalconConfig", {"multi_query": True, "head_dim": None}),
    "falcon, alibi": ("FalconConfig", {"alibi": True, "multi_query": False, "head_dim": None}),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "gpt-j": (
        "GPTJConfig",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    ),
    "gpt-neo, local attention": (
        "GPTNeoConfig",
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
        },
    ),
}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    config_name, settings = (CONFIGS | OWN_ATTENTION)[name]
    given = {k: v for k, v in (_COMMON | settings).items() if v is not None}
    config = getattr(transformers, config_name)(**given)
    # Random weights of the usual size make a model that answers the same to everything.
    config.initializer_range = 0.3
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if dtype == torch.float64:  # grouped products of experts know no float64
        model.set_experts_implementation("eager")
    return model
