"""How runs go well and how they go wrong, each provoked on purpose.

    python -m lab.health

Three healthy variants with five seeds each and nine runs that are spoilt by one flag, of 300
iterations on the embedded teacher. Beside the metrics that every run writes, the Frechet distance
is measured ten times. A finished run is kept in --out, so an interrupted command goes on; the whole
is written to assets/results/health.json, and a picture of four moments of each run beside it.
"""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

import fsdp
import models
import sample
import train
from support import checkpoint, cli, pictures, runlog
from support.judges.world import WorldJudge
from support.metrics import Gaussian, frechet_distance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "assets" / "results" / "health.json"
RECIPE = ROOT / "recipes" / "short.args"
SEEDS, MOMENTS, SAMPLES = 5, 10, 200
HEALTHY = {
    "DMD2, four steps": "",
    "DMD2, one step": "--student-steps 1",
    "Decoupled DMD, hybrid": "--variant decoupled --schedule hybrid --gan-weight 0",
}
SPOILT = {
    "student's rate too high": "--learning-rate 5e-3",
    "fake score's rate too low": "--fake-learning-rate 1e-6",
    "K too low": "--fake-updates 1 --learning-rate 1e-3",
    "guidance too high": "--guidance 15",
    "CA alone": "--variant decoupled --schedule coupled --gan-weight 0 --dm-weight 0",
    "the critic wins": "--gan-weight 1 --critic-weight 1 --batch-size 4",
    "noised real data": "--student-input data",
    "no warm-up": "--warmup 0 --learning-rate 2e-3",
    "a fake score unlike the teacher": "",
}
UNLIKE = "a fake score unlike the teacher"


# ----------------------------------------------------------------------------- one run


def spoil_weights(module, seed):
    """Each weight moved by a tenth of its tensor's deviation."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.numel() > 1:
            parameter.data += 0.1 * parameter.data.std() * noise


class Meter:
    """Images of the same prompts and noise at every moment, and their Frechet distance."""

    def __init__(self, nets, args):
        self.nets, self.model, self.judge = nets, nets.model, WorldJudge()
        self.student = sample.StudentSampler(nets.averaged_student, nets.timesteps)
        self.prompts = self.judge.prompts(SAMPLES, 1)
        self.noise = sample.column_noise(self.model, SAMPLES, args.student_steps, 1)
        self.reference = Gaussian.of(self.judge.reference())

    def images(self):
        cond = self.model.encode(self.prompts)
        x = sample.draw_in_batches(self.student, self.noise, cond, 50)
        return self.model.decode(x, 50)

    def frechet(self, images):
        judged = self.judge(images, {"whole": images}, self.prompts)
        return frechet_distance(Gaussian.of(judged["features layout"]), self.reference)


def run(out, name, flags, seed):
    """Train and measure: {rows, teacher, frechet} into a file, four moments into a picture."""
    torch.set_num_threads(1)
    arguments = [f"@{RECIPE}", *flags.split(), "--seed", str(seed), "--keep-going"]
    args = train.parse_arguments(arguments)
    nets, sources = train.prepare(args, models.load_model)
    if name == UNLIKE:
        spoil_weights(nets.fake_score.denoiser, seed)
    folder = file_of(out, name, seed).with_suffix("")
    folder.mkdir(exist_ok=True)
    gallery = runlog.Gallery(folder, nets, sources.prompts, args)
    log = runlog.Log(folder, gallery.teacher_figures, 0)
    meter, frechet, strips = Meter(nets, args), [], []
    try:
        for iteration in range(args.iterations + 1):
            if iteration % (args.iterations // MOMENTS) == 0:
                images = meter.images()
                frechet.append((iteration, meter.frechet(images)))
                if iteration % (args.iterations // MOMENTS * 3) == 0:
                    strips.append(torch.cat(list(images[:8]), 2))  # (3, H, all W)
            if iteration < args.iterations:
                batch = train.draw_batch(nets, sources, iteration, args)
                log.add(iteration + 1, train.iterate(nets, batch, iteration, args))
    except fsdp.NotFinite:
        pass  # the end of such a run, and its last row is the one before
    result = {"rows": log.rows, "teacher": gallery.teacher_figures, "frechet": frechet}
    if seed == 0:
        sheet = pictures.to_pil(torch.cat(strips, 1))
        pictures.save(sheet, file_of(out, name, seed).with_suffix(".png"))
    checkpoint.replace_text(file_of(out, name, seed), json.dumps(result))


def file_of(out, name, seed):
    words = "-".join("".join(c if c.isalnum() else " " for c in name).split())
    return Path(out) / f"{words}-{seed}.json"


# ----------------------------------------------------------------------------- what they say


def first_warning(result):
    """Iteration of the first warning that the run would have printed, or None."""
    rows = result["rows"]
    for i, row in enumerate(rows):
        if runlog.unhealthy(rows[: i + 1], result["teacher"]):
            return row["iteration"]
    return None


def spoilt_at(result, factor=1.2):
    """First measured iteration after its best at which the Frechet distance is `factor` of the
    best, or None."""
    best = float("inf")
    for iteration, distance in result["frechet"]:
        best = min(best, distance)
        if distance > factor * best:
            return iteration
    return None


def table(results):
    """Lines: each run's best and last Frechet distance, when it was spoilt and when it warned."""
    lines = ["| run | best | last | 20 % above its best at | first warning at |"]
    lines += ["|---|---|---|---|---|"]
    for name, result in results.items():
        distances = [distance for _, distance in result["frechet"]]
        cells = [name, f"{min(distances):.1f}", f"{distances[-1]:.1f}"]
        cells += [spoilt_at(result) or "-", first_warning(result) or "-"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


# ----------------------------------------------------------------------------- command line


def main(arguments=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", default="runs/health", metavar="DIR")
    jobs = multiprocessing.cpu_count()
    parser.add_argument("--jobs", type=cli.positive, default=jobs, help="one core each")
    args = parser.parse_args(arguments)
    checkpoint.make_writable(Path(args.out))
    wanted = [(name, flags, seed) for name, flags in HEALTHY.items() for seed in range(SEEDS)]
    wanted += [(name, flags, 0) for name, flags in SPOILT.items()]
    todo = [one for one in wanted if not file_of(args.out, one[0], one[2]).is_file()]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run, args.out, *one) for one in todo]
        with tqdm(initial=len(wanted) - len(todo), total=len(wanted), unit="run") as bar:
            for future in as_completed(futures):
                future.result()
                bar.update()
    results = {}
    for name, _, seed in wanted:
        result = json.loads(file_of(args.out, name, seed).read_text())
        rows = []
        for row in result["rows"]:
            rows.append({key: float(f"{value:.4g}") for key, value in row.items()})
        results[f"{name}, seed {seed}"] = result | {"rows": rows}
    checkpoint.replace_text(RESULTS, json.dumps(results))
    print("\n".join(table(results)))


if __name__ == "__main__":
    cli.run(main)
