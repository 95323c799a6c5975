"""Pictures while training: the same prompts, noise and scales at every preview, so that only the weights differ."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from dedistill.assemble import Model
from dedistill.flow.solvers import sigma_grid
from dedistill.pulse import pulse
from dedistill.recipe import Recipe
from dedistill.sampling.grid import contact_sheet
from dedistill.sampling.sampler import sample, start_noise
from dedistill.sampling.sweep import save_png


class Preview:
    """Writes ``folder/step-XXXXXXXX.png``, prompts as rows and scales as columns, and each picture by itself."""

    def __init__(self, recipe: Recipe, model: Model, folder: Path):
        self.settings, self.steps, self.model, self.folder = recipe.preview, recipe.sample.steps, model, folder
        self.out_of_memory = False

    def __call__(self, step: int, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Never ends a run for lack of memory: says so once, and trains on. Left unfinished once ``interrupted``."""
        try:
            self._write(step, interrupted)
        except torch.OutOfMemoryError:
            if not self.out_of_memory:
                said = "out of memory; training goes on. Lower sample.height and sample.width."
                print(f"preview at step {step}: {said}", file=sys.stderr)
            self.out_of_memory = True
        finally:
            _release(self.model)

    def _write(self, step: int, interrupted: Callable[[], bool]) -> None:
        p, prompts = self.settings, list(self.settings.prompts)
        shape = self.model.parts.picture
        noise = start_noise(p.seed, len(prompts), shape)
        sigmas = sigma_grid(self.steps, self.model.grid_shift)
        folder = self.folder / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [(prompt, []) for prompt in prompts]
        for cfg in p.cfgs:
            for i, prompt in enumerate(prompts):  # one at a time: memory is what training has left over
                if interrupted():
                    return
                pulse.beat("making previews")
                picture = sample(self.model, [prompt], noise[i : i + 1], sigmas, cfg=cfg, skip=p.skip)[0]
                file = folder / f"p{i:03d}_cfg{cfg:g}.png"
                save_png(picture, file)
                with Image.open(file) as image:
                    rows[i][1].append(image.copy())
        sheet = contact_sheet(rows, [f"CFG {cfg:g}" for cfg in p.cfgs], title=f"step {step:,}")
        sheet.save(folder.with_suffix(".png"))


def _release(model: Model) -> None:
    """Give the memory of the codec and of the pictures back to training."""
    if model.parts.vae is not None:
        model.parts.vae.unload()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
