"""The Inspect AI model provider `klong/...`: messages in, token ids over the wire, messages out.

Always: what a policy sampled is never encoded again. Each reply's ids are kept by the id of its message (turns.py) and
put into later prompts as they were sampled, without the reasoning where history leaves it out; a reply that was not
sampled here, or whose text was changed since, is an error. Everything else is rendered by trajectory/glm.py.
Retries are Inspect's (`max_retries`): it knows how long an episode may wait.

    get_model("klong/policy", base_url="http://127.0.0.1:5000", tokenizer="tokenizer.json", turns="turns.jsonl")
"""

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from uuid import uuid4

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageTool,
    Content,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    RetryDecision,
    StopReason,
    modelapi,
)
from inspect_ai.tool import ToolCall, ToolChoice, ToolInfo, ToolParams

from megatron_klong.serve.client import Client, ServerError, served_tokenizer
from megatron_klong.serve.parsing import ParsedTurn, parse
from megatron_klong.serve.prompts import stop_ids
from megatron_klong.serve.protocol import Completion, CompletionRequest, ProtocolError, ReplyError
from megatron_klong.serve.turns import SampledTurn, TurnStore
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.sampled import sampled_segments
from megatron_klong.trajectory.schema import Message, Role
from megatron_klong.trajectory.segments import SegmentKind
from megatron_klong.trajectory.tokenizer import load_tokenizer

_UNSUPPORTED = (
    *("stop_seqs", "num_choices", "best_of", "frequency_penalty", "presence_penalty", "logit_bias"),
    "response_schema",
)


_ROLES = {str(role): role for role in Role}
_KEPT_TOOLS = 64
_KEPT_IDS = 1 << 24  # 64 MiB: what 128 episodes have in windows of 131072 tokens


@dataclass(slots=True)
class _Prompt:
    """What an episode was last asked, without what asks for the reply: its next prompt mostly begins so.

    preamble: of its tools.  contents: who said what, or with which error: these very objects.
    """

    episode: str
    """Named to the server, so that one with replicas finds its cache."""
    preamble: list[int]
    contents: list[tuple[Role, object, object]] = field(default_factory=list)
    ids: array[int] = field(default_factory=lambda: array("i"))


@dataclass(frozen=True, slots=True)
class _Tools:
    """What is made of tools; `parameters` are held so that their addresses are theirs as long as this is kept."""

    parameters: list[ToolParams]
    preamble: list[int]
    schemas: dict[str, dict[str, dict[str, object]]]


class KlongAPI(ModelAPI):
    """One policy behind one server.

    Model arguments: `tokenizer` (without it, the file that the server names, on a file system they share), and `turns`
    (a file that keeps what is sampled).
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - Inspect's own signature; it is not changed
        *,
        tokenizer: str | None = None,
        turns: str | None = None,
    ) -> None:
        if base_url is None and "://" in model_name:
            base_url = model_name
        if base_url is None:
            raise ValueError(f"klong/{model_name}: where is its server? Give base_url, or klong/http://host:port")
        super().__init__(model_name=model_name, base_url=base_url, api_key=api_key, config=config)
        self._tokenizer = load_tokenizer(Path(tokenizer or served_tokenizer(base_url, api_key)))
        self.renderer = GlmRenderer(self._tokenizer)
        self._stop_ids = stop_ids(self._tokenizer)
        self._tools: dict[tuple[tuple[str, str, int], ...], _Tools] = {}
        self._prompts: OrderedDict[str, _Prompt] = OrderedDict()  # of each episode, by its last turn
        self._kept_ids = 0
        self._longest: int | None = None
        self._client = Client(base_url, token=api_key)
        self.turns = TurnStore(None if turns is None else Path(turns))

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Sample one turn; a prompt that is too long gives an output that says so.

        Raises ServerError, ProtocolError, UnknownTurn.
        """
        _check_supported(tool_choice, config)
        last = next((message.id for message in reversed(input) if message.role == "assistant"), None)
        asked = self._prompt(input, tools, self._prompts.get(last or ""))
        prompt = self._asking(asked.ids, input)
        longest = await self._longest_sequence()
        if len(prompt) >= longest:
            # Inspect's word for it; the scaffold asks again with less history
            said = f"a prompt of {len(prompt)} tokens leaves no room in the server's {longest}"
            return ModelOutput.from_content(self.model_name, said, stop_reason="model_length")
        request = CompletionRequest(
            prompt_token_ids=tuple(prompt),
            max_tokens=min(config.max_tokens or longest, longest - len(prompt)),
            temperature=1.0 if config.temperature is None else config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            top_k=config.top_k or 0,
            stop_token_ids=self._stop_ids,
            seed=config.seed,
            prompt_cache_key=asked.episode,
        )
        completion = await self._client.complete(request)
        turn = SampledTurn.of(uuid4().hex, request, completion)
        self.turns.add(turn)
        self._keep(asked, last, turn.key)
        return self._output(turn, completion, parse(turn.body, self._tokenizer, self._described(tools).schemas))

    def prompt_ids(self, messages: list[ChatMessage], tools: list[ToolInfo]) -> list[int]:
        """The ids that ask for the next turn. Raises UnknownTurn, ProtocolError."""
        return self._asking(self._prompt(messages, tools).ids, messages)

    def _asking(self, ids: array[int], messages: list[ChatMessage]) -> list[int]:
        """A prompt, with what asks for the reply."""
        previous = Message(role=_ROLES[messages[-1].role]) if messages else None
        closing = [identifier for segment in self.renderer.closing(previous) for identifier in segment.ids]
        return [*ids, *closing, *self.renderer.header.ids]

    def _prompt(self, messages: list[ChatMessage], tools: list[ToolInfo], last: _Prompt | None = None) -> _Prompt:
        """`last` gone on with, if the messages begin with its; else made anew. Raises UnknownTurn, ProtocolError."""
        preamble = self._described(tools).preamble
        contents = [_content(message) for message in messages]
        known = len(last.contents) if last else 0
        if last and last.preamble is preamble and all(map(_same, last.contents, contents)) and known <= len(contents):
            ids = last.ids[:]
        else:
            known, ids = 0, array("i", preamble)
        before = contents[known - 1][0] if known else None
        for message, (role, _, _) in zip(messages[known:], contents[known:], strict=True):
            ids.extend(self._message_ids(message, before))
            before = role
        return _Prompt(episode=last.episode if last else uuid4().hex, preamble=preamble, contents=contents, ids=ids)

    def _keep(self, prompt: _Prompt, before: str | None, turn: str) -> None:
        """For the turn that follows this one, in place of what was kept for this one."""
        replaced = self._prompts.pop(before or "", None)
        self._kept_ids += len(prompt.ids) - (len(replaced.ids) if replaced else 0)
        self._prompts[turn] = prompt
        while self._kept_ids > _KEPT_IDS and len(self._prompts) > 1:
            self._kept_ids -= len(self._prompts.popitem(last=False)[1].ids)

    def _message_ids(self, message: ChatMessage, before: Role | None) -> array[int]:
        if isinstance(message, ChatMessageAssistant):
            return array("i", [*self.renderer.header.ids, *self._sampled_ids(message)])
        return array("i", self._encode_text_message(_ROLES[message.role], _text(message), before))

    def _described(self, tools: list[ToolInfo]) -> _Tools:
        """Kept for tools whose parameters are the same objects, as those of our scaffold are at every turn."""
        key = tuple((tool.name, tool.description, id(tool.parameters)) for tool in tools)
        kept = self._tools.get(key)
        if kept is None:
            preamble = self.renderer.preamble([_definition(tool) for tool in tools])
            kept = _Tools(
                parameters=[tool.parameters for tool in tools],
                preamble=[identifier for segment in preamble for identifier in segment.ids],
                schemas=_schemas(tools),
            )
            if len(self._tools) >= _KEPT_TOOLS:
                self._tools.clear()
            self._tools[key] = kept
        return kept

    def _encode_text_message(self, role: Role, text: str, previous: Role | None) -> list[int]:
        before = Message(role=previous) if previous is not None else None
        rendered = self.renderer.message(Message(role=role, content=text), before)
        return [identifier for segment in rendered.segments for identifier in segment.ids]

    def _sampled_ids(self, message: ChatMessageAssistant) -> list[int]:
        """A turn's ids as history shows it: reasoning that the message no longer holds is left out."""
        body = self.turns[message.id or "without id"].body
        parsed = parse(body, self._tokenizer)
        if parsed.content != message.text.strip():
            raise ProtocolError(f"the text of message {message.id} is no longer what was sampled")
        holds_reasoning = isinstance(message.content, list) and any(
            isinstance(part, ContentReasoning) for part in message.content
        )
        left_out = SegmentKind.REASONING if parsed.reasoning and not holds_reasoning else None
        segments = sampled_segments(body, self._tokenizer)
        return [identifier for segment in segments if segment.kind is not left_out for identifier in segment.ids]

    def _output(self, turn: SampledTurn, completion: Completion, parsed: ParsedTurn) -> ModelOutput:
        content: list[Content] = []
        if parsed.reasoning:
            content.append(ContentReasoning(reasoning=parsed.reasoning))
        content.append(ContentText(text=parsed.content))
        calls = [
            ToolCall(
                id=f"{turn.key}-{number}",
                function=call.name,
                arguments=dict(call.arguments),
                parse_error=call.error,
            )
            for number, call in enumerate(parsed.calls)
        ]
        message = ChatMessageAssistant(
            id=turn.key, content=content, tool_calls=calls or None, model=self.model_name, source="generate"
        )
        reason: StopReason = "stop" if turn.stopped else "max_tokens"
        prompt, generated = turn.prompt_tokens, len(turn.ids)
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(message=message, stop_reason="tool_calls" if calls and turn.stopped else reason)
            ],
            usage=ModelUsage(input_tokens=prompt, output_tokens=generated, total_tokens=prompt + generated),
        )

    async def count_tokens(self, input: str | list[ChatMessage], config: GenerateConfig | None = None) -> int:
        """Of a text; or of the whole prompt that these messages, without tools, would make."""
        return len(self._tokenizer.encode(input) if isinstance(input, str) else self.prompt_ids(input, []))

    async def count_text_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    async def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def should_retry(self, ex: Exception) -> RetryDecision:
        """What may go better another time; a reply without ids or log-probabilities counts as such."""
        if isinstance(ex, ServerError) and ex.status == 429:
            return RetryDecision.rate_limit(ex.retry_after)
        if isinstance(ex, ServerError) and ex.passing:
            return RetryDecision.transient(ex.retry_after)
        if isinstance(ex, ReplyError):
            return RetryDecision.transient()
        return RetryDecision.no()

    def force_reasoning_history(self) -> Literal["all"]:
        """The scaffold decides what a prompt holds of earlier reasoning; Inspect must not."""
        return "all"

    def connection_key(self) -> str:
        return self._client.base_url

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _longest_sequence(self) -> int:
        if self._longest is None:
            self._longest = await self._client.max_sequence_length()
        return self._longest


@modelapi(name="klong")
def klong() -> type[ModelAPI]:
    """What Inspect AI finds under the name `klong/...`."""
    return KlongAPI


def _content(message: ChatMessage) -> tuple[Role, object, object]:
    return _ROLES[message.role], message.content, message.error if isinstance(message, ChatMessageTool) else None


def _same(one: tuple[Role, object, object], other: tuple[Role, object, object]) -> bool:
    """Whether these are the same objects."""
    return one[0] is other[0] and one[1] is other[1] and one[2] is other[2]


def _text(message: ChatMessage) -> str:
    if isinstance(message, ChatMessageTool) and message.error is not None:
        return f"Error: {message.error.message}"
    return message.text


def _definition(tool: ToolInfo) -> dict[str, object]:
    """As agent/messages.py writes it; the window's tokens are counted with that."""
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters.model_dump(exclude_none=True),
    }
    return {"type": "function", "function": function}


def _schemas(tools: list[ToolInfo]) -> dict[str, dict[str, dict[str, object]]]:
    return {
        tool.name: {name: schema.model_dump(exclude_none=True) for name, schema in tool.parameters.properties.items()}
        for tool in tools
    }


def _check_supported(tool_choice: ToolChoice, config: GenerateConfig) -> None:
    """Raise ProtocolError for what a request asks and the engine cannot do."""
    if tool_choice not in ("auto", "none"):
        raise ProtocolError(f"tool_choice {tool_choice}: a policy cannot be made to call a tool; use auto")
    asked = [name for name in _UNSUPPORTED if getattr(config, name) not in (None, [], {})]
    if asked and (asked != ["num_choices"] or config.num_choices != 1):
        raise ProtocolError(f"{', '.join(asked)}: not implemented by this provider; leave it out")
