"""A mixture of experts with its norm and residual as a program of blocks (tape.py).

The way of the tokens: the router's scores; each token once for every expert it goes to (`permuted`); to the processes
that hold these experts (`arrived`) and, where experts are divided by tensor parallelism, to all their parts; sorted by
expert (`sorted`); through the gated experts, whose result is weighted; and all the way back. What autograd keeps is
the experts' input, the 2f of the first product, and f each of the activation, the other half, their product and the
weighted product; of the router the scores and the order of the tokens. On a CPU the weights of a layer's experts are
stacked for each product, and the stack is kept. Sources: megatron/core/transformer/moe/{moe_layer,router,moe_utils,
token_dispatcher,experts}.py without fused kernels, and model/experts.py here.
"""

from megatron_klong.model.planner.linear import copied_by_gloo, norm_backward, norm_forward
from megatron_klong.model.planner.mlp_program import finish_residual, gated_backward, gated_forward
from megatron_klong.model.planner.shapes import Shapes
from megatron_klong.model.planner.tape import Tape


def experts_forward(tape: Tape, shapes: Shapes, *, computed_again: bool) -> None:
    """Block `y` (the residual stream after attention) in and out."""
    tape.rename("y", "x1")
    norm_forward(tape, shapes, "n2", "x1", "n2_out", rows=shapes.slice_tokens, width=shapes.hidden)
    recording, tape.recording = tape.recording, tape.recording and not computed_again
    _through_experts(tape, shapes)
    tape.recording = recording
    tape.last_use("n2_out")
    finish_residual(tape, shapes, "moe_out")


def experts_backward(tape: Tape, shapes: Shapes, *, computed_again: bool) -> None:
    if computed_again:
        tape.free("dispatcher")  # replaced by that of this pass
        _through_experts(tape, shapes)
    _way_back_backward(tape, shapes)
    _products_backward(tape, shapes)
    _way_there_backward(tape, shapes)
    gated_backward(tape, shapes, "shared", None, "d_shared", width=shapes.shared)
    tape.free("d_shared", "n2_out")
    tape.free_if_held("moe_out")
    norm_backward(tape, shapes, "n2", "x1", "d_normed", rows=shapes.slice_tokens, width=shapes.hidden)


def dispatcher_bytes(shapes: Shapes) -> int:
    """Probabilities and map of all experts, which the dispatcher of a layer holds until the next micro-batch comes."""
    return shapes.slice_tokens * (4 + 1) * shapes.experts


def _through_experts(tape: Tape, shapes: Shapes) -> None:
    gated_forward(tape, shapes, "shared", "shared_out", width=shapes.shared)
    _route(tape, shapes)
    _way_there(tape, shapes)
    _products(tape, shapes)
    _way_back(tape, shapes)


def _hidden_bytes(shapes: Shapes, rows: int) -> int:
    return rows * shapes.hidden * shapes.element_bytes


def _route(tape: Tape, shapes: Shapes) -> None:
    rows, experts, chosen = shapes.slice_tokens, shapes.experts, shapes.chosen
    if not shapes.exact:
        tape.pass_by("experts", 4 * rows * shapes.hidden)  # scores are computed in fp32
    # scores; chosen experts, their scores and the sum of these
    tape.take("experts", scores=rows * (4 * experts + 8 * chosen + 4 * chosen + 4))
    tape.take("experts", dispatcher=dispatcher_bytes(shapes))
    # the order of all pairs of token and expert, of which the first are the chosen ones
    tape.take("experts", order=8 * rows * experts, pairs=9 * rows * experts, chosen_order=8 * rows * chosen)
    tape.free("pairs")
    tape.last_use("scores", "order")


def _way_there(tape: Tape, shapes: Shapes) -> None:
    tape.take("experts", permuted=_hidden_bytes(shapes, shapes.sent_rows))
    last = "permuted"
    if shapes.expert_parallel > 1:
        tape.take("experts", arrived=_hidden_bytes(shapes, shapes.received_rows))
        last = "arrived"
    gathered = _hidden_bytes(shapes, shapes.expert_rows)
    if shapes.expert_tensor_parallel > 1:
        tape.take("experts", joined=gathered)
        copied_by_gloo(tape, shapes, gathered, "experts")
        last = "joined"
    if shapes.local_experts > 1:
        tape.take("experts", sorted=gathered)
        tape.free_if_held("joined")
    else:
        tape.rename(last, "sorted")


def _products(tape: Tape, shapes: Shapes) -> None:
    unit = shapes.expert_rows * shapes.expert * shapes.element_bytes
    exact = 4 * shapes.expert_rows * shapes.expert
    if shapes.device == "cpu":
        tape.take("experts", stack1=_matrix_bytes(shapes, 2))
    tape.take("experts", first=2 * unit, gate=unit, half=unit, product=unit)
    tape.last_use("first", "gate", "half")
    if not shapes.exact:  # the weights of the experts are fp32
        tape.take("experts", exact_product=exact, exact_weighted=exact)
        tape.free("exact_product")
    tape.take("experts", weights=4 * shapes.expert_rows, weighted=unit)
    tape.free_if_held("exact_weighted")
    tape.last_use("product", "stack1")
    if shapes.device == "cpu":
        tape.take("experts", stack2=_matrix_bytes(shapes, 1))
    tape.take("experts", made=_hidden_bytes(shapes, shapes.expert_rows))
    tape.last_use("weighted", "stack2", "weights")


def _way_back(tape: Tape, shapes: Shapes) -> None:
    last = "made"
    if shapes.local_experts > 1:
        tape.take("experts", unsorted=_hidden_bytes(shapes, shapes.expert_rows))
        if shapes.expert_tensor_parallel == 1:
            tape.free("made")
        last = "unsorted"
    if shapes.expert_tensor_parallel > 1:  # summed over the parts in fp32
        exact = 4 * shapes.hidden
        if not shapes.exact:
            tape.take("experts", exact_whole=exact * shapes.expert_rows)
        tape.take("experts", exact_part=exact * shapes.received_rows)
        copied_by_gloo(tape, shapes, exact * shapes.expert_rows / shapes.expert_tensor_parallel, "experts")
        tape.free_if_held("exact_whole")
        tape.take("experts", summed=_hidden_bytes(shapes, shapes.received_rows))
        tape.free("exact_part")
        tape.free_if_held("made", "unsorted")
        last = "summed"
    if shapes.expert_parallel > 1:
        tape.take("experts", returned=_hidden_bytes(shapes, shapes.sent_rows))
        tape.free(last)
        last = "returned"
    tape.take("experts", zeros=shapes.slice_bytes, moe_out=shapes.slice_bytes)
    tape.free("zeros", last, "shared_out")
    tape.free_if_held("permuted", "arrived")
    tape.last_use("sorted", "chosen_order")


def _matrix_bytes(shapes: Shapes, times: int) -> int:
    """Of all experts here: the first product's matrix is twice as wide."""
    return times * shapes.local_experts * shapes.expert * shapes.hidden * shapes.element_bytes


def _way_back_backward(tape: Tape, shapes: Shapes) -> None:
    tape.take("experts", d_returned=_hidden_bytes(shapes, shapes.sent_rows))
    last = "d_returned"
    if shapes.expert_parallel > 1:
        tape.take("experts", d_summed=_hidden_bytes(shapes, shapes.received_rows))
        tape.free(last)
        last = "d_summed"
    if shapes.expert_tensor_parallel > 1:
        tape.take("experts", d_whole=4 * shapes.hidden * shapes.expert_rows)
        copied_by_gloo(tape, shapes, 4 * shapes.hidden * shapes.expert_rows, "experts")
        tape.free(last)
        last = "d_whole"
    if shapes.local_experts > 1 or shapes.expert_tensor_parallel > 1:
        tape.take("experts", d_made=_hidden_bytes(shapes, shapes.expert_rows))
        tape.free(last)
    else:
        tape.rename(last, "d_made")


def _products_backward(tape: Tape, shapes: Shapes) -> None:
    unit = shapes.expert_rows * shapes.expert * shapes.element_bytes
    exact = 4 * shapes.expert_rows * shapes.expert
    tape.take("experts", d_matrix=_matrix_bytes(shapes, 1), d_weighted=unit)
    tape.free("d_made", "weighted")
    tape.free_if_held("stack2")
    _add_expert_gradients(tape, shapes, 1)
    if shapes.exact:
        tape.take("experts", d_product=unit, d_weights=unit)
        tape.free("d_weights", "d_weighted")
    else:
        tape.take("experts", d_exact=exact)
        tape.free("d_weighted")
        tape.take("experts", d_weights=exact, d_exact_product=exact, d_product=unit)
        tape.free("d_weights", "d_exact_product", "d_exact")
    tape.free("product", "weights")
    tape.take("experts", d_gate=unit, d_half=unit)
    tape.free("d_product", "half", "gate")
    tape.take("experts", d_activation=unit)
    tape.free("d_gate", "first")
    tape.take("experts", d_first=2 * unit)
    tape.free("d_activation", "d_half")
    tape.take("experts", d_matrix=_matrix_bytes(shapes, 2), d_sorted=_hidden_bytes(shapes, shapes.expert_rows))
    tape.free("d_first", "sorted")
    tape.free_if_held("stack1")
    _add_expert_gradients(tape, shapes, 2)


def _add_expert_gradients(tape: Tape, shapes: Shapes, times: int) -> None:
    """Expert by expert into the fp32 buffer."""
    numbers = times * shapes.expert * shapes.hidden
    if shapes.device == "cpu" and not shapes.exact:
        tape.pass_by("experts", 4 * numbers)
    tape.free("d_matrix")


def _way_there_backward(tape: Tape, shapes: Shapes) -> None:
    last = "d_sorted"
    if shapes.local_experts > 1:
        tape.take("experts", d_joined=_hidden_bytes(shapes, shapes.expert_rows))
        tape.free(last)
        last = "d_joined"
    if shapes.expert_tensor_parallel > 1:
        tape.take("experts", d_arrived=_hidden_bytes(shapes, shapes.received_rows))
        copied_by_gloo(tape, shapes, _hidden_bytes(shapes, shapes.received_rows), "experts")
        tape.free(last)
        last = "d_arrived"
    if shapes.expert_parallel > 1:
        tape.take("experts", d_permuted=_hidden_bytes(shapes, shapes.sent_rows))
        tape.free(last)
        last = "d_permuted"
    tape.take("activations", d_normed=shapes.slice_bytes)
    tape.free(last, "chosen_order", "order")
    tape.take("experts", d_scores=2 * 4 * shapes.slice_tokens * shapes.experts)
    tape.take("activations", d_router=shapes.slice_bytes)
    tape.free("d_router", "d_scores", "scores")
    tape.free("dispatcher")
