r"""Turn an image into noise that a model makes it from, and back with other prompts (RF-inversion), as one page.

dedistill invert dog.jpg --model mine.toml --prompt "a cat" "a cat in the snow" --eta 0 0.5 0.9
dedistill invert dog.jpg --model models/mine --prompt "a cat" --fast --start 0.2 --stop 0.4
"""

import argparse
import sys
from pathlib import Path

from dedistill.cli.command import (
    SOLVERS,
    add_cpu,
    add_overrides,
    broken_pipes_tolerated,
    command_parser,
    finite,
    guarded,
    guider,
    path,
    place,
    positive,
    whole,
)
from dedistill.errors import UserError, say


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("invert", __doc__)
    parser.add_argument("image", type=path, help="image file; its middle is used, at the model's size")
    parser.add_argument("--model", type=place, required=True, help="a recipe, the folder of a run, or a model folder")
    parser.add_argument("--weights", default="last", help="of a run: last, base, or the name of a file in its posthoc/")
    parser.add_argument("--prompt", nargs="+", default=[], help="what to make of it; default only to give it back")
    parser.add_argument(
        "--source", default="", help="what the image shows, told to the model while it inverts; default nothing"
    )
    parser.add_argument(
        "--null", choices=["empty", "zeros"], default="empty", help="what nothing is: the empty prompt, or zeros"
    )
    parser.add_argument("--gamma", type=finite, default=0.5, help="how straight it goes to noise; 0: as the model would")
    parser.add_argument(
        "--eta", type=finite, nargs="+", default=[0, 0.5, 0.9, 1], help="how much it is held to the image on the way back"
    )
    parser.add_argument("--start", type=finite, default=0.0, help="share of the steps that are left out, at the noisy end")
    parser.add_argument("--stop", type=finite, default=0.25, help="share of the steps after which the image holds no longer")
    parser.add_argument("--fast", action="store_true", help="a straight line to noise in place of the inversion, at no cost")
    parser.add_argument("--cfg", type=finite, default=3.0, help="guidance scale of the prompts")
    parser.add_argument("--guider", type=guider, metavar="NAME", help="default the recipe's sample.guider")
    parser.add_argument("--solver", choices=SOLVERS, help="of the way back; default the recipe's sample.solver")
    parser.add_argument("--steps", type=positive, default=28, help="steps each way")
    parser.add_argument("--seed", type=whole, default=0, help="seed of the noise that gamma leads to")
    parser.add_argument("--out", type=path, help="output folder; default inversions/IMAGE")
    add_overrides(parser)
    add_cpu(parser)
    args = parser.parse_args(argv)

    def told() -> int:
        with broken_pipes_tolerated():
            return run(args)

    return guarded(told, debug=args.debug)


def run(args: argparse.Namespace) -> int:
    if wrong := [eta for eta in args.eta if not 0 <= eta <= 1]:
        raise UserError(f"--eta {wrong[0]:g}: 0 to 1 is needed", 2)
    if not args.image.is_file():
        raise UserError(f"'{args.image}': no such image", 2)
    from dedistill.evaluation.candidates import named_candidate
    from dedistill.evaluation.edits import Edits, make_edits
    from dedistill.flow.guidance import guider_of
    from dedistill.io.ownership import claim
    from dedistill.report.inversion import write_inversion_page
    from dedistill.sampling.inversion import Inversion
    from dedistill.sampling.sampler import Sampling

    how = {key: getattr(args, key) for key in ("gamma", "start", "stop", "fast", "seed", "source", "null")}
    inversion, (candidate, sample) = Inversion(**how), named_candidate(args.model, args.weights, args.set)
    guidance = guider_of(args.guider or sample.guider, args.cfg)
    wanted = Edits(
        image=args.image,
        prompts=tuple(dict.fromkeys(args.prompt)),
        etas=tuple(sorted(set(args.eta))),
        inversion=inversion,
        sampling=Sampling(solver=args.solver or sample.solver, steps=args.steps, guidance=guidance),
    )
    out = args.out or Path("inversions") / args.image.stem
    claim(out, "inversion", "--out")
    make_edits(candidate, wanted, out, say)
    print(f"done: {write_inversion_page(out)}", file=sys.stderr)
    return 0
