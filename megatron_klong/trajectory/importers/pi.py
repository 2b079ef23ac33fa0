"""pi coding-agent session (JSON Lines) -> transcripts.

- Older logs are a list, newer ones a tree (`id`, `parentId`): the session is the path to the last entry; a branch left
  behind on which the model spoke is a transcript of its own, after it.
- A turn with stopReason aborted or length, or error after it had begun, is ABORTED; error with nothing said is
  API_ERROR, with the error's text. Aborted turns may be empty. Their calls were never made: no result is in the log.
- Compaction ends one transcript and begins another with what the model saw from there on: the summary (a user message,
  COPIED), then the entries that were kept. Replies given in an earlier transcript of the file are COPIED.
- A session branched or forked off another (branchedFrom, parentSession) repeats its entries: replies older than the
  session itself are COPIED, and its task is that of the session it comes from.
- A command the user ran (bashExecution) is a user message, unless it was kept out of the context.
- Models may change in mid-session; which one spoke is not kept.
System prompt and tool definitions are not in the log.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from megatron_klong.trajectory.importers.fields import a_list, a_text, an_id, an_object, unix_seconds
from megatron_klong.trajectory.importers.formats import Json, SessionFormat
from megatron_klong.trajectory.importers.pairing import paired
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.importers.tree import Node, Tree
from megatron_klong.trajectory.schema import Message, Provenance, Role, ToolCall, Transcript

_SUMMARIES = ("compaction", "branch_summary")
_ENTRIES = (*_SUMMARIES, "message", "custom_message")
_SUMMARY_ROLES = ("compactionSummary", "branchSummary")
_USER_ROLES = ("user", "custom", "hookMessage")
_STOPPED = {"aborted": Provenance.ABORTED, "length": Provenance.ABORTED}


def _recognises(rows: Sequence[Mapping[str, Json]]) -> bool:
    first = next(iter(rows), {})
    return first.get("type") == "session" and isinstance(first.get("id"), str) and "cwd" in first


def _transcripts(rows: Iterable[Mapping[str, Json]], source: str) -> Iterator[Transcript]:
    header: Mapping[str, Json] = {}
    nodes: list[Node] = []
    for number, row in enumerate(rows, start=1):
        if row.get("type") == "session":
            header = header or row
        nodes.append(_node(row, number))
    name = an_id(header.get("id"), "line 1: id") or source
    origin = an_id(header.get("parentSession") or header.get("branchedFrom"), "line 1: branchedFrom")
    began = unix_seconds(header.get("timestamp"), "line 1: timestamp") if origin else None
    task = PurePosixPath(origin).stem.rpartition("_")[2] if origin else name
    found = False
    for identity, messages in _contexts(nodes, name, began):
        found = True
        yield _transcript(identity, task, source, messages)
    if not found:
        yield _transcript(name, task, source, [])


def _transcript(identity: str, task: str, source: str, messages: Sequence[Message]) -> Transcript:
    return Transcript(
        id=identity,
        task=task,
        source=source,
        tools=(),
        messages=paired(messages),
        format=FORMAT.name,
    )


def _node(row: Mapping[str, Json], number: int) -> Node:
    place = f"line {number}"
    message = row.get("message")
    speaks = row.get("type") == "message" and isinstance(message, Mapping) and message.get("role") == "assistant"
    key = an_id(row.get("id"), f"{place}: id") if row.get("type") != "session" else None
    is_tree = key is not None and "parentId" in row
    return Node(
        key=key if key is not None else f"#{number}",
        parent=an_id(row["parentId"], f"{place}: parentId") if is_tree else "",  # "": the row before it
        line=number,
        row=row,
        turn=f"#{number}" if speaks else None,
    )


def _contexts(nodes: Sequence[Node], name: str, began: float | None) -> Iterator[tuple[str, list[Message]]]:
    """Name and messages of each context in which the model spoke, the oldest of the main path first."""
    given: set[str] = set()
    for number, path in enumerate(Tree(nodes).paths(lambda node: node.row.get("type") in _ENTRIES)):
        base = f"{name}/branch-{number}" if number else name
        cuts = [place for place, node in enumerate(path) if node.row.get("type") == "compaction"]
        for part, (start, stop) in enumerate(zip([None, *cuts], [*cuts, len(path)], strict=True)):
            seen = path[:stop] if start is None else [path[start], *_kept(path, start), *path[start + 1 : stop]]
            turns = {node.turn for node in seen if node.turn is not None}
            if turns - given:
                messages = [message for node in seen for message in _messages(node, given, began)]
                yield f"{base}/compacted-{part}" if part else base, messages
            given |= turns


def _kept(path: Sequence[Node], compaction: int) -> Sequence[Node]:
    """The entries before a compaction that stayed in the context behind its summary."""
    row = path[compaction].row
    first = row.get("firstKeptEntryId")
    if first is None and isinstance(row.get("firstKeptEntryIndex"), int):
        first_line = row["firstKeptEntryIndex"] + 1  # counted from 0, the header included
        start = next((n for n, node in enumerate(path) if node.line >= first_line), compaction)
    else:
        start = next((n for n, node in enumerate(path) if node.key == first), compaction)
    return [node for node in path[start:compaction] if node.row.get("type") != "compaction"]


def _messages(node: Node, given: set[str], began: float | None) -> Iterator[Message]:
    row, place = node.row, f"line {node.line}"
    time_seconds = unix_seconds(row.get("timestamp"), f"{place}: timestamp")
    kind = row.get("type")
    if kind in _SUMMARIES:
        yield _summary(row, place, time_seconds)
    elif kind == "custom_message":
        yield Message(role=Role.USER, content=_text(row.get("content"), place), time_seconds=time_seconds)
    elif kind == "message":
        message = an_object(row.get("message"), f"{place}: message")
        if node.turn is None:
            yield from _other(message, f"{place}: message", time_seconds)
            return
        copied = node.turn in given or (began is not None and time_seconds is not None and time_seconds < began)
        turn = _turn(message, f"{place}: message", time_seconds)
        yield replace(turn, provenance=Provenance.COPIED) if copied else turn


def _summary(fields: Mapping[str, Json], place: str, time_seconds: float | None) -> Message:
    return Message(
        role=Role.USER,
        content=a_text(fields.get("summary"), f"{place}: summary"),
        provenance=Provenance.COPIED,
        time_seconds=time_seconds,
    )


def _other(message: Mapping[str, Json], place: str, time_seconds: float | None) -> Iterator[Message]:
    role = message.get("role")
    if role in _SUMMARY_ROLES:
        yield _summary(message, place, time_seconds)
    elif role == "bashExecution":
        if not message.get("excludeFromContext"):
            yield Message(role=Role.USER, content=_bash(message, place), time_seconds=time_seconds)
    elif role == "toolResult":
        yield Message(
            role=Role.TOOL,
            content=_text(message.get("content"), f"{place}.content"),
            tool_call_id=an_id(message.get("toolCallId"), f"{place}.toolCallId"),
            time_seconds=time_seconds,
        )
    elif role in _USER_ROLES:
        content = _text(message.get("content"), f"{place}.content")
        yield Message(role=Role.USER, content=content, time_seconds=time_seconds)
    else:
        raise MalformedRow(f"{place}.role: {role!r} is no known role; the log is of an unknown version")


def _bash(message: Mapping[str, Json], place: str) -> str:
    command = a_text(message.get("command"), f"{place}.command")
    output = a_text(message.get("output") or "", f"{place}.output")
    code = message.get("exitCode")
    ending = "\n(cancelled)" if message.get("cancelled") else f"\n(exit code {code})" if code else ""
    return f"I ran this command:\n{command}\nIts output:\n{output}{ending}"


def _turn(message: Mapping[str, Json], place: str, time_seconds: float | None) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for number, raw in enumerate(_blocks(message.get("content"), f"{place}.content")):
        where = f"{place}.content[{number}]"
        block = an_object(raw, where)
        match block.get("type"):
            case "text":
                texts.append(a_text(block.get("text"), f"{where}.text"))
            case "thinking":
                thoughts.append(a_text(block.get("thinking"), f"{where}.thinking"))
            case "toolCall":
                calls.append(_call(block, where))
            case other:
                raise MalformedRow(f"{where}.type: {other!r} is no block of a turn; the log is of an unknown version")
    stop = message.get("stopReason")
    provenance = _STOPPED.get(stop, Provenance.MODEL) if isinstance(stop, str) else Provenance.MODEL
    if stop == "error":
        said = texts or thoughts or calls
        provenance = Provenance.ABORTED if said else Provenance.API_ERROR
        texts = texts if said else [a_text(message.get("errorMessage") or "", f"{place}.errorMessage")]
    return Message(
        role=Role.ASSISTANT,
        content="\n".join(texts),
        reasoning="\n".join(thoughts) or None,
        tool_calls=tuple(calls),
        provenance=provenance,
        time_seconds=time_seconds,
    )


def _call(block: Mapping[str, Json], place: str) -> ToolCall:
    arguments = block.get("arguments")
    return ToolCall(
        name=a_text(block.get("name"), f"{place}.name"),
        arguments={} if arguments is None else an_object(arguments, f"{place}.arguments"),
        id=an_id(block.get("id"), f"{place}.id"),
    )


def _blocks(content: Json, place: str) -> Sequence[Json]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [] if content is None else a_list(content, place)


def _text(content: Json, place: str) -> str:
    texts: list[str] = []
    for number, raw in enumerate(_blocks(content, place)):
        block = an_object(raw, f"{place}[{number}]")
        is_text = block.get("type") == "text"
        texts.append(a_text(block.get("text"), f"{place}[{number}].text") if is_text else f"[{block.get('type')}]")
    return "\n".join(texts)


FORMAT = SessionFormat(name="pi", recognises=_recognises, transcripts=_transcripts)
