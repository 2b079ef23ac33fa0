"""Inspect AI's sandbox "bubblewrap": one `Bubblewrap` for each sample; each call of Inspect becomes one of ours.

Always: a sample starts only after a real sandbox was seen to work, else the evaluation ends with the cure in
its message; a sandbox is closed with its sample, however that ended. Inspect's own limits on output and on
files read apply (INSPECT_SANDBOX_MAX_EXEC_OUTPUT_SIZE and _READ_FILE_SIZE), in place of those in
`SandboxLimits`. A command that timed out is never run again: it may have had effects. Processes do not
outlive their command, so Inspect's `exec_remote` (background services inside a sandbox) has nothing to talk
to here.
"""

from collections import defaultdict
from typing import Any, ClassVar, Literal, overload

from inspect_ai._util.error import PrerequisiteError  # no public name in inspect-ai 0.3
from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentConfigType,
    SandboxEnvironmentLimits,
    SandboxUnavailableError,
    SandboxUserUnsupportedError,
    sandboxenv,
)
from pydantic import BaseModel, ConfigDict

from megatron_klong.sandbox.bubblewrap import (
    Bubblewrap,
    CommandTimeout,
    OutputLimitExceeded,
    SandboxUnavailable,
    check_available,
    reap_stale,
)
from megatron_klong.sandbox.directories import SANDBOX_UID, SANDBOX_USER
from megatron_klong.sandbox.first_process import SHELL_NAME
from megatron_klong.sandbox.limits import SandboxLimits

CONCURRENT_SANDBOXES = 64


class BubblewrapConfig(BaseModel):
    """Limits of each sandbox of a task: `SandboxEnvironmentSpec("bubblewrap", BubblewrapConfig(processes=100))`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_bytes: int | None = None
    processes: int | None = None
    file_bytes: int | None = None
    open_files: int | None = None
    cpu_seconds: int | None = None
    shared_memory_bytes: int | None = None

    def limits(self) -> SandboxLimits:
        """The limits that are set here, and the defaults of the others. ValueError."""
        return SandboxLimits(**self.model_dump(exclude_none=True))


class SandboxCommandTimeout(TimeoutError):
    """Carries what was printed under the name by which Inspect shows it to the model."""

    def __init__(self, error: CommandTimeout) -> None:
        super().__init__(str(error))
        self.truncated_output = (error.stdout + error.stderr).decode("utf-8", errors="replace")


@sandboxenv(name="bubblewrap")
class BubblewrapSandbox(SandboxEnvironment):
    """The sandbox of one sample."""

    _of_task: ClassVar[defaultdict[str, set["BubblewrapSandbox"]]] = defaultdict(set)

    def __init__(self, bubblewrap: Bubblewrap) -> None:
        super().__init__()
        self._bubblewrap = bubblewrap

    @property
    def bubblewrap(self) -> Bubblewrap:
        """The sandbox itself, for what Inspect's interface does not offer (archives, bytes of output)."""
        return self._bubblewrap

    @classmethod
    def default_concurrency(cls) -> int | None:
        return CONCURRENT_SANDBOXES

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> BaseModel:
        return BubblewrapConfig(**config)

    @classmethod
    async def task_init(cls, task_name: str, config: SandboxEnvironmentConfigType | None) -> None:
        _limits_of(config)
        try:
            await check_available()
        except SandboxUnavailable as error:
            raise PrerequisiteError(f"The bubblewrap sandbox is unavailable: {error}") from error

    @classmethod
    async def sample_init(
        cls, task_name: str, config: SandboxEnvironmentConfigType | None, metadata: dict[str, str]
    ) -> dict[str, SandboxEnvironment]:
        sandbox = cls(await Bubblewrap.create(limits=_limits_of(config), label=task_name))
        cls._of_task[task_name].add(sandbox)
        return {"default": sandbox}

    @classmethod
    async def sample_cleanup(
        cls,
        task_name: str,
        config: SandboxEnvironmentConfigType | None,
        environments: dict[str, SandboxEnvironment],
        interrupted: bool,
    ) -> None:
        for environment in environments.values():
            sandbox = environment.as_type(cls)
            await sandbox.bubblewrap.close()
            cls._of_task[task_name].discard(sandbox)

    @classmethod
    async def task_cleanup(cls, task_name: str, config: SandboxEnvironmentConfigType | None, cleanup: bool) -> None:
        """Close what its samples did not. `cleanup=False` changes nothing: no sandbox outlives its
        process."""
        for sandbox in cls._of_task.pop(task_name, set()):
            await sandbox.bubblewrap.close()

    @classmethod
    async def cli_cleanup(cls, id: str | None) -> None:
        """`inspect sandbox cleanup bubblewrap`: remove what killed processes left; those that live are left
        alone."""
        for directory in reap_stale():
            print(f"removed {directory}")

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        if user not in (None, SANDBOX_USER, str(SANDBOX_UID)):
            raise SandboxUserUnsupportedError(f"a bubblewrap sandbox runs everything as {SANDBOX_USER!r}, not {user!r}")
        try:
            result = await self._bubblewrap.run(
                cmd,
                input=input.encode() if isinstance(input, str) else input,
                cwd=cwd,
                env=env,
                timeout_seconds=timeout,
                output_bytes=SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE,
            )
        except CommandTimeout as error:
            raise SandboxCommandTimeout(error) from error
        except OutputLimitExceeded as error:
            partial = error.partial.decode("utf-8", errors="replace")
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR, partial) from error
        except SandboxUnavailable as error:
            raise SandboxUnavailableError(str(error)) from error
        stderr = result.stderr.decode("utf-8", errors="replace")
        if result.returncode == 126 and stderr.startswith(f"{SHELL_NAME}: ") and "Permission denied" in stderr:
            raise PermissionError(stderr.strip())
        return ExecResult(
            success=result.returncode == 0,
            returncode=result.returncode,
            stdout=result.stdout.decode("utf-8", errors="replace"),
            stderr=stderr,
        )

    async def write_file(self, file: str, contents: str | bytes) -> None:
        try:
            await self._bubblewrap.write_file(file, contents.encode() if isinstance(contents, str) else contents)
        except SandboxUnavailable as error:
            raise SandboxUnavailableError(str(error)) from error

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...

    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...

    async def read_file(self, file: str, text: bool = True) -> str | bytes:
        try:
            limit_bytes = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
            contents = await self._bubblewrap.read_file(file, limit_bytes=limit_bytes)
        except OutputLimitExceeded as error:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None) from error
        except SandboxUnavailable as error:
            raise SandboxUnavailableError(str(error)) from error
        return contents.decode("utf-8") if text else contents


def _limits_of(config: SandboxEnvironmentConfigType | None) -> SandboxLimits:
    if config is None:
        return SandboxLimits()
    if not isinstance(config, BubblewrapConfig):
        raise PrerequisiteError(f"the bubblewrap sandbox takes a BubblewrapConfig, not {config!r}")
    try:
        return config.limits()
    except ValueError as error:
        raise PrerequisiteError(str(error)) from error
