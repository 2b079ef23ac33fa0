"""How OpenHands wrote its observations into the prompt: the text the model saw, from the fields a file keeps.

Always: the text is the prompt's, not the event's `message` (a line for people). Files from before calls were stored
(0.12 and older) have another wording, known by the exit code beside the command instead of in `metadata`.
Source: All-Hands-AI/OpenHands, openhands/memory/conversation_memory.py and events/observation/commands.py;
software-agent-sdk uses the wording of commands too.
"""

from collections.abc import Mapping

from megatron_klong.trajectory.importers.fields import a_list, a_text, an_object
from megatron_klong.trajectory.importers.formats import Json

_CUT = "\n[... Observation truncated due to length ...]\n"
_NEVER_CUT = {"read", "browse", "user_rejected"}
_OLD_PREFIX = "OBSERVATION:\n"


def observation_text(
    kind: str, event: Mapping[str, Json], extras: Mapping[str, Json], place: str, max_chars: int, *, called: bool
) -> str:
    """The words of one observation. called: whether a tool call led to it. Raises MalformedRow."""
    content = a_text(event.get("content") or "", f"{place}.content")
    if kind == "run":
        return _run(content, extras, place, max_chars, called)
    if kind == "run_ipython":
        content = "\n".join(map(_without_image, content.split("\n")))
    text = content if kind in _NEVER_CUT else cut(content, max_chars)
    if not called and kind in ("run_ipython", "edit", "delegate"):
        return _OLD_PREFIX + text
    if kind == "error":
        return text + "\n[Error occurred in processing last action]"
    if kind == "user_rejected":
        return _OLD_PREFIX + cut(content, max_chars) + "\n[Last action has been rejected by the user]"
    return text


def command_text(content: str, metadata: Mapping[str, Json]) -> str:
    """The output of a command with what the shell's prompt said after it."""
    text = f"{metadata.get('prefix') or ''}{content}{metadata.get('suffix') or ''}"
    if metadata.get("working_dir"):
        text += f"\n[Current working directory: {metadata['working_dir']}]"
    if metadata.get("py_interpreter_path"):
        text += f"\n[Python interpreter: {metadata['py_interpreter_path']}]"
    if metadata.get("exit_code", -1) != -1:
        text += f"\n[Command finished with exit code {metadata['exit_code']}]"
    return text


def recalled_text(extras: Mapping[str, Json], place: str) -> str:
    """What a recall brought, its parts one after another. The prompt's own words around them are not in the file."""
    keys = ("repo_instructions", "additional_agent_instructions", "conversation_instructions", "date")
    parts = [a_text(extras[key], f"{place}.extras.{key}") for key in keys if extras.get(key)]
    for knowledge in a_list(extras.get("microagent_knowledge") or [], f"{place}.extras.microagent_knowledge"):
        where = f"{place}.extras.microagent_knowledge"
        parts.append(a_text(an_object(knowledge, where).get("content") or "", f"{where}.content"))
    return "\n\n".join(filter(None, parts))


def cut(text: str, max_chars: int) -> str:
    """The middle taken out of what is longer than `max_chars`."""
    half = max_chars // 2
    return text if len(text) <= max_chars else text[:half] + _CUT + text[len(text) - half :]


def _run(content: str, extras: Mapping[str, Json], place: str, max_chars: int, called: bool) -> str:
    if "exit_code" in extras and "metadata" not in extras:
        end = f"\n[Command {extras.get('command_id')} finished with exit code {extras['exit_code']}]"
        return _OLD_PREFIX + cut(content, max_chars) + end
    text = command_text(content, an_object(extras.get("metadata") or {}, f"{place}.extras.metadata"))
    return cut(text if called else f"\nObserved result of command executed by user:\n{text}", max_chars)


def _without_image(line: str) -> str:
    mark = "![image](data:image/png;base64,"
    return f"{mark} ...) already displayed to user" if mark in line else line
