"""What commands left in folders of theirs."""

from fnmatch import fnmatchcase
from pathlib import Path

from dedistill.io.ownership import KINDS, MARK, kind_of


def marked(top: Path, *theirs: str) -> set[str]:
    """Kinds of the folders of ours below ``top``; but for names of ``theirs`` each holds only what its kind says it writes."""
    folders = [mark.parent for mark in top.rglob(MARK)]
    for folder in folders:
        writes = (*theirs, *KINDS, *KINDS[kind_of(folder)].writes)  # folders of other kinds are claimed by who writes there
        others = [p.name for p in folder.iterdir() if p.name[0] != "." and not any(fnmatchcase(p.name, w) for w in writes)]
        assert not others, f"{folder}: {others}"
    return {kind_of(folder) for folder in folders}
