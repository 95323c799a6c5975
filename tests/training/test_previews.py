"""Images while training: when they come, and that they change nothing."""

import torch
from PIL import Image
from test_run import run, same, weights

PREVIEW = ["preview.prompts=['the red sun', 'a dog']", "preview.cfgs=[1.0, 3.0]", "sample.width=48"]


def test_previews_come_when_asked_and_disturb_nothing(image_recipe, tmp_path):
    """At step 0, every N, and at the end; from the same noise; the run is the same without them."""
    a = run(image_recipe, tmp_path / "a", *PREVIEW, "preview.every=2", "train.steps=5")
    plain = run(image_recipe, tmp_path / "b", "train.steps=5")
    assert (a / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes() and same(weights(a), weights(plain))
    steps = [f"step-{s:08d}" for s in (0, 2, 4, 5)]
    assert sorted(p.name for p in (a / "previews").iterdir()) == sorted([*steps, *(f"{s}.png" for s in steps)])
    names = ["p000_cfg1.png", "p000_cfg3.png", "p001_cfg1.png", "p001_cfg3.png"]
    assert all(sorted(p.name for p in (a / "previews" / s).iterdir()) == names for s in steps)
    again = run(image_recipe, tmp_path / "c", *PREVIEW, "preview.every=5", "train.steps=5")
    for step in (0, 5):
        files = [f / "previews" / f"step-{step:08d}.png" for f in (a, again)]
        assert files[0].read_bytes() == files[1].read_bytes()
    still = run(image_recipe, tmp_path / "d", *PREVIEW, "preview.every=1", "train.lr=1e-30", "train.steps=2")
    with (
        Image.open(still / "previews" / steps[0] / names[0]) as before,
        Image.open(still / "previews" / steps[1] / names[0]) as now,
    ):
        assert before.tobytes() == now.tobytes()
        assert [now.text[k] for k in ("step", "prompt", "cfg", "seed")] == ["2", "the red sun", "1.0", "0"]


def test_a_preview_without_memory_never_ends_a_run(image_recipe, tmp_path, capsys):
    from diffusers.models.autoencoders.vae import Decoder

    def full(module, _):
        if isinstance(module, Decoder):
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(full)
    try:
        out = run(image_recipe, tmp_path / "a", *PREVIEW, "preview.every=1")
    finally:
        hook.remove()
    assert capsys.readouterr().err.count("out of memory; training goes on") == 1
    plain = run(image_recipe, tmp_path / "b")
    assert same(weights(out), weights(plain)) and list((out / "previews").rglob("*.png")) == []


def test_where_memory_runs_out_images_are_decoded_in_tiles(image_recipe, tmp_path, capsys, monkeypatch):
    """Near those decoded whole, at every later preview too; said once; training is the same."""
    from diffusers.models.autoencoders.vae import Decoder

    from dedistill.models import vae

    monkeypatch.setattr(vae, "TILE", 32)
    large = ["sample.width=96", "sample.height=96"]

    def full(module, args):
        if isinstance(module, Decoder) and args[0].shape[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(full)
    try:
        tiled = run(image_recipe, tmp_path / "a", *PREVIEW, *large, "preview.every=1")
    finally:
        hook.remove()
    assert capsys.readouterr().err.count("from now on in tiles") == 1
    whole = run(image_recipe, tmp_path / "b", *PREVIEW, *large, "preview.every=1")
    assert same(weights(tiled), weights(whole))
    files = sorted(p.relative_to(whole) for p in whole.glob("previews/*/*.png"))
    assert len(files) == 12
    for file in files:
        with Image.open(tiled / file) as a, Image.open(whole / file) as b:
            one, other = (torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).float() for i in (a, b))
            assert a.size == b.size == (96, 96) and 0 < float((one - other).abs().mean()) < 40
