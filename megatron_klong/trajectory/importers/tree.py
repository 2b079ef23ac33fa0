"""Session logs whose rows form a tree: which rows the model had in front of it.

A log grows by appending; going back and asking again starts a second branch from an earlier row. Always: a path runs
from a root to one row and never mixes branches; the first path leads to the last row of the log (what the session
came to); each further one leads to the last turn that no path before holds, so that every turn is on some path.
A row whose parent is not in the log (cut off in front, or deleted) follows the row before it in the file.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_klong.trajectory.importers.formats import Json
from megatron_klong.trajectory.importers.refusal import MalformedRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One row.  line: counted from 1, for messages.  parent: None for a root.  turn: the model's turn it is part of."""

    key: str
    parent: str | None
    line: int
    row: Mapping[str, Json]
    turn: str | None = None


class Tree:
    """`nodes` in the order of the file. Of several rows with one key the first counts: the others are copies."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes: list[Node] = []
        self._place: dict[str, int] = {}
        for node in nodes:
            if node.key not in self._place:
                self._place[node.key] = len(self.nodes)
                self.nodes.append(node)

    def path(self, leaf: Node) -> list[Node]:
        """The rows from the root to `leaf`. Raises MalformedRow if parents run in a circle."""
        path: list[Node] = []
        seen: set[int] = set()
        place: int | None = self._place[leaf.key]
        while place is not None:
            node = self.nodes[place]
            if place in seen:
                raise MalformedRow(f"line {node.line}: parents run in a circle from here; the file is damaged")
            seen.add(place)
            path.append(node)
            place = self._before(place)
        return path[::-1]

    def paths(self, is_leaf: Callable[[Node], bool]) -> Iterator[list[Node]]:
        """The path to the last row for which `is_leaf` holds, then one for each branch with turns of its own."""
        last = next((node for node in reversed(self.nodes) if is_leaf(node)), None)
        if last is None:
            return
        path = self.path(last)
        yield path
        given = {node.turn for node in path}
        for leaf in reversed(self.nodes):
            if leaf.turn is not None and leaf.turn not in given:
                path = self.path(leaf)
                yield path
                given.update(node.turn for node in path)

    def _before(self, place: int) -> int | None:
        parent = self.nodes[place].parent
        if parent is None:
            return None
        return self._place.get(parent, place - 1 if place > 0 else None)
