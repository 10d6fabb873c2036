"""The process in which code under test runs: `python -s -S -P confined.py RESULT_FD < job.json`.

It imports nothing but the standard library, limits itself, gives up files, network and other
processes through the kernel, and only then runs the code. What it may do afterwards is listed here
and nowhere else; docs/post-training.md says what that leaves open.
"""

import ctypes
import json
import os
import resource
import struct
import sys
from typing import Any

REFUSED = 3
"""Exit code where the kernel cannot confine this process."""

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SIGKILL = 9

# Landlock: the same numbers on every architecture; rights of its first version, with later ones by
# the version that added them (linux/landlock.h).
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_REGULAR = (1 << n for n in (1, 2, 3, 5, 8))
_FIRST_VERSION, _REFER, _TRUNCATE, _IOCTL = (1 << 13) - 1, 1 << 13, 1 << 14, 1 << 15
_ADDED = {2: _REFER, 3: _TRUNCATE, 5: _IOCTL}
_READ = _READ_FILE | _READ_DIR
_OWN = _READ | _WRITE_FILE | _REMOVE_FILE | _MAKE_REGULAR | _TRUNCATE  # files, no folders

# System calls that stay allowed, by name: (x86-64, arm64). All others fail with EPERM: none that
# starts a process or thread or a program, sends a signal, opens a socket, traces, mounts, makes a
# folder, changes limits, or the mode, owner or times of a file.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None),
    "fstat": (5, 80), "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "access": (21, None),
    "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "nanosleep": (35, 101),
    "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172),
    "exit": (60, 93), "uname": (63, 160), "fsync": (74, 82), "ftruncate": (77, 46),
    "getdents": (78, None), "getcwd": (79, 17), "chdir": (80, 49), "rename": (82, None),
    "unlink": (87, None), "readlink": (89, None),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132),
    "gettid": (186, 178), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "getdents64": (217, 61), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), 
    "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38),
    "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73),
    "set_robust_list": (273, 99), "dup3": (292, 24), "pipe2": (293, 59), "renameat2": (316, 276),
    "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293),
    "close_range": (436, 436), "faccessat2": (439, 439),
}  # fmt: skip
# Two more with some values of their second argument: what Python's files need, and nothing that
# directs signals to a process.
_SOME = {
    "fcntl": ((72, 25), (0, 1, 2, 3, 4, 5, 6, 7, 1030)),
    "ioctl": ((16, 29), (0x5401, 0x5450, 0x5451)),  # whether a terminal, close on exec or not
}
# Opening to read truncates with O_TRUNC, which Landlock's first versions (Linux 5.13 to 6.1) allow
# wherever reading is: by name, the numbers, and where the flags are among the arguments.
_OPENING = {"open": ((2, None), 24), "openat": ((257, 56), 32)}
_ACCESS_OR_TRUNCATE, _READ_AND_TRUNCATE, _NO_ACCESS_AND_TRUNCATE = 0x203, 0x200, 0x203
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _AND, _IF_EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_KILL, _DENY, _ALLOW = 0x80000000, 0x00050000 | 1, 0x7FFF0000


class Refusal(Exception):
    """The kernel cannot confine this process."""


def main() -> None:
    """Runs the job of stdin and writes its result, JSON, to the file descriptor of the argument."""
    result = int(sys.argv[1])
    job = json.load(sys.stdin.buffer)
    try:
        _limit(job["limits"])
        _die_with(job["parent"])
        if job["confine"]:
            confine(job["folder"], job["readable"])
        outcome = _run(job)
    except Refusal as refusal:
        os.write(result, json.dumps({"refused": str(refusal)}).encode())
        os._exit(REFUSED)
    sys.stdout.flush()
    data = json.dumps(outcome).encode()
    while data:
        data = data[os.write(result, data) :]
    os._exit(0)  # nothing of the code runs afterwards, such as atexit


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def _die_with(parent: int) -> None:
    """Ends with the process that started this one, even if that is killed."""
    _libc().prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def confine(folder: str, readable: list[str]) -> None:
    """Gives up everything but `folder`, reading what is `readable`, and computing, for good.

    Raises Refusal where the kernel lacks Landlock or seccomp.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _MACHINES:
        raise Refusal(f"it is {sys.platform} on {machine}, not Linux on x86-64 or arm64")
    libc = _libc()
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise Refusal("no_new_privs cannot be set")
    _restrict_files(libc, folder, readable)
    _restrict_calls(libc, *_MACHINES[machine])


def _restrict_files(libc: Any, folder: str, readable: list[str]) -> None:
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        reason = os.strerror(ctypes.get_errno())
        raise Refusal(f"the kernel, {os.uname().release}, has no Landlock ({reason})")
    handled = _FIRST_VERSION
    for since, right in _ADDED.items():
        handled |= right if version >= since else 0
    attribute = struct.pack("Q", handled)
    rules = libc.syscall(_CREATE_RULESET, attribute, ctypes.c_size_t(len(attribute)), 0)
    if rules < 0:
        raise Refusal(f"Landlock: {os.strerror(ctypes.get_errno())}")
    allowed = {path: _READ for path in readable}
    for path, rights in {**allowed, "/dev/null": _READ_FILE | _WRITE_FILE, folder: _OWN}.items():
        if not os.path.exists(path):
            continue
        rights &= handled if os.path.isdir(path) else handled & (_READ_FILE | _WRITE_FILE)
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        beneath = struct.pack("=Qi", rights, handle)
        if libc.syscall(_ADD_RULE, rules, 1, beneath, 0):
            raise Refusal(f"Landlock, {path}: {os.strerror(ctypes.get_errno())}")
        os.close(handle)
    if libc.syscall(_RESTRICT_SELF, rules, 0):
        raise Refusal(f"Landlock: {os.strerror(ctypes.get_errno())}")
    os.close(rules)


def _restrict_calls(libc: Any, column: int, architecture: int) -> None:
    program = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL)]
    program.append((_LOAD, 0, 0, 0))
    for numbers in _CALLS.values():
        if (number := numbers[column]) is not None:
            program += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for numbers, flags in _OPENING.values():
        if (number := numbers[column]) is not None:
            program += [(_IF_EQUAL, 0, 6, number), (_LOAD, 0, 0, flags)]
            program += [(_AND, 0, 0, _ACCESS_OR_TRUNCATE), (_IF_EQUAL, 1, 0, _READ_AND_TRUNCATE)]
            program += [(_IF_EQUAL, 0, 1, _NO_ACCESS_AND_TRUNCATE), (_RETURN, 0, 0, _DENY)]
            program.append((_RETURN, 0, 0, _ALLOW))
    second_argument = 24  # its low half, on little-endian machines
    for call, values in _SOME.values():
        program.append((_IF_EQUAL, 0, 2 + 2 * len(values), call[column]))
        program.append((_LOAD, 0, 0, second_argument))
        for value in values:
            program += [(_IF_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
        program.append((_RETURN, 0, 0, _DENY))
    program.append((_RETURN, 0, 0, _DENY))
    code = b"".join(struct.pack("HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    if libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0):
        raise Refusal(f"seccomp: {os.strerror(ctypes.get_errno())}")


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Runs the code, then its tests, then its calls; returns errors and the calls' values."""
    space: dict[str, Any] = {"__name__": "__answer__"}
    values = []
    try:
        exec(compile(job["source"], "<answer>", "exec"), space)
        exec(compile(job["tests"], "<tests>", "exec"), space)
        for name, arguments in job["calls"]:
            values.append(_call(space, name, arguments))
    except BaseException as error:  # SystemExit among them
        return {"key": None, "error": _describe(error), "values": values}
    return {"key": job["key"], "error": "", "values": values}


def _call(space: dict[str, Any], name: str, arguments: list[Any]) -> dict[str, Any]:
    try:
        return {"value": json.loads(json.dumps(space[name](*arguments)))}
    except BaseException as error:
        return {"error": _describe(error)}


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException:  # an exception of the code's own, whose text it computes
        return "an exception without a text"


if __name__ == "__main__":
    main()
