"""CLIP as a judge: a small random model in the real layout, against transformers and torchmetrics."""

import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from dedistill.errors import UserError
from dedistill.evaluation.judges import ClipJudge
from dedistill.flow import keyed
from dedistill.sampling.images import as_image

PROMPTS = ["a red fox", "two small dogs in the snow", "a " * 100]


def write_clip(folder: Path, seed: int = 0) -> Path:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config={"vocab_size": len(tokenizer), **sizes, **ids},
        vision_config={"image_size": 32, "patch_size": 8, **sizes},
        projection_dim=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def images(seed: int, count: int = 3, channels: int = 3) -> torch.Tensor:
    return keyed.noise(seed, "picture", 0, range(count), (channels, 40, 48)) / 2


def write_images(folder: Path, made: torch.Tensor) -> Path:
    folder.mkdir()
    for i, image in enumerate(made):
        as_image(image).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("channels", [1, 3])
def test_scores_are_those_of_transformers(clip, channels):
    """CLIP score is max(0, logits per image / scale of the logits x 100), long prompts cut; alike in any batch."""
    judge, made = ClipJudge(clip), images(0, channels=channels)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    text = tokenizer(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(clip)([as_image(p).convert("RGB") for p in made], return_tensors="pt")
    with torch.no_grad():
        logits = model(**text, **pixels).logits_per_image / model.logit_scale.exp()
    vectors = judge.embed(made)
    assert np.ptp(logits.diagonal().numpy()) > 1e-3, "the prompts are told apart"
    np.testing.assert_allclose(judge.scores(vectors, PROMPTS), 100 * logits.diagonal().clamp(min=0).numpy(), atol=1e-4)
    others = judge.scores(-vectors, PROMPTS) + judge.scores(vectors, PROMPTS)
    np.testing.assert_allclose(others, 100 * logits.diagonal().abs().numpy(), atol=1e-4)
    np.testing.assert_allclose(judge.embed(made[1:2]), vectors[1:2], atol=1e-6)


def test_distance_is_that_of_torchmetrics(clip, tmp_path):
    """Parity with torchmetrics' FrechetInceptionDistance on the same vectors; more noise is further away; 0 to itself."""
    real = images(1, 40)
    judge = ClipJudge(clip, write_images(tmp_path / "real", real))
    distances = []
    for strength in (0.0, 0.5, 1.0):
        vectors = judge.embed(real + strength * images(2, 40))
        theirs = FrechetInceptionDistance(feature=torch.nn.Identity(), input_img_size=(12,)).set_dtype(torch.float64)
        theirs.inception.num_features = 12
        theirs = FrechetInceptionDistance(feature=theirs.inception).set_dtype(torch.float64)
        theirs.update(torch.from_numpy(judge.real), real=True)
        theirs.update(torch.from_numpy(vectors), real=False)
        distances.append(judge.distance(vectors))
        assert distances[-1] == pytest.approx(float(theirs.compute()), abs=1e-6)
    assert distances[0] == pytest.approx(0, abs=1e-6) and distances[0] < distances[1] < distances[2]


def test_identity_follows_weights_and_real_images(clip, tmp_path):
    real, other = (write_images(tmp_path / f"real{k}", images(k, 2)) for k in (1, 2))
    found = {ClipJudge(clip).identity, ClipJudge(clip, real).identity, ClipJudge(clip, other).identity}
    found.add(ClipJudge(write_clip(tmp_path / "clip", seed=1)).identity)
    assert len(found) == 4 and ClipJudge(clip, real).identity in found


@pytest.mark.parametrize(
    "fault", ["nothing", "empty", "no weights", "a pickle", "cut", "lacking", "other sizes", "no tokenizer", "own code"]
)
def test_a_folder_that_holds_no_clip_is_refused_by_name(tmp_path, fault):
    folder = tmp_path / "clip"
    if fault == "empty":
        folder.mkdir()
    elif fault != "nothing":
        weights = write_clip(folder) / "model.safetensors"
        tensors = load_file(weights)
        if fault == "no weights":
            weights.unlink()
        elif fault == "a pickle":
            weights.unlink()
            torch.save(tensors, folder / "pytorch_model.bin")
        elif fault == "cut":
            weights.write_bytes(weights.read_bytes()[:5000])
        elif fault == "own code":
            config = folder / "preprocessor_config.json"
            config.write_text(config.read_text().replace("{", '{"auto_map": {"AutoImageProcessor": "own.Own"},', 1))
            (folder / "own.py").write_text("class Own: pass\n")
        elif fault == "no tokenizer":
            for file in folder.glob("*token*"):
                file.unlink()
        else:
            del tensors["text_projection.weight"]
            if fault == "other sizes":
                tensors["text_projection.weight"] = torch.zeros(12, 9)
            save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--clip: .*'?" + str(folder)) as e:
        ClipJudge(folder)
    if fault in ("lacking", "own code"):
        assert {"lacking": "text_projection.weight", "own code": "preprocessor_config.json"}[fault] in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_real_images_that_cannot_be_used_are_named(clip, tmp_path):
    (tmp_path / "few").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "few" / "one.png")
    with pytest.raises(UserError, match="--real: 1 image in"):
        ClipJudge(clip, tmp_path / "few")
    (tmp_path / "few" / "two.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"--real: .*two\.jpg"):
        ClipJudge(clip, tmp_path / "few")


def test_nothing_is_fetched_and_no_torchvision_imported(clip, monkeypatch):
    """A closed network and a folder are enough."""

    def closed(*arguments):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", closed)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # to import it is an error
    judge = ClipJudge(str(clip))
    assert judge.scores(judge.embed(torch.zeros(1, 3, 32, 32)), ["a"]).shape == (1,)
