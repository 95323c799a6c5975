"""A UNet2DConditionModel as a family: told its noise level by its own schedule, read as a velocity, adapted, saved."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from dedistill.errors import UserError
from dedistill.flow.parameterization import Prediction, diffusion_velocity, to_velocity
from dedistill.flow.schedule import PREDICTIONS, Schedule, is_flow, schedule_of
from dedistill.io.json_files import read_object
from dedistill.models.conditioning import Conditioning, Widths
from dedistill.models.family import Components, Guidance, Output, Pass, States, Unseen
from dedistill.models.network_files import PREFIX, build, read_network, stored_config
from dedistill.models.original_names import from_original
from dedistill.models.pipeline_family import PipelineFamily
from dedistill.models.places import Place, check_folder, locate, named_path
from dedistill.models.pretrained import check_finite, without_weights
from dedistill.models.prompts import CLIP_TOKENS, encoding_pass
from dedistill.models.quantize import float_dtype
from dedistill.models.registry import imported, published
from dedistill.models.spec import ModelSpec
from dedistill.models.unet import has_scale_embedding
from dedistill.models.unet.encoders import ONE, TWO, ClipText, Null
from dedistill.models.unet.naming import LdmNames
from dedistill.models.vae import PublishedVae, Vae, vae_passes
from dedistill.recipe.model_tables import Model

CHANNELS = 4
"""Of the latents of all published ones."""
SCALE_WIDTH, SCALE_LAYER = 256, "time_embedding.cond_proj.weight"
"""Of the embedding of a guidance scale, as latent consistency models have it, and its layer, which it adds to the time's."""
FLOW: tuple[Prediction, ...] = ("velocity", "negative_velocity")
FLOW_SCHEDULER = {
    **{"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True},
    **{"num_train_timesteps": 1000},
}


class UNetFamily(PipelineFamily):
    patch = 1
    max_text_length = CLIP_TOKENS
    encoders: ClassVar[Literal[1, 2]]
    """CLIPs."""

    def added(self, text: Conditioning, noisy: Tensor, scale: int) -> dict[str, Tensor] | None:
        """What the network is told beside time and tokens. scale: pixels per latent."""
        return None

    # --- loading ---------------------------------------------------------------------------------------------------------

    def load(self, spec: Model, *, seed: int, denoiser: bool = True) -> Components:
        """``spec``: a diffusers folder, a hub id with its revision, or one file with diffusers' or the original names."""
        self._check(spec)
        place = locate(self.spec, named_path(spec), spec.revision, spec.components)
        index = place.components / "model_index.json"
        if index.exists() and read_object(index, "model.path").get("requires_aesthetics_score"):
            raise UserError(
                f"model.path: '{place.components}' is a refiner: it is told an aesthetic score in the place of a size, and "
                "goes on from images of the base; it is not trained here. Take the base",
                2,
            )
        network, new_guidance = self._network(place, empty=not denoiser, guidance=spec.guidance is not None)
        vae = Vae(place.components / "vae")
        sides = network.config.in_channels, network.config.out_channels
        if sides != (vae.channels, vae.channels):
            raise UserError(
                f"model.path: the denoiser takes {sides[0]} channels and gives {sides[1]}, and the VAE has {vae.channels}: it "
                "was made for another task, such as filling in, or for another VAE"
            )
        text = ClipText(place.components, encoders=self.encoders, null=cast(Null, spec.null))
        if text.widths.sequences != (network.config.cross_attention_dim,):
            raise UserError(
                f"model.path: the denoiser reads tokens of width {network.config.cross_attention_dim}, and the text encoders "
                f"in '{place.components}' make {text.widths.sequences[0]}: they belong to another model"
            )
        prediction = _prediction(self.spec, spec, place)
        return Components(
            network if denoiser else nn.Module(),
            text,
            (vae.channels, self.spec.resolution // vae.scale, self.spec.resolution // vae.scale),
            "none",
            vae=vae,
            text_length=CLIP_TOKENS,
            guidance=cast(float | None, spec.guidance) if denoiser else None,
            takes_guidance=spec.guidance is not None,
            new_guidance=new_guidance,
            schedule=None if prediction in FLOW else _schedule(place, prediction),
            prediction=prediction,
            source=place,
            facts={"base": {"path": spec.path, "revision": spec.revision}} | place.facts,
            notes=[*self.other_use(spec, place.facts), *self.cannot_be_saved(place.components)],
        )

    def _check(self, spec: Model) -> None:
        """Refuse keys that would have no effect, or another than they say."""
        if spec.guidance == "bypass":
            raise UserError(f"model.guidance: 'bypass' has no effect on {self.spec.name}; leave it out", 2)
        for key in ("new", "t5_mask"):
            if getattr(spec, key):
                raise UserError(f"model.{key}: has no effect on {self.spec.name}; leave it out", 2)
        if spec.mask not in ("none", None):
            raise UserError(
                f"model.mask: {self.spec.name} was trained with the padding of its {CLIP_TOKENS} tokens; 'none' is all it has",
                2,
            )
        if spec.text_length not in (CLIP_TOKENS, None):
            raise UserError(f"model.text_length: {self.spec.name} always has {CLIP_TOKENS} tokens; leave it out", 2)

    def _network(self, place: Place, *, empty: bool, guidance: bool) -> tuple[UNet2DConditionModel, bool]:
        """guidance: with an embedding of the scale, which is new, of zeros, where the files have none (True)."""
        tensors, source = read_network(place.denoiser, empty=empty), str(place.denoiser)
        if place.denoiser.is_dir():
            config = stored_config(place.denoiser)
        else:
            beside = place.components / self.spec.folder / "config.json"
            config = read_object(beside, "model.path") if beside.exists() else self.published_config(source)
            if any(name.startswith("input_blocks.") for name in tensors):
                whole = without_weights(UNet2DConditionModel, config, f"model.path: '{source}'")
                shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
                tensors = from_original(self.names, {PREFIX + name: t for name, t in tensors.items()}, shapes, source)
        if not self.spec.has(config):
            raise UserError(
                f"model.path: '{source}' is no network of {self.spec.name}: its config.json has addition_embed_type = "
                f"{config.get('addition_embed_type')} and cross_attention_dim = {config.get('cross_attention_dim')}; name its "
                "own family (model.family)"
            )
        if new := guidance and not has_scale_embedding(config):
            config |= {"time_cond_proj_dim": SCALE_WIDTH}
            like = tensors.get("conv_in.weight", torch.empty(0))
            tensors[SCALE_LAYER] = like.new_zeros(config["block_out_channels"][0], SCALE_WIDTH)
        network = build(UNet2DConditionModel, config, tensors, source)
        if not empty:
            check_finite(tensors, f"model.path: '{source}'")
        return network, new

    @property
    def names(self) -> LdmNames:
        return cast(LdmNames, imported(str(self.spec.names)))

    def published_config(self, source: str) -> dict[str, Any]:
        assert self.spec.full_config, "every family of U-Nets has one"
        return self.spec.full_config(source, False)

    def other_use(self, model: Model, facts: dict[str, Any]) -> list[str]:
        own = {"null": model.null} | ({} if model.prediction == "auto" else {"prediction": model.prediction})
        return [
            f"model.{key} = {value!r} here; '{model.path}' was trained with {facts[key]!r}"
            for key, value in own.items()
            if facts.get(key, value) != value
        ]

    def full_size(self, spec: Model) -> Components:
        self._check(spec)
        path = named_path(spec)
        check_folder(self.spec, Path(path))
        file = Path(path) / self.spec.folder / "config.json"
        config = read_object(file, "model.path") if file.exists() else self.published_config(path)
        if new_guidance := spec.guidance is not None and not has_scale_embedding(config):
            config |= {"time_cond_proj_dim": SCALE_WIDTH}
        network = without_weights(UNet2DConditionModel, config, f"model.path: '{path}'")
        around = Path(spec.components or path) / "vae"
        vae = Vae(around) if around.exists() else PublishedVae(network.config.in_channels)
        size = network.config
        # of the text encoders' widths the second's vector alone is not in the config: what is added to it is
        times = 6 * (size.addition_time_embed_dim or 0)
        vectors = {"pooled": size.projection_class_embeddings_input_dim - times} if self.encoders > 1 else {}
        side, schedule = self.spec.resolution // vae.scale, schedule_of(self.published_scheduler)
        prediction: Prediction = schedule.prediction if spec.prediction == "auto" else spec.prediction
        return Components(
            network,
            Unseen(Widths((size.cross_attention_dim,), vectors)),
            (vae.channels, side, side),
            "none",
            vae=vae,
            guidance=cast(float | None, spec.guidance),
            takes_guidance=spec.guidance is not None,
            new_guidance=new_guidance,
            schedule=None if prediction in FLOW else replace(schedule, prediction=prediction),
            prediction=prediction,
        )

    published_scheduler: ClassVar[Mapping[str, Any]] = {
        **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000},
        "prediction_type": "epsilon",
    }
    """As the scheduler_config.json of all published ones says it."""

    def passes(self, spec: Model, height: int, width: int, length: int) -> dict[str, Pass]:
        folder = Path(spec.components or named_path(spec))
        return encoding_pass(folder, ONE if self.encoders == 1 else TWO, length, hidden=True) | vae_passes(
            folder / "vae", height, width, channels=4
        )

    def write_tiny(self, spec: Model, folder: Path, image: tuple[int, int, int] | None, *, full_depth: bool) -> None:
        from dedistill.models.unet.tiny import write_tiny_unet

        write_tiny_unet(folder, self.published_config(named_path(spec)), full_depth=full_depth)

    # --- what is encoded and called --------------------------------------------------------------------------------------

    def text_facts(self, components: Components) -> dict[str, Any]:
        return {"null": _text(components).null}

    def encode_text(self, components: Components, captions: list[str], length: int) -> Conditioning:
        return _text(components)(captions, length, components.device)

    def velocity(
        self,
        components: Components,
        denoiser: nn.Module,
        noisy: Tensor,
        sigma: Tensor,
        text: Conditioning,
        guidance: Guidance = None,
    ) -> Tensor:
        if guidance is not None and not components.takes_guidance:
            raise UserError(f"this network of {self.spec.name} is fed no guidance scale; set model.guidance, or leave it out")
        schedule, dtype = components.schedule, float_dtype(components.denoiser)
        step = schedule.steps(sigma) if schedule else 1000 * sigma
        added = self.added(text, noisy, cast(Vae, components.vae).scale)
        value = components.guidance if guidance is None else guidance
        fed = None if value is None else _scale_embedding(value, noisy, components.denoiser).to(dtype)

        def predicted(sample: Tensor) -> Tensor:
            out: Tensor = denoiser(
                sample.to(dtype),
                step,
                timestep_cond=fed,
                encoder_hidden_states=text.tokens.embeds.to(dtype),  # cached text keeps its encoders' dtype
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
            return out.to(noisy.dtype)

        if schedule is None:
            return to_velocity(components.prediction or "velocity", predicted(noisy), noisy, sigma)
        return diffusion_velocity(schedule.prediction, predicted, noisy, sigma, schedule.range[1])

    def shift(self, components: Components, tokens: int) -> float:
        """The schedule of diffusion has none: the one that puts half of a sampler's steps where half of the schedule's are."""
        return components.schedule.shift if components.schedule else super().shift(components, tokens)

    def flow_scheduler(self, components: Components) -> dict[str, Any]:
        """Pipelines of Stable Diffusion cannot be sampled by a flow model's usual scheduler, but by this. None of diffusers'
        takes data - noise: then the base's stays."""
        scheduler = cast(Place, components.source).scheduler
        if components.prediction == "negative_velocity":
            return scheduler
        shift = components.sample_shift
        kept = {} if isinstance(shift, (int, float)) else {"flow_shift": self.shift(components, 1)}
        return FLOW_SCHEDULER | ({"flow_shift": float(shift)} if isinstance(shift, (int, float)) else kept)

    # --- layers ----------------------------------------------------------------------------------------------------------

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The transformer blocks, which hold most of what is kept for backward; what is between them is not the same on both
        sides. diffusers recomputes the convolutions between them as well, where all blocks are."""
        unet: UNet2DConditionModel = denoiser
        parts = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        return [block for part in parts for block in part.modules() if isinstance(block, BasicTransformerBlock)]

    passed_on = ("hidden_states",)

    def unchanged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Output:
        return cast(Tensor, args[0])

    def states(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output, text: Conditioning) -> States:
        return {"image": (args[0], cast(Tensor, output), None)}

    def presets(self, denoiser: nn.Module) -> dict[str, list[str]]:
        """blocks: the linears of the transformer blocks, which attention and mlp share out; transformers: with the layers into
        and out of them; convolutions: those of the residual blocks and between resolutions; time: where the noise level comes
        in; everything."""
        return {
            "attention": ["**.attn1.**", "**.attn2.**"],
            "cross_attention": ["**.attn2.**"],
            "mlp": ["**.ff.net.0.proj", "**.ff.net.2"],
            "blocks": ["**.transformer_blocks.*.**"],
            "transformers": ["**.attentions.*.**"],
            "convolutions": ["**.resnets.*.conv*", "**.downsamplers.*.conv", "**.upsamplers.*.conv"],
            "time": ["**.time_emb_proj"],
            "everything": ["**"],
        }


def _scale_embedding(scale: float | Tensor, noisy: Tensor, network: nn.Module) -> Tensor:
    """[B, width] of a guidance scale, or of [B], as latent consistency models (arXiv 2310.04378) and diffusers' pipelines feed
    it: sines and cosines of 1000 (scale - 1), and so of nothing at scale 1."""
    scales = torch.as_tensor(scale, dtype=torch.float32, device=noisy.device).expand(len(noisy))
    width = cast(UNet2DConditionModel, network).config.time_cond_proj_dim
    embedding: Tensor = get_timestep_embedding(1000 * (scales - 1), width, downscale_freq_shift=1)
    return embedding


def _prediction(family: ModelSpec, spec: Model, place: Place) -> Prediction:
    """What the output is read as: as the recipe says, else as our files do, as is known of the model, as its own files do."""
    base = published(family, str(spec.path), {})
    own = place.facts.get("prediction") or (base and base.prediction) or ("velocity" if is_flow(place.scheduler) else "auto")
    found = own if spec.prediction == "auto" else spec.prediction
    if found == "auto":
        return _schedule(place).prediction
    if found not in (*FLOW, *PREDICTIONS.values()):
        raise UserError(f"model.path: '{spec.path}' says that it predicts {found!r}, which is not known; fetch it again")
    return cast(Prediction, found)


def _schedule(place: Place, prediction: Prediction | None = None) -> Schedule:
    """prediction: another than the scheduler's file says."""
    if not place.scheduler:
        raise UserError(
            f"model.path: '{place.scheduler_file}' is missing, which says at what noise levels the model was trained"
        )
    if is_flow(place.scheduler):
        raise UserError(
            f"model.prediction: {prediction!r} needs the noise levels that the network was trained at, and "
            f"'{place.scheduler_file}', of a flow model, says none"
        )
    try:
        found = schedule_of(place.scheduler)
        return replace(found, prediction=prediction or found.prediction)
    except (TypeError, ValueError) as e:
        raise UserError(f"model.path: '{place.scheduler_file}': {e}") from e


def _text(components: Components) -> ClipText:
    return cast(ClipText, components.text)
