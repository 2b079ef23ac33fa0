"""Attention with its norm and residual as a program of blocks (tape.py): block `x` in, block `y` out.

What autograd keeps: the norm's own blocks; the norm's output, for the product with the weights; queries and keys after
rotation; the values; the output of the attention with one logarithm a token and head (flash attention keeps no
scores); the input of the projection. On a CPU values are a view of the whole product of queries, keys and values, so
all of it is kept, and the windows' outputs are copied into one row. Sources: megatron/core/transformer/attention.py
and model/attention.py here; Dao, "FlashAttention-2" (arXiv 2307.08691).
"""

from megatron_klong.model.planner.linear import (
    column_backward,
    gather_forward,
    norm_backward,
    norm_forward,
    row_backward,
    row_output,
)
from megatron_klong.model.planner.shapes import Shapes
from megatron_klong.model.planner.tape import Tape


def attention_forward(tape: Tape, shapes: Shapes) -> None:
    """`x` is held at the start and, where the norm's backward pass needs it, in the end; `y` is held in the end."""
    norm_forward(tape, shapes, "n1", "x", "n1_out", rows=shapes.slice_tokens, width=shapes.hidden)
    gather_forward(tape, shapes)
    _project(tape, shapes)
    tape.last_use("n1_out")
    _rotate(tape, shapes)
    _attend(tape, shapes)
    row_output(tape, shapes, "context", "projected")
    tape.free_if_held("normed_query", "normed_key")
    if not (shapes.query_key_norm and _norm_keeps_input(shapes)):
        tape.free_if_held("query")
    tape.last_use("query", "key")
    if shapes.device == "gpu":
        tape.free("qkv")
    tape.last_use("qkv")
    tape.take("activations", y=shapes.slice_bytes)
    tape.free("projected")
    if not _norm_keeps_input(shapes):
        tape.free("x")
    tape.last_use("x")


def attention_backward(tape: Tape, shapes: Shapes) -> None:
    """The residual stream's gradient `g` is held throughout; it belongs to the output first, then to the input."""
    row_backward(tape, shapes, "context", "d_context", width=shapes.query)
    unit, pair = _bytes(shapes, shapes.query), _bytes(shapes, shapes.key_value)
    tape.take("activations", d_query=unit, d_key=pair, d_value=pair)
    if shapes.device == "gpu":
        tape.pass_by("activations", 4 * shapes.tokens * shapes.query)  # the kernel sums queries' gradients in fp32
        tape.free("value")
    else:
        tape.free("attended", "qkv")
    tape.free("d_context", "logarithms")
    tape.free("rotated_query", "rotated_key")
    if shapes.device == "cpu":
        _gather_backward(tape, shapes)
        tape.pass_by("activations", unit)  # windows' gradients are laid end to end
    tape.take("activations", first_part=unit)
    tape.free("d_query")
    tape.take("activations", second_part=unit)
    tape.free("second_part", "rotation")
    tape.rename("first_part", "d_query")
    _norms_backward(tape, shapes)
    tape.take("activations", d_qkv=_bytes(shapes, shapes.query + 2 * shapes.key_value))
    tape.free("d_query", "d_key", "d_value")
    width = shapes.query + 2 * shapes.key_value
    column_backward(tape, shapes, "n1_out", "d_qkv", "d_normed", width=width)
    norm_backward(tape, shapes, "n1", "x", "d_normed", rows=shapes.slice_tokens, width=shapes.hidden)


def _bytes(shapes: Shapes, width: int) -> int:
    return shapes.tokens * width * shapes.element_bytes


def _norm_keeps_input(shapes: Shapes) -> bool:
    """A norm in bf16 on a CPU keeps an fp32 copy instead."""
    return shapes.device == "gpu" or shapes.exact


def _project(tape: Tape, shapes: Shapes) -> None:
    product = _bytes(shapes, shapes.query + 2 * shapes.key_value)
    if shapes.attention_bias:
        tape.take("activations", without_bias=product, qkv=product)
        tape.free("without_bias")
    else:
        tape.take("activations", qkv=product)
    if shapes.key_value_heads > 1:  # queries of several groups do not lie next to each other
        tape.take("activations", query=_bytes(shapes, shapes.query))


def _rotate(tape: Tape, shapes: Shapes) -> None:
    """And norms of queries and keys before, where the model has them."""
    if shapes.query_key_norm:
        if shapes.device == "gpu":  # its norm wants keys that lie next to each other
            tape.take("activations", key=_bytes(shapes, shapes.key_value))
        for name, heads in (("query", shapes.heads), ("key", shapes.key_value_heads)):
            rows = shapes.tokens * heads
            norm_forward(tape, shapes, f"{name}_norm", name, f"normed_{name}", rows=rows, width=shapes.head_dim)
        if not _norm_keeps_input(shapes):
            tape.free_if_held("query")
    # cosines and sines, for queries and for keys
    tape.take("activations", rotation=4 * shapes.tokens * shapes.rotated * shapes.element_bytes)
    tape.take("activations", rotated_query=_bytes(shapes, shapes.query), rotated_key=_bytes(shapes, shapes.key_value))
    tape.last_use("rotation")


def _attend(tape: Tape, shapes: Shapes) -> None:
    output = _bytes(shapes, shapes.query)
    if shapes.device == "gpu":
        if shapes.context_parallel > 1:  # the ring: keys and values of two processes, received and on their way
            tape.take("activations", ring=4 * _bytes(shapes, shapes.key_value))
        tape.take("activations", value=_bytes(shapes, shapes.key_value))
        tape.take("activations", context=output, logarithms=4 * shapes.heads * shapes.tokens)
        tape.free_if_held("ring")
        tape.last_use("value", "logarithms", "rotated_query", "rotated_key")
        return
    _gather_keys_and_values(tape, shapes)
    tape.take("activations", attended=output, logarithms=4 * shapes.heads * shapes.tokens)
    if shapes.context_parallel > 1:
        tape.take("activations", chunks=output)  # blocks of queries laid end to end
    tape.take("activations", context=output)
    tape.free_if_held("chunks")
    tape.last_use("attended", "logarithms", "rotated_query", "rotated_key", "all_keys", "all_values")


def _gather_keys_and_values(tape: Tape, shapes: Shapes) -> None:
    """Without Transformer Engine every process gathers the keys and values of the whole row."""
    if shapes.context_parallel > 1:
        whole = shapes.context_parallel * _bytes(shapes, shapes.key_value)
        tape.take("activations", all_keys=whole)
        tape.take("activations", gathered=whole, all_values=whole)
        tape.free("gathered")


def _gather_backward(tape: Tape, shapes: Shapes) -> None:
    if shapes.context_parallel > 1:
        tape.pass_by("activations", 3 * shapes.context_parallel * _bytes(shapes, shapes.key_value))
        tape.free("all_keys", "all_values")


def _norms_backward(tape: Tape, shapes: Shapes) -> None:
    if not shapes.query_key_norm:
        return
    for name, heads in (("query", shapes.heads), ("key", shapes.key_value_heads)):
        tape.take("activations", normed_gradient=shapes.tokens * heads * shapes.head_dim * shapes.element_bytes)
        rows = shapes.tokens * heads
        norm_backward(tape, shapes, f"{name}_norm", name, "normed_gradient", rows=rows, width=shapes.head_dim)
