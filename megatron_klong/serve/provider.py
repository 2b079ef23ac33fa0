"""The Inspect AI model provider `klong/...`: messages in, token ids over the wire, messages out.

Always: what a policy sampled is never encoded again. Each reply's ids are kept by the id of its message (turns.py) and
put into later prompts as they were sampled, without the reasoning where history leaves it out; a reply that was not
sampled here, or whose text was changed since, is an error. Everything else is rendered by trajectory/glm.py.
Retries are Inspect's (`max_retries`), which counts what they cost as waited for.

    get_model("klong/policy", base_url="http://127.0.0.1:5000", tokenizer="tokenizer.json", turns="turns.jsonl")
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
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
from inspect_ai.tool import ToolCall, ToolCallError, ToolChoice, ToolDef, ToolInfo, ToolParams
from pydantic import PrivateAttr
from tenacity import RetryCallState

from megatron_klong.serve.client import Client, ServerError, seconds_to_wait, served_tokenizer
from megatron_klong.serve.parsing import ParsedTurn, parse
from megatron_klong.serve.prompts import stop_ids
from megatron_klong.serve.protocol import PromptIds, ProtocolError, ReplyError, Sampling
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
_KEPT_IDS = 1 << 24  # 100 MiB: what 128 episodes have in windows of 131072 tokens


class BriefTool(ToolInfo):
    """A tool by its name alone, for requests after an episode's first; the provider finds the whole one in it.

    Inspect's log holds the tools of every request, field by field: of hundreds of turns they would be most of it.
    """

    _whole: ToolInfo = PrivateAttr()

    @classmethod
    def of(cls, tool: ToolDef) -> "BriefTool":
        brief = cls(name=tool.name, description="as at the first turn")
        brief._whole = ToolInfo(name=tool.name, description=tool.description, parameters=tool.parameters)
        return brief

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Itself: Inspect copies all tools at every turn, and nothing changes these."""
        return self


type _Content = tuple[str, str | list[Content], ToolCallError | None]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What an episode was last asked: its next prompt mostly begins so.

    preamble: of its tools.  contents: who said what, or with which error.  prompt: without what asks for the reply.
    """

    episode: str
    """Named to the server, so that one with replicas finds its cache."""
    preamble: PromptIds
    contents: list[_Content]
    prompt: PromptIds


@dataclass(frozen=True, slots=True)
class _Tools:
    """What is made of tools; `parameters` are held so that their addresses are theirs as long as this is kept."""

    parameters: list[ToolParams]
    preamble: PromptIds
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
        self._asked: OrderedDict[str, _Asked] = OrderedDict()  # of each episode, by its last turn
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
        described = self._described(tools)
        asked = self._ask(input, described.preamble, self._asked.get(last or ""))
        prompt = self._asking(asked)
        longest = await self._longest_sequence()
        if len(prompt) >= longest:
            # Inspect's word for it; the scaffold asks again with less history
            said = f"a prompt of {len(prompt)} tokens leaves no room in the server's {longest}"
            return ModelOutput.from_content(self.model_name, said, stop_reason="model_length")
        sampling = Sampling(
            max_tokens=min(config.max_tokens or longest, longest - len(prompt)),
            temperature=1.0 if config.temperature is None else config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            top_k=config.top_k or 0,
            stop_token_ids=self._stop_ids,
            seed=config.seed,
            prompt_cache_key=asked.episode,
        )
        turn = SampledTurn.of(uuid4().hex, prompt, await self._client.sample(prompt, sampling))
        self.turns.add(turn)
        self._keep(asked, last, turn.key)
        return self._output(turn, parse(turn.body, self._tokenizer, described.schemas))

    def prompt(self, messages: list[ChatMessage], tools: list[ToolInfo]) -> PromptIds:
        """What asks for the next turn. Raises UnknownTurn, ProtocolError."""
        return self._asking(self._ask(messages, self._described(tools).preamble))

    def _asking(self, asked: _Asked) -> PromptIds:
        previous = Message(role=_ROLES[asked.contents[-1][0]]) if asked.contents else None
        closing = [identifier for segment in self.renderer.closing(previous) for identifier in segment.ids]
        return asked.prompt.followed_by([*closing, *self.renderer.header.ids])

    def _ask(self, messages: list[ChatMessage], preamble: PromptIds, last: _Asked | None = None) -> _Asked:
        """`last` gone on with, if the messages begin with its; else made anew. Raises UnknownTurn, ProtocolError."""
        contents: list[_Content] = [
            (message.role, message.content, message.error if message.role == "tool" else None) for message in messages
        ]
        known = len(last.contents) if last else 0
        if last and last.preamble is preamble and last.contents == contents[:known]:  # mostly the very same objects
            prompt = last.prompt
        else:
            known, prompt = 0, preamble
        new = array("i")
        before = _ROLES[contents[known - 1][0]] if known else None
        for message in messages[known:]:
            new.extend(self._message_ids(message, before))
            before = _ROLES[message.role]
        episode = last.episode if last else uuid4().hex
        return _Asked(episode=episode, preamble=preamble, contents=contents, prompt=prompt.followed_by(new))

    def _keep(self, asked: _Asked, before: str | None, turn: str) -> None:
        """For the turn that follows this one, in place of what was kept for this one."""
        replaced = self._asked.pop(before or "", None)
        self._kept_ids += len(asked.prompt) - (len(replaced.prompt) if replaced else 0)
        self._asked[turn] = asked
        while self._kept_ids > _KEPT_IDS and len(self._asked) > 1:
            self._kept_ids -= len(self._asked.popitem(last=False)[1].prompt)

    def _message_ids(self, message: ChatMessage, before: Role | None) -> array[int]:
        if isinstance(message, ChatMessageAssistant):
            return array("i", [*self.renderer.header.ids, *self._sampled_ids(message)])
        return array("i", self._encode_text_message(_ROLES[message.role], _text(message), before))

    def _described(self, tools: list[ToolInfo]) -> _Tools:
        """Kept for tools whose parameters are the same objects, as those of our scaffold are at every turn."""
        tools = [tool._whole if isinstance(tool, BriefTool) else tool for tool in tools]
        key = tuple((tool.name, tool.description, id(tool.parameters)) for tool in tools)
        kept = self._tools.get(key)
        if kept is None:
            preamble = self.renderer.preamble([_definition(tool) for tool in tools])
            kept = _Tools(
                parameters=[tool.parameters for tool in tools],
                preamble=PromptIds(array("i", [identifier for segment in preamble for identifier in segment.ids])),
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

    def _output(self, turn: SampledTurn, parsed: ParsedTurn) -> ModelOutput:
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
        return len(self._tokenizer.encode(input) if isinstance(input, str) else self.prompt(input, []))

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

    def retry_wait(self) -> Callable[[RetryCallState], float]:
        """Sooner than Inspect would by itself (3 seconds, 6, 12, ...): the server is ours, and says for how long."""

        def seconds(state: RetryCallState) -> float:
            fault = state.outcome.exception() if state.outcome else None
            return seconds_to_wait(fault, state.attempt_number - 1)

        return seconds

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
