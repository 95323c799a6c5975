"""Death and a full disk at every operation of every save: old or new, never a mixture, never nothing."""

from pathlib import Path

import pytest
from flows import FLOWS, MAY_BE_MADE_AGAIN
from harness import count_operations, full_disk_from, killed_before

from dedistill.errors import UserError


@pytest.fixture(params=FLOWS)
def flow(request):
    return request.param, FLOWS[request.param]


def fresh(folder: Path, name: str) -> Path:
    disk = folder / name
    disk.mkdir()
    FLOWS[name.partition("@")[0]].prepare(disk)
    return disk


def test_killed_before_any_operation_it_is_old_or_new(flow, tmp_path):
    """All points of the save path. Saving again afterwards gives the new."""
    name, f = flow
    disk = fresh(tmp_path, name)
    points = count_operations(lambda: f.save(disk))
    found = []
    for point in range(1, len(points) + 1):
        disk = fresh(tmp_path, f"{name}@{point}")
        assert killed_before(point, lambda disk=disk: f.save(disk)), f"only {point - 1} operations"
        found.append(f.read(disk))
        assert found[-1] in (f.old, f.new) or (found[-1] is None and name in MAY_BE_MADE_AGAIN), points[point - 1]
        f.save(disk)
        assert f.read(disk) == f.new
    assert f.old in found and found == sorted(found, key=lambda v: v == f.new), "once new, it stays new"
    assert len(points) >= 3


def test_a_disk_that_is_full_from_any_operation_on_keeps_the_old_and_is_named(flow, tmp_path):
    """ENOSPC at every write of a save. One clear error names the path; nothing is left lying about."""
    name, f = flow
    disk = fresh(tmp_path, name)
    points = count_operations(lambda: f.save(disk))
    failed = 0
    for point in range(1, len(points) + 1):
        disk = fresh(tmp_path, f"{name}@{point}")
        try:
            with full_disk_from(point):
                f.save(disk)
        except UserError as e:
            failed += 1
            assert "cannot write" in str(e) and "No space left on device" in str(e) and str(disk) in str(e)
            assert list(disk.rglob("*.tmp*")) == []
            assert f.read(disk) in (f.old, f.new)
        except OSError as e:  # the command line says file and reason
            failed += 1
            assert e.filename and str(disk) in str(e.filename)
            assert f.read(disk) in (f.old, f.new)
        f.save(disk)
        assert f.read(disk) == f.new
    assert failed >= 2
