"""The one function that builds the model: this process's part of a GLM-4.5 as Megatron-Core's GPTModel.

It computes what transformers' `Glm4MoeForCausalLM` computes (tests/integration/model/test_parity.py). The loss is left
as a sum over tokens (`calculate_per_token_loss`): the train step divides once, by the tokens of the global batch.
"""

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
import logging
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from megatron_klong.config import ConfigError
from megatron_klong.model.attention import CausalAttention
from megatron_klong.model.config import Fp8, LayoutConfig, ModelConfig, Precision, Recompute
from megatron_klong.model.experts import grouped_experts
from megatron_klong.model.norm import RMSNorm
from megatron_klong.model.parallel import check_initialized

# What is not kept for the backward pass but computed once more.
_RECOMPUTED: dict[Recompute, dict[str, Any]] = {
    "none": {},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}

# GPTModel warns at every construction that HybridModel is to follow it; it is used here knowingly.
logging.getLogger(GPTModel.__module__).addFilter(lambda record: "GPTModel IS DEPRECATED" not in record.getMessage())


def build_chunks(
    config: ModelConfig,
    layout: LayoutConfig,
    *,
    precision: Precision = "fp32",
    fp8: Fp8 | None = None,
    recompute: Recompute = "none",
) -> list[GPTModel]:
    """All that this process holds of the model, as `build_model` builds it: a chunk for each of its virtual stages."""
    virtual = layout.virtual_pipeline_parallel
    stages: list[int | None] = [None] if virtual == 1 else list(range(virtual))
    how: dict[str, Any] = {"precision": precision, "fp8": fp8, "recompute": recompute}
    return [build_model(config, layout, **how, vp_stage=stage) for stage in stages]


def build_model(
    config: ModelConfig,
    layout: LayoutConfig,
    *,
    precision: Precision = "fp32",
    fp8: Fp8 | None = None,
    recompute: Recompute = "none",
    initialize_weights: bool = True,
    vp_stage: int | None = None,
    routes: bool = False,
) -> GPTModel:
    """Random weights, or with `initialize_weights=False` whatever the memory holds, on this process's device.

    routes: whether its routers can record where tokens go, and send them there again (`RouterReplay`).

    vp_stage: which of its virtual pipeline stages, where the layout has several a process.

    `parallel.initialize(layout, ...)` comes first.

    The model maps ids and positions [batch, tokens] to logits [batch, tokens, vocab_size / tensor_parallel], or with
    `labels` to cross entropies [batch, tokens]; on another than the last stage to hidden states.

    Layers are Megatron's local ones with our attention, norm and grouped products. Where CUDA and Transformer Engine
    are there, they are Transformer Engine's instead; that branch has not been run by any test.
    """
    layout.check_model(config)
    check_initialized(layout)
    transformer_engine = torch.cuda.is_available() and _has_transformer_engine()
    if fp8 and not transformer_engine:
        raise ConfigError(f"fp8 = {fp8!r}: needs a GPU and Transformer Engine; leave it out")
    transformer_config = TransformerConfig(
        **_architecture(config),
        **_division(config, layout),
        **_computation(precision, recompute, transformer_engine=transformer_engine),
        **_in_8_bits(fp8),
        perform_initialization=initialize_weights,
        moe_enable_routing_replay=routes,
    )
    layers = get_gpt_decoder_block_spec(
        transformer_config, use_transformer_engine=transformer_engine, vp_stage=vp_stage
    )
    next_layers = None
    if config.num_nextn_predict_layers:
        next_layers = get_gpt_mtp_block_spec(
            transformer_config, layers, use_transformer_engine=transformer_engine, vp_stage=vp_stage
        )
    if not transformer_engine:
        _use_own_modules(layers, next_layers)
    whole = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    model = GPTModel(
        transformer_config,
        layers,
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**whole),
        post_process=parallel_state.is_pipeline_last_stage(**whole),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=config.partial_rotary_factor,
        rotary_base=config.rope_theta,
        mtp_block_spec=next_layers,
        vp_stage=vp_stage,
    )
    return model.cuda(torch.cuda.current_device())


def _has_transformer_engine() -> bool:
    try:
        import transformer_engine.pytorch  # type: ignore[import-not-found] # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: installed, but for another CUDA or torch
        return False
    return True


def _computation(precision: Precision, recompute: Recompute, *, transformer_engine: bool) -> dict[str, Any]:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": precision == "bf16",
        "use_cpu_initialization": not torch.cuda.is_available(),
        "transformer_impl": "transformer_engine" if transformer_engine else "local",
        # only Megatron's own choice of modules reads this; ours are grouped anyway
        "moe_grouped_gemm": transformer_engine,
        # kernels that need a GPU, or another order of summation than the reference's
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "calculate_per_token_loss": True,
        **_RECOMPUTED[recompute],
    }


def _in_8_bits(fp8: Fp8 | None) -> dict[str, Any]:
    if fp8 is None:
        return {}
    # scaled block by block, gradients too keep enough range in the format with more precision
    kind = "e4m3" if fp8 in ("blockwise", "mxfp8") else "hybrid"
    return {"fp8": kind, "fp8_recipe": fp8, "moe_router_padding_for_fp8": True}


def _architecture(config: ModelConfig) -> dict[str, Any]:
    dense = config.first_k_dense_replace
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "init_method_std": config.initializer_range,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
        "add_qkv_bias": config.attention_bias,
        "qk_layernorm": config.use_qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "num_moe_experts": config.n_routed_experts,
        "moe_layer_freq": [0] * dense + [1] * (config.num_hidden_layers - dense),
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": config.moe_intermediate_size * config.n_shared_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
        "moe_router_dtype": "fp32",
        # experts are balanced by a bias on their scores, not by a loss
        "moe_router_load_balancing_type": "none",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": config.router_bias_update_rate,
        "moe_token_dispatcher_type": "alltoall",
        "mtp_num_layers": config.num_nextn_predict_layers or None,
        "mtp_loss_scaling_factor": config.mtp_loss_weight,
    }


def _division(config: ModelConfig, layout: LayoutConfig) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tensor_parallel,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "pipeline_model_parallel_layout": _pipeline(config, layout),
        # of two stages, interleaved, one may send the other two tensors at once: batched, Megatron mixes them up
        "overlap_p2p_comm": layout.virtual_pipeline_parallel > 1,
        "batch_p2p_comm": layout.virtual_pipeline_parallel == 1,
        "expert_model_parallel_size": layout.expert_parallel,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel,
        "context_parallel_size": layout.context_parallel,
    }


def _pipeline(config: ModelConfig, layout: LayoutConfig) -> list[list[str]] | None:
    """What stands in each stage, as Megatron wants it said."""
    if layout.pipeline_parallel == 1:
        return None
    stages = [["decoder"] * layers for layers in layout.stages(config)]
    stages[0].insert(0, "embedding")
    stages[-1] += ["mtp"] * config.num_nextn_predict_layers + ["loss"]
    return stages


def _use_own_modules(layers: Any, next_layers: Any) -> None:
    """Put our norm, core attention and experts into Megatron's specification of its local layers."""
    layers.layer_norm = RMSNorm
    for layer in layers.layer_specs:
        _use_own_modules_in(layer.submodules)
    for layer in [] if next_layers is None else next_layers.layer_specs:
        modules = layer.submodules
        modules.enorm = modules.hnorm = modules.layer_norm = RMSNorm
        _use_own_modules_in(modules.mtp_model_layer.submodules)


def _use_own_modules_in(modules: Any) -> None:
    """modules: those of one transformer layer."""
    modules.input_layernorm = modules.pre_mlp_layernorm = RMSNorm
    attention = modules.self_attention.submodules
    attention.core_attention = CausalAttention
    if attention.q_layernorm is not IdentityOp:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    mlp = modules.mlp.keywords["submodules"]
    if hasattr(mlp, "experts"):
        mlp.experts = grouped_experts()
