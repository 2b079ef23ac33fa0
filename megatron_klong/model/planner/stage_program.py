"""Layers, embedding and loss of a pipeline stage as profiles: what each keeps, and its peaks.

`recompute` "full" keeps the input of each layer only and runs its forward pass again, "mlp" does so with the MLP or the
experts of each layer. The loss is Megatron's vocabulary-parallel cross entropy: one fp32 copy of the logits, turned
into probabilities and then into gradients in place.
"""

from functools import lru_cache

from megatron_klong.model.config import Recompute
from megatron_klong.model.planner.attention_program import attention_backward, attention_forward
from megatron_klong.model.planner.experts_program import experts_backward, experts_forward
from megatron_klong.model.planner.linear import (
    column_backward,
    copied_by_gloo,
    gather_forward,
    norm_backward,
    norm_forward,
)
from megatron_klong.model.planner.mlp_program import mlp_backward, mlp_forward
from megatron_klong.model.planner.shapes import Shapes
from megatron_klong.model.planner.tape import Profile, Tape, profile


@lru_cache(maxsize=64)  # a search asks for the same ones again and again
def layer_profile(shapes: Shapes, *, experts: bool, recompute: Recompute) -> Profile:
    """Of one layer. The gradient it gets counts in its backward peak, the output it hands on in its forward peak."""
    mlp = (experts_forward, experts_backward) if experts else (mlp_forward, mlp_backward)
    mlp_again = recompute == "mlp"

    def forward(tape: Tape) -> None:
        tape.take("activations", x=shapes.slice_bytes)
        attention_forward(tape, shapes)
        mlp[0](tape, shapes, computed_again=mlp_again)

    def backward(tape: Tape) -> None:
        mlp[1](tape, shapes, computed_again=mlp_again)
        attention_backward(tape, shapes)

    def whole_forward(tape: Tape) -> None:
        if recompute == "full":
            tape.take("activations", input=shapes.slice_bytes, x=0)
            tape.recording = False
            attention_forward(tape, shapes)
            mlp[0](tape, shapes, computed_again=False)
            tape.recording = True
        else:
            forward(tape)
        tape.free("y")  # counted by whoever reads it

    def whole_backward(tape: Tape) -> None:
        tape.take("activations", g=shapes.slice_bytes)
        if recompute == "full":
            tape.free_if_held("dispatcher")
            tape.take("activations", x=0)
            attention_forward(tape, shapes)
            mlp[0](tape, shapes, computed_again=False)
        backward(tape)
        tape.free_if_held("y", "input")
        tape.free("g")

    return profile(whole_forward, whole_backward)


@lru_cache(maxsize=64)
def embedding_profile(shapes: Shapes) -> Profile:
    """Ids to hidden states; their gradient is as large as the whole matrix."""

    def forward(tape: Tape) -> None:
        tape.take("activations", embedded=shapes.full_bytes)
        if shapes.tensor_parallel > 1:
            tape.take("activations", scattered=shapes.slice_bytes)
            copied_by_gloo(tape, shapes, shapes.full_bytes)
            tape.free("embedded")
            tape.take("activations", copied=shapes.slice_bytes)
            tape.free("scattered", "copied")
        else:
            tape.free("embedded")

    def backward(tape: Tape) -> None:
        tape.take("activations", g=shapes.slice_bytes)
        if shapes.tensor_parallel > 1:
            tape.take("activations", gathered=shapes.full_bytes)
            copied_by_gloo(tape, shapes, shapes.full_bytes)
        tape.take("activations", d_matrix=shapes.vocabulary * shapes.hidden * shapes.element_bytes)
        tape.free("g")
        tape.free_if_held("gathered")
        tape.free("d_matrix")

    return profile(forward, backward)


@lru_cache(maxsize=64)
def join_profile(shapes: Shapes, *, recompute: Recompute) -> Profile:
    """What comes before the layer that predicts further tokens: embeddings of the next tokens, two norms, a product.

    Source: megatron/core/transformer/multi_token_prediction.py.
    """
    rows, width = shapes.slice_tokens, shapes.hidden

    def forward(tape: Tape) -> None:
        tape.take("activations", embedded=shapes.slice_bytes)
        tape.recording = recompute != "full"
        norm_forward(tape, shapes, "enorm", "embedded", "e", rows=rows, width=width)
        norm_forward(tape, shapes, "hnorm", "hidden", "h", rows=rows, width=width)
        tape.take("activations", joined=2 * shapes.slice_bytes)
        tape.free("e", "h")
        copied_by_gloo(tape, shapes, 2 * (shapes.full_bytes - shapes.slice_bytes))
        tape.take("activations", product=shapes.full_bytes)
        tape.last_use("joined")
        tape.free("product")
        tape.recording = True

    def backward(tape: Tape) -> None:
        if recompute == "full":
            norm_forward(tape, shapes, "enorm", "embedded", "e", rows=rows, width=width)
            norm_forward(tape, shapes, "hnorm", "hidden", "h", rows=rows, width=width)
            tape.take("activations", joined=2 * shapes.slice_bytes)
            tape.free("e", "h")
        tape.take("activations", g=shapes.slice_bytes, d_product=shapes.full_bytes)
        tape.take("activations", d_joined=2 * shapes.slice_bytes)
        tape.take("activations", d_matrix=2 * width * width // shapes.tensor_parallel * shapes.element_bytes)
        tape.free("d_product", "joined", "d_matrix")
        tape.take("activations", d_e=shapes.slice_bytes, d_h=shapes.slice_bytes)
        tape.free("d_joined")
        norm_backward(tape, shapes, "hnorm", "hidden", "d_h", rows=rows, width=width)
        norm_backward(tape, shapes, "enorm", "embedded", "d_e", rows=rows, width=width)
        tape.take("activations", d_table=shapes.vocabulary * width * shapes.element_bytes)
        tape.free("d_table", "g")
        tape.free_if_held("embedded")

    return profile(forward, backward)


@lru_cache(maxsize=64)
def loss_profile(shapes: Shapes) -> Profile:
    """Last norm, logits, cross entropy: hidden states to a loss."""
    logits = shapes.tokens * shapes.vocabulary

    def forward(tape: Tape) -> None:
        tape.take("activations", x=shapes.slice_bytes)
        norm_forward(tape, shapes, "final", "x", "normed", rows=shapes.slice_tokens, width=shapes.hidden)
        if shapes.device == "cpu" and not shapes.exact:
            tape.free("x")
        gather_forward(tape, shapes)
        tape.take("logits", logits=logits * shapes.element_bytes)
        if shapes.exact:
            tape.rename("logits", "probabilities")
        else:
            tape.take("logits", probabilities=4 * logits)
            tape.free("logits")

    def backward(tape: Tape) -> None:
        if shapes.exact:
            tape.rename("probabilities", "d_logits")
        else:
            tape.take("logits", d_logits=logits * shapes.element_bytes)
            tape.free("probabilities")
        column_backward(tape, shapes, "normed", "d_logits", "d_normed", width=shapes.vocabulary)
        tape.take("activations", g=0)
        norm_backward(tape, shapes, "final", "x", "d_normed", rows=shapes.slice_tokens, width=shapes.hidden)
        tape.free("g")

    return profile(forward, backward)
