"""What families share whose models are pipelines of diffusers: denoiser on the latents of a VAE, text encoders, scheduler."""

import json
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from dedistill.errors import UserError
from dedistill.flow.path import dynamic_shift
from dedistill.io.atomic import replace_json
from dedistill.io.json_files import read_object
from dedistill.models.family import MADE, Components, Denoiser, prediction_facts
from dedistill.models.pipeline_files import SCHEDULER, copy_files, pipeline_files
from dedistill.models.places import Place
from dedistill.models.prompts import PromptEncoders
from dedistill.models.spec import ModelSpec
from dedistill.models.vae import PublishedVae, Vae
from dedistill.recipe.model_tables import Model
from dedistill.recipe.schema import MOST_SHIFTED

SAVED = ("model_index.json", "scheduler")
"""What a folder of ours takes from its base beside the denoiser; the rest it points to."""


class PipelineFamily:
    """Components hold a PromptEncoders as text, a Vae, and a Place as source."""

    spec: ModelSpec
    patch: int
    """Side of the square of latents that makes one token, or that the network works on as one."""

    def joins_text(self, block: nn.Module) -> bool:
        return False

    def text_facts(self, components: Components) -> dict[str, Any]:
        """How captions are read, for dedistill.json and for the cache of text."""
        raise NotImplementedError

    def save(self, components: Components, folder: Path) -> None:
        """The denoiser in its folder; encoders, VAE and scheduler stay where they are and are pointed to."""
        cast(Any, components.denoiser).save_pretrained(folder / self.spec.folder)
        self.save_rest(components, folder)

    def save_rest(self, components: Components, folder: Path) -> None:
        made = {key: components.facts[key] for key in MADE if key in components.facts}
        facts = made | {"family": self.spec.name, "guidance": self.guidance_fact(components)}
        facts |= prediction_facts(self.spec, components)
        facts |= {"mask": components.mask} | self.text_facts(components) | {"text_length": components.text_length}
        facts["components"] = str(_place(components).components.resolve())
        facts["shift"] = components.sample_shift or "auto"
        copy_files(pipeline_files(_place(components).components, self.spec.folder, SAVED)[0], folder)
        self._save_scheduler(components, folder)
        (folder / "dedistill.json").write_text(json.dumps(facts, indent=1) + "\n")

    def guidance_fact(self, components: Components) -> str:
        """What a distilled guidance embedding is fed, for those who use the weights: "none" without one, "bypassed", or the
        value."""
        if not self.spec.distilled_guidance(cast(Denoiser, components.denoiser).config):
            return "none"
        return "bypassed" if components.guidance is None else str(components.guidance)

    def cannot_be_saved(self, components: Path) -> list[str]:
        """Why ``save_rest`` will refuse, told before a training that would end with it."""
        try:
            pipeline_files(components, self.spec.folder, SAVED)
        except UserError as e:
            return [f"no model folder can be written with this base: {e}"]
        return []

    def other_use(self, model: Model, facts: dict[str, Any]) -> list[str]:
        """Settings in which a recipe differs from what the weights were trained with: allowed, but never unnoticed."""
        settings = {"mask": model.mask, "t5_mask": model.t5_mask}
        return [
            f"model.{key} = {value!r} here; '{model.path}' was trained with {facts[key]!r}"
            for key, value in settings.items()
            if key in facts and facts[key] != value
        ]

    def cache_inputs(self, components: Components, length: int) -> dict[str, dict[str, Any]]:
        text = {"text_length": length, "padding": components.mask != "bool"} | self.text_facts(components)
        images = {"image_prompts": components.image_prompts.encoder.files()} if components.image_prompts else {}
        return {
            "latents": {"family": self.spec.name, "vae": _vae(components).files(), **images},
            "text": {"family": self.spec.name, "encoders": cast(PromptEncoders, components.text).files()} | text,
        }

    def encode_images(self, components: Components, pixels: Tensor, noise: Tensor) -> Tensor:
        return _vae(components).encode(pixels, noise, components.device)

    def decode(self, components: Components, latents: Tensor) -> Tensor:
        return _vae(components).decode(latents, components.device)

    def latent_shape(self, components: Components, height: int, width: int) -> tuple[int, int, int]:
        vae = cast(Vae | PublishedVae, components.vae)
        step = vae.scale * self.patch
        if height % step or width % step:
            raise UserError(f"images of {width} x {height} pixels: both sides must be multiples of {step}", 2)
        return (vae.channels, height // vae.scale, width // vae.scale)

    def tokens(self, components: Components, shape: tuple[int, ...]) -> int:
        return shape[1] * shape[2] // self.patch**2

    def shift(self, components: Components, tokens: int) -> float:
        """As the model's own scheduler says: one number, or one that grows with the number of image tokens."""
        place = _place(components)
        s, file = place.scheduler, place.scheduler_file
        if not s:
            raise UserError(
                f"shift = 'auto' needs '{file}', which is missing: fetch it, or set a number (timesteps.shift, sample.shift)"
            )
        try:
            shift = self._shift_in(s, tokens)
        except (TypeError, ValueError, ArithmeticError) as e:
            raise UserError(f"model.path: '{file}' does not describe a shift: {e}") from e
        if not 0 < shift <= MOST_SHIFTED:
            raise UserError(f"model.path: '{file}' gives a shift of {shift:g}; fetch it again, or set a number (sample.shift)")
        return shift

    @staticmethod
    def _shift_in(scheduler: dict[str, Any], tokens: int) -> float:
        s = scheduler
        if not s.get("use_dynamic_shifting", False):
            return float(s.get("shift", s.get("flow_shift", 1.0)))
        low, high = float(s.get("base_shift", 0.5)), float(s.get("max_shift", 1.15))
        few, many = int(s.get("base_image_seq_len", 256)), int(s.get("max_image_seq_len", 4096))
        return dynamic_shift(tokens, low, high, few, many)

    def flow_scheduler(self, components: Components) -> dict[str, Any]:
        """scheduler_config.json of a flow model, at the shift that the recipe's images are made with where that is a number."""
        shift = components.sample_shift
        found = _place(components).scheduler
        if isinstance(shift, (int, float)):
            found = found | {"shift": shift, "use_dynamic_shifting": False}
        return {"_class_name": "FlowMatchEulerDiscreteScheduler"} | found if found else found

    def _save_scheduler(self, components: Components, folder: Path) -> None:
        """The base's own where nothing of it changes."""
        place = _place(components)
        config = place.scheduler if components.schedule else self.flow_scheduler(components)
        if config == place.scheduler and place.scheduler_file == place.components / SCHEDULER:
            return  # copied already
        (folder / SCHEDULER).parent.mkdir(exist_ok=True)
        replace_json(folder / SCHEDULER, config)
        if (index := folder / "model_index.json").exists():  # by which pipelines choose the class
            replace_json(index, read_object(index) | {"scheduler": ["diffusers", config["_class_name"]]})


# what the family's ``load`` has put there


def _vae(components: Components) -> Vae:
    return cast(Vae, components.vae)


def _place(components: Components) -> Place:
    return cast(Place, components.source)
