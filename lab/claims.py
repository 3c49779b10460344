"""The papers' claims, tried: which variant does what, with seeds and error bars.

    python -m lab.claims                   # every claim on the plane, about 40 minutes on two cores
    python -m lab.claims --claim 1 9         # these two
    python -m lab.claims --world scenes  # claims 6, 7, 9, 10, 14-16, 22 on the embedded teacher
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
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import data
from lab import plane
from lab.trials import WORLDS, Trial, code_version, run_trial
from support import checkpoint, cli, pictures
from support.cli import UserError

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
    probes: dict = field(default_factory=dict)  # {arm: probe}, see lab.trials.Trial

    def trials(self, more_flags=""):
        """{arm: Trial}, with the first arm's network before any iteration."""
        found = {}
        for name, flags in self.arms.items():
            found[name] = Trial(
                self.world, f"{flags} {more_flags}".strip(), self.probes.get(name, "")
            )
        first = next(iter(found.values()))
        return found | {UNTRAINED: Trial(self.world, first.flags, UNTRAINED)}


# ----------------------------------------------------------------------------- the claims

BACKWARD = "Few steps: backward simulation beats noised real data as the student's input"
CA_ALONE = (
    "CA alone: variance grows without bound; DM alone is stable but lags; both together do best"
)
SCHEDULES = "Schedules: hybrid is best, then constrained, then full, then coupled"
TOLD = (
    "Our own question: a fake score that is told which of the student's steps it sees betters four "
    "steps"
)

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
SCENE_FOUR = "--variant decoupled --schedule coupled --gan-weight 0 --student-steps 4"
SCENE_RATIO = "--variant fdistill --student-steps 4 --gan-weight 0.03 --divergence"
SCENE_METRICS = ("alignment", "single", "two", "coverage", "frechet", "deviation")

CLAIMS = (
    Claim(
        number=1,
        title="TTUR: without regression, K = 1 is unstable or worse; K = 5 repairs it",
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
        probes={YOUNG: "ratio"},
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
        title="A mean-variance KL keeps CA stable, less well than DM",
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
        number=22,
        title=TOLD,
        paper="none has it",
        arms={
            "coupled": f"{FOUR} coupled",
            "coupled, told": f"{FOUR} coupled",
            "constrained": f"{FOUR} constrained",
            "constrained, told": f"{FOUR} constrained",
            "hybrid": f"{FOUR} hybrid",
            "hybrid, told": f"{FOUR} hybrid",
        },
        metrics=("kl", "sliced", "near", "modes"),
        expected=(
            "kl: hybrid, told < hybrid",
            "kl: constrained, told < constrained",
            "kl: coupled, told < coupled",
            "kl: hybrid, told < untrained",
        ),
        probes={"coupled, told": "told", "constrained, told": "told", "hybrid, told": "told"},
    ),
    Claim(
        number=6,
        title=BACKWARD,
        paper="2405.14867: SDXL FID 19.32 against 20.66",
        world="scenes",
        arms={"backward": SCENE_FOUR, "data": f"{SCENE_FOUR} --student-input data"},
        metrics=SCENE_METRICS,
        expected=("alignment: backward > data", "frechet: backward < data"),
    ),
    Claim(
        number=7,
        title="Divergences that weigh what the student lacks cover more than reverse KL",
        paper="2502.15681: ImageNet recall .65 (reverse KL), .65 (forward KL), .66 (JS)",
        world="scenes",
        arms={
            "reverse-kl": f"{SCENE_RATIO} reverse-kl",
            "forward-kl": f"{SCENE_RATIO} forward-kl",
            "js": f"{SCENE_RATIO} js",
        },
        metrics=SCENE_METRICS,
        expected=("coverage: forward-kl > reverse-kl", "coverage: js > reverse-kl"),
    ),
    Claim(
        number=9,
        title=CA_ALONE,
        paper="2511.22677",
        world="scenes",
        arms={
            "CA alone": f"{SCENE_FOUR} --dm-weight 0",
            "DM alone": f"{SCENE_FOUR} --ca-weight 0",
            "both": SCENE_FOUR,
        },
        metrics=(*SCENE_METRICS, "std@1", "std@4", "std@9"),
        expected=(
            "std@9: CA alone > both",
            "CA alone: std@9 > std@4",
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
            "coupled": SCENE_FOUR,
            "full": f"{SCENE_FOUR} --schedule full",
            "constrained": f"{SCENE_FOUR} --schedule constrained",
            "hybrid": f"{SCENE_FOUR} --schedule hybrid",
        },
        metrics=(*SCENE_METRICS, "saturation"),
        expected=(
            "alignment: hybrid > coupled",
            "alignment: hybrid > full",
            "alignment: hybrid > constrained",
            "frechet: hybrid < coupled",
            "frechet: constrained < coupled",
            "deviation: constrained > hybrid",
        ),
    ),
    Claim(
        number=14,
        title="CA alone changes the content of the noise levels that it sees: layout at noisy "
        "ones, detail at clean ones, where it collapses",
        paper="2511.22677, figure 4",
        world="scenes",
        arms={
            "noisiest 10 %": f"{SCENE_FOUR} --dm-weight 0 --noise-levels 0.9 1",
            "noisiest 30 %": f"{SCENE_FOUR} --dm-weight 0 --noise-levels 0.7 1",
            "all": f"{SCENE_FOUR} --dm-weight 0 --noise-levels 0 1",
            "cleanest 30 %": f"{SCENE_FOUR} --dm-weight 0 --noise-levels 0 0.3",
        },
        metrics=("low", "middle", "high", "alignment", "coverage", "deviation"),
        expected=(
            "low: noisiest 10 % > cleanest 30 %",
            "low: noisiest 10 % > all",
            "high: noisiest 10 % < cleanest 30 %",
            "alignment: cleanest 30 % < untrained",
            "coverage: cleanest 30 % < untrained",
        ),
    ),
    Claim(
        number=15,
        title="A fake score that only watches shows the artefact of CA alone; the teacher does not",
        paper="2511.22677",
        world="scenes",
        arms={"CA alone": f"{SCENE_FOUR} --dm-weight 0", "both": SCENE_FOUR},
        metrics=("std_fake", "std_teacher", "deviation"),
        expected=("CA alone: std_fake > std_teacher", "std_fake: CA alone > both"),
    ),
    Claim(
        number=16,
        title="What the directions are divided by: the paper has nothing, its ports the "
        "conditional teacher's distance, DMD2 the guided one's",
        paper="2511.22677 has none",
        world="scenes",
        arms={
            "guided": f"{SCENE_FOUR} --normaliser guided",
            "conditional": SCENE_FOUR,  # as its preset has it
            "none": f"{SCENE_FOUR} --normaliser none",
        },
        metrics=SCENE_METRICS,
        expected=("alignment: guided > none", "alignment: guided > conditional"),
    ),
    Claim(
        number=22,
        title=TOLD,
        paper="none has it",
        world="scenes",
        arms={
            "coupled": SCENE_FOUR,
            "coupled, told": SCENE_FOUR,
            "hybrid": f"{SCENE_FOUR} --schedule hybrid",
            "hybrid, told": f"{SCENE_FOUR} --schedule hybrid",
        },
        metrics=SCENE_METRICS,
        expected=(
            "alignment: hybrid, told > hybrid",
            "alignment: coupled, told > coupled",
            "frechet: hybrid, told < hybrid",
        ),
        probes={"coupled, told": "told", "hybrid, told": "told"},
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


def summary_row(claim, columns):
    """The first expectation with its difference, and the verdict on all."""
    verdicts = columns["at the best rates"]
    first = f"{claim.expected[0]}: {verdicts[0].mean:+.2g} ± {verdicts[0].half:.2g}"
    return table_row(claim.number, claim.title, claim.paper, f"**{in_words(verdicts)}**", first)


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
    more, stale = [], 0
    for claim in claims:
        trials = claim.trials(more_flags)
        arms = {name: Arm(out, trial, seeds) for name, trial in trials.items()}
        columns = verdict_columns(claim, arms)
        summary.append(summary_row(claim, columns))
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
    add("--seeds", type=cli.positive, default=SEEDS, help="of each arm (default: %(default)s)")
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
    if args.seeds != SEEDS:
        parts.append(f"seeds-{args.seeds}")
    folder = out / "-".join(parts)
    folder.mkdir(exist_ok=True)
    report(out, claims, args.seeds, more_flags, folder)


if __name__ == "__main__":
    cli.run(main)
