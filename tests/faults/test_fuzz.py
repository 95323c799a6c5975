"""Hostile and damaged text: every parser accepts it or says what is wrong in one error of its own, never another one."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from averages import lerp_snapshots
from recipe_mutations import hostile_recipe

from dedistill.adapters.files import read_tensors
from dedistill.data.cache import Store
from dedistill.data.images.index import Index
from dedistill.data.pairs import PairSource
from dedistill.errors import UserError
from dedistill.io.atomic import checksummed
from dedistill.posthoc.snapshots import find_snapshots, write_snapshot
from dedistill.recipe import load_recipe
from dedistill.recipe.load import RecipeError
from dedistill.runs.checkpoint import damage, newest_valid
from dedistill.runs.directory import RunDirectory
from dedistill.runs.metrics import JsonlWriter
from dedistill.runs.model import exported_step

STRANGE = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"null",
    b"[]",
    b"{}",
    b'"',
    b"-1",
    b"1e999",
    b"9" * 5000,
    b"[" * 100_000,
    b'{"a":' * 50_000,
)
VALUES = (
    None,
    [],
    {},
    "",
    "x",
    -1,
    2**70,
    1e308,
    True,
    [None],
    {"a": 1},
    "../" * 40 + "etc/passwd",
    "a\0b",
    "\ud800",
    [[]] * 3,
)


def broken_json(rng: random.Random, good: bytes) -> bytes:
    """Bytes with a few flipped, cut or doubled, or the same table with a few values of the wrong kind."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(STRANGE)
    if kind == 1:
        raw = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        return bytes(raw)
    if kind == 2:
        a, b = sorted(rng.randrange(len(good) + 1) for _ in range(2))
        return rng.choice([good[:a], good[b:], good[:a] + good[b:], good[:b] + good[a:]])
    table = json.loads(good)
    _spoil(rng, table)
    return json.dumps(table).encode()


def _spoil(rng: random.Random, table) -> None:
    keys = list(table) if isinstance(table, dict) else list(range(len(table))) if isinstance(table, list) else []
    if not keys:
        return
    key = rng.choice(keys)
    if isinstance(table[key], dict | list) and table[key] and rng.random() < 0.7:
        return _spoil(rng, table[key])
    if rng.random() < 0.25 and isinstance(table, dict):
        del table[key]
    else:
        table[key] = rng.choice(VALUES)


def survives(action: Callable[[], object]) -> bool:
    """True when ``action`` works, False when it ends in an error of ours; any other exception is the test's."""
    try:
        action()
        return True
    except UserError as e:
        assert str(e)
        return False


@pytest.mark.parametrize("seed", range(4))
def test_recipes(tmp_path, seed):
    """A thousand broken recipes: each is a recipe still, or a RecipeError with the file in every line."""
    rng, file = random.Random(seed), tmp_path / "r.toml"
    accepted = 0
    for _ in range(250):
        text, overrides = hostile_recipe(rng)
        file.write_bytes(text)
        try:
            load_recipe(file, overrides)
            accepted += 1
        except RecipeError as e:
            assert e.errors and all(e.errors)
    assert 0 < accepted < 250, "or the fuzzing was of no use"


def test_pairs(tmp_path):
    """Of a broken pairs.json nothing but a UserError comes."""
    rng = random.Random(0)
    facts = {
        "sigmas": [1.0, 0.0],
        "image": [1, 8, 16],
        "shards": [{"file": "a.tar", "pairs": 1, "sha256": "0"}],
        "complete": True,
    }
    for i in range(300):
        raw = broken_json(rng, json.dumps(facts).encode())
        (tmp_path / "pairs.json").write_bytes(raw)
        assert not survives(lambda: PairSource(tmp_path)), (i, raw)


def test_a_checksummed_file_with_other_contents_is_no_pairs(tmp_path):
    shard = {"file": "../a.tar", "sha256": "0"}
    for table in ({}, {"shards": 1}, {"shards": []}, {"shards": [shard], "sigmas": [1, 0], "image": [1, 8, 8]}):
        (tmp_path / "pairs.json").write_bytes(checksummed({"complete": True, **table}))
        with pytest.raises(UserError, match=r"pairs\.json' is not a list of pairs"):
            PairSource(tmp_path)


def test_the_index(tmp_path):
    """Garbage, and files of ours with one value of another kind."""
    from flows import _index

    rng, file = random.Random(0), tmp_path / "index.jsonl"
    _index(tmp_path, "caption")
    good = file.read_bytes()
    for _ in range(300):
        lines = good.splitlines(keepends=True)
        if rng.random() < 0.5:
            number = rng.randrange(len(lines))
            lines[number] = broken_json(rng, lines[number]) + b"\n"
            file.write_bytes(b"".join(lines))
        else:
            file.write_bytes(broken_json(rng, b'{"a": 1}') + good)
        if file.read_bytes().strip() != good.strip():
            assert not survives(lambda: Index.load(file)), file.read_bytes()


def test_manifests(tmp_path):
    from flows import group

    from dedistill.runs.checkpoint import save_checkpoint

    rng = random.Random(0)
    checkpoint = save_checkpoint(tmp_path, 10, group(1.0), {"skipped": 0}, keep=2)
    good = (checkpoint / "manifest.json").read_bytes()
    for _ in range(400):
        raw = broken_json(rng, good)
        if raw != good:
            (checkpoint / "manifest.json").write_bytes(raw)
            assert damage(checkpoint).startswith("manifest.json"), raw[:200]
    assert not survives(lambda: newest_valid(tmp_path))


def test_inputs_and_recipes_of_a_run(adapter_recipe, tmp_path):
    rng, recipe = random.Random(0), load_recipe(adapter_recipe)
    run, data = Path(recipe.run.out), tmp_path / "data"
    data.write_text("x")
    with RunDirectory(recipe) as directory:
        directory.bind({"model.path": {".": data}})
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    good = {name: (run / name).read_bytes() for name in ("inputs.json", "recipe.json")}

    def start() -> None:
        with RunDirectory(recipe) as directory:
            directory.bind({"model.path": {".": data}})

    assert survives(start)
    for _ in range(300):
        name = rng.choice(list(good))
        (run / name).write_bytes(broken_json(rng, good[name]))
        survives(start)
        for other, raw in good.items():
            (run / other).write_bytes(raw)


def test_journals(tmp_path):
    rng, file = random.Random(0), tmp_path / "metrics.jsonl"
    for _ in range(300):
        file.write_bytes(b'{"step": 1}\n' + broken_json(rng, b'{"step": 2, "loss": 0.5}') + b'\n{"step": 3}\n')
        JsonlWriter(file, 3).close()
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert rows[0] == {"step": 1} and all(isinstance(row["step"], int) for row in rows)


def test_marks_of_exports_and_hashes(tmp_path):
    from dedistill.io.hashing import fingerprint

    rng = random.Random(0)
    (tmp_path / "data").write_text("x")
    right = fingerprint([tmp_path / "data"], tmp_path / "hashes.json")
    for _ in range(300):
        (tmp_path / "run.json").write_bytes(broken_json(rng, b'{"step": 3}'))
        assert exported_step(tmp_path) is None or isinstance(exported_step(tmp_path), int)
        memo = tmp_path / "hashes.json"
        memo.write_bytes(broken_json(rng, memo.read_bytes()))
        assert fingerprint([tmp_path / "data"], memo) == right


def headers(rng: random.Random, good: bytes) -> bytes:
    """A safetensors file with a broken header or length, or cut."""
    size = struct.unpack("<Q", good[:8])[0]
    head, rest = good[8 : 8 + size], good[8 + size :]
    kind = rng.randrange(4)
    if kind == 0:
        return struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])) + head + rest
    if kind == 1:
        return good[: rng.randrange(len(good))]
    broken = broken_json(rng, head)
    return struct.pack("<Q", len(broken)) + broken + rest


def test_headers_of_tensors(tmp_path):
    """Snapshots, adapters and shards of the cache."""
    rng = random.Random(0)
    tensors = {"a.w": torch.arange(8.0), "b.w": torch.ones(2, 3)}
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "inputs.json").write_text("{}")
    header = {"format": "pt", "dedistill.recipe": "[run]"}
    file, _ = (write_snapshot(tmp_path / "snapshots", step, tensors, header) for step in (1, 2))
    good, shard = file.read_bytes(), tmp_path / "store" / "0.safetensors"
    for _ in range(400):
        raw = headers(rng, good)
        file.write_bytes(raw)
        shard.write_bytes(raw)
        survives(lambda: read_tensors(file))
        averaged = survives(lambda: lerp_snapshots(find_snapshots(tmp_path / "snapshots"), [0.5], tmp_path / "out"))
        assert raw == good or not averaged, raw
        survives(lambda: Store(tmp_path / "store", {}))
