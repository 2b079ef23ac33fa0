"""The system calls that a sandbox has no use for, as a filter that the kernel applies to all that runs in it.

Namespaces and missing privileges already forbid most of this. The filter keeps an agent away from the parts of the
kernel where escapes from namespaces were found (user namespaces within, mounts, bpf, io_uring, key rings, unusual
socket families), from AF_VSOCK and AF_ALG, which no namespace confines, and from `fallocate`, by which a disk is full
at once. What is refused gets an errno, mostly EPERM; ENOSYS or EOPNOTSUPP where programs then fall back to something
else: clone3 (its flags lie in memory, where a filter cannot look), io_uring, process_vm_readv, fallocate.

Allowed on purpose: ptrace, so that gdb and strace work. It reaches what the sandbox's own uid and process namespace
hold, and the first process of a sandbox is no more than what it runs.

Only the machine's own calls exist inside: 32-bit and x32 programs are killed (SIGSYS), whatever they ask.
"""

import errno
import tempfile
from collections.abc import Iterator
from functools import cache
from typing import Any

from megatron_klong.sandbox.results import SandboxUnavailable

_CLONE_NAMESPACES = (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # both put words into a terminal's input
_AF_INET, _AF_INET6, _AF_NETLINK = 2, 10, 16
_OTHER_FAMILIES_BELOW_NETLINK = (0, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15)
_SOCK_TYPE_MASK, _SOCK_RAW, _SOCK_DCCP, _SOCK_PACKET = 0xF, 3, 6, 10
_NETLINK_ROUTE = 0  # what getaddrinfo and `ip address` ask about interfaces

_EPERM = (
    # mounts and roots
    *("mount", "umount", "umount2", "pivot_root", "chroot", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick"),
    *("open_tree", "mount_setattr", "open_tree_attr", "quotactl", "quotactl_fd", "swapon", "swapoff"),
    *("name_to_handle_at", "open_by_handle_at", "fanotify_init"),
    # namespaces
    *("unshare", "setns"),
    # key rings, which belong to a uid and so to many sandboxes
    *("keyctl", "add_key", "request_key"),
    # large parts of the kernel
    *("bpf", "perf_event_open", "userfaultfd", "lookup_dcookie", "nfsservctl", "kcmp", "pidfd_getfd"),
    # the machine
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "acct", "syslog"),
    *("sethostname", "setdomainname", "settimeofday", "clock_settime", "adjtimex", "clock_adjtime", "stime"),
    *("iopl", "ioperm", "modify_ldt", "vm86", "vm86old", "uselib", "ustat", "sysfs", "_sysctl", "vhangup"),
)
_ENOSYS = ("clone3", "io_uring_setup", "io_uring_enter", "io_uring_register", "process_vm_readv", "process_vm_writev")


@cache
def filter_program() -> bytes:
    """The filter for this machine, as the kernel takes it. SandboxUnavailable without libseccomp."""
    try:
        import pyseccomp as seccomp  # type: ignore[import-untyped]  # fails to import without the library
    except (ImportError, RuntimeError, OSError) as error:
        raise SandboxUnavailable(
            f"the filter of system calls cannot be made ({error}): install libseccomp (apt-get install libseccomp2, "
            "dnf install libseccomp) and pyseccomp, or go without it (seccomp=False)"
        ) from error
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in _known(seccomp, _EPERM):
        rules.add_rule(seccomp.ERRNO(errno.EPERM), name)
    for name in _known(seccomp, _ENOSYS):
        rules.add_rule(seccomp.ERRNO(errno.ENOSYS), name)
    rules.add_rule(seccomp.ERRNO(errno.EOPNOTSUPP), "fallocate")
    for name, code, arguments in _by_argument(seccomp):
        rules.add_rule(seccomp.ERRNO(code), name, *arguments)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _known(seccomp: Any, names: tuple[str, ...]) -> Iterator[str]:
    """Those that the library knows, on any machine: it has no rule for what this one lacks."""
    for name in names:
        if seccomp.resolve_syscall(seccomp.system_arch(), name) != -1:
            yield name


def _by_argument(seccomp: Any) -> Iterator[tuple[str, int, list[Any]]]:
    """(call, errno, what its arguments must be like): all of a list holds at once, and a rule may compare each
    argument once."""

    def masked(position: int, mask: int, value: int) -> Any:
        return seccomp.Arg(position, seccomp.MASKED_EQ, mask, value)

    for flag in _CLONE_NAMESPACES:
        yield "clone", errno.EPERM, [masked(0, flag, flag)]
    for request in (_TIOCSTI, _TIOCLINUX):  # of which the kernel reads the lower half
        yield "ioctl", errno.EPERM, [masked(1, 0xFFFFFFFF, request)]
    for call in ("socket", "socketpair"):
        yield call, errno.EAFNOSUPPORT, [seccomp.Arg(0, seccomp.GT, _AF_NETLINK)]
        for family in _OTHER_FAMILIES_BELOW_NETLINK:
            yield call, errno.EAFNOSUPPORT, [seccomp.Arg(0, seccomp.EQ, family)]
    yield (
        "socket",
        errno.EPROTONOSUPPORT,
        [
            seccomp.Arg(0, seccomp.EQ, _AF_NETLINK),
            seccomp.Arg(2, seccomp.NE, _NETLINK_ROUTE),
        ],
    )
    for family in (_AF_INET, _AF_INET6):
        for kind in (_SOCK_RAW, _SOCK_DCCP, _SOCK_PACKET):
            yield "socket", errno.EPERM, [seccomp.Arg(0, seccomp.EQ, family), masked(1, _SOCK_TYPE_MASK, kind)]
    yield "personality", errno.EPERM, [seccomp.Arg(0, seccomp.NE, 0)]  # so gdb debugs at random addresses
