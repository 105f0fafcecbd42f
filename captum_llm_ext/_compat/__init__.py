"""Every line that depends on a version of captum, transformers or accelerate."""

from captum_llm_ext._compat.attention import (
    additive_mask,
    attention_of,
    boolean_mask,
    has_eager_attention,
)
from captum_llm_ext._compat.batches import (
    fixed_positions,
    free_memory,
    used_memory,
    why_not_batched,
)
from captum_llm_ext._compat.causal import check_causal, is_masked, language_part
from captum_llm_ext._compat.forward import (
    called,
    forward_arguments,
    input_device,
    keeping_logits,
    kept_logits,
    sequence_logits,
    uncached,
)
from captum_llm_ext._compat.generation import (
    arguments_for_generate,
    defaults_for_sampling,
    end_ids,
    generates_by_row,
    generation_settings,
    is_generation_config,
)
from captum_llm_ext._compat.identity import (
    model_description,
    model_source,
    note_revision,
    readable_modules,
    versions,
)
from captum_llm_ext._compat.layers import decoder_layers, embeddings, outer_layers, output_layer
from captum_llm_ext._compat.methods import (
    integration_points,
    integration_rules,
    lime_settings,
    selected,
)
from captum_llm_ext._compat.model import (
    is_compiled,
    is_transformers,
    is_transformers_object,
    longest_sequence,
    number_of_layers,
    text_config,
    uncompiled,
    vocabulary_size,
)
from captum_llm_ext._compat.precision import computes_roughly, half_precision
from captum_llm_ext._compat.processes import (
    all_gathered,
    has_process_group,
    model_ranks,
    process_rank,
    process_store,
    process_timeout,
    summed_over_shards,
)
from captum_llm_ext._compat.recurrent import values_mixed_by
from captum_llm_ext._compat.states import (
    growing_layers,
    is_list_of_layers,
    keeps_every_id,
    state_argument,
    state_bytes,
    why_not_read_on,
)

__all__ = [
    "additive_mask",
    "all_gathered",
    "arguments_for_generate",
    "attention_of",
    "boolean_mask",
    "called",
    "check_causal",
    "computes_roughly",
    "decoder_layers",
    "defaults_for_sampling",
    "embeddings",
    "end_ids",
    "fixed_positions",
    "forward_arguments",
    "free_memory",
    "generates_by_row",
    "generation_settings",
    "growing_layers",
    "half_precision",
    "has_eager_attention",
    "has_process_group",
    "input_device",
    "integration_points",
    "integration_rules",
    "is_compiled",
    "is_generation_config",
    "is_list_of_layers",
    "is_masked",
    "is_transformers",
    "is_transformers_object",
    "keeping_logits",
    "keeps_every_id",
    "kept_logits",
    "language_part",
    "lime_settings",
    "longest_sequence",
    "model_description",
    "model_ranks",
    "model_source",
    "note_revision",
    "number_of_layers",
    "outer_layers",
    "output_layer",
    "process_rank",
    "process_store",
    "process_timeout",
    "readable_modules",
    "selected",
    "sequence_logits",
    "state_argument",
    "state_bytes",
    "summed_over_shards",
    "text_config",
    "uncached",
    "uncompiled",
    "used_memory",
    "values_mixed_by",
    "versions",
    "vocabulary_size",
    "why_not_batched",
    "why_not_read_on",
]
