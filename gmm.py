"""The laboratory's model family: a labelled mixture of Gaussians in the plane, whose scores are known exactly.

    python train.py @recipes/gmm.args     # a run of seconds, with pictures
    python laboratory.py                  # the papers' claims, tried on it

The teacher is no trained network but the closed form of E[x0 | x_t, label], so that nothing a student does wrong can be blamed on
it. Student and fake score start as a small network that is fitted to the teacher in a few seconds. A sample is two numbers, kept
as (B, 2, 1, 1), so that the rest of the code takes it for a very small picture; a prompt is a label, "0" to "3", and the
empty prompt is no label.

`gmm` has the teacher of its data. `gmm-imperfect` has the same data and a teacher whose modes are too wide and off their place, as
a trained one's are.
"""

import functools
import math
import statistics

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image, ImageDraw, ImageFont

import data
import fsdp
import losses
import models
import sample
from errors import UserError

NAMES = ("gmm", "gmm-imperfect")
LABELS = 4
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (230, 130, 0))


# ---------------------------------------------------------------------------------------------------- the mixture

class Mixture:
    """weights (K,), means (K, 2), deviations (K,) and labels (K,) of its modes."""

    def __init__(self, weights, means, deviations, labels):
        self.weights, self.means, self.deviations, self.labels = weights, means, deviations, labels
        belongs = torch.cat([labels[None] == torch.arange(LABELS)[:, None], torch.ones(1, len(labels), dtype=torch.bool)])
        self.log_weights = torch.where(belongs, weights, torch.zeros(())).div((belongs * weights).sum(1, keepdim=True)).log()

    def to(self, device):
        return Mixture(*(v.to(device) for v in (self.weights, self.means, self.deviations, self.labels)))

    def _parts(self, x_t, alpha, sigma, label):
        """log of each mode's weight times its diffused density, the distance to each mode, each mode's diffused variance."""
        variance = (alpha * self.deviations) ** 2 + sigma ** 2                                     # (B, K)
        distance = x_t[:, None] - alpha[..., None] * self.means                                   # (B, K, 2)
        log_parts = self.log_weights[label] - 0.5 * distance.square().sum(-1) / variance - (2 * math.pi * variance).log()
        return log_parts, distance, variance

    def log_density(self, x_t, alpha, sigma, label):
        """log p_t(x_t | label). x_t (B, 2); alpha, sigma (B, 1); label (B,), LABELS for none -> (B,)."""
        return self._parts(x_t, alpha, sigma, label)[0].logsumexp(1)

    def x0(self, x_t, alpha, sigma, label):
        """E[x0 | x_t, label]: the modes' posterior means, weighted by how likely each is. -> (B, 2)"""
        log_parts, distance, variance = self._parts(x_t, alpha, sigma, label)
        means = self.means + (alpha * self.deviations ** 2 / variance)[..., None] * distance       # (B, K, 2)
        return (log_parts.softmax(1)[..., None] * means).sum(1)

    def draw(self, label, generator):
        """Exact samples, (B, 2)."""
        mode = torch.multinomial(self.log_weights.cpu()[label.cpu()].exp(), 1, generator=generator)[:, 0]
        return self.means.cpu()[mode] + self.deviations.cpu()[mode, None] * torch.randn(len(label), 2, generator=generator)


def plane(widen=1.0, misplace=0.0):
    """Four labels of four modes each: three around a corner, in falling weight, and a small one astray on the other side of the
    centre, inside another label's corner. Scaled to deviation 1."""
    weights, means, labels = [], [], []
    for label in range(LABELS):
        angle = math.pi * (0.25 + 0.5 * label)
        for weight, radius, turn in ((0.4, 1.6, 0.0), (0.3, 1.15, 0.5), (0.2, 1.15, -0.5), (0.1, 0.5, math.pi)):
            weights.append(weight / LABELS)
            means.append((radius * math.cos(angle + turn), radius * math.sin(angle + turn)))
            labels.append(label)
    weights, means, labels = torch.tensor(weights), torch.tensor(means), torch.tensor(labels)
    deviations = torch.full((len(labels),), 0.14)
    scale = ((weights * (means.square().sum(1) / 2 + deviations ** 2)).sum()).sqrt()
    means, deviations = means / scale, deviations / scale
    if misplace:  # every mode in a direction of its own
        turns = torch.arange(len(labels)) * 2.4
        means = means + misplace * torch.stack([turns.cos(), turns.sin()], 1)
    return Mixture(weights, means, deviations * widen, labels)


# ---------------------------------------------------------------------------------------------------- networks

class ExactNetwork(torch.nn.Module):
    """What a perfect network that predicts v would output."""

    def __init__(self, mixture, schedule):
        super().__init__()
        self.mixture, self.schedule = mixture, schedule

    def forward(self, x_t, time, class_labels, return_dict=False):
        alpha, sigma = (level.double() for level in self.schedule.at(time.long(), x_t[..., 0, 0]))
        x_t = x_t[..., 0, 0].double()                                                              # (B, 2)
        x0 = self.mixture.x0(x_t, alpha, sigma, class_labels)
        return ((alpha * x_t - x0) / sigma).float()[..., None, None],


class PointNetwork(ModelMixin, ConfigMixin):
    """A small network with a diffusers UNet's way of being called, saved and loaded."""

    @register_to_config
    def __init__(self, width=128, labels=LABELS, steps=1000):
        super().__init__()
        self.embed_label = torch.nn.Embedding(labels + 1, width)
        self.embed_time = torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.SiLU(), torch.nn.Linear(width, width))
        self.enter = torch.nn.Linear(2, width)
        self.down_block = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU())
        self.mid_block = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.SiLU(), torch.nn.Unflatten(1, (width, 1, 1)))
        self.up_block = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(width, width), torch.nn.SiLU(), torch.nn.Linear(width, 2))

    def forward(self, x_t, time, class_labels, return_dict=False):
        angles = time[:, None] / self.config.steps * math.pi * torch.arange(1, 9, device=x_t.device)
        embedded = self.embed_time(torch.cat([angles.sin(), angles.cos()], 1)) + self.embed_label(class_labels)
        hidden = self.down_block(self.enter(x_t.flatten(1)) + embedded)                            # (B, width)
        return self.up_block(self.mid_block(hidden)).view_as(x_t),


def sd_schedule():
    """Stable Diffusion's."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    return models.vp_schedule((1 - betas).cumprod(0))


def teacher_mixture(name):
    return plane(widen=2.0, misplace=0.12) if name == "gmm-imperfect" else plane()


@functools.cache
def fitted_weights(name, iterations=2000, batch_size=256):
    """A PointNetwork's weights, fitted to the exact teacher on its own diffused samples. They belong to the model as a trained
    teacher's weights do, and are the same in every run."""
    mixture, schedule, generator = teacher_mixture(name), sd_schedule(), torch.Generator().manual_seed(0)
    exact = ExactNetwork(mixture, schedule)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PointNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        label = torch.randint(LABELS + 1, (batch_size,), generator=generator)
        t = torch.randint(len(schedule), (batch_size,), generator=generator)
        x0, eps = mixture.draw(label, generator)[..., None, None], torch.randn(batch_size, 2, 1, 1, generator=generator)
        x_t = schedule.add_noise(x0, eps, t)
        (network(x_t, t, label)[0] - exact(x_t, t, label)[0]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    return network.state_dict()


class Model:
    """The plane, with what the rest of the code uses of models.Model. `mixture` is the teacher's, `truth` the data's."""

    network_class = PointNetwork
    sample_shape = (2, 1, 1)
    prompts = [str(label) for label in range(LABELS)]
    sample_prompts = prompts * 256

    def __init__(self, name, device="cpu", dtype=torch.float32):
        self.name, self.device, self.dtype, self.frozen_dtype = name, torch.device(device), dtype, dtype
        self.mixture, self.truth = teacher_mixture(name).to(self.device), plane().to(self.device)
        self.schedule, self.prediction = sd_schedule().to(self.device), "v_prediction"
        self.teacher = self.denoiser(ExactNetwork(self.mixture, self.schedule)).eval()
        network = PointNetwork()
        network.load_state_dict(fitted_weights(name))
        self.origin = self.denoiser(network).requires_grad_(False).eval()

    def denoiser(self, network):
        return models.Denoiser(network.to(self.device), self.schedule, self.prediction, self.dtype)

    def own_names(self, weights):
        return weights

    def encode(self, prompts):
        """Labels as str, "" for none -> cond."""
        known = {"": LABELS} | {str(label): label for label in range(LABELS)}
        for prompt in prompts:
            if prompt not in known:
                raise UserError(f"{prompt!r} is no prompt of {self.name}: its prompts are the labels 0 to {LABELS - 1}")
        return {"class_labels": torch.tensor([known[prompt] for prompt in prompts], device=self.device)}

    @property
    def uncond(self):
        return self.encode([""])

    def real_data(self):
        return RealPoints(self)

    def measure_rows(self, rows, guidance, max_steps, seed, repeats=4, count=4096):
        """eval.py's table: `measure` against the teacher with guidance (100 steps of its sampler; exact samples without), the mean and
        standard error of four times 4096 samples, over all labels and for each; and for comparison other samples of that target."""
        label = torch.arange(count, device=self.device) % LABELS
        cond, samplers = {"class_labels": label}, {row.label.replace("\n", ", "): row.draw for row in rows}
        measured = {title: [] for title in (*samplers, "target")}
        for repeat in range(repeats):
            generator = torch.Generator().manual_seed(data.mix_seed(seed, repeat))
            noise = torch.randn(max_steps, count, *self.sample_shape, generator=generator).to(self.device)
            target, again = (self.target(label, guidance, generator) for _ in range(2))
            for title, draw in samplers.items():
                measured[title].append(measure(self.mixture, draw(noise, cond)[..., 0, 0], label, target))
            measured["target"].append(measure(self.mixture, again, label, target))
        table = []
        for title, repeated in measured.items():
            parts = {title: repeated} | {f"{title}, label {k}": [figures["per_label"][k] for figures in repeated] for k in range(LABELS)}
            table += [(part, {name: mean_and_error([figures[name] for figures in own]) for name in own[0] if name != "per_label"})
                      for part, own in parts.items()]
        return table

    def target(self, label, guidance, generator):
        """Samples (B, 2) of what a student should draw."""
        if guidance == 1:
            return self.mixture.draw(label, generator).to(self.device)
        noise = torch.randn(1, len(label), *self.sample_shape, generator=generator).to(self.device)
        return sample.teacher_row(self, 100, guidance).draw(noise, {"class_labels": label})[..., 0, 0]

    def draw_rows(self, rows, prompts, path):
        """sample.py's picture: [(label, x (B, 2, 1, 1)), ...] as clouds side by side."""
        labels = self.encode(prompts)["class_labels"]
        draw_panels(self.mixture, [(title.split("\n")[0], x[..., 0, 0], labels, None) for title, x in rows], path)


class RealPoints:
    """The data, without end."""

    def __init__(self, model):
        self.model = model

    def draw(self, draws):
        truth, label = self.model.truth, draws.integers(0, LABELS)
        shares = truth.log_weights[label].exp().cumsum(1)                                          # (B, modes)
        mode = (shares < draws.uniform()[:, None].to(shares)).sum(1).clamp(max=len(truth.weights) - 1)
        x = truth.means[mode] + truth.deviations[mode, None] * draws.normal(2)
        return x[..., None, None], [str(i) for i in label.tolist()]                                # (B, 2, 1, 1), B prompts


# ---------------------------------------------------------------------------------------------------- numbers

def measure(mixture, x, label, x_target):
    """Figures of samples x (N, 2) with label (N,), against target samples x_target (N, 2) with the same labels; each the mean
    over the labels, whose own figures are in `per_label`.

        mass      total variation distance between the weights of the label's modes and the shares of samples nearest to each
        modes     share of a label's modes that are covered: they get at least a tenth of their weight in samples
        near      share of samples within 3 deviations of one of their label's modes
        sliced    sliced Wasserstein distance to the target, 64 directions
        kl        KL divergence from the target, KL(samples || target), both smoothed by a Gaussian of deviation 0.1 (kernel
                  estimates, a tenth of the samples left out to judge by), each sample's part cut at 20
        deviation root mean square distance of the label's samples from the label's target mean
    """
    per_label = {}
    for k in range(LABELS):
        own, target = x[label == k], x_target[label == k]
        mine = mixture.labels == k
        distance = torch.cdist(own, mixture.means[mine]) / mixture.deviations[mine]                # (n, modes)
        nearest, share = distance.min(1), mixture.weights[mine] / mixture.weights[mine].sum()
        hits = torch.bincount(nearest.indices[nearest.values < 3], minlength=len(share)) / len(own)
        shares = torch.bincount(nearest.indices, minlength=len(share)) / len(own)
        per_label[k] = {"mass": 0.5 * (shares - share).abs().sum().item(),
                        "modes": (hits >= 0.1 * share).float().mean().item(), "near": (nearest.values < 3).float().mean().item(),
                        "sliced": sliced_wasserstein(own, target), "kl": kernel_kl(own, target),
                        "deviation": (own - target.mean(0)).square().sum(1).mean().sqrt().item()}
    figures = {name: sum(row[name] for row in per_label.values()) / LABELS for name in per_label[0]}
    return figures | {"per_label": per_label}


def mean_and_error(values):
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")


def sliced_wasserstein(a, b, directions=64):
    """Mean over directions of the 1-Wasserstein distance between the projections of as many points each."""
    angles = torch.arange(directions, device=a.device) / directions * math.pi
    project = torch.stack([angles.cos(), angles.sin()])                                            # (2, directions)
    return ((a @ project).sort(0).values - (b @ project).sort(0).values).abs().mean().item()


def kernel_kl(a, b, width=0.1):
    """KL(a || b) of the kernel density estimates, judged on a tenth of `a` that takes no part in its own estimate."""
    judge, rest = a[:len(a) // 10], a[len(a) // 10:]
    judge = judge + width * torch.randn(judge.shape, generator=torch.Generator().manual_seed(0)).to(a.device)

    def log_density(points):
        return (-0.5 * torch.cdist(judge, points).square() / width ** 2).logsumexp(1) - math.log(len(points))

    return (log_density(rest) - log_density(b)).clamp(max=20).mean().item()


# ---------------------------------------------------------------------------------------------------- pictures

def draw_panels(mixture, panels, path, size=260, reach=2.4):
    """panels: [(title, points (N, 2) or None, label (N,) or None, arrows (M, 4) or None), ...] over the mixture's density."""
    ys, xs = torch.meshgrid(torch.linspace(reach, -reach, size), torch.linspace(-reach, reach, size), indexing="ij")
    grid = torch.stack([xs, ys], -1).view(-1, 2)
    density = mixture.to("cpu").log_density(grid, torch.ones(1, 1), torch.full((1, 1), 0.05), torch.full((len(grid),), LABELS)).exp()
    grey = (255 - 110 * (density / density.max()).sqrt()).view(size, size).to(torch.uint8).numpy()
    font, top = ImageFont.load_default(13), 40 if any(panel[0] for panel in panels) else 0
    sheet = Image.new("RGB", (len(panels) * (size + 8), size + top), "white")
    for k, (title, points, label, arrows) in enumerate(panels):
        panel = Image.fromarray(grey).convert("RGB")
        pen = ImageDraw.Draw(panel)
        place = lambda point: ((point[0] / reach + 1) * size / 2, (1 - point[1] / reach) * size / 2)
        for point, colour in zip(points.tolist(), label.tolist()) if points is not None else ():
            x, y = place(point)
            pen.rectangle((x - 1, y - 1, x, y), fill=COLOURS[colour])
        for x0, y0, x1, y1 in arrows.tolist() if arrows is not None else ():
            start, end = place((x0, y0)), place((x1, y1))
            pen.line((start, end), fill=(90, 30, 120), width=1)
            pen.ellipse((end[0] - 1, end[1] - 1, end[0] + 1, end[1] + 1), fill=(90, 30, 120))
        sheet.paste(panel, (k * (size + 8), top))
        ImageDraw.Draw(sheet).multiline_text((k * (size + 8) + 4, top - 4), title, font=font, fill="black", anchor="ld")
    sample.save_picture(sheet, path)


def direction_field(networks, args, t, label=0, reach=2.2, across=17):
    """Arrows (M, 4) along which a student's samples with that label are moved at timestep t: minus DM and CA with their weights, not
    normalised, on a grid of x_t, a third of their length, drawn from the grid's points as they would be without noise."""
    line = torch.linspace(-reach, reach, across, device=networks.model.device)
    x = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2)
    x_t = (networks.schedule.alpha[t] * x)[..., None, None]
    cond = {"class_labels": torch.full((len(x),), label, device=x.device)}
    with torch.no_grad():
        x0_cond, x0_uncond = models.cond_and_uncond_x0(networks.teacher, x_t, t, cond, networks.uncond, args.guidance)
        x0_fake, _ = networks.fake_score(x_t, t, cond)
    direction = args.dm_weight * losses.dm_direction(x0_cond, x0_fake) + args.ca_weight * losses.ca_direction(x0_cond, x0_uncond, args.guidance)
    return torch.cat([x, x - direction[..., 0, 0] / 3], 1).cpu()


class Gallery:
    """train.Gallery's part for the plane: the teacher's samples over its density, the student's, and the direction field."""

    def __init__(self, out, networks, prompts, args, count=1024):
        self.out, self.networks, self.args = out / "pictures", networks, args
        texts = [prompts.texts[i % len(prompts.texts)] for i in range(count)]
        self.cond = networks.model.encode(texts)
        self.noise = sample.column_noise(networks.model, count, args.student_steps + 1, args.seed)
        row = sample.teacher_row(networks.model, 50, args.guidance)
        self.x_teacher = row.draw(self.noise, self.cond)
        self.teacher = (row.label, self.x_teacher[..., 0, 0], self.cond["class_labels"], None)

    def draw(self, iteration):
        networks, t = self.networks, len(self.networks.schedule) // 3
        row = sample.student_row(networks.averaged_student, networks.timesteps)
        x = row.draw(self.noise, self.cond)[..., 0, 0]
        panels = [self.teacher, (row.label, x, self.cond["class_labels"], None),
                  (f"direction of label 0\nat t = {t}", x[self.cond["class_labels"] == 0], torch.zeros(len(x), dtype=torch.long),
                   direction_field(networks, self.args, t))]
        path = self.out / f"{iteration:06d}.png"
        if fsdp.first():
            draw_panels(networks.model.mixture, panels, path)
        return path
