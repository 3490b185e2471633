"""Names, arguments and results of torch_npu's operators, as torch's schema language writes them."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

SCHEMAS: Final = (
    # Quantisation.
    (
        "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, "
        'int? dst_type=None, str quant_mode="pertoken", float dst_type_max=0.0) '
        "-> (Tensor, Tensor)"
    ),
    (
        "npu_dynamic_quant_asymmetric(Tensor input, *, Tensor? smooth_scales=None, "
        'Tensor? group_index=None, int? dst_type=None, str quant_mode="pertoken", '
        "float dst_type_max=0.0) -> (Tensor, Tensor, Tensor)"
    ),
    (
        "npu_quantize(Tensor input, Tensor scales, Tensor? zero_points, int dtype, int axis=1, "
        "bool div_mode=True) -> Tensor"
    ),
    "npu_trans_quant_param(Tensor scale, Tensor? offset=None, int? round_mode=0) -> Tensor",
    "npu_convert_weight_to_int4pack(Tensor weight, int inner_k_tiles=0) -> Tensor",
    # SwiGLU, alone and with what stands around it.
    "npu_swiglu(Tensor input, int dim=-1) -> Tensor",
    (
        "npu_dequant_swiglu_quant(Tensor x, *, Tensor? weight_scale=None, "
        "Tensor? activation_scale=None, Tensor? bias=None, Tensor? quant_scale=None, "
        "Tensor? quant_offset=None, Tensor? group_index=None, bool activate_left=False, "
        "int quant_mode=0, int? dst_type=None, int? round_mode=None, int? activate_dim=None, "
        "int swiglu_mode=0, float clamp_limit=7.0, float glu_alpha=1.702, float glu_bias=1.0) "
        "-> (Tensor, Tensor)"
    ),
    (
        "npu_swiglu_quant(Tensor x, *, Tensor? smooth_scales=None, Tensor? offsets=None, "
        "Tensor? group_index=None, bool activate_left=False, int quant_mode=0, "
        "int group_list_type=0, ScalarType? dst_type=None) -> (Tensor, Tensor)"
    ),
    # Grouped matrix products.
    (
        "npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, "
        "Tensor[]? scale=None, Tensor[]? offset=None, Tensor[]? antiquant_scale=None, "
        "Tensor[]? antiquant_offset=None, Tensor[]? per_token_scale=None, "
        "Tensor? group_list=None, Tensor[]? activation_input=None, "
        "Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None, "
        "int? split_item=0, int? group_type=None, int? group_list_type=0, int? act_type=0, "
        "int[]? tuning_config=None, int? output_dtype=None, int? x_dtype=None, "
        "int? weight_dtype=None, int? scale_dtype=None, int? per_token_scale_dtype=None) "
        "-> Tensor[]"
    ),
    (
        "npu_grouped_matmul.List(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, "
        "Tensor[]? scale=None, Tensor[]? offset=None, Tensor[]? antiquant_scale=None, "
        "Tensor[]? antiquant_offset=None, Tensor[]? per_token_scale=None, int[]? group_list=None, "
        "Tensor[]? activation_input=None, Tensor[]? activation_quant_scale=None, "
        "Tensor[]? activation_quant_offset=None, int? split_item=0, int? group_type=None, "
        "int? group_list_type=0, int? act_type=0, ScalarType? output_dtype=None) -> Tensor[]"
    ),
    (
        "npu_grouped_matmul_swiglu_quant(Tensor x, Tensor weight, Tensor group_list, "
        "Tensor weight_scale, Tensor x_scale, *, Tensor? bias=None, Tensor? offset=None) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    (
        "npu_grouped_matmul_swiglu_quant_v2(Tensor x, Tensor[] weight, Tensor[] weight_scale, "
        "Tensor x_scale, Tensor group_list, *, Tensor? smooth_scale=None, "
        "Tensor[]? weight_assist_matrix=None, Tensor? bias=None, int? dequant_mode=0, "
        "int? dequant_dtype=6, int? quant_mode=0, int? quant_dtype=1, int? group_list_type=0, "
        "int[]? tuning_config=None, int? x_dtype=None, int? weight_dtype=None, "
        "int? weight_scale_dtype=None, int? x_scale_dtype=None) -> (Tensor, Tensor)"
    ),
    (
        "npu_grouped_matmul_finalize_routing(Tensor x, Tensor w, Tensor group_list, *, "
        "Tensor? scale=None, Tensor? bias=None, Tensor? offset=None, Tensor? pertoken_scale=None, "
        "Tensor? shared_input=None, Tensor? logit=None, Tensor? row_index=None, "
        "ScalarType? dtype=None, float? shared_input_weight=1.0, int? shared_input_offset=0, "
        "int? output_bs=0, int? group_list_type=1, int[]? tuning_config=None, int? x_dtype=None, "
        "int? w_dtype=None, int? scale_dtype=None, int? pertoken_scale_dtype=None) -> Tensor"
    ),
    # Matrix products.
    (
        "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, "
        "Tensor? pertoken_scale=None, Tensor? bias=None, int? output_dtype=None, "
        "int? x1_dtype=None, int? x2_dtype=None, int? pertoken_scale_dtype=None, "
        "int? scale_dtype=None, int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor"
    ),
    (
        "npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale, "
        "Tensor? antiquant_offset=None, Tensor? quant_scale=None, Tensor? quant_offset=None, "
        "Tensor? bias=None, int antiquant_group_size=0, int inner_precise=0, "
        "int? weight_dtype=None) -> Tensor"
    ),
    # Routing.
    (
        "npu_moe_init_routing(Tensor x, Tensor row_idx, Tensor expert_idx, int active_num) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    (
        "npu_moe_init_routing_v2(Tensor x, Tensor expert_idx, *, Tensor? scale=None, "
        "Tensor? offset=None, int active_num=-1, int expert_capacity=-1, int expert_num=-1, "
        "int drop_pad_mode=0, int expert_tokens_num_type=0, bool expert_tokens_num_flag=False, "
        "int quant_mode=-1, int[2] active_expert_range=[], int row_idx_type=0, int? x_dtype=None) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "npu_moe_compute_expert_tokens(Tensor sorted_expert_for_source_row, int num_expert) -> Tensor",
    (
        "npu_moe_finalize_routing(Tensor expanded_permuted_rows, Tensor? skip1, Tensor? skip2, "
        "Tensor? bias, Tensor? scales, Tensor expanded_src_to_dst_row, "
        "Tensor? export_for_source_row, int? drop_pad_mode=0, int? k=1) -> Tensor"
    ),
    (
        "npu_moe_token_permute(Tensor tokens, Tensor indices, int? num_out_tokens=None, "
        "bool padded_mode=False) -> (Tensor, Tensor)"
    ),
    (
        "npu_moe_token_unpermute(Tensor permuted_tokens, Tensor sorted_indices, "
        "Tensor? probs=None, bool padded_mode=False, int[]? restore_shape=None) -> Tensor"
    ),
    (
        "npu_moe_gating_top_k(Tensor x, int k, *, Tensor? bias=None, Tensor? input_ids=None, "
        "Tensor? tid2eid=None, int k_group=1, int group_count=1, int group_select_mode=0, "
        "int renorm=0, int norm_type=0, bool out_flag=False, float routed_scaling_factor=1.0, "
        "float eps=1e-20) -> (Tensor, Tensor, Tensor)"
    ),
    (
        "npu_moe_gating_top_k_softmax(Tensor x, Tensor? finished=None, int k=1) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    (
        "npu_moe_re_routing(Tensor tokens, Tensor expert_token_num_per_rank, *, "
        "Tensor? per_token_scales=None, int expert_token_num_type=1, int idx_type=0, "
        "int? tokens_dtype=None) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    # Sparse attention.
    (
        "npu_lightning_indexer(Tensor query, Tensor key, Tensor weights, *, "
        "Tensor? actual_seq_lengths_query=None, Tensor? actual_seq_lengths_key=None, "
        'Tensor? block_table=None, str layout_query="BSND", str layout_key="BSND", '
        "int sparse_count=2048, int sparse_mode=3, int pre_tokens=9223372036854775807, "
        "int next_tokens=9223372036854775807, bool return_value=False) -> (Tensor, Tensor)"
    ),
)
"""One string an operator, of torch-npu 2.13.0; what it calls ``self`` is ``input``."""

SCHEMA_OF: Final = MappingProxyType({schema.partition("(")[0]: schema for schema in SCHEMAS})
"""The schema of each operator by its name; an overload is ``name.overload``."""
