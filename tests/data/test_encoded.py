"""Encoded images as a source: which sample, crop and caption a slot gets, and that it gets their very tensors."""

import hashlib
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dedistill.data.cache import Store
from dedistill.data.encoded import HELD, EncodedImages, framing_of, latent_key, read_text, text_key
from dedistill.data.images.buckets import Crop
from dedistill.data.images.index import Sample
from dedistill.data.images.types import NOWHERE
from dedistill.data.split import CroppedImage, split
from dedistill.errors import UserError
from dedistill.models.conditioning import Widths, stored_shapes

BATCH = 24
CROPS = (Crop(64, 4, 4, (0.0, 0.0, 8.0, 8.0)), Crop(64, 4, 6, (0.0, 1.0, 12.0, 9.0)), Crop(64, 6, 4, (1.0, 0.0, 9.0, 12.0)))


def image(source: int, i: int, *, copy_of: str = "") -> CroppedImage:
    """Two or three captions, and one to three crops of different shapes."""
    sha = copy_of or hashlib.sha256(f"{source} {i}".encode()).hexdigest()
    captions = tuple(f"caption {c} of {source}/{i}" for c in range(2 + i % 2))
    return CroppedImage(Sample(f"set{source}/{i}", captions, 12, 12, sha, source, NOWHERE), CROPS[: 1 + i % 3])


IMAGES = [image(0, i) for i in range(40)] + [image(1, i) for i in range(7)]


def number(name: str) -> float:
    return int(hashlib.sha256(name.encode()).hexdigest()[:2], 16)  # exact in bf16


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> tuple[Store, Store]:
    """Every tensor is filled with a number that says what it belongs to; captions have lengths of their own."""
    folder = tmp_path_factory.mktemp("stores")
    latents, texts = Store(folder / "latents", {}), Store(folder / "text", {})
    crops = {latent_key(p.sample, c): (p, c) for p in IMAGES for c in p.crops}
    latents.write({k: {"latent": torch.full((16, c.height, c.width), number(k)).half()} for k, (_, c) in crops.items()})
    texts.write({text_key(c): encoded(c) for p in IMAGES for c in p.sample.captions})
    return latents, texts


def encoded(caption: str) -> dict[str, torch.Tensor]:
    long = 1 + len(caption) % 4
    embeds = torch.full((long, 3), number(caption)).bfloat16()
    return {"embeds": embeds, "mask": torch.ones(long, dtype=torch.bool), "pooled": torch.full((2,), number(caption))}


def opened(images, weights, latents: Store, texts: Store, held_out: float) -> EncodedImages:
    shapes = {"latent_shape": lambda height, width: (16, height, width), "text_widths": Widths((3,), {"pooled": 2})}
    return EncodedImages(split(images, held_out), weights, latents, texts, **shapes)


@pytest.fixture
def source(stores) -> EncodedImages:
    return opened(IMAGES, [1.0, 1.0], *stores, 0.1)


def image_of(source, slot):
    return source._sets[slot.index[0]][slot.index[1]]


def by_shape(slots, positions):
    shapes = dict.fromkeys(slots[p].shape for p in positions)
    return [[p for p in positions if slots[p].shape == shape] for shape in shapes]


def draw(source, step, positions, **kind):
    """(name, caption) per position, whatever group it is drawn in; checks that each has its own tensors."""
    found = {}
    slots = source.slots(5, step, BATCH, **kind)
    for group in by_shape(slots, positions):
        batch, names = source.draw([slots[p] for p in group]), [slots[p].name for p in group]
        text = batch.text(batch.captions)
        assert len(batch.latents) == len(text) == len(batch.captions) == len(group)
        for row, position in enumerate(group):
            own = CroppedImage(*next((p.sample, p.crops) for p in IMAGES if p.sample.captions.count(batch.captions[row])))
            crop = next(c for c in own.crops if names[row] == f"{own.sample.name} [{c.width} x {c.height}]")
            assert batch.latents.dtype == torch.float32 and batch.latents[row].shape == (16, crop.height, crop.width)
            assert (batch.latents[row] == number(latent_key(own.sample, crop))).all()
            alone, wanted = text.index_select(slice(row, row + 1)).trimmed(), encoded(batch.captions[row])
            assert all(torch.equal(alone.tensors()[name][0], wanted[name]) for name in ("embeds", "pooled"))
            found[position] = names[row], batch.captions[row]
    return found


@pytest.mark.parametrize(
    ("size", "crop", "wanted"),
    [
        ((12, 12), CROPS[0], [12, 12, 0, 0, 4, 4]),
        ((12, 12), CROPS[1], [12, 12, 0, 0, 4, 6]),
        ((12, 12), CROPS[2], [12, 12, 0, 0, 6, 4]),
        ((3000, 2000), Crop(1024, 1024, 1024, (0.0, 500.0, 2000.0, 2500.0)), [3000, 2000, 256, 0, 1024, 1024]),
        ((1000, 2048), Crop(512, 512, 768, (300.0, 100.0, 1500.0, 900.0)), [1000, 2048, 64, 192, 512, 768]),
    ],
)
def test_how_an_image_was_framed(size, crop, wanted):
    """Height before width, the corner at the scale of what is seen; each image its own, whatever caption it has."""
    assert framing_of(SimpleNamespace(height=size[0], width=size[1]), crop).tolist() == wanted


def test_a_batch_knows_how_each_image_was_framed(source):
    slots = source.slots(5, 0, BATCH)
    for group in by_shape(slots, range(BATCH)):
        batch = source.draw([slots[p] for p in group])
        for p, framing in zip(group, batch.framing.tolist(), strict=True):
            width, height = map(int, slots[p].name.partition("[")[2].strip("]").split(" x "))
            assert framing[:2] == [12, 12] and framing[4:] == [height, width]


def test_a_slot_is_a_pure_function(source, stores):
    """Not of the order, of the micro-batch it is drawn in, or of what else this process draws (world size, resume)."""
    for held_out in (False, True):
        whole = draw(source, 3, range(BATCH), held_out=held_out)
        assert sorted(whole) == list(range(BATCH)) and len(set(whole.values())) > BATCH // 4
        assert draw(source, 3, range(BATCH)[::-1], held_out=held_out) == whole
        ranks = [range(rank, BATCH, 3) for rank in range(3)]
        fresh = opened(IMAGES, [1.0, 1.0], *stores, 0.1)
        parts = [draw(fresh, 3, part, held_out=held_out) for part in reversed(ranks)]
        assert parts[0] | parts[1] | parts[2] == whole
        assert draw(source, 4, range(BATCH), held_out=held_out) != whole


def test_a_slot_knows_its_shape_and_work(source):
    slots = source.slots(5, 1, BATCH)
    assert len({slot.shape for slot in slots}) == len(CROPS)
    for slot in slots:
        assert source.draw([slot]).latents.shape[2:] == slot.shape and slot.cost == math.prod(slot.shape)


def test_shares_of_sets_captions_and_crops(source):
    """Two sets of 36 and 6 images are drawn half and half within 1 %; every caption and crop has its turn."""
    slots = [s for step in range(200) for s in source.slots(5, step, BATCH)]
    sets = Counter(image_of(source, s).sample.source for s in slots)
    assert abs(sets[0] / len(slots) - 0.5) < 0.01
    images = [image_of(source, s) for s in slots]
    drawn, crops = (
        Counter(s.caption for s in slots),
        Counter((p.sample.name, p.crops[s.index[2]]) for p, s in zip(images, slots)),
    )
    for p in {p.sample.name: p for p in images}.values():
        visits = sum(drawn[c] for c in p.sample.captions)
        for part, of in ((drawn, list(p.sample.captions)), (crops, [(p.sample.name, c) for c in p.crops])):
            assert all(abs(part[x] / visits - 1 / len(of)) < 4 * (0.25 / visits) ** 0.5 for x in of)


def test_weights_are_relative(stores):
    source = opened(IMAGES, [3.0, 1.0], *stores, 0.1)
    slots = [s for step in range(100) for s in source.slots(5, step, BATCH)]
    assert abs(sum(image_of(source, s).sample.source == 0 for s in slots) / len(slots) - 0.75) < 0.01


def test_held_out_images_are_never_trained_on(source):
    train = {image_of(source, s).sample.sha256 for step in range(200) for s in source.slots(5, step, BATCH)}
    held = {image_of(source, s).sample.sha256 for s in source.slots(5, 0, 60, held_out=True)}
    assert len(held) == 5 and len(train) == len(IMAGES) - 5 and not train & held


def test_the_split_follows_the_bytes_of_a_image():
    """Copies in two sets are on one side; another order or name changes nothing; at least one is held out."""
    twins = [*IMAGES, *(image(1, 100 + i, copy_of=IMAGES[i].sample.sha256) for i in range(20))]
    halves = split(twins, 0.3)
    train, held = halves.train, halves.held
    assert not {p.sample.sha256 for p in train} & {p.sample.sha256 for p in held} and len(train) + len(held) == len(twins)
    again = [replace(p, sample=replace(p.sample, name="x")) for p in reversed(twins)]
    assert {p.sample.sha256 for p in split(again, 0.3).held} == {p.sample.sha256 for p in held}
    assert len(split(IMAGES, 0.001).held) == 1 and split(IMAGES, 0.0).held == []


@pytest.mark.parametrize("images", [IMAGES[:40], IMAGES[:1] * 2, [image(0, i, copy_of="aa") for i in range(3)]])
def test_a_set_without_training_images_is_an_error(stores, images):
    """Its share would go to the others without a word."""
    with pytest.raises(UserError, match=r"data\.sets\.[01]: no image of this set is left to train on"):
        opened(images, [1.0, 1.0], *stores, 0.1)


def test_the_digest_knows_all_that_a_draw_depends_on(stores, tmp_path):
    def digest(images=IMAGES, weights=(1.0, 1.0), stores=stores, share=0.1):
        return opened(images, weights, *stores, share).digest

    first = IMAGES[0]
    other_caption = replace(first, sample=replace(first.sample, captions=("new", first.sample.captions[1])))
    other_crop = replace(first, crops=(Crop(64, 4, 4, (0.5, 0.0, 8.5, 8.0)),))
    changed = [
        digest([other_caption, *IMAGES[1:]]),
        digest([other_crop, *IMAGES[1:]]),
        digest(IMAGES[1:]),
        digest([*IMAGES[1:], first]),
        digest(weights=(1.0, 2.0)),
        digest(share=0.2),
        digest(stores=(Store(tmp_path, {"vae": "other"}), stores[1])),
        digest(stores=(stores[0], Store(tmp_path, {"t5_mask": True}))),
    ]
    assert len({digest(), *changed}) == 1 + len(changed) and digest() == digest()
    assert digest([replace(p, sample=replace(p.sample, name="moved")) for p in IMAGES]) == digest()


def test_keys_are_of_content(stores):
    a, b = IMAGES[1], IMAGES[2]
    keys = {latent_key(p.sample, c) for p in (a, b) for c in p.crops}
    assert len(keys) == len(a.crops) + len(b.crops)
    assert latent_key(replace(a.sample, name="moved/else"), a.crops[0]) == latent_key(a.sample, a.crops[0])
    assert "np." not in f"{a.crops[0].box}" and text_key("a") != text_key("b")
    (text,) = read_text(stores[1], [a.sample.captions[0]], stored_shapes(Widths((3,), {"pooled": 2})))
    assert len(text) == 1


def test_threads_may_read_and_draw_at_once(stores):
    """Training draws in one thread while validation reads in another: few open shards, so that they are opened all the time."""
    from concurrent.futures import ThreadPoolExecutor

    many = Store(stores[0].folder.parent / "many", {})
    for p in IMAGES:
        many.write({latent_key(p.sample, c): stores[0].read(latent_key(p.sample, c)) for c in p.crops})
    import dedistill.data.cache as cache

    before, cache.OPEN_SHARDS = cache.OPEN_SHARDS, 2
    try:
        source = opened(IMAGES, [1.0, 1.0], Store(many.folder, {}), stores[1], 0.1)
    finally:
        cache.OPEN_SHARDS = before
    wanted = [draw(source, step, range(BATCH), held_out=step % 2 == 1) for step in range(4)]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(draw, source, step % 4, range(BATCH), held_out=step % 2 == 1) for step in range(24)]
        assert [job.result() for job in jobs] == wanted * 6


ENOUGH = [(1, 1), (4, 1), (10, 2), (25, 5), (80, 16), (100, 16), (500, 16), (800, 16), (2000, 40)]


@pytest.mark.parametrize(("images", "held"), ENOUGH)
def test_by_default_enough_is_held_out_for_intervals(images, held):
    """16 images where that is no more than a fifth, and 2 % of many."""
    everything = [SimpleNamespace(sample=SimpleNamespace(sha256=f"{i:064}")) for i in range(images)]
    found = split(everything, "auto")
    assert (len(found.train), len(found.held)) == (images - held, held)
    assert split(everything[::-1], "auto").held[::-1] == found.held


def test_prompts_are_different_captions_as_far_as_there_are(source):
    """Those of held-out images first; more than there are come again in the same order."""
    captions = {c for p in (p for own in source._sets for p in own) for c in p.sample.captions}
    held = {c for p in source._sets[HELD] for c in p.sample.captions}
    found = source.prompts(0, len(captions) + 3)
    assert set(found[: len(held)]) == held and set(found) == captions and found[len(captions) :] == found[:3]
    assert source.prompts(0, 2) == found[:2] and source.prompts(1, len(captions)) != source.prompts(0, len(captions))
