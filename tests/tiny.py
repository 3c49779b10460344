"""Small pipelines of diffusers' real classes with random weights, and commands run in this process."""

import copy
import functools
import importlib
import sys

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import data
from support.cli import UserError
from support.pipelines import quiet_libraries


def run(module, *arguments):
    """The status of a command; its one line of error goes to stderr."""
    try:
        importlib.import_module(module).main([str(word) for word in arguments])
    except UserError as error:
        print(f"{module}: {error}", file=sys.stderr)
        return error.status
    except SystemExit as end:
        return end.code or 0
    return 0


def text_encoder(kind, width, activation, tokenizer):
    return kind(
        CLIPTextConfig(
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
    )


def write_pipeline(folder, name, seed=0, scheduler=None, **unet_options):
    """SD1.5's and SDXL's kinds of blocks, text encoders, embeddings and schedulers, on 8x8 latents."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(data.EMBEDDED["emoji"] / "tokenizer")
    levels = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear") | (
        scheduler or {}
    )
    if name == "sd15":
        own = dict(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=32,
        )
    else:
        own = dict(
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
    unet = UNet2DConditionModel(
        **dict(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=2,
            block_out_channels=(32, 64),
            norm_num_groups=16,
        )
        | own
        | unet_options
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.18215 if name == "sd15" else 0.13025,
    )
    if name == "sd15":
        pipe = StableDiffusionPipeline(
            vae,
            text_encoder(CLIPTextModel, 32, "quick_gelu", tokenizer),
            tokenizer,
            unet,
            PNDMScheduler(skip_prk_steps=True, steps_offset=1, **levels),
            None,
            None,
            requires_safety_checker=False,
        )
    else:
        pipe = StableDiffusionXLPipeline(
            vae,
            text_encoder(CLIPTextModel, 32, "quick_gelu", tokenizer),
            text_encoder(CLIPTextModelWithProjection, 48, "gelu", tokenizer),
            tokenizer,
            tokenizer,
            unet,
            EulerDiscreteScheduler(**levels),
            add_watermarker=False,
        )
    quiet_libraries()
    pipe.save_pretrained(folder)
    return folder


@functools.cache
def opened(folder):
    quiet_libraries()
    kind = (
        StableDiffusionXLPipeline
        if (folder / "text_encoder_2").is_dir()
        else StableDiffusionPipeline
    )
    pipe = kind.from_pretrained(folder, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def moved_unet(folder, amount=0.02):
    """The teacher's UNet, a little elsewhere: a student."""
    unet = copy.deepcopy(opened(folder).unet)
    with torch.no_grad():
        for i, parameter in enumerate(unet.parameters()):
            parameter += amount * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(i)
            )
    return unet


def diffusers_few_steps(pipe, prompts, noise, timesteps):
    """What LCMScheduler draws without guidance, given the very noise that our sampler gets."""
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    rest = iter(noise[1:])
    import diffusers.schedulers.scheduling_lcm as lcm

    real, lcm.randn_tensor = lcm.randn_tensor, lambda *arguments, **options: next(rest)
    try:
        return pipe(
            prompts, timesteps=timesteps, guidance_scale=0, latents=noise[0], output_type="latent"
        ).images
    finally:
        lcm.randn_tensor = real
