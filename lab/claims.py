"""The papers' claims, tried: which variant does what, with seeds and error bars.

    python -m lab.claims                   # every claim on the plane, about 40 minutes on two cores
    python -m lab.claims --claim 1 9         # these two
    python -m lab.claims --world scenes  # claims 6, 7, 9, 10, 14-16, 22 on the embedded teacher
    python -m lab.claims --list              # what is claimed, and every arm as a command

A claim of claims.ini compares arms, each a set of train.py's flags. All arms have the same budget
(iterations, batch, steps), the same sweep of the student's learning rate and the same seeds, and
the untrained network stands beside them. What the paper leads one to expect holds ("yes") or fails
("opposite") where the difference, seed by seed, is beyond Student's 95 % interval; else it is "not
resolved". That is asked with every arm at its best rate (lowest KL divergence, mean over the
seeds), and with all arms at each rate.

Finished runs are kept in --out (lab/trials.py), so an interrupted command goes on where it was. The
summary is printed; it, a table of every arm and the images are written there too, those of a part
of the claims to a folder of their own.
"""

import json
import os
import statistics
from configparser import ConfigParser, ExtendedInterpolation
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import data
from lab import plane
from lab.trials import WORLDS, Trial, code_version, draw_sheet, run_missing, run_trial
from support import checkpoint, cli

# Two-sided 5 % points of Student's t for 1, 2, ... degrees of freedom; the last for more.
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.2)
UNTRAINED = "untrained"
SEEDS = 5

# What a difference must be to matter, by which the number of seeds is chosen.
MATTERS = {
    "kl": 0.3,
    "sliced": 0.03,
    "modes": 0.05,
    "mass": 0.05,
    "near": 0.02,
    "deviation": 0.2,
    "var h": 0.2,
    "grad noise": 1.0,
    "alignment": 0.05,
    "frechet": 10.0,
    "coverage": 0.05,
    "std": 0.2,
    "low": 0.1,
    "middle": 0.1,
    "high": 0.1,
}


class Claim:
    """A section of claims.ini. arms: {name: flags}. probes: {name: what else is done in it}."""

    def __init__(self, section):
        self.world, number = section.name.split()
        self.number = int(number)
        row = {key: " ".join(text.split()) for key, text in section.items()}
        self.title, self.paper = row["title"], row["paper"]
        self.arms = named(row, "arm ")
        self.probes = named(row, "probe ")
        self.metrics = row["metrics"].split(", ")
        self.expected = section["expected"].strip().splitlines()

    def trials(self, more_flags=""):
        """{arm: Trial}, with the first arm's network before any iteration."""
        found = {}
        for name, flags in self.arms.items():
            flags = f"{flags} {more_flags}".strip()
            found[name] = Trial(self.world, flags, self.probes.get(name, ""))
        first = next(iter(found.values()))
        return found | {UNTRAINED: Trial(self.world, first.flags, UNTRAINED)}


def named(row, kind):
    """{name: text} of the keys that are of a kind."""
    return {key.removeprefix(kind): text for key, text in row.items() if key.startswith(kind)}


def read_claims():
    table = ConfigParser(delimiters=":", interpolation=ExtendedInterpolation())
    table.optionxform = str  # names keep their capitals
    table.read_string(Path(__file__).with_name("claims.ini").read_text())
    return [Claim(table[name]) for name in table.sections()]


CLAIMS = read_claims()


# ----------------------------------------------------------------------------- verdicts


class Arm:
    """An arm's finished runs. rows: {learning rate: [metrics of seed 0, 1, ...]}."""

    def __init__(self, out, trial, seeds):
        world = WORLDS[trial.world]
        self.rows, means = {}, {}
        for rate in world.learning_rates:
            files = [trial.file(out, rate, seed) for seed in range(seeds)]
            rows = [json.loads(file.read_text())["metrics"] for file in files]
            means[rate] = statistics.fmean(row[world.chosen_by] for row in rows)
            self.rows[rate] = rows
        self.best = min(means, key=means.get)


def compared(expectation, rows):
    """[(left, right) of each seed] of an expectation, its sign, and the difference that matters.
    rows: {arm: [metrics, ...]}. A metric that a run did not live to see is left out."""
    first, comparison = expectation.split(": ", 1)
    sign = "<" if " < " in comparison else ">"
    left, right = comparison.split(f" {sign} ")
    sides = ((left, first), (right, first))  # "METRIC: ARM < ARM"
    if first in rows:
        sides = ((first, left), (first, right))  # "ARM: METRIC < METRIC"
    values = []
    for arm, metric in sides:
        if arm == UNTRAINED:  # at each tenth what it is at the end
            metric = metric.split("@")[0]
        values.append([row.get(metric) for row in rows[arm]])
    pairs = [pair for pair in zip(*values) if None not in pair]
    (matters,) = {MATTERS[name] for name in MATTERS if sides[0][1].startswith(name)}
    return pairs, sign, matters


@dataclass
class Verdict:
    """An expectation, seed by seed. word: "yes", "opposite" or "not resolved"; mean and half: the
    difference and half of its 95 % interval; seeds: with how many the interval is as narrow as a
    difference that matters."""

    word: str
    mean: float = float("nan")
    half: float = float("nan")
    seeds: int | None = None

    def __str__(self):
        text = f"{self.word}, {self.mean:+.2g} ± {self.half:.2g}"
        if self.word == "not resolved" and self.seeds:
            text += f" ({self.seeds} seeds)"
        return text


def t_quantile(freedom):
    return T_QUANTILES[min(freedom, len(T_QUANTILES)) - 1]


def seeds_to_see(difference, deviation):
    """The seeds with which Student's 95 % interval is no wider than ± difference; at least 5."""
    count = 5
    while t_quantile(count - 1) * deviation / count**0.5 > difference:
        count += 1
    return count


def verdict(expectation, rows):
    """Verdict of an expectation. rows: {arm: [metrics of each seed]}"""
    pairs, sign, matters = compared(expectation, rows)
    if len(pairs) < 2:
        return Verdict("not resolved")
    differences = [left - right for left, right in pairs]
    mean, error = plane.mean_and_error(differences)
    half = t_quantile(len(pairs) - 1) * error
    seeds = seeds_to_see(matters, statistics.stdev(differences))
    word = "not resolved"
    if abs(mean) > half:
        word = "yes" if (mean < 0) == (sign == "<") else "opposite"
    return Verdict(word, mean, half, seeds)


def in_words(verdicts):
    """One word where all agree, else how many there are of each."""
    found = [verdict.word for verdict in verdicts]
    words = [word for word in ("yes", "opposite", "not resolved") if word in found]
    if len(words) == 1:
        return words[0]
    return ", ".join(f"{found.count(word)} {word}" for word in words)


# ----------------------------------------------------------------------------- the report


def cell(rows, metric):
    values = [row[metric] for row in rows if metric in row]
    if not values:
        return "-"
    mean, error = plane.mean_and_error(values)
    return f"{mean:.3g} ± {error:.2g}"


def table_row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def table_head(*cells):
    return [table_row(*cells), "|" + "---|" * len(cells)]


def verdict_columns(claim, arms):
    """{title: [verdict of each expectation]}, at the arms' best rates and at each."""
    rates = WORLDS[claim.world].learning_rates
    chosen = {"at the best rates": {name: arm.rows[arm.best] for name, arm in arms.items()}}
    for rate in rates if len(rates) > 1 else ():
        chosen[f"all at {rate}"] = {name: arm.rows[rate] for name, arm in arms.items()}
    columns = {}
    for title, rows in chosen.items():
        columns[title] = [verdict(expectation, rows) for expectation in claim.expected]
    return columns


def details(claim, arms, columns):
    """Lines: every arm at every rate, and what was expected."""
    lines = ["", f"### Claim {claim.number}: {claim.title}", ""]
    lines += table_head("arm", "rate", *claim.metrics)
    for name, arm in arms.items():
        for rate, rows in arm.rows.items():
            label = f"**{rate}**" if rate == arm.best else rate
            if name == UNTRAINED:
                label = ""
            lost = sum(row["diverged"] for row in rows)
            label += f", {lost:.0f} diverged" if lost else ""
            if name != UNTRAINED or rate == arm.best:
                lines.append(table_row(name, label, *(cell(rows, m) for m in claim.metrics)))
    lines += ["", *table_head("expected", *columns)]
    for i, expectation in enumerate(claim.expected):
        lines.append(table_row(expectation, *(verdicts[i] for verdicts in columns.values())))
    return lines


def report(out, claims, seeds, more_flags, folder):
    """Print the table of the claims; write it, the arms of each and their images to the folder."""
    first = f"first expectation: left minus right, 95 % interval of {seeds} seeds"
    summary = table_head("", "claim", "the paper", "reproduced", first)
    more, world = [], claims[0].world
    rates = WORLDS[world].learning_rates
    for claim in claims:
        trials = claim.trials(more_flags)
        arms = {name: Arm(out, trial, seeds) for name, trial in trials.items()}
        columns = verdict_columns(claim, arms)
        at_best = columns["at the best rates"]
        word = f"**{in_words(at_best)}**"
        first = f"{claim.expected[0]}: {at_best[0].mean:+.2g} ± {at_best[0].half:.2g}"
        summary.append(table_row(claim.number, claim.title, claim.paper, word, first))
        more += details(claim, arms, columns)
        images = {}
        for name, trial in trials.items():
            files = [trial.file(out, rate, 0).with_suffix(".png") for rate in rates]
            images[name] = [Image.open(file) for file in files]
        titles = [f"learning rate {rate}" for rate in rates]
        draw_sheet(images, titles, folder / f"{world}-{claim.number}.png")
    print("\n".join(summary))
    checkpoint.replace_text(folder / f"{world}.md", "\n".join(summary + more) + "\n")
    print(f"table: {folder / world}.md, images beside it")


# ----------------------------------------------------------------------------- command line


def list_claims(claims, out):
    """Every arm as a command, at the first learning rate and seed 0."""
    for claim in claims:
        world = WORLDS[claim.world]
        program = "-m lab.plane"
        if claim.world != "plane":
            program = f"train.py @recipes/{world.recipe.name}"
        print(f"{claim.number}. {claim.title} ({claim.paper})")
        for name, trial in claim.trials().items():
            if name != UNTRAINED:
                words = trial.arguments(out, world.learning_rates[0], "0")[1:]
                print(f"     {name}: python {program} {' '.join(words)} --out runs/trial")


def main(arguments=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--world", choices=WORLDS, default="plane", help="the teacher that claims are tried on")
    add("--claim", type=cli.positive, nargs="+", metavar="N", help="(default: all)")
    add("--seeds", type=cli.positive, default=SEEDS, help="of each arm (default: %(default)s)")
    add("--iterations", type=cli.positive, help="of every run, for a quick look")
    jobs = os.cpu_count()
    add("--jobs", type=cli.positive, default=jobs, help="runs at a time, one core each")
    add("--out", default="runs/laboratory", metavar="DIR")
    add("--list", action="store_true", help="print claims and arms, and run nothing")
    args = parser.parse_args(arguments)
    out = Path(args.out)
    known = {claim.number: claim for claim in CLAIMS if claim.world == args.world}
    for number in args.claim or ():
        if number not in known:
            listed = ", ".join(map(str, known))
            parser.error(f"there is no claim {number} for {args.world}; there are {listed}")
    claims = [known[number] for number in known if not args.claim or number in args.claim]
    if args.list:
        return list_claims(claims, out)
    more_flags = f"--iterations {args.iterations}" if args.iterations else ""
    checkpoint.make_writable(out / args.world)
    trials = [trial for claim in claims for trial in claim.trials(more_flags).values()]
    if any("{out}/pairs" in trial.flags for trial in trials):
        options = dict(prompts=None, count=4096, steps=50, guidance=1.0, seed=0)
        data.make_pairs(out / "pairs", options, plane.PlaneModel("gmm"))
    runs = {}
    for seed in range(args.seeds):
        for trial in trials:
            for rate in WORLDS[args.world].learning_rates:
                runs.setdefault(trial.file(out, rate, seed), (out, trial, rate, seed))
    run_missing(run_trial, runs, args.jobs)
    # A quick look, or a part of the claims, does not replace the table of all.
    parts = []
    if args.claim:
        parts.append("claims-" + "-".join(map(str, args.claim)))
    if args.iterations:
        parts.append(f"iterations-{args.iterations}")
    if args.seeds != SEEDS:
        parts.append(f"seeds-{args.seeds}")
    folder = out / "-".join(parts)
    folder.mkdir(exist_ok=True)
    report(out, claims, args.seeds, more_flags, folder)
    stale = sum(json.loads(file.read_text())["code"] != code_version() for file in runs)
    if stale:
        where = out / args.world
        print(f"note: {stale} runs are of another version of the code; delete {where} to redo")


if __name__ == "__main__":
    cli.run(main)
