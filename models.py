"""Noise schedules as two tables, networks as x0 predictors, text encoding and decoding, and the two samplers.

Conventions, stated once and used everywhere:

    x_t = alpha[t] * x0 + sigma[t] * eps      t an integer in [0, T); t = 0 is the cleanest, t = T - 1 the noisiest
    denoiser(x_t, t, cond) -> x0              whatever the network itself predicts
    guided = uncond + w * (cond - uncond)     guidance scale w; w = 1 is no guidance

cond is a dict of batch-first tensors with the names of the network's own arguments, so that it can be concatenated, sliced
and handed over without knowing which model family it belongs to.
"""

import contextlib
import copy
import functools
import hashlib
import json
import math
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.utils.checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

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

    def timesteps(self, steps, first=None):
        """`steps` evenly spaced timesteps from the first (default: the noisiest) down: 4 of 1000 are 999, 749, 499, 249."""
        count = len(self) if first is None else first + 1
        return [count * (steps - i) // steps - 1 for i in range(steps)]


def vp_schedule(alphas_cumprod):
    """Variance preserving (Stable Diffusion): alpha^2 + sigma^2 = 1."""
    alphas_cumprod = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
    time = torch.arange(len(alphas_cumprod), dtype=torch.float32)
    return Schedule(alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float(), time)


def edm_schedule(T=1000, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM (2206.00364, equation 5): alpha = 1, Karras noise levels; a single one is the noisiest."""
    u = torch.linspace(1, 0, T, dtype=torch.float64).flip(0)
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

    def forward(self, x_t, t, cond, schedule=None):
        """x_t (B, C, H, W), t (B,) or an int, cond -> x0 (B, C, H, W), float32. schedule: another table that t is of."""
        t, schedule = torch.as_tensor(t, device=x_t.device).expand(len(x_t)), schedule or self.schedule
        alpha, sigma = schedule.at(t, x_t)
        scaled = x_t * edm_input_scale(sigma) if self.prediction == "edm" else x_t
        with compute_in(self.dtype, x_t.device):
            output = self.network(scaled, schedule.network_time[t], return_dict=False, **network_arguments(cond))[0]
        return x0_from_output(self.prediction, output.float(), x_t, alpha, sigma)

    def x0_and_features(self, x_t, t, cond):
        """The same, with what the network's mid block gave on the way; of EDM's, as in DMD2, what it was given."""
        seen, block = [], self.network.mid_block
        if self.prediction == "edm":
            hook = block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
        else:
            hook = block.register_forward_hook(lambda block, inputs, output: seen.append(output))
        try:
            return self(x_t, t, cond), seen[0]
        finally:
            hook.remove()


def network_arguments(cond):
    """The condition as the network takes it: SDXL's UNet wants what is not text states in a dict of its own."""
    added = {name: cond[name] for name in ("text_embeds", "time_ids") if name in cond}
    return {name: value for name, value in cond.items() if name not in added} | ({"added_cond_kwargs": added} if added else {})


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


def checkpoint_activations(denoiser):
    """Compute activations again in the backward pass rather than keep them, with the very kernels of the first time."""
    again = lambda: (contextlib.nullcontext(), compute_in(denoiser.dtype, denoiser.schedule.alpha.device))
    denoiser.network.enable_gradient_checkpointing(functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, context_fn=again))


def in_parts(size, function, *batches):
    """function(*batches), called with at most `size` samples at once. Tensors and conditions are cut; numbers are handed on as they are.
    With a part for all it is the plain call, and keeps its graph."""
    count = len(batches[0])
    if size >= count:
        return function(*batches)
    results = [function(*(samples(batch, slice(start, start + size)) for batch in batches)) for start in range(0, count, size)]
    join = lambda pieces: None if pieces[0] is None else torch.cat(pieces)
    return tuple(join(pieces) for pieces in zip(*results)) if isinstance(results[0], tuple) else join(results)


def samples(batch, part):
    """Those samples of a tensor or of a condition."""
    if isinstance(batch, dict):
        return {name: value[part] for name, value in batch.items()}
    return batch[part] if isinstance(batch, torch.Tensor) else batch


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
        # On 1x1 a group has no more values than channels: of one, normalising leaves nothing, and of two only their order.
        groups = min(math.gcd(channels, 32), max(1, channels // 4))
        block = lambda kernel, **options: [torch.nn.Conv2d(channels, channels, kernel, **options),
                                           torch.nn.GroupNorm(groups, channels), torch.nn.SiLU()]
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


def prints(model):
    """Of all that decides what a model's pictures are, beside the network: {what: a short text that changes when it does}."""
    parts = {f"text encoder {i + 1}": fingerprint(encoder) for i, (_, encoder) in enumerate(getattr(model, "text_encoders", ()))}
    parts |= {"decoder": fingerprint(model.vae)} if getattr(model, "vae", None) else {}
    tables = torch.stack([model.schedule.alpha, model.schedule.sigma]).cpu().numpy().tobytes()
    return parts | {"schedule": f"{model.prediction} {hashlib.sha256(tables).hexdigest()[:16]}"}


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


def heun_sample(x0_of, noise, schedule, steps):
    """EDM's samplers (2206.00364, algorithms 1 and 2): Heun's second-order steps through the first `steps` levels of the schedule, the last one,
    to no noise at all, of first order. 2 steps - 1 calls of x0_of(x_t, t).

    noise (S, B, ...). A schedule of twice as many levels, see stochastic_levels, has at steps + t the level to which noise[steps - t] raises
    level t before the step from there: algorithm 2.
    """
    sigma = schedule.sigma
    x_t = schedule.noise_scale * noise[0]                                                          # (B, C, H, W)
    for t in range(steps - 1, 0, -1):
        start = t
        if len(schedule) > steps:
            start = steps + t
            x_t = x_t + STOCHASTIC["noise"] * (sigma[start] ** 2 - sigma[t] ** 2).sqrt() * noise[steps - t]
        step, slope = sigma[t - 1] - sigma[start], (x_t - x0_of(x_t, start)) / sigma[start]
        x_s = x_t + step * slope
        x_t = x_t + step * (slope + (x_s - x0_of(x_s, t - 1)) / sigma[t - 1]) / 2
    return x0_of(x_t, 0)


STOCHASTIC = dict(churn=40, low=0.05, high=50.0, noise=1.003)  # EDM's for ImageNet-64: S_churn, S_min, S_max, S_noise


def stochastic_levels(steps):
    """EDM's levels, and after them those to which each is raised."""
    levels = edm_schedule(steps)
    gamma = min(STOCHASTIC["churn"] / steps, 2 ** 0.5 - 1)
    within = (levels.sigma >= STOCHASTIC["low"]) & (levels.sigma <= STOCHASTIC["high"])
    sigma = torch.cat([levels.sigma, torch.where(within, (1 + gamma) * levels.sigma, levels.sigma)])
    return Schedule(torch.ones_like(sigma), sigma, sigma.log() / 4, levels.noise_scale)


def rollout(student, noise, cond, timesteps):
    """Few-step sampling with new noise before every step, for sampling and, as backward simulation (2405.14867),
    for training: predict x0, diffuse it to the next timestep, predict again.

    noise (steps, B, ...); cond; timesteps, noisiest first, as many as noise has. Only the last step builds a graph.
    """
    return student(last_input(student, noise, cond, timesteps), timesteps[-1], cond)


@torch.no_grad()
def last_input(student, noise, cond, timesteps):
    """What the last step of the rollout is given: x_t at timesteps[-1]."""
    schedule = student.schedule
    x_t = schedule.noise_scale * noise[0]                                              # (B, C, H, W)
    for t, s, eps in zip(timesteps, timesteps[1:], noise[1:]):
        x0 = student(x_t, t, cond)
        x_t = schedule.alpha[s] * x0 + schedule.sigma[s] * eps
    return x_t


# ---------------------------------------------------------------------------------------------------- models on disk

class Model:
    """A Stable Diffusion 1.5 or 2 teacher as it lies on disk: text encoder, latents' decoder, and the network as a frozen Denoiser.

    Text encoder and decoder may lie on devices of their own; what they give is on `device`. Without a VAE there are latents only.
    The network is kept in float32 unless `held_in` says otherwise: students start as copies of it.
    """

    def __init__(self, name, pipe, device="cpu", dtype=torch.float32, held_in=torch.float32, teacher_device=None, text_device=None,
                 vae_device=None, own_vae=True):
        self.name, self.device, self.dtype, self.network_class = name, torch.device(device), dtype, type(pipe.unet)
        self.frozen_dtype = dtype  # of a teacher
        self.schedule, self.prediction = read_scheduler(pipe.scheduler, name)
        self.schedule = self.schedule.to(device)
        self.text_device, self.vae_device = torch.device(text_device or device), torch.device(vae_device or device)
        both = ((pipe.tokenizer, pipe.text_encoder), (getattr(pipe, "tokenizer_2", None), getattr(pipe, "text_encoder_2", None)))
        self.text_encoders = [(tokenizer, encoder.requires_grad_(False).eval().to(self.text_device, dtype)) for tokenizer, encoder in both if encoder]
        self.vae = pipe.vae and pipe.vae.requires_grad_(False).eval().to(self.vae_device, torch.float32)
        self.decodes = self.vae is not None
        self.encoder_print = fingerprint(self.vae) if self.vae and own_vae else None
        self.zeros_for_no_text = pipe.config.get("force_zeros_for_empty_prompt", False)
        network = check_network(pipe.unet, name).to(teacher_device or device, held_in)
        self.teacher = self.denoiser(network).requires_grad_(False).eval()
        self.origin = self.teacher  # what student and fake score start as
        self.sample_shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)
        self.picture_size = network.config.sample_size * pipe.vae_scale_factor

    def denoiser(self, network):
        return Denoiser(network, self.schedule, self.prediction, self.dtype)

    def own_names(self, weights):
        return weights

    @staticmethod
    def pipeline_class():
        from diffusers import StableDiffusionPipeline
        return StableDiffusionPipeline

    def encode(self, prompts):
        """list of str -> cond: the last hidden states of all tokens, padding included."""
        (tokenizer, encoder), = self.text_encoders
        return {"encoder_hidden_states": self.run_encoder(tokenizer, encoder, prompts)[0].float().to(self.device)}   # (B, tokens, width)

    @torch.no_grad()
    def run_encoder(self, tokenizer, encoder, prompts, **options):
        ids = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
        with compute_in(self.dtype, self.text_device):
            return encoder(ids.to(self.text_device), **options)

    @functools.cached_property
    def uncond(self):
        """No condition: the empty prompt. (1, ...)"""
        return self.encode([""])

    def pixels(self, x):
        """Latents (B, C, h, w) -> pictures (B, 3, H, W) in about [-1, 1], with a graph."""
        if self.vae is None:
            raise UserError("--vae none leaves out the decoder, without which there are no pictures")
        return self.vae.decode((x / self.vae.config.scaling_factor).to(self.vae_device)).sample

    @torch.no_grad()
    def decode(self, x, batch_size=64):
        """Latents (B, C, h, w) -> pictures (B, 3, H, W) in [0, 1], on the CPU."""
        parts = [self.pixels(part).float().cpu() for part in x.split(batch_size)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def latents(self, pictures):
        """Pictures (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w): the posterior's mode, where the encoder gives a distribution."""
        encoded = self.vae.encode(pictures.to(self.vae_device))
        x = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (x * self.vae.config.scaling_factor).to(self.device)


class XLModel(Model):
    """Stable Diffusion XL: two text encoders, and a network that is also told the pooled text and the picture's size and place."""

    @staticmethod
    def pipeline_class():
        from diffusers import StableDiffusionXLPipeline
        return StableDiffusionXLPipeline

    def encode(self, prompts):
        """list of str -> cond: both encoders' last but one hidden states side by side; the second's pooled text; original height and
        width, crop from the top and left, target height and width."""
        states = []
        for tokenizer, encoder in self.text_encoders:
            output = self.run_encoder(tokenizer, encoder, prompts, output_hidden_states=True)
            states.append(output.hidden_states[-2].float())
        size = self.picture_size
        time_ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32, device=self.device)
        return {"encoder_hidden_states": torch.cat(states, -1).to(self.device),                    # (B, tokens, both widths)
                "text_embeds": output.text_embeds.float().to(self.device),                         # (B, width)
                "time_ids": time_ids.expand(len(prompts), -1)}                                     # (B, 6)

    @functools.cached_property
    def uncond(self):
        """No condition: zeros for both kinds of text, or the empty prompt where the pipeline's configuration says so. (1, ...)"""
        cond = self.encode([""])
        return {name: value if name == "time_ids" or not self.zeros_for_no_text else torch.zeros_like(value) for name, value in cond.items()}


def read_scheduler(scheduler, name):
    """The schedule's tables and the prediction type, from a diffusers scheduler of Stable Diffusion's kind: its alphas_cumprod know of
    beta_schedule, trained_betas and rescale_betas_zero_snr."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"{name}: no noise schedule is known for the scheduler {type(scheduler).__name__}")
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"{name}: prediction type {prediction!r} of its scheduler is not epsilon or v_prediction")
    if prediction == "epsilon" and scheduler.alphas_cumprod.min() < 1e-6:
        raise UserError(f"{name}: its scheduler has a terminal signal-to-noise ratio of zero (rescale_betas_zero_snr), where a network that predicts "
                        "epsilon says nothing of x0: such a model should predict v")
    return vp_schedule(scheduler.alphas_cumprod), prediction


def check_network(unet, name):
    """Refuse a UNet that is told or gives what we do not know of."""
    config = unet.config
    for field, known in (("addition_embed_type", (None, "text_time")), ("class_embed_type", (None,)), ("encoder_hid_dim_type", (None,)),
                         ("time_cond_proj_dim", (None,)), ("num_class_embeds", (None,)), ("out_channels", (config.in_channels,))):
        if config.get(field) not in known:
            raise UserError(f"{name}: a UNet with {field} {config.get(field)!r} is not supported")
    return unet


# diffusers pipelines that we can read, and the parts of them that we do not need.
PIPELINES = {"StableDiffusionPipeline": Model, "StableDiffusionXLPipeline": XLModel}
UNUSED = dict(safety_checker=None, feature_extractor=None, image_encoder=None)


def load_model(path, device="cpu", dtype=torch.float32, vae=None, **options):
    """A Stable Diffusion pipeline from a diffusers directory, a hub id, or one .safetensors file; or gmm.py's plane. options: see
    Model. vae: another decoder's directory or hub id; "none" leaves it out."""
    for place in (device, options.get("text_device"), options.get("vae_device")):
        check_device(place or device)
    import data  # which itself needs this module
    import gmm
    path = data.EMBEDDED.get(str(path), path)
    if str(path) in gmm.NAMES:
        return gmm.Model(str(path), device, dtype)
    with quiet_libraries():
        import diffusers
        import edm  # which itself needs this module
        if edm.is_edm(path):
            return edm.load_model(path, device, dtype, options.get("teacher_device"))
        kind = pipeline_kind(path)
        parts = dict(UNUSED) | ({"vae": None} if vae == "none" else {})
        if kind != "StableDiffusionPipeline":
            del parts["safety_checker"]
        try:
            if vae not in (None, "none"):
                parts["vae"] = load_vae(vae)
            if Path(path).is_file():
                pipe = getattr(diffusers, kind).from_single_file(path, **parts)
            else:
                pipe = getattr(diffusers, kind).from_pretrained(path, use_safetensors=True, low_cpu_mem_usage=False, **parts)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"the model {path} cannot be loaded: {first_line(error)}") from None
        return PIPELINES[kind](str(path), pipe, device, dtype, own_vae=vae is None, **options)


def pipeline_kind(path):
    """Name of the pipeline's class. Says at once what is wrong with a local directory, rather than let the hub be asked for it."""
    from diffusers import DiffusionPipeline
    if Path(path).is_file():
        return file_kind(path)
    if Path(path).is_dir():
        if not (Path(path) / "model_index.json").is_file():
            raise UserError(f"{path} is no diffusers pipeline: it has no model_index.json")
        config = read_json(Path(path) / "model_index.json")
    else:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise UserError(f"there is no model directory or file {path}, and it is no hub id (owner/name) either")
        try:
            config = DiffusionPipeline.load_config(path)
        except (OSError, ValueError) as error:
            raise UserError(f"the model {path} cannot be loaded: {first_line(error)}") from None
    kind = config.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"{path} is a {kind}; only {' and '.join(PIPELINES)} are supported")
    return kind


def file_kind(path):
    """Whether one file with original names holds SDXL or Stable Diffusion 1.5 or 2: only the former has a second text encoder."""
    try:
        with safe_open(path, "pt") as archive:
            return "StableDiffusionXLPipeline" if any(name.startswith("conditioner.embedders.1.") for name in archive.keys()) else "StableDiffusionPipeline"
    except (OSError, SafetensorError) as error:
        raise UserError(f"the model {path} cannot be loaded: {first_line(error)}") from None


def load_vae(path):
    """AutoencoderKL, or AutoencoderTiny: much smaller, good enough to look at a run by."""
    import diffusers
    try:
        config = diffusers.AutoencoderKL.load_config(path)
        kind = config.get("_class_name")
        if kind not in ("AutoencoderKL", "AutoencoderTiny"):
            raise UserError(f"--vae {path} holds a {kind}, not an AutoencoderKL or AutoencoderTiny")
        return getattr(diffusers, kind).from_pretrained(path, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--vae {path} cannot be loaded: {first_line(error)}") from None


def lpips_loss(model):
    """LPIPS (1801.03924) of the pictures of two batches of latents, the second of which needs no gradient; the target network sees
    them enlarged to 224 pixels at least."""
    if not getattr(model, "decodes", False):
        raise UserError("--regression lpips compares pictures, and there is no decoder for them: use --regression mse")
    try:
        import lpips
    except ImportError:
        raise UserError("--regression lpips needs a package that is not installed: pip install lpips") from None
    try:
        distance = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).to(model.vae_device)
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


# ---------------------------------------------------------------------------------------------------- students on disk

# The layers that DMD2's LoRA students adapt.
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
               "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name


def trainable_copy(origin, rank=0, alpha=8.0, seed=0):
    """A copy of the denoiser to train: the whole of it in float32, or, with a rank above 0, a LoRA of that rank on top of the origin's
    own parameters, which then lie in the dtype that they are computed in."""
    if rank == 0:
        return copy.deepcopy(origin).requires_grad_(True)
    from peft import LoraConfig
    if not hasattr(origin.network, "add_adapter"):
        raise UserError("--lora needs a UNet of diffusers")
    origin.to(origin.dtype)
    shared = {id(parameter): parameter for parameter in origin.parameters()}
    student = copy.deepcopy(origin, shared).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student.network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LORA_LAYERS)))
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return student


def save_lora(network, state, folder, model):
    """Write a LoRA as `pipe.load_lora_weights(folder)` reads it. Its alpha goes into the weights, since some programs do not look for it."""
    config = network.peft_config["default"]
    scale = config.lora_alpha / config.r
    state = {name.replace(".default.", "."): (tensor * scale if ".lora_B." in name else tensor).contiguous() for name, tensor in state.items()}
    metadata = config.to_dict() | {"lora_alpha": config.r}
    model.pipeline_class().save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=metadata)


def check_peft(flag):
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError(f"{flag} needs a package that is not installed: pip install peft") from None


def load_student(path, model):
    """A student's Denoiser, from a run directory (its student/), one of its checkpoints, a diffusers UNet directory, a file of a UNet's weights with diffusers'
    names (.safetensors, .bin, .pt: DMD2's releases), or a LoRA file, which is merged into a copy of the teacher."""
    if (Path(path) / "manifest.json").is_file():
        return student_of_checkpoint(Path(path), model)
    path = Path(path) / "student" if (Path(path) / "student").is_dir() else Path(path)
    path = path / LORA_FILE if (path / LORA_FILE).is_file() else path
    if path.is_dir():
        network = unet_from_folder(path, model)
    elif path.is_file():
        weights = model.own_names(read_weights(path))
        network = copy.deepcopy(model.origin.network).float()  # a LoRA's part may be smaller than what a shorter dtype rounds off
        (merge_lora if any("lora" in name for name in weights) else load_weights)(network, weights, path, model)
    else:
        raise UserError(f"there is no student at {path}")
    parameter = next(model.origin.parameters())
    return model.denoiser(network).to(parameter.device, parameter.dtype).requires_grad_(False).eval()


def student_of_checkpoint(folder, model):
    """The averaged student that a run had there."""
    import checkpoint
    manifest = checkpoint.read_manifest(folder)
    damage = checkpoint.damage_in(folder, manifest) if manifest else checkpoint.NO_MANIFEST
    if damage:
        raise UserError(f"the checkpoint {folder} is damaged: {damage}")
    config = manifest["config"]
    if config["lora"]:
        check_peft(f"the LoRA of {folder}")
        if next(model.origin.parameters()).dtype == torch.float32 and manifest["teacher"] != fingerprint(model.teacher):
            raise UserError(f"the checkpoint {folder} holds a LoRA of another teacher than {model.name}")
    student = trainable_copy(model.origin, config["lora"], config["lora_alpha"], config["seed"])
    part = "averaged_student" if config["ema"] > 0 else "student"
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    checkpoint.load(folder, {f"{part}.{name}": tensor for name, tensor in student.state_dict().items() if name in trained})
    parameter = next(model.origin.parameters())
    return student.to(parameter.device, parameter.dtype).requires_grad_(False).eval()


def unet_from_folder(folder, model):
    if not (folder / "config.json").is_file():
        raise UserError(f"there is no student at {folder}: neither student/config.json nor config.json is there")
    try:
        kind = model.network_class
        config = kind.load_config(folder)
        if config.get("_class_name") != kind.__name__:
            raise UserError(f"{folder} holds a {config.get('_class_name')}, not a {kind.__name__}")
        check_same_architecture(config, model, folder)
        with quiet_libraries():
            return kind.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the student {folder} cannot be loaded: {first_line(error)}") from None


def read_weights(path, what="the student"):
    """{name: tensor} of a .safetensors file or of one that torch.save wrote, of which nothing is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        why = "it is cut off or no file of weights" if path.is_file() else first_line(error)
        if isinstance(error, pickle.UnpicklingError):
            why = "it holds more than weights, which is not loaded"
        raise UserError(f"{what} {path} cannot be loaded: {why}") from None
    if not isinstance(weights, dict) or not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{what} {path} is no file of weights by name")
    return weights


def load_weights(network, weights, path, model):
    own = network.state_dict()
    wrong = [f"{name} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
             for name, tensor in own.items() if name in weights and weights[name].shape != tensor.shape]
    wrong += [f"it has no {name}" for name in own if name not in weights] + [f"{name} is not known there" for name in weights if name not in own]
    if wrong:
        raise UserError(f"the student {path} does not fit {model.name}: {wrong[0]}")
    network.load_state_dict(weights)


def merge_lora(network, weights, path, model):
    """Add a LoRA, in diffusers' format or one that diffusers converts (kohya's), to the network's own weights."""
    check_peft(f"the LoRA {path}")
    kind = model.pipeline_class()
    try:
        with quiet_libraries():
            state, alphas, metadata = kind.lora_state_dict(str(path), unet_config=network.config, return_lora_metadata=True)
            names = {name.split(".lora")[0].removeprefix("unet.") for name in state if name.startswith("unet.")}
            modules = {name for name, _ in network.named_modules()}
            if not names or names - modules:
                wrong = f"{min(names - modules)} is not known there" if names else "it has no part for the UNet"
                raise UserError(f"the LoRA {path} does not fit {model.name}: {wrong}")
            kind.load_lora_into_unet(state, network_alphas=alphas, unet=network, metadata=metadata)
            network.fuse_lora()
            network.unload_lora()
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise UserError(f"the LoRA {path} does not fit {model.name}: {first_line(error)}") from None


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
