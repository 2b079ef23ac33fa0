"""What a piece of a train step holds at once: blocks of memory, taken and freed in the order of the real program.

A layer is written down as such a program, forward and backward, from what its modules allocate, what autograd keeps of
it and when it lets go (*_program.py). Running the program gives what is kept between forward and backward and the most
that is held during either, with the parts it consists of. Where autograd does not record, because the layer will be
computed again, a block is gone after its last use in the forward pass.

Always (tests/unit/model/test_plan_tape.py): what was taken is freed in the end, and a peak is never below what is kept.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

type Part = Literal["activations", "experts", "logits"]
type Bytes = Mapping[str, int]
"""Bytes by part."""

_NOTHING: Bytes = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """kept: between forward and backward. The peaks count what the piece itself holds, kept blocks included."""

    kept: Bytes = field(default_factory=dict)
    forward_peak: Bytes = field(default_factory=dict)
    backward_peak: Bytes = field(default_factory=dict)


class Tape:
    """Blocks by name. `recording`: whether autograd keeps what the backward pass will need."""

    def __init__(self, *, recording: bool = True) -> None:
        self.recording = recording
        self._blocks: dict[str, tuple[Part, int]] = {}
        self._held: Counter[str] = Counter()
        self._total = self._peak_total = 0
        self._peak: Bytes = _NOTHING

    def take(self, part: Part, **blocks: float) -> None:
        """Allocate, in the order given. Raises ValueError for a name that is held already."""
        for name, size in blocks.items():
            if name in self._blocks:
                raise ValueError(f"block {name} is held already; free it first")
            self._blocks[name] = (part, round(size))
            self._held[part] += round(size)
            self._total += round(size)
            if self._total > self._peak_total:
                self._peak_total, self._peak = self._total, dict(self._held)

    def free(self, *names: str) -> None:
        """Release. Raises KeyError for what is not held."""
        for name in names:
            part, size = self._blocks.pop(name)
            self._held[part] -= size
            self._total -= size

    def free_if_held(self, *names: str) -> None:
        self.free(*(name for name in names if name in self._blocks))

    def pass_by(self, part: Part, size: float) -> None:
        """Something that is there for a moment only."""
        self.take(part, momentary=size)
        self.free("momentary")

    def last_use(self, *names: str) -> None:
        """In the forward pass; from here on the backward pass alone needs them."""
        if not self.recording:
            self.free_if_held(*names)

    def rename(self, old: str, new: str) -> None:
        """The same memory under another name."""
        if new in self._blocks:
            raise ValueError(f"block {new} is held already; free it first")
        self._blocks[new] = self._blocks.pop(old)

    def holds(self, name: str) -> bool:
        return name in self._blocks

    @property
    def held(self) -> Bytes:
        """Now, without the parts that hold nothing."""
        return {part: size for part, size in self._held.items() if size}

    def peak_since_last_asked(self) -> Bytes:
        """The most held at once since this was last asked (or since the start)."""
        peak = self._peak
        self._peak_total, self._peak = self._total, dict(self._held)
        return {part: size for part, size in peak.items() if size}


def profile(forward: Callable[[Tape], None], backward: Callable[[Tape], None]) -> Profile:
    """Run both passes once. Raises ValueError if anything is left in the end, which is a mistake in the program."""
    tape = Tape()
    forward(tape)
    forward_peak, kept = tape.peak_since_last_asked(), tape.held
    backward(tape)
    backward_peak = tape.peak_since_last_asked()
    if tape.held:
        raise ValueError(f"blocks {sorted(tape._blocks)} are never freed; a layer's program must free all it takes")
    return Profile(kept=kept, forward_peak=forward_peak, backward_peak=backward_peak)
