r"""Write a model folder, or an adapter file, in a format that other programs load.

dedistill export runs/digits/merged --format diffusers --out exports/digits
dedistill export runs/digits/dedistill/posthoc/alpha_linear_0.9.safetensors --format transformer \
    --out exports/digits-lokr.safetensors
"""

import argparse
import sys
from functools import partial

from dedistill.cli.command import command_parser, guarded, path, positive

MODELS = ("diffusers", "single", "bfl", "int8")
ADAPTERS = ("lycoris", "transformer", "peft", "kohya")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("export", __doc__)
    parser.add_argument("source", type=path, help="model folder, or adapter file (safetensors)")
    parser.add_argument(
        "--format",
        required=True,
        choices=[*MODELS, *ADAPTERS],
        help="the first four are for model folders, the others for adapter files",
    )
    parser.add_argument("--out", type=path, required=True, help="new folder; for an adapter, new file")
    parser.add_argument("--base", help="hub id of the published model behind a folder, where it does not say")
    parser.add_argument("--license", help="another licence than the base's, where the base allows that")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="int8: linears that stay unquantized")
    parser.add_argument("--shard-gb", type=positive, default=10, help="folders: largest weight file in GB")
    parser.add_argument("--model", type=path, help="adapters: folder of the base, where the file does not say")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.errors import UserError
    from dedistill.release.export import export_adapter, export_model

    if not args.source.exists():
        raise UserError(f"'{args.source}' does not exist", exit_code=2)
    if args.source.is_dir() != (args.format in MODELS):
        kind, formats = ("a model folder", MODELS) if args.source.is_dir() else ("an adapter file", ADAPTERS)
        raise UserError(f"'{args.source}' is {kind}: --format is one of {', '.join(formats)}", exit_code=2)
    say = partial(print, file=sys.stderr)
    if args.format in ADAPTERS:
        export_adapter(args.source, args.out, args.format, args.model, say)
    else:
        terms = {"base": args.base, "licence": args.license, "exclude": args.exclude}
        size = args.shard_gb * 1000**3
        export_model(args.source, args.out, args.format, shard_bytes=size, say=say, **terms)
    print(f"done: {args.out}", file=sys.stderr)
    return 0
