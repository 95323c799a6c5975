"""``dedistill COMMAND``: which command is meant; each reads its own arguments."""

import os
import sys
from difflib import get_close_matches
from importlib import import_module

from dedistill import __version__
from dedistill.distributed.outside import end_with_parent
from dedistill.errors import RUN_AGAIN

COMMANDS = {
    "train": ("train", "train as a recipe says; run again to continue"),
    "launch": ("launch", "train on several GPUs or machines"),
    "plan": ("plan", "what a run needs, and what a start would refuse; no GPU"),
    "rehearse": ("train:rehearse", "run every stage of a recipe on a tiny random model"),
    "scan": ("scan", "show what is in a data set, and what cannot be used"),
    "prepare": ("prepare", "encode images and captions before training"),
    "pairs": ("pairs", "store a teacher's trajectories, to distil or straighten it"),
    "posthoc": ("posthoc", "average the snapshots of a run"),
    "sweep": ("sweep", "make images over CFG scales and measure them, as one page"),
    "measure": ("measure", "measure how distilled models still are, with intervals"),
    "evaluate": ("evaluate", "which weights of a run to take, and how to sample from them"),
    "influence": ("influence", "how much each block changes, and LoKr factors within a budget"),
    "invert": ("invert", "turn an image into noise, and edit it by prompts"),
    "merge": ("merge", "merge an adapter into its base"),
    "export": ("export", "write models and adapters in formats of other programs"),
    "check": ("check", "check a recipe, or which programs load an adapter file"),
    "report": ("report", "write the page of a run, also while it goes on"),
    "chain": ("chain", "run recipes and commands one after the other, as a file lists them"),
    "demo": ("demo", "teacher, student, de-distilled student on digits, in minutes"),
    "tiny": ("tiny", "write a tiny random model in the layout of the real one"),
    "recipes": ("recipes", "list the recipes that come with dedistill, or show one"),
}
"""Command -> module of this package, and its function if not ``main``; what it does in a few words."""


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0 done; 2 wrong arguments or recipe; 75 stopped, run the same command
    again; 70 a mistake of the program; 1 anything else."""
    end_with_parent()
    try:
        code = _run((sys.argv[1:] if argv is None else argv) or ["--help"])
        sys.stdout.flush()
        # an interrupt that came inside exec (dataclasses use it when they are imported) is remembered, caught or not, and
        # Python would kill itself by it at its end in place of this exit code; another exec makes it forget
        exec("")
    except KeyboardInterrupt:  # while the command's own code is imported; from then on it is the command's
        print("stopped; nothing was begun", file=sys.stderr)
        return RUN_AGAIN
    except BrokenPipeError:  # as with | head: who reads has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is left to be flushed at the end goes nowhere
        return 0
    return code


def _run(words: list[str]) -> int:
    name, *rest = words
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"dedistill {__version__}")
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "there are:\n  " + ", ".join(COMMANDS)
        print(f"error: unknown command '{name}', {hint}\nSee dedistill --help.", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(import_module(f"dedistill.cli.{module}"), function or "main")(rest)


def _overview() -> str:
    lines = [f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items()]
    head = [
        "usage: dedistill COMMAND ...",
        "",
        "Give distilled image models their training objective and their classifier-free guidance back.",
        "",
    ]
    tail = ["", "dedistill COMMAND --help shows options, defaults and an example; dedistill --version shows the version.", ""]
    example = ["example: dedistill demo"]
    return "\n".join([*head, *lines, *tail, *example])
