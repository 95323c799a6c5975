"""Which tests hold which kind of attack, counted by their cases. Writes that table into docs/reliability.md.

python -m tests.faults.attacks
"""

import re
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "reliability.md"
HEADING = "## Attacks, by kind\n"

KINDS: dict[str, dict[str, str]] = {
    "model folders and files that are not whole, not finite, of other kinds, or lie about themselves": {
        "models/test_flux_files.py": "",
        "models/test_facts_of_folders.py": "",
        "models/test_whole_encoders.py": "whole|refused|stale|shards|tokenizer|vocabulary|zeros|download|look|factors|shifts|"
        "contradict|held_out_whole|numbers|sizes",
        "io/test_weights.py": "",
        "io/test_json_files.py": "",
        "release/test_export.py": "damaged|finite|contradicts",
    },
    "code, pickles and adapters in a model folder": {
        "models/test_whole_encoders.py": "code(?!c)|pickles|adapter_beside|outside_the_folder",
        "release/test_secrets_in_releases.py": "pickle",
    },
    "adapter files and their headers": {
        "adapters/test_strength.py": "refused",
        "adapters/test_naming.py": "refused",
        "adapters/test_adapters.py": "refused",
        "adapters/test_formats.py": "refused|refuses",
        "recipe/test_embedded.py": "",
    },
    "images: bombs, cut, damaged, of odd kinds": {
        "data/test_images.py": "bombs|limits|truncated|refused|damage|broken|useless|cannot_be_used",
        "faults/test_bad_samples.py": "bad_sample",
    },
    "tar shards": {
        "faults/test_bad_samples.py": "damaged_shard",
        "data/test_shards.py": "odd|damaged|cut_short|foreign|less_than_nothing|headers|endless|no_file",
    },
    "tables and captions": {
        "faults/test_bad_samples.py": "row|csv",
        "data/test_tables.py": "wrong|refused|unreadable|bounds|lead_out|other_form|nulls|many_columns|"
        "quote|pipe|no_text|not_read",
        "data/test_splits.py": "left_out|chosen",
        "data/test_caption_files.py": "refused|nulls",
    },
    "links, circles and names in a data set; terminals, pages and secrets": {
        "data/test_image_index.py": "circles|many_links|elsewhere|bad_files|names_of_sources",
        "data/test_splits.py": "have_an_end",
        "test_messages.py": "terminal",
        "report/test_pages.py": "hostile|broken|outside",
        "faults/test_secrets.py": "",
        "recipe/test_load.py": "secrets",
    },
    "caches and indices, damaged or of other data": {
        "faults/test_damaged_cache.py": "",
        "data/test_cache.py": "refused|truncated|flipped",
        "data/test_image_index.py": "damaged|changed_bytes",
        "data/test_edited_images.py": "",
        "faults/test_fuzz.py": "index|hashes",
    },
    "the directory of a run: records, journals, checkpoints, inputs that changed or moved": {
        "runs/test_checkpoint.py": "found|bad|rotten|cannot_be_read|other_kinds",
        "runs/test_metrics.py": "",
        "runs/test_inputs.py": "refused|results_without|damaged",
        "runs/test_moved.py": "",
        "faults/test_fuzz.py": "manifests|journals|inputs_and_recipes",
        "report/test_run_page.py": "refused|not_kept",
    },
    "averages, sweeps and pairs": {
        "posthoc/test_snapshots.py": "flipped|missing|another|renamed|damaged|without",
        "posthoc/test_lerp.py": "foreign|damaged|finite|failure",
        "sampling/test_sampling.py": "damaged",
        "report/test_thumbnails.py": "damaged|cut|cannot_be_written",
        "sampling/test_pairs.py": "damaged|refused",
        "faults/test_fuzz.py": "pairs|headers",
    },
    "recipes": {
        "faults/test_fuzz.py": "recipes$",
        "faults/test_fuzz_recipes.py": "",
        "recipe/test_files.py": "cannot|circle|small|bound",
        "recipe/test_schema.py": "misspelt|random_changes",
    },
    "what is the user's own, in the place of what is written or removed": {"io/test_users_files.py": ""},
    "what a release would tell or take along": {"release/test_secrets_in_releases.py": ""},
    "killed at any moment (-9)": {
        "faults/test_crash_points.py": "",
        "runs/test_checkpoint.py": "killed",
        "data/test_cache.py": "killed",
        "data/test_prepare.py": "killed",
        "io/test_whole_files.py": "killed|at_once|link_of_that_name",
        "faults/test_stuck.py": "",
    },
    "power loss": {"faults/test_power_loss.py": ""},
    "full disks": {
        "io/test_whole_files.py": "full_disk|cannot_be_written",
        "runs/test_checkpoint.py": "write_error",
        "posthoc/test_lerp.py": "full_disk",
        "data/test_image_index.py": "full_disk",
        "data/test_cache.py": "full_disk",
        "release/test_merge.py": "full_disk",
        "cli/test_rehearse.py": "full_disk",
        "runs/test_inputs.py": "full_disk",
        "runs/test_run.py": "without_room",
    },
    "memory, open files, temporary folders, two processes at once, signals, services that are gone": {
        "test_messages.py": "memory|open_files|temporary",
        "faults/test_outside.py": "",
        "cli/test_commands.py": "second_process",
        "cli/test_interrupted.py": "",
        "faults/test_requests.py": "",
    },
    "samples and steps that are not finite, and training without effect": {
        "faults/test_not_finite.py": "",
        "faults/test_quarantine.py": "",
        "faults/test_no_effect.py": "",
    },
}
"""Kind -> file of tests -> which of its tests, by a pattern of their names; all where it is empty."""


class _Collected:
    """What pytest found, as its plugin."""

    def __init__(self) -> None:
        self.cases: list[tuple[str, str]] = []
        """(file, name of the function), once for each case."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.cases = [(item.path.relative_to(TESTS).as_posix(), item.originalname) for item in session.items]


ALL = "all, each case once"


def counted() -> dict[str, int]:
    """Cases of each kind, and of ALL. Raises ValueError where a file or a pattern stands for no test."""
    found = _Collected()
    files = sorted({str(TESTS / file) for places in KINDS.values() for file in places})
    if pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *files], plugins=[found]) != 0:
        raise ValueError("the tests cannot be collected")
    cases: dict[str, set[int]] = {kind: set() for kind in KINDS}
    for kind, places in KINDS.items():
        for file, pattern in places.items():
            own = {i for i, (where, name) in enumerate(found.cases) if where == file and re.search(pattern, name)}
            if not own:
                raise ValueError(f"{kind}: no test of tests/{file} is called {pattern!r}")
            cases[kind] |= own
    return {kind: len(own) for kind, own in cases.items()} | {ALL: len(set().union(*cases.values()))}


def section(counts: dict[str, int]) -> str:
    rows = "".join(f"| {kind} | {count:,} |\n" for kind, count in counts.items())
    return (
        f"{HEADING}\nCases of tests that hold each kind, as `python -m tests.faults.attacks` counts them and writes them here. "
        "Each runs with\nthe tests; right means: refused, or passed over, by a message that names the culprit, or done; exit "
        "code 0, 1, 2 or 75,\nnothing half-written, no file of the user's changed.\n\n"
        f"| Kind | Cases |\n| --- | --- |\n{rows}"
    )


def replaced(text: str, own: str) -> str:
    """``text`` with the section in the place of an earlier one, or before the first heading of its level."""
    start = text.find(HEADING)
    if start < 0:
        at = text.index("\n## ") + 1
        return f"{text[:at]}{own}\n{text[at:]}"
    end = text.find("\n## ", start)
    return text[:start] + own + (text[end:] if end >= 0 else "")


def main() -> int:
    counts = counted()
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(), section(counts)))
    print("\n".join(f"{count:6,}  {kind}" for kind, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
