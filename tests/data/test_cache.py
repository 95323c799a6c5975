"""The store of encoded images and captions: what is written is read, and nothing that happens to it goes unnoticed."""

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dedistill.data.cache import Store, sole_writer
from dedistill.distributed.outside import heartbeat
from dedistill.errors import UserError

INPUTS = {"family": "any", "length": 8}


def entry(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of every kind that is stored, of a length that differs between entries."""
    g = torch.Generator().manual_seed(seed)
    long = 1 + seed % 5
    return {
        "embeds": torch.randn(long, 6, generator=g).bfloat16(),
        "mask": torch.rand(long, generator=g) < 0.5,
        "pooled": torch.randn(3, generator=g),
        "latent": torch.randn(2, 3, 4, generator=g).half(),
    }


def entries(*seeds: int) -> dict[str, dict[str, torch.Tensor]]:
    return {f"k{seed}": entry(seed) for seed in seeds}


def holds(store: Store, *seeds: int) -> bool:
    return len(store) == len(seeds) and all(_same(store.read(f"k{seed}"), entry(seed)) for seed in seeds)


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def store(tmp_path) -> Store:
    """Two shards of three entries."""
    store = Store(tmp_path / "latents", INPUTS)
    store.write(entries(0, 1, 2))
    store.write(entries(3, 4, 5))
    return store


def shards(store: Store) -> list[Path]:
    return sorted(store.folder.glob("*.safetensors"))


def test_what_is_written_is_read(store):
    """In any order, by the writer and by a later reader, bit for bit, with lengths and kinds of its own."""
    for reader in (store, Store(store.folder, INPUTS)):
        assert holds(reader, 5, 0, 3, 1, 4, 2)
        assert "k3" in reader and "k9" not in reader
        with pytest.raises(KeyError):
            reader.read("k9")
    assert store.bytes() == sum(file.stat().st_size for file in shards(store))


def test_what_was_read_is_the_readers_own(store):
    store.read("k0")["pooled"].zero_()
    assert holds(store, 0, 1, 2, 3, 4, 5)


def test_views_of_one_tensor_are_entries_of_their_own(tmp_path):
    """Rows of an encoded batch share memory until they are stored."""
    batch = torch.randn(4, 5, 2)
    store = Store(tmp_path / "text", INPUTS)
    store.write({f"r{i}": {"embeds": batch[i, : i + 1]} for i in range(4)})
    assert all(torch.equal(store.read(f"r{i}")["embeds"], batch[i, : i + 1]) for i in range(4))
    assert store.bytes() < batch.nbytes + 600


@pytest.mark.parametrize("size", [0, 4, 40, -1])
def test_a_truncated_shard_is_refused_by_name_and_encoded_again(store, size):
    shard = shards(store)[0]
    lost = [key for key in entries(*range(6)) if store._shard_of[key] == shard]
    data = shard.read_bytes()
    shard.write_bytes(data[:size])
    with pytest.raises(UserError, match="is damaged") as error:
        Store(store.folder, INPUTS)
    assert str(shard) in str(error.value) and "delete this file, it is encoded again" in str(error.value)
    shard.unlink()
    again = Store(store.folder, INPUTS)
    assert [key for key in entries(*range(6)) if key not in again] == lost
    again.write({key: entry(int(key[1:])) for key in lost})
    assert shard.read_bytes() == data and holds(Store(store.folder, INPUTS), 0, 1, 2, 3, 4, 5)


def test_a_flipped_bit_is_found(store):
    shard = shards(store)[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    assert store.damaged() == []
    shard.write_bytes(data)
    assert Store(store.folder, INPUTS).damaged() == [shard]


def test_a_batch_that_opens_many_shards_shows_signs_of_life(store):
    before = heartbeat.signs
    assert holds(Store(store.folder, INPUTS), *range(6))
    assert heartbeat.signs == before + 2


def test_stale_inputs_are_refused_naming_each(store):
    for inputs in ({"family": "other", "length": 8, "mask": True}, {"length": 9}):
        with pytest.raises(UserError, match="is stale") as error:
            Store(store.folder, inputs)
        for key in INPUTS.keys() | inputs.keys():
            named = f"{key}: {INPUTS.get(key)!r} there, {inputs.get(key)!r} here" in str(error.value)
            assert named == (INPUTS.get(key) != inputs.get(key))
    assert holds(Store(store.folder, INPUTS), 0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("text", [None, "{", "[]", "3", "null", pytest.param("[" * 100_000, id="deep")])
def test_shards_of_unknown_inputs_are_refused(store, text):
    file = store.folder / "inputs.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=r"inputs\.json' cannot be read"):
        Store(store.folder, INPUTS)


def test_inputs_without_shards_bind_nothing(tmp_path):
    """A preparation killed before its first shard, then corrected."""
    store = Store(tmp_path / "text", {"length": 9})
    store.folder.mkdir()
    (store.folder / "inputs.json").write_text('{"length": 9}')
    corrected = Store(store.folder, INPUTS)
    corrected.write(entries(0))
    assert holds(Store(store.folder, INPUTS), 0)


def test_a_full_disk_leaves_the_store_as_it_was(store, small_disk):
    with small_disk(200), pytest.raises(UserError, match=r"cannot write '.*latents/.*safetensors' \([\d,]+ bytes\)"):
        store.write(entries(6, 7))
    assert holds(store, 0, 1, 2, 3, 4, 5) and holds(Store(store.folder, INPUTS), 0, 1, 2, 3, 4, 5)
    assert len(list(store.folder.iterdir())) == 3, "nothing unfinished is left behind"
    store.write(entries(6, 7))
    assert holds(Store(store.folder, INPUTS), *range(8))


def _write(cache: Path, count: int, log: Path) -> None:
    """Entries 0 ... count-1, each in a shard of its own, as far as they are missing; says what it does in ``log``."""
    with open(log, "a", buffering=1) as said:
        said.write("ready\n")
        with sole_writer(cache, lambda line: said.write(line + "\n")):
            store = Store(cache / "latents", INPUTS)
            for seed in range(count):
                if f"k{seed}" not in store:
                    store.write(entries(seed))
                    said.write(f"wrote {seed}\n")


@pytest.fixture
def writer(tmp_path):
    """Start a process that writes; forked, for a fresh one would take seconds to import torch."""
    started = []

    def start(cache: Path, count: int) -> tuple[multiprocessing.Process, Path]:
        log = tmp_path / f"log{len(started)}"
        process = multiprocessing.get_context("fork").Process(target=_write, args=(cache, count, log))
        process.start()
        started.append(process)
        until(lambda: log.exists() and "ready" in log.read_text())
        return process, log

    yield start
    for process in started:
        process.kill()
        process.join()


def until(true) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_killed_at_any_moment_goes_on_where_it_was(tmp_path, writer):
    """SIGKILL at random moments of writing; what was finished stays, what was not is swept and done again."""
    rng, count, done, cache = random.Random(0), 300, 0, tmp_path / "cache"
    for attempt in range(12):
        process, log = writer(cache, count)
        if attempt % 2:
            until(lambda: "wrote" in log.read_text())  # noqa: B023 - asked at once
        time.sleep(rng.uniform(0.0, 0.01))
        process.kill()
        process.join()
        found = Store(cache / "latents", INPUTS)
        assert holds(found, *range(len(found))) and found.damaged() == []
        assert log.read_text().count("wrote") <= len(found) - done <= log.read_text().count("wrote") + 1
        done = len(found)
    assert 0 < done < count, "or the kill was no test"
    (cache / "latents" / "0.safetensors.tmp-dedistill").write_bytes(b"unfinished")
    process, log = writer(cache, count)
    process.join()
    assert process.exitcode == 0 and log.read_text().count("wrote") == count - done
    assert holds(Store(cache / "latents", INPUTS), *range(count))
    assert not list(cache.rglob("*.tmp-*"))


def test_two_writers_take_turns_and_share_the_work(tmp_path, writer):
    """The one that waited finds everything encoded."""
    both = [writer(tmp_path / "cache", 100) for _ in range(2)]
    for process, _ in both:
        process.join()
        assert process.exitcode == 0
    assert sorted(log.read_text().count("wrote") for _, log in both) == [0, 100]
    assert holds(Store(tmp_path / "cache" / "latents", INPUTS), *range(100))


def test_a_second_writer_says_that_it_waits_and_sweeps_nothing_before(tmp_path, writer):
    cache = tmp_path / "cache"
    with sole_writer(cache, print):
        mine = cache / "latents" / "x.safetensors.tmp-dedistill"
        mine.parent.mkdir()
        mine.write_bytes(b"being written")
        process, log = writer(cache, 1)
        until(lambda: f"another process is encoding into '{cache}'" in log.read_text())
        assert mine.exists() and not (cache / "latents" / "inputs.json").exists()
    process.join()
    assert "wrote 0" in log.read_text() and not mine.exists()


def test_a_shard_is_plain_safetensors(store):
    assert "k0.embeds" in load_file(next(s for s in shards(store) if store._shard_of["k0"] == s))
