"""A dense MLP, or the shared expert, as a program of blocks (tape.py).

What autograd keeps of a gated MLP of width f: its input, the 2f of the first product, and f each of the activation, the
gate's other half and their product (Megatron adds an offset of zero to the other half, which makes a copy). Source:
megatron/core/transformer/mlp.py without fused kernels.
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


def gated_forward(tape: Tape, shapes: Shapes, name: str, result: str, *, width: int) -> None:
    """From the norm's output (held elsewhere) to block `result`."""
    unit = shapes.tokens * width * shapes.element_bytes
    gather_forward(tape, shapes)
    tape.take("activations", **{f"{name}_first": 2 * unit, f"{name}_gate": unit, f"{name}_half": unit})
    tape.take("activations", **{f"{name}_product": unit})
    tape.last_use(f"{name}_first", f"{name}_gate", f"{name}_half")
    row_output(tape, shapes, f"{name}_product", result)


def gated_backward(tape: Tape, shapes: Shapes, name: str, source: str | None, gradient: str, *, width: int) -> None:
    """Slices of the output's gradient (held elsewhere) -> block `gradient`, of the norm's output, which is let go."""
    unit = shapes.tokens * width * shapes.element_bytes
    row_backward(tape, shapes, f"{name}_product", "d_product", width=width)
    tape.take("activations", d_gate=unit, d_half=unit)
    tape.free("d_product", f"{name}_half", f"{name}_gate")
    tape.take("activations", d_activation=unit)
    tape.free("d_gate", f"{name}_first")
    tape.take("activations", d_first=2 * unit)
    tape.free("d_activation", "d_half")
    column_backward(tape, shapes, source, "d_first", gradient, width=2 * width)


def mlp_forward(tape: Tape, shapes: Shapes, *, computed_again: bool) -> None:
    """Block `y` (the residual stream after attention) in and out."""
    tape.rename("y", "x1")
    norm_forward(tape, shapes, "n2", "x1", "n2_out", rows=shapes.slice_tokens, width=shapes.hidden)
    recording, tape.recording = tape.recording, tape.recording and not computed_again
    gated_forward(tape, shapes, "mlp", "mlp_out", width=shapes.dense)
    tape.recording = recording
    tape.last_use("n2_out")
    finish_residual(tape, shapes, "mlp_out")


def mlp_backward(tape: Tape, shapes: Shapes, *, computed_again: bool) -> None:
    if computed_again:
        gated_forward(tape, shapes, "mlp", "again", width=shapes.dense)
    gated_backward(tape, shapes, "mlp", "n2_out", "d_normed", width=shapes.dense)
    tape.free_if_held("again")
    norm_backward(tape, shapes, "n2", "x1", "d_normed", rows=shapes.slice_tokens, width=shapes.hidden)


def finish_residual(tape: Tape, shapes: Shapes, *added: str) -> None:
    """y = x1 + what the MLP made."""
    tape.take("activations", y=shapes.slice_bytes)
    tape.free(*added)
    if shapes.device == "cpu" and not shapes.exact:  # the norm keeps an fp32 copy instead
        tape.free("x1")
    tape.last_use("x1")
