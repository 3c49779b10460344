"""Noise schedules as two tables, networks as x0 predictors, samplers, and teachers on disk.

Conventions, stated once and used everywhere:

    x_t = alpha[t] * x0 + sigma[t] * eps      t an integer in [0, T); t = 0 is the cleanest
    denoiser(x_t, t, cond) -> x0              whatever the network itself predicts
    guided = uncond + w * (cond - uncond)     guidance scale w; w = 1 is no guidance

cond is a dict of batch-first tensors with the names of the network's own arguments. It can be
concatenated, sliced and handed on without knowing which model family it belongs to.
"""

import copy
import functools
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import fsdp
from support import edm, pipelines
from support.cli import UserError
from support.families import FAMILIES
from support.middle import read_middle
from support.precision import compute_in
from support.shards import Conditions
from support.weights import fingerprint, in_one_line

ASSETS = (Path(__file__).parent / "assets").resolve()


# ----------------------------------------------------------------------------- noise schedules


@dataclass
class Schedule:
    """alpha, sigma: the tables. network_time: what the network is given for t. All float32, (T,).
    A sample starts from noise_scale * eps."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    network_time: torch.Tensor
    noise_scale: float = 1.0

    def __len__(self):
        return len(self.alpha)

    def to(self, device):
        tables = (self.alpha.to(device), self.sigma.to(device), self.network_time.to(device))
        return Schedule(*tables, self.noise_scale)

    def at(self, t, x):
        """alpha and sigma at t (B,), shaped to multiply x (B, ...)."""
        shape = (-1,) + (1,) * (x.dim() - 1)
        return self.alpha[t].view(shape), self.sigma[t].view(shape)

    def add_noise(self, x0, eps, t):
        """x_t from x0, eps (B, ...) and t (B,)."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps

    def timesteps(self, steps, first=None):
        """`steps` evenly spaced timesteps from `first` (the noisiest) down: 999, 749, 499, 249."""
        count = len(self) if first is None else first + 1
        return [count * (steps - i) // steps - 1 for i in range(steps)]


def vp_schedule(alphas_cumprod):
    """Variance preserving (Stable Diffusion): alpha^2 + sigma^2 = 1."""
    alphas_cumprod = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
    time = torch.arange(len(alphas_cumprod), dtype=torch.float32)
    return Schedule(alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float(), time)


def edm_schedule(T=1000, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM (2206.00364, equation 5): alpha = 1 and Karras noise levels; a single one is
    sigma_max."""
    u = torch.linspace(1, 0, T, dtype=torch.float64).flip(0)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigma = (low + u * (high - low)) ** rho
    return Schedule(torch.ones(T), sigma.float(), (sigma.log() / 4).float(), sigma_max)


def flow_schedule(T=1000, shift=1.0):
    """Rectified flow (SD3, FLUX): alpha = 1 - s, sigma = s, s = u shift / (1 + (shift - 1) u).

    Level t is u = (t + 1) / T, as in diffusers: T - 1 is pure noise, and no level is free of it.
    """
    u = torch.arange(1, T + 1, dtype=torch.float64) / T
    s = shift * u / (1 + (shift - 1) * u)
    return Schedule((1 - s).float(), s.float(), (T * s).float())


def flow_shift(config, tokens):
    """The shift of a flow scheduler; a dynamic one grows with the number of image tokens."""
    if not config.get("use_dynamic_shifting"):
        return config.get("shift") or config.get("flow_shift") or 1.0
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = base + (tokens - low) * (most - base) / (high - low)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def shift_timesteps(t, T, shift):
    """u -> shift u / (1 + (shift - 1) u) of levels u = (t + 1) / T, t (B,), to whole levels."""
    u = (t + 1) / T
    return (T * shift * u / (1 + (shift - 1) * u)).round().long() - 1


def read_scheduler(scheduler, name, tokens=None):
    """Tables and prediction type of a diffusers scheduler -> Schedule, str. tokens: an image's,
    which flow models may shift by."""
    config = scheduler.config
    flow_euler = type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    if flow_euler or config.get("use_flow_sigmas"):
        return flow_schedule(config.num_train_timesteps, flow_shift(config, tokens)), "flow"
    levels, prediction = pipelines.vp_levels(scheduler, name)
    return vp_schedule(levels), prediction


# ----------------------------------------------------------------------------- x0 predictors


def edm_input_scale(sigma):
    """c_in, which an EDM network's input is multiplied by."""
    return (sigma.square() + edm.SIGMA_DATA**2).rsqrt()


def x0_from_output(prediction, output, x_t, alpha, sigma):
    """x0 from a network's output. All float32: at SD1.5's noisiest level an eps error grows
    14.6-fold here."""
    if prediction == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction == "v_prediction":
        return alpha * x_t - sigma * output
    if prediction == "flow":
        return x_t - sigma * output
    if prediction == "edm":
        total = sigma.square() + edm.SIGMA_DATA**2
        skip = edm.SIGMA_DATA**2 / total
        return skip * x_t + sigma * edm.SIGMA_DATA * total.rsqrt() * output
    raise UserError(f"prediction type {prediction!r} is not epsilon, v_prediction, flow or edm")


class Denoiser(torch.nn.Module):
    """A network, the schedule it was trained on, and how its output is read. guidance_norm: a name
    of GUIDANCE_NORMS, what the guided teacher keeps."""

    def __init__(
        self, network, schedule, prediction, family, dtype=torch.float32, guidance_norm="none"
    ):
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.family = family
        self.dtype = dtype
        self.guidance_norm = guidance_norm

    def forward(self, x_t, t, cond, schedule=None, count=None):
        """x_t (B, C, H, W), t (B,) or an int, cond -> x0 (B, C, H, W), float32.

        schedule: another table that t is an index of. count: see x0_and_features.
        """
        schedule = schedule or self.schedule
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        alpha, sigma = schedule.at(t, x_t)
        scaled = x_t * edm_input_scale(sigma) if self.prediction == "edm" else x_t
        with compute_in(self.dtype, x_t):
            output = self.family.call(self.network, scaled, schedule.network_time[t], cond)
        x_t, output = x_t[:count], output[:count]
        alpha, sigma = alpha[:count], sigma[:count]
        return x0_from_output(self.prediction, output.float(), x_t, alpha, sigma)

    def x0_and_features(self, x_t, t, cond, count=None, x0_graph=True):
        """x0 and, from the same pass, the features of the network's middle (B, C, h, w).

        count: x0 of the first so many samples only. The blocks above the middle see no others where
        the family's can be cut; elsewhere x0 is cut.
        x0_graph: whether these blocks keep what a backward pass from x0 needs.
        """
        count = len(x_t) if count is None else count
        with read_middle(self.family, self.network, len(x_t), count, x0_graph) as seen:
            x0 = self(x_t, t, cond, count=count)
        return x0, self.family.features(seen[0], x_t, cond)


def join(*conds):
    """Conditions as one, along the batch."""
    return {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


def take(batch, index):
    """Those samples of a tensor, of a condition, or of None."""
    if batch is None:
        return None
    if isinstance(batch, dict):
        return {name: value[index] for name, value in batch.items()}
    return batch[index]


# ----------------------------------------------------------------------------- guidance


def guide(x0_cond, x0_uncond, guidance):
    """Classifier-free guidance (2207.12598). It is the same in x0, eps, v and score, since these
    are linear in one another at one x_t."""
    return x0_uncond + guidance * (x0_cond - x0_uncond)


def row_norm(v):
    """(B, C, H, W) -> (B, C, H, 1)"""
    return v.norm(dim=-1, keepdim=True)


def token_norm(v):
    """Of 2x2 latents over all channels. (B, C, H, W) -> (B, 1, H, W)"""
    norm = F.pixel_unshuffle(v, 2).norm(dim=1, keepdim=True)  # (B, 1, H / 2, W / 2)
    return norm.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


# What of the output is as long with guidance as without it, against over-saturation at large
# scales. Lumina 2's pipeline takes rows and Qwen-Image's takes tokens.
GUIDANCE_NORMS = {"none": None, "row": row_norm, "token": token_norm}


def keep_norm(x0_guided, x0_cond, x_t, norm):
    """v_guided |v_cond| / |v_guided|, as x0. v = (x_t - x0) / sigma is a flow model's output."""
    v_cond, v_guided = x_t - x0_cond, x_t - x0_guided  # times sigma
    return x_t - v_guided * norm(v_cond) / norm(v_guided).clamp(min=1e-12)


def cond_and_guided_x0(teacher, x_t, t, cond, uncond, guidance, schedule=None):
    """The teacher's x0 without guidance and with it, in one pass over twice the batch. At guidance
    1 the pass without the condition is not needed, and the two are one. schedule: see Denoiser."""
    if guidance == 1:
        x0_cond = teacher(x_t, t, cond, schedule)
        return x0_cond, x0_cond
    both = join(cond, {name: uncond[name].expand_as(cond[name]) for name in cond})
    t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
    x0 = teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), both, schedule)
    x0_cond, x0_uncond = x0.chunk(2)
    x0_guided = guide(x0_cond, x0_uncond, guidance)
    norm = GUIDANCE_NORMS[teacher.guidance_norm]
    if norm is not None:
        x0_guided = keep_norm(x0_guided, x0_cond, x_t, norm)
    return x0_cond, x0_guided


def guided_x0(teacher, x_t, t, cond, uncond, guidance, schedule=None):
    return cond_and_guided_x0(teacher, x_t, t, cond, uncond, guidance, schedule)[1]


# ----------------------------------------------------------------------------- fake score


class GanHead(torch.nn.Module):
    """One logit from a feature map (B, C, H, W), as in DMD2 (2405.14867).

    4x4 convolutions of stride 2 until the map is 4x4, one more to 1x1, each with GroupNorm and
    SiLU; then a linear layer.
    """

    def __init__(self, channels, size):
        super().__init__()
        # On a 1x1 map a group has no more values than channels. Normalising one value leaves
        # nothing and normalising two leaves only their order, hence four at least.
        groups = min(math.gcd(channels, 32), max(1, channels // 4))
        layers = []
        while size > 4:
            layers.append(torch.nn.Conv2d(channels, channels, 4, stride=2, padding=1))
            layers += [torch.nn.GroupNorm(groups, channels), torch.nn.SiLU()]
            size //= 2
        layers.append(torch.nn.Conv2d(channels, channels, size))
        layers += [torch.nn.GroupNorm(groups, channels), torch.nn.SiLU()]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Conv2d(channels, 1, 1))

    def forward(self, features):
        return self.layers(features).sum(dim=(1, 2, 3))  # (B,); flatten would give FSDP a view


def make_gan_head(denoiser, uncond, sample_shape, seed):
    """A head for this denoiser's features, whose shape one pass tells."""
    x = torch.zeros(1, *sample_shape, device=denoiser.schedule.alpha.device)
    with torch.no_grad():
        _, features = denoiser.x0_and_features(x, 0, uncond)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GanHead(features.shape[1], features.shape[-1])


class FakeScore(torch.nn.Module):
    """The fake score's denoiser and, for the GAN and f-distill, a head on its features, so that
    one pass gives x0 and logit. ratio_means: f-distill's running mean of the ratio in each bin."""

    def __init__(self, denoiser, head=None, bins=10):
        super().__init__()
        self.denoiser = denoiser
        self.head = head
        self.register_buffer("ratio_means", torch.ones(bins))

    def forward(self, x_t, t, cond, count=None, x0_graph=True):
        """x_t (B, C, H, W), t (B,) or an int, cond -> x0 (B, C, H, W) and logit (B,), float32.
        Without a head the logit is None. count, x0_graph: see Denoiser.x0_and_features."""
        if self.head is None:
            return self.denoiser(x_t, t, cond), None
        x0, features = self.denoiser.x0_and_features(x_t, t, cond, count, x0_graph)
        with compute_in(self.denoiser.dtype, x_t):
            return x0, self.head(features).float()


def trainable_copy(origin, rank=0, alpha=8.0, seed=0):
    """A copy of a denoiser to train: all of it in float32, or, with a rank above 0, a LoRA of that
    rank over the origin's own parameters, which then lie in the dtype they are computed in."""
    if rank == 0:
        return copy.deepcopy(origin).requires_grad_(True)
    from peft import LoraConfig

    if not hasattr(origin.network, "add_adapter"):
        raise UserError("--lora needs a network of diffusers that takes adapters")
    origin.to(origin.dtype)
    shared = {id(parameter): parameter for parameter in origin.parameters()}
    student = copy.deepcopy(origin, shared).requires_grad_(False)
    layers = list(origin.family.lora_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers)
        student.network.add_adapter(config)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return student


# ----------------------------------------------------------------------------- samplers


def deterministic_step(x0, x_t, t, s, schedule):
    """From x_t at t to s by the x0 that was predicted there: an Euler step on the probability-flow
    ODE for every schedule. It is DDIM (2010.02502, equation 12 without noise)."""
    eps = (x_t - schedule.alpha[t] * x0) / schedule.sigma[t]
    return schedule.alpha[s] * x0 + schedule.sigma[s] * eps


def deterministic_input(x0_of, noise, timesteps, schedule):
    """Such steps from noise to the last timestep: x_t there. x0_of(x_t, t) -> x0; noise (B, ...)"""
    x_t = schedule.noise_scale * noise
    for t, s in zip(timesteps, timesteps[1:]):
        x_t = deterministic_step(x0_of(x_t, t), x_t, t, s, schedule)
    return x_t


def deterministic_sample(x0_of, noise, timesteps, schedule):
    """The same, and x0 at the last of them."""
    x_t = deterministic_input(x0_of, noise, timesteps, schedule)
    return x0_of(x_t, timesteps[-1])


def few_step_sample(student, noise, cond, timesteps):
    """The student's sampler: predict x0, diffuse it to the next timestep with new noise, repeat.

    noise (steps, B, ...); timesteps, noisiest first, as many as noise has -> x0 (B, ...). Only the
    last step builds a graph.
    """
    x_t = last_input(student, noise, cond, timesteps)
    return student(x_t, timesteps[-1], cond)


@torch.no_grad()
def last_input(student, noise, cond, timesteps):
    """The x_t that the sampler gives the student at its last step. In training this is backward
    simulation (2405.14867): the student learns from the inputs that it will see."""
    schedule = student.schedule
    x_t = schedule.noise_scale * noise[0]  # (B, C, H, W)
    for t, s, eps in zip(timesteps, timesteps[1:], noise[1:]):
        x0 = student(x_t, t, cond)
        x_t = schedule.alpha[s] * x0 + schedule.sigma[s] * eps
    return x_t


# ----------------------------------------------------------------------------- models


class Model:
    """A teacher as it lies on disk: what encodes prompts, what decodes latents, and the network as
    a frozen Denoiser. Students start as copies of `origin`, which is that network.

    Encoders may lie on a device of their own; what they give is on `device`. The network is kept
    in weights_dtype, float32 where it will be trained.
    """

    labels = None  # the number of classes, of class-conditional models
    prompts = None  # all there are, where that is a list
    sample_prompts = None  # what to draw when nothing is said
    conditions = None  # prompts that were encoded beforehand
    default_teacher_steps = 50
    guidance_norm = "none"
    encoding = threading.Lock()  # a tokenizer is not safe in two threads, and batches come ahead

    def __init__(
        self,
        name,
        family,
        pipe,
        device="cpu",
        dtype=torch.float32,
        weights_dtype=torch.float32,
        network_device=None,
        encoder_device=None,
        own_vae=True,
        image_size=None,
        conditions=None,
        guidance_norm=None,
    ):
        self.name, self.family, self.pipe = name, family, pipe
        self.default_guidance = family.guidance
        self.guidance_norm = guidance_norm or "none"
        self.device, self.dtype = torch.device(device), dtype
        self.encoder_device = torch.device(encoder_device or device)
        network = getattr(pipe, family.network)
        network.to(network_device or device, weights_dtype)
        self.sample_shape, self.image_size = self.sizes(image_size)
        schedule, self.prediction = self.read_schedule()
        if self.guidance_norm != "none" and self.prediction != "flow":
            raise UserError(f"--guidance-norm is for flow models, which {name} is not")
        if self.guidance_norm == "token" and self.sample_shape[1] % 2:
            raise UserError(
                f"--guidance-norm token is of 2x2 latents: {self.sample_shape[1]} a side are odd"
            )
        self.schedule = schedule.to(device)
        self.denoiser = self.make_denoiser(network).requires_grad_(False).eval()
        self.origin = self.denoiser
        self.frozen_dtype = dtype  # of a teacher that is not trained on
        self.conditions = Conditions(conditions, self) if conditions else None
        self.text_encoders = [
            part.requires_grad_(False).eval().to(self.encoder_device, dtype)
            for part_name, part in vars(pipe).items()
            if part_name.startswith("text_encoder") and part is not None
        ]
        self.vae = pipe.vae
        self.encoder_print = None  # tells latents of one VAE from those of another
        if self.vae is not None:
            scale = self.vae.config.get("scaling_factor", 1.0)
            if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
                raise UserError(f"{name}: the scaling_factor of its VAE is {scale!r}")
            self.vae.requires_grad_(False).eval().to(self.encoder_device, torch.float32)
            self.encoder_print = fingerprint(self.vae) if own_vae else None
        self.decodes = self.vae is not None

    def sizes(self, image_size):
        """Shape of a latent (C, H, W), and the width of an image: the network's own if None."""
        channels, _, size = self.family.shape(self.pipe)
        if type(size) is not int or size < 1:
            raise UserError(f"{self.name}: the sample_size of its network is {size!r}")
        factor = self.family.patch * getattr(self.pipe, "vae_scale_factor", 1)
        if image_size is not None:
            step = factor * self.family.multiple
            if image_size % step:
                raise UserError(f"--image-size {image_size} is no multiple of {step}")
            size = image_size // factor
        return (channels, size, size), size * factor

    @property
    def shift(self):
        """Of a flow model's noise levels."""
        return flow_shift(self.pipe.scheduler.config, self.tokens)

    @property
    def tokens(self):
        """Of an image, as a flow model's schedule counts them."""
        return (self.sample_shape[1] // self.family.multiple) ** 2

    def read_schedule(self):
        return read_scheduler(self.pipe.scheduler, self.name, self.tokens)

    def make_denoiser(self, network):
        return Denoiser(
            network, self.schedule, self.prediction, self.family, self.dtype, self.guidance_norm
        )

    @property
    def network_class(self):
        return type(self.origin.network)

    @torch.no_grad()
    def encode(self, prompts):
        """list of str -> cond, float32 on the model's device."""
        encode = self.conditions or functools.partial(self.family.encode, self)
        with self.encoding:
            cond = encode(list(prompts))
        return {
            name: value.to(self.device, torch.float32 if value.is_floating_point() else None)
            for name, value in cond.items()
        }

    @functools.cached_property
    def uncond(self):
        """No condition: the empty prompt. (1, ...)"""
        return self.encode([""])

    def caption(self, prompt):
        """What an image of this prompt is called."""
        return prompt

    def own_real_data(self):
        """Real data that belong to the model: none."""
        return

    def own_names(self, weights):
        """A student file's weights by diffusers' names."""
        return weights

    def pixels(self, x):
        """Latents (B, C, h, w) -> images (B, 3, H, W) in about [-1, 1], with a graph."""
        if self.vae is None:
            raise UserError("--vae none leaves out the decoder, without which there are no images")
        return self.family.decode(self.vae, x.to(self.encoder_device))

    @torch.no_grad()
    def decode(self, x, batch_size=64):
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], on the CPU. Raises UserError where
        they are not finite: clamped, NaN would be black."""
        images = torch.cat([self.pixels(part).float().cpu() for part in x.split(batch_size)])
        if not images.isfinite().all():
            advice = "; --dtype float32 may help" if self.dtype != torch.float32 else ""
            raise UserError(f"the samples hold NaN or infinity{advice}", status=1)
        return (images / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), the mode of the VAE's
        posterior."""
        return self.family.encode_images(self.vae, images.to(self.encoder_device)).to(self.device)


class ClassModel(Model):
    """EDM's class-conditional network (2206.00364). A prompt is a class, by number or name; images
    are their own latents."""

    default_teacher_steps = 18  # as in EDM's generate.py

    def __init__(self, name, network, names, **options):
        network = edm.with_row_for_no_label(network)
        self.labels = network.config.num_class_embeds - 1
        self.names = names
        self.prompts = [str(label) for label in range(self.labels)]
        self.sample_prompts = self.prompts[:: max(1, self.labels // 8)][:8]
        pipe = SimpleNamespace(unet=network, vae=None)
        options["weights_dtype"] = torch.float32
        super().__init__(name, FAMILIES["UNet2DModel"], pipe, **options)
        self.frozen_dtype = torch.float32
        self.decodes = True

    def read_schedule(self):
        return edm_schedule(), "edm"

    def make_denoiser(self, network):
        return super().make_denoiser(edm.prepare_network(network))

    def label(self, prompt):
        return edm.find_label(prompt, self.names, self.labels, self.name)

    def caption(self, prompt):
        return (
            f"{prompt} {self.names[int(prompt)]}" if self.names and prompt.isdecimal() else prompt
        )

    def own_names(self, weights):
        return edm.student_weights(weights, self.origin.network.config)

    def pixels(self, x):
        return x

    def encode_images(self, images):
        return images.to(self.device)


def load_model(path, device="cpu", dtype=torch.float32, vae=None, config=None, **options):
    """A diffusers directory, a hub id or one .safetensors file; for EDM's networks their pickle or
    a UNet2DModel directory.

    vae: another decoder's directory or hub id; "none" leaves it out. config: for one file, the
    local directory of a pipeline of its kind (else the hub is asked). options: see Model.
    Raises UserError in one line.
    """
    fsdp.check_device(device)
    fsdp.check_device(options.get("encoder_device") or device)
    if edm.is_edm(path):
        network = edm.load_network(path)
        names = edm.label_names(path, network.config.num_class_embeds, ASSETS)
        return ClassModel(str(path), network, names, device=device, dtype=dtype, **options)
    with_text = options.get("conditions") is None
    kind, pipe = pipelines.open_pipeline(path, FAMILIES, vae, config, with_text)
    options["own_vae"] = vae is None
    with in_one_line(f"the model {path} cannot be loaded"):
        model = Model(str(path), FAMILIES[kind], pipe, device, dtype, **options)
        model.uncond  # noqa: B018, parts that do not fit one another fail here
    return model
