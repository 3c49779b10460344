"""The papers' claims, tried: which variant does what, with seeds and error bars.

    python -m lab.claims                   # every claim on the plane, about 40 minutes on two cores
    python -m lab.claims --claim 1 9         # these two
    python -m lab.claims --world scenes  # claims 1, 6, 9, 10, 11 on the embedded teacher
    python -m lab.claims --list              # what is claimed, and every arm as a command

A claim compares arms, each a set of train.py's flags. All arms have the same budget (iterations,
batch, steps), the same sweep of the student's learning rate and the same seeds, and the untrained
network stands beside them. What the paper leads one to expect holds ("yes") or fails ("opposite")
where the difference, seed by seed, is beyond Student's 95 % interval; else it is "not resolved".
That is asked with every arm at its best rate (lowest KL divergence, mean over the seeds), and with
all arms at each rate.

Finished runs are kept in --out (lab/trials.py), so an interrupted command goes on where it was. The
summary is printed; it, a table of every arm and the images are written there too, those of a part
of the claims to a folder of their own.
"""

import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import data
from lab import plane
from lab.trials import WORLDS, Trial, code_version, run_trial
from support import checkpoint, cli, pictures
from support.cli import UserError

# Two-sided 5 % points of Student's t for 1, 2, ... degrees of freedom.
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
UNTRAINED = "untrained"


@dataclass
class Claim:
    """arms: {name: flags}. metrics: of the table, the first also of the summary. expected: what the
    paper leads one to expect, "METRIC: ARM < ARM" or "ARM: METRIC < METRIC"."""

    number: int
    title: str
    paper: str
    arms: dict
    metrics: tuple
    expected: tuple
    world: str = "plane"
    probe: str = ""

    def trials(self, more_flags=""):
        """{arm: Trial}, with the first arm's network before any iteration."""
        found = {}
        for name, flags in self.arms.items():
            found[name] = Trial(self.world, f"{flags} {more_flags}".strip(), self.probe)
        first = next(iter(found.values()))
        return found | {UNTRAINED: Trial(self.world, first.flags, UNTRAINED)}


# ----------------------------------------------------------------------------- the claims

TTUR = "TTUR: without regression, K = 1 is unstable or worse; K = 5 repairs it"
BACKWARD = "Few steps: backward simulation beats noised real data as the student's input"
CA_ALONE = (
    "CA alone: variance grows without bound; DM alone is stable but lags; both together do best"
)
SCHEDULES = "Schedules: hybrid is best, then constrained, then full, then coupled"
MEAN_VARIANCE = "A mean-variance KL keeps CA stable, less well than DM"

K1, K5 = "--fake-updates 1", "--fake-updates 5"
IMPERFECT = "--model gmm-imperfect"
GAN = f"{IMPERFECT} --gan-weight 1 --critic-weight 1"
# The GAN is there for the ratio, and hardly moves the student.
RATIO = "--variant fdistill --student-steps 1 --gan-weight 0.03 --critic-weight 1 --divergence"
GUIDED = "--variant decoupled --student-steps 1 --guidance 1.5 --schedule coupled"
FOUR = "--variant decoupled --student-steps 4 --guidance 1.5 --schedule"
YOUNG = "student after 20 updates"
RATIO_METRICS = ("var h raw", "var h binned")
RATIO_METRICS += ("grad noise raw", "grad noise binned", "grad noise both")
# At 4 steps the undistilled network already has an alignment of .8, which leaves no room: hence 1
# step, and 2 where a claim is about several.
SCENE_ONE = "--student-steps 1 --fake-updates 5"
SCENE_TWO = "--variant decoupled --gan-weight 0 --student-steps 2 --schedule"
SCENE_METRICS = ("alignment", "coverage", "frechet", "deviation")

CLAIMS = (
    Claim(
        number=1,
        title=TTUR,
        paper="2405.14867: ImageNet FID 3.48 -> 2.61",
        arms={"K = 1": K1, "K = 5": K5},
        metrics=("kl", "sliced", "modes", "mass"),
        expected=("kl: K = 5 < K = 1", "kl: K = 5 < untrained", "mass: K = 5 < K = 1"),
    ),
    Claim(
        number=2,
        title="A faster fake score's learning rate does not replace K",
        paper="2405.14867, appendix",
        arms={
            "K = 1, fake rate x 2": f"{K1} --fake-learning-rate 4e-3",
            "K = 1, fake rate x 5": f"{K1} --fake-learning-rate 1e-2",
            "K = 5": K5,
        },
        metrics=("kl", "sliced", "modes", "mass"),
        expected=(
            "kl: K = 5 < K = 1, fake rate x 2",
            "kl: K = 5 < K = 1, fake rate x 5",
            "mass: K = 5 < K = 1, fake rate x 2",
            "mass: K = 5 < K = 1, fake rate x 5",
        ),
    ),
    Claim(
        number=3,
        title="Regression stabilises DMD at K = 1",
        paper="2405.14867: ImageNet FID 2.62 with it, 3.48 without",
        arms={"K = 1": K1, "K = 1 + regression": "--variant dmd --pairs {out}/pairs"},
        metrics=("kl", "sliced", "modes", "mass"),
        expected=("kl: K = 1 + regression < K = 1", "mass: K = 1 + regression < K = 1"),
    ),
    Claim(
        number=4,
        title="With an imperfect teacher, the GAN brings the student closer to the data than the "
        "teacher is",
        paper="2405.14867: ImageNet FID 1.51 with it, 2.61 without",
        arms={"no GAN": IMPERFECT, "GAN": GAN},
        metrics=("sliced_data", "kl_data", "sliced_teacher_data", "kl_teacher_data"),
        expected=("GAN: sliced_data < sliced_teacher_data", "sliced_data: GAN < no GAN"),
    ),
    Claim(
        number=5,
        title="GAN alone is worse than both together",
        paper="2405.14867: ImageNet FID 2.56 alone, 1.51 both; SDXL FID 13.77 alone, 19.32 both, "
        "but patch FID 27.96 alone, 20.86 both",
        arms={
            "no GAN": IMPERFECT,
            "GAN": GAN,
            "GAN alone": f"{GAN} --dm-weight 0 --ca-weight 0",
        },
        metrics=("kl_data", "sliced_data", "mass"),
        expected=("kl_data: GAN < GAN alone", "sliced_data: GAN < GAN alone"),
    ),
    Claim(
        number=6,
        title=BACKWARD,
        paper="2405.14867: SDXL FID 19.32 against 20.66",
        arms={"backward": "--student-steps 4", "data": "--student-steps 4 --student-input data"},
        metrics=("kl", "sliced", "mass"),
        expected=(
            "kl: backward < data",
            "kl: backward < untrained",
            "sliced: backward < data",
            "sliced: backward < untrained",
        ),
    ),
    Claim(
        number=7,
        title="Forward KL, Jeffreys and JS cover more modes than reverse KL, without guidance",
        paper="2502.15681: ImageNet recall .65 (reverse KL), .65 (forward KL), .66 (JS)",
        arms={
            "reverse-kl": f"{RATIO} reverse-kl",
            "forward-kl": f"{RATIO} forward-kl",
            "jeffreys": f"{RATIO} jeffreys",
            "js": f"{RATIO} js",
        },
        metrics=("modes@0", "modes@1", "modes", "mass", "kl"),
        expected=(
            "modes@1: forward-kl > reverse-kl",
            "modes@1: jeffreys > reverse-kl",
            "modes@1: js > reverse-kl",
            "mass: forward-kl < reverse-kl",
            "mass: jeffreys < reverse-kl",
            "mass: js < reverse-kl",
        ),
    ),
    Claim(
        number=8,
        title="The weight h varies most for forward KL and Jeffreys, little for JS; normalising "
        "the ratio in its time bin lowers it",
        paper="2502.15681, figure 4",
        arms={YOUNG: f"{RATIO} reverse-kl --iterations 100"},
        metrics=tuple(
            f"{metric} {name}"
            for name in ("forward-kl", "jeffreys", "js")
            for metric in RATIO_METRICS
        ),
        expected=(
            f"{YOUNG}: var h binned js < var h binned forward-kl",
            f"{YOUNG}: var h binned js < var h binned jeffreys",
            f"{YOUNG}: var h binned forward-kl < var h raw forward-kl",
            f"{YOUNG}: grad noise binned js < grad noise binned forward-kl",
            f"{YOUNG}: grad noise both forward-kl < grad noise binned forward-kl",
        ),
        probe="ratio",
    ),
    Claim(
        number=9,
        title=CA_ALONE,
        paper="2511.22677",
        arms={
            "CA alone": f"{GUIDED} --dm-weight 0",
            "DM alone": f"{GUIDED} --ca-weight 0",
            "both": GUIDED,
        },
        metrics=("kl", "kl@0", "near@0", "near", "deviation@0", "deviation@4", "deviation"),
        expected=(
            "CA alone: deviation > deviation@4",
            "deviation: CA alone > both",
            "kl: both < CA alone",
            "kl: both < DM alone",
            "kl: both < untrained",
        ),
    ),
    Claim(
        number=10,
        title=SCHEDULES,
        paper="2511.22677: HPSv2.1 32.29, 31.71, 30.69, 30.61",
        arms={
            "coupled": f"{FOUR} coupled",
            "full": f"{FOUR} full",
            "constrained": f"{FOUR} constrained",
            "hybrid": f"{FOUR} hybrid",
        },
        metrics=("kl", "sliced", "near", "modes"),
        expected=(
            "kl: hybrid < constrained",
            "kl: hybrid < untrained",
            "kl: constrained < full",
            "kl: full < coupled",
            "near: constrained > coupled",
            "near: hybrid > coupled",
        ),
    ),
    Claim(
        number=11,
        title=MEAN_VARIANCE,
        paper="2511.22677",
        arms={
            "CA alone": f"{GUIDED} --dm-weight 0",
            "CA + mean-variance": f"{GUIDED} --dm-weight 0 --mean-variance-weight 1",
            "CA + a tenth of it": f"{GUIDED} --dm-weight 0 --mean-variance-weight 0.1",
            "CA + DM": GUIDED,
        },
        metrics=("kl", "deviation", "near", "modes"),
        expected=(
            "deviation: CA + mean-variance < CA alone",
            "kl: CA + mean-variance < untrained",
            "kl: CA + DM < CA + mean-variance",
        ),
    ),
    Claim(
        number=12,
        title="DM alone goes to the unguided teacher, CA carries the guidance",
        paper="reported of 2511.22677 by later work",
        arms={"DM alone": f"{GUIDED} --ca-weight 0", "both": GUIDED},
        metrics=("sliced", "sliced_unguided"),
        expected=(
            "DM alone: sliced_unguided < sliced",
            "both: sliced < sliced_unguided",
            "sliced_unguided: DM alone < untrained",
            "sliced: both < untrained",
        ),
    ),
    Claim(
        number=13,
        title="The first half of claim 9, with four steps, where the untrained network is near its "
        "target: CA alone works at first",
        paper="2511.22677",
        arms={
            "both": f"{FOUR} coupled",
            "CA alone": f"{FOUR} coupled --dm-weight 0",
            "DM alone": f"{FOUR} coupled --ca-weight 0",
        },
        metrics=("kl@0", "near@0", "deviation@0", "kl", "deviation"),
        expected=(
            "kl@0: CA alone < DM alone",
            "kl@0: CA alone < both",
            "kl@0: CA alone < untrained",
        ),
    ),
    Claim(
        number=17,
        title="IDA: a fake score that is pulled towards the student keeps K = 1 stable",
        paper="2506.00523: with it alone DMD converges on SD3.5",
        arms={"K = 1": K1, "K = 1 + IDA": f"{K1} --ida 0.97", "K = 5": K5},
        metrics=("kl", "sliced", "modes", "mass"),
        expected=(
            "kl: K = 1 + IDA < K = 1",
            "mass: K = 1 + IDA < K = 1",
            "kl: K = 1 + IDA < untrained",
        ),
    ),
    Claim(
        number=18,
        title="A student that is trained at random timesteps is better at its four",
        paper="2605.06376: CDM, its first half",
        arms={
            "its four": f"{FOUR} coupled",
            "up to 8 random": f"{FOUR} coupled --random-steps 8",
        },
        metrics=("kl", "sliced", "near", "modes"),
        expected=("kl: up to 8 random < its four", "kl: up to 8 random < untrained"),
    ),
    Claim(
        number=19,
        title="R1 on the critic makes the GAN steadier",
        paper="2501.08316: for the stability of training",
        arms={"GAN": GAN, "GAN + R1": f"{GAN} --r1-weight 100"},
        metrics=("sliced_data", "kl_data", "near", "modes"),
        expected=("sliced_data: GAN + R1 < GAN", "kl_data: GAN + R1 < GAN"),
    ),
    Claim(
        number=20,
        title="The student's first step as the teacher's keeps variety",
        paper="2602.03139: DP-DMD",
        arms={
            "DM in every step": f"{FOUR} coupled",
            "first step as the teacher's": f"{FOUR} coupled --first-step-weight 0.05",
        },
        metrics=("kl", "sliced", "modes", "mass"),
        expected=(
            "mass: first step as the teacher's < DM in every step",
            "kl: first step as the teacher's < DM in every step",
        ),
    ),
    Claim(
        number=21,
        title="Matching off the student's trajectory as well betters random timesteps",
        paper="2605.06376: CDM, its second half",
        arms={
            "random steps": f"{FOUR} coupled --random-steps 8",
            "half off trajectory": f"{FOUR} coupled --random-steps 8 --off-trajectory 0.5",
        },
        metrics=("kl", "sliced", "near", "modes"),
        expected=("kl: half off trajectory < random steps", "kl: half off trajectory < untrained"),
    ),
    Claim(
        number=1,
        title=TTUR,
        paper="2405.14867: ImageNet FID 3.48 -> 2.61",
        world="scenes",
        arms={"K = 1": "--student-steps 1 --fake-updates 1", "K = 5": SCENE_ONE},
        metrics=SCENE_METRICS,
        expected=("frechet: K = 5 < K = 1", "alignment: K = 5 > K = 1"),
    ),
    Claim(
        number=6,
        title=BACKWARD,
        paper="2405.14867: SDXL FID 19.32 against 20.66",
        world="scenes",
        arms={"backward": "--student-steps 2", "data": "--student-steps 2 --student-input data"},
        metrics=SCENE_METRICS,
        expected=("frechet: backward < data", "alignment: backward > data"),
    ),
    Claim(
        number=9,
        title=CA_ALONE,
        paper="2511.22677",
        world="scenes",
        arms={
            "CA alone": f"{SCENE_ONE} --dm-weight 0",
            "DM alone": f"{SCENE_ONE} --ca-weight 0",
            "both": SCENE_ONE,
        },
        metrics=(*SCENE_METRICS, "std@1", "std@9"),
        expected=(
            "CA alone: std@9 > std@4",
            "deviation: CA alone > both",
            "alignment: both > CA alone",
            "alignment: both > DM alone",
        ),
    ),
    Claim(
        number=10,
        title=SCHEDULES,
        paper="2511.22677: HPSv2.1 32.29, 31.71, 30.69, 30.61",
        world="scenes",
        arms={
            "coupled": f"{SCENE_TWO} coupled",
            "full": f"{SCENE_TWO} full",
            "constrained": f"{SCENE_TWO} constrained",
            "hybrid": f"{SCENE_TWO} hybrid",
        },
        metrics=SCENE_METRICS,
        expected=(
            "alignment: hybrid > constrained",
            "alignment: hybrid > full",
            "alignment: hybrid > coupled",
            "frechet: hybrid < coupled",
        ),
    ),
    Claim(
        number=11,
        title=MEAN_VARIANCE,
        paper="2511.22677",
        world="scenes",
        arms={
            "CA alone": f"{SCENE_ONE} --dm-weight 0",
            "CA + mean-variance": f"{SCENE_ONE} --dm-weight 0 --mean-variance-weight 1",
            "CA + DM": SCENE_ONE,
        },
        metrics=(*SCENE_METRICS, "std@1", "std@9"),
        expected=(
            "std@9: CA + mean-variance < CA alone",
            "frechet: CA + mean-variance < untrained",
            "frechet: CA + mean-variance < CA alone",
            "frechet: CA + DM < CA + mean-variance",
            "alignment: CA + DM > CA + mean-variance",
        ),
    ),
)


# ----------------------------------------------------------------------------- verdicts


class Arm:
    """An arm's finished runs. rows: {learning rate: [metrics of seed 0, 1, ...]}."""

    def __init__(self, out, trial, seeds):
        world = WORLDS[trial.world]
        self.rows, self.stale = {}, 0
        for rate in trial.rates():
            files = [trial.file(out, rate, seed) for seed in range(seeds)]
            runs = [json.loads(file.read_text()) for file in files]
            self.rows[rate] = [run["metrics"] for run in runs]
            self.stale += sum(run["code"] != code_version() for run in runs)
        only = next(iter(self.rows.values()))
        for rate in world.learning_rates:  # the untrained network is the same at each
            self.rows.setdefault(rate, only)
        means = {}
        for rate, rows in self.rows.items():
            means[rate] = statistics.fmean(row[world.chosen_by] for row in rows)
        self.best = min(means, key=means.get)


def compared(expectation, rows):
    """[(left, right) of each seed] of an expectation, its sign. rows: {arm: [metrics, ...]}. A
    metric that a run did not live to see is left out."""
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
    return [pair for pair in zip(*values) if None not in pair], sign


def verdict(expectation, rows):
    """yes, opposite or not resolved"""
    pairs, sign = compared(expectation, rows)
    if len(pairs) < 2:
        return "not resolved"
    mean, error = plane.mean_and_error([left - right for left, right in pairs])
    if abs(mean) <= T_QUANTILES[min(len(pairs) - 2, len(T_QUANTILES) - 1)] * error:
        return "not resolved"
    return "yes" if (mean < 0) == (sign == "<") else "opposite"


def in_words(verdicts):
    """One word where all agree, else how many there are of each."""
    words = [word for word in ("yes", "opposite", "not resolved") if word in verdicts]
    if len(words) == 1:
        return words[0]
    return ", ".join(f"{verdicts.count(word)} {word}" for word in words)


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


def summary_row(claim, arms, columns):
    metric, measured = claim.metrics[0], []
    for name, arm in arms.items():
        if metric in arm.rows[arm.best][0]:
            measured.append(f"{name}: {cell(arm.rows[arm.best], metric)}")
    world = "" if claim.world == "plane" else f" --world {claim.world}"
    command = f"`python -m lab.claims --claim {claim.number}{world}`"
    verdicts = map(in_words, columns.values())
    measured = f"{metric} {'; '.join(measured)}"
    return table_row(claim.number, claim.title, claim.paper, measured, *verdicts, command)


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
    summary, more, stale = [], [], 0
    for claim in claims:
        trials = claim.trials(more_flags)
        arms = {name: Arm(out, trial, seeds) for name, trial in trials.items()}
        columns = verdict_columns(claim, arms)
        if not summary:
            measured = f"measured, mean ± standard error over {seeds} seeds"
            reproduced = [f"reproduced {title}" for title in columns]
            summary = table_head("", "claim", "the paper", measured, *reproduced, "command")
        summary.append(summary_row(claim, arms, columns))
        more += details(claim, arms, columns)
        stale += sum(arm.stale for arm in arms.values())
        draw_claim(out, claim, trials, folder)
    print("\n".join(summary))
    world = claims[0].world
    if stale:
        print(
            f"note: {stale} runs are of another version of the code; delete {out / world} to redo"
        )
    checkpoint.replace_text(folder / f"{world}.md", "\n".join(summary + more) + "\n")
    print(f"table: {folder / world}.md, images beside it")


def draw_claim(out, claim, trials, folder):
    """A row for each arm, a column for each learning rate: the images of seed 0."""
    left, top, rates = 180, 26, WORLDS[claim.world].learning_rates
    tiles = {}
    for j, name in enumerate(trials):
        for i, rate in enumerate(trials[name].rates()):
            tiles[i, j] = Image.open(trials[name].file(out, rate, 0).with_suffix(".png"))
    width, height = tiles[0, 0].width + 12, tiles[0, 0].height + 6
    size = (left + width * len(rates), top + height * len(trials))
    sheet = Image.new("RGB", size, "white")
    for (i, j), tile in tiles.items():
        sheet.paste(tile, (left + i * width, top + j * height))
    for i, rate in enumerate(rates):
        pictures.write_text(sheet, f"learning rate {rate}", (left + i * width, top // 2))
    for j, name in enumerate(trials):
        pictures.write_text(sheet, name, (8, top + j * height + height // 2))
    pictures.save(sheet, folder / f"{claim.world}-{claim.number}.png")


# ----------------------------------------------------------------------------- command line


def parse_arguments(arguments=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--world", choices=WORLDS, default="plane", help="the teacher that claims are tried on")
    add("--claim", type=cli.positive, nargs="+", metavar="N", help="(default: all)")
    add("--seeds", type=cli.positive, help="(default: 5; 3 for scenes)")
    add("--iterations", type=cli.positive, help="of every run, for a quick look")
    jobs = multiprocessing.cpu_count()
    add("--jobs", type=cli.positive, default=jobs, help="runs at a time, one core each")
    add("--out", default="runs/laboratory", metavar="DIR")
    add("--list", action="store_true", help="print claims and arms, and run nothing")
    args = parser.parse_args(arguments)
    known = [claim.number for claim in CLAIMS if claim.world == args.world]
    for number in args.claim or ():
        if number not in known:
            listed = ", ".join(map(str, known))
            parser.error(f"there is no claim {number} for {args.world}; there are {listed}")
    args.seeds = args.seeds or WORLDS[args.world].seeds
    return args


def list_claims(claims, out):
    """Every arm as a command, at the first learning rate and seed 0."""
    for claim in claims:
        world = WORLDS[claim.world]
        program = "-m lab.plane"
        if claim.world != "plane":
            program = f"train.py @recipes/{world.recipe.name}"
        print(f"{claim.number}. {claim.title} ({claim.paper})")
        for name in claim.arms:
            trial = claim.trials()[name]
            words = trial.arguments(out, world.learning_rates[0], "0")[1:]
            print(f"     {name}: python {program} {' '.join(words)} --out runs/trial")


def run_trials(out, trials, seeds, jobs):
    """All that have not run yet, several at a time."""
    runs = {}
    for seed in range(seeds):
        for trial in trials:
            for rate in trial.rates():
                runs[trial.file(out, rate, seed)] = (trial, rate, seed)
    todo = [run for file, run in runs.items() if not file.is_file()]
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = [pool.submit(run_trial, out, *run) for run in todo]
        with tqdm(initial=len(runs) - len(todo), total=len(runs), unit="run") as bar:
            for future in as_completed(futures):
                future.result()
                bar.update()
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        raise UserError(
            "interrupted; the finished runs are kept, and the same command goes on with the rest"
        ) from None
    pool.shutdown()


def main(arguments=None):
    args = parse_arguments(arguments)
    out = Path(args.out)
    claims = [claim for claim in CLAIMS if claim.world == args.world]
    claims = [claim for claim in claims if not args.claim or claim.number in args.claim]
    if args.list:
        return list_claims(claims, out)
    more_flags = f"--iterations {args.iterations}" if args.iterations else ""
    checkpoint.make_writable(out / args.world)
    trials = [trial for claim in claims for trial in claim.trials(more_flags).values()]
    if any("{out}/pairs" in trial.flags for trial in trials):
        options = dict(prompts=None, count=4096, steps=50, guidance=1.0, seed=0)
        data.make_pairs(out / "pairs", options, plane.PlaneModel("gmm"))
    run_trials(out, trials, args.seeds, args.jobs)
    # A quick look, or a part of the claims, does not replace the table of all.
    parts = []
    if args.claim:
        parts.append("claims-" + "-".join(map(str, args.claim)))
    if args.iterations:
        parts.append(f"iterations-{args.iterations}")
    if args.seeds != WORLDS[args.world].seeds:
        parts.append(f"seeds-{args.seeds}")
    folder = out / "-".join(parts)
    folder.mkdir(exist_ok=True)
    report(out, claims, args.seeds, more_flags, folder)


if __name__ == "__main__":
    cli.run(main)
