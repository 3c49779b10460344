"""One run of the laboratory: an arm of a claim, trained by train.py's own iterations and measured.

A finished run is kept as one file, so that claims share arms and an interrupted command goes on.
What lab/health.py needs as well stands at the end.
"""

import hashlib
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import data
import fsdp
import losses
import models
import sample
import train
from lab import plane
from support import checkpoint, pictures
from support.cli import UserError
from support.judges.gauges import Gauges
from support.judges.world import WorldJudge
from support.metrics import COVERAGE_SAMPLES, Gaussian, metrics_of

ROOT = Path(__file__).resolve().parents[1]
CODE = ("train.py", "losses.py", "models.py", "data.py", "lab/plane.py", "lab/trials.py")
SAMPLES = 4096  # of a student on the plane
START = "spawn"  # of worker processes: torch's threads do not survive a fork


@dataclass(frozen=True)
class Trial:
    """train.py's flags, without the student's learning rate and the seed. probe: "untrained"
    measures the network before any iteration; "ratio" measures density ratios as well; "told"
    trains a fake score that knows the student's step."""

    world: str
    flags: str
    probe: str = ""

    def arguments(self, out, rate, seed):
        flags = self.flags.format(out=out).split()
        return [f"@{WORLDS[self.world].recipe}", *flags, "--learning-rate", rate, "--seed", seed]

    def file(self, out, rate, seed):
        world = WORLDS[self.world]
        if self.probe == "untrained":  # the same at every rate
            rate = world.learning_rates[0]
        text = json.dumps([world.recipe.read_text(), self.flags, self.probe, rate, seed])
        return out / self.world / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def code_version():
    code = b"".join((ROOT / name).read_bytes() for name in CODE)
    return hashlib.sha256(code).hexdigest()[:16]


def run_trial(out, trial, rate, seed):
    """Train, measure ten times on the way and at the end, and write the metrics to the trial's
    file: {"metrics": {name: number}, ...}. A metric of the k-th tenth is named NAME@k, from 0."""
    torch.set_num_threads(1)
    world = WORLDS[trial.world]
    args = train.parse_arguments(trial.arguments(out, rate, seed))
    nets, sources = train.prepare(args, world.load_model)
    meter = world.meter(nets, args)
    teller = StepTeller(nets) if trial.probe == "told" else None
    iterations = 0 if trial.probe == "untrained" else args.iterations
    metrics, latest = {"diverged": 0.0}, {}
    for iteration in range(iterations):
        try:
            batch = train.draw_batch(nets, sources, iteration, args)
            if teller:
                teller.step = nets.timesteps.index(int(batch.t_in[0]))
            latest |= train.iterate(nets, batch, iteration, args)
        except fsdp.NotFinite:
            metrics["diverged"] = 1.0
            break
        tenth = 10 * (iteration + 1) // iterations
        if tenth > 10 * iteration // iterations:
            for name, value in meter.on_the_way(latest).items():
                metrics[f"{name}@{tenth - 1}"] = value
    metrics |= meter.at_the_end()
    if trial.probe == "ratio":
        metrics |= ratio_metrics(nets, sources, args)
    file = trial.file(out, rate, seed)
    if seed == 0:
        meter.save_image(file.with_suffix(".png"))
    about = {"flags": trial.flags, "probe": trial.probe, "learning_rate": rate, "seed": seed}
    row = about | {"code": code_version(), "metrics": metrics}
    checkpoint.replace_text(file, json.dumps(row, indent=1) + "\n")


# ----------------------------------------------------------------------------- on the plane


class PlaneMeter:
    """Metrics of a student on the plane: against what its teacher draws with guidance, against what
    it draws without (_unguided), and against the data (_data)."""

    def __init__(self, nets, args):
        self.nets, self.args, model = nets, args, nets.model
        generator = torch.Generator().manual_seed(1_000_000 + args.seed)
        self.label = torch.arange(SAMPLES) % plane.LABELS
        shape = (args.student_steps, SAMPLES, *model.sample_shape)
        self.noise = torch.randn(shape, generator=generator)
        self.unguided = model.mixture.draw(self.label, generator)
        self.data = model.truth.draw(self.label, generator)
        self.target = self.unguided
        if args.guidance != 1:
            self.target = model.target(self.label, args.guidance, generator)

    def draw(self):
        student = sample.StudentSampler(self.nets.averaged_student, self.nets.timesteps)
        return student.draw(self.noise, {"class_labels": self.label})[..., 0, 0]

    def measure(self, x, target):
        return plane.measure(self.nets.model.mixture, x, self.label, target)

    def on_the_way(self, latest):
        return self.measure(self.draw(), self.target)

    def at_the_end(self):
        x = self.draw()
        metrics = self.measure(x, self.target)
        metrics["sliced_unguided"] = self.measure(x, self.unguided)["sliced"]
        for whose, points in (("", x), ("_teacher", self.unguided)):
            to_data = self.measure(points, self.data)
            metrics[f"kl{whose}_data"] = to_data["kl"]
            metrics[f"sliced{whose}_data"] = to_data["sliced"]
        return metrics

    def save_image(self, path):
        field = plane.direction_field(self.nets, self.args, 333)
        x = self.draw()[:1024].clamp(-99, 99)
        panels = [("", x, self.label[:1024], None), ("", None, None, field)]
        plane.draw_panels(self.nets.model.mixture, panels, path)


# ----------------------------------------------------------------------------- a told fake score


class StepTeller:
    """Tells the fake score which of the student's steps its input comes from: a trained vector for
    each, 0 at first, joins the embedding of time. step: that of the batch."""

    def __init__(self, nets):
        embedding = nets.fake_score.denoiser.network.time_embedding
        width = [p for p in embedding.parameters()][-1].shape[0]
        self.vectors = torch.nn.Parameter(torch.zeros(len(nets.timesteps), width))
        self.step = 0
        embedding.register_forward_hook(self.tell)
        nets.fake_optimizer.add_param_group({"params": [self.vectors]})

    def tell(self, module, inputs, output):
        return output + self.vectors[self.step]


# ----------------------------------------------------------------------------- density ratios


def ratio_metrics(nets, sources, args, catch_up=300, batches=24, batch=256):
    """For every divergence, at the student as it is, while fake score and head catch up with it.

    var h: variance of h over its squared mean, with r as the head gives it (raw) and with r divided
    by its mean in its time bin (binned). grad noise: of the student's gradient from batch to batch,
    sum of variances over the squared norm of the mean, with h raw, binned, and divided by its batch
    mean as well (both).
    """
    draws = data.Draws(args.seed, 10_000_000, batch, device=nets.model.device)
    catch_up_with_student(nets, sources, args, draws, catch_up)
    readings = [read_ratio(nets, args, draws) for _ in range(batches)]
    r = torch.cat([reading.r for reading in readings])
    time_bin = torch.cat([reading.time_bin for reading in readings])
    means = torch.stack([r[time_bin == k].mean() for k in range(10)])
    metrics = {}
    for name, h_of in losses.DIVERGENCES.items():
        for stage, ratio in (("raw", r), ("binned", r / means[time_bin])):
            h = h_of(ratio)
            metrics[f"var h {stage} {name}"] = (h.var() / h.mean() ** 2).item()
        for stage in ("raw", "binned", "both"):
            rows = []
            for reading in readings:
                scale = 1 if stage == "raw" else means[reading.time_bin]
                h = h_of(reading.r / scale)
                h = h / h.mean() if stage == "both" else h
                rows.append(student_gradient(nets.student, reading, h))
            gradients = torch.stack(rows)  # (batches, parameters)
            noise = gradients.var(0).sum() / gradients.mean(0).square().sum()
            metrics[f"grad noise {stage} {name}"] = noise.item()
    return metrics


@dataclass
class Reading:
    """x with its graph, its direction, r and its time bin, all of one batch."""

    x: torch.Tensor
    direction: torch.Tensor
    r: torch.Tensor
    time_bin: torch.Tensor


def one_step_samples(nets, draws):
    cond = {"class_labels": torch.arange(draws.batch_size) % plane.LABELS}
    noise = draws.normal(*nets.model.sample_shape)[None]
    return models.few_step_sample(nets.student, noise, cond, nets.timesteps[:1]), cond


def catch_up_with_student(nets, sources, args, draws, iterations):
    shape = nets.model.sample_shape
    t_in = torch.full((draws.batch_size,), nets.timesteps[0])
    for _ in range(iterations):
        x, cond = one_step_samples(nets, draws)
        part = train.Batch(cond, t_in, x=x.detach())
        part.t_fake = draws.integers(0, len(nets.schedule))
        part.eps_fake = draws.normal(*shape)
        part.x_real, prompts = sources.real.draw(draws)
        part.eps_real = draws.normal(*shape)
        part.cond_real = nets.model.encode(prompts)
        train.fake_score_step(nets, [part], args)


def read_ratio(nets, args, draws):
    T = len(nets.schedule)
    x, cond = one_step_samples(nets, draws)
    t_in = torch.full((draws.batch_size,), nets.timesteps[0])
    t, _ = train.draw_levels("coupled", args.noise_levels, t_in, T, draws)
    with torch.no_grad():
        x_t = nets.schedule.add_noise(x, draws.normal(*x.shape[1:]), t)
        x0_fake, logit = nets.fake_score(x_t, t, cond)
        x0_real = nets.teacher(x_t, t, cond)
        direction = losses.dm_direction(x0_real, x0_fake)
        direction = direction / losses.normaliser(x, x0_real, args.normaliser_floor)
    return Reading(x, direction, losses.density_ratio(logit), losses.time_bin(t, T, 10))


def student_gradient(student, reading, h):
    """The student's gradient of a batch whose directions are weighed by h. (parameters,)"""
    gradient_in_x = h.view(-1, 1, 1, 1) * reading.direction / reading.x.numel()
    gradient = torch.autograd.grad(
        reading.x, list(student.parameters()), gradient_in_x, retain_graph=True, allow_unused=True
    )
    return torch.cat([part.flatten() for part in gradient if part is not None])


# ----------------------------------------------------------------------------- in the world


BANDS = {"low": (0, 3), "middle": (3, 9), "high": (9, 99)}  # cycles an image


def frequency_shares(change):
    """Of the energy of a change of images (N, 3, H, W) in each band, the constant left out."""
    side = change.shape[-1]
    energy = torch.fft.fft2(change).abs().square().mean((0, 1))  # (H, W)
    across = side * torch.fft.fftfreq(side)
    radius = (across[:, None].square() + across.square()).sqrt()
    energy[0, 0] = 0
    shares = {}
    for name, (low, high) in BANDS.items():
        shares[name] = (energy[(radius >= low) & (radius < high)].sum() / energy.sum()).item()
    return shares


class SceneMeter:
    """eval.py's metrics on fewer samples: 100 prompts, and 32 samples of each open prompt. Besides,
    where in the spectrum the student's images have changed since it was untrained, and the
    deviation of what teacher and fake score see in its samples."""

    def __init__(self, nets, args):
        self.nets, self.model, self.args, self.judge = nets, nets.model, args, WorldJudge()
        self.student = sample.StudentSampler(nets.averaged_student, nets.timesteps)
        self.prompts = self.judge.prompts(100, args.seed)
        self.untrained = self.images(self.samples(self.prompts))

    def samples(self, prompts):
        steps = self.args.student_steps
        noise = sample.column_noise(self.model, len(prompts), steps, self.args.seed)
        return sample.draw_in_batches(self.student, noise, self.model.encode(prompts), 50)

    def images(self, x):
        return self.model.decode(x, 50)

    def on_the_way(self, latest):
        return {name: latest[name].item() for name in ("std", "gap")}

    @torch.no_grad()
    def seen(self, x, prompts):
        """x0 of teacher and fake score, from the samples diffused to the middle timestep."""
        nets, t = self.nets, len(self.nets.schedule) // 2
        cond = self.model.encode(prompts)
        x_t = nets.schedule.add_noise(x, sample.column_noise(self.model, len(x), 1, 1)[0], t)
        return {"teacher": nets.teacher(x_t, t, cond), "fake": nets.fake_score(x_t, t, cond)[0]}

    def at_the_end(self):
        repeated = [text for text in self.judge.open_prompts for _ in range(COVERAGE_SAMPLES)]
        prompts = self.prompts + repeated
        x = self.samples(prompts)
        images = self.images(x)
        views = {"whole": images}
        judged = self.judge(images, views, prompts) | Gauges()(images, views, prompts)
        reference = {"layout": {"gaussian": Gaussian.of(self.judge.reference())}}
        count, seed = len(self.prompts), self.args.seed
        metrics = metrics_of(judged, prompts, count, reference, self.judge, seed)
        metrics = {name: metric.value for name, metric in metrics.items()}
        for name, x0 in self.seen(x[:50], prompts[:50]).items():
            metrics[f"std_{name}"] = x0.std().item()
        change = self.images(self.samples(self.prompts)) - self.untrained
        if change.abs().max() > 0:
            metrics |= frequency_shares(change)
        return metrics

    def save_image(self, path):
        """Samples, and what teacher and fake score see in them."""
        x = self.samples(sample.PROMPTS)
        rows = []
        for x0 in (x, *self.seen(x, sample.PROMPTS).values()):
            rows.append(torch.cat(list(self.images(x0)), 2))  # (3, H, all W)
        pictures.save(pictures.to_pil(torch.cat(rows, 1)), path)


# ----------------------------------------------------------------------------- both worlds


@dataclass(frozen=True)
class World:
    """What arms are trained on. chosen_by: the metric, lower is better, that chooses a rate."""

    recipe: Path
    learning_rates: tuple
    chosen_by: str
    load_model: Callable
    meter: type


WORLDS = {
    "plane": World(
        recipe=plane.RECIPE,
        learning_rates=("5e-4", "2e-3"),
        chosen_by="kl",
        load_model=plane.load_model,
        meter=PlaneMeter,
    ),
    "scenes": World(
        recipe=ROOT / "recipes" / "short.args",
        learning_rates=("5e-4",),
        chosen_by="frechet",
        load_model=models.load_model,
        meter=SceneMeter,
    ),
}


# ----------------------------------------------------------------------------- many runs


def run_missing(task, runs, jobs):
    """runs: {file: arguments}. Those whose file is missing, several at a time, one core each;
    task(*arguments) writes it last."""
    todo = [arguments for file, arguments in runs.items() if not file.is_file()]
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context(START))
    try:
        futures = [pool.submit(task, *arguments) for arguments in todo]
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


def draw_sheet(rows, columns, path):
    """rows: {title: images of one size, under the titles of columns}."""
    left, top, gap = 215, 26, 8
    first = next(iter(rows.values()))[0]
    width, height = first.width + gap, first.height + gap
    size = (left + width * len(columns), top + height * len(rows))
    sheet = Image.new("RGB", size, "white")
    for i, title in enumerate(columns):
        pictures.write_text(sheet, title, (left + i * width, top // 2))
    for j, (title, images) in enumerate(rows.items()):
        y = top + j * height
        pictures.write_text(sheet, title, (4, y + height // 2))
        for i, image in enumerate(images):
            sheet.paste(image, (left + i * width, y))
    pictures.save(sheet, path)
