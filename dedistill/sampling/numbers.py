"""What is told of a sweep's cells and pictures, and which way each number is better."""

from dedistill.errors import UserError

VERSION = 1
"""To be raised when a number is measured in another way: pictures and numbers of another version are not used."""
NUMBERS = [
    {
        "key": "accuracy",
        "picture": "correct",
        "needs": "judge",
        "adherence": True,
        "label": "accuracy",
        "better": "high",
        "help": "Share of digits that an independent classifier reads as asked.",
    },
    {
        "key": "clip",
        "picture": "clip",
        "needs": "clip",
        "adherence": True,
        "label": "CLIP score",
        "better": "high",
        "help": "How well CLIP finds that pictures fit their prompts, of 100.",
    },
    {
        "key": "frechet",
        "label": "Frechet distance",
        "better": "low",
        "help": "Distance of the pictures to real ones, in 20 components.",
    },
    {
        "key": "clip_frechet",
        "label": "CLIP Frechet distance",
        "better": "low",
        "help": "Distance of the pictures to real ones in CLIP's eyes; few pictures raise it.",
    },
    {
        "key": "precision",
        "picture": "realistic",
        "needs": "judge",
        "label": "precision",
        "better": "high",
        "help": "Share of pictures that lie among real ones.",
    },
    {"key": "recall", "label": "recall", "better": "high", "help": "Share of real pictures that lie among those made."},
    {
        "key": "saturated",
        "picture": "saturated",
        "tolerance": 0.02,
        "label": "saturated",
        "better": "low",
        "help": "Share of pixels burnt beyond the range of the data.",
    },
    {
        "key": "clipped",
        "picture": "clipped",
        "label": "clipped",
        "better": None,
        "help": "Share of areas at an end of the range, without any drawing.",
    },
    {
        "key": "shadow",
        "picture": "shadow",
        "tolerance": 0.05,
        "label": "shadow",
        "better": "low",
        "help": "Share of light missing in large soft dark places.",
    },
    {
        "key": "blur",
        "picture": "blur",
        "tolerance": 0.05,
        "label": "blur",
        "better": "low",
        "help": "Share of steps between pixels that blurring again leaves.",
    },
    {
        "key": "contrast",
        "picture": "contrast",
        "label": "contrast",
        "better": None,
        "help": "Standard deviation of the pixels.",
    },
    {
        "key": "colour",
        "picture": "colour",
        "label": "colour",
        "better": None,
        "help": "Colourfulness: strong guidance raises it. 0 is grey.",
    },
    {
        "key": "detail",
        "picture": "detail",
        "label": "detail",
        "better": None,
        "help": "Share of energy in high frequencies: blur lowers, noise raises it.",
    },
    {
        "key": "diversity",
        "label": "diversity",
        "better": "high",
        "help": "How far the seeds of one prompt differ: 1 is unrelated, 0 is copies.",
    },
]
"""Numbers of a cell. picture: the number of its pictures (index.json) whose mean it is. adherence: whether it says that a
picture shows what was asked. needs: who has to look at the pictures. tolerance: how much worse than with hardly any guidance
selection lets it be (``selection.py``)."""


def check_by(by: str | None, present: set[str]) -> None:
    """Raise UserError for a number to choose by that no sweep gives. present: whoever looks, of "judge" and "clip"."""
    usable = [n["key"] for n in NUMBERS if "picture" in n and n["better"] and n.get("needs") in (None, *present)]
    if by is not None and by not in usable:
        found = next((n for n in NUMBERS if n["key"] == by), None)
        if found is None:
            why = "there is no such number"
        elif not found["better"]:
            why = "neither end of it is better"
        elif "picture" not in found:
            why = "single pictures have no such number"
        else:
            why = {"judge": "it needs a judge of digits", "clip": "it needs --clip"}[found["needs"]]
        raise UserError(f"--by {by}: {why}; choose one of {', '.join(usable)}", exit_code=2)
