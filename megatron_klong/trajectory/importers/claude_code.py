"""Claude Code session (JSON Lines) -> transcripts.

- One message of the model lies on several lines with the same message.id (a block a line): one turn.
- `parentUuid` makes the rows a tree. The session is the path to the last user or assistant row. Results of parallel
  calls hang beside that path, behind the call's own line: they are no branches, and are found by their tool_use_id.
  A branch left behind (the user went back) on which the model spoke is a transcript of its own, after the session.
- Compaction replaces the history by a summary, so it ends one transcript and begins another with the summary as its
  first user message (COPIED). Both hold exactly what the model saw; together they hold every turn once.
- Side chains (sub-agents) are transcripts of their own, after the session.
- A turn found in an earlier transcript of the file, or written by another session (resumed, forked), is COPIED.
- Model `<synthetic>`: API_ERROR, or SYNTHETIC where the row says that it is no API error ("No response requested.").
- ABORTED: a turn directly before "[Request interrupted by user]" whose calls have no result and whose end is not
  recorded; a turn cut at max_tokens; a turn that neither says nor calls anything.
Other rows (summaries for the session list, file snapshots, hooks, progress, attachments) hold no message. System
prompt, tool definitions and attached reminders are not in the log, so the context is less than what the model saw.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from megatron_klong.trajectory.importers.anthropic_messages import assistant_message, blocks_of, text_of, user_messages
from megatron_klong.trajectory.importers.fields import a_text, an_id, unix_seconds
from megatron_klong.trajectory.importers.formats import Json, SessionFormat
from megatron_klong.trajectory.importers.pairing import paired
from megatron_klong.trajectory.importers.tree import Node, Tree
from megatron_klong.trajectory.schema import Message, Provenance, Role, Transcript

_INTERRUPTED = "[Request interrupted by user]"
_MESSAGE_FREE = ("summary", "file-history-snapshot", "queue-operation", "progress", "system")
_FINISHED = frozenset({"end_turn", "tool_use", "stop_sequence", "refusal", "pause_turn"})
_CUT = frozenset({"max_tokens", "model_context_window_exceeded"})
_ROW_BEFORE = ""  # a parent that no log has, so: the row before it
# What is read; the rest of a row (the result once more, for display) is up to half of a file.
_KEYS = ("type", "subtype", "message", "timestamp", "sessionId", "isCompactSummary", "isApiErrorMessage", "forkedFrom")


def _recognises(rows: Sequence[Mapping[str, Json]]) -> bool:
    return any(_is_message_row(row) and ("sessionId" in row or "parentUuid" in row) for row in rows) or (
        all(row.get("type") in _MESSAGE_FREE for row in rows)
        and any(row.keys() & {"leafUuid", "snapshot", "sessionId"} for row in rows)
    )


def _is_message_row(row: Mapping[str, Json]) -> bool:
    return row.get("type") in ("user", "assistant") and isinstance(row.get("message"), Mapping)


def _transcripts(rows: Iterable[Mapping[str, Json]], source: str) -> Iterator[Transcript]:
    main: list[Node] = []
    agents: dict[str, list[Node]] = {}
    for number, row in enumerate(rows, start=1):
        if row.get("uuid") is None and not _is_message_row(row):
            continue
        agent = an_id(row.get("agentId"), f"line {number}: agentId")
        rows_of = agents.setdefault(f"agent-{agent}" if agent else "side", []) if row.get("isSidechain") else main
        rows_of.append(_node(row, number))
    session = _session_of([*main, *(node for nodes in agents.values() for node in nodes)]) or source
    main_keys = {node.key for node in main}
    given: set[str] = set()
    chains = [_Chain(main, session, session, given)]
    for name, nodes in agents.items():
        rooted = [replace(node, parent=None) if node.parent in main_keys else node for node in nodes]
        chains.append(_Chain(rooted, session, f"{session}/{name}", given))
    found = False
    for chain in chains:
        for identity, messages in chain.transcripts():
            found = True
            yield _transcript(identity, session, source, messages)
    if not found:
        yield _transcript(session, session, source, [])


def _transcript(identity: str, session: str, source: str, messages: Sequence[Message]) -> Transcript:
    return Transcript(
        id=identity,
        task=session,
        source=source,
        tools=(),
        messages=paired(messages),
        format=FORMAT.name,
    )


def _session_of(nodes: Sequence[Node]) -> str | None:
    """The session that wrote the last row: rows of another were carried over."""
    last = max((node for node in nodes if node.row.get("sessionId")), key=lambda node: node.line, default=None)
    return None if last is None else a_text(last.row["sessionId"], f"line {last.line}: sessionId")


def _node(row: Mapping[str, Json], number: int) -> Node:
    place = f"line {number}"
    key = an_id(row.get("uuid"), f"{place}: uuid")
    parent = an_id(row.get("parentUuid"), f"{place}: parentUuid")
    if row.get("subtype") == "compact_boundary":
        parent = parent or an_id(row.get("logicalParentUuid"), f"{place}: logicalParentUuid") or _ROW_BEFORE
    turn = None
    if row.get("type") == "assistant" and _is_message_row(row):
        turn = an_id(row["message"].get("id"), f"{place}: message.id") or key or f"#{number}"
    return Node(
        key=key or f"#{number}",
        parent=_ROW_BEFORE if key is None else parent,
        line=number,
        row={name: row[name] for name in _KEYS if name in row},
        turn=turn,
    )


class _Chain:
    """The rows of the session, or of one agent. given: the turns that are in some transcript already."""

    def __init__(self, nodes: Sequence[Node], session: str, name: str, given: set[str]) -> None:
        self._tree = Tree(nodes)
        self._session = session
        self._name = name
        self._given = given
        self._lines_of_turn: dict[str, list[Node]] = {}
        self._results: dict[str, list[Node]] = {}  # by the id of the call
        for node in self._tree.nodes:
            if node.turn is not None:
                self._lines_of_turn.setdefault(node.turn, []).append(node)
            elif _is_message_row(node.row):
                for call_id in _result_ids(node):
                    self._results.setdefault(call_id, []).append(node)

    def transcripts(self) -> Iterator[tuple[str, list[Message]]]:
        """Name and messages of each context in which the model spoke, the oldest of the main path first."""
        for number, path in enumerate(self._tree.paths(lambda node: _is_message_row(node.row))):
            for part, context in enumerate(_contexts(path)):
                turns = {node.turn for node in context if node.turn is not None}
                if turns - self._given:
                    name = f"{self._name}/branch-{number}" if number else self._name
                    yield f"{name}/compacted-{part}" if part else name, self._messages(context)
                self._given |= turns

    def _messages(self, context: Sequence[Node]) -> list[Message]:
        messages: list[Message] = []
        used = {node.key for node in context}
        begun: set[str] = set()
        open_turn: str | None = None
        for node in context:
            if node.turn is not None:
                open_turn = node.turn
                if node.turn not in begun:
                    begun.add(node.turn)
                    messages.append(self._turn(node.turn))
                    messages += self._results_beside(messages[-1], used)
            elif _is_message_row(node.row):
                if open_turn and _is_interrupt(node) and self._is_open(messages[-1], open_turn):
                    messages[-1] = replace(messages[-1], provenance=Provenance.ABORTED)
                messages += _user(node)
                open_turn = None
        return messages

    def _turn(self, turn: str) -> Message:
        lines = self._lines_of_turn[turn]
        blocks: list[Mapping[str, Json]] = []
        for node in lines:
            found = blocks_of(node.row["message"].get("content"), f"line {node.line}: message.content")
            blocks += [block for block in found if block not in blocks]  # a copied line says nothing new
        message = assistant_message(blocks, f"line {lines[0].line}: message.content", time_seconds=_time(lines[-1]))
        return replace(message, provenance=self._provenance(turn, message))

    def _provenance(self, turn: str, message: Message) -> Provenance:
        rows = [node.row for node in self._lines_of_turn[turn]]
        if any(row["message"].get("model") == "<synthetic>" or row.get("isApiErrorMessage") for row in rows):
            no_error = all(row.get("isApiErrorMessage") is False for row in rows)
            return Provenance.SYNTHETIC if no_error else Provenance.API_ERROR
        if turn in self._given or any(
            row.get("forkedFrom") or row.get("sessionId", self._session) != self._session for row in rows
        ):
            return Provenance.COPIED
        said = message.content or message.tool_calls
        if _stop_reasons(rows) & _CUT or not (said or _stop_reasons(rows) & _FINISHED):
            return Provenance.ABORTED
        return message.provenance

    def _results_beside(self, turn: Message, used: set[str]) -> list[Message]:
        """Results of parallel calls, which hang beside the path."""
        beside: list[Message] = []
        for call in turn.tool_calls:
            rows = self._results.get(call.id or "", [])
            if not any(row.key in used for row in rows):
                for row in rows[:1]:
                    used.add(row.key)
                    beside += _user(row)
        return beside

    def _is_open(self, message: Message, turn: str) -> bool:
        """Whether nothing shows that the model had finished the turn."""
        if message.provenance is not Provenance.MODEL or message.role is not Role.ASSISTANT:
            return False
        answered = any(call.id in self._results for call in message.tool_calls)
        return not answered and not _stop_reasons([node.row for node in self._lines_of_turn[turn]]) & _FINISHED


def _contexts(path: Sequence[Node]) -> Iterator[list[Node]]:
    """The path, cut before each compaction."""
    context: list[Node] = []
    for node in path:
        begins = node.row.get("subtype") == "compact_boundary" or node.row.get("isCompactSummary")
        if begins and any(_is_message_row(before.row) for before in context):
            yield context
            context = []
        context.append(node)
    yield context


def _user(node: Node) -> list[Message]:
    content = node.row["message"].get("content")
    messages = user_messages(content, f"line {node.line}: message.content", time_seconds=_time(node))
    if node.row.get("isCompactSummary"):
        return [replace(message, provenance=Provenance.COPIED) for message in messages]
    return messages


def _result_ids(node: Node) -> list[str]:
    blocks = blocks_of(node.row["message"].get("content"), f"line {node.line}: message.content")
    ids = [block.get("tool_use_id") for block in blocks if block.get("type") == "tool_result"]
    return [call_id for call_id in ids if isinstance(call_id, str)]


def _is_interrupt(node: Node) -> bool:
    place = f"line {node.line}: message.content"
    return text_of(node.row["message"].get("content"), place).strip() == _INTERRUPTED


def _stop_reasons(rows: Iterable[Mapping[str, Json]]) -> set[str]:
    reasons = (row["message"].get("stop_reason") for row in rows)
    return {reason for reason in reasons if isinstance(reason, str)}


def _time(node: Node) -> float | None:
    return unix_seconds(node.row.get("timestamp"), f"line {node.line}: timestamp")


FORMAT = SessionFormat(name="claude_code", recognises=_recognises, transcripts=_transcripts)
