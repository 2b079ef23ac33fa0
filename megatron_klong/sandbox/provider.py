"""Inspect AI's sandboxes "bubblewrap" and "apptainer": one sandbox of ours for each sample, each call one of its calls.

Always: a sample starts only after a real sandbox was seen to work, else the evaluation ends with the cure in
its message; a sandbox is closed with its sample, however that ended. Inspect's own limits on output and on
files read apply (INSPECT_SANDBOX_MAX_EXEC_OUTPUT_SIZE and _READ_FILE_SIZE), in place of those in
`SandboxLimits`. A command that timed out is never run again: it may have had effects. What a limit did to a command
is told at the end of its stderr. Processes do not outlive their command, so Inspect's `exec_remote` (background
services inside a sandbox) has nothing to talk to here; `sandbox.start` has them.
"""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, overload

from inspect_ai._util.error import PrerequisiteError  # no public name in inspect-ai 0.3
from inspect_ai.log._samples import sample_active  # nor this
from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxConnection,
    SandboxEnvironment,
    SandboxEnvironmentConfigType,
    SandboxEnvironmentLimits,
    SandboxUnavailableError,
    SandboxUserUnsupportedError,
    sandboxenv,
)
from pydantic import BaseModel

from megatron_klong.sandbox import apptainer, bubblewrap
from megatron_klong.sandbox.apptainer import Apptainer
from megatron_klong.sandbox.bubblewrap import Bubblewrap
from megatron_klong.sandbox.config import ApptainerConfig, BubblewrapConfig, SandboxConfig
from megatron_klong.sandbox.directories import SANDBOX_UID, SANDBOX_USER, reap_stale
from megatron_klong.sandbox.egress import shared
from megatron_klong.sandbox.egress.proxy import SandboxEgress
from megatron_klong.sandbox.first_process import SHELL_NAME
from megatron_klong.sandbox.results import CommandResult, CommandTimeout, OutputLimitExceeded, SandboxUnavailable
from megatron_klong.sandbox.sandbox import Sandbox

CONCURRENT_SANDBOXES = 64


class SandboxCommandTimeout(TimeoutError):
    """Carries what was printed under the name by which Inspect shows it to the model."""

    def __init__(self, error: CommandTimeout) -> None:
        super().__init__(str(error))
        self.truncated_output = (error.stdout + error.stderr).decode("utf-8", errors="replace")


class ProvidedSandbox[Config: SandboxConfig, Made: Sandbox](SandboxEnvironment):
    """The sandbox of one sample. The subclasses, registered with Inspect, know how it is made."""

    _of_task: ClassVar[defaultdict[str, set["ProvidedSandbox[Any, Any]"]]] = defaultdict(set)

    def __init__(self, sandbox: Made, egress: SandboxEgress | None = None) -> None:
        super().__init__()
        self._sandbox = sandbox
        self.egress = egress
        """Its way out, with what was asked there; None without a network."""

    @property
    def sandbox(self) -> Made:
        """The sandbox itself, for what Inspect's interface does not offer (archives, background commands)."""
        return self._sandbox

    @classmethod
    @abstractmethod
    def configured(cls, config: SandboxEnvironmentConfigType | None) -> Config:
        """The configuration of a task, or the default. PrerequisiteError."""

    @classmethod
    @abstractmethod
    async def check(cls, config: Config) -> None:
        """Try it out. SandboxUnavailable."""

    @classmethod
    @abstractmethod
    async def make(cls, config: Config, label: str, egress: SandboxEgress | None) -> Made:
        """A new sandbox. SandboxUnavailable, ValueError."""

    async def close(self) -> None:
        """End all that runs in it, then its network."""
        try:
            await self._sandbox.close()
        finally:
            if self.egress is not None:
                await self.egress.close()

    @classmethod
    def default_concurrency(cls) -> int | None:
        return CONCURRENT_SANDBOXES

    @classmethod
    async def task_init(cls, task_name: str, config: SandboxEnvironmentConfigType | None) -> None:
        given = cls.configured(config)
        try:
            given.limits()
            await cls.check(given)
            await shared.start(given.egress)
        except ValueError as error:
            raise PrerequisiteError(str(error)) from error
        except SandboxUnavailable as error:
            raise PrerequisiteError(f"The {cls._name()} sandbox is unavailable: {error}") from error

    @classmethod
    async def sample_init(
        cls, task_name: str, config: SandboxEnvironmentConfigType | None, metadata: dict[str, str]
    ) -> dict[str, SandboxEnvironment]:
        given, label = cls.configured(config), _label(task_name)
        egress = None
        try:
            egress = await shared.open_for(given.egress, metadata.get("folder"), label)
            sandbox = cls(await cls.make(given, label, egress), egress)
        except BaseException as error:
            if egress is not None:
                await egress.close()
            if isinstance(error, ValueError):
                raise PrerequisiteError(str(error)) from error
            raise
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
            await sandbox.close()
            cls._of_task[task_name].discard(sandbox)

    @classmethod
    async def task_cleanup(cls, task_name: str, config: SandboxEnvironmentConfigType | None, cleanup: bool) -> None:
        """Close what its samples did not. `cleanup=False` changes nothing: no sandbox outlives its
        process."""
        for sandbox in cls._of_task.pop(task_name, set()):
            await sandbox.close()
        await shared.end(cls.configured(config).egress)  # (Inspect names other tasks here than before)

    @classmethod
    async def cli_cleanup(cls, id: str | None) -> None:
        """`inspect sandbox cleanup`: remove what killed processes left; those that live are left alone."""
        for directory in reap_stale():
            print(f"removed {directory}")

    async def connection(self, *, user: str | None = None) -> SandboxConnection:
        if user not in (None, SANDBOX_USER, str(SANDBOX_UID)):
            raise ConnectionError(f"this sandbox knows only the user {SANDBOX_USER!r}")
        if self._sandbox.closed:
            raise ConnectionError("the sandbox is closed")
        return SandboxConnection(type=self._name(), command=self._sandbox.login())

    @classmethod
    def _name(cls) -> str:
        return cls.__name__.removesuffix("Sandbox").lower()

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
            raise SandboxUserUnsupportedError(f"this sandbox runs everything as {SANDBOX_USER!r}, not as {user!r}")
        try:
            result = await self._sandbox.run(
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
        stderr = _with_notice(result)
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
            await self._sandbox.write_file(file, contents.encode() if isinstance(contents, str) else contents)
        except SandboxUnavailable as error:
            raise SandboxUnavailableError(str(error)) from error

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...

    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...

    async def read_file(self, file: str, text: bool = True) -> str | bytes:
        try:
            limit_bytes = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
            contents = await self._sandbox.read_file(file, limit_bytes=limit_bytes)
        except OutputLimitExceeded as error:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None) from error
        except SandboxUnavailable as error:
            raise SandboxUnavailableError(str(error)) from error
        return contents.decode("utf-8") if text else contents


@sandboxenv(name="bubblewrap")
class BubblewrapSandbox(ProvidedSandbox[BubblewrapConfig, Bubblewrap]):
    """A sample's sandbox, made by bubblewrap."""

    @property
    def bubblewrap(self) -> Bubblewrap:
        """The sandbox itself."""
        return self.sandbox

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> BaseModel:
        return BubblewrapConfig(**config)

    @classmethod
    def configured(cls, config: SandboxEnvironmentConfigType | None) -> BubblewrapConfig:
        if config is None:
            return BubblewrapConfig()
        if not isinstance(config, BubblewrapConfig):
            raise PrerequisiteError(f"the bubblewrap sandbox takes a BubblewrapConfig, not {config!r}")
        return config

    @classmethod
    async def check(cls, config: BubblewrapConfig) -> None:
        await bubblewrap.check_available(seccomp=config.seccomp, image=config.image)

    @classmethod
    async def make(cls, config: BubblewrapConfig, label: str, egress: SandboxEgress | None) -> Bubblewrap:
        files: Mapping[str, Path] = {}
        if egress is not None:
            files = egress.files if config.image is None else egress.files_for(config.image)
        return await Bubblewrap.create(
            limits=config.limits(),
            environment={**(egress.environment if egress else {}), **config.environment},
            network=egress.network if egress else None,
            read_only_files=files,
            image=config.image,
            seccomp=config.seccomp,
            label=label,
        )


@sandboxenv(name="apptainer")
class ApptainerSandbox(ProvidedSandbox[ApptainerConfig, Apptainer]):
    """A sample's sandbox, made by Apptainer."""

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> BaseModel:
        return ApptainerConfig(**config)

    @classmethod
    def configured(cls, config: SandboxEnvironmentConfigType | None) -> ApptainerConfig:
        if not isinstance(config, ApptainerConfig):
            raise PrerequisiteError(f"the apptainer sandbox takes an ApptainerConfig with an image, not {config!r}")
        if config.egress.mode != "off":
            raise PrerequisiteError("apptainer sandboxes have no network (egress.mode off); bubblewrap's can have one")
        return config

    @classmethod
    async def check(cls, config: ApptainerConfig) -> None:
        await apptainer.check_available(config.image)

    @classmethod
    async def make(cls, config: ApptainerConfig, label: str, egress: SandboxEgress | None) -> Apptainer:
        return await Apptainer.create(
            image=config.image,
            limits=config.limits(),
            environment=config.environment,
            gpus=config.gpus,
            label=label,
        )


def _label(task_name: str) -> str:
    """For people who look at directories and control groups: the task, and the sample where that is known."""
    active = sample_active()
    number = "" if active is None else f"-{active.sample.id}-{active.epoch}"
    return f"{task_name.rpartition('/')[2][: 40 - len(number)]}{number}"


def _with_notice(result: CommandResult) -> str:
    stderr = result.stderr.decode("utf-8", errors="replace")
    if not result.notice:
        return stderr
    return f"{stderr}{'' if stderr.endswith(chr(10)) or not stderr else chr(10)}{SHELL_NAME}: {result.notice}\n"
