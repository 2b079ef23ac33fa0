"""One sample of an Inspect AI log -> transcript, rebuilt from its model events.

`messages` of a sample is what was left when it ended: after context trimming, not the run. So the run is put together
from the prompts and replies of the agent's model events; `messages` only adds what came after the last reply.

Whose reply it is. Not the agent's, and no turn: calls inside a span of a scorer, a tool, a handoff, a subtask or a
branch (judges, subagents); calls under a model role, if any has none; calls of a model other than the evaluated one;
conversations that begin neither with the agent's first message nor with its first user message. Nor are calls that
failed, and replies whose prompt the scaffold sent again as it was: they were thrown away.
An assistant message in a prompt that no reply of the agent made is context.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_klong.trajectory.importers.fields import a_list, an_id
from megatron_klong.trajectory.importers.formats import Json
from megatron_klong.trajectory.importers.inspect_messages import (
    Attachments,
    Told,
    identity,
    objects,
    optional,
    seconds,
    to_message,
)
from megatron_klong.trajectory.importers.pairing import paired
from megatron_klong.trajectory.importers.refusal import MalformedRow
from megatron_klong.trajectory.schema import Transcript

FORMAT_NAME = "inspect"
_OTHERS_SPANS = frozenset({"scorer", "scorers", "tool", "handoff", "subtask", "branch", "sentinel"})
_GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}  # how Inspect's own metrics count its letters
_EPISODE_KEY = "klong_episode"  # in the store of our own scaffold, which names tasks in its own way


def transcript(sample: Json, evaluation: Mapping[str, Json], source: str) -> Transcript:
    """Convert one parsed sample. evaluation: `eval` of the log's header, empty if it has none. Raises MalformedRow."""
    if not isinstance(sample, Mapping) or "id" not in sample:
        raise MalformedRow("id: missing; this is no sample of an Inspect log")
    messages = objects(sample.get("messages"), "messages")
    attachments = Attachments(optional(sample, "attachments", ""))
    calls = _agent_calls(_calls(sample), an_id(evaluation.get("model"), "eval.model"))
    thread = _Thread(attachments)
    calls = thread.of_one_conversation(calls, messages)
    for call in calls:
        thread.add_prompt(call.prompt)
        thread.add_reply(call)
    thread.finish(messages)
    times = {an_id(event.get("id"), "events.id"): event.get("completed") for event in _events(sample, "tool")}
    task, run = _names(sample, evaluation)
    return Transcript(
        id=run,
        task=task,
        source=source,
        tools=_tools(calls, attachments),
        messages=paired(
            [to_message(told, attachments, f"message {number}", times) for number, told in enumerate(thread.told)]
        ),
        score=_score(optional(sample, "scores", "")),
        format=FORMAT_NAME,
    )


def _names(sample: Mapping[str, Any], evaluation: Mapping[str, Json]) -> tuple[str, str]:
    """Task and id; for our own scaffold those of the episode record of the same run."""
    metadata = optional(sample, "metadata", "")
    if _EPISODE_KEY in optional(sample, "store", ""):
        task = str(metadata.get("task", sample["id"]))
        model = str(evaluation.get("model", "")).rsplit("/", 1)[-1]
        return task, f"{task}/{model}/{metadata.get('rollout') or sample.get('epoch')}"
    task = f"{evaluation.get('task', '')}/{sample['id']}"
    return task, f"{task}#{sample.get('epoch', 1)}"


def _score(scores: Mapping[str, Any]) -> float | None:
    """The score, if there is just one and it is a number; which of several is meant cannot be known."""
    values = [score.get("value") for score in scores.values() if isinstance(score, Mapping)]
    if len(values) != 1:
        return None
    value = _GRADES.get(values[0], values[0]) if isinstance(values[0], str) else values[0]
    return float(value) if isinstance(value, int | float) and value == value else None


# -- model events


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """A model event that has a reply."""

    model: str | None
    role: str | None
    prompt: Sequence[Mapping[str, Any]]
    reply: Mapping[str, Any]
    stop_reason: str | None
    failed: bool
    tools: Sequence[Mapping[str, Any]]
    time_seconds: float | None


def _events(sample: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return [event for event in objects(sample.get("events"), "events") if event.get("event") == kind]


def _calls(sample: Mapping[str, Any]) -> list[_Call]:
    """Every finished model event outside the spans of others. Newer logs keep messages of prompts in one pool."""
    pool = objects(optional(sample, "events_data", "").get("messages"), "events_data.messages")
    spans = {an_id(event.get("id"), "events.id"): event for event in _events(sample, "span_begin")}
    found: list[_Call] = []
    scorers = 0  # logs older than spans have steps, which nest
    for number, event in enumerate(objects(sample.get("events"), "events")):
        if event.get("event") == "step" and event.get("type") == "scorer":
            scorers += 1 if event.get("action") == "begin" else -1
        if event.get("event") != "model" or scorers or _is_others(event.get("span_id"), spans, f"events[{number}]"):
            continue
        if not event.get("pending") and not event.get("error"):
            found += _call(event, pool, f"events[{number}]")
    return found


def _call(event: Mapping[str, Any], pool: Sequence[Mapping[str, Any]], place: str) -> list[_Call]:
    """The call of a model event, none if it has no reply. Of several replies the first is the one a scaffold reads."""
    output = optional(event, "output", place)
    return [
        _Call(
            model=an_id(event.get("model"), f"{place}.model"),
            role=an_id(event.get("role"), f"{place}.role"),
            prompt=_prompt(event, pool, place),
            reply=optional(choice, "message", f"{place}.output.choices[0]"),
            stop_reason=an_id(choice.get("stop_reason"), f"{place}.output.choices[0].stop_reason"),
            failed=bool(output.get("error")),
            tools=objects(event.get("tools"), f"{place}.tools"),
            time_seconds=seconds(event.get("completed") or event.get("timestamp"), f"{place}.completed"),
        )
        for choice in objects(output.get("choices"), f"{place}.output.choices")[:1]
    ]


def _is_others(span: Json, spans: Mapping[str | None, Mapping[str, Any]], place: str) -> bool:
    inside: set[str | None] = set()
    while (name := an_id(span, f"{place}.span_id")) in spans:
        if name in inside:
            raise MalformedRow(f"{place}.span_id: the span {name!r} is inside itself; copy the log again")
        inside.add(name)
        if str(spans[name].get("type")) in _OTHERS_SPANS:
            return True
        span = spans[name].get("parent_id")
    return False


def _prompt(event: Mapping[str, Any], pool: Sequence[Mapping[str, Any]], place: str) -> Sequence[Mapping[str, Any]]:
    if event.get("input_refs") is None:
        return objects(event.get("input"), f"{place}.input")
    prompt: list[Mapping[str, Any]] = []
    for reference in a_list(event["input_refs"], f"{place}.input_refs"):
        if not isinstance(reference, list) or [type(bound) for bound in reference] != [int, int]:
            raise MalformedRow(f"{place}.input_refs: {reference!r} is no range of messages; copy the log again")
        start, stop = reference
        if not 0 <= start <= stop <= len(pool):
            raise MalformedRow(
                f"{place}.input_refs: [{start}, {stop}) is outside the {len(pool)} messages of events_data; "
                "the sample is damaged, copy the log again"
            )
        prompt += pool[start:stop]
    return prompt


def _agent_calls(calls: Sequence[_Call], model: str | None) -> list[_Call]:
    """Without those of other roles and models."""
    roles = Counter(call.role for call in calls)
    role = None if None in roles or not roles else roles.most_common(1)[0][0]
    calls = [call for call in calls if call.role == role]
    models = Counter(call.model for call in calls)
    model = model if model in models or not models else models.most_common(1)[0][0]
    return [call for call in calls if call.model == model]


def _tools(calls: Sequence[_Call], attachments: Attachments) -> tuple[Mapping[str, Any], ...]:
    """All tools the agent was offered, in the order in which they first were."""
    found: dict[str, Mapping[str, Any]] = {}
    for tool in (tool for call in calls for tool in call.tools):
        name = str(tool.get("name"))
        if name not in found:
            keys = ("name", "description", "parameters")
            function = {key: attachments.resolved(tool[key]) for key in keys if key in tool}
            found[name] = {"type": "function", "function": function}
    return tuple(found.values())


# -- the run, prompt by prompt


class _Thread:
    """What the agent was shown and said, in order; every prompt adds what it has beyond the end of it.

    Messages are compared by number: those of one id, or equal in what they say, have the same. One number may stand
    in several places ("please go on"), and the pool gives equal messages one id, so places are matched, not numbers.
    """

    def __init__(self, attachments: Attachments) -> None:
        self.told: list[Told] = []
        self._numbers: list[int] = []  # of `told`
        self._attachments = attachments
        self._by_id: dict[str, int] = {}
        self._by_content: dict[object, int] = {}

    def of_one_conversation(self, calls: Sequence[_Call], messages: Sequence[Mapping[str, Any]]) -> list[_Call]:
        """The calls that begin as the sample's messages do; if none does, as most of them do."""
        heads = [self._head(call.prompt) for call in calls]
        own = self._head(messages)
        if not any(head & own for head in heads) and heads:
            own = Counter(heads).most_common(1)[0][0]
        return [call for call, head in zip(calls, heads, strict=True) if head & own]

    def add_prompt(self, prompt: Sequence[Mapping[str, Any]]) -> None:
        numbers = [self._number(message) for message in prompt]
        same = _common_start(self._numbers, numbers)
        new_start = _end_in(self._numbers, numbers)
        if new_start is None and self.told[-1].is_reply:
            new_start = self._start_after_another_reply(prompt, numbers)
        if new_start is None:  # an agent that repeats itself: the end looks like the start
            new_start = _end_in(self._numbers, numbers, may_overlap=True)
        if new_start is None:  # a context made anew, such as a summary
            new_start = len(prompt)
        known = set(self._numbers)
        for place in range(same, len(prompt)):
            if place >= new_start or numbers[place] not in known:
                self._add(Told(raw=prompt[place]), numbers[place])

    def _start_after_another_reply(self, prompt: Sequence[Mapping[str, Any]], numbers: list[int]) -> int | None:
        """Where the new begins if the prompt has all before the last reply, but not that reply."""
        start = _end_in(self._numbers[:-1], numbers)
        if start is None:
            return None
        if start == len(prompt):  # thrown away: nothing follows from it
            self.told.pop()
            self._numbers.pop()
            return start
        if prompt[start].get("role") == "assistant":  # edited by the scaffold; kept as it was said
            numbers[start] = self._numbers[-1]
            return start + 1
        return None

    def add_reply(self, call: _Call) -> None:
        told = Told(
            raw=call.reply,
            is_reply=True,
            stop_reason=call.stop_reason,
            failed=call.failed,
            time_seconds=call.time_seconds,
        )
        self._add(told, self._number(call.reply))

    def finish(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Add what came after the last reply. Without any reply in the events, the messages are all there is."""
        new_start = _end_in(self._numbers, [self._number(message) for message in messages])
        has_events = bool(self.told)
        if new_start is not None:
            for message in messages[new_start:]:
                is_reply = not has_events and message.get("role") == "assistant" and message.get("source") != "input"
                self.told.append(Told(raw=message, is_reply=is_reply))

    def _add(self, told: Told, number: int) -> None:
        self.told.append(told)
        self._numbers.append(number)

    def _number(self, message: Mapping[str, Any]) -> int:
        identifier = an_id(message.get("id"), "messages.id")
        if identifier in self._by_id:
            return self._by_id[identifier]
        content = identity(message, self._attachments)
        number = self._by_content.setdefault(content, len(self._by_content))
        if identifier is not None:
            self._by_id[identifier] = number
        return number

    def _head(self, messages: Sequence[Mapping[str, Any]]) -> frozenset[int]:
        """The numbers of the first message and of the first that is not the system's."""
        others = [message for message in messages if message.get("role") != "system"]
        return frozenset(self._number(message) for message in (*messages[:1], *others[:1]))


def _common_start(known: Sequence[int], prompt: Sequence[int]) -> int:
    same = 0
    while same < min(len(known), len(prompt)) and known[same] == prompt[same]:
        same += 1
    return same


def _end_in(known: Sequence[int], prompt: Sequence[int], *, may_overlap: bool = False) -> int | None:
    """Where in the prompt the end of what is known lies: what follows is new. None if it is not there.

    A prompt that was trimmed has the start of what is known, a gap, and its end: the longest end is looked for.
    """
    same = _common_start(known, prompt)
    if same == len(known):
        return same
    if may_overlap:
        same = 0
    longest, place = 0, None
    for stop in range(len(prompt), same, -1):
        length = 0
        while length < stop - same and length < len(known) and prompt[stop - 1 - length] == known[-1 - length]:
            length += 1
        if length > longest:
            longest, place = length, stop
    return place
