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
    hidden, output = model.hidden_size, model.hidden_size * model.vocab_size
    attention = 2 * hidden * model.head_dim * (model.num_attention_heads + model.num_key_value_heads)
    following = model.num_nextn_predict_layers
    layers = model.num_hidden_layers + following
    routers = (layers - model.first_k_dense_replace) * hidden * model.n_routed_experts
    return mlp_weights_a_token(model) + layers * attention + routers + output + following * (2 * hidden**2 + output)


def mlp_weights_a_token(model: ModelConfig) -> int:
    """Of these, those of the MLPs and of the experts that the token goes to."""
    experts = (model.num_experts_per_tok + model.n_shared_experts) * model.moe_intermediate_size
    dense = model.first_k_dense_replace
    sparse = model.num_hidden_layers + model.num_nextn_predict_layers - dense
    return 3 * model.hidden_size * (dense * model.intermediate_size + sparse * experts)
