"""A judge for any picture with a caption: CLIP, from a folder that is already there. Nothing is downloaded."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dedistill.data.pictures import PILLOW_READS, BadPicture, decode
from dedistill.errors import UserError
from dedistill.io.hashing import file_sha256
from dedistill.pretrained import check_vocabulary, load_tokenizer, load_whole, reading
from dedistill.sampling.grid import as_image
from dedistill.sampling.judge import frechet_distance

CHUNK = 16
"""Pictures that CLIP looks at together."""
NEEDED = "a folder of transformers' CLIPModel: config.json, model.safetensors, preprocessor_config.json and the tokenizer"


class ClipJudge:
    """CLIP's view of pictures: how well they fit their prompts, and with ``real`` how far they are from real ones."""

    def __init__(self, folder: Path, real: Path | None = None, *, device: torch.device | str = "cpu"):
        """folder: see ``NEEDED``; real: a folder with two pictures or more, at any depth.

        Raises UserError for a folder that holds something else, weights that do not fill the model, unreadable pictures.
        """
        self.folder, self.device = Path(folder), device
        self.model, self.tokenizer, self.processor = _load(self.folder, device)
        files = [f for f in sorted(self.folder.iterdir()) if f.suffix in (".json", ".safetensors", ".txt")]
        pictures = _pictures(Path(real)) if real is not None else []
        self.identity = hashlib.sha256("".join(map(file_sha256, [*files, *pictures])).encode()).hexdigest()
        self.real = np.concatenate([self._vectors([_read(f)]) for f in pictures]) if pictures else None

    def embed(self, pictures: Tensor) -> np.ndarray:
        """CLIP's vectors [B, D], of length 1, of pictures [B, C, H, W] in [-1, 1]; it sees their middle square."""
        return np.concatenate([self._vectors([as_image(p) for p in chunk]) for chunk in pictures.split(CHUNK)])

    def scores(self, vectors: np.ndarray, prompts: list[str]) -> np.ndarray:
        """CLIP score [B], 0 or more: 100 times the cosine of a picture and its prompt (arXiv 2104.08718)."""
        limit = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer(prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        with torch.inference_mode():
            found = self.model.get_text_features(**text.to(self.device)).pooler_output
        return np.maximum(0, 100 * (vectors * _unit(found)).sum(1))

    def distance(self, vectors: np.ndarray) -> float:
        """Frechet distance of vectors [B, D] to those of the real pictures (arXiv 2203.06026). Few pictures raise it."""
        return frechet_distance(vectors, self.real)

    def _vectors(self, images: list[Image.Image]) -> np.ndarray:
        pixels = self.processor(images, return_tensors="pt")["pixel_values"].to(self.device)
        with torch.inference_mode():
            return _unit(self.model.get_image_features(pixels).pooler_output)


def _unit(vectors: Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vectors.double(), dim=-1).cpu().numpy()


def _load(folder: Path, device: torch.device | str) -> tuple:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    if not folder.is_dir():
        raise UserError(f"--clip: there is no folder '{folder}'; put {NEEDED} there", exit_code=2)
    model = load_whole(CLIPModel, folder, "--clip", needed=NEEDED, dtype=torch.float32)
    tokenizer = load_tokenizer(CLIPTokenizer, folder, "--clip")
    with reading(f"--clip: '{folder}' cannot be loaded; it must be {NEEDED}"):
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    check_vocabulary(tokenizer, model.config.text_config.vocab_size, folder, "--clip")
    return model.eval().requires_grad_(False).to(device), tokenizer, processor


def _pictures(folder: Path) -> list[Path]:
    found = [f for f in sorted(folder.rglob("*")) if f.suffix[1:].lower() in PILLOW_READS and f.is_file()]
    if len(found) < 2:
        raise UserError(
            f"--real: {len(found)} pictures in '{folder}'; a distance needs two at least, and says little below 1,000", 2
        )
    return found


def _read(file: Path) -> Image.Image:
    try:
        return decode(file.read_bytes())
    except (BadPicture, OSError) as e:
        raise UserError(f"--real: '{file}': {e}") from e
