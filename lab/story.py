"""Compare a teacher, its distilled student and the de-distilled student over CFG scales; write a page and summary.json.

python -m lab.story dedistill/recipes/digits --out runs/digits/report

Ends with 1 when a claim of the story does not hold, and says which.
"""

import argparse
import sys

from dedistill.cli.command import finite, guarded, path, positive


def main() -> int:
    parser = argparse.ArgumentParser("python -m lab.story", description=__doc__.splitlines()[0])
    parser.add_argument("recipes", type=path, help="folder with teacher.toml, student.toml and dedistill.toml, all finished")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of every recipe")
    parser.add_argument("--out", type=path, required=True, help="folder of the page")
    parser.add_argument(
        "--cfg", type=finite, nargs="+", default=[1, 2, 3, 4, 5, 6, 7, 8], help="guidance scales; 1, 2 and 4 are needed"
    )
    parser.add_argument("--prompts", type=positive, default=256, help="prompts per cell")
    parser.add_argument("--steps", type=positive, default=16, help="Euler steps for every stage")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from dedistill.errors import UserError, amount
    from dedistill.recipe import load_recipe
    from dedistill.report.story import tell

    if not {1, 2, 4} <= set(args.cfg):
        raise UserError("--cfg: the comparison needs the scales 1, 2 and 4", exit_code=2)
    names = {"teacher": "teacher.toml", "student": "student.toml", "dedistilled": "dedistill.toml"}
    recipes = {stage: load_recipe(args.recipes / file, args.set) for stage, file in names.items()}
    commands = [f"dedistill demo {args.recipes.name}", f"python -m lab.story {args.recipes} --out {args.out}"]
    checks = tell(recipes, args.out, cfgs=args.cfg, prompts=args.prompts, steps=args.steps, commands=commands)
    print(f"\nreport: {args.out / 'index.html'}")
    if failed := [f"  {c['text']}: {c['value']} ({c['bound']})" for c in checks if not c["ok"]]:
        raise UserError(f"{len(failed)} of {amount(len(checks), 'claim')} do not hold:\n" + "\n".join(failed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
