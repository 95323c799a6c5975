"""The tables of a recipe that say which network is trained and by which adapter."""

from typing import Annotated, Literal

from pydantic import Field

from dedistill.recipe.fields import BY_FAMILY, Auto, Count, Default, Place, Positive, Table, Whole

_RANKS = Default(16, "adapter.kind", ("lora",)), Default("full", "adapter.kind", ("lokr",))


class Architecture(Table):
    """Sizes of a network that starts from random weights."""

    channels: Positive = Field(1, description="Channels of an image.")
    height: Positive = Field(description="Image height in pixels.")
    width: Positive = Field(description="Image width in pixels.")
    patch: Positive = Field(description="Side of the square of pixels that makes one token.")
    layers: Positive = Field(description="Double-stream blocks.")
    single_layers: Positive = Field(description="Single-stream blocks.")
    heads: Positive = Field(description="Attention heads.")
    head_dim: Positive = Field(description="Width of one head; the hidden size is heads * head_dim.")
    rope_axes: list[Positive] = Field(min_length=3, max_length=3, description="Rotary widths; they add up to head_dim.")
    text_dim: Positive = Field(32, description="Width of a text token.")
    pooled_dim: Positive = Field(32, description="Width of the pooled text vector.")


class Model(Table):
    family: str = Field(description="Model family, e.g. pixel_flux.")
    path: Place | None = Field(
        None, description="Trained weights: folder, single file, or hub id. None with new: exactly one of the two is set."
    )
    revision: str | None = Field(
        None, min_length=1, description="Commit of a hub id, for which it is required. None for files."
    )
    components: Place | None = Field(
        None,
        description="Folder or hub id of text encoders and VAE, where path is a single file with the denoiser alone. "
        "None: they are in path.",
    )
    image_prompts: Place | None = Field(
        None,
        description="Folder of FLUX.1-Redux-dev: prompts may name images, as in <image:cat.jpg weight=0.5>, and training tells "
        "samples their own image. None: without.",
    )
    mask: Annotated[Literal["bool", "none", "libreflux"] | None, Default(BY_FAMILY)] = Field(
        None,
        description="bool: padding of the text is invisible to attention; none: it takes part, as FLUX was trained; "
        "libreflux: real tokens get +1 on their scores, as that model was trained.",
    )
    t5_mask: Annotated[bool | None, Default(BY_FAMILY)] = Field(
        None, description="The text encoder ignores padding too. false: as diffusers and LibreFLUX call T5, padding leaks in."
    )
    null: Annotated[Literal["empty", "zeros"] | None, Default(BY_FAMILY)] = Field(
        None,
        description="What captions are dropped to, and what guidance leads away from: empty: the encoded empty caption; zeros, "
        "as SDXL was trained. None for families that know the empty caption alone.",
    )
    prediction: Literal["auto", "epsilon", "v", "velocity", "negative_velocity"] = Field(
        "auto",
        description="What a U-Net's output is read as: epsilon, v: through the exact bridge to the straight path; velocity: "
        "noise - data, fed the sample and 1000 sigma as they are (RF-SDXL); negative_velocity: data - noise (InstaFlow). "
        "auto: as its files say.",
    )
    guidance: Annotated[Annotated[float, Field(ge=0)] | Literal["bypass"] | None, Default(BY_FAMILY)] = Field(
        None,
        description="Value fed to a distilled guidance embedding in training. bypass: train without it (Flex.1-alpha). "
        "None where the network has no such embedding. U-Nets without one get it, of zeros, for objective = 'guidance'.",
    )
    text_length: Annotated[Positive | None, Default(BY_FAMILY)] = Field(
        None, description="Tokens a caption is padded or cut to."
    )
    new: Architecture | None = Field(None, description="Sizes of a new network with random weights. None with path.")


class Base(Table):
    quant: Literal["none", "int8", "int8-quanto", "fp8"] = Field(
        "none",
        description="Storage of the frozen base: none, int8 (plain tensors, ours), int8-quanto (optimum-quanto), fp8 (e4m3, "
        "three times as coarse as int8: for matmul = fp8).",
    )
    exclude: list[str] = Field(
        default_factory=list, description="Name patterns of linears that stay unquantized; each must match at least one."
    )
    matmul: Literal["float", "int8", "fp8"] = Field(
        "float",
        description="Products with the base's weights: float: of weights made of the codes; int8, fp8: of the codes, with "
        "inputs and gradients that are quantized token by token (needs the same quant): faster on GPUs, coarser. fp8 needs a "
        "card of compute capability 8.9 or above.",
    )
    swap: Count | Auto = Field(
        0,
        description="Blocks of the frozen base that wait in the memory of the CPU and are copied to the GPU one ahead of the "
        "pass, for networks larger than the card; at least 3, two of them fit at a time. 0: none. auto: as few as the card at "
        "hand allows.",
    )


class Target(Table):
    """Linears that get an adapter of one shape. The first target that matches a name wins."""

    pattern: str | None = Field(
        None,
        description="Module name; * stands for anything within one dotted part, ** for any number of parts. None with preset.",
    )
    preset: str | None = Field(
        None, description="Named set of layers of the family, e.g. modulation, attention, mlp. None with pattern."
    )
    factor: Annotated[Annotated[Whole, Field(ge=-1)] | None, Default(4, "adapter.kind", ("lokr",))] = Field(
        None, description="LoKr: side of the small Kronecker factor; -1 is the most even split."
    )
    rank: Annotated[Positive | Literal["full"] | None, *_RANKS] = Field(
        None, description="LoRA: rank. LoKr: rank of the large factor, or full."
    )


class Adapter(Table):
    kind: Literal["lokr", "lora"] = Field(description="Kind of the adapter.")
    targets: list[Target] = Field(min_length=1, description="Which linears, in order of precedence.")
    init: Literal["default", "ones", "perturbed_normal"] = Field(
        "default",
        description="default: as LyCORIS; ones: first LoKr factor 1, second 0; perturbed_normal: first 1, second small noise "
        "with the mean and deviation of the layer's own weights.",
    )
    init_scale: Annotated[Annotated[float, Field(gt=0, le=1)] | None, Default(1e-3, "adapter.init", ("perturbed_normal",))] = (
        Field(None, description="Size of the perturbed_normal start relative to the weights.")
    )
