"""Images while training: the same prompts, noise and scales at every preview, so that only the weights differ."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dedistill.distributed.outside import heartbeat
from dedistill.distributed.world import World
from dedistill.errors import UserError, is_out_of_memory
from dedistill.evaluation.sweep import save_png
from dedistill.flow.guidance import guider_of
from dedistill.io.images import replace_image
from dedistill.models.model import Model
from dedistill.recipe import Recipe
from dedistill.sampling.images import contact_sheet
from dedistill.sampling.sampler import Sampling, start_noise, trajectories


class Preview:
    """Writes ``folder/step-XXXXXXXX.png``, prompts as rows and ways of sampling as columns, and each image by itself."""

    def __init__(self, recipe: Recipe, model: Model, folder: Path, world: World | None = None):
        """Rank 0 of ``world`` writes; the others are needed where the network cannot be called without them."""
        self.settings, self.model, self.folder = recipe.preview, model, folder
        s = recipe.sample
        guiders = [guider_of(s.guider, cfg, recipe.preview.skip) for cfg in recipe.preview.cfgs]
        self.columns = [Sampling(solver=s.solver, steps=s.steps, guidance=guider) for guider in guiders]
        self.world = world or World()
        self.out_of_memory = False

    def __call__(self, step: int, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Never ends a run for lack of memory where one process can go on alone: says so once, and trains on.

        Left unfinished once ``interrupted``.
        """
        latents = self._latents()
        try:
            if self.world.requires_equal_forwards:  # all of them, before one that decodes may give up
                latents = iter(_all(latents))
            if self.world.main:
                self._write(step, latents, interrupted)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            if not self.out_of_memory:
                message = "out of memory; training goes on. Lower sample.height and sample.width."
                print(f"preview at step {step}: {message}", file=sys.stderr)
            self.out_of_memory = True
        except OSError as e:
            print(f"preview at step {step}: cannot write '{self.folder}': {e.strerror or e}; training goes on", file=sys.stderr)
        finally:
            _release(self.model)

    def _latents(self) -> Iterator[Tensor]:
        """What is to be decoded [1, C, h, w], column by column, prompt by prompt."""
        p, prompts = self.settings, list(self.settings.prompts)
        noise = start_noise(p.seed, len(prompts), self.model.components.sample_shape)
        for column, sampling in enumerate(self.columns):
            for i, prompt in enumerate(prompts):  # one at a time: memory is what training has left over
                heartbeat.beat(f"preview {column * len(prompts) + i + 1}/{len(self.columns) * len(prompts)}")
                (states,) = trajectories(self.model, [prompt], noise[i : i + 1], sampling)
                yield states[-1]

    def _write(self, step: int, latents: Iterator[Tensor], interrupted: Callable[[], bool]) -> None:
        p = self.settings
        folder = self.folder / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        rows: list[tuple[str, list[Image.Image]]] = [(prompt, []) for prompt in p.prompts]
        for sampling in self.columns:
            facts = sampling.facts
            for i, (prompt, row) in enumerate(rows):
                if interrupted():
                    return
                image = self._decoded(next(latents), step)
                file = folder / f"p{i:03d}_cfg{facts['cfg']:g}.png"
                save_png(image, file, {"step": step, **facts, "prompt": prompt, "seed": p.seed})
                with Image.open(file) as stored:
                    row.append(stored.copy())
        sheet = contact_sheet(rows, [sampling.guidance.label for sampling in self.columns], title=f"step {step:,}")
        replace_image(folder.with_suffix(".png"), sheet)

    @torch.no_grad()
    def _decoded(self, latents: Tensor, step: int) -> Tensor:
        """The image; where memory does not suffice for all of it, in tiles."""
        try:
            return self.model.decode(latents)[0]
        except torch.OutOfMemoryError:
            codec = self.model.components.vae
            if codec is None or not codec.in_tiles():
                raise
        print(f"preview at step {step}: too little memory to decode whole images; from now on in tiles", file=sys.stderr)
        _release(self.model)
        return self.model.decode(latents)[0]


def _all(latents: Iterator[Tensor]) -> list[Tensor]:
    try:
        return list(latents)
    except torch.OutOfMemoryError as e:
        raise UserError(
            "out of memory in a preview; with a base in parts no process can go on without the others. "
            "Lower sample.height and sample.width, or set preview.every = 0."
        ) from e


def _release(model: Model) -> None:
    """Give the memory of the codec and of the images back to training."""
    if model.components.vae is not None:
        model.components.vae.unload()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
