"""A bad sample costs that sample only, is listed with its reason, and no file of the user's is changed."""

import hashlib
import re
import stat

import pytest
from bad_samples import CAPTIONS, GOOD, IMAGES, ROWS, write_folder, write_table
from bad_shards import DAMAGES, silently_short

from dedistill.data.images.index import build_index
from dedistill.data.images.types import ImageSet


def bytes_of(folder) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if not p.is_symlink() and stat.S_ISREG(p.stat().st_mode)]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.stat().st_size < 50 << 20}


def test_every_kind_of_bad_sample_is_quarantined_by_name(tmp_path):
    """With its reason, and no file of the user's changes; the second time from the index file."""
    expected = write_folder(tmp_path / "set")
    before = bytes_of(tmp_path / "set")
    assert len(IMAGES) + len(CAPTIONS) + len(ROWS) >= 60
    for _ in range(2):
        index = build_index([ImageSet(str(tmp_path / "set"), missing_captions="quarantine")], file=tmp_path / "i.jsonl")
        used = {s.name.removeprefix("set/") for s in index.samples}
        reasons = {name.removeprefix("set/"): reason for name, reason in index.quarantined}
        assert used == {name for name, outcome in expected.items() if outcome == GOOD}
        assert used | reasons.keys() == expected.keys(), "nothing may be missing from both"
        wrong = {n: reasons[n] for n, outcome in expected.items() if outcome != GOOD and not re.search(outcome, reasons[n])}
        assert not wrong
    assert bytes_of(tmp_path / "set") == before


def test_every_kind_of_bad_row_costs_that_row(tmp_path):
    reasons = write_table(tmp_path / "set")
    index = build_index([ImageSet(str(tmp_path / "set"), missing_captions="quarantine")])
    assert [s.name for s in index.samples] == [f"set/good{i}.jpg" for i in range(5, 10)]
    # the image of the row that is no JSON object is told of, too
    assert len(index.quarantined) == len(reasons) + 1 and index.quarantined[-1][1] == "no good row of metadata.jsonl names it"
    found = [reason for _, reason in index.quarantined]
    assert all(any(re.search(wanted, reason) for reason in found) for wanted in reasons), found


def test_bad_cells_of_a_csv_cost_that_row(tmp_path):
    folder = tmp_path / "set"
    write_table(folder)
    (folder / "metadata.jsonl").unlink()
    rows = [b"file_name,text", *(b"good%d.jpg,caption %d" % (i, i) for i in range(5, 10))]
    bad = [b"good0.jpg,a,b", b"good1.jpg", b"good2.jpg,caf\xe9", b"good3.jpg," + b"word " * (2 << 20), b"good4.jpg,", b",a"]
    (folder / "metadata.csv").write_bytes(b"\n".join([*rows[:3], *bad, *rows[3:]]) + b"\n")
    index = build_index([ImageSet(str(folder), missing_captions="quarantine")])
    assert [s.name for s in index.samples] == [f"set/good{i}.jpg" for i in range(5, 10)]
    assert len(index.quarantined) == len(bad)


@pytest.mark.parametrize("kind", range(len(DAMAGES)), ids=list(DAMAGES))
def test_a_damaged_shard_is_never_silently_short(tmp_path, kind):
    """Of each kind a few; ``python -m tests.faults.campaign`` does hundreds."""
    for turn in range(4):
        assert silently_short(tmp_path / f"t{turn}", kind + turn * len(DAMAGES)) == ""
