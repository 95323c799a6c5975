"""Who reads an image: a classifier of digits, and CLIP from a folder that is already there. Nothing is downloaded.

It never sees a generated image in training, and the trained models never see it.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dedistill.data.digits import DigitSource, digits_in
from dedistill.data.images.decode import PILLOW_READS, BadImage, decode
from dedistill.data.source import needed
from dedistill.errors import UserError, amount
from dedistill.io.hashing import file_sha256
from dedistill.models.pretrained import check_vocabulary, load_tokenizer, load_whole, reading
from dedistill.sampling.images import as_image

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

# --- an independent reader of handwritten digits ---------------------------------------------------------------------


COMPONENTS = 20
NEIGHBOURS = 3
REAL = 800
"""Images whose neighbours are looked at."""


class DigitJudge:
    """A support vector machine reads the digits; principal components measure how far the images are from real ones."""

    def __init__(self, source: DigitSource):
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

        images, labels = source.train
        self.identity = _identity(*source.train, *source.held_out)
        flat = images.reshape(len(images), -1)
        self.side = images.shape[2]
        # gamma and C of the laboratory for 8x8; sklearn's own scale rule for larger images
        self.reader = SVC(C=10, gamma=0.02 if flat.shape[1] == 64 else "scale").fit(flat, labels)
        self.pca = PCA(COMPONENTS, svd_solver="full").fit(flat)
        everything = np.concatenate([images, source.held_out[0]])
        self.real = self.pca.transform(everything.reshape(len(everything), -1))
        held_out, held_out_labels = source.held_out
        self.held_out_accuracy = float(self.reader.score(held_out.reshape(len(held_out), -1), held_out_labels))

    def correct(self, images: Tensor, prompts: list[str]) -> np.ndarray:
        """Share of each prompt's digits that its image shows [B], reading left to right; NaN for a prompt without any."""
        read = self.reader.predict(self._digits(images)).reshape(len(prompts), -1)
        wanted = [digits_in(p) for p in prompts]
        return np.array([np.mean([r == w for r, w in zip(row, a)]) if a else np.nan for row, a in zip(read, wanted)])

    def realistic(self, images: Tensor) -> np.ndarray:
        """Share of each image's digits [B] that lie among real ones; their mean is the precision of the set."""
        features = self.pca.transform(self._digits(images))
        return among(features, self.real[:REAL]).reshape(len(images), -1).mean(1)

    def numbers(self, images: Tensor) -> dict[str, float]:
        """frechet, precision and recall of a set of images against all real digits."""
        features = self.pca.transform(self._digits(images))
        precision, recall = precision_recall(features[:REAL], self.real[:REAL])
        return {"frechet": frechet_distance(features, self.real), "precision": precision, "recall": recall}

    def _digits(self, images: Tensor) -> np.ndarray:
        """Single digits [B * n, h * w], clamped; an image that is not finite reads as black."""
        x = np.nan_to_num(images[:, 0].numpy(), nan=-1.0).clip(-1, 1)
        parts = np.stack(np.split(x, x.shape[2] // self.side, axis=2), axis=1)
        return parts.reshape(-1, x.shape[1] * self.side)


def _identity(*arrays: np.ndarray) -> str:
    """Hash of the images and labels a judge was made from: another judge gives other scores."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to rows of ``a`` and ``b`` (Dowson & Landau 1982).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)); the trace of the root is the sum of roots of the eigenvalues of A B.
    """
    mean, cov_a, cov_b = a.mean(0) - b.mean(0), np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return float(mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * roots)


def precision_recall(made: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Share of ``made`` inside the k-neighbour balls of ``real``, and the reverse (arXiv 1904.06991)."""
    return float(among(made, real).mean()), float(among(real, made).mean())


def among(points: np.ndarray, others: np.ndarray, k: int = NEIGHBOURS) -> np.ndarray:
    """Whether each of ``points`` lies in the ball of some of ``others`` around it that reaches its k-th neighbour."""
    radius = np.sort(_distances(others, others), axis=1)[:, min(k, len(others) - 1)]
    return np.asarray((_distances(points, others) <= radius).any(1))


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.square(x[:, None] - y[None]).sum(-1)


def judge_for(source: object) -> DigitJudge | None:
    """The judge of a data source, or None when there is none."""
    return DigitJudge(source) if isinstance(source, DigitSource) else None


# --- A judge for any image with a caption --------------------------------------------------------------------------


CHUNK = 16
"""Images that CLIP looks at together."""
NEEDED = "a folder of transformers' CLIPModel: config.json, model.safetensors, preprocessor_config.json and the tokenizer"


class ClipJudge:
    """CLIP's view of images: how well they fit their prompts, and with ``real`` how far they are from real ones."""

    def __init__(self, folder: Path, real: Path | None = None, *, device: torch.device | str = "cpu"):
        """folder: see ``NEEDED``; real: a folder with two images or more, at any depth.

        Raises UserError for a folder that holds something else, weights that do not fill the model, unreadable images.
        """
        self.folder, self.device = Path(folder), device
        self.model, self.tokenizer, self.processor = _load(self.folder, device)
        files = [f for f in sorted(self.folder.iterdir()) if f.suffix in (".json", ".safetensors", ".txt")]
        images = _images(Path(real)) if real is not None else []
        self.identity = hashlib.sha256("".join(map(file_sha256, [*files, *images])).encode()).hexdigest()
        self.real = np.concatenate([self._vectors([_read(f)]) for f in images]) if images else None

    def embed(self, images: Tensor) -> np.ndarray:
        """CLIP's vectors [B, D], of length 1, of images [B, C, H, W] in [-1, 1]; it sees their middle square."""
        return np.concatenate([self._vectors([as_image(p) for p in chunk]) for chunk in images.split(CHUNK)])

    def scores(self, vectors: np.ndarray, prompts: list[str]) -> np.ndarray:
        """CLIP score [B], 0 or more: 100 times the cosine of an image and its prompt (arXiv 2104.08718)."""
        limit = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer(prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        with torch.inference_mode():
            found = self.model.get_text_features(**text.to(self.device)).pooler_output
        return np.maximum(0, 100 * (vectors * _unit(found)).sum(1))

    def distance(self, vectors: np.ndarray) -> float:
        """Frechet distance of vectors [B, D] to those of the real images (arXiv 2203.06026). Few images raise it."""
        return frechet_distance(vectors, needed(self.real))

    def _vectors(self, images: list[Image.Image]) -> np.ndarray:
        pixels = self.processor(images, return_tensors="pt")["pixel_values"].to(self.device)
        with torch.inference_mode():
            return _unit(self.model.get_image_features(pixels).pooler_output)


def _unit(vectors: Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vectors.double(), dim=-1).cpu().numpy()


def _load(folder: Path, device: torch.device | str) -> "tuple[CLIPModel, CLIPTokenizer, CLIPImageProcessorPil]":
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    if not folder.is_dir():
        raise UserError(f"--clip: there is no folder '{folder}'; put {NEEDED} there", exit_code=2)
    model = load_whole(CLIPModel, folder, "--clip", needed=NEEDED, dtype=torch.float32)
    tokenizer = load_tokenizer(CLIPTokenizer, folder, "--clip")
    with reading(f"--clip: '{folder}' cannot be loaded; it must be {NEEDED}"):
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    check_vocabulary(tokenizer, model.config.text_config.vocab_size, folder, "--clip")
    return model.eval().requires_grad_(False).to(device), tokenizer, processor


def _images(folder: Path) -> list[Path]:
    found = [f for f in sorted(folder.rglob("*")) if f.suffix[1:].lower() in PILLOW_READS and f.is_file()]
    if len(found) < 2:
        raise UserError(
            f"--real: {amount(len(found), 'image')} in '{folder}'; a distance needs at least 2, and says little below 1,000",
            2,
        )
    return found


def _read(file: Path) -> Image.Image:
    try:
        return decode(file.read_bytes())
    except (BadImage, OSError) as e:
        raise UserError(f"--real: '{file}': {e}") from e
