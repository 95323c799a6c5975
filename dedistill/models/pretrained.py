"""Networks and tokenizers of transformers and diffusers from a folder: whole or refused, and never code of the folder's."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from dedistill.errors import UserError, amount, is_out_of_memory
from dedistill.io.json_files import read_object
from dedistill.io.safetensors import extremes
from dedistill.io.weights import count_numbers, empty_tensor, open_weights, refuse_other_kinds, some_rows

if TYPE_CHECKING:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

Net = TypeVar("Net", bound=nn.Module)

_WORDS = ("blue", "bird", "long", "tree")
"""Of equal length, since a tokenizer without a vocabulary may still count letters."""
_VOCABULARY = (
    "Fetch the folder again with all its files: a vocabulary is tokenizer.json, or vocab.json and merges.txt, or spiece.model"
)

POINTER = 1024
"""Bytes below which a file holds no weights."""


def refuse_pointers(folder: Path) -> None:
    """Raises UserError for what was put in the place of weights, such as a Git LFS pointer. Asked first of all, since a cache
    would take it for another model's; weights themselves are looked at only where something is to be encoded."""
    for file in folder.glob("*.safetensors"):
        if file.stat().st_size < POINTER:
            open_weights(file, "model.path")


def load_whole(kind: type[Net], folder: Path, source: str, *, needed: str = "", **options: Any) -> Net:
    """The network of class ``kind`` in ``folder``, every tensor of it from there; weights are read as safetensors only.

    The libraries themselves fill what is missing with random numbers, or leave it without memory, and go on.
    source: where the folder was named, e.g. a recipe's key; messages begin with it. needed: what the folder has to be.
    options: more for ``kind.from_pretrained``, such as the dtype.
    Raises UserError naming the tensors that are missing, unknown or of another shape, or why nothing can be read, and as
    :func:`check_folder` does.
    """
    check_folder(folder, source)
    needed = needed or f"a folder of {kind.__name__}: config.json and its weights as safetensors"
    if hasattr(kind, "from_config"):  # diffusers makes room for all that config.json describes before it looks at the files
        _check_room(kind, folder, source)
    with reading(f"{source}: '{folder}' cannot be loaded; it must be {needed}"):
        loader: Any = kind  # from_pretrained is of both libraries' models, and of no common class
        denoiser, info = loader.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    # of shards diffusers looks at the index alone: what a file then lacks stays without memory
    without_memory = {name for name, tensor in denoiser.state_dict().items() if tensor.is_meta}
    _check_complete(denoiser, info, folder, source, needed, without_memory)
    check_finite(denoiser.state_dict(), f"{source}: '{folder}'")
    return denoiser


def by_headers(kind: type[Net], folder: Path, source: str, **options: Any) -> Net:
    """``load_whole`` of a network of transformers, but for most numbers: it is empty, and of its files are read headers and
    three rows of each tensor.

    Raises UserError as that does, where names, shapes and these rows tell it.
    """
    check_folder(folder, source)
    needed = f"a folder of {kind.__name__}: config.json and its weights as safetensors"
    files = [open_weights(file, source) for file in _files_of(folder, source)]
    tensors = {name: empty_tensor(file, name) for file in files for name in file.keys()}  # noqa: SIM118
    with reading(f"{source}: '{folder}' cannot be loaded; it must be {needed}"):
        if not tensors:
            raise FileNotFoundError(f"no {STEM}.safetensors")
        loader: Any = kind
        config = loader.config_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        empty, info = loader.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
    _check_complete(empty, info, folder, source, needed, set())
    check_finite({name: rows for file in files for name, rows in some_rows(file)}, f"{source}: '{folder}'")
    return empty


def _check_room(kind: type[nn.Module], folder: Path, source: str) -> None:
    """Raises UserError for a config.json of a network many times as large as the files beside it."""
    config = read_object(folder / "config.json", source)
    wanted = sum(p.numel() for p in without_weights(kind, config, f"{source}: '{folder}'").parameters())
    held = sum(map(count_numbers, folder.glob("*.safetensors")))
    if held and wanted > MOST_LARGER * held:
        raise UserError(
            f"{source}: config.json in '{folder}' describes a network of {wanted:,} numbers, and its files hold {held:,}; "
            "fetch the folder again"
        )


MOST_LARGER = 4
"""A network of more than so many times the numbers of its files is not theirs."""
STEM = "model"
"""What transformers calls a network's file."""


def _files_of(folder: Path, source: str) -> list[Path]:
    """The files that transformers takes: of this name, else those of the index. Others beside them do not count."""
    if (whole := folder / f"{STEM}.safetensors").exists():
        return [whole]
    index = folder / f"{STEM}.safetensors.index.json"
    named = read_object(index, source).get("weight_map") if index.exists() else {}
    return [folder / name for name in sorted({*named.values()})] if isinstance(named, dict) else []


def _check_complete(
    network: nn.Module, info: Mapping[str, Any], folder: Path, source: str, needed: str, without_memory: set[str]
) -> None:
    """Raises UserError where ``info`` of a loader tells of tensors that are missing, unknown, or of another shape."""
    shapes = {name: f"{name} {tuple(found)} for {tuple(own)}" for name, found, own in info["mismatched_keys"]}
    missing = {*info["missing_keys"], *without_memory} - shapes.keys()
    # parts of a larger model may lie beside, as a decoder beside its encoder, but nothing more within the network's own
    unknown = [name for name in info["unexpected_keys"] if missing or hasattr(network, name.split(".")[0])]
    faults = {"missing": missing, "of another shape": shapes.values(), "unknown": unknown}
    if problems := [
        f"{amount(len(names), 'tensor is', 'tensors are')} {what}: {_some(sorted(names))}"
        for what, names in faults.items()
        if names
    ]:
        files = _some(sorted(file.name for file in folder.glob("*.safetensors")))
        raise UserError(
            f"{source}: the weights in '{folder}' ({files}) are not those of the {type(network).__name__} that its config.json "
            f"describes. {'; '.join(problems)}. Fetch the folder again; it must be {needed}"
        )


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError, naming ``source`` and a tensor, for weights that hold NaN or Inf, or whose matrices are mostly zero.

    Of zeros are files whose download broke off after their room on the disk was taken. A matrix of zeros alone is none:
    networks are given some on purpose.
    """
    matrices = empty = 0
    example = ""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        low, high = extremes(tensor)
        if not math.isfinite(low - high):
            raise UserError(f"{source}: tensor '{name}' holds numbers that are not finite (NaN or Inf): the file is damaged")
        if tensor.ndim > 1:
            matrices += 1
            if low == high == 0:
                empty, example = empty + 1, example or name
    if empty > matrices / 4:
        raise UserError(
            f"{source}: {empty} of its {matrices} matrices are zero throughout, e.g. '{example}': the file was not downloaded "
            "to its end; fetch it again"
        )


DEEPEST = 1000
"""Blocks of one kind in a network. Published ones have tens."""


def without_weights(kind: type[Net], config: dict[str, Any], source: str) -> Net:
    """A network of class ``kind`` on the meta device, as ``config`` describes it. Raises UserError where it describes none."""
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    refuse_deep(own, source)
    with reading(f"{source}: config.json does not describe a {kind.__name__}"), torch.device("meta"):
        maker: Any = kind  # as above
        return maker.from_config(own)


def refuse_deep(config: Mapping[str, Any], source: str) -> None:
    """Raises UserError for a config, or one in it, of more blocks than DEEPEST: to make them takes without end."""
    for key, value in config.items():
        if isinstance(value, dict):
            refuse_deep(value, source)
        counts = value if isinstance(value, list) else [value]
        if "layers" in key and (deep := [n for n in counts if isinstance(n, int) and n > DEEPEST]):
            raise UserError(f"{source}: config.json has {key} = {deep[0]:,}; at most {DEEPEST:,} are taken")


def load_tokenizer(
    kind: "type[AutoTokenizer | PreTrainedTokenizerBase]", folder: Path, source: str
) -> "PreTrainedTokenizerBase":
    """The tokenizer in ``folder``, of the class ``kind`` or of what AutoTokenizer finds. source: as for :func:`load_whole`.

    Raises UserError when none can be read or it knows no words, and as :func:`check_folder` does.
    """
    check_folder(folder, source)
    with reading(f"{source}: no tokenizer can be read from '{folder}'"):
        tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        encoded = tokenizer(list(_WORDS))["input_ids"]
    if len(set(map(tuple, encoded))) == 1:  # without its vocabulary's files it is made of the special tokens alone
        raise UserError(
            f"{source}: the tokenizer in '{folder}' has {len(tokenizer)} entries and gives '{_WORDS[0]}' and '{_WORDS[1]}' "
            f"the same tokens: its vocabulary is missing. {_VOCABULARY}"
        )
    return tokenizer


def check_vocabulary(
    tokenizer: "PreTrainedTokenizerBase", entries: int, folder: Path, source: str, *, padded: bool = False
) -> None:
    """Raises UserError when ``tokenizer``, from ``folder``, is not that of a text encoder with a table of ``entries``.

    padded: the table may be up to 1 % longer, as tables are whose length is rounded up.
    """
    if not (0.99 if padded else 1) * entries <= len(tokenizer) <= entries:
        raise UserError(
            f"{source}: '{folder}' holds a tokenizer of {len(tokenizer)} entries for a text encoder of {entries}. {_VOCABULARY}"
        )
    if tokenizer.pad_token is None:
        raise UserError(f"{source}: the tokenizer in '{folder}' has no 'pad_token'; tokenizer_config.json must name one")


@torch.no_grad()
def check_told_apart(tokenizer: "PreTrainedTokenizerBase", network: nn.Module, folder: Path, source: str) -> None:
    """Raises UserError for a text encoder, from ``folder``, that makes the same of different words."""
    ids = tokenizer(list(_WORDS), padding=True, return_tensors="pt").input_ids
    states = network(ids.to(next(network.parameters()).device))[0].float()
    if (states - states[:1]).abs().max() <= 1e-4 * states.abs().max():
        raise UserError(
            f"{source}: what '{folder}' makes of '{_WORDS[0]}' and '{_WORDS[1]}' is the same: its weights tell no words apart. "
            "Fetch the folder again"
        )


def check_folder(folder: Path, source: str) -> None:
    """Raises UserError where the loaders would run code of the folder's, ask for it, or take weights from elsewhere, and where
    there are none but pickles and the like.

    At a terminal transformers asks whether to run such code, and without one it advises to trust it.
    """
    for file in sorted(folder.glob("*config.json")):
        config = read_object(file, source)
        refuse_deep(config, f"{source}: '{folder}'")
        if "auto_map" in config:
            raise UserError(
                f"{source}: '{folder}' comes with code of its own ('auto_map' in {file.name}). A model with code of its own "
                "is not loaded; take one of a class that is part of transformers or diffusers"
            )
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{source}: '{folder}' holds an adapter (adapter_config.json) that would be put onto its weights; "
            "merge it into them, or keep it elsewhere"
        )
    refuse_other_kinds(folder, source)
    for index in sorted(folder.glob("*.safetensors.index.json")):
        files = read_object(index, source).get("weight_map")
        named = files.values() if isinstance(files, dict) else [files]
        # by any other extension the file is read as a pickle
        if wrong := [f for f in named if not (isinstance(f, str) and f == Path(f).name and f.endswith(".safetensors"))]:
            raise UserError(f"{source}: '{index}' names {wrong[0]!r}; weights are read from safetensors of its folder only")


@contextmanager
def reading(failed: str) -> Iterator[None]:
    """Any error of a library's loader as a UserError of one line: ``failed`` and the reason."""
    try:
        yield
    except Exception as e:  # of any kind, by what is missing or damaged
        if is_out_of_memory(e):
            raise
        raise UserError(f"{failed} ({f'{type(e).__name__}: {e}'.splitlines()[0]})") from e


def _some(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
