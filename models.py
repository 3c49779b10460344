"""Noise schedules as two tables, networks as x0 predictors, text encoding and decoding, and the two samplers.

Conventions, stated once and used everywhere:

    x_t = alpha[t] * x0 + sigma[t] * eps      t an integer in [0, T); t = 0 is the cleanest, t = T - 1 the noisiest
    denoiser(x_t, t, cond) -> x0              whatever the network itself predicts
    guided = uncond + w * (cond - uncond)     guidance scale w; w = 1 is no guidance

cond is a dict of batch-first tensors with the names of the network's own arguments, so that it can be concatenated, sliced
and handed over without knowing which model family it belongs to.
"""

import contextlib
import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from errors import UserError


# ---------------------------------------------------------------------------------------------------- schedules

@dataclass
class Schedule:
    """alpha, sigma: the tables. network_time: what the network is told in place of t. noise_scale: what a sample starts from
    is noise_scale * eps. All float32, (T,)."""
    alpha: torch.Tensor
    sigma: torch.Tensor
    network_time: torch.Tensor
    noise_scale: float = 1.0

    def __len__(self):
        return len(self.alpha)

    def to(self, device):
        return Schedule(self.alpha.to(device), self.sigma.to(device), self.network_time.to(device), self.noise_scale)

    def at(self, t, x):
        """alpha and sigma at t, (B,), shaped to multiply x, (B, ...)."""
        shape = (-1,) + (1,) * (x.dim() - 1)
        return self.alpha[t].view(shape), self.sigma[t].view(shape)

    def add_noise(self, x0, eps, t):
        """x_t from x0, eps (B, ...) and t (B,)."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps

    def timesteps(self, steps):
        """`steps` evenly spaced timesteps from the noisiest down: 4 of 1000 are 999, 749, 499, 249."""
        return [len(self) * (steps - i) // steps - 1 for i in range(steps)]


def vp_schedule(alphas_cumprod):
    """Variance preserving (Stable Diffusion): alpha^2 + sigma^2 = 1."""
    alphas_cumprod = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
    time = torch.arange(len(alphas_cumprod), dtype=torch.float32)
    return Schedule(alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float(), time)


def edm_schedule(T=1000, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM (2206.00364, equation 5): alpha = 1, Karras noise levels."""
    u = torch.linspace(0, 1, T, dtype=torch.float64)
    sigma = (sigma_min ** (1 / rho) + u * (sigma_max ** (1 / rho) - sigma_min ** (1 / rho))) ** rho
    return Schedule(torch.ones(T), sigma.float(), (sigma.log() / 4).float(), noise_scale=sigma_max)


def flow_schedule(T=1000, shift=1.0):
    """Rectified flow (SD3, FLUX): alpha = 1 - s, sigma = s. Level t is u = (t + 1) / T, as in diffusers, so that T - 1 is pure
    noise and no level is free of it; s = u * shift / (1 + (shift - 1) * u)."""
    u = torch.arange(1, T + 1, dtype=torch.float64) / T
    s = shift * u / (1 + (shift - 1) * u)
    return Schedule((1 - s).float(), s.float(), (T * s).float())


# ---------------------------------------------------------------------------------------------------- networks as x0 predictors

EDM_SIGMA_DATA = 0.5


def edm_input_scale(sigma):
    """c_in, by which an EDM network's input is multiplied."""
    return (sigma.square() + EDM_SIGMA_DATA ** 2).rsqrt()


def x0_from_output(prediction, output, x_t, alpha, sigma):
    """What a network's output says about x0. All float32: at the noisy end of SD1.5 an eps error grows 14.6-fold here."""
    if prediction == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction == "v_prediction":
        return alpha * x_t - sigma * output
    if prediction == "flow":
        return x_t - sigma * output
    if prediction == "edm":
        total = sigma.square() + EDM_SIGMA_DATA ** 2
        return EDM_SIGMA_DATA ** 2 / total * x_t + sigma * EDM_SIGMA_DATA * total.rsqrt() * output
    raise UserError(f"prediction type {prediction!r} is not one of epsilon, v_prediction, flow, edm")


class Denoiser(torch.nn.Module):
    """A network with the schedule and the parametrisation that its output is read by."""

    def __init__(self, network, schedule, prediction, dtype=torch.float32):
        super().__init__()
        self.network, self.schedule, self.prediction, self.dtype = network, schedule, prediction, dtype

    def forward(self, x_t, t, cond):
        """x_t (B, C, H, W), t (B,) or an int, cond -> x0 (B, C, H, W), float32."""
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        alpha, sigma = self.schedule.at(t, x_t)
        scaled = x_t * edm_input_scale(sigma) if self.prediction == "edm" else x_t
        with compute_in(self.dtype, x_t.device):
            output = self.network(scaled, self.schedule.network_time[t], return_dict=False, **cond)[0]
        return x0_from_output(self.prediction, output.float(), x_t, alpha, sigma)

    def x0_and_features(self, x_t, t, cond):
        """The same, with what the network's mid block gave on the way."""
        seen = []
        hook = self.network.mid_block.register_forward_hook(lambda block, inputs, output: seen.append(output))
        try:
            return self(x_t, t, cond), seen[0]
        finally:
            hook.remove()


@contextlib.contextmanager
def compute_in(dtype, device):
    """Matrix products in `dtype`; master weights stay float32. On the CPU, bfloat16 attention goes by plain matrix products:
    the fused kernel's backward pass is several times slower there."""
    if dtype == torch.float32:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, dtype))
        if device.type == "cpu":
            stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        yield


def cond_and_uncond_x0(teacher, x_t, t, cond, uncond, guidance):
    """The teacher's x0 with and without the condition, in one pass over twice the batch. Without guidance (scale 1) the latter
    is not needed: the former stands for both."""
    if guidance == 1:
        x0_cond = teacher(x_t, t, cond)
        return x0_cond, x0_cond
    both = {name: torch.cat([cond[name], uncond[name].expand_as(cond[name])]) for name in cond}
    t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
    return teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)


def guide(x0_cond, x0_uncond, guidance):
    """Classifier-free guidance. It is the same in x0, eps, v and score, which differ by maps that are linear at one x_t."""
    return x0_uncond + guidance * (x0_cond - x0_uncond)


def guided_x0(teacher, x_t, t, cond, uncond, guidance):
    return guide(*cond_and_uncond_x0(teacher, x_t, t, cond, uncond, guidance), guidance)


class GanHead(torch.nn.Module):
    """One logit from a feature map (B, C, H, W), as in DMD2 (2405.14867): 4x4 convolutions of stride 2, each with GroupNorm and
    SiLU, until the map is 4x4; one more convolution to 1x1; then a linear one. A map that is smaller already meets the last two."""

    def __init__(self, channels, size):
        super().__init__()
        block = lambda kernel, **options: [torch.nn.Conv2d(channels, channels, kernel, **options),
                                           torch.nn.GroupNorm(min(32, channels), channels), torch.nn.SiLU()]
        layers = []
        while size > 4:
            layers += block(4, stride=2, padding=1)
            size //= 2
        self.layers = torch.nn.Sequential(*layers, *block(size), torch.nn.Conv2d(channels, 1, 1))

    def forward(self, features):
        return self.layers(features).sum(dim=(1, 2, 3))  # (B,); flatten gives a view, which FSDP warns of


def gan_head(denoiser, uncond, sample_shape, seed):
    """A head for the mid-block features of this denoiser's network, whose shape one pass tells."""
    with torch.no_grad():
        _, features = denoiser.x0_and_features(torch.zeros(1, *sample_shape, device=denoiser.schedule.alpha.device), 0, uncond)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GanHead(features.shape[1], features.shape[-1])


def fingerprint(module):
    """A short text that changes when a parameter does: a digest of the sums of their bits, which no order of summation can change."""
    sums = [parameter.detach().float().contiguous().view(torch.int32).sum(dtype=torch.int64).item() for parameter in module.parameters()]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


class FakeScore(torch.nn.Module):
    """The fake score's denoiser and, for the GAN and f-distill, a head on its mid-block features, so that one pass gives both.
    Without a head the logit is None. ratio_means is the running mean of f-distill's ratio in each time bin."""

    def __init__(self, denoiser, head=None, bins=10):
        super().__init__()
        self.denoiser, self.head = denoiser, head
        self.register_buffer("ratio_means", torch.ones(bins))

    def forward(self, x_t, t, cond):
        """x_t (B, C, H, W), t (B,) or an int, cond -> x0 (B, C, H, W), logit (B,), both float32."""
        if self.head is None:
            return self.denoiser(x_t, t, cond), None
        x0, features = self.denoiser.x0_and_features(x_t, t, cond)
        with compute_in(self.denoiser.dtype, x_t.device):
            return x0, self.head(features).float()


# ---------------------------------------------------------------------------------------------------- samplers

def deterministic_sample(x0_of, noise, timesteps, schedule):
    """Euler on the probability-flow ODE, which is DDIM (2010.02502, equation 12 without noise), for every schedule.

    x0_of(x_t, t) -> x0; noise (B, ...); the last step returns x0.
    """
    x_t = schedule.noise_scale * noise
    for t, s in zip(timesteps, timesteps[1:]):
        x0 = x0_of(x_t, t)
        eps = (x_t - schedule.alpha[t] * x0) / schedule.sigma[t]
        x_t = schedule.alpha[s] * x0 + schedule.sigma[s] * eps
    return x0_of(x_t, timesteps[-1])


def rollout(student, noise, cond, timesteps):
    """Few-step sampling with new noise before every step, for sampling and, as backward simulation (2405.14867),
    for training: predict x0, diffuse it to the next timestep, predict again.

    noise (steps, B, ...); cond; timesteps, noisiest first, as many as noise has. Only the last step builds a graph.
    """
    schedule = student.schedule
    x_t = schedule.noise_scale * noise[0]                                              # (B, C, H, W)
    with torch.no_grad():
        for t, s, eps in zip(timesteps, timesteps[1:], noise[1:]):
            x0 = student(x_t, t, cond)
            x_t = schedule.alpha[s] * x0 + schedule.sigma[s] * eps
    return student(x_t, timesteps[-1], cond)


# ---------------------------------------------------------------------------------------------------- models on disk

class Model:
    """A teacher as it lies on disk: text encoder, latents' decoder, and the network as a frozen Denoiser."""

    def __init__(self, name, tokenizer, text_encoder, vae, unet, scheduler, device, dtype, teacher_device=None):
        self.name, self.device, self.dtype, self.network_class = name, torch.device(device), dtype, type(unet)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder.requires_grad_(False).eval().to(device, torch.float32)
        self.vae = vae.requires_grad_(False).eval().to(device, torch.float32)
        self.schedule, self.prediction = read_scheduler(scheduler, name)
        self.schedule = self.schedule.to(device)
        self.teacher = self.denoiser(unet, teacher_device).requires_grad_(False).eval()
        self.origin = self.teacher  # what student and fake score start as
        self.sample_shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)

    def denoiser(self, network, device=None):
        return Denoiser(network.to(device or self.device, torch.float32), self.schedule, self.prediction, self.dtype)

    @torch.no_grad()
    def encode(self, prompts):
        """list of str -> cond. SD1.5: the last hidden states of all tokens, padding included; no condition is the empty prompt."""
        ids = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length,
                             return_tensors="pt").input_ids.to(self.device)
        with compute_in(self.dtype, self.device):
            text = self.text_encoder(ids)[0]
        return {"encoder_hidden_states": text.float()}                                 # (B, tokens, width)

    def pixels(self, x):
        """Latents (B, C, h, w) -> pictures (B, 3, H, W) in about [-1, 1], with a graph."""
        return self.vae.decode(x / self.vae.config.scaling_factor).sample

    @torch.no_grad()
    def decode(self, x):
        """Latents (B, C, h, w) -> pictures (B, 3, H, W) in [0, 1], on the CPU."""
        parts = [self.pixels(part).float().cpu() for part in x.split(64)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def latents(self, pictures):
        """Pictures (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w)."""
        return self.vae.encode(pictures.to(self.device)).latents * self.vae.config.scaling_factor


def read_scheduler(scheduler, name):
    """The schedule's tables and the prediction type, from a diffusers scheduler of Stable Diffusion's kind."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"{name}: no noise schedule is known for the scheduler {type(scheduler).__name__}")
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"{name}: prediction type {prediction!r} of its scheduler is not epsilon or v_prediction")
    if scheduler.config.get("rescale_betas_zero_snr"):
        raise UserError(f"{name}: rescale_betas_zero_snr of its scheduler is not supported")
    return vp_schedule(scheduler.alphas_cumprod), prediction


def load_model(path, device="cpu", dtype=torch.float32, teacher_device=None):
    """A Stable Diffusion pipeline from a diffusers directory, a hub id, or one .safetensors file; or gmm.py's plane. teacher_device:
    where the teacher's network is left, if not on the device: fsdp.shard brings it there block by block."""
    options = dict(safety_checker=None, feature_extractor=None)
    check_device(device)
    import gmm  # which itself needs this module
    if str(path) in gmm.NAMES:
        return gmm.Model(str(path), device, dtype)
    with quiet_libraries():
        from diffusers import StableDiffusionPipeline
        try:
            if Path(path).is_file():
                pipe = StableDiffusionPipeline.from_single_file(path, **options)
            else:
                check_model_path(path)
                pipe = StableDiffusionPipeline.from_pretrained(path, use_safetensors=True, requires_safety_checker=False,
                                                               low_cpu_mem_usage=False, **options)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"the model {path} cannot be loaded: {first_line(error)}") from None
        return Model(str(path), pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.unet, pipe.scheduler, device, dtype, teacher_device)


def lpips_loss(model):
    """LPIPS (1801.03924) of the pictures of two batches of latents, the second of which needs no gradient; the target network sees
    them enlarged to 224 pixels at least."""
    if not hasattr(model, "pixels"):
        raise UserError(f"--regression lpips compares pictures, and {model.name} has none: use --regression mse")
    try:
        import lpips
    except ImportError:
        raise UserError("--regression lpips needs a package that is not installed: pip install lpips") from None
    try:
        distance = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).to(model.device)
    except OSError as error:  # torchvision fetches VGG's weights when they are first used
        raise UserError(f"--regression lpips cannot get VGG's weights: {first_line(error)}") from None

    def seen(x):
        pictures = model.pixels(x)
        return torch.nn.functional.interpolate(pictures, size=max(224, pictures.shape[-1]), mode="bilinear", antialias=True)

    def loss(x, x0_pair):
        with torch.no_grad():
            target = seen(x0_pair)
        return distance(seen(x), target).mean()

    return loss


def check_device(device):
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used: {first_line(error)}") from None


@contextlib.contextmanager
def quiet_libraries():
    """Without the bars and remarks that diffusers and transformers make while they load and save; errors still raise."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging
    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, verbosity in zip(libraries, before):
            library.set_verbosity(verbosity)
            library.enable_progress_bar()


def check_model_path(path):
    """Say at once what is wrong with a local directory, rather than let the hub be asked for it."""
    index = Path(path) / "model_index.json"
    if not index.is_file():
        if Path(path).is_dir():
            raise UserError(f"{path} is no diffusers pipeline: it has no model_index.json")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise UserError(f"there is no model directory or file {path}, and it is no hub id (owner/name) either")
        return
    name = read_json(index).get("_class_name")
    if name != "StableDiffusionPipeline":
        raise UserError(f"{path} is a {name}; only StableDiffusionPipeline is supported")


def load_student(path, model):
    """A student's Denoiser, from a run directory (its student/) or from a diffusers UNet directory of the teacher's shape."""
    folder = Path(path) / "student" if (Path(path) / "student").is_dir() else Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"there is no student at {path}: neither student/config.json nor config.json is there")
    try:
        kind = model.network_class
        config = kind.load_config(folder)
        if config.get("_class_name") != kind.__name__:
            raise UserError(f"{folder} holds a {config.get('_class_name')}, not a {kind.__name__}")
        check_same_architecture(config, model, folder)
        with quiet_libraries():
            network = kind.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
            return model.denoiser(network).requires_grad_(False).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the student {folder} cannot be loaded: {first_line(error)}") from None


def check_same_architecture(config, model, folder):
    reference = model.origin.network.config
    for name, value in reference.items():
        theirs = config.get(name, value)
        same = list(theirs) == list(value) if isinstance(value, (list, tuple)) and isinstance(theirs, (list, tuple)) else theirs == value
        if not name.startswith("_") and not same:
            raise UserError(f"the student {folder} has another architecture than {model.name}: {name} is {theirs}, not {value}")


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
