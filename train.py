"""Distil a diffusion teacher into a few-step student by distribution matching.

    python train.py                    # Decoupled DMD on the embedded teacher, 4 steps, on a laptop
    python train.py --variant dmd2                # another paper's method: a preset of the switches
    python train.py --student-steps 1                                                     # one step
    python train.py --resume runs/decoupled                         # go on with an interrupted run
    torchrun --standalone --nproc_per_node=2 train.py @recipes/sd15_decoupled_4step.args \\
        --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts captions.txt

A run directory holds config.json, metrics.jsonl, curves.png, images/, checkpoints/ (for --resume)
and student/, the averaged student as a diffusers network or LoRA.

Read here: draw_batch, what is random; iterate, what happens; student_step and read_scores, how the
student moves; fake_score_step, how the fake score follows. `nets` are support/networks.py's:
teacher, student, its average and fake score, which start as copies of one network, and two AdamW
optimizers.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from support import cli, flags

if __name__ == "__main__":
    cli.answer_early(flags.train_parser, __doc__, flags.announce_train)

import torch
from tqdm import tqdm

import data
import fsdp
import losses
import models
import sample
from models import take
from support import checkpoint, later, runlog, runs, students
from support.ahead import Ahead
from support.networks import Networks
from support.precision import keep_casts

# Each paper's method is a preset of the switches; a flag on the command line overrides it.
VARIANTS = {
    "dmd": {"student_steps": 1, "fake_updates": 1, "regression_weight": 0.25},  # 2311.18828
    "dmd2": {"gan_weight": 5e-3},  #                                              2405.14867
    "fdistill": {"gan_weight": 5e-3, "divergence": "js"},  #                      2502.15681
    "decoupled": {"schedule": "hybrid", "normaliser": "conditional"},  #          2511.22677
}

# At which noise levels DM and CA are read: all of --noise-levels, those cleaner than the student's
# input, or for CA the same x_t as for DM. 2511.22677
SCHEDULES = {
    "coupled": ("all", "same"),  # DMD2
    "full": ("all", "all"),
    "constrained": ("cleaner", "cleaner"),
    "hybrid": ("all", "cleaner"),  # Decoupled DMD
}

R1_DISTANCE = 0.1  # of the data beside real data, in their own units. FastGen's


# ----------------------------------------------------------------------------- one batch


@dataclass
class Sources:
    """What a run draws from: prompts, and where a switch needs them real data and pairs."""

    prompts: data.Prompts
    real: object = None
    pairs: data.Pairs | None = None


@dataclass
class Batch:
    """All that is random in an iteration, and what becomes of it. Batch first, on one rank."""

    cond: dict  # of the student's samples
    t_in: torch.Tensor  # (B,) the student's input timestep
    x_in: torch.Tensor | None = None  # (B, C, H, W) the student's input
    path: torch.Tensor | None = None  # (B, steps) its sampler's timesteps up to that one, alike
    noise: torch.Tensor | None = None  # (B, steps, C, H, W) of its sampler; off it one fewer
    # For the student's step: timesteps and noise of DM and CA; pairs for the regression.
    t_dm: torch.Tensor | None = None
    t_ca: torch.Tensor | None = None
    eps_dm: torch.Tensor | None = None
    eps_ca: torch.Tensor | None = None
    pair_noise: torch.Tensor | None = None
    pair_x0: torch.Tensor | None = None
    pair_cond: dict | None = None
    # For the fake score's step.
    t_fake: torch.Tensor | None = None
    eps_fake: torch.Tensor | None = None
    x_real: torch.Tensor | None = None
    eps_real: torch.Tensor | None = None
    eps_near: torch.Tensor | None = None
    cond_real: dict | None = None
    # Made of the above.
    x: torch.Tensor | None = None  # (B, C, H, W) the student's sample
    dm: torch.Tensor | None = None  # (B, C, H, W) directions, weighed and normalised
    ca: torch.Tensor | None = None
    extra: torch.Tensor | None = None  # (B, C, H, W) gradient of GAN and mean-variance terms
    logit: torch.Tensor | None = None  # (B,) at x_t of DM
    health: dict | None = None

    def split(self, size):
        """Micro-batches of at most `size` samples."""
        count = len(self.t_in)
        parts = []
        for start in range(0, count, size or count):
            index = slice(start, start + (size or count))
            fields = dataclasses.fields(self)
            values = {field.name: take(getattr(self, field.name), index) for field in fields}
            parts.append(Batch(**values))
        return parts


def draw_levels(schedule, noise_levels, t_in, T, draws, renoise_shift=1.0):
    """Timesteps of distribution matching and CFG augmentation, tau_DM and tau_CA (B,), for a
    student whose input was at t_in (B,). 2511.22677. renoise_shift moves tau_DM towards noise, as
    a flow model's shift does."""
    low, high = noise_levels
    low, high = int(low * T), min(int(high * T) + 1, T)
    t_in = t_in.cpu()
    ranges = {
        "all": (low, high),
        "cleaner": ((t_in // 2).clamp(max=low), t_in.clamp(min=1, max=high)),
    }
    kind_dm, kind_ca = SCHEDULES[schedule]
    t_dm = models.shift_timesteps(draws.integers(*ranges[kind_dm]), T, renoise_shift)
    t_ca = t_dm if kind_ca == "same" else draws.integers(*ranges[kind_ca])
    return t_dm, t_ca


def draw_batch(nets, sources, iteration, args):
    """All random numbers, prompts and data of an iteration, for this rank's samples."""
    model, schedule, T = nets.model, nets.schedule, len(nets.schedule)
    local = fsdp.local_slice(args.batch_size)
    draws = data.Draws(args.seed, iteration, args.batch_size, local, model.device)
    shape = model.sample_shape

    # What the student is given.
    timesteps = nets.timesteps
    if args.random_steps:
        timesteps = later.draw_timesteps(timesteps[0], args.random_steps, T, draws)
    skipped = 1 if args.first_step_weight > 0 else 0  # the first step has a loss of its own
    step = skipped + draws.below(len(timesteps) - skipped)  # one for the whole batch
    if args.student_input == "backward":  # backward simulation: the student's own earlier steps
        cond = model.encode(sources.prompts.draw(draws))
        path = timesteps[: step + 1]
        if args.off_trajectory > 0 and draws.below(1000) < 1000 * args.off_trajectory:
            path = [*path, draws.below(path[-1])]  # reached without noise, see student_input
        path = torch.tensor(path).expand(len(draws), -1)
        t_in = path[:, -1].to(model.device)
        batch = Batch(cond, t_in, path=path, noise=draws.normal(step + 1, *shape))
    else:  # noised real data, the step drawn per sample; at the first step pure noise
        x_real, prompts = sources.real.draw(draws)
        steps = draws.integers(0, len(timesteps))
        t_in = torch.tensor(timesteps, device=model.device)[steps]
        eps = draws.normal(*shape)
        x_in = schedule.add_noise(x_real, eps, t_in)
        is_first = (t_in == timesteps[0]).view(-1, 1, 1, 1)
        x_in = torch.where(is_first, schedule.noise_scale * eps, x_in)
        batch = Batch(model.encode(prompts), t_in, x_in=x_in)

    # For the student's step.
    if is_student_turn(iteration, args):
        levels = draw_levels(
            args.schedule, args.noise_levels, batch.t_in, T, draws, args.renoise_shift
        )
        batch.t_dm, batch.t_ca = levels
        batch.eps_dm = draws.normal(*shape)
        batch.eps_ca = batch.eps_dm if args.schedule == "coupled" else draws.normal(*shape)
        if args.regression_weight > 0:  # pairs have noise and prompts of their own
            batch.pair_noise, batch.pair_x0, prompts = sources.pairs.draw(draws)
            batch.pair_cond = model.encode(prompts)

    # For the fake score's step.
    batch.t_fake = draws.integers(0, T)
    batch.eps_fake = draws.normal(*shape)
    if args.gan_weight > 0:
        batch.x_real, prompts = sources.real.draw(draws)
        batch.eps_real = draws.normal(*shape)
        batch.cond_real = model.encode(prompts)
        if args.r1_weight > 0:
            batch.eps_near = draws.normal(*shape)
    return batch


def is_student_turn(iteration, args):
    return iteration % args.fake_updates == 0


def has_scores(args):
    """Whether anything but the regression moves the student."""
    return any((args.dm_weight, args.ca_weight, args.gan_weight, args.mean_variance_weight))


# ----------------------------------------------------------------------------- one iteration


@keep_casts()
def iterate(nets, batch, iteration, args):
    """Draw samples of the student; every K-th time move the student; always move the fake score.
    Returns metrics as tensors."""
    set_learning_rates(nets, iteration, args)
    parts = batch.split(args.micro_batch)
    student_turn = is_student_turn(iteration, args)

    if not has_scores(args):
        return student_step(nets, parts, args) if student_turn else {}
    keep_graph = student_turn and len(parts) == 1  # of several parts student_step makes it anew
    for part in parts:
        if part.x_in is None:
            part.x_in = student_input(nets, part)  # (B, C, H, W)
        with torch.set_grad_enabled(keep_graph):
            part.x = nets.student(part.x_in, part.t_in, part.cond)  # (B, C, H, W)
    metrics = student_step(nets, parts, args) if student_turn else {}
    return metrics | fake_score_step(nets, parts, args)


@torch.no_grad()
def student_input(nets, part):
    """Backward simulation (2405.14867): what the student's sampler gives it at its last timestep.
    Off the trajectory (2605.06376) one deterministic step of its own, to any timestep, follows."""
    noise = part.noise.transpose(0, 1)  # (steps, B, C, H, W)
    timesteps, steps = part.path[0].tolist(), len(noise)
    x_t = models.last_input(nets.student, noise, part.cond, timesteps[:steps])
    for t, s in zip(timesteps[steps - 1 :], timesteps[steps:]):
        x0 = nets.student(x_t, t, part.cond)
        x_t = models.deterministic_step(x0, x_t, t, s, nets.schedule)
    return x_t


def set_learning_rates(nets, iteration, args):
    warmed = min(1.0, (iteration + 1) / (args.warmup + 1))
    for group in nets.student_optimizer.param_groups:
        group["lr"] = warmed * args.learning_rate
    for group in nets.fake_optimizer.param_groups:
        group["lr"] = warmed * args.fake_learning_rate


def student_step(nets, parts, args):
    """Move the student so that its samples become likelier under the teacher and less likely under
    the fake score."""
    batch_size = sum(len(part.t_in) for part in parts)
    metrics = {}

    # 1. Where should each sample go?
    if has_scores(args):
        for part in parts:
            read_scores(nets, part, args)
        # 2. f-distill: weigh the directions by the density ratio.
        if args.divergence != "reverse-kl":
            weigh_by_density_ratio(nets, parts, args)
        metrics = step_metrics(parts)

    # 3. Move it there: the gradient of losses.surrogate_loss(x, dm + ca), and of what is added.
    for part in parts:
        fsdp.reduce_gradients(nets.student, part is parts[-1])
        if has_scores(args):
            gradient = (part.dm + part.ca) / part.x[0].numel() + part.extra  # (B, C, H, W)
            x = part.x
            if not x.requires_grad:
                x = nets.student(part.x_in, part.t_in, part.cond)
            x.backward(gradient / batch_size)
        if args.regression_weight > 0:
            z = nets.schedule.noise_scale * part.pair_noise
            x_pair = nets.student(z, nets.timesteps[0], part.pair_cond)
            loss = nets.regression_loss(x_pair, part.pair_x0)  # (B,)
            (args.regression_weight * loss.sum() / batch_size).backward()
            metrics["regression"] = loss.detach().mean()
        if args.first_step_weight > 0:
            loss = later.first_step_loss(nets, part.noise[:, 0], part.cond, args.guidance)  # (B,)
            (args.first_step_weight * loss.sum() / batch_size).backward()
            metrics["first_step"] = loss.detach().mean()

    metrics["student_grad_norm"] = fsdp.clip_gradients(nets.student, args.clip, "student")
    nets.student_optimizer.step()
    nets.student_optimizer.zero_grad()
    nets.move_average(args.ema)
    if args.ida < 1:
        nets.pull_fake_score(args.ida)
    return metrics


def read_scores(nets, part, args):
    """Diffuse the samples, ask the fake score and the teacher what they were, and leave in `part`
    the directions that follow. All of it is constant to the student."""
    schedule = nets.schedule
    x = part.x.detach()
    needs_graph = args.gan_weight > 0 or args.mean_variance_weight > 0
    x.requires_grad_(needs_graph)  # to x alone: no network's parameter gets a gradient from it

    # The fake score at tau_DM, and what acts on x besides DM and CA.
    x_t = schedule.add_noise(x, part.eps_dm, part.t_dm)
    with torch.set_grad_enabled(args.gan_weight > 0):
        x0_fake, logit = nets.fake_score(x_t, part.t_dm, part.cond, x0_graph=False)
    part.extra = extra_gradient(x, logit, nets.mean_variance_target, args)
    x, x_t, x0_fake = x.detach(), x_t.detach(), x0_fake.detach()  # (B, C, H, W)
    part.logit = None if logit is None else logit.detach()

    # The teacher at tau_DM and at tau_CA. Where these differ, tau_DM needs guidance only for a
    # guided normaliser; without it x0_guided is x0_cond there.
    with torch.no_grad():
        coupled = args.schedule == "coupled"
        guidance = args.guidance if coupled or args.normaliser == "guided" else 1
        x0_cond, x0_guided = models.cond_and_guided_x0(
            nets.teacher, x_t, part.t_dm, part.cond, nets.uncond, guidance
        )
        x0_cond_ca, x0_guided_ca = x0_cond, x0_guided
        if not coupled:
            x_t_ca = schedule.add_noise(x, part.eps_ca, part.t_ca)
            x0_cond_ca, x0_guided_ca = models.cond_and_guided_x0(
                nets.teacher, x_t_ca, part.t_ca, part.cond, nets.uncond, args.guidance
            )

    # The directions. Coupled and not weighed, they add up to DMD2's x0_fake - x0_guided.
    part.dm = args.dm_weight * losses.dm_direction(x0_cond, x0_fake)
    part.ca = args.ca_weight * losses.ca_direction(x0_cond_ca, x0_guided_ca)
    if args.normaliser != "none":
        guided = args.normaliser == "guided"
        x0_dm = x0_guided if guided else x0_cond
        x0_ca = x0_guided_ca if guided else x0_cond_ca
        part.dm = part.dm / losses.normaliser(x, x0_dm, args.normaliser_floor)
        part.ca = part.ca / losses.normaliser(x, x0_ca, args.normaliser_floor)
    part.health = losses.health(x, x0_guided, x0_fake)


def extra_gradient(x, logit, mean_variance_target, args):
    """Gradient of the student's GAN loss and of the mean-variance loss in x. (B, C, H, W)"""
    if not x.requires_grad:
        return torch.zeros_like(x)
    loss = torch.zeros(len(x), device=x.device)
    if args.gan_weight > 0:
        loss = loss + args.gan_weight * losses.gan_student_loss(logit)
    if args.mean_variance_weight > 0:
        term = losses.mean_variance_loss(x, *mean_variance_target)
        loss = loss + args.mean_variance_weight * term
    return torch.autograd.grad(loss.sum(), x)[0]


def weigh_by_density_ratio(nets, parts, args):
    """f-distill (2502.15681): multiply by h(r), r read at the very x_t and t of the scores, with
    both its normalisations: r by its running mean in its time bin, h by its mean over the batch.
    CA is weighed too where it is read at the same x_t."""
    logit = torch.cat([part.logit for part in parts])  # (B,)
    t = torch.cat([part.t_dm for part in parts])
    h = divergence_weight(nets.fake_score, logit, t, len(nets.schedule), args.divergence)
    sizes = [len(part.x) for part in parts]
    for part, h_part in zip(parts, h.split(sizes)):
        h_part = h_part.view(-1, 1, 1, 1)
        part.dm = h_part * part.dm
        if args.schedule == "coupled":
            part.ca = h_part * part.ca


def divergence_weight(fake_score, logit, t, T, divergence):
    """h(r), normalised over the global batch. logit, t (B,) -> (B,)"""
    means = fake_score.ratio_means  # (bins,)
    r = losses.density_ratio(logit)
    time_bin = losses.time_bin(t, T, len(means))
    total = torch.zeros_like(means).index_add(0, time_bin, r)
    count = torch.zeros_like(means).index_add(0, time_bin, torch.ones_like(r))
    total, count = fsdp.sum_over_ranks(torch.stack([total, count]))
    means.copy_(losses.update_bin_means(means, total, count))
    h = losses.DIVERGENCES[divergence](r / means[time_bin])
    return h / (fsdp.sum_over_ranks(h.sum()) / count.sum())


def step_metrics(parts):
    """Means over the batch of the health metrics and of the directions' size."""
    rows = []
    for part in parts:
        sizes = {
            "dm": losses.mean_per_sample(part.dm.abs()),
            "ca": losses.mean_per_sample(part.ca.abs()),
        }
        if part.logit is not None:  # with the mean-variance term's, where there is one
            sizes["gan"] = losses.mean_per_sample(part.extra.abs()) * part.x[0].numel()
        rows.append(sizes | part.health)
    return {name: torch.cat([row[name] for row in rows]).mean() for name in rows[0]}


def fake_score_step(nets, parts, args):
    """Keep the fake score a denoiser of the student's present samples and, with the GAN, its head a
    critic of samples against real data."""
    batch_size = sum(len(part.x) for part in parts)
    fake_loss, correct = [], []
    for part in parts:
        fsdp.reduce_gradients(nets.fake_score, part is parts[-1])
        x = part.x.detach()
        x_t = nets.schedule.add_noise(x, part.eps_fake, part.t_fake)
        if args.gan_weight > 0:  # samples and real data in one pass; x0 is of the samples only
            x_t_real = nets.schedule.add_noise(part.x_real, part.eps_real, part.t_fake)
            inputs, conds = [x_t, x_t_real], [part.cond, part.cond_real]
            if args.r1_weight > 0:  # and real data a little beside it
                x_near = part.x_real + R1_DISTANCE * part.eps_near
                inputs.append(nets.schedule.add_noise(x_near, part.eps_real, part.t_fake))
                conds.append(part.cond_real)
            t = part.t_fake.repeat(len(inputs))
            cond = models.join(*conds)
            x0_fake, logits = nets.fake_score(torch.cat(inputs), t, cond, count=len(x))
            logit_fake, logit_real, *logit_near = logits.split(len(x))  # (B,) each
        else:
            x0_fake, _ = nets.fake_score(x_t, part.t_fake, part.cond)  # (B, C, H, W)
        alpha, sigma = nets.schedule.at(part.t_fake, x)
        weight = losses.denoising_weight(nets.model.prediction, alpha, sigma)
        loss = losses.denoising_loss(x0_fake, x, weight)  # (B,)
        fake_loss.append(loss.detach())
        if args.gan_weight > 0:
            loss = loss + args.critic_weight * losses.gan_critic_loss(logit_real, logit_fake)
            correct += [logit_real.detach() > 0, logit_fake.detach() < 0]
            if logit_near:
                penalty = losses.r1_penalty(logit_real, *logit_near)
                loss = loss + args.critic_weight * args.r1_weight * penalty
        (loss.sum() / batch_size).backward()

    metrics = {"fake_loss": torch.cat(fake_loss).mean()}
    if correct:
        metrics["logit_accuracy"] = torch.cat(correct).float().mean()
    metrics["fake_grad_norm"] = fsdp.clip_gradients(nets.fake_score, args.clip, "fake score")
    nets.fake_optimizer.step()
    nets.fake_optimizer.zero_grad()
    return metrics


# ----------------------------------------------------------------------------- the run


def train(nets, sources, args, make_gallery, stop):
    out, config = args.out, runs.configuration(args)
    start = runs.restore(nets, sources, args) if args.resume else 0
    fsdp.broadcast_from_main(checkpoint.write_config, out, config)
    gallery = make_gallery(out, nets, sources.prompts, args)
    log = runlog.Log(out, gallery.teacher_metrics, start)
    tracker = runlog.Tracker(args.track, out, config)
    if start == 0:
        gallery.draw(0)
        if has_scores(args):  # before anything moves, for comparison
            log.add(0, {"fake_loss": runlog.fake_loss(nets, gallery, args)})
    draw = functools.partial(draw_batch, nets, sources, args=args)
    batches = Ahead(draw, start, args.iterations, nets.model.device)
    quiet = not fsdp.is_main()
    with tqdm(batches, args.variant, args.iterations, initial=start, disable=quiet) as progress:
        for iteration, batch in progress:
            # Student step and fake-score step.
            done = iteration + 1
            last = done == args.iterations
            try:
                metrics = iterate(nets, batch, iteration, args)
                row = log.add(done, metrics, last)
            except fsdp.NotFinite as error:
                students.write_student(out, nets, config)  # the last good one
                raise runlog.not_finite(out, done, error) from None

            # Metrics.
            if row:
                log.check_health(row, args)
                tracker.log(done, row)
                shown = ("fake_loss", "std", "gap")
                progress.set_postfix({name: f"{row[name]:.3f}" for name in shown if name in row})

            # Images, curves, checkpoint, student.
            signal = fsdp.max_over_ranks(stop.signal)
            save = done % args.save_every == 0 or last
            if save:
                tracker.log(done, {}, gallery.draw(done))
                log.draw_curves()
            if save or signal:
                manifest = runs.about(nets, sources) | {"iteration": done, "config": config}
                checkpoint.save(out, nets.tensors(), manifest, args.keep)
                students.write_student(out, nets, config)
            if signal and not last:
                fsdp.print_main(
                    f"interrupted after {done} of {args.iterations} iterations; "
                    f"go on with --resume {out}"
                )
                raise SystemExit(128 + signal)
    tracker.finish()
    fsdp.print_main(
        f"images: {out}/images, curves: {out}/curves.png, student: {out}/student\n"
        f"sample it: python sample.py --student {out}"
    )


# ----------------------------------------------------------------------------- from flags to a run


def parse_arguments(arguments=None):
    args = runs.parse_arguments(__doc__, VARIANTS, arguments)
    cli.check_choice("--schedule", args.schedule, SCHEDULES)
    return args


def open_sources(model, args):
    prompts = data.training_prompts(args.prompts, model)
    real = pairs = None
    if args.gan_weight > 0 or args.student_input == "data":
        real = data.real_data(model, args.real)
    if args.regression_weight > 0:
        pairs = data.Pairs(args.pairs, model, args.guidance)
    return Sources(prompts, real, pairs)


def prepare(args, load_model=models.load_model, mesh=None):
    """The networks, and what they are trained on."""
    device, dtype = fsdp.device_and_dtype(args)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    encoded = bool(args.prompts) and Path(args.prompts).is_dir()
    model = load_model(
        data.model_path(args.model),
        device,
        dtype,
        vae=args.vae,
        config=args.config,
        encoder_device=args.encoder_device,
        network_device="cpu" if mesh else None,
        image_size=args.image_size,
        guidance_norm=args.guidance_norm,
        conditions=args.prompts if encoded else None,
    )
    sample.check_steps(model, args.student_steps, args.first_timestep)
    args.guidance = args.guidance or model.default_guidance
    runs.warn_of_guidance(model, args)
    fsdp.local_slice(args.batch_size)
    runlog.import_tracker(args.track)
    sources = open_sources(model, args)
    data.warn_of_few(sources.real)
    nets = Networks(model, args, mesh)
    if args.mean_variance_weight > 0:
        nets.mean_variance_target = sample.teacher_statistics(model, sources.prompts, args)
    return nets, sources


def main(arguments=None, load_model=models.load_model, make_gallery=runlog.Gallery):
    args = parse_arguments(arguments)
    mesh = fsdp.start(args.shard, fsdp.own_device(args.device))
    args = fsdp.broadcast_from_main(lambda: args)  # another node may see an older config.json
    with checkpoint.locked(args.out):
        fsdp.broadcast_from_main(checkpoint.prepare_run_directory, args.out, args.resume, 0)
        nets, sources = prepare(args, load_model, mesh)
        needed = (args.keep + 1) * runlog.checkpoint_bytes(nets)
        fsdp.broadcast_from_main(checkpoint.prepare_run_directory, args.out, args.resume, needed)
        runlog.describe(nets, sources, args)
        with runlog.StopAtSignal() as stop:
            train(nets, sources, args, make_gallery, stop)
    return nets, args


if __name__ == "__main__":
    fsdp.run(main)
