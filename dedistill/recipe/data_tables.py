"""The tables of a recipe that say what is trained on."""

from typing import Annotated, Literal

from pydantic import Field

from dedistill.recipe.fields import Default, Few, Place, Positive, Share, Table, Whole
from dedistill.recipe.objectives import DROPOUTS

_OF_IMAGES = ("data.source", ("pictures",))


class ImageSet(Table):
    """Captioned images in one place."""

    path: Place = Field(description="Folder of images, folder of tar shards, or a table (parquet, csv, jsonl).")
    name: str | None = Field(None, min_length=1, description="What it is called in messages. None: as the folder.")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="Share of the samples, relative to the other sets.")
    captions: list[str] | None = Field(None, min_length=1, description="Fields that hold captions. None: those of usual names.")
    file_column: str | None = Field(None, min_length=1, description="Column of a table that names images. None: file_name.")
    split: str | None = Field(
        None, min_length=1, description="Split of a divided set, e.g. test, or all. None: train, if several."
    )


Resolution = Annotated[Whole, Field(ge=16, le=65_536, multiple_of=16)]


class Data(Table):
    source: Literal["digits", "mnist", "pairs", "pictures"] = Field(
        description="digits: scikit-learn's 8x8 digits, two per image; mnist: 28x28 digits padded to 32x32; "
        "pairs: stored noise and images from dedistill pairs; pictures: captioned images of your own."
    )
    path: Place | None = Field(
        None, description="pairs: folder of shards (required). mnist: folder of IDX files. None: as installed."
    )
    pairs: Place | None = Field(
        None, description="Folder of pairs to train on beside the images of source, which get any noise. None: images alone."
    )
    pairs_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Share of all samples that are of data.pairs, or of those made online, whatever their number. Required "
        "with these. None without.",
    )
    sets: list[ImageSet] = Field(default_factory=list, description="pictures: where they are, at least one.")
    cache: Place | None = Field(
        None, description="pictures: folder for encoded images and captions (required). None elsewhere."
    )
    resolutions: Annotated[list[Resolution] | None, Default([1024], *_OF_IMAGES)] = Field(
        None, min_length=1, description="pictures: sides of the squares whose area images are brought to."
    )
    crops: Annotated[list[Literal["aspect", "square", "random_aspect", "center"]] | None, Default(["aspect"], *_OF_IMAGES)] = (
        Field(None, min_length=1, description="pictures: how they are cut; several are used in turn.")
    )
    crops_per_picture: Annotated[Few | None, Default(1, *_OF_IMAGES)] = Field(
        None, description="pictures: crops of each, per resolution."
    )
    max_upscale: Annotated[Annotated[float, Field(ge=1)] | None, Default(1.0, *_OF_IMAGES)] = Field(
        None, description="pictures: how much smaller ones may be enlarged; others are left out."
    )
    missing_captions: Annotated[Literal["error", "quarantine", "empty"] | None, Default("error", *_OF_IMAGES)] = Field(
        None, description="pictures: what becomes of an image without a caption."
    )
    split_lines: Annotated[Literal["auto", "always", "never"] | None, Default("auto", *_OF_IMAGES)] = Field(
        None, description="pictures: whether each line of a text file is a caption of its own."
    )
    limit: Positive | None = Field(None, description="pictures: only the first so many of each set, for trials. None: all.")
    held_out: Annotated[Literal["auto"] | Annotated[float, Field(ge=0, lt=1)] | None, Default("auto", *_OF_IMAGES)] = Field(
        None, description="pictures: share kept for validation; 0: none; auto: 2 %, or what 16 images take, at most a fifth."
    )
    fold: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="pictures: [k, K]: hold out the k-th of K equal parts, in a run of its own (run.out gets the fold's name), "
        "for dedistill measure --folds K. None: as held_out says.",
    )
    caption_noise: Share = Field(
        0.0, description="Share of digit words replaced at random, as in captions from the web; makes guidance matter."
    )
    caption_dropout: Annotated[Share | None, *(Default(r, "train.objective", names) for r, names in DROPOUTS.items())] = Field(
        None, description="Share of captions replaced by the empty prompt."
    )
    image_dropout: Annotated[Share | None, Default(0.1, "model.image_prompts")] = Field(
        None,
        description="pictures: share of samples that are not told their own image, beside those without caption; 1: none is.",
    )
