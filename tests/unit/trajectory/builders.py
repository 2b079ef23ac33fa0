"""Transcripts for tests: a tokenizer one can read, builders that hide the boring fields, and random transcripts."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from megatron_klong.trajectory.context import ContextPolicy
from megatron_klong.trajectory.schema import Message, Reading, Role, Sampled, ToolCall, Transcript
from megatron_klong.trajectory.tokenizer import CONTROL_TOKENS, Tokenizer


def byte_tokenizer() -> Tokenizer:
    """A byte is a token; control tokens follow from 256."""
    control = {token: 256 + number for number, token in enumerate(CONTROL_TOKENS)}
    names = {identifier: token for token, identifier in control.items()}

    def decode(ids: Sequence[int]) -> str:
        parts = [names[i].encode() if i in names else bytes([i]) for i in ids]
        return b"".join(parts).decode(errors="replace")

    return Tokenizer(
        encode=lambda text: list(text.encode()),
        decode=decode,
        control=control,
        vocabulary_size=256 + len(CONTROL_TOKENS),
        sha256="bytes",
        path="bytes.json",
    )


def user(text: str) -> Message:
    return Message(role=Role.USER, content=text)


def system(text: str) -> Message:
    return Message(role=Role.SYSTEM, content=text)


def assistant(
    text: str = "", *, reasoning: str | None = None, calls: Sequence[ToolCall] = (), trained: bool = True
) -> Message:
    return Message(role=Role.ASSISTANT, content=text, reasoning=reasoning, tool_calls=tuple(calls), trained=trained)


def bash(command: str) -> ToolCall:
    return ToolCall(name="bash", arguments={"cmd": command})


def tool(text: str, reading: Reading = Reading.NONE) -> Message:
    return Message(role=Role.TOOL, content=text, reading=reading)


def transcript(*messages: Message, tools: Sequence[dict[str, object]] = ()) -> Transcript:
    return Transcript(id="t", task="t", source="test", tools=tuple(tools), messages=messages, tokenizer_sha256="bytes")


def sampled(text: str, end: str | None = "<|observation|>") -> Sampled:
    """What a policy sampled: `text` with control tokens where it spells them, and the token that ended it."""
    control = byte_tokenizer().control
    body: list[int] = []
    while text:
        token = next((token for token in control if text.startswith(token)), None)
        body += [control[token]] if token else list(text[0].encode())
        text = text[len(token) if token else 1 :]
    return Sampled(body=tuple(body), end=control[end] if end else None)


def policy(
    max_tokens: int = 200,
    *,
    reserve: int = 40,
    keep: int | float = 60,
    pin: str = "reading",
    cap: int | None = None,
) -> ContextPolicy:
    return ContextPolicy(
        max_tokens=max_tokens,
        reserve_tokens=reserve,
        keep=keep,
        pin=pin,  # type: ignore[arg-type]
        prefix_cap_tokens=max_tokens // 2 if cap is None else cap,
    )


words = st.text(alphabet="ab <|user|></think>\n", max_size=30)


def samples() -> st.SearchStrategy[Sampled]:
    """Replies of a policy that may say anything and end anyhow."""
    pieces = st.sampled_from(["<think>", "</think>", "\n", "a", "so ", "<tool_call>", "</tool_call>", "<|user|>"])
    ends = st.sampled_from(["<|observation|>", "<|observation|>", "<|user|>", "<|endoftext|>", None])
    return st.builds(sampled, st.lists(pieces, min_size=1, max_size=12).map("".join), ends)


@st.composite
def turns(draw: st.DrawFn, by_policy: bool = False) -> list[Message]:
    """An assistant message and what follows it."""
    calls = [bash(draw(words)) for _ in range(draw(st.integers(0, 2)))]
    reply = assistant(
        draw(words),
        reasoning=draw(st.none() | words),
        calls=calls,
        trained=draw(st.integers(0, 9)) > 0,
    )
    if by_policy and draw(st.integers(0, 2)):
        reply = replace(reply, sampled=draw(samples()))
    readings = st.sampled_from([Reading.NONE, Reading.NONE, Reading.PART, Reading.COMPLETE])
    results = [tool(draw(words), draw(readings)) for _ in calls]
    # A reply without a call is answered by a user; now and then a user speaks after tools too.
    if not calls or draw(st.integers(0, 5)) == 0:
        results.append(user(draw(words)))
    return [reply, *results]


@st.composite
def transcripts(draw: st.DrawFn, by_policy: bool = True) -> Transcript:
    """A task, then turns; the last turn may lack what follows it. by_policy: some replies are sampled ids."""
    head = [user(draw(words))]
    if draw(st.booleans()):
        head.insert(0, system(draw(words)))
    messages = [message for turn in draw(st.lists(turns(by_policy), max_size=25)) for message in turn]
    if messages and draw(st.booleans()):
        messages.append(assistant(draw(words)))
    tools = [{"type": "function", "function": {"name": "bash"}}] if draw(st.integers(0, 3)) == 0 else []
    return transcript(*head, *messages, tools=tools)


@st.composite
def policies(draw: st.DrawFn) -> ContextPolicy:
    """Windows from too small for anything to larger than any transcript here."""
    max_tokens = draw(st.integers(60, 1200))
    reserve = draw(st.integers(1, max(1, max_tokens // 3)))
    cap = draw(st.integers(0, max_tokens - reserve))
    keep = draw(st.integers(0, max_tokens - 1) | st.floats(0, 0.99))
    return policy(max_tokens, reserve=reserve, keep=keep, pin=draw(st.sampled_from(["task", "reading"])), cap=cap)
