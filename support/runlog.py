"""What a run is watched by: metrics, health warnings, curves, images, trackers, signals."""

import contextlib
import json
import math
import os
import signal
import time
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import fsdp
import losses
import models
import sample
from support import checkpoint, pictures
from support.checkpoint import explain_failed_write, replace_text
from support.cli import UserError, import_package

LOG_EVERY = 10
# Where what `vitals` gives stays in a run that goes well, and what to do where it does not. The
# ranges come from the runs of docs/health.md.
HEALTHY = {
    "mean": (-0.5, 0.5, "its colours drift: try a lower --learning-rate or higher --fake-updates"),
    "std": (0.25, 1.3, "grey below, over-saturated above: try a lower --guidance or rate"),
    "kept std": (0.6, math.inf, "contrast that it had is lost: try a lower --learning-rate"),
    "gap": (0.0, 2.5, "the fake score lags behind: try a higher --fake-updates or a lower rate"),
    "fake loss": (0.0, 3.8, "the student outruns it: try a higher --fake-updates or a lower rate"),
    "dm share": (0.02, 1.0, "guidance acts nearly alone: try a higher --fake-learning-rate"),
    "gan share": (0.0, 0.5, "the critic outweighs the teacher: try a lower --gan-weight"),
    # What a model learns is scaled to 1 or less.
    "teacher std": (0.0, 1.7, "the teacher itself over-saturates: try a lower --guidance"),
}
RECENT = 5  # rows that a warning looks at: one odd batch raises no alarm
COLLAPSED = 10.0  # times the teacher's std: nothing is left to be saved
CURVES = ("fake_loss", "dm", "ca", "mean", "std", "gap", "cosine", "student_grad_norm")
CURVES += ("gan", "logit_accuracy")


def metrics_of(x):
    """Mean and deviation of samples (B, ...), with which a student's are compared."""
    return {"mean": x.mean().item(), "std": x.flatten(1).std(dim=1).mean().item()}


def relative(name, value, teacher):
    """A health metric in units that are the same for all models: std as a share of the teacher's,
    and mean as the distance from the teacher's in its std."""
    if name == "std":
        return value / teacher["std"]
    return (value - teacher["mean"]) / teacher["std"] if name == "mean" else value


def mean_of(rows, name, recent=RECENT):
    """Of a metric over the last rows, or None where none has it."""
    values = [row[name] for row in rows[-recent:] if name in row]
    return sum(values) / len(values) if values else None


def read_rows(path, last=math.inf):
    """The rows of metrics.jsonl up to an iteration. What is no row, such as a last line that a kill
    left unfinished, is passed over."""
    rows, text = [], ""
    if path.is_file():
        text = path.read_text(errors="replace")
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            numbers = isinstance(row, dict) and all(type(x) in (int, float) for x in row.values())
            if numbers and {"iteration", "seconds"} <= row.keys() and row["iteration"] <= last:
                rows.append(row)
    return rows


def vitals(rows, teacher):
    """{name: number} of what tells a run's health, means over its last 50 iterations: metrics that
    are compared with the teacher's (see relative), with the run's own start, or with one another.
    teacher: metrics_of its samples."""
    found = {"teacher std": teacher["std"]}
    for name in ("mean", "std", "gap"):
        value = mean_of(rows, name)
        if value is not None:
            found[name] = relative(name, value, teacher)
    if "std" in found:
        found["kept std"] = mean_of(rows, "std") / max(row["std"] for row in rows if "std" in row)
    fake_loss = mean_of(rows[1:], "fake_loss")  # the first is what they are compared with
    if fake_loss is not None:
        found["fake loss"] = fake_loss / max(rows[0]["fake_loss"], 1e-12)
    dm, ca = mean_of(rows, "dm") or 0, mean_of(rows, "ca") or 0
    if dm + ca > 0:
        found["dm share"] = dm / (dm + ca)
        gan = mean_of(rows, "gan") or 0
        found["gan share"] = gan / (dm + ca + gan)
    return found


def unhealthy(rows, teacher, iterations):
    """{name: value} of the vitals that are out of range, in a run of so many iterations. Its start
    tells nothing: a fake score that begins as the teacher has no DM yet."""
    done = rows[-1]["iteration"]
    if done < 3 * LOG_EVERY:
        return {}
    now = vitals(rows, teacher)
    if done < max(RECENT * LOG_EVERY, iterations / 10):
        now.pop("dm share", None)
    return {name: x for name, x in now.items() if not HEALTHY[name][0] <= x <= HEALTHY[name][1]}


def trained_count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def describe(nets, sources, args):
    """What is trained, from what, on what, and where it goes."""
    million = trained_count(nets.student) / 1e6
    on = f"{len(sources.prompts.texts):,} prompts"
    for name, source in (("real samples", sources.real), ("pairs", sources.pairs)):
        if source is not None:
            on += f", {source.count:,} {name}"
    fsdp.print_main(
        f"teacher {nets.model.name}; student: {million:.1f} million trained parameters, timesteps "
        f"{nets.timesteps}\n{on}; {args.dtype} on {args.device}, ranks: {fsdp.world_size()}"
    )


def checkpoint_bytes(nets):
    """Of a checkpoint: trained parameters with two moments, and the average."""
    return 4 * (4 * trained_count(nets.student) + 3 * trained_count(nets.fake_score))


def not_finite(out, iteration, error):
    return UserError(
        f"stopped at iteration {iteration}: {error}. The last good student is in {out}/student; to "
        f"go on from the last checkpoint, more slowly: --resume {out} --learning-rate LOWER (or "
        "--clip)",
        status=1,
    )


class Log:
    """metrics.jsonl, a row of means every ten iterations and at the end; curves.png; and one
    warning for each health metric that leaves its range. All ranks keep the rows, the main rank
    writes."""

    def __init__(self, out, teacher_metrics, iteration):
        self.path = Path(out) / "metrics.jsonl"
        self.teacher = teacher_metrics
        self.warned = set()
        self.waiting = {}  # tensors of this rank since the last row
        self.rows = fsdp.broadcast_from_main(read_rows, self.path, iteration)
        self.began = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0)
        if fsdp.is_main():
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            replace_text(self.path, text)

    def add(self, iteration, metrics, last=False):
        """Keep an iteration's metrics. Returns a row where one is due, of means over the ranks."""
        for name, value in metrics.items():
            self.waiting.setdefault(name, []).append(value)
        if iteration % LOG_EVERY and not last:
            return None
        names = list(self.waiting)
        means = torch.stack([torch.stack(self.waiting[name]).mean() for name in names])
        means = fsdp.mean_over_ranks(means).tolist()
        seconds = round(time.perf_counter() - self.began, 2)
        row = {"iteration": iteration, "seconds": seconds} | dict(zip(names, means))
        if not all(math.isfinite(value) for value in row.values()):
            raise fsdp.NotFinite(f"a metric is not finite: {row}")
        self.waiting = {}
        self.rows.append(row)
        if fsdp.is_main():
            with explain_failed_write(self.path), open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def check_health(self, row, args):
        """Warn once of each metric that leaves its range; stop a run whose samples' spread is far
        beyond the teacher's."""
        if row.get("std", 0) > COLLAPSED * self.teacher["std"] and not args.keep_going:
            raise UserError(
                f"stopped at iteration {row['iteration']}: the student has collapsed, the std of "
                f"its samples is {row['std']:.3g} and of the teacher's {self.teacher['std']:.3g}. "
                f"{args.out}/student is of the last save; try a lower --learning-rate or "
                "--guidance, or --keep-going",
                status=1,
            )
        for name, value in unhealthy(self.rows, self.teacher, args.iterations).items():
            low, high, meaning = HEALTHY[name]
            if name not in self.warned:
                self.warned.add(name)
                fsdp.print_main(
                    f"warning: the health metric {name} is {value:.2f}, outside [{low}, {high}]: "
                    f"{meaning} (docs/health.md)"
                )

    def draw_curves(self):
        if not fsdp.is_main():
            return
        curves = []
        for name in CURVES:
            points = [
                (row["iteration"], relative(name, row[name], self.teacher))
                for row in self.rows
                if name in row
            ]
            band = HEALTHY[name][:2] if name in HEALTHY else None
            level = {"mean": 0.0, "std": 1.0}.get(name)  # the teacher's
            if points:
                curves.append(pictures.Curve(name, points, band, level))
        pictures.draw_curves(curves, self.path.parent / "curves.png")


PATIENCE = 60  # seconds that a run draws its teacher's samples for


def read_samples(path, about):
    """The tensor of a file that says this about itself, or None."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        if file.metadata() == about:
            return file.get_tensor("x0")
    return None


class Gallery:
    """Images of the run, from the same prompts and the same noise each time."""

    def __init__(self, out, nets, prompts, args):
        self.folder = Path(out) / "images"
        self.nets, self.args = nets, args
        model, texts = nets.model, prompts.texts
        count = min(8, len(texts))
        chosen = [texts[i * len(texts) // count] for i in range(count)]
        noise = sample.column_noise(model, count, args.student_steps + 1, args.seed)
        self.teacher = sample.TeacherSampler(model, sample.teacher_steps(model), args.guidance)
        self.x_teacher = self.teacher_samples(noise, chosen)
        count = len(self.x_teacher)
        self.prompts, self.noise = chosen[:count], noise[:, :count]
        self.cond = model.encode(self.prompts)
        self.batch = args.micro_batch or count
        self.teacher_metrics = metrics_of(self.x_teacher)

    def teacher_samples(self, noise, prompts):
        """What the run keeps of the teacher's samples, for itself and for resumes; else drawn."""
        path = self.folder.parent / "teacher_samples.safetensors"
        about = {"label": self.teacher.label, "seed": self.args.seed, "prompts": prompts}
        about = {"about": json.dumps(about)}
        x = fsdp.broadcast_from_main(read_samples, path, about)
        if x is None:
            x = self.draw_teacher(noise, prompts)
            if fsdp.is_main():
                content = safetensors.torch.save({"x0": x.cpu().contiguous()}, about)
                checkpoint.replace_file(path, lambda partial: partial.write_bytes(content))
        return x.to(noise.device)

    def draw_teacher(self, noise, prompts):
        """Two at a time, until all are drawn or PATIENCE is over."""
        cond, x, began = self.nets.model.encode(prompts), [], time.perf_counter()
        passes = len(prompts) * self.teacher.passes
        with tqdm(total=passes, desc="teacher", unit="pass", disable=not fsdp.is_main()) as bar:
            self.teacher.progress = bar
            for start in range(0, len(prompts), 2):
                index = slice(start, start + 2)
                x.append(self.teacher.draw(noise[:, index], models.take(cond, index)))
                if fsdp.max_over_ranks(time.perf_counter() - began > PATIENCE):
                    break
            self.teacher.progress = None
        return torch.cat(x)

    def draw(self, iteration):
        """Write an image of teacher, student, and what teacher and fake score make of the student's
        samples. Returns its path, or None without a decoder."""
        nets, model = self.nets, self.nets.model
        if not model.decodes:
            return None
        student = sample.StudentSampler(nets.averaged_student, nets.timesteps)
        x = sample.draw_in_batches(student, self.noise, self.cond, self.batch)
        t = len(nets.schedule) // 2
        x0_real, x0_fake = self.read_at(x, t)
        path = self.folder / f"{iteration:06d}.png"
        if fsdp.is_main():
            rows = [
                (self.teacher.label, model.decode(self.x_teacher, self.batch)),
                (student.label, model.decode(x, self.batch)),
                (f"teacher's x0 of it\nat t = {t}", model.decode(x0_real, self.batch)),
                ("fake score's x0\nof the same", model.decode(x0_fake, self.batch)),
            ]
            pictures.draw_grid(rows, [model.caption(prompt) for prompt in self.prompts], path)
        return path

    @torch.no_grad()
    def read_at(self, x, t):
        """Guided teacher's and fake score's x0 of samples that are diffused to timestep t."""
        nets, x0_real, x0_fake = self.nets, [], []
        for start in range(0, len(x), self.batch):
            index = slice(start, start + self.batch)
            cond = models.take(self.cond, index)
            level = torch.full((len(x[index]),), t, device=x.device)
            x_t = nets.schedule.add_noise(x[index], self.noise[-1][index], level)
            guidance = self.args.guidance
            x0_real.append(models.guided_x0(nets.teacher, x_t, t, cond, nets.uncond, guidance))
            x0_fake.append(nets.fake_score(x_t, t, cond)[0])
        return torch.cat(x0_real), torch.cat(x0_fake)


LOSS_LEVELS = 8


@torch.no_grad()
def fake_loss(nets, gallery, args):
    """The fake score's loss on the student's samples, a mean over evenly spaced timesteps."""
    schedule, T = nets.schedule, len(nets.schedule)
    student = sample.StudentSampler(nets.averaged_student, nets.timesteps)
    count, total = len(gallery.noise[0]), 0
    size = args.micro_batch or count
    for start in range(0, count, size):
        index = slice(start, start + size)
        noise, cond = gallery.noise[:, index], models.take(gallery.cond, index)
        x = student.draw(noise, cond)
        for i in range(LOSS_LEVELS):
            t = torch.full((len(x),), (2 * i + 1) * T // (2 * LOSS_LEVELS), device=x.device)
            x0_fake, _ = nets.fake_score(schedule.add_noise(x, noise[-1], t), t, cond)
            alpha, sigma = schedule.at(t, x)
            weight = losses.denoising_weight(nets.model.prediction, alpha, sigma)
            total = total + losses.denoising_loss(x0_fake, x, weight).sum()
    return total / (count * LOSS_LEVELS)


class Tracker:
    """wandb or trackio, which are called alike; nothing without a name."""

    def __init__(self, name, out, config):
        self.package = import_tracker(name) if fsdp.is_main() else None
        if self.package:
            self.package.init(project="dmd", name=Path(out).name, config=config)

    def log(self, iteration, row, image=None):
        if self.package:
            images = {"images": self.package.Image(str(image))} if image else {}
            self.package.log(row | images, step=iteration)

    def finish(self):
        if self.package:
            self.package.finish()


def import_tracker(name):
    """name: a choice of --track, or None."""
    return import_package(name, f"--track {name}") if name else None


class StopAtSignal:
    """Ctrl-C, SIGTERM, SIGHUP (a closed terminal) and SIGUSR1 (SLURM's warning) are noted and
    obeyed between two iterations; a second one stops at once. `signal` is its number, 0 for
    none."""

    def __enter__(self):
        self.signal = 0
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def note(self, number, frame):
        self.signal = number
        if fsdp.is_main():  # not by print, which the signal may have interrupted
            text = b"\nstopping after this iteration and a save; once more stops at once\n"
            with contextlib.suppress(OSError):  # of a terminal that is closed
                os.write(2, text)
        for handled in self.before:
            signal.signal(handled, signal.SIG_DFL)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
