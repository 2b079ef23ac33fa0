"""Arithmetic of a train step, from the shape of the model and the lengths of its windows.

Counted are the products a step cannot do without: forward and twice that backward, attention to the past only, the
experts a token goes to. Not counted: what is recomputed, padding, and all that is no matrix product. So the figure over
time, compared with a device's peak, is what is called model FLOPs utilisation.
"""

from collections.abc import Iterable

from megatron_klong.model.config import ModelConfig


def training_flops(model: ModelConfig, window_tokens: Iterable[int]) -> float:
    """Floating-point operations (a product and a sum are two) of forward and backward over windows so long."""
    lengths = list(window_tokens)
    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    # scores and their values: two products of L * L / 2 * width each
    attention = 2 * model.num_attention_heads * model.head_dim * sum(length**2 for length in lengths)
    return 3 * (2 * weights_a_token(model) * sum(lengths) + layers * attention)


def weights_a_token(model: ModelConfig) -> int:
    """Entries of all matrices that a token is multiplied with; its embedding is only looked up."""
    hidden, width = model.hidden_size, model.head_dim
    attention = 2 * hidden * width * (model.num_attention_heads + model.num_key_value_heads)
    dense = 3 * hidden * model.intermediate_size
    experts = model.num_experts_per_tok + model.n_shared_experts
    sparse = 3 * hidden * model.moe_intermediate_size * experts + hidden * model.n_routed_experts
    output = hidden * model.vocab_size
    first = model.first_k_dense_replace
    layers = model.num_hidden_layers * attention + first * dense + (model.num_hidden_layers - first) * sparse
    following = model.num_nextn_predict_layers * (attention + sparse + 2 * hidden * hidden + output)
    return layers + output + following
