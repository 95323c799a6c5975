"""An independent reader of handwritten digits: does a picture show what its prompt says, and does it look real?

It never sees a generated picture in training, and the trained models never see it.
"""

import hashlib

import numpy as np
from torch import Tensor

from dedistill.data.captions import digits_in
from dedistill.data.digits import DigitSource

COMPONENTS = 20
NEIGHBOURS = 3
REAL = 800
"""Pictures whose neighbours are looked at."""


class DigitJudge:
    """A support vector machine reads the digits; principal components measure how far the pictures are from real ones."""

    def __init__(self, source: DigitSource):
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

        pictures, labels = source.train
        self.identity = _identity(*source.train, *source.held_out)
        flat = pictures.reshape(len(pictures), -1)
        self.side = pictures.shape[2]
        # gamma and C of the laboratory for 8x8; sklearn's own scale rule for larger pictures
        self.reader = SVC(C=10, gamma=0.02 if flat.shape[1] == 64 else "scale").fit(flat, labels)
        self.pca = PCA(COMPONENTS, svd_solver="full").fit(flat)
        everything = np.concatenate([pictures, source.held_out[0]])
        self.real = self.pca.transform(everything.reshape(len(everything), -1))
        held_out, held_out_labels = source.held_out
        self.held_out_accuracy = float(self.reader.score(held_out.reshape(len(held_out), -1), held_out_labels))

    def correct(self, pictures: Tensor, prompts: list[str]) -> np.ndarray:
        """Share of each prompt's digits that its picture shows [B], reading left to right; NaN for a prompt without any."""
        read = self.reader.predict(self._digits(pictures)).reshape(len(prompts), -1)
        asked = [digits_in(p) for p in prompts]
        return np.array([np.mean([r == w for r, w in zip(row, a)]) if a else np.nan for row, a in zip(read, asked)])

    def realistic(self, pictures: Tensor) -> np.ndarray:
        """Share of each picture's digits [B] that lie among real ones; their mean is the precision of the set."""
        features = self.pca.transform(self._digits(pictures))
        return among(features, self.real[:REAL]).reshape(len(pictures), -1).mean(1)

    def numbers(self, pictures: Tensor) -> dict[str, float]:
        """frechet, precision and recall of a set of pictures against all real digits."""
        features = self.pca.transform(self._digits(pictures))
        precision, recall = precision_recall(features[:REAL], self.real[:REAL])
        return {"frechet": frechet_distance(features, self.real), "precision": precision, "recall": recall}

    def _digits(self, pictures: Tensor) -> np.ndarray:
        """Single digits [B * n, h * w], clamped; a picture that is not finite reads as black."""
        x = np.nan_to_num(pictures[:, 0].numpy(), nan=-1.0).clip(-1, 1)
        parts = np.stack(np.split(x, x.shape[2] // self.side, axis=2), axis=1)
        return parts.reshape(-1, x.shape[1] * self.side)


def _identity(*arrays: np.ndarray) -> str:
    """Hash of the pictures and labels a judge was made from: another judge gives other scores."""
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
    return (_distances(points, others) <= radius).any(1)


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.square(x[:, None] - y[None]).sum(-1)


def judge_for(source: object) -> DigitJudge | None:
    """The judge of a data source, or None when there is none."""
    return DigitJudge(source) if isinstance(source, DigitSource) else None
