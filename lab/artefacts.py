"""What the meters of dedistill.evaluation.numbers see: faults are put into real images at rising strength, and counted.

Paired: what a meter says of a faulty take of an image, less what it says of the image, against the same for harmless
takes (a pixel's shift, 10 % of gain, a little brightness and noise). Unpaired: its value against those of other clean
images. Both at the threshold that 5 % of the clean ones pass. Diversity is one of groups of four images.

python -m lab.artefacts        minutes; writes lab/results/artefacts.json, the sheet and the tables of docs/artefacts.md
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import binomtest

from dedistill.data.digits import load_digits, load_mnist
from dedistill.errors import amount
from dedistill.evaluation.numbers import diversity
from dedistill.flow import keyed
from dedistill.sampling.images import contact_sheet
from lab.artefact_faults import COLLAPSES, DIVERSITY_RIVALS, FAULTS, METERS, RIVALS, handwritten, harmless, photographs

FALSE_ALARMS = 0.05
TAKES = 3
"""Harmless takes of each image."""
RESAMPLES = 1000
GROUPS, GROUP = 20, 4
RESULTS = Path(__file__).parent / "results" / "artefacts.json"
PAGE = Path(__file__).parent.parent / "docs" / "artefacts.md"
SHEET = PAGE.parent / "images" / "artefacts.png"
START, END = "<!-- tables: python -m lab.artefacts -->\n", "<!-- /tables -->\n"
"""Between these the page's tables are written."""

Images = np.ndarray
Meters = dict[str, Callable[[Images], np.ndarray]]


def image_sets() -> dict[str, tuple[Images, np.ndarray]]:
    """Images [N, C, H, W] and what they show [N]; crops of 256 pixels overlap, so their intervals are too narrow."""
    found = {f"photographs, {side} px": photographs(side, stride) for side, stride in ((64, 64), (256, 85))}
    return {
        "MNIST, 32 px": handwritten(load_mnist(None, 0.0), 100),
        "digits, 8 px": handwritten(load_digits(0.0), 100),
        **{name: (x, np.arange(len(x)) * 2 // len(x)) for name, x in found.items()},
    }


def above(clean: np.ndarray, faulty: np.ndarray) -> np.ndarray:
    """How often each faulty value [N] is above each image's clean takes [T, N], ties half: [N, N]; its mean is the AUC."""
    return ((faulty[None, :, None] > clean[:, None]) + 0.5 * (faulty[None, :, None] == clean[:, None])).mean(0)


def judged(clean: np.ndarray, faulty: np.ndarray, *, folds: bool) -> dict:
    """AUC and share seen with 95 % intervals, of clean [T, N] and faulty [N]; folds: thresholds from the other half."""
    n, wins = len(faulty), above(clean, faulty)
    weights = keyed.generator(0, "artefacts/bootstrap", n).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    draws = ((weights @ wins) * weights).sum(1)
    halves = [np.arange(n) % 2 == k for k in (0, 1)] if folds else [np.ones(n, bool)]
    seen = sum((faulty[h] > np.quantile(clean[:, ~h if folds else h], 1 - FALSE_ALARMS)).sum() for h in halves)
    wilson = binomtest(int(seen), n).proportion_ci(method="wilson")
    rounded = [round(float(v), 3) for v in (wins.mean(), *np.percentile(draws, [2.5, 97.5]))]
    return {"auc": rounded, "seen": [round(float(v), 3) for v in (seen / n, wilson.low, wilson.high)]}


def curves(
    take: Callable[[np.random.Generator | None], Images],
    apply: Callable[[Images, float, np.random.Generator], Images],
    strengths: tuple[float, ...],
    meters: Meters,
    seed: int = 0,
) -> dict[str, list[dict]]:
    """By meter, a row per strength. take: of a generator another take of the images, of None the images themselves."""
    rng = keyed.generator(seed, "artefacts")
    read = lambda x: {name: meter(x.clip(-1, 1)) for name, meter in meters.items()}  # noqa: E731
    own, harmless_takes = read(take(None)), [read(take(rng)) for _ in range(TAKES)]
    clean = {name: np.stack([r[name] for r in harmless_takes]) for name in meters}
    rows: dict[str, list[dict]] = {name: [] for name in meters}
    for strength in strengths:
        faulty = read(apply(take(rng), strength, rng))
        for name in meters:
            paired = judged(clean[name] - own[name], faulty[name] - own[name], folds=False)
            unpaired = judged(clean[name], faulty[name], folds=True)
            rows[name].append({"strength": strength, "paired": paired, "unpaired": unpaired})
    return rows


def of_images(x: Images) -> Callable[[np.random.Generator | None], Images]:
    return lambda rng: x if rng is None else harmless(x, rng)


def of_groups(x: Images, shows: np.ndarray) -> Callable[[np.random.Generator | None], Images]:
    """[S, P, C, H, W]: groups of images that show the same, in place of one prompt's seeds."""
    rng = keyed.generator(0, "artefacts/groups")
    labels = rng.choice(np.unique(shows), GROUPS)
    picks = np.stack([rng.choice(np.flatnonzero(shows == label), GROUP, replace=False) for label in labels], 1)
    groups = x[picks]
    return lambda rng: groups if rng is None else harmless(groups.reshape(-1, *x.shape[1:]), rng).reshape(groups.shape)


def of_set(x: Images, shows: np.ndarray) -> dict:
    """Curves of each fault by its meter and the rival formulas, and what every meter says of every fault at one strength."""
    fits = {name: meter for name, meter in METERS.items() if x.shape[1] == 3 or name != "colour"}
    found, cross = {}, {}
    for name, fault in FAULTS.items():
        if name == "colour" and name not in fits:
            continue
        if name in METERS:
            meters = {name: METERS[name]} | RIVALS[name]
            found[name] = curves(of_images(x), fault.apply, fault.strengths, meters)
        rows = curves(of_images(x), fault.apply, (fault.cross,), fits)
        cross[name] = {meter: row[0]["paired"] for meter, row in rows.items()}
    groups = of_groups(x, shows)
    meters = {"diversity": lambda g: -_diversity(g)} | {k: lambda g, f=f: -f(g) for k, f in DIVERSITY_RIVALS.items()}
    for name, (apply, strengths) in COLLAPSES.items():
        found[f"collapse, {name}"] = curves(groups, lambda g, s, rng, a=apply: a(g, s), strengths, meters)
    for name, fault in FAULTS.items():
        if name in cross:
            flat = lambda g, s, rng, f=fault: f.apply(g.reshape(-1, *g.shape[2:]), s, rng).reshape(g.shape)  # noqa: E731
            rows = curves(groups, flat, (fault.cross,), {"diversity": meters["diversity"]})
            cross[name]["diversity"] = rows["diversity"][0]["paired"]
    return {"images": len(x), "curves": found, "cross": cross}


def _diversity(groups: Images) -> np.ndarray:
    import torch

    return diversity(torch.from_numpy(groups))


def tables(results: dict) -> str:
    """Markdown: how much of each fault its meter sees, strength by strength, and the table of meters against faults."""
    lines, sets = [], results["sets"]
    for fault in ("blur", "shadow", "clipped", "colour", "collapse, mixed", "collapse, copied"):
        meter = fault if fault in METERS else "diversity"
        curves = {name: s["curves"][fault][meter] for name, s in sets.items() if fault in s["curves"]}
        strengths = [row["strength"] for row in next(iter(curves.values()))]
        says = FAULTS[fault].says if fault in FAULTS else f"seeds {fault.split()[1]}, share"
        lines += [f"| {meter}: {says} | " + " | ".join(f"{s:g}" for s in strengths) + " |", "|---" * (len(strengths) + 1) + "|"]
        for kind in ("paired", "unpaired"):
            lines += [
                f"| {name}, {kind} | " + " | ".join(f"{row[kind]['seen'][0]:.0%}" for row in rows) + " |"
                for name, rows in curves.items()
            ]
        lines.append("")
    meters = [*METERS, "diversity"]
    lines += ["| fault | images | " + " | ".join(meters) + " |", "|---" * (len(meters) + 2) + "|"]
    for name, s in sets.items():
        for fault, cross in s["cross"].items():
            seen = (f"{cross[m]['seen'][0]:.0%}" if m in cross else "" for m in meters)
            lines.append(f"| {fault} {FAULTS[fault].cross:g} | {name} | " + " | ".join(seen) + " |")
    return "\n".join(lines) + "\n"


def sheet(sets: dict[str, tuple[Images, np.ndarray]]) -> Image.Image:
    """Some images with each fault at the strengths of the cross table."""
    shown = {"clean": None, **{f"{name} {FAULTS[name].cross:g}": FAULTS[name] for name in METERS}}
    rows = []
    for name, (x, _) in sets.items():
        for i in (len(x) // 4, 3 * len(x) // 4):
            x1, line = x[i : i + 1], []
            for k, fault in enumerate(shown.values()):
                y = x1 if fault is None else fault.apply(x1, fault.cross, keyed.generator(k, "artefacts/sheet", i))
                y = ((y[0].clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
                image = Image.fromarray(y.squeeze(-1) if y.shape[2] == 1 else y)
                scale = max(1, 128 // image.height)
                size = (128 * image.width // image.height, 128) if scale == 1 else (image.width * scale, image.height * scale)
                line.append(image.resize(size, Image.Resampling.BOX if scale == 1 else Image.Resampling.NEAREST))
            rows.append((name, line))
    return contact_sheet(rows, list(shown), title="Faults as they are injected", scale=1)


def main() -> None:
    sets = image_sets()
    sheet(sets).save(SHEET, optimize=True)
    results: dict = {"false_alarms": FALSE_ALARMS, "sets": {}}
    for name, chosen in sets.items():
        results["sets"][name] = of_set(*chosen)
        RESULTS.write_text(json.dumps(results) + "\n")
        print(f"{name}: {amount(len(chosen[0]), 'image')}", flush=True)
    before, after = PAGE.read_text().split(START)
    PAGE.write_text(before + START + "\n" + tables(results) + END + after.split(END)[1])


if __name__ == "__main__":
    main()
