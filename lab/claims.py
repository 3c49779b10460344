"""The papers' claims, tried: which variant does what, with seeds and error bars.

    python -m lab.claims                     # every claim on the plane, about 40 minutes on two cores
    python -m lab.claims --claim 1 9         # these two
    python -m lab.claims --family emoji      # claims 1, 6, 9, 10, 11 on the embedded teacher, 45 minutes
    python -m lab.claims --list              # what is claimed, and the flags of every arm

A claim compares arms, each a set of train.py's flags. Every arm has the same budget (iterations, batch,
steps), the same sweep of the student's learning rate, and the same seeds, and every claim shows the
untrained network beside them. An expectation of the paper holds ("yes") or fails ("opposite") where the
difference, seed by seed, is beyond Student's 95 % interval; else it is "not resolved". That is asked with
every arm at its best rate (lowest KL divergence, mean over the seeds), and with all arms at each rate.

Every finished run is kept in --out, so an interrupted command goes on where it was, and arms that
claims share run once. The summary is printed; it, a table of every arm and the images are written to
--out (those of a part of the claims to a folder of their own).
"""

import hashlib
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import data
import eval as evaluation
import fsdp
import losses
import models
import sample
import train
from lab import plane as gmm
from support import checkpoint, cli, metrics, pictures
from support.cli import UserError
from support.judges.emoji import EmojiJudge
from support.judges.gauges import Gauges

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
BASE = {"gmm": f"@{RECIPES}/plane.args", "emoji": f"@{RECIPES}/short.args"}
LEARNING_RATES = {"gmm": ("5e-4", "2e-3"), "emoji": ("2e-4",)}
SEEDS = {"gmm": 5, "emoji": 3}
JUDGED_BY = {"gmm": "kl", "emoji": "frechet"}  # lower is better; chooses the learning rate
SAMPLES = 4096


@dataclass
class Claim:
    """arms: name -> flags. shown: figures of the table, the first also of the summary. expected: ((arm, figure), "<" or ">",
    (arm, figure)), what the paper leads one to expect. Every claim also has an arm `untrained`, its first arm's network before
    any iteration. probe: what else to measure, see distil."""

    number: int
    title: str
    paper: str
    arms: dict
    shown: tuple
    expected: list
    probe: str = ""

    def runs(self, more_flags):
        """{arm: (flags, probe)}"""
        runs = {
            name: (f"{flags} {more_flags}".strip(), self.probe) for name, flags in self.arms.items()
        }
        return runs | {"untrained": (next(iter(runs.values()))[0], "untrained")}


# ----------------------------------------------------------------------------- the claims

K1, K5 = "--fake-updates 1", "--fake-updates 5"
GAN = "--model gmm-imperfect --gan-weight 1 --critic-weight 1"
RATIO = "--variant fdistill --student-steps 1 --gan-weight 0.03 --critic-weight 1"  # the GAN is there for the ratio, hardly for the student
GUIDED = "--variant decoupled --student-steps 1 --guidance 1.5 --schedule coupled"
FOUR = "--variant decoupled --student-steps 4 --guidance 1.5 --schedule"
YOUNG = "student after 20 updates"
PAIRS = "--variant dmd --pairs {out}/pairs"


def lower(figure, better, *worse):
    return [((better, figure), "<", (arm, figure)) for arm in worse]


CLAIMS = {
    "gmm": [
        Claim(
            1,
            "TTUR: without regression, K = 1 is unstable or worse; K = 5 repairs it",
            "2405.14867: ImageNet FID 3.48 -> 2.61",
            {"K = 1": K1, "K = 5": K5},
            ("kl", "sliced", "modes", "mass"),
            lower("kl", "K = 5", "K = 1", "untrained") + lower("mass", "K = 5", "K = 1"),
        ),
        Claim(
            2,
            "A faster fake score's learning rate does not replace K",
            "2405.14867, appendix",
            {
                "K = 1, fake rate x 2": K1 + " --fake-learning-rate 4e-3",
                "K = 1, fake rate x 5": K1 + " --fake-learning-rate 1e-2",
                "K = 5": K5,
            },
            ("kl", "sliced", "modes", "mass"),
            lower("kl", "K = 5", "K = 1, fake rate x 2", "K = 1, fake rate x 5")
            + lower("mass", "K = 5", "K = 1, fake rate x 2", "K = 1, fake rate x 5"),
        ),
        Claim(
            3,
            "Regression stabilises DMD at K = 1",
            "2405.14867: ImageNet FID 2.62 with it, 3.48 without",
            {"K = 1": K1, "K = 1 + regression": PAIRS},
            ("kl", "sliced", "modes", "mass"),
            lower("kl", "K = 1 + regression", "K = 1")
            + lower("mass", "K = 1 + regression", "K = 1"),
        ),
        Claim(
            4,
            "With an imperfect teacher, the GAN brings the student closer to the data than the teacher is",
            "2405.14867: ImageNet FID 1.51 with it, 2.61 without",
            {"no GAN": "--model gmm-imperfect", "GAN": GAN},
            ("sliced_data", "kl_data", "sliced_teacher_data", "kl_teacher_data"),
            [(("GAN", "sliced_data"), "<", ("GAN", "sliced_teacher_data"))]
            + lower("sliced_data", "GAN", "no GAN"),
        ),
        Claim(
            5,
            "GAN alone is worse than both together",
            "2405.14867: ImageNet FID 2.56 alone, 1.51 both; SDXL FID 13.77 alone, 19.32 both, but patch FID 27.96 alone, 20.86 both",
            {
                "no GAN": "--model gmm-imperfect",
                "GAN": GAN,
                "GAN alone": GAN + " --dm-weight 0 --ca-weight 0",
            },
            ("kl_data", "sliced_data", "mass"),
            lower("kl_data", "GAN", "GAN alone") + lower("sliced_data", "GAN", "GAN alone"),
        ),
        Claim(
            6,
            "Few steps: backward simulation beats noised real data as the student's input",
            "2405.14867: SDXL FID 19.32 against 20.66",
            {"backward": "--student-steps 4", "data": "--student-steps 4 --student-input data"},
            ("kl", "sliced", "mass"),
            lower("kl", "backward", "data", "untrained")
            + lower("sliced", "backward", "data", "untrained"),
        ),
        Claim(
            7,
            "Forward KL, Jeffreys and JS cover more modes than reverse KL, without guidance",
            "2502.15681: ImageNet recall .65 (reverse KL), .65 (forward KL), .66 (JS)",
            {
                name: f"{RATIO} --divergence {name}"
                for name in ("reverse-kl", "forward-kl", "jeffreys", "js")
            },
            ("modes@0", "modes@1", "modes", "mass", "kl"),
            [
                ((name, "modes@1"), ">", ("reverse-kl", "modes@1"))
                for name in ("forward-kl", "jeffreys", "js")
            ]
            + [
                ((name, "mass"), "<", ("reverse-kl", "mass"))
                for name in ("forward-kl", "jeffreys", "js")
            ],
        ),
        Claim(
            8,
            "The weight h varies most for forward KL and Jeffreys, little for JS; normalising the ratio in its time bin lowers it",
            "2502.15681, figure 4",
            {YOUNG: f"{RATIO} --divergence reverse-kl --iterations 100"},
            tuple(
                f"{what} {name}"
                for name in ("forward-kl", "jeffreys", "js")
                for what in (
                    "var h raw",
                    "var h binned",
                    "grad noise raw",
                    "grad noise binned",
                    "grad noise both",
                )
            ),
            [
                ((YOUNG, "var h binned js"), "<", (YOUNG, "var h binned forward-kl")),
                ((YOUNG, "var h binned js"), "<", (YOUNG, "var h binned jeffreys")),
                ((YOUNG, "var h binned forward-kl"), "<", (YOUNG, "var h raw forward-kl")),
                ((YOUNG, "grad noise binned js"), "<", (YOUNG, "grad noise binned forward-kl")),
                (
                    (YOUNG, "grad noise both forward-kl"),
                    "<",
                    (YOUNG, "grad noise binned forward-kl"),
                ),
            ],
            probe="ratio",
        ),
        Claim(
            9,
            "CA alone: variance grows without bound; DM alone is stable but lags; both together do best",
            "2511.22677",
            {
                "CA alone": GUIDED + " --dm-weight 0",
                "DM alone": GUIDED + " --ca-weight 0",
                "both": GUIDED,
            },
            ("kl", "kl@0", "near@0", "near", "deviation@0", "deviation@4", "deviation"),
            [
                (("CA alone", "deviation"), ">", ("CA alone", "deviation@4")),
                (("CA alone", "deviation"), ">", ("both", "deviation")),
            ]
            + lower("kl", "both", "CA alone", "DM alone", "untrained"),
        ),
        Claim(
            10,
            "Schedules: hybrid is best, then constrained, then full, then coupled",
            "2511.22677: HPSv2.1 32.29, 31.71, 30.69, 30.61",
            {name: f"{FOUR} {name}" for name in ("coupled", "full", "constrained", "hybrid")},
            ("kl", "sliced", "near", "modes"),
            lower("kl", "hybrid", "constrained", "untrained")
            + lower("kl", "constrained", "full")
            + lower("kl", "full", "coupled")
            + [
                (("constrained", "near"), ">", ("coupled", "near")),
                (("hybrid", "near"), ">", ("coupled", "near")),
            ],
        ),
        Claim(
            11,
            "A mean-variance KL keeps CA stable, less well than DM",
            "2511.22677",
            {
                "CA alone": GUIDED + " --dm-weight 0",
                "CA + mean-variance": GUIDED + " --dm-weight 0 --mean-variance-weight 1",
                "CA + a tenth of it": GUIDED + " --dm-weight 0 --mean-variance-weight 0.1",
                "CA + DM": GUIDED,
            },
            ("kl", "deviation", "near", "modes"),
            lower("deviation", "CA + mean-variance", "CA alone")
            + lower("kl", "CA + mean-variance", "untrained")
            + lower("kl", "CA + DM", "CA + mean-variance"),
        ),
        Claim(
            12,
            "DM alone goes to the unguided teacher, CA carries the guidance",
            "reported of 2511.22677 by later work",
            {"DM alone": GUIDED + " --ca-weight 0", "both": GUIDED},
            ("sliced", "sliced_unguided"),
            [
                (("DM alone", "sliced_unguided"), "<", ("DM alone", "sliced")),
                (("both", "sliced"), "<", ("both", "sliced_unguided")),
                (("DM alone", "sliced_unguided"), "<", ("untrained", "sliced_unguided")),
                (("both", "sliced"), "<", ("untrained", "sliced")),
            ],
        ),
        Claim(
            13,
            "The first half of claim 9, with four steps, where the untrained network is near its target: CA alone works at first",
            "2511.22677",
            {
                "both": f"{FOUR} coupled",
                "CA alone": f"{FOUR} coupled --dm-weight 0",
                "DM alone": f"{FOUR} coupled --ca-weight 0",
            },
            ("kl@0", "near@0", "deviation@0", "kl", "deviation"),
            lower("kl@0", "CA alone", "DM alone", "both")
            + [(("CA alone", "kl@0"), "<", ("untrained", "kl"))],
        ),
    ]
}
# At 4 steps the undistilled network already has an alignment of .8, which leaves no room: hence 1 step, and 2 where a claim is about several.
EMOJI_ONE = "--student-steps 1 --fake-updates 5"
EMOJI_SCHEDULE = "--variant decoupled --gan-weight 0 --student-steps 2 --schedule"
CLAIMS["emoji"] = [
    Claim(
        1,
        "TTUR: without regression, K = 1 is unstable or worse; K = 5 repairs it",
        "2405.14867: ImageNet FID 3.48 -> 2.61",
        {"K = 1": "--student-steps 1 --fake-updates 1", "K = 5": EMOJI_ONE},
        ("alignment", "coverage", "frechet", "deviation"),
        lower("frechet", "K = 5", "K = 1")
        + [(("K = 5", "alignment"), ">", ("K = 1", "alignment"))],
    ),
    Claim(
        6,
        "Few steps: backward simulation beats noised real data as the student's input",
        "2405.14867: SDXL FID 19.32 against 20.66",
        {"backward": "--student-steps 2", "data": "--student-steps 2 --student-input data"},
        ("alignment", "coverage", "frechet", "deviation"),
        lower("frechet", "backward", "data")
        + [(("backward", "alignment"), ">", ("data", "alignment"))],
    ),
    Claim(
        9,
        "CA alone: variance grows without bound; DM alone is stable but lags; both together do best",
        "2511.22677",
        {
            "CA alone": EMOJI_ONE + " --dm-weight 0",
            "DM alone": EMOJI_ONE + " --ca-weight 0",
            "both": EMOJI_ONE,
        },
        ("alignment", "coverage", "frechet", "deviation", "std@1", "std@9"),
        [
            (("CA alone", "std@9"), ">", ("CA alone", "std@4")),
            (("CA alone", "deviation"), ">", ("both", "deviation")),
        ]
        + [(("both", "alignment"), ">", (arm, "alignment")) for arm in ("CA alone", "DM alone")],
    ),
    Claim(
        11,
        "A mean-variance KL keeps CA stable, less well than DM",
        "2511.22677",
        {
            "CA alone": EMOJI_ONE + " --dm-weight 0",
            "CA + mean-variance": EMOJI_ONE + " --dm-weight 0 --mean-variance-weight 1",
            "CA + DM": EMOJI_ONE,
        },
        ("alignment", "coverage", "frechet", "deviation", "std@1", "std@9"),
        lower("std@9", "CA + mean-variance", "CA alone")
        + lower("frechet", "CA + mean-variance", "untrained", "CA alone")
        + lower("frechet", "CA + DM", "CA + mean-variance")
        + [(("CA + DM", "alignment"), ">", ("CA + mean-variance", "alignment"))],
    ),
    Claim(
        10,
        "Schedules: hybrid is best, then constrained, then full, then coupled",
        "2511.22677: HPSv2.1 32.29, 31.71, 30.69, 30.61",
        {name: f"{EMOJI_SCHEDULE} {name}" for name in ("coupled", "full", "constrained", "hybrid")},
        ("alignment", "coverage", "frechet", "deviation"),
        [
            (("hybrid", "alignment"), ">", (arm, "alignment"))
            for arm in ("constrained", "full", "coupled")
        ]
        + lower("frechet", "hybrid", "coupled"),
    ),
]


# ----------------------------------------------------------------------------- one run

CODE = ("train.py", "losses.py", "models.py", "data.py", "lab/plane.py", "lab/claims.py")


def hash_of(*texts):
    return hashlib.sha1(json.dumps(texts).encode()).hexdigest()[:16]


def code_version():
    return hash_of(*((RECIPES.parent / name).read_text(encoding="utf-8") for name in CODE))


def run_file(out, family, flags, probe, rate, seed):
    asked = f"{flags} | {probe}" if probe else flags
    return out / family / f"{hash_of(Path(BASE[family][1:]).read_text(), asked, rate, seed)}.json"


def rates_of(family, probe):
    """A network that is not trained has no learning rate: the first stands for all."""
    return LEARNING_RATES[family][:1] if probe == "untrained" else LEARNING_RATES[family]


def arguments(out, family, flags, rate, seed):
    precision = ["--dtype", "bf16"] if family == "emoji" else []
    return [
        BASE[family],
        *precision,
        *(flag.format(out=out) for flag in flags.split()),
        "--learning-rate",
        rate,
        "--seed",
        str(seed),
    ]


def distil(out, family, flags, probe, rate, seed):
    """Train one arm with train.py's own iterations, measure it ten times on the way, and keep the figures. probe: "" for no more,
    "ratio" for ratio_figures as well, "untrained" for the network before any iteration."""
    torch.set_num_threads(1)
    args = train.parse_arguments(arguments(out, family, flags, rate, seed))
    load = gmm.load_model if family == "gmm" else models.load_model
    networks, sources = train.prepare(args, load)
    meter = {"gmm": PlaneMeter, "emoji": EmojiMeter}[family](networks, args)
    figures, recent = {"diverged": 0.0}, {}
    for iteration in range(0 if probe == "untrained" else args.iterations):
        try:
            recent |= train.iterate(networks, sources, iteration, args)
        except fsdp.NotFinite:
            figures["diverged"] = 1.0
            break
        tenth = 10 * (iteration + 1) // args.iterations
        if tenth > 10 * iteration // args.iterations:
            figures |= {
                f"{name}@{tenth - 1}": value for name, value in meter.on_the_way(recent).items()
            }
    figures |= meter.at_the_end()
    if probe == "ratio":
        figures |= ratio_figures(networks, sources, args)
    file = run_file(out, family, flags, probe, rate, seed)
    if seed == 0:
        meter.keep_picture(file.with_suffix(".png"))
    row = {
        "flags": flags,
        "probe": probe,
        "learning_rate": rate,
        "seed": seed,
        "code": code_version(),
        "figures": figures,
    }
    checkpoint.replace_text(file, json.dumps(row, indent=1) + "\n")


class PlaneMeter:
    """Figures of a student on the plane, against what its teacher draws with guidance, without, and against the data."""

    def __init__(self, networks, args):
        self.networks, self.args, model = networks, args, networks.model
        generator = torch.Generator().manual_seed(1_000_000 + args.seed)
        self.label = torch.arange(SAMPLES) % gmm.LABELS
        self.cond = {"class_labels": self.label}
        self.noise = torch.randn(
            args.student_steps, SAMPLES, *model.sample_shape, generator=generator
        )
        self.unguided = model.mixture.draw(self.label, generator)
        self.data = model.truth.draw(self.label, generator)
        self.target = (
            model.target(self.label, args.guidance, generator)
            if args.guidance != 1
            else self.unguided
        )

    def draw(self):
        return sample.StudentSampler(self.networks.averaged_student, self.networks.timesteps).draw(
            self.noise, self.cond
        )[..., 0, 0]

    def measure(self, x, target):
        figures = gmm.measure(self.networks.model.mixture, x, self.label, target)
        return {name: value for name, value in figures.items() if name != "per_label"}

    def on_the_way(self, recent):
        return self.measure(self.draw(), self.target)

    def at_the_end(self):
        x, to_data = self.draw(), {}
        figures = self.measure(x, self.target) | {
            "sliced_unguided": self.measure(x, self.unguided)["sliced"]
        }
        for name, points in (("", x), ("_teacher", self.unguided)):
            against = self.measure(points, self.data)
            to_data |= {f"{figure}{name}_data": against[figure] for figure in ("kl", "sliced")}
        return figures | to_data

    def keep_picture(self, path):
        field = gmm.direction_field(self.networks, self.args, 333)
        x = self.draw()[:1024].clamp(-99, 99)
        gmm.draw_panels(
            self.networks.model.mixture,
            [("", x, self.label[:1024], None), ("", None, None, field)],
            path,
        )


def ratio_figures(networks, sources, args, catch_up=300, batches=24, batch=256):
    """For every divergence, at the present student, which is held still while fake score and head catch up with it: variance of h
    over its squared mean, with r as the head gives it and with r divided by its mean in its time bin; and the noise of the
    student's gradient, sum of variances over squared norm of the mean, from batch to batch, with h as it is, with binned r, and
    with h divided by its batch mean as well."""
    draws = data.Draws(args.seed, 10_000_000, batch, device=networks.model.device)
    cond = {"class_labels": torch.arange(batch) % gmm.LABELS}

    def student_samples():
        return models.few_step_sample(
            networks.student,
            draws.normal(*networks.model.sample_shape)[None],
            cond,
            networks.timesteps[:1],
        )

    T = len(networks.schedule)
    t_in = torch.full((batch,), networks.timesteps[0])
    for _ in range(catch_up):
        part = train.Batch(cond, t_in, x=student_samples().detach())
        part.t_fake = draws.integers(0, T)
        part.eps_fake = draws.normal(*networks.model.sample_shape)
        part.x_real, prompts = sources.real.draw(draws)
        part.eps_real = draws.normal(*networks.model.sample_shape)
        part.cond_real = networks.model.encode(prompts)
        train.fake_score_step(networks, [part], args)
    readings = []
    for _ in range(batches):
        x = student_samples()
        t, _ = train.draw_levels("coupled", args.noise_levels, t_in, T, draws)
        with torch.no_grad():
            x_t = networks.schedule.add_noise(x, draws.normal(*x.shape[1:]), t)
            x0_fake, logit = networks.fake_score(x_t, t, cond)
            x0_real = networks.teacher(x_t, t, cond)
            direction = losses.dm_direction(x0_real, x0_fake) / losses.normaliser(
                x, x0_real, args.normaliser_floor
            )
        readings.append((x, direction, losses.density_ratio(logit), losses.time_bin(t, T, 10)))
    r, time_bin = (
        torch.cat([reading[2] for reading in readings]),
        torch.cat([reading[3] for reading in readings]),
    )
    means = torch.stack([r[time_bin == k].mean() for k in range(10)])
    figures, parameters = {}, list(networks.student.parameters())
    for name, h_of in losses.DIVERGENCES.items():
        for stage, all_h in (("raw", h_of(r)), ("binned", h_of(r / means[time_bin]))):
            figures[f"var h {stage} {name}"] = (all_h.var() / all_h.mean() ** 2).item()
        for stage in ("raw", "binned", "both"):
            gradients = []
            for x, direction, ratio, k in readings:
                h = h_of(ratio if stage == "raw" else ratio / means[k])
                h = h / h.mean() if stage == "both" else h
                gradient = torch.autograd.grad(
                    x,
                    parameters,
                    h.view(-1, 1, 1, 1) * direction / x.numel(),
                    retain_graph=True,
                    allow_unused=True,
                )
                gradients.append(
                    torch.cat([part.flatten() for part in gradient if part is not None])
                )
            gradients = torch.stack(gradients)
            figures[f"grad noise {stage} {name}"] = (
                gradients.var(0).sum() / gradients.mean(0).square().sum()
            ).item()
    return figures


class EmojiMeter:
    """eval.py's figures, on fewer samples: 100 captions, and 32 samples of each word."""

    def __init__(self, networks, args):
        self.networks, self.args, self.judge = networks, args, EmojiJudge()
        chosen = torch.randperm(
            len(self.judge.captions), generator=torch.Generator().manual_seed(args.seed)
        )[:100]
        self.prompts = [self.judge.captions[i] for i in chosen]
        self.row = sample.StudentSampler(networks.averaged_student, networks.timesteps)

    def on_the_way(self, recent):
        return {name: recent[name].item() for name in ("std", "gap")}

    def at_the_end(self):
        model, seed = self.networks.model, self.args.seed
        prompts = self.prompts + [
            word for word in evaluation.COVERAGE_WORDS for _ in range(metrics.COVERAGE_SAMPLES)
        ]
        noise = sample.column_noise(model, len(prompts), self.args.student_steps, seed)
        images = model.decode(sample.draw_in_batches(self.row, noise, model.encode(prompts), 50))
        judged = self.judge(images, {"whole": images}, prompts) | Gauges()(
            images, {"whole": images}, prompts
        )
        features = self.judge.reference()
        reference = {"layout": {"gaussian": metrics.Gaussian.of(features)}}
        figures = metrics.metrics_of(
            judged, prompts, len(self.prompts), reference, self.judge, seed
        )
        return {name: figure.value for name, figure in figures.items()}

    def keep_picture(self, path):
        model = self.networks.model
        noise = sample.column_noise(
            model, len(sample.PROMPTS), self.args.student_steps, self.args.seed
        )
        images = model.decode(self.row.draw(noise, model.encode(sample.PROMPTS)))
        strip = (torch.cat(list(images), 2).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        pictures.save(Image.fromarray(strip), path)


# ----------------------------------------------------------------------------- what came of it

# Two-sided 5 % points of Student's t for 1, 2, ... degrees of freedom.
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def figures_of(out, family, run, seeds):
    """{learning rate: [figures of seed 0, 1, ...]} of one arm, the best of the rates, and how many are of another version of the
    code."""
    rows = {
        rate: [
            json.loads(run_file(out, family, *run, rate, seed).read_text()) for seed in range(seeds)
        ]
        for rate in rates_of(family, run[1])
    }
    stale = sum(row.get("code") != code_version() for own in rows.values() for row in own)
    by_rate = {
        rate: [row["figures"] for row in rows.get(rate) or next(iter(rows.values()))]
        for rate in LEARNING_RATES[family]
    }
    return (
        by_rate,
        min(
            by_rate,
            key=lambda rate: statistics.fmean(
                figures[JUDGED_BY[family]] for figures in by_rate[rate]
            ),
        ),
        stale,
    )


def judge(claim, arms):
    """{expectation: "yes", "opposite" or "not resolved"} for arms: name -> [figures of seed 0, 1, ...]: the first two where the mean
    difference, seed by seed, is beyond Student's 95 % interval. A figure that a run did not live to see counts as not resolved."""
    verdicts = {}
    for (arm_a, figure_a), sign, (arm_b, figure_b) in claim.expected:
        sentence = (
            f"{arm_a}: {figure_a} {sign} {figure_b}"
            if arm_a == arm_b
            else f"{figure_a}: {arm_a} {sign} {arm_b}"
        )
        difference = [
            a[figure_a] - b[figure_b]
            for a, b in zip(arms[arm_a], arms[arm_b])
            if figure_a in a and figure_b in b
        ]
        verdicts[sentence] = "not resolved"
        if len(difference) > 1:
            mean, error = gmm.mean_and_error(difference)
            if abs(mean) > T_QUANTILES[min(len(difference) - 2, len(T_QUANTILES) - 1)] * error:
                verdicts[sentence] = "yes" if (mean < 0) == (sign == "<") else "opposite"
    return verdicts


def in_words(verdicts):
    """ "yes" where every expectation holds, else how many do, are the opposite, or are not resolved."""
    found = list(verdicts.values())
    counts = {
        word: found.count(word) for word in ("yes", "opposite", "not resolved") if word in found
    }
    return (
        next(iter(counts))
        if len(counts) == 1
        else ", ".join(f"{count} {word}" for word, count in counts.items())
    )


def cell(rows, figure):
    values = [row[figure] for row in rows if figure in row]
    return "{:.3g} ± {:.2g}".format(*gmm.mean_and_error(values)) if values else "-"


def report(out, family, claims, seeds, more_flags, where):
    """A table of the claims, then one of the arms for each, and the claims' pictures."""
    rates, stale = LEARNING_RATES[family], 0
    headers = ["at the best rates"] + [f"all at {rate}" for rate in rates if len(rates) > 1]
    summary = [
        f"| | claim | the paper | measured, mean ± standard error over {seeds} seeds | reproduced {' | '.join(headers)} | command |",
        "|" + "---|" * (5 + len(headers)),
    ]
    details = []
    for claim in claims:
        arms = {}
        for name, run in claim.runs(more_flags).items():
            *arms[name], old = figures_of(out, family, run, seeds)
            stale += old
        judged = [judge(claim, {name: by_rate[best] for name, (by_rate, best) in arms.items()})]
        judged += [
            judge(claim, {name: by_rate[rate] for name, (by_rate, _) in arms.items()})
            for rate in rates
            if len(rates) > 1
        ]
        measured = "; ".join(
            f"{name}: {cell(by_rate[best], claim.shown[0])}"
            for name, (by_rate, best) in arms.items()
            if claim.shown[0] in by_rate[best][0]
        )
        command = f"`python -m lab.claims --claim {claim.number}{'' if family == 'gmm' else f' --family {family}'}`"
        summary.append(
            f"| {claim.number} | {claim.title} | {claim.paper} | {claim.shown[0]} {measured} | {' | '.join(map(in_words, judged))} | {command} |"
        )

        details += [
            "",
            f"### Claim {claim.number}: {claim.title}",
            "",
            f"| arm | rate | {' | '.join(claim.shown)} |",
            "|---|" + "---|" * (1 + len(claim.shown)),
        ]
        for name, (by_rate, best) in arms.items():
            for rate, rows in by_rate.items():
                lost = sum(row["diverged"] for row in rows)
                label = "" if name == "untrained" else f"**{rate}**" if rate == best else rate
                if name != "untrained" or rate == best:
                    details.append(
                        f"| {name} | {label}{f', {lost:.0f} diverged' if lost else ''} | "
                        + " | ".join(cell(rows, figure) for figure in claim.shown)
                        + " |"
                    )
        details += ["", f"| expected | {' | '.join(headers)} |", "|---|" + "---|" * len(headers)]
        details += [
            f"| {sentence} | " + " | ".join(verdicts[sentence] for verdicts in judged) + " |"
            for sentence in judged[0]
        ]
        draw_claim(out, family, claim, more_flags, where)
    text = "\n".join(summary + details) + "\n"
    checkpoint.replace_text(where / f"{family}.md", text)
    print("\n".join(summary))
    if stale:
        print(
            f"note: {stale} of these runs were made by another version of the code; delete {out / family} to make them again"
        )
    print(f"table: {where / family}.md, images beside it")


def draw_claim(out, family, claim, more_flags, where):
    """One row an arm, one column a learning rate, from the pictures that the runs of seed 0 kept."""
    left, top, rates = 180, 26, LEARNING_RATES[family]
    runs = claim.runs(more_flags)
    strips = {
        (name, rate): Image.open(run_file(out, family, *run, rate, 0).with_suffix(".png"))
        for name, run in runs.items()
        for rate in rates_of(family, run[1])
    }
    width, height = next(iter(strips.values())).size
    sheet = Image.new(
        "RGB", (left + (width + 12) * len(rates), top + (height + 6) * len(runs)), "white"
    )
    for j, rate in enumerate(rates):
        pictures.write_text(sheet, f"learning rate {rate}", (left + j * (width + 12), top // 2))
        for k, name in enumerate(runs):
            if (name, rate) in strips:
                sheet.paste(strips[name, rate], (left + j * (width + 12), top + k * (height + 6)))
            pictures.write_text(sheet, name, (8, top + k * (height + 6) + height // 2))
    pictures.save(sheet, where / f"{family}-{claim.number}.png")


# ----------------------------------------------------------------------------- command line


def parse_arguments(arguments=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--family", choices=CLAIMS, default="gmm")
    parser.add_argument("--claim", type=cli.positive, nargs="+", metavar="N", help="(default: all)")
    parser.add_argument("--seeds", type=cli.positive, help="(default: 5; 3 for emoji)")
    parser.add_argument(
        "--iterations",
        type=cli.positive,
        help="of every run, for a quick look (default: the recipe's)",
    )
    parser.add_argument(
        "--jobs",
        type=cli.positive,
        default=multiprocessing.cpu_count(),
        help="runs at a time, one core each",
    )
    parser.add_argument("--out", default="runs/laboratory", metavar="DIR")
    parser.add_argument(
        "--list",
        action="store_true",
        help="print the claims and the flags of their arms, and run nothing",
    )
    args = parser.parse_args(arguments)
    known = [claim.number for claim in CLAIMS[args.family]]
    for number in args.claim or ():
        if number not in known:
            parser.error(
                f"there is no claim {number} for {args.family}; there are {', '.join(map(str, known))}"
            )
    args.seeds = args.seeds or SEEDS[args.family]
    return args


def list_claims(args, claims, more_flags):
    """Every arm as a command of train.py, at the first learning rate and seed 0."""
    for claim in claims:
        print(f"{claim.number}. {claim.title} ({claim.paper})")
        for name, (flags, probe) in claim.runs(more_flags).items():
            if probe != "untrained":
                words = arguments(args.out, args.family, flags, LEARNING_RATES[args.family][0], 0)
                program = (
                    "-m lab.plane"
                    if args.family == "gmm"
                    else f"train.py @recipes/{Path(words[0]).name}"
                )
                print(f"     {name}: python {program} {' '.join(words[1:])} --out runs/trial")


def main(arguments=None):
    args = parse_arguments(arguments)
    out, more_flags = Path(args.out), f"--iterations {args.iterations}" if args.iterations else ""
    claims = [
        claim for claim in CLAIMS[args.family] if not args.claim or claim.number in args.claim
    ]
    if args.list:
        return list_claims(args, claims, more_flags)
    checkpoint.make_writable(out / args.family)
    if any("{out}/pairs" in flags for claim in claims for flags in claim.arms.values()):
        options = dict(prompts=None, count=4096, steps=50, guidance=1.0, seed=0)
        data.make_pairs(out / "pairs", options, gmm.PlaneModel("gmm"))
    runs = dict.fromkeys(
        (*run, rate, seed)
        for seed in range(args.seeds)
        for claim in claims
        for run in claim.runs(more_flags).values()
        for rate in rates_of(args.family, run[1])
    )
    todo = [run for run in runs if not run_file(out, args.family, *run).is_file()]
    pool = ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = [pool.submit(distil, out, args.family, *run) for run in todo]
        for future in tqdm(
            as_completed(futures), initial=len(runs) - len(todo), total=len(runs), unit="run"
        ):
            future.result()
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        raise UserError(
            "interrupted; the finished runs are kept, and the same command goes on with the rest"
        ) from None
    pool.shutdown()
    # A quick look or a part of the claims gets a table of its own, so as not to replace that of the whole.
    parts = [
        f"claims-{'-'.join(map(str, args.claim))}" if args.claim else "",
        f"iterations-{args.iterations}" if args.iterations else "",
        f"seeds-{args.seeds}" if args.seeds != SEEDS[args.family] else "",
    ]
    where = out.joinpath("-".join(part for part in parts if part))
    where.mkdir(exist_ok=True)
    report(out, args.family, claims, args.seeds, more_flags, where)


if __name__ == "__main__":
    cli.run(main)
