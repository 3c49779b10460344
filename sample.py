"""Draw students beside their teacher: the same prompts and the same noise, one row a sampler.

    python sample.py                                              # the student of `python train.py`
    python sample.py --prompts "cat face" "tomato on red" "hot pepper" # words ...
    python sample.py --prompts prompts.txt --out grid.png         # ... or a file, one prompt a line
    python sample.py --student runs/mine --steps 4 1 --guidance 5   # rows for 4 and 1 student steps
    python sample.py --compare runs/decoupled runs/dmd2               # several students
    python sample.py --student runs/imagenet --prompts 207 "giant panda"    # classes
    python sample.py --student dmd2_sdxl_4step_unet_fp16.bin --dtype fp16 \\
        --model stabilityai/stable-diffusion-xl-base-1.0 --images out

Rows: the teacher at --teacher-steps with guidance, the teacher at the most and the fewest steps of
the student (which shows what distillation buys), then the student. Seconds an image are the
sampler's, without decoding; the speed is relative to the first row.
"""

import functools
import time
from dataclasses import dataclass
from pathlib import Path

from support import cli, flags

if __name__ == "__main__":
    cli.answer_early(flags.sample_parser, __doc__)

import torch
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import data
import fsdp
import models
from support import pictures, students
from support.cli import UserError
from support.prompt_files import is_prompt_file, read_prompts

PROMPTS = [
    *("frog face", "guitar on yellow", "rainbow above penguin", "alarm clock left of mushroom"),
    *("birthday cake on green", "watermelon and purple heart", "butterfly", "fire engine on white"),
]


# ----------------------------------------------------------------------------- samplers


def plural(count, word):
    return f"{count} {word}" + "s" * (count > 1)


@dataclass
class TeacherSampler:
    """The teacher with guidance. kind: deterministic (DDIM, for every model); heun and stochastic
    are EDM's, for its networks, with `steps` levels of their own."""

    model: models.Model
    steps: int
    guidance: float
    kind: str | None = None
    progress: tqdm | None = None  # a bar of sample-passes

    def __post_init__(self):
        edm = self.model.prediction == "edm"
        self.kind = self.kind or ("heun" if edm else "deterministic")
        if self.kind != "deterministic" and not edm:
            raise UserError(f"--sampler {self.kind} is for EDM's networks, not {self.model.name}")
        self.noises = self.steps if self.kind == "stochastic" else 1  # that it uses
        self.label = f"teacher, {plural(self.steps, 'step')}"
        self.levels = self.model.schedule
        self.passes = self.steps
        if self.kind != "deterministic":
            self.passes = 2 * self.steps - 1
            self.label += f"\n{self.kind}, {self.passes} pass" + "es" * (self.passes > 1)
            make = models.edm_schedule if self.kind == "heun" else stochastic_levels
            self.levels = make(self.steps).to(self.model.device)
        self.label += f"\nguidance {self.guidance:g}"

    def x0(self, x_t, t, cond):
        if self.progress is not None:
            self.progress.update(len(x_t))
        teacher, uncond = self.model.denoiser, self.model.uncond
        return models.guided_x0(teacher, x_t, t, cond, uncond, self.guidance, self.levels)

    @torch.no_grad()
    def draw(self, noise, cond):
        """noise (S, B, C, H, W) -> x0 (B, C, H, W)"""
        x0_of = functools.partial(self.x0, cond=cond)
        if self.kind != "deterministic":
            return heun_sample(x0_of, noise, self.levels, self.steps)
        timesteps = self.levels.timesteps(self.steps)
        return models.deterministic_sample(x0_of, noise[0], timesteps, self.levels)


@dataclass
class StudentSampler:
    """A student at these timesteps."""

    student: models.Denoiser
    timesteps: list
    name: str = "student"

    def __post_init__(self):
        self.noises = len(self.timesteps)
        self.label = f"{self.name}, {plural(self.noises, 'step')}"

    @torch.no_grad()
    def draw(self, noise, cond):
        """noise (S, B, C, H, W) -> x0 (B, C, H, W)"""
        return models.few_step_sample(self.student, noise[: self.noises], cond, self.timesteps)


# EDM's settings for ImageNet-64: S_churn, S_min, S_max, S_noise.
STOCHASTIC = {"churn": 40, "low": 0.05, "high": 50.0, "noise": 1.003}


def heun_sample(x0_of, noise, schedule, steps):
    """EDM's samplers (2206.00364, algorithms 1 and 2): Heun's second-order steps through the first
    `steps` levels of the schedule, then one of first order to no noise. 2 steps - 1 passes.

    noise (S, B, ...). In a schedule of twice as many levels (stochastic_levels) the level at
    steps + t is what noise[steps - t] raises level t to before the step from there: algorithm 2.
    """
    sigma = schedule.sigma
    x_t = schedule.noise_scale * noise[0]  # (B, C, H, W)
    for t in range(steps - 1, 0, -1):
        start = t
        if len(schedule) > steps:
            start = steps + t
            added = (sigma[start] ** 2 - sigma[t] ** 2).sqrt()
            x_t = x_t + STOCHASTIC["noise"] * added * noise[steps - t]
        step = sigma[t - 1] - sigma[start]
        slope = (x_t - x0_of(x_t, start)) / sigma[start]
        x_s = x_t + step * slope
        x_t = x_t + step * (slope + (x_s - x0_of(x_s, t - 1)) / sigma[t - 1]) / 2
    return x0_of(x_t, 0)


def stochastic_levels(steps):
    """EDM's levels, and after them those that each is raised to."""
    levels = models.edm_schedule(steps)
    gamma = min(STOCHASTIC["churn"] / steps, 2**0.5 - 1)
    within = (levels.sigma >= STOCHASTIC["low"]) & (levels.sigma <= STOCHASTIC["high"])
    raised = torch.where(within, (1 + gamma) * levels.sigma, levels.sigma)
    sigma = torch.cat([levels.sigma, raised])
    return models.Schedule(torch.ones_like(sigma), sigma, sigma.log() / 4, levels.noise_scale)


def column_noise(model, columns, steps, seed, first=0):
    """(steps, columns, C, H, W) of the columns from `first` on. It depends on the seed, the step
    and the column alone, not on how many there are."""
    noise = []
    for i in range(first, first + columns):
        generator = torch.Generator().manual_seed(data.mix_seed(seed, i))
        noise.append(torch.randn(steps, *model.sample_shape, generator=generator))
    return torch.stack(noise, 1).to(model.device)


def draw_in_batches(sampler, noise, cond, size):
    x0 = []
    for start in range(0, noise.shape[1], size):
        index = slice(start, start + size)
        x0.append(sampler.draw(noise[:, index], models.take(cond, index)))
    return torch.cat(x0)


def teacher_steps(model, asked=None):
    return asked or min(model.default_teacher_steps, len(model.schedule))


def check_steps(model, steps, first_timestep=None):
    levels = len(model.schedule) if first_timestep is None else first_timestep + 1
    if not steps <= levels <= len(model.schedule):
        raise UserError(
            f"{plural(steps, 'step')} and a first timestep of {levels - 1} do not fit the "
            f"{len(model.schedule)} noise levels of {model.name}"
        )


def teacher_statistics(model, prompts, args, count=64):
    """(mean, variance) over all elements of the teacher's samples without guidance."""
    noise = column_noise(model, count, 1, args.seed)
    cond = model.encode(prompts.draw(data.Draws(args.seed, 0, count)))
    teacher = TeacherSampler(model, teacher_steps(model), 1.0)
    x = draw_in_batches(teacher, noise, cond, args.micro_batch or count)
    return x.mean().item(), x.var().item()


# ---------------------------------------------------------------------------- teachers and students


@dataclass
class Student:
    """A student with the numbers of steps to draw it at. guidance: what it was distilled with, if
    that is known."""

    path: Path
    name: str
    denoiser: models.Denoiser
    steps: list
    first_timestep: int | None
    guidance: float | None

    def samplers(self, model):
        made = []
        for steps in self.steps:
            timesteps = model.schedule.timesteps(steps, self.first_timestep)
            made.append(StudentSampler(self.denoiser, timesteps, self.name))
        return made


def teacher_place(config):
    """Where a run's teacher lies, whatever it was called by; a hub id as it is."""
    name = data.model_path(config["model"])
    return str(Path(name).resolve()) if Path(name).exists() else name


def short_name(path, paths):
    """What a table calls a student: the last part of its path that is its own."""
    if len(paths) == 1:
        return "student"
    parts = [Path(other).parts for other in paths]
    for i in range(1, 1 + min(map(len, parts))):
        if len({own[-i:] for own in parts}) == len(parts):
            return "/".join(Path(path).parts[-i:])
    return str(path)


def load_teacher(args, config):
    """The model that --model names, or else the one of the run with that configuration."""
    if args.vae == "none":
        raise UserError("--vae none leaves out the decoder, without which there are no images")
    device, dtype = fsdp.device_and_dtype(args)
    path = data.model_path(args.model or config.get("model"))
    if not args.model and Path(path).is_absolute() and not Path(path).exists():
        raise UserError(f"the run's teacher, {path}, is gone: name its new place by --model")
    model = models.load_model(
        path,
        device,
        dtype,
        vae=args.vae,
        config=args.config,
        weights_dtype=dtype,
        encoder_device=args.encoder_device,
        image_size=args.image_size or config.get("image_size"),
        guidance_norm=args.guidance_norm or config.get("guidance_norm"),
    )
    args.teacher_steps = teacher_steps(model, args.teacher_steps)
    check_steps(model, args.teacher_steps)
    return model


def load_teacher_and_students(args, paths):
    """The model, the students at these paths, and the guidance scale. What the command line leaves
    open, the students' runs know."""
    for path in paths:
        if not Path(path).exists():
            raise UserError(
                f"there is no student at {path}: make one by `python train.py`, or name another by "
                "--student"
            )
    configs = [students.run_config(path) for path in paths]
    teachers = {teacher_place(config): config for config in configs if "model" in config}
    if len(teachers) > 1 and not args.model:
        listed = " and ".join(sorted(teachers))
        raise UserError(
            f"the students have different teachers, {listed}: name the one to compare with by "
            "--model"
        )
    model = load_teacher(args, next(iter(teachers.values()), {}))
    loaded = []
    for path, config in zip(paths, configs):
        most = config.get("student_steps", 4)
        steps = sorted({most, max(1, most // 2), 1}, reverse=True)
        steps = args.steps or (steps if len(paths) == 1 else [most])
        first = args.first_timestep
        first = config.get("first_timestep") if first is None else first
        check_steps(model, max(steps), first)
        denoiser = students.load_student(path, model)
        name, guidance = short_name(path, paths), config.get("guidance")
        loaded.append(Student(Path(path), name, denoiser, steps, first, guidance))
    known = [student.guidance for student in loaded if student.guidance]
    known.append(model.default_guidance)
    return model, loaded, args.guidance or known[0]


# ----------------------------------------------------------------------------- command line


def chosen_prompts(words):
    prompts = list(words)
    if len(words) == 1 and is_prompt_file(words[0]):
        prompts = read_prompts(words[0])
    if not any(prompt.strip() for prompt in prompts):
        raise UserError("--prompts holds no prompt")
    return prompts


def timed(sampler, noise, cond, size):
    """x0 and the seconds it took, the better of two runs: another process may disturb one."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        x0 = draw_in_batches(sampler, noise, cond, size)
        if x0.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return x0, min(seconds)


def save_images(folder, label, about, prompts, images):
    """One PNG each, which says how it was made."""
    title = label.replace("\n", ", ").replace("/", "-")
    for i, (prompt, image) in enumerate(zip(prompts, images)):
        info = PngInfo()
        for name, value in (about | {"sampler": title, "prompt": prompt, "column": i}).items():
            info.add_text(name, str(value))
        path = Path(folder) / f"{i:03d} {title}.png"
        pictures.save(pictures.to_pil(image), path, pnginfo=info)


def main(arguments=None):
    args = flags.sample_parser(__doc__).parse_args(arguments)
    chosen = chosen_prompts(args.prompts) if args.prompts else None
    if Path(args.out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {args.out} should end in .png, .jpg or .webp")
    paths = args.compare or [args.student or flags.DEFAULT_RUN]
    model, loaded, guidance = load_teacher_and_students(args, paths)
    prompts = chosen or model.sample_prompts or PROMPTS
    data.warn_of_cut(model, prompts)
    cond = model.encode(prompts)

    steps = {steps for student in loaded for steps in student.steps}
    samplers = []
    for count in (args.teacher_steps, *sorted({max(steps), min(steps)}, reverse=True)):
        samplers.append(TeacherSampler(model, count, guidance, args.sampler))
    for student in loaded:
        samplers += student.samplers(model)
    most = max(sampler.noises for sampler in samplers)
    noise = column_noise(model, len(prompts), most, args.seed)
    draw_in_batches(samplers[-1], noise, cond, args.batch_size)  # the first call is slower

    rows, first = [], None
    about = {"model": model.name, "students": ", ".join(map(str, paths))}
    about |= {"seed": args.seed, "dtype": args.dtype}
    for sampler in samplers:
        x0, seconds = timed(sampler, noise, cond, args.batch_size)
        seconds /= len(prompts)
        first = first or seconds
        speed = f"{seconds * 1000:.3g} ms an image\n{first / seconds:.3g} x the speed"
        title = f"{sampler.label}\n{speed}"
        print(title.replace("\n", ", "), flush=True)
        images = model.decode(x0, args.batch_size)
        rows.append((title, images))
        if args.images:
            save_images(args.images, sampler.label, about, prompts, images)
    pictures.draw_grid(rows, [model.caption(prompt) for prompt in prompts], args.out)
    print(f"images: {args.out}" + (f", {args.images}/" if args.images else ""))


if __name__ == "__main__":
    cli.run(main)
