"""Stands in for Apptainer, which cannot be installed where these tests run: the same arguments, bubblewrap behind them.

Strict where Apptainer is: an option that it does not know, or one without which it would show the host (--containall,
--userns, --no-home), is an error. The image is a directory; its marker file is shown inside.
"""

import os
import sys

FLAGS = {
    "--userns",
    "--containall",
    "--no-home",
    "--cleanenv",
    "--no-eval",
    "--no-init",
    "--no-privs",
    "--net",
    "--nv",
}
VALUES = {
    "--no-mount",
    "--hostname",
    "--network",
    "--bind",
    "--pwd",
    "--memory",
    "--memory-swap",
    "--pids-limit",
    "--cpus",
}
NOBODY = "64001"  # the tests run as root, who would own what is made inside


def fail(reason: str) -> None:
    print(f"FATAL:   {reason}", file=sys.stderr)
    raise SystemExit(255)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:2] != ["--silent", "exec"]:
        fail(f"unknown command {arguments[:2]}")
    arguments = arguments[2:]
    flags, values, binds = set(), {}, []
    while arguments and arguments[0].startswith("-"):
        name = arguments.pop(0)
        if name in FLAGS:
            flags.add(name)
        elif name == "--bind":
            binds.append(arguments.pop(0).split(":"))
        elif name in VALUES:
            values[name] = arguments.pop(0)
        else:
            fail(f"unknown flag: {name}")
    for needed in ("--userns", "--containall", "--no-home", "--cleanenv"):
        if needed not in flags:
            fail(f"without {needed} the host would be seen")
    image, *command = arguments
    if not os.path.isdir(image):
        fail(f"could not open image {image}: no such file or directory")
    bwrap = ["bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--uid", NOBODY]
    bwrap += [
        "--hostname",
        values["--hostname"],
        "--die-with-parent",
        "--new-session",
        "--as-pid-1",
        "--cap-drop",
        "ALL",
    ]
    bwrap += ["--unshare-net"] if values.get("--network") == "none" else []
    bwrap += ["--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib"]
    bwrap += ["--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev", "--ro-bind", image, "/image"]
    for source, target, mode in binds:
        bwrap += ["--ro-bind" if mode == "ro" else "--bind", source, target]
    bwrap += ["--setenv", "APPTAINER_CONTAINER", image, "--setenv", "LEAKED", "yes"]
    bwrap += ["--remount-ro", "/", "--chdir", values["--pwd"], *command]
    become = ["unshare", "--setgid", NOBODY, "--setuid", NOBODY] if os.geteuid() == 0 else []
    os.execvp([*become, *bwrap][0], [*become, *bwrap])


main()
