"""The laboratory's model: a labelled mixture of Gaussians in the plane, whose scores are exact.

    python -m lab.plane                     # distil it into one step: seconds, with images
    python -m lab.plane --variant decoupled --guidance 1.5 --out runs/trial     # train.py's flags
    python -m lab.claims                    # the papers' claims, tried on it

The teacher is no trained network but the closed form of E[x0 | x_t, label], so that nothing a
student does wrong can be blamed on it. Student and fake score start as a small network that is
fitted to the teacher in a few seconds. A sample is two numbers, kept as (B, 2, 1, 1), so that the
rest of the code takes it for a very small image; a prompt is a label, "0" to "3", and the empty
prompt is no label.

--model gmm has the teacher of its data. --model gmm-imperfect has the same data and a teacher whose
modes are too wide and out of place, as a trained one's are. Without flags recipes/plane.args is
used; with flags it is what they are added to.
"""

import functools
import math
import statistics
import sys
from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image, ImageDraw, ImageFont

import fsdp
import losses
import models
import sample
import train
from support import pictures, runlog
from support.cli import UserError
from support.families import Family, call_network

NAMES = ("gmm", "gmm-imperfect")
LABELS = 4
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (230, 130, 0))
RECIPE = models.ASSETS.parent / "recipes" / "plane.args"
FIT_ITERATIONS, FIT_BATCH = 2000, 256  # of the network that teachers are
REPEATS, SAMPLES = 4, 4096  # of a sampler, for its row of the table


# ----------------------------------------------------------------------------- the mixture


class Mixture:
    """weights (K,), means (K, 2), deviations (K,) and labels (K,) of its modes."""

    def __init__(self, weights, means, deviations, labels):
        self.weights, self.means, self.deviations = weights, means, deviations
        self.labels = labels
        own = labels[None] == torch.arange(LABELS, device=labels.device)[:, None]
        belongs = torch.cat([own, torch.ones_like(own[:1])])  # the last row: no label
        shares = torch.where(belongs, weights, torch.zeros_like(weights))
        self.log_weights = (shares / shares.sum(1, keepdim=True)).log()

    def to(self, device):
        parts = (self.weights, self.means, self.deviations, self.labels)
        return Mixture(*(part.to(device) for part in parts))

    def _parts(self, x_t, alpha, sigma, label):
        """Of each mode: log of its weight times its diffused density, the distance to it, its
        diffused variance."""
        variance = (alpha * self.deviations) ** 2 + sigma**2  # (B, K)
        distance = x_t[:, None] - alpha[..., None] * self.means  # (B, K, 2)
        exponent = -0.5 * distance.square().sum(-1) / variance
        log_parts = self.log_weights[label] + exponent - (2 * math.pi * variance).log()
        return log_parts, distance, variance

    def log_density(self, x_t, alpha, sigma, label):
        """log p_t(x_t | label). x_t (B, 2); alpha, sigma (B, 1); label (B,), LABELS for none."""
        return self._parts(x_t, alpha, sigma, label)[0].logsumexp(1)

    def x0(self, x_t, alpha, sigma, label):
        """E[x0 | x_t, label]: the modes' posterior means, weighted by how likely each is. (B, 2)"""
        log_parts, distance, variance = self._parts(x_t, alpha, sigma, label)
        gain = alpha * self.deviations**2 / variance
        means = self.means + gain[..., None] * distance  # (B, K, 2)
        return (log_parts.softmax(1)[..., None] * means).sum(1)

    def draw(self, label, generator):
        """Exact samples, (B, 2)."""
        shares = self.log_weights.cpu()[label.cpu()].exp()
        mode = torch.multinomial(shares, 1, generator=generator)[:, 0]
        noise = torch.randn(len(label), 2, generator=generator)
        return self.means.cpu()[mode] + self.deviations.cpu()[mode, None] * noise


def plane(widen=1.0, misplace=0.0):
    """Four labels of four modes each: three around a corner, in falling weight, and a small one
    astray on the other side of the centre, inside another label's corner. Of deviation 1."""
    weights, means, labels = [], [], []
    corner = ((0.4, 1.6, 0.0), (0.3, 1.15, 0.5), (0.2, 1.15, -0.5), (0.1, 0.5, math.pi))
    for label in range(LABELS):
        angle = math.pi * (0.25 + 0.5 * label)
        for weight, radius, turn in corner:
            weights.append(weight / LABELS)
            means.append((radius * math.cos(angle + turn), radius * math.sin(angle + turn)))
            labels.append(label)
    weights, means = torch.tensor(weights), torch.tensor(means)
    deviations = torch.full((len(labels),), 0.14)
    variance = weights * (means.square().sum(1) / 2 + deviations**2)
    means, deviations = means / variance.sum().sqrt(), deviations / variance.sum().sqrt()
    if misplace:  # every mode in a direction of its own
        turns = torch.arange(len(labels)) * 2.4
        means = means + misplace * torch.stack([turns.cos(), turns.sin()], 1)
    return Mixture(weights, means, deviations * widen, torch.tensor(labels))


# ----------------------------------------------------------------------------- networks


class ExactNetwork(torch.nn.Module):
    """What a perfect network that predicts v would output."""

    def __init__(self, mixture, schedule):
        super().__init__()
        self.mixture, self.schedule = mixture, schedule

    def forward(self, sample, timestep, class_labels, return_dict=False):
        x_t = sample[..., 0, 0]  # (B, 2)
        alpha, sigma = self.schedule.at(timestep.long(), x_t)
        alpha, sigma, x_t = alpha.double(), sigma.double(), x_t.double()
        x0 = self.mixture.x0(x_t, alpha, sigma, class_labels)
        return (((alpha * x_t - x0) / sigma).float()[..., None, None],)


class PointNetwork(ModelMixin, ConfigMixin):
    """A small network with a diffusers UNet's way of being called, saved and loaded."""

    @register_to_config
    def __init__(self, width=128, labels=LABELS, steps=1000):
        super().__init__()
        Linear, SiLU = torch.nn.Linear, torch.nn.SiLU
        self.embed_label = torch.nn.Embedding(labels + 1, width)
        self.time_embedding = torch.nn.Sequential(Linear(16, width), SiLU(), Linear(width, width))
        self.enter = Linear(2, width)
        self.down_block = torch.nn.Sequential(SiLU(), Linear(width, width), SiLU())
        unflatten = torch.nn.Unflatten(1, (width, 1, 1))
        self.mid_block = torch.nn.Sequential(Linear(width, width), SiLU(), unflatten)
        flatten = torch.nn.Flatten()
        up_block = torch.nn.Sequential(flatten, Linear(width, width), SiLU(), Linear(width, 2))
        self.up_blocks = torch.nn.ModuleList([up_block])

    def forward(self, sample, timestep, class_labels, return_dict=False):
        frequencies = torch.arange(1, 9, device=sample.device)
        angles = timestep[:, None] / self.config.steps * math.pi * frequencies
        embedded = self.time_embedding(torch.cat([angles.sin(), angles.cos()], 1))
        embedded = embedded + self.embed_label(class_labels)
        hidden = self.down_block(self.enter(sample.flatten(1)) + embedded)  # (B, width)
        output = self.up_blocks[0](self.mid_block(hidden))
        return (output.view(-1, *sample.shape[1:]),)


def sd_schedule():
    """Stable Diffusion's."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return models.vp_schedule((1 - betas).cumprod(0))


def teacher_mixture(name):
    return plane(widen=2.0, misplace=0.12) if name == "gmm-imperfect" else plane()


@functools.cache
def fitted_weights(name):
    """A PointNetwork's weights, fitted to the exact teacher on its own diffused samples. They
    belong to the model as a trained teacher's weights do, and are the same in every run."""
    mixture, schedule = teacher_mixture(name), sd_schedule()
    exact = ExactNetwork(mixture, schedule)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PointNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_ITERATIONS)
    for _ in range(FIT_ITERATIONS):
        label = torch.randint(LABELS + 1, (FIT_BATCH,), generator=generator)
        t = torch.randint(len(schedule), (FIT_BATCH,), generator=generator)
        x0 = mixture.draw(label, generator)[..., None, None]
        eps = torch.randn(FIT_BATCH, 2, 1, 1, generator=generator)
        x_t = schedule.add_noise(x0, eps, t)
        error = network(x_t, t, label)[0] - exact(x_t, t, label)[0]
        error.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    return network.state_dict()


# ----------------------------------------------------------------------------- the model


def encode_plane(model, prompts):
    return {"class_labels": torch.tensor([model.label(prompt) for prompt in prompts])}


class PlaneModel(models.Model):
    """What the rest of the code uses of models.Model. mixture is the teacher's, truth the
    data's."""

    network_class = PointNetwork
    sample_shape = (2, 1, 1)
    default_guidance = 1.0
    vae, text_encoders, encoder_print = None, (), None
    decodes = False

    def __init__(self, name, device="cpu", dtype=torch.float32):
        if name not in NAMES:
            raise UserError(f"--model {name}: the plane's models are {' and '.join(NAMES)}")
        self.name, self.device, self.dtype = name, torch.device(device), dtype
        self.frozen_dtype = dtype
        self.family = Family(call_network, encode_plane)
        self.pipe = SimpleNamespace()
        self.prompts = [str(label) for label in range(LABELS)]
        self.mixture = teacher_mixture(name).to(self.device)
        self.truth = plane().to(self.device)
        self.schedule, self.prediction = sd_schedule().to(self.device), "v_prediction"
        self.denoiser = self.make_denoiser(ExactNetwork(self.mixture, self.schedule)).eval()
        network = PointNetwork()
        network.load_state_dict(fitted_weights(name))
        self.origin = self.make_denoiser(network.to(self.device)).requires_grad_(False).eval()

    def label(self, prompt):
        known = {"": LABELS} | {str(label): label for label in range(LABELS)}
        if prompt not in known:
            raise UserError(f"{prompt!r} is no prompt of {self.name}: these are 0 to {LABELS - 1}")
        return known[prompt]

    def own_real_data(self):
        return RealPoints(self)

    def target(self, label, guidance, generator):
        """Samples (B, 2) of what a student should draw."""
        if guidance == 1:
            return self.mixture.draw(label, generator).to(self.device)
        noise = torch.randn(1, len(label), *self.sample_shape, generator=generator)
        teacher = sample.TeacherSampler(self, 100, guidance)
        return teacher.draw(noise.to(self.device), {"class_labels": label})[..., 0, 0]


class RealPoints:
    """The data, without end."""

    count, digests = 0, ()

    def __init__(self, model):
        self.model = model

    def draw(self, draws):
        """Samples (B, 2, 1, 1) and B prompts."""
        truth, label = self.model.truth, draws.integers(0, LABELS)
        shares = truth.log_weights[label].exp().cumsum(1)  # (B, modes)
        above = shares < draws.uniform()[:, None].to(shares)
        mode = above.sum(1).clamp(max=len(truth.weights) - 1)
        x = truth.means[mode] + truth.deviations[mode, None] * draws.normal(2)
        return x[..., None, None], [str(i) for i in label.tolist()]


def load_model(path, device="cpu", dtype=torch.float32, **options):
    """In place of models.load_model."""
    return PlaneModel(path, device, dtype)


# ----------------------------------------------------------------------------- metrics


def measure(mixture, x, label, x_target):
    """Metrics of samples x (N, 2) with label (N,) against target samples x_target (N, 2) with the
    same labels; each is the mean over the labels.

        mass      total variation distance between the weights of the label's modes and the shares
                  of samples nearest to each
        modes     share of a label's modes that get at least a tenth of their weight in samples
        near      share of samples within 3 deviations of one of their label's modes
        sliced    sliced Wasserstein distance to the target, 64 directions
        kl        KL(samples || target), both smoothed by a Gaussian of deviation 0.1 (kernel
                  estimates judged on a tenth of the samples; each sample's part is cut at 20)
        deviation root mean square distance of the label's samples from the label's target mean
    """
    rows = []
    for k in range(LABELS):
        own, target = x[label == k], x_target[label == k]
        mine = mixture.labels == k
        distance = torch.cdist(own, mixture.means[mine]) / mixture.deviations[mine]  # (n, modes)
        nearest = distance.min(1)
        share = mixture.weights[mine] / mixture.weights[mine].sum()
        near = nearest.values < 3
        hits = torch.bincount(nearest.indices[near], minlength=len(share)) / len(own)
        shares = torch.bincount(nearest.indices, minlength=len(share)) / len(own)
        row = {
            "mass": 0.5 * (shares - share).abs().sum().item(),
            "modes": (hits >= 0.1 * share).float().mean().item(),
            "near": near.float().mean().item(),
            "sliced": sliced_wasserstein(own, target),
            "kl": kernel_kl(own, target),
            "deviation": (own - target.mean(0)).square().sum(1).mean().sqrt().item(),
        }
        rows.append(row)
    return {name: sum(row[name] for row in rows) / LABELS for name in row}


def mean_and_error(values):
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def sliced_wasserstein(a, b, directions=64):
    """Mean over directions of the 1-Wasserstein distance of the projections of as many points."""
    angles = torch.arange(directions, device=a.device) / directions * math.pi
    project = torch.stack([angles.cos(), angles.sin()])  # (2, directions)
    return ((a @ project).sort(0).values - (b @ project).sort(0).values).abs().mean().item()


def kernel_kl(a, b, width=0.1):
    """KL(a || b) of kernel density estimates, judged on a tenth of `a` that takes no part in its
    own estimate."""
    judge, rest = a[: len(a) // 10], a[len(a) // 10 :]
    generator = torch.Generator().manual_seed(0)
    judge = judge + width * torch.randn(judge.shape, generator=generator).to(a.device)

    def log_density(points):
        exponent = -0.5 * torch.cdist(judge, points).square() / width**2
        return exponent.logsumexp(1) - math.log(len(points))

    return (log_density(rest) - log_density(b)).clamp(max=20).mean().item()


# ----------------------------------------------------------------------------- images


def draw_panels(mixture, panels, path, size=260, reach=2.4):
    """panels: [(title, points (N, 2) or None, label (N,) or None, arrows (M, 4) or None), ...] over
    the mixture's density."""
    top = 40 if any(panel[0] for panel in panels) else 0
    sheet = Image.new("RGB", (len(panels) * (size + 8), size + top), "white")
    background = draw_density(mixture, size, reach)
    font = ImageFont.load_default(13)

    def place(x, y):
        return (x / reach + 1) * size / 2, (1 - y / reach) * size / 2

    for k, (title, points, label, arrows) in enumerate(panels):
        panel = background.copy()
        pen = ImageDraw.Draw(panel)
        if points is not None:
            for point, colour in zip(points.tolist(), label.tolist()):
                x, y = place(*point)
                pen.rectangle((x - 1, y - 1, x, y), fill=COLOURS[colour])
        if arrows is not None:
            for x0, y0, x1, y1 in arrows.tolist():
                end = place(x1, y1)
                pen.line((place(x0, y0), end), fill=(90, 30, 120), width=1)
                dot = (end[0] - 1, end[1] - 1, end[0] + 1, end[1] + 1)
                pen.ellipse(dot, fill=(90, 30, 120))
        sheet.paste(panel, (k * (size + 8), top))
        at = (k * (size + 8) + 4, top - 4)
        ImageDraw.Draw(sheet).multiline_text(at, title, font=font, fill="black", anchor="ld")
    pictures.save(sheet, path)


def draw_density(mixture, size, reach):
    line = torch.linspace(-reach, reach, size)
    ys, xs = torch.meshgrid(-line, line, indexing="ij")
    grid = torch.stack([xs, ys], -1).view(-1, 2)
    none = torch.full((len(grid),), LABELS)
    alpha, sigma = torch.ones(1, 1), torch.full((1, 1), 0.05)
    density = mixture.to("cpu").log_density(grid, alpha, sigma, none).exp()
    grey = 255 - 110 * (density / density.max()).sqrt()
    return Image.fromarray(grey.view(size, size).to(torch.uint8).numpy()).convert("RGB")


def direction_field(nets, args, t, label=0, reach=2.2, across=17):
    """Arrows (M, 4) along which a student's samples with that label are moved at timestep t: minus
    DM and CA with their weights, not normalised, on a grid of x_t, a third of their length, drawn
    from the grid's points as they would be without noise."""
    line = torch.linspace(-reach, reach, across, device=nets.model.device)
    x = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2)
    x_t = (nets.schedule.alpha[t] * x)[..., None, None]
    cond = {"class_labels": torch.full((len(x),), label, device=x.device)}
    with torch.no_grad():
        x0_cond, x0_guided = models.cond_and_guided_x0(
            nets.teacher, x_t, t, cond, nets.uncond, args.guidance
        )
        x0_fake, _ = nets.fake_score(x_t, t, cond)
    dm = args.dm_weight * losses.dm_direction(x0_cond, x0_fake)
    ca = args.ca_weight * losses.ca_direction(x0_cond, x0_guided)
    return torch.cat([x, x - (dm + ca)[..., 0, 0] / 3], 1).cpu()


class Gallery:
    """In place of runlog.Gallery: the teacher's samples over its density, the student's, and the
    direction field."""

    def __init__(self, out, nets, prompts, args, count=1024):
        self.folder = out / "images"
        self.nets, self.args, model = nets, args, nets.model
        texts = [prompts.texts[i % len(prompts.texts)] for i in range(count)]
        self.cond = model.encode(texts)
        self.label = self.cond["class_labels"]
        self.noise = sample.column_noise(model, count, args.student_steps + 1, args.seed)
        teacher = sample.TeacherSampler(model, 50, args.guidance)
        x = teacher.draw(self.noise, self.cond)
        self.teacher_metrics = runlog.metrics_of(x)
        self.teacher = (teacher.label, x[..., 0, 0], self.label, None)

    def draw(self, iteration):
        nets, t = self.nets, len(self.nets.schedule) // 3
        student = sample.StudentSampler(nets.averaged_student, nets.timesteps)
        x = student.draw(self.noise, self.cond)[..., 0, 0]
        first = self.label == 0
        field = direction_field(nets, self.args, t)
        panels = [
            self.teacher,
            (student.label, x, self.label, None),
            (f"direction of label 0\nat t = {t}", x[first], self.label[first], field),
        ]
        path = self.folder / f"{iteration:06d}.png"
        if fsdp.is_main():
            draw_panels(nets.model.mixture, panels, path)
        return path


# ----------------------------------------------------------------------------- command line


def print_table(nets, args):
    """The student beside its teacher, the network it started as, and other samples of the target:
    means and standard errors over repeats with other noise."""
    model, steps = nets.model, nets.timesteps
    samplers = [
        sample.TeacherSampler(model, 50, args.guidance),
        sample.StudentSampler(model.origin, steps, "untrained network"),
        sample.StudentSampler(nets.averaged_student, steps),
    ]
    label = torch.arange(SAMPLES, device=model.device) % LABELS
    measured = {}
    for repeat in range(REPEATS):
        generator = torch.Generator().manual_seed(args.seed + repeat)
        noise = torch.randn(len(steps), SAMPLES, *model.sample_shape, generator=generator)
        target, again = (model.target(label, args.guidance, generator) for _ in range(2))
        drawn = {}
        for sampler in samplers:
            x = sampler.draw(noise.to(model.device), {"class_labels": label})
            drawn[sampler.label.replace("\n", ", ")] = x[..., 0, 0]
        for title, x in (drawn | {"target": again}).items():
            measured.setdefault(title, []).append(measure(model.mixture, x, label, target))
    lines = [" " * 30 + "".join(f"{name:>17}" for name in measured["target"][0])]
    for title, rows in measured.items():
        line = f"{title:30}"
        for name in rows[0]:
            mean, error = mean_and_error([row[name] for row in rows])
            line += f"{f'{mean:.3f} +- {error:.3f}':>17}"
        lines.append(line)
    fsdp.print_main("\n".join(lines))


def main(arguments=None):
    torch.set_num_threads(1)  # on networks as small as this two threads wait for each other
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not any(str(word).startswith("--resume") for word in arguments):
        arguments = [f"@{RECIPE}", *arguments]
    nets, args = train.main(arguments, load_model, Gallery)
    print_table(nets, args)  # by all ranks, each of which holds its part of the student


if __name__ == "__main__":
    fsdp.run(main)
