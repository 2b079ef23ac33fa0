"""Calls and their results in the order a model meets them, whatever order a log has.

Always, in what `paired` returns: a result stands behind the turn that called it, before anything else, in the order
of the calls (a chat template without ids pairs them by order alone). So
- a result that the log has later, or between the lines of a parallel call, is moved to its call: no API shows a model
  a turn before all its results are there;
- a call without a result that something follows gets the result NO_RESULT: the model was not left without an answer,
  the log is. The last turn of a transcript may stay unanswered: its session ended there;
- a result without a call (or a second one for the same call) gets a call UNKNOWN_CALL in front, an assistant message
  of provenance SYNTHETIC: it was seen, so it stays, and reports count the stand-in.
"""

from collections.abc import Sequence

from megatron_klong.trajectory.schema import Message, Provenance, Role, ToolCall

NO_RESULT = "[no result recorded]"
UNKNOWN_CALL = "unknown_call"


def paired(messages: Sequence[Message]) -> tuple[Message, ...]:
    """`messages` with every result behind its call."""
    answers, strays = _answers(messages)
    last = max((n for n, message in enumerate(messages) if message.role is not Role.TOOL or n in strays), default=-1)
    ordered: list[Message] = []
    for number, message in enumerate(messages):
        if message.role is not Role.TOOL:
            ordered.append(message)
            found = answers.get(number, {})
            if found or number < last:
                ordered += [found.get(place) or _missing(call) for place, call in enumerate(message.tool_calls)]
        elif number in strays:
            ordered += [_stand_in(message), message]
    return tuple(ordered)


def _answers(messages: Sequence[Message]) -> tuple[dict[int, dict[int, Message]], set[int]]:
    """Number of a turn -> number of its call -> the result; and the numbers of the results that have no call."""
    answers: dict[int, dict[int, Message]] = {}
    strays: set[int] = set()
    waiting: dict[str | None, list[tuple[int, int]]] = {}
    for number, message in enumerate(messages):
        for place, call in enumerate(message.tool_calls):
            waiting.setdefault(call.id, []).append((number, place))
        if message.role is not Role.TOOL:
            continue
        calls = waiting.get(message.tool_call_id)
        if not calls:
            strays.add(number)
            continue
        # Ids are unique in a sound log. Where they are not, or missing, the newest turn is answered, first call first.
        turn, place = min(calls, key=lambda at: (-at[0], at[1]))
        calls.remove((turn, place))
        answers.setdefault(turn, {})[place] = message
    return answers, strays


def _missing(call: ToolCall) -> Message:
    return Message(role=Role.TOOL, content=NO_RESULT, tool_call_id=call.id)


def _stand_in(result: Message) -> Message:
    call = ToolCall(name=UNKNOWN_CALL, arguments={}, id=result.tool_call_id)
    return Message(
        role=Role.ASSISTANT,
        tool_calls=(call,),
        provenance=Provenance.SYNTHETIC,
        time_seconds=result.time_seconds,
    )
