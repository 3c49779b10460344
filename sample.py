"""Draw students beside their teacher: the same prompts and the same noise, one row a model.

    python sample.py                                                  # the student of `python train.py`
    python sample.py --prompts "cat face" "red apple" "crescent moon" # words ...
    python sample.py --prompts prompts.txt --out grid.png             # ... or a file, one prompt a line
    python sample.py --student runs/mine --steps 4 1 --guidance 5     # another run; rows for 4 and 1 student steps
    python sample.py --student runs/imagenet --prompts 207 "giant panda"    # classes, by number or name
    python sample.py --student dmd2_sdxl_4step_unet_fp16.bin --model stabilityai/stable-diffusion-xl-base-1.0 --dtype fp16 --images out

Rows: the teacher at --teacher-steps with guidance, the teacher at the most and the fewest steps of the student (what
distillation buys), then the student. Seconds a picture are the sampler's, decoding left out; the ratio is to the first row.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

import data
import errors
import models
from errors import UserError

DEFAULT_RUN = "runs/dmd2"
DEFAULT_GUIDANCE, DEFAULT_TEACHER_STEPS = 3.0, 50
PROMPTS = ("cat face with wry smile", "red apple", "crescent moon", "rocket", "heart with arrow", "penguin", "hot beverage", "cat")


@dataclass
class Row:
    """One way of making pictures. draw(noise, cond) -> x0, noise (S, B, ...): a sampler uses the first `noises` of the S."""
    label: str
    draw: Callable
    noises: int = 1


SAMPLERS = ("deterministic", "heun", "stochastic")


def default_sampler(model):
    return "heun" if model.prediction == "edm" else "deterministic"


def teacher_row(model, steps, guidance, sampler=None):
    """sampler: deterministic is ours, for all models; heun and stochastic are EDM's, for its networks, with levels of their own, as many as
    steps; heun is these networks' default."""
    sampler = sampler or default_sampler(model)
    if sampler != "deterministic" and model.prediction != "edm":
        raise UserError(f"--sampler {sampler} is of EDM's networks; {model.name} is none")
    levels = {"deterministic": model.schedule, "heun": models.edm_schedule(steps), "stochastic": models.stochastic_levels(steps)}[sampler].to(model.device)
    teacher = lambda x_t, t, cond: model.teacher(x_t, t, cond, levels)

    @torch.no_grad()
    def draw(noise, cond):
        x0_of = lambda x_t, t: models.guided_x0(teacher, x_t, t, cond, model.uncond, guidance)
        if sampler == "deterministic":
            return models.deterministic_sample(x0_of, noise[0], levels.timesteps(steps), levels)
        return models.heun_sample(x0_of, noise, levels, steps)

    named = "" if sampler == "deterministic" else f"\n{sampler}, {2 * steps - 1} pass{'es' * (steps > 1)}"
    return Row(f"teacher, {steps} step{'s' * (steps > 1)}{named}\nguidance {guidance:g}", draw, steps if sampler == "stochastic" else 1)


def student_row(student, timesteps, name="student"):
    @torch.no_grad()
    def draw(noise, cond):
        return models.rollout(student, noise[:len(timesteps)], cond, timesteps)

    return Row(f"{name}, {len(timesteps)} step{'s' * (len(timesteps) > 1)}", draw, len(timesteps))


def column_noise(model, columns, steps, seed, first=0):
    """(steps, columns, C, H, W) of columns `first` and on. Noise depends on the seed, its step and its column alone, not on how many there are."""
    columns = [torch.randn(steps, *model.sample_shape, generator=torch.Generator().manual_seed(data.mix_seed(seed, i)))
               for i in range(first, first + columns)]
    return torch.stack(columns, 1).to(model.device)


# ---------------------------------------------------------------------------------------------------- pictures

def draw_grid(rows, columns, path):
    """rows: [(label, pictures (N, 3, H, W) in [0, 1]), ...]; columns: N captions. Writes a PNG."""
    size = rows[0][1].shape[-1]
    zoom = max(1, 128 // size)
    cell, left, top = size * zoom + 8, 190, 56
    font = ImageFont.load_default(14)
    sheet = Image.new("RGB", (left + cell * len(columns), top + cell * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, caption in enumerate(columns):
        pen.multiline_text((left + cell * (i + 0.5), top - 6), wrap(caption, font, cell - 6), font=font, fill="black", anchor="md",
                           align="center")
    for j, (label, pictures) in enumerate(rows):
        pen.multiline_text((10, top + cell * (j + 0.5)), label, font=font, fill="black", anchor="lm", spacing=5)
        for i, picture in enumerate(pictures):
            tile = to_image(picture).resize((size * zoom, size * zoom), Image.Resampling.BICUBIC)
            sheet.paste(tile, (left + cell * i + 4, top + cell * j + 4))
    save_picture(sheet, path)


def captions(model, prompts):
    """What columns are called: a class has a number and a name."""
    return [model.caption(prompt) for prompt in prompts] if hasattr(model, "caption") else prompts


def to_image(picture):
    """(3, H, W) in [0, 1] -> PIL."""
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def wrap(text, font, width, lines=3):
    """Break at spaces so that each line fits; what does not fit into `lines` is cut with dots."""
    out = [""]
    for word in (text or "(no prompt)").split():
        longer = f"{out[-1]} {word}".strip()
        out = out[:-1] + [longer] if font.getlength(longer) <= width or not out[-1] else out + [word]
    return "\n".join(out[:lines] if len(out) <= lines else out[:lines - 1] + [out[lines - 1] + "..."])


def draw_curves(curves, path):
    """curves: {title: [(x, y), ...]}; one small panel each, in a column of two."""
    width, height, font = 420, 190, ImageFont.load_default(13)
    rows = (len(curves) + 1) // 2
    sheet = Image.new("RGB", (2 * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (title, points) in enumerate(curves.items()):
        x0, y0, w, h = (k % 2) * width + 62, (k // 2) * height + 26, width - 80, height - 54
        pen.rectangle((x0, y0, x0 + w, y0 + h), outline="gray")
        pen.text((x0, y0 - 20), title, font=font, fill="black")
        if not points:
            continue
        xs, ys = zip(*points)
        low, high = min(ys), max(ys)
        span, reach = (high - low) or 1.0, (xs[-1] - xs[0]) or 1
        line = [(x0 + w * (x - xs[0]) / reach, y0 + h - h * (y - low) / span) for x, y in points]
        pen.line(line if len(line) > 1 else line * 2, fill="steelblue", width=2)
        pen.text((x0 - 5, y0), f"{high:.3g}", font=font, fill="black", anchor="rm")
        pen.text((x0 - 5, y0 + h), f"{low:.3g}", font=font, fill="black", anchor="rm")
        pen.text((x0, y0 + h + 4), str(xs[0]), font=font, fill="black")
        pen.text((x0 + w, y0 + h + 4), f"iteration {xs[-1]}", font=font, fill="black", anchor="ra")
    save_picture(sheet, path)


def write_text(sheet, text, place):
    ImageDraw.Draw(sheet).text(place, text, font=ImageFont.load_default(14), fill="black", anchor="lm")


def save_picture(picture, path, **options):
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture {path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


# ---------------------------------------------------------------------------------------------------- command line

def add_common_flags(parser):
    """Flags that sample.py and eval.py share."""
    parser.add_argument("--student", metavar="PATH", help="run directory, UNet directory, file of a UNet's weights (.safetensors, .bin, .pt) or LoRA file "
                                                         f"(default {DEFAULT_RUN})")
    parser.add_argument("--model", metavar="PATH", help="the teacher (default: the one the student's run names, else the embedded one)")
    parser.add_argument("--steps", type=errors.positive, nargs="+",
                        help="numbers of student steps (default: what it was distilled for, half of it, and 1)")
    parser.add_argument("--first-timestep", type=errors.natural, metavar="T", help="of the student's sampler (default: what it was distilled for, else the noisiest)")
    parser.add_argument("--teacher-steps", type=errors.positive, help=f"(default: {DEFAULT_TEACHER_STEPS}, or 18 of EDM's networks)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="of the teacher: deterministic is ours (DDIM); heun and stochastic are EDM's, for its networks, "
                                                            "whose default is heun")
    parser.add_argument("--guidance", type=errors.positive_number, help="of the teacher (default: what the student was distilled with, else 3, or 1 for classes)")
    parser.add_argument("--seed", type=errors.natural, default=0, help="of the noise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=errors.dtype("float32", "bfloat16", "float16"), default="float32", metavar="DTYPE",
                        help="float32, bfloat16 (bf16) or float16 (fp16): of networks and matrix products; the decoder stays float32")
    parser.add_argument("--vae", metavar="PATH", help="another decoder, such as madebyollin/taesd")
    parser.add_argument("--vae-device", metavar="DEVICE", help="such as cpu (default: --device)")
    parser.add_argument("--text-device", metavar="DEVICE", help="of the text encoders (default: --device)")


def run_configuration(student):
    """config.json of the run whose directory, student/, checkpoint or LoRA file that is; nothing of anything else."""
    path = Path(student).absolute()
    for run, inside in ((path, path), (path.parent, path), (path.parent.parent, path.parent)):
        if (run / "config.json").is_file() and ((run / "student").is_dir() and inside in (run, run / "student") or inside == run / "checkpoints"):
            return models.read_json(run / "config.json")
    return {}


@dataclass
class Student:
    """A student with the steps that it is drawn at. name: what rows call it. guidance: what it was distilled with, if that is known."""
    path: Path
    name: str
    denoiser: models.Denoiser
    steps: list
    first_timestep: int | None
    guidance: float | None

    @classmethod
    def load(cls, path, model, args, steps, name="student"):
        config = run_configuration(path)
        first = args.first_timestep if args.first_timestep is not None else config.get("first_timestep")
        check_steps(model, max(steps), first)
        return cls(Path(path), name, models.load_student(path, model), steps, first, config.get("guidance"))

    def rows(self, model):
        return [student_row(self.denoiser, model.schedule.timesteps(steps, self.first_timestep), self.name) for steps in self.steps]


def default_teacher_steps(model):
    return min(getattr(model, "default_teacher_steps", DEFAULT_TEACHER_STEPS), len(model.schedule))


def check_steps(model, steps, first_timestep=None):
    levels = len(model.schedule) if first_timestep is None else first_timestep + 1
    if not steps <= levels <= len(model.schedule):
        raise UserError(f"{steps} steps, or a first timestep of {levels - 1}, are more than the {len(model.schedule)} noise levels of {model.name}")


def load_teacher(args, config):
    """The model that --model names, or else the run with that configuration."""
    if args.vae == "none":
        raise UserError("--vae none leaves out the decoder, without which there are no pictures")
    dtype = getattr(torch, args.dtype)
    model = models.load_model(args.model or config.get("model") or data.EMOJI_TEACHER, args.device, dtype, vae=args.vae, held_in=dtype,
                              text_device=args.text_device, vae_device=args.vae_device)
    args.teacher_steps = args.teacher_steps or default_teacher_steps(model)
    args.sampler = args.sampler or default_sampler(model)
    check_steps(model, args.teacher_steps)
    return model


def load_teacher_and_students(args, paths):
    """The model, the students at these paths with the steps to draw each at, and the guidance scale to use: what is not said the students'
    runs know."""
    for path in paths:
        if not Path(path).exists():
            hint = ": make one with `python train.py`, or name another with --student" if str(path) == DEFAULT_RUN else ""
            raise UserError(f"there is no student at {path}{hint}")
    configs = [run_configuration(path) for path in paths]
    teachers = {str(teacher_path(config)): config for config in configs if "model" in config}
    if len(teachers) > 1 and not args.model:
        raise UserError(f"the students have different teachers, {' and '.join(sorted(teachers))}: name the one to compare with by --model")
    model, students = load_teacher(args, next(iter(teachers.values()), {})), []
    for path, config in zip(paths, configs):
        most = config.get("student_steps", 4)
        steps = args.steps or ([most] if len(paths) > 1 else sorted({most, max(1, most // 2), 1}, reverse=True))
        students.append(Student.load(path, model, args, steps, short_name(path, paths)))
    known = [student.guidance for student in students if student.guidance]
    return model, students, args.guidance or (known[0] if known else getattr(model, "default_guidance", DEFAULT_GUIDANCE))


def teacher_path(config):
    """Where a run's teacher lies, whatever it was called by; a hub id as it is."""
    name = data.EMBEDDED.get(config["model"], config["model"]) or data.EMOJI_TEACHER
    return Path(name).resolve() if Path(name).exists() else name


def short_name(path, paths):
    """What a table calls a student: the last part of its path that is its own."""
    if len(paths) == 1:
        return "student"
    parts = [Path(other).parts for other in paths]
    for i in range(1, 1 + min(map(len, parts))):
        if len({own[-i:] for own in parts}) == len(parts):
            return "/".join(Path(path).parts[-i:])
    return str(path)


def parse_arguments():
    parser = errors.Parser(__doc__)
    add_common_flags(parser)
    parser.add_argument("--prompts", nargs="+", help="prompts in quotes, or one file of them: .txt, one a line, or a pickled list")
    parser.add_argument("--out", default="samples.png", metavar="FILE")
    parser.add_argument("--images", metavar="DIR", help="write each picture as a PNG of its own too, with prompt and settings in its metadata")
    parser.add_argument("--batch-size", type=errors.positive, default=8, help="pictures drawn at once")
    parser.add_argument("--vae-slicing", action="store_true", help="decode one picture at a time")
    return parser.parse_args()


def chosen_prompts(words):
    prompts = data.read_prompts(words[0]) if len(words) == 1 and words[0].endswith((".txt", ".pkl")) else list(words)
    if not any(prompt.strip() for prompt in prompts):
        raise UserError("--prompts holds no prompt")
    return prompts


def draw_in_batches(row, noise, cond, size):
    parts = range(0, noise.shape[1], size)
    return torch.cat([row.draw(noise[:, i:i + size], models.samples(cond, slice(i, i + size))) for i in parts])


def timed(row, noise, cond, size):
    """x0 and the seconds it took, the better of two runs, since another process may disturb one."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        x0 = draw_in_batches(row, noise, cond, size)
        if x0.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return x0, best


def save_images(folder, rows, prompts, model, args):
    """rows: [(Row, pictures), ...]. One PNG each, which says how it was made."""
    for row, pictures in rows:
        title = row.label.replace("\n", ", ")
        for i, (prompt, picture) in enumerate(zip(prompts, pictures)):
            about = PngInfo()
            for name, value in (("prompt", prompt), ("sampler", title), ("model", model.name), ("student", str(args.student or DEFAULT_RUN)), ("seed", args.seed),
                                ("column", i), ("dtype", args.dtype)):
                about.add_text(name, str(value))
            save_picture(to_image(picture), Path(folder) / f"{i:03d} {title}.png", pnginfo=about)


def main():
    args = parse_arguments()
    chosen = chosen_prompts(args.prompts) if args.prompts else None
    if Path(args.out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {args.out} should end in .png, .jpg or .webp")
    model, (student,), guidance = load_teacher_and_students(args, [args.student or DEFAULT_RUN])
    if args.vae_slicing:
        if not getattr(model, "vae", None):
            raise UserError(f"--vae-slicing: {model.name} has no decoder")
        model.vae.enable_slicing()
    prompts = chosen or getattr(model, "sample_prompts", PROMPTS)
    cond = model.encode(prompts)
    few = sorted({max(student.steps), min(student.steps)}, reverse=True)
    rows = [teacher_row(model, steps, guidance, args.sampler) for steps in (args.teacher_steps, *few)] + student.rows(model)
    noise = column_noise(model, len(prompts), max(row.noises for row in rows), args.seed)
    draw_in_batches(rows[-1], noise, cond, args.batch_size)  # the first call of all is slower than the rest, and no row should pay for that
    drawn, first = [], None
    for row in rows:
        x0, seconds = timed(row, noise, cond, args.batch_size)
        seconds /= len(prompts)
        first = first or seconds
        label = f"{row.label}\n{seconds * 1000:.3g} ms a picture\n{first / seconds:.3g} x the speed"
        print(label.replace("\n", ", "))
        drawn.append((label, x0))
    if hasattr(model, "draw_rows"):  # the plane: clouds of points
        model.draw_rows(drawn, prompts, args.out)
    else:
        drawn = [(label, model.decode(x0, args.batch_size)) for label, x0 in drawn]
        draw_grid(drawn, captions(model, prompts), args.out)
        if args.images:
            save_images(args.images, [(row, pictures) for row, (_, pictures) in zip(rows, drawn)], prompts, model, args)
    print(f"pictures: {args.out}" + (f", {args.images}/" if args.images else ""))


if __name__ == "__main__":
    errors.run(main)
