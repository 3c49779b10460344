"""Distil a diffusion teacher into a few-step student by distribution matching.

    python train.py                                  # the embedded teacher, 4 steps, about eleven minutes on two CPU cores
    python train.py --resume                         # go on where an interrupted run was
    python train.py --out runs/one --student-steps 1 # a one-step student in a run directory of its own
    python train.py --model DIR --prompts FILE.txt   # any Stable Diffusion 1.5 pipeline in diffusers format
    python train.py --benchmark 20                   # seconds an iteration, and what of them the networks take

The run directory holds config.json, metrics.jsonl, curves.png, pictures/, state.pt (for --resume) and student/, the averaged
student as a diffusers UNet.
"""

import copy
import json
import math
import signal
import sys
import time

import torch
from tqdm import tqdm

import data
import errors
import fsdp
import losses
import models
import sample

VARIANTS = ("dmd2",)
LOG_EVERY = 10
# Where the health figures of a run that goes well stay; see losses.health. std is relative to the teacher's samples.
HEALTHY = {
    "std": (0.7, 1.4, "below: the student goes grey or blurred; above: it over-saturates. Try a lower --guidance or learning rate"),
    "gap": (0.0, 2.5, "the fake score does not keep up with the student. Try a higher --fake-updates or --fake-learning-rate, "
                      "or a lower --learning-rate"),
}


def parse_arguments():
    parser = errors.Parser(__doc__)
    method = parser.add_argument_group("method")
    method.add_argument("--model", metavar="PATH", help="diffusers directory, hub id or .safetensors file (default: the embedded teacher)")
    method.add_argument("--variant", choices=VARIANTS, default="dmd2", help="dmd2 here is without its GAN")
    method.add_argument("--prompts", metavar="FILE", help="training prompts, one a line (default: the embedded set's captions)")
    method.add_argument("--student-steps", type=errors.positive, default=4, help="of the few-step sampler it is trained for")
    method.add_argument("--guidance", type=errors.positive_number, default=sample.DEFAULT_GUIDANCE, help="of the teacher; 1 is none")
    method.add_argument("--fake-updates", type=errors.positive, default=5, metavar="K", help="fake-score updates a student update")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--iterations", type=errors.positive, default=1500, help="fake-score updates in all")
    optimisation.add_argument("--batch-size", type=errors.positive, default=32, help="over all processes")
    optimisation.add_argument("--learning-rate", type=errors.positive_number, default=1e-4, help="of the student")
    optimisation.add_argument("--fake-learning-rate", type=errors.positive_number, default=1e-4, help="of the fake score")
    optimisation.add_argument("--warmup", type=errors.natural, default=50, help="iterations until the learning rates are reached")
    optimisation.add_argument("--clip", type=errors.positive_number, default=10.0, help="largest norm of a gradient")
    optimisation.add_argument("--ema", type=float, default=0.98, help="decay of the averaged student, a student update; 0 is none")
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="DIR", help="run directory (default: runs/VARIANT)")
    run.add_argument("--resume", nargs="?", const="", metavar="DIR",
                     help="go on with the run in DIR, or in --out, with the flags that it was started with")
    run.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")
    run.add_argument("--seed", type=errors.natural, default=0, help="everything random follows from it")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if torch.cuda.is_available() else "float32",
                     help="of matrix products; weights and optimizers are float32")
    run.add_argument("--picture-every", type=errors.positive, default=250, metavar="N", help="iterations between pictures")
    run.add_argument("--save-every", type=errors.positive, default=250, metavar="N", help="iterations between saves")
    run.add_argument("--benchmark", type=errors.positive, metavar="N", help="time N iterations and write nothing")
    args = parser.parse_args()
    if args.resume is not None:  # what is not said again stays as it was
        parser.set_defaults(**fsdp.read_configuration(args.resume or args.out or f"runs/{args.variant}"))
        args = parser.parse_args()
    if not 0 <= args.ema < 1:
        parser.error(f"argument --ema: {args.ema} is not in [0, 1)")
    if args.out and args.resume:
        parser.error("--out and --resume DIR both name a run directory: use one")
    args.out = args.resume or args.out or f"runs/{args.variant}"
    return args


class Draws:
    """The random numbers of one iteration, from the seed and the iteration alone: a run can stop anywhere and go on bit for
    bit, and no state of a generator has to be saved."""

    def __init__(self, seed, iteration, device):
        self.generator = torch.Generator().manual_seed(data.mix_seed(seed, iteration))
        self.device = device

    def step(self, steps):
        """A plain number below `steps`, the same for all samples: it never goes to the accelerator."""
        return int(torch.randint(steps, (), generator=self.generator))

    def integers(self, low, high, shape):
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.device)


class Networks:
    """Teacher, student and fake score, all three the same network at the start, and what moves the latter two."""

    def __init__(self, model, args):
        self.model, self.schedule, self.teacher = model, model.schedule, model.teacher
        self.student = copy.deepcopy(model.teacher).requires_grad_(True)
        self.fake_score = copy.deepcopy(model.teacher).requires_grad_(True)
        self.averaged_student = copy.deepcopy(model.teacher)
        self.student_optimizer = torch.optim.AdamW(self.student.parameters(), lr=args.learning_rate, weight_decay=0.01)
        self.fake_optimizer = torch.optim.AdamW(self.fake_score.parameters(), lr=args.fake_learning_rate, weight_decay=0.01)
        self.uncond = model.encode([""])
        self.timesteps = model.schedule.timesteps(args.student_steps)

    def parts(self):
        """All that changes, by the names it has in state.pt."""
        return {"student": self.student.network, "fake_score": self.fake_score.network,
                "averaged_student": self.averaged_student.network,
                "student_optimizer": self.student_optimizer, "fake_optimizer": self.fake_optimizer}


# ---------------------------------------------------------------------------------------------------- the two steps

def student_step(networks, x, cond, draws, args):
    """Move the student so that its samples x (B, C, H, W), which carry its graph, become likelier under the teacher and
    less likely under the fake score. Returns health figures."""
    T = len(networks.schedule)
    t = draws.integers(int(0.02 * T), int(0.98 * T) + 1, (len(x),))                              # (B,)
    eps = draws.normal(*x.shape)                                                                 # (B, C, H, W)
    with torch.no_grad():
        x_t = networks.schedule.add_noise(x, eps, t)
        x0_real = models.guided_x0(networks.teacher, x_t, t, cond, networks.uncond, args.guidance)
        x0_fake = networks.fake_score(x_t, t, cond)
    direction = losses.dmd_direction(x.detach(), x0_real, x0_fake)
    x.backward(direction / x.numel())  # the gradient of losses.surrogate_loss(x, direction)
    norm = fsdp.clip_gradients(networks.student, args.clip, "student")
    networks.student_optimizer.step()
    networks.student_optimizer.zero_grad()
    with torch.no_grad():
        torch._foreach_lerp_(list(networks.averaged_student.parameters()), list(networks.student.parameters()), 1 - args.ema)
    return {"student_grad_norm": norm, "direction": direction.abs().mean(), **losses.health(x, x0_real, x0_fake)}


def fake_score_step(networks, x, cond, draws, args):
    """Keep the fake score a denoiser of the student's present samples x (B, C, H, W), without their graph."""
    t = draws.integers(0, len(networks.schedule), (len(x),))                                     # (B,)
    x_t = networks.schedule.add_noise(x, draws.normal(*x.shape), t)                              # (B, C, H, W)
    x0_fake = networks.fake_score(x_t, t, cond)
    loss = losses.denoising_loss(x0_fake, x, losses.denoising_weight(networks.fake_score.prediction, *networks.schedule.at(t, x)))
    loss.backward()
    norm = fsdp.clip_gradients(networks.fake_score, args.clip, "fake score")
    networks.fake_optimizer.step()
    networks.fake_optimizer.zero_grad()
    return {"fake_loss": loss.detach(), "fake_grad_norm": norm}


def iterate(networks, prompts, iteration, args):
    """One iteration: samples of the student, every K-th time a student step on them, and always a fake-score step."""
    draws = Draws(args.seed, iteration, networks.model.device)
    cond = networks.model.encode(prompts.draw(args.batch_size, draws.generator))
    student_turn = iteration % args.fake_updates == 0
    for optimizer, lr in ((networks.student_optimizer, args.learning_rate), (networks.fake_optimizer, args.fake_learning_rate)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (iteration + 1) / (args.warmup + 1))

    # Backward simulation: the student's own samples at a step of its sampler that this iteration's draw chooses.
    step = draws.step(len(networks.timesteps))
    noise = draws.normal(step + 1, args.batch_size, *networks.model.sample_shape)
    with torch.set_grad_enabled(student_turn):
        x = models.rollout(networks.student, noise, cond, networks.timesteps[:step + 1])         # (B, C, H, W)

    figures = student_step(networks, x, cond, draws, args) if student_turn else {}
    return figures | fake_score_step(networks, x.detach(), cond, draws, args)


# ---------------------------------------------------------------------------------------------------- what a run leaves behind

class Log:
    """metrics.jsonl, the curves, and one warning a health figure when it leaves its range."""

    def __init__(self, out, teacher_std, iteration):
        self.path, self.teacher_std, self.waiting, self.warned = out / "metrics.jsonl", teacher_std, {}, set()
        rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        self.rows = [row for row in rows if row["iteration"] <= iteration]  # of a resumed run: what its state knows of
        fsdp.replace_file(self.path, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in self.rows)))

    def add(self, iteration, figures, seconds):
        """Keep tensors, so that the accelerator is waited for only every LOG_EVERY iterations, when their means are written."""
        for name, value in figures.items():
            self.waiting.setdefault(name, []).append(value)
        if iteration % LOG_EVERY:
            return None
        row = {"iteration": iteration, "seconds": round(seconds, 2)}
        row |= {name: torch.stack(values).mean().item() for name, values in self.waiting.items()}
        if not all(math.isfinite(value) for value in row.values()):
            raise fsdp.NotFinite(f"a figure of iteration {iteration} is not finite: {row}")
        self.waiting = {}
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def check_health(self):
        """Means over the last 50 rows, so that one odd batch raises no alarm."""
        for name, (low, high, meaning) in HEALTHY.items():
            values = [row[name] for row in self.rows[-50:] if name in row]
            value = sum(values) / len(values) / (self.teacher_std if name == "std" else 1) if values else low
            if not low <= value <= high and name not in self.warned:
                self.warned.add(name)
                tqdm.write(f"warning: the health figure {name} is {value:.2f}, outside [{low}, {high}]: {meaning}")

    def draw_curves(self):
        names = ("fake_loss", "direction", "std", "gap", "cosine", "student_grad_norm")
        sample.draw_curves({name: [(row["iteration"], row[name]) for row in self.rows if name in row] for name in names},
                           self.path.parent / "curves.png")


class Gallery:
    """A picture of the run every so often, from the same prompts and the same noise each time."""

    def __init__(self, out, networks, prompts, args):
        self.out, self.networks, self.args = out / "pictures", networks, args
        self.prompts = [prompts.texts[i * len(prompts.texts) // 8] for i in range(min(8, len(prompts.texts)))]
        self.cond = networks.model.encode(self.prompts)
        self.noise = sample.column_noise(networks.model, len(self.prompts), args.student_steps + 1, args.seed)
        row = sample.teacher_row(networks.model, min(50, len(networks.schedule)), args.guidance)
        self.x_teacher = row.draw(self.noise, self.cond)
        self.teacher = (row.label, networks.model.decode(self.x_teacher))

    def draw(self, iteration):
        networks, steps = self.networks, self.args.student_steps
        row = sample.student_row(networks.model, networks.averaged_student, steps)
        x = row.draw(self.noise, self.cond)
        t = len(networks.schedule) // 2
        with torch.no_grad():
            x_t = networks.schedule.add_noise(x, self.noise[-1], torch.full((len(x),), t, device=x.device))
            x0_real = models.guided_x0(networks.teacher, x_t, t, self.cond, networks.uncond, self.args.guidance)
            x0_fake = networks.fake_score(x_t, t, self.cond)
        decode = networks.model.decode
        sample.draw_grid([self.teacher, (row.label, decode(x)), (f"teacher's x0 of it\ndiffused to t = {t}", decode(x0_real)),
                          ("fake score's x0\nof the same", decode(x0_fake))],
                         self.prompts, self.out / f"{iteration:06d}.png")


def save_student(out, networks):
    with models.quiet_libraries():
        fsdp.replace_folder(out / "student", networks.averaged_student.network.save_pretrained)


def save(out, networks, iteration):
    """The averaged student for use, and everything for --resume."""
    save_student(out, networks)
    fsdp.save_state(out, {"iteration": iteration} | {name: part.state_dict() for name, part in networks.parts().items()})


def restore(out, networks):
    """Put a saved state back; returns the number of iterations it has seen."""
    state = fsdp.load_state(out, networks.model.device)
    try:
        for name, part in networks.parts().items():
            part.load_state_dict(state[name])
        return state["iteration"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise errors.UserError(f"{out}/state.pt is no state of this run: {models.first_line(error)}") from None


# ---------------------------------------------------------------------------------------------------- the loop

def train(networks, prompts, config, args):
    # Where to write, and where to start.
    size = sum(p.numel() * p.element_size() for p in networks.student.parameters())
    if args.resume is not None:
        fsdp.check_same_configuration(args.out, config, may_differ=("iterations", "device", "dtype"))
    out = fsdp.prepare_run_directory(args.out, args.resume is not None, args.overwrite, bytes_needed=10 * size)
    start = restore(out, networks) if args.resume is not None else 0
    fsdp.replace_file(out / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))

    # What the run is watched by.
    gallery = Gallery(out, networks, prompts, args)
    log = Log(out, gallery.x_teacher.flatten(1).std(dim=1).mean().item(), start)
    if start == 0:
        gallery.draw(0)
    elif start >= args.iterations:
        print(f"this run has had its {start} iterations already; --iterations asks for more")
    with StopAtSignal() as stop:
        loop(networks, prompts, args, out, gallery, log, start, stop)
    print(f"pictures: {out}/pictures, curves: {out}/curves.png, student: {out}/student")
    print(f"sample it: python sample.py --student {out}")


def loop(networks, prompts, args, out, gallery, log, start, stop):
    began = time.perf_counter() - (log.rows[-1]["seconds"] if log.rows else 0)
    progress = tqdm(range(start, args.iterations), initial=start, total=args.iterations, desc=args.variant, unit="it")

    for iteration in progress:
        # Student step and fake-score step.
        try:
            figures = iterate(networks, prompts, iteration, args)
            row = log.add(iteration + 1, figures, time.perf_counter() - began)
        except fsdp.NotFinite as error:
            progress.close()
            save_student(out, networks)
            sys.exit(f"train.py: stopped at iteration {iteration + 1}: {error}. The last good student is in {out / 'student'}; "
                     f"a lower --learning-rate or --clip usually helps.")

        # Log, picture, save.
        done = iteration + 1
        if row:
            log.check_health()
            progress.set_postfix({name: f"{row[name]:.3f}" for name in ("fake_loss", "std", "gap") if name in row})
        if done % args.picture_every == 0 or done == args.iterations:
            gallery.draw(done)
            log.draw_curves()
        if done % args.save_every == 0 or done == args.iterations or stop.asked:
            save(out, networks, done)
        if stop.asked and done < args.iterations:
            progress.close()
            print(f"interrupted after {done} of {args.iterations} iterations; go on with: python train.py --resume {out}")
            sys.exit(130)


class StopAtSignal:
    """Ctrl-C and SIGTERM are noted and obeyed between two iterations; a second one stops at once."""

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------- benchmark

def benchmark(networks, prompts, args):
    """Time N iterations, and in turn the network calls that those same iterations cannot avoid, nothing else."""
    warm, device = 2 * args.fake_updates, networks.model.device

    def seconds(call):
        for iteration in range(warm):
            call(iteration)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for iteration in tqdm(range(warm, warm + args.benchmark), desc=call.__name__):
            call(iteration)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / args.benchmark

    x = torch.randn(args.batch_size, *networks.model.sample_shape, device=device)
    cond = networks.model.encode([""] * args.batch_size)
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in cond.items()}

    def whole_iteration(iteration):
        iterate(networks, prompts, iteration, args)

    def network_calls(iteration):
        draws = Draws(args.seed, iteration, device)
        prompts.draw(args.batch_size, draws.generator)
        step = draws.step(len(networks.timesteps))
        student_turn = iteration % args.fake_updates == 0
        with torch.no_grad():
            for _ in range(step + (not student_turn)):
                networks.student(x, 500, cond)
            if student_turn:
                networks.teacher(torch.cat([x, x]) if args.guidance != 1 else x, 500, twice if args.guidance != 1 else cond)
                networks.fake_score(x, 500, cond)
        if student_turn:
            networks.student(x, 500, cond).backward(x)
        networks.fake_score(x, 500, cond).backward(x)
        networks.student.zero_grad()
        networks.fake_score.zero_grad()

    whole, calls = seconds(whole_iteration), seconds(network_calls)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{whole:.4f} s an iteration, {whole / calls:.3f} times the bare network calls ({calls:.4f} s), "
          f"{args.batch_size / whole:.1f} samples a second, peak memory {peak / 2 ** 30:.2f} GiB")


def main():
    args = parse_arguments()
    fsdp.refuse_several_processes()
    prompts = data.training_prompts(args.prompts)
    model = models.load_model(args.model or data.EMOJI_TEACHER, args.device, getattr(torch, args.dtype))
    if args.student_steps > len(model.schedule):
        raise errors.UserError(f"--student-steps {args.student_steps} is more than the model's {len(model.schedule)} noise levels")
    networks = Networks(model, args)
    if args.benchmark:
        return benchmark(networks, prompts, args)
    unsaved = ("out", "resume", "overwrite", "benchmark")
    train(networks, prompts, {name: value for name, value in vars(args).items() if name not in unsaved}, args)


if __name__ == "__main__":
    errors.run(main)
