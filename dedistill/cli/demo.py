"""The whole story on real digits: teacher, 4-step student, de-distilled student, post-hoc averages, CFG sweeps, report.

dedistill demo          # 8x8 digits of scikit-learn, under 5 minutes on 2 cores
dedistill demo mnist    # 28x28 digits of MNIST, under 30 minutes
"""

import argparse
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dedistill.cli.command import command_parser, guarded
from dedistill.errors import RUN_AGAIN, UserError, amount
from dedistill.recipe import load_recipe
from dedistill.recipe.shipped import PREFIX


@dataclass(frozen=True)
class Story:
    """Options of its pairs and of the sweep of its averages; prompts of the report; threads, None for all cores."""

    pairs: tuple[str, ...]
    sweep: tuple[str, ...]
    prompts: int
    threads: int | None = None


STORIES = {
    # operations this small gain nothing from a second thread, and lose much when another program runs
    "digits": Story(("--count", "1536", "--steps", "16"), ("--cfg", "1", "2", "4", "--prompts", "64"), 256, threads=1),
    "mnist": Story(
        ("--count", "1024", "--steps", "24"),
        ("--cfg", "1", "2", "4", "--prompts", "32", "--candidates", "base", "alpha_linear_0.2", "alpha_linear_0.9", "last"),
        192,
    ),
}
REPORT_CFGS, REPORT_STEPS = [1, 2, 3, 4, 5, 6, 7, 8], 16


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("demo", __doc__)
    parser.add_argument("story", nargs="?", choices=STORIES, default="digits", help="which digits")
    args: argparse.Namespace = parser.parse_args(argv)
    return guarded(lambda: run(args.story), debug=args.debug)


def run(name: str) -> int:
    """Tell a story into ``runs/NAME`` of the working directory; what is finished is reused."""
    story, jobs = STORIES[name], _Jobs()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(story.threads or os.environ.get("OMP_NUM_THREADS") or min(8, cores))
    os.environ["OMP_NUM_THREADS"] = threads  # before torch is imported, here and in the jobs
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _tell(name, story, jobs)
    except KeyboardInterrupt:
        jobs.end()
        print(f"stopped; continue with: dedistill demo {name}", file=sys.stderr)
        return RUN_AGAIN
    finally:
        jobs.end()
        signal.signal(signal.SIGTERM, before)


def _tell(name: str, story: Story, jobs: "_Jobs") -> int:
    recipes = {stage: f"{PREFIX}{name}/{stage}" for stage in ("teacher", "student", "dedistill")}
    out = Path("runs") / name
    _say("1/6 teacher")
    jobs.run("train", recipes["teacher"])
    _say("2/6 pairs of noise and image")
    jobs.run("pairs", recipes["teacher"], "--out", str(out / "pairs"), "--cfg", "3", "--points", "4", *story.pairs)
    _say("3/6 student")
    jobs.run("train", recipes["student"])
    _say("4/6 de-distil")
    jobs.run("train", recipes["dedistill"])
    log = out / "averages.log"
    _say(f"5/6 post-hoc averages and their CFG sweep (in the background; {log})")
    jobs.run("posthoc", str(out / "dedistill"))
    sweep = jobs.start("sweep", recipes["dedistill"], *story.sweep, log=log)
    _say("6/6 report")
    failed = _report(name, recipes, out / "report", story.prompts)
    if sweep.wait():
        raise UserError(f"the sweep of the averages failed:\n{log.read_text(errors='replace')}")
    _say(f"averages: {out / 'dedistill' / 'sweep' / 'index.html'}")
    if failed:
        raise UserError("\n".join([f"{amount(len(failed), 'claim does', 'claims do')} not hold:", *failed]))
    return 0


def _report(name: str, recipes: dict[str, str], out: Path, prompts: int) -> list[str]:
    """Write the story's page and print its table; returns the claims that do not hold."""
    from dedistill.report.story import tell

    loaded = {"dedistilled" if stage == "dedistill" else stage: load_recipe(recipe) for stage, recipe in recipes.items()}
    commands = [f"dedistill demo {name}"]
    checks = tell(loaded, out, cfgs=REPORT_CFGS, prompts=prompts, steps=REPORT_STEPS, commands=commands)
    print(f"\nreport: {out / 'index.html'}", flush=True)
    return [f"  {check['text']}: {check['value']} ({check['bound']})" for check in checks if not check["ok"]]


class _Jobs:
    """Commands as processes in groups of their own, so that a stop reaches each once and nothing outlives the demo."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, *words: str, log: Path | None = None) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "dedistill", *words]
        out = log.open("wb") if log else None
        try:
            job = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        finally:
            if out:
                out.close()
        self._running.append(job)
        return job

    def run(self, *words: str) -> None:
        """Wait for a command. Raises UserError with its exit code when it fails; it has said why."""
        job = self.start(*words)
        code = job.wait()
        if code == RUN_AGAIN:
            raise KeyboardInterrupt
        if code:
            raise UserError(
                f"dedistill {words[0]} failed with exit code {code}; mend that and run dedistill demo again", max(code, 1)
            )

    def end(self) -> None:
        """Stop what still runs, and wait: training saves first. Further requests to stop change nothing."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for job in self._running:
            if job.poll() is None:
                job.terminate()
        for job in self._running:
            job.wait()
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def _say(line: str) -> None:
    print(line, flush=True)
