"""How runs go well and how they go wrong, each provoked on purpose.

    python -m lab.health

Three healthy variants with five seeds each, and nine runs that are spoilt, of 240 iterations on the
embedded teacher. Each is an ordinary run of train.py, kept in --out with its log, images and
curves. Of the first seed the Frechet distance and the alignment are measured ten times. A finished
run is not made again, so an interrupted command goes on. What the warnings are tuned by is written
to assets/results/health.json, and images of four moments of each run to --out/health.png.
"""

import contextlib
import functools
import json
import os
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

import sample
import train
from lab.trials import ROOT, WORLDS, draw_sheet, run_missing
from support import checkpoint, cli, pictures, runlog
from support.cli import UserError
from support.judges.world import WorldJudge
from support.metrics import Gaussian, frechet_distance

RESULTS = ROOT / "assets" / "results" / "health.json"
SEEDS, SAMPLES, SHOWN = 5, 200, 4
MOMENTS = (0, 72, 144, 240)  # whose images are shown
HEALTHY = {
    "DMD2, four steps": "--gan-weight 5e-3",
    "DMD2, one step": "--student-steps 1",
    "Decoupled DMD": "--variant decoupled",
}
SPOILT = {
    "student's rate too high": "--learning-rate 5e-3",
    "fake score's rate too low": "--fake-learning-rate 1e-6",
    "K too low": "--fake-updates 1 --learning-rate 1e-3",
    "guidance too high": "--guidance 20",
    "CA alone": "--variant decoupled --schedule coupled --dm-weight 0",
    "the critic wins": "--gan-weight 1 --critic-weight 1 --batch-size 4",
    "noised real data": "--student-input data",
    "no warm-up": "--warmup 0 --learning-rate 2e-3",
    "a fake score unlike the teacher": "",  # see spoil_fake_score
}


# ----------------------------------------------------------------------------- one run


class Watcher(runlog.Gallery):
    """A run's gallery that also keeps what the run does not measure: {"iteration", "frechet",
    "alignment", "images"} of each moment, from the same prompts and noise each time."""

    def __init__(self, out, nets, prompts, args, moments, spoil=None):
        super().__init__(out, nets, prompts, args)
        self.moments = moments
        self.judge = WorldJudge()
        self.reference = Gaussian.of(self.judge.reference())
        self.judged_prompts = self.judge.prompts(SAMPLES, 1)
        self.judged_noise = sample.column_noise(nets.model, SAMPLES, args.student_steps, 1)
        if spoil:
            spoil(nets)

    def draw(self, iteration):
        nets, prompts = self.nets, self.judged_prompts
        student = sample.StudentSampler(nets.averaged_student, nets.timesteps)
        cond = nets.model.encode(prompts)
        x = sample.draw_in_batches(student, self.judged_noise, cond, 50)
        images = nets.model.decode(x, 50)
        judged = self.judge(images, {"whole": images}, prompts)
        features = Gaussian.of(judged["features layout"])
        moment = {"iteration": iteration, "frechet": frechet_distance(features, self.reference)}
        moment["alignment"] = (judged["kind"] >= 0).double().mean().item()
        moment["images"] = torch.cat(list(images[:SHOWN]), 2)  # (3, H, SHOWN W)
        self.moments.append(moment)
        return super().draw(iteration)


def spoil_fake_score(nets):
    """Each weight moved by a tenth of its tensor's deviation."""
    generator = torch.Generator().manual_seed(0)
    for parameter in nets.fake_score.denoiser.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.numel() > 1:
            parameter.data += 0.1 * parameter.data.std() * noise


def run(out, name, flags, seed):
    """Train, and write {"rows", "teacher", "moments"} to the run's file."""
    torch.set_num_threads(1)
    file = file_of(out, name, seed)
    folder = file.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted command
    folder.mkdir()
    arguments = [f"@{WORLDS['scenes'].recipe}", *flags.split(), "--seed", str(seed), "--keep-going"]
    arguments += ["--keep", "1", "--out", str(folder / "run")]
    moments, make_gallery = [], runlog.Gallery
    if seed == 0:
        spoil = spoil_fake_score if name == "a fake score unlike the teacher" else None
        make_gallery = functools.partial(Watcher, moments=moments, spoil=spoil)
        arguments += ["--save-every", "24"]
    with (
        open(folder / "log.txt", "w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        contextlib.suppress(UserError),  # of one that diverges
    ):
        train.main(arguments, make_gallery=make_gallery)
    strips = [moment.pop("images") for moment in moments]
    shown = [x for x, moment in zip(strips, moments) if moment["iteration"] in MOMENTS]
    if shown:
        pictures.save(pictures.to_pil(torch.cat(shown, 2)), file.with_suffix(".png"))
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    x_teacher = load_file(folder / "run" / "teacher_samples.safetensors")["x0"]
    result = {"rows": [kept(json.loads(line)) for line in lines]}
    result |= {"teacher": runlog.metrics_of(x_teacher), "moments": moments}
    checkpoint.replace_text(file, json.dumps(result))


def kept(row):
    """Of a row of metrics what warnings may be told by."""
    names = ("iteration", *runlog.CURVES)
    return {name: float(f"{row[name]:.4g}") for name in names if name in row}


def file_of(out, name, seed):
    words = "-".join("".join(c if c.isalnum() else " " for c in name).split())
    return Path(out).absolute() / f"{words}-{seed}.json"


# ----------------------------------------------------------------------------- what they say


def first_warning(result):
    """Iteration of the first warning that the run prints, and of what; or None."""
    rows = result["rows"]
    for i, row in enumerate(rows):
        found = runlog.unhealthy(rows[: i + 1], result["teacher"], rows[-1]["iteration"])
        if found:
            return int(row["iteration"]), ", ".join(found)
    return None


def table(results):
    """Lines: each run's Frechet distance and alignment on the way, and when it warned."""
    lines = ["| run | Frechet distance | alignment | first warning |", "|---|---|---|---|"]
    for name, result in results.items():
        cells = [name]
        for metric, form in (("frechet", ".0f"), ("alignment", ".2f")):
            moments = result["moments"][::2]
            cells.append(" ".join(format(moment[metric], form) for moment in moments))
        warning = first_warning(result)
        cells.append("-" if warning is None else f"{warning[0]}: {warning[1]}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw_moments(out, names):
    """A row for each run: a few images at each of four moments."""
    rows = {}
    for name in names:
        strip = Image.open(file_of(out, name, 0).with_suffix(".png"))
        width = SHOWN * strip.height
        lefts = range(0, strip.width, width)  # fewer of a run that diverged
        rows[name] = [strip.crop((left, 0, left + width, strip.height)) for left in lefts]
    titles = [f"iteration {moment}" for moment in MOMENTS]
    draw_sheet(rows, titles, Path(out) / "health.png")


# ----------------------------------------------------------------------------- command line


def main(arguments=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", default="runs/health", metavar="DIR")
    jobs = os.cpu_count()
    parser.add_argument("--jobs", type=cli.positive, default=jobs, help="one core each")
    args = parser.parse_args(arguments)
    checkpoint.make_writable(Path(args.out))
    wanted = [(name, flags, 0) for name, flags in (HEALTHY | SPOILT).items()]
    wanted += [(name, flags, seed) for name, flags in HEALTHY.items() for seed in range(1, SEEDS)]
    runs = {file_of(args.out, name, seed): (name, flags, seed) for name, flags, seed in wanted}
    run_missing(run, {file: (args.out, *one) for file, one in runs.items()}, args.jobs)
    results = {}
    for file, (name, _, seed) in runs.items():
        results[f"{name}, seed {seed}"] = json.loads(file.read_text())
    checkpoint.replace_text(RESULTS, json.dumps(results))
    draw_moments(args.out, HEALTHY | SPOILT)
    print("\n".join(table(results)))


if __name__ == "__main__":
    cli.run(main)
