"""Norms and tensor-parallel linear layers as programs of blocks (tape.py): what all kinds of layers are made of.

Sources: megatron/core/tensor_parallel/layers.py (`LinearWithGradAccumulationAndAsyncCommunication`); for the division
of activations by tensor and sequence parallelism Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198). On a CPU RMSNorm is a chain of torch operations in fp32, on a GPU one kernel;
gloo copies what it sends, NCCL does not.
"""

from megatron_klong.model.planner.shapes import Shapes
from megatron_klong.model.planner.tape import Part, Tape


def norm_forward(tape: Tape, shapes: Shapes, name: str, source: str, result: str, *, rows: int, width: int) -> None:
    """Block `source` -> block `result`. Who holds `source` keeps it where the norm's backward pass needs it."""
    numbers = rows * width
    if shapes.device == "gpu":
        tape.take("activations", **{result: numbers * shapes.element_bytes, f"{name}_scale": 4 * rows})
        tape.last_use(f"{name}_scale")
        return
    if not shapes.exact:
        tape.take("activations", **{f"{name}_input": 4 * numbers})
    tape.pass_by("activations", 4 * numbers)  # squares
    tape.take("activations", **{f"{name}_scale": 4 * rows, f"{name}_scaled": 4 * numbers, f"{name}_exact": 4 * numbers})
    if shapes.exact:
        tape.rename(f"{name}_exact", result)
    else:
        tape.take("activations", **{result: shapes.element_bytes * numbers})
        tape.free(f"{name}_exact")
    tape.last_use(f"{name}_input", f"{name}_scale", f"{name}_scaled")


def norm_backward(tape: Tape, shapes: Shapes, name: str, source: str, gradient: str, *, rows: int, width: int) -> None:
    """Consumes block `gradient`; its own is added to the one of the residual stream, which is held elsewhere."""
    unit = 4 * rows * width
    if shapes.device == "gpu":
        tape.pass_by("activations", rows * width * shapes.element_bytes)
        tape.free(gradient, f"{name}_scale")
        tape.free_if_held(source)
        return
    exact_gradient = gradient
    if not shapes.exact:
        exact_gradient = f"{name}_exact_gradient"
        tape.take("activations", **{exact_gradient: unit})
        tape.free(gradient)
    tape.take("activations", d_scaled=unit, d_weight=unit)
    tape.free("d_weight", exact_gradient, f"{name}_scaled")
    tape.take("activations", d_input=unit, d_scale=unit)
    tape.free("d_scale", "d_scaled", f"{name}_scale")
    if shapes.exact:
        tape.free("d_input")  # added to the residual's
    tape.take("activations", d_mean=unit, power=unit, doubled=unit, d_square=unit)
    tape.free("doubled", "power", "d_mean", "d_square")
    tape.free_if_held(source if shapes.exact else f"{name}_input")
    if not shapes.exact:
        tape.pass_by("activations", unit / 4 * shapes.element_bytes)
        tape.free("d_input")


def copied_by_gloo(tape: Tape, shapes: Shapes, size: float, part: Part = "activations") -> None:
    if shapes.device == "cpu":
        tape.pass_by(part, size)


def gather_forward(tape: Tape, shapes: Shapes) -> None:
    """All tokens from the slices, into a buffer that all layers share (`gather_buffer_bytes`)."""
    if shapes.tensor_parallel > 1:
        copied_by_gloo(tape, shapes, shapes.full_bytes)


def gather_buffer_bytes(shapes: Shapes) -> int:
    """Megatron's global memory buffer, which is never given back."""
    return shapes.full_bytes if shapes.tensor_parallel > 1 else 0


def row_output(tape: Tape, shapes: Shapes, source: str, result: str) -> None:
    """The product of a row-parallel layer: summed over processes and scattered into slices."""
    tape.take("activations", **{f"{result}_whole": shapes.full_bytes})
    tape.last_use(source)
    if shapes.tensor_parallel == 1:
        tape.rename(f"{result}_whole", result)
        return
    tape.take("activations", **{result: shapes.slice_bytes})
    copied_by_gloo(tape, shapes, shapes.full_bytes)
    tape.free(f"{result}_whole")


def row_backward(tape: Tape, shapes: Shapes, source: str, gradient: str, *, width: int) -> None:
    """Slices of the output's gradient (held elsewhere) -> `gradient` of the input `source`, which is let go."""
    if shapes.tensor_parallel > 1:
        tape.take("activations", gathered=shapes.full_bytes)
        copied_by_gloo(tape, shapes, shapes.full_bytes)
    tape.take("activations", **{gradient: shapes.tokens * width * shapes.element_bytes})
    tape.take("activations", d_matrix=width * shapes.hidden * shapes.element_bytes)
    tape.free_if_held("gathered")
    tape.free(source)
    add_weight_gradient(tape, shapes, width * shapes.hidden)


def column_backward(
    tape: Tape, shapes: Shapes, source: str | None, consumed: str, gradient: str, *, width: int
) -> None:
    """`consumed`, the output's gradient -> `gradient` of the input, in slices; the input `source` is let go."""
    if shapes.tensor_parallel > 1:
        copied_by_gloo(tape, shapes, shapes.full_bytes)  # the input is gathered again
    tape.take("activations", whole=shapes.full_bytes)
    if shapes.tensor_parallel > 1:
        tape.take("activations", **{gradient: shapes.slice_bytes})
        if shapes.device == "cpu":
            tape.take("activations", copy=shapes.full_bytes)
    tape.take("activations", d_matrix=width * shapes.hidden * shapes.element_bytes)
    tape.free_if_held("copy")
    if shapes.tensor_parallel > 1:
        tape.free("whole")
    else:
        tape.rename("whole", gradient)
    tape.free(consumed)
    if source:
        tape.free(source)
    add_weight_gradient(tape, shapes, width * shapes.hidden)


def add_weight_gradient(tape: Tape, shapes: Shapes, numbers: int) -> None:
    """`d_matrix` is added to the fp32 buffer; a CPU needs an fp32 copy for that."""
    if shapes.device == "cpu" and not shapes.exact:
        tape.pass_by("activations", 4 * numbers)
    tape.free("d_matrix")
