"""Tiny sizes by configuration field: one set that serves most families.

A configuration of transformers declares its fields; each that stands here gets the value here, and
a family's recipe (`moescope.probe.zoo.recipes`) says only what is different. The values are chosen
so that nothing passes by accident: 3 layers of which the first is dense where a family mixes dense
and routed layers, 8 experts of which 2 are selected, groups of which one is kept, a scale that is
not 1, and normalization on.
"""

from __future__ import annotations

from typing import Any, Final

NUM_LAYERS: Final = 3
NUM_EXPERTS: Final = 8
TOP_K: Final = 2
VOCABULARY: Final = 128
#: Ids 0..4 are kept for padding, begin, end and the placeholders of other modalities.
FIRST_PLAIN_TOKEN: Final = 5

#: Field of a configuration -> its tiny value.
SIZES: Final[dict[str, Any]] = {
    # the model as a whole
    "vocab_size": VOCABULARY, "hidden_size": 64, "d_model": 64, "intermediate_size": 32,
    "num_hidden_layers": NUM_LAYERS, "num_layers": NUM_LAYERS, "n_layers": NUM_LAYERS,
    "max_position_embeddings": 128, "max_seq_len": 128, "sliding_window": 8,
    "sliding_window_size": 8, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_mtp_layers": 0, "num_nextn_predict_layers": 0,
    # attention
    "num_attention_heads": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "o_lora_rank": 16, "o_groups": 2,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
    "d_rel": 4, "rel_extent": 32, "max_window_layers": 2,
    # sparse, linear and state-space attention
    "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "linear_head_dim": 16,
    "linear_num_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 2,
    "short_conv_kernel_size": 2, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_chunk_size": 16,
    "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "chunk_size": 16,
    # routed experts
    "num_experts": NUM_EXPERTS, "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS, "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K, "moe_topk": TOP_K, "moe_k": TOP_K, "top_k_experts": TOP_K,
    "n_group": 2, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 1.7, "route_scale": 1.7, "router_scaling_factor": 1.7,
    "moe_routed_scaling_factor": 1.7, "moe_router_scaling_factor": 1.7,
    "moe_intermediate_size": 32, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 32,
    # shared experts
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 32, "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "share_expert_dim": 32, "dense_intermediate_size": 32, "intermediate_size_mlp": 32,
    "prefix_dense_intermediate_size": 32,
    # which layers are routed
    "first_k_dense_replace": 1, "num_dense_layers": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "mlp_only_layers": [0],
}  # fmt: skip
