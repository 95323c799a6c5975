"""A command that is refused leaves no folder behind that it has only begun."""

from pathlib import Path

import pytest

from dedistill.cli.main import main
from dedistill.io import ownership

REFUSED = [
    ["train", "RECIPE", "--set", "model.path=bad"],
    ["train", "RECIPE", "--set", "adapter.targets=[{pattern='none'}]"],
    ["sweep", "RECIPE", "--prompts", "bad/prompts.txt"],
    ["measure", "RECIPE", "--prompts", "bad/prompts.txt", "--out", "made/deep"],
    ["influence", "RECIPE", "--prompts", "bad/prompts.txt", "--set", "model.path=bad"],
    ["pairs", "RECIPE", "--out", "made"],
    ["merge", "RECIPE", "--weights", "bad/w.safetensors", "--out", "made"],
    ["export", "bad", "--format", "diffusers", "--out", "made"],
    ["posthoc", "RECIPE", "--out", "made"],
    ["report", "RECIPE"],
]


@pytest.mark.parametrize("words", REFUSED, ids=lambda words: " ".join(words[:1] + words[2:]))
def test_nothing_is_left(adapter_recipe, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    Path("bad").mkdir()
    Path("bad/w.safetensors").write_text("{}")
    Path("bad/prompts.txt").write_text("".join(f"{n} seven\n" for n in range(16)))
    before = set(tmp_path.rglob("*"))
    assert main([str(adapter_recipe) if word == "RECIPE" else word for word in words]) in (1, 2)
    assert set(tmp_path.rglob("*")) == before, capsys.readouterr().err


def test_what_was_there_and_what_holds_something_stays(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a/b", "a/c"):
        ownership.claim(tmp_path / name, "sweep", "--out")
    (tmp_path / "a/b/image.png").write_text("")
    ownership.drop_beginnings(failed=True)
    assert {path.name for path in tmp_path.rglob("*")} == {"empty", ".dedistill", "a", "b", "image.png"}
    ownership.claim(tmp_path / "d", "sweep", "--out")
    ownership.drop_beginnings(failed=False)
    ownership.drop_beginnings(failed=True)
    assert (tmp_path / "d").exists(), "of a command that succeeded"
