"""What candidates answered, kept on disk: weights that were asked these questions before are not loaded again."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dedistill.files import make_folder, read_sealed, replace_file, sealed
from dedistill.sampling.meters import Reading

VERSION = 2
"""Answers of another version of the meters are not used."""


@dataclass(frozen=True)
class Answer:
    """Readings by meter, the places of those that have an axis, and the shape of the model's pictures."""

    readings: dict[str, Reading]
    places: dict[str, list[float]]
    picture: tuple[int, ...]


def remembered(file: Path | None, key: dict, make: Callable[[], Answer]) -> Answer:
    """The answer kept in ``file`` under the same ``key``, else the one that ``make`` gives, which is kept. None: never kept."""
    if file is None:
        return make()
    key = json.loads(json.dumps({**key, "version": VERSION}))
    try:
        known = read_sealed(file)
        if known["key"] == key:
            return _answer(known)
    except (OSError, ValueError, KeyError):
        pass  # not there yet, or damaged: asked again
    answer = make()
    make_folder(file.parent)
    replace_file(file, sealed({"key": key, **_table(answer)}))
    return answer


def answer_file(folder: Path, name: str, part: str) -> Path:
    """Where the answers of candidate ``name`` are kept."""
    return folder / f"{re.sub('[^A-Za-z0-9_.-]+', '_', name)}.{part}.json"


def _table(answer: Answer) -> dict:
    readings = {
        key: {"top": r.top.tolist(), "bottom": r.bottom.tolist(), "strata": None if r.strata is None else r.strata.tolist()}
        for key, r in answer.readings.items()
    }
    return {"picture": list(answer.picture), "places": answer.places, "readings": readings}


def _answer(table: dict) -> Answer:
    readings = {
        key: Reading(np.array(r["top"]), np.array(r["bottom"]), None if r["strata"] is None else np.array(r["strata"]))
        for key, r in table["readings"].items()
    }
    return Answer(readings, table["places"], tuple(table["picture"]))
