"""Shapes by name: the published models, and one of their architecture for tests and a CPU; imports no torch."""

from typing import Literal

from megatron_klong.model.config import ModelConfig, padded

type PresetName = Literal["tiny", "glm45-air", "glm45"]

_PUBLISHED = ModelConfig(
    vocab_size=151552,
    hidden_size=4096,
    intermediate_size=10944,
    num_hidden_layers=46,
    num_attention_heads=96,
    num_key_value_heads=8,
    head_dim=128,
    moe_intermediate_size=1408,
    n_routed_experts=128,
    num_experts_per_tok=8,
    attention_bias=True,
    rope_theta=1e6,
    num_nextn_predict_layers=1,
    eos_token_id=(151329, 151336, 151338),
    pad_token_id=151329,
)
_PRESETS: dict[str, ModelConfig] = {
    "glm45-air": _PUBLISHED,
    "glm45": _PUBLISHED.model_copy(
        update={
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "num_hidden_layers": 92,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "first_k_dense_replace": 3,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
        }
    ),
}


def preset(name: PresetName) -> ModelConfig:
    """106B (glm45-air) and 355B (glm45) with their layer for multi-token prediction; tiny, with 512 ids."""
    return tiny(512) if name == "tiny" else _PRESETS[name]


def tiny(vocab_size: int, *, scale: int = 1) -> ModelConfig:
    """GLM-4.5's architecture at a size for tests and a CPU: about 0.3 million parameters beside the embeddings.

    scale: so many times as wide, with so many times the experts.
    """
    return ModelConfig(
        vocab_size=padded(vocab_size),
        hidden_size=64 * scale,
        intermediate_size=128 * scale,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=32 * scale,
        n_routed_experts=8 * scale,
        num_experts_per_tok=2,
        attention_bias=True,
        rope_theta=1e6,
    )
