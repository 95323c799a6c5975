"""The campaign of hundreds of faults starts, tells what it saw, and writes no document of a part of itself."""

import campaign


def test_parts_run_alone_and_write_nothing(monkeypatch, capsys):
    document = campaign.ROOT / "docs" / "reliability.md"
    before = document.read_bytes()
    monkeypatch.setattr("sys.argv", ["campaign", "--only", "flips", "splits", "recipes", "--flips", "2", "--recipes", "5"])
    assert campaign.main() == 0
    said = [line.split(maxsplit=3)[2] for line in capsys.readouterr().out.splitlines()]
    assert said == ["ok"] * 3
    assert document.read_bytes() == before
