"""Episodes for tests: real worker processes, sandboxes and judges; only the model is scripted, over real HTTP."""

import re
from collections.abc import Callable
from pathlib import Path

from megatron_klong.agent.collect import collect
from megatron_klong.agent.config import EpisodeConfig
from megatron_klong.agent.records import export_records
from megatron_klong.agent.worker import Job, Played, load_model, run
from megatron_klong.config import load_config
from megatron_klong.serve.protocol import CompletionRequest
from megatron_klong.trajectory.episode import EpisodeRecord, read_episode
from megatron_klong.trajectory.schema import Role
from megatron_klong.trajectory.tokenizer import Tokenizer
from tests.integration.scripted_endpoint import Script, call, endpoint
from tests.unit.serve.scripted import Scripted, written

READ = call("read_file_chunk", file="/home/paper/paper.md")
SUBMIT = call("submit", end_message="done")


def settings(*flags: str) -> EpisodeConfig:
    """Small windows and short limits, changed by `flags`."""
    small = [
        *("--tools", '["bash", "read_file_chunk", "submit"]', "--timeout", "60s", "--hard_timeout", "70s"),
        *("--command_timeout", "20s", "--remind_every_turns", "3", "--output_characters", "2400"),
        *("--context.max_tokens", "2048", "--context.reserve_tokens", "256", "--context.keep_tokens", "300"),
        *("--context.prefix_cap_tokens", "1400"),
    ]
    return load_config(EpisodeConfig, [], [*small, *flags])


def job(folder: Path, tokenizer: Path, task: Path, url: str, config: EpisodeConfig, model: str = "scripted") -> Job:
    """One episode; a model with a provider in its name is taken as it is, others speak OpenAI's chat format."""
    return Job(
        name=model.replace("/", "-"),
        episodes=[Played(task_folder=str(task))],
        model=model if "/" in model else f"openai-api/teacher/{model}",
        base_url=url,
        tokenizer=str(tokenizer),
        settings=config,
        log_folder=str(folder / "logs"),
        record_folder=str(folder / "records"),
    )


def play(
    folder: Path, tokenizer: Path, task: Path, url: str, config: EpisodeConfig, model: str = "scripted"
) -> EpisodeRecord:
    """One episode in a worker process."""
    (finished,) = collect(
        [job(folder, tokenizer, task, url, config, model)], workers=1, output_folder=folder / "output"
    )
    return read_episode(Path(finished.record))


def play_script(
    folder: Path, tokenizer: Path, task: Path, script: Script, config: EpisodeConfig, **fields: str
) -> EpisodeRecord:
    """One episode with a scripted model, in this process: a worker's imports take longer than most episodes.

    fields: of the job.
    """
    with endpoint(script) as served:
        made = job(folder, tokenizer, task, served.url, config).model_copy(update=fields)
        run(made, load_model(made))
    (log,) = Path(made.log_folder).glob("*.eval")
    (record,) = export_records(log, Path(made.record_folder))
    return read_episode(record)


def results(record: EpisodeRecord) -> list[str]:
    """What the tools said."""
    return [message.content for message in record.messages if message.role is Role.TOOL]


def policy(tokenizer: Tokenizer, reply: Callable[[str], str]) -> Scripted:
    """A policy of our own that writes `reply(its prompt's end, as text)` and stops."""

    def ids(request: CompletionRequest) -> list[int]:
        tail = request.prompt_token_ids[-8000:]
        return written(tokenizer, reply(tokenizer.decode(tail)) + "<|observation|>")

    return Scripted(ids, tokenizer=tokenizer, vocabulary_size=tokenizer.vocabulary_size)


def last_number(pattern: str, text: str) -> int:
    """The number in the last match of a pattern with one group; 0 without any."""
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0
