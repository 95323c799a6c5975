"""The watchdog's own process. Standard library only, run as a file without site-packages: it starts in 20 ms and stays small.

Arguments: the watched process, file descriptors of its heartbeat and of its stacks, the limit in seconds, how many times that a
patient phase may take, the file for stacks, the rank. Ends when the watched process does: its end of the pipe at stdin
closes, or it is no longer the parent.
"""

import os
import select
import signal
import struct
import sys
import time

LAYOUT = struct.Struct("<qq?40s")  # as dedistill.distributed.outside has it
GRACE = 5.0
"""Seconds that a process has to write its stacks and end by itself; then it is made to write them, and killed."""


def stopped(process: int) -> bool:
    """Whether a process was stopped (SIGSTOP, Ctrl-Z), where the system shows it: then it waits for nobody."""
    try:
        with open(f"/proc/{process}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def watch(process: int, memory: int, limit: float, patience: float) -> str:
    """What ``process`` was doing when it fell silent; empty when it ended by itself."""
    interval = min(1.0, limit / 4)
    silent, last, before = 0.0, time.monotonic(), b""
    while os.getppid() == process:
        if select.select([0], [], [], interval)[0]:
            return ""
        now = time.monotonic()
        silent += min(now - last, 2 * interval)  # a machine that slept, or this process stopped, is nobody's silence
        last, seen = now, os.pread(memory, LAYOUT.size, 0)
        _, step, patient, phase = LAYOUT.unpack(seen)
        if seen != before:
            silent, before = 0.0, seen
        elif silent > limit * (patience if patient and not stopped(process) else 1):
            return f"no sign of life for {silent:.0f} s, in step {step + 1}, while {phase.rstrip(bytes(1)).decode()}"
    return ""


def end(process: int, stacks: int) -> bytes:
    """End ``process`` as well as it still can; what it wrote of its stacks."""
    for number, seconds in ((signal.SIGUSR2, GRACE), (signal.SIGVTALRM, 1.0), (signal.SIGKILL, 0.0)):
        os.kill(process, number)
        os.kill(process, signal.SIGCONT)
        deadline = time.monotonic() + seconds
        while os.getppid() == process and time.monotonic() < deadline:
            time.sleep(0.05)
        if os.getppid() != process:
            break
    return os.pread(stacks, 1 << 24, 0)


def main(arguments: list[str]) -> None:
    process, memory, stacks = (int(a) for a in arguments[:3])
    limit, patience, file, rank = float(arguments[3]), float(arguments[4]), arguments[5], arguments[6]
    found = watch(process, memory, limit, patience)
    if not found:
        return
    message = f"watchdog: rank {rank}: {found}"
    print(
        f"{message}; it is ended, its stacks go to '{file}'. Run the same command again to go on.", file=sys.stderr, flush=True
    )
    written = end(process, stacks)
    with open(file, "ab") as f:
        f.write(f"{message}\n".encode() + written + b"\n")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the process it watches
    main(sys.argv[1:])
