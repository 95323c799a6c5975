"""The whole story on real digits: teacher, 4-step student, de-distilled student, post-hoc averages, CFG sweeps, report.

dedistill demo          # 8x8 digits of scikit-learn, under 5 minutes on 2 cores
dedistill demo mnist    # 28x28 digits of MNIST, under 30 minutes
"""

from pathlib import Path

from dedistill.cli.chain import running
from dedistill.cli.command import command_parser, guarded
from dedistill.errors import UserError, amount
from dedistill.recipe import load_recipe
from dedistill.recipe.chain import load_chain
from dedistill.recipe.shipped import PREFIX

PROMPTS = {"digits": 256, "mnist": 192}
"""Story -> prompts of its report. The rest of it is a chain that comes with the package."""
CFGS, STEPS = [1, 2, 3, 4, 5, 6, 7, 8], 16


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("demo", __doc__)
    parser.add_argument("story", nargs="?", choices=PROMPTS, default="digits", help="which digits")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args.story), debug=args.debug)


def run(name: str) -> int:
    """Tell a story into ``runs/NAME`` of the working directory; what is finished is reused."""
    chain = load_chain(f"{PREFIX}{name}")
    with running(chain, [chain.words(stage, chain.scale) for stage in chain.stages], f"dedistill demo {name}") as jobs:
        print("report", flush=True)
        failed = _report(name, chain.out / "report")
        jobs.finish()
    print(f"averages: {chain.out / 'dedistill' / 'sweep' / 'index.html'}")
    if failed:
        raise UserError("\n".join([f"{amount(len(failed), 'claim does', 'claims do')} not hold:", *failed]))
    return 0


def _report(name: str, out: Path) -> list[str]:
    """Write the story's page and print its table; returns the claims that do not hold."""
    from dedistill.report.story import tell

    stages = {"teacher": "teacher", "student": "student", "dedistilled": "dedistill"}
    loaded = {title: load_recipe(f"{PREFIX}{name}/{recipe}") for title, recipe in stages.items()}
    checks = tell(loaded, out, cfgs=CFGS, prompts=PROMPTS[name], steps=STEPS, commands=[f"dedistill demo {name}"])
    print(f"\nreport: {out / 'index.html'}", flush=True)
    return [f"  {check['text']}: {check['value']} ({check['bound']})" for check in checks if not check["ok"]]
