"""Small pipelines of diffusers' real classes with random weights, written to disk in the real
format, and commands that are called in this process."""

import copy
import json

import diffusers.schedulers.scheduling_lcm
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import data
import fsdp
import models
from support import export
from support.cli import UserError
from support.pipelines import quiet_libraries

PROMPTS = ["tomato", "cat face on blue", "rainbow", "guitar left of panda face"]
# Flags of short runs, of a network and of the plane.
SMALL = "--batch-size 2 --fake-updates 2 --warmup 0 --iterations 2 --save-every 2 --device cpu"
PLANE = "--batch-size 8 --fake-updates 2 --warmup 0 --save-every 2"


# ----------------------------------------------------------------------------- commands


def call(command, flags, *more):
    """main of a command: flags in one string, and more words."""
    command.main([*flags.split(), *map(str, more)])


def one_line(function, *arguments, status=2, **options):
    """The one line that a function refuses its arguments with."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    assert error.value.status == status and "\n" not in str(error.value)
    return str(error.value)


def refused(command, flags, *more, status=2):
    """The one line that a command is refused with."""
    return one_line(call, command, flags, *more, status=status)


# ----------------------------------------------------------------------------- pipelines

COMMON = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    layers_per_block=2,
    block_out_channels=(32, 64),
    norm_num_groups=16,
)
SD15 = dict(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=2,
    cross_attention_dim=32,
)
SDXL = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 4),
    cross_attention_dim=32 + 48,
    transformer_layers_per_block=(1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 48,
)
SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def make_text_encoder(kind, width, activation, tokenizer):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def make_vae(scaling_factor):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
        scaling_factor=scaling_factor,
    )


def write_pipeline(folder, name, seed=0, scheduler=None, **unet_options):
    """SD1.5's or SDXL's blocks, text encoders, embeddings and scheduler, for latents of 8x8 and
    images of 16x16."""
    quiet_libraries()
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(data.EMBEDDED["world"] / "tokenizer")
    betas = SD_BETAS | (scheduler or {})
    first = make_text_encoder(CLIPTextModel, 32, "quick_gelu", tokenizer)
    if name == "sd15":
        unet = UNet2DConditionModel(**COMMON | SD15 | unet_options)
        pipe = StableDiffusionPipeline(
            make_vae(0.18215),
            first,
            tokenizer,
            unet,
            PNDMScheduler(skip_prk_steps=True, steps_offset=1, **betas),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        unet = UNet2DConditionModel(**COMMON | SDXL | unet_options)
        pipe = StableDiffusionXLPipeline(
            make_vae(0.13025),
            first,
            make_text_encoder(CLIPTextModelWithProjection, 48, "gelu", tokenizer),
            tokenizer,
            tokenizer,
            unet,
            EulerDiscreteScheduler(**betas),
            add_watermarker=False,
        )
    pipe.save_pretrained(folder)
    return folder


def original_file(folder, path, *keys):
    """A pipeline's UNet and text encoder under the names of the original code; keys of no weight
    stand for themselves."""
    pipe = open_in_diffusers(folder)
    names = export.original_names(pipe.unet)
    weights = {key: torch.zeros(0) for key in keys}
    for name, tensor in pipe.unet.state_dict().items():
        weights[f"model.diffusion_model.{names[name]}"] = tensor.contiguous()
    for name, tensor in pipe.text_encoder.state_dict().items():
        name = "text_model." + name.removeprefix("text_model.")
        weights[f"cond_stage_model.transformer.{name}"] = tensor.contiguous()
    save_file(weights, path)


def write_tiny_vae(folder):
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=2,
    )
    vae.save_pretrained(folder)
    return folder


def open_in_diffusers(folder, **parts):
    """The pipeline of a folder in plain diffusers."""
    quiet_libraries()
    pipe = DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_student(folder, amount=0.02):
    """The teacher's UNet, a little elsewhere."""
    unet = copy.deepcopy(open_in_diffusers(folder).unet)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return unet


def run_card(folder, image):
    """The names that the code of a student's model card defines, run as it stands."""
    lines = (folder / "README.md").read_text().splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    "))
    code = code.replace("path/to/this/folder", str(folder)).replace("image.png", str(image))
    space = {}
    exec(code, space)
    return space


def draw_with_lcm(pipe, prompts, noise, timesteps, monkeypatch):
    """What LCMScheduler draws without guidance, given the very noise that our sampler gets."""
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    rest = iter(noise[1:])

    def next_noise(*arguments, **options):
        return next(rest)

    options = {"guidance_scale": 0, "output_type": "latent"}
    with monkeypatch.context() as patch:
        patch.setattr(diffusers.schedulers.scheduling_lcm, "randn_tensor", next_noise)
        return pipe(prompts, timesteps=timesteps, latents=noise[0], **options).images


def edm_denoiser(model, cond):
    """D(x, sigma) of 2206.00364 at any level, of one of EDM's networks."""

    def D(x, level):
        level = torch.as_tensor(level).float()[None]
        table = models.Schedule(torch.ones(1), level, level.log() / 4)
        denoiser = models.Denoiser(model.denoiser.network, table, "edm", model.family)
        return denoiser(x, 0, cond)

    return D


# ----------------------------------------------------------------------------- data and training


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def random_image(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def write_images(folder):
    """Six images of different sizes and shapes, with metadata.jsonl."""
    lines = []
    for i, size in enumerate(((40, 30), (30, 40), (16, 16), (100, 17), (8, 9), (33, 33))):
        random_image(*size, seed=i).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": PROMPTS[i % 4]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


class Trap:
    """A pickle of it would make a file if it were loaded plainly."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (type(self.file).touch, (self.file,))


def keep_gradients(monkeypatch):
    """A list that fills with the gradients, {parameter: gradient}, of every network that steps."""
    found, clip = [], fsdp.clip_gradients

    def keep(module, *rest):
        named = module.named_parameters()
        found.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        return clip(module, *rest)

    monkeypatch.setattr(fsdp, "clip_gradients", keep)
    return found
