"""What every transcript must be, whatever format it came from: one place decides, for all importers.

    a turn of the model               else NO_TURN
    a tool's result answers a call    else MALFORMED: of the turn before it, by id where both have one
    calls and reasoning are the model's, a call's id the tool's

Why the turn before it: a window is cut between turns, and holds no result without its call.
"""

from megatron_klong.trajectory.importers.refusal import Refusal, RefusalReason
from megatron_klong.trajectory.schema import Message, Role, Transcript


def check(transcript: Transcript) -> Refusal | None:
    """Why a transcript cannot be used, if it cannot. Who knows where in its source it is says so in its place."""
    place = transcript.source
    if transcript.turns == 0:
        return _refused(place, RefusalReason.NO_TURN, "no assistant message in it")
    turn: Message | None = None
    for number, message in enumerate(transcript.messages):
        if message.role is Role.ASSISTANT:
            turn = message
        elif message.role is Role.TOOL:
            fault = _unanswerable(message, turn)
            if fault:
                earlier = any(
                    call.id is not None and call.id == message.tool_call_id
                    for before in transcript.messages[:number]
                    for call in before.tool_calls
                )
                late = "; its call is in an earlier turn" if earlier else ""
                detail = f"messages[{number}]: a tool's result {fault}{late}"
                return _refused(place, RefusalReason.MALFORMED, detail)
        if message.role is not Role.ASSISTANT and (message.tool_calls or message.reasoning):
            detail = f"messages[{number}]: a {message.role} message with calls or reasoning; only assistants have them"
            return _refused(place, RefusalReason.MALFORMED, detail)
    return None


def _unanswerable(result: Message, turn: Message | None) -> str | None:
    if turn is None:
        return "before any turn of the model"
    if not turn.tool_calls:
        return "after a turn that called none"
    ids = {call.id for call in turn.tool_calls}
    if result.tool_call_id is not None and None not in ids and result.tool_call_id not in ids:
        return f"for the call {result.tool_call_id!r}, which the turn before it did not make"
    return None


def _refused(place: str, reason: RefusalReason, detail: str) -> Refusal:
    return Refusal(source=place, reason=reason, detail=detail)
