"""How the pipelines of diffusers are used: a row of FAMILIES each, and two or three functions.

Every network becomes one call, network(x, time, cond), with x (B, C, H, W) and cond a dict of
batch-first tensors; what its class wants otherwise is done here. Facts: diffusers 0.40 to 0.42.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# The layers that DMD2's LoRA students adapt.
UNET_LORA_LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "time_emb_proj",
)
# Attention and feed-forward layers of transformers, under the names that any of them has.
TRANSFORMER_LORA_LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "to_add_out", "to_qkv_mlp_proj"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    *("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"),
)


# ----------------------------------------------------------------------------- what most have


def call_network(network, x, time, cond):
    return network(x, timestep=time, return_dict=False, **cond)[0]


def unet_shape(pipe):
    """Of a latent, (C, H, W)."""
    config = pipe.unet.config
    return config.in_channels, config.sample_size, config.sample_size


def transformer_shape(pipe):
    """The same. Transformers that take any size leave it to their pipeline."""
    config = pipe.transformer.config
    size = config.get("sample_size") or getattr(pipe, "default_sample_size", 128)
    return config.in_channels, size, size


def decode(vae, x):
    """Latents (B, C, h, w) -> images (B, 3, H, W) in about [-1, 1]"""
    shift = vae.config.get("shift_factor") or 0
    return vae.decode(x / vae.config.scaling_factor + shift).sample


def encode_images(vae, images):
    """The other way round."""
    shift = vae.config.get("shift_factor") or 0
    return (encoded(vae, images) - shift) * vae.config.scaling_factor


def encoded(vae, images):
    """What an encoder gives, or the mode of its posterior."""
    found = vae.encode(images)
    for name in ("latents", "latent"):
        if hasattr(found, name):
            return getattr(found, name)
    return found.latent_dist.mode()


def unet_middle(network):
    """The block whose features the GAN's head reads, and those after it."""
    return network.mid_block, list(network.up_blocks)


def transformer_middle(network):
    """The same. The list of blocks has one of two names."""
    blocks = getattr(network, "transformer_blocks", None) or network.layers
    index = (len(blocks) - 1) // 2
    return blocks[index], list(blocks[index + 1 :])


def unet_features(output, x_t, cond):
    """A map (B, C, h, w) from the middle block's output."""
    return output


def as_map(tokens):
    """Image tokens (B, h w, C) of square maps -> (B, C, h, w)"""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)


def image_tokens(output, x_t, cond):
    """Of blocks that give text and image, or the image alone."""
    return as_map(output[1] if isinstance(output, tuple) else output)


@dataclass(frozen=True)
class Family:
    """How models of one class are used."""

    call: Callable  # (network, x, time, cond) -> the network's output (B, C, H, W)
    encode: Callable  # (model, prompts) -> cond
    network: str = "unet"  # the pipeline's name for it
    shape: Callable = unet_shape  # (pipe) -> (C, H, W) of a latent
    multiple: int = 1  # of which a latent's width is one
    patch: int = 1  # the VAE's latents to one of ours, along an edge
    decode: Callable = decode  # (vae, latents) -> images
    encode_images: Callable = encode_images  # (vae, images) -> latents
    middle: Callable = unet_middle  # (network) -> the block that the GAN's head reads, those after
    reads: str = "output"  # of that block, or its input
    features: Callable = unet_features  # (what was read, x_t, cond) -> a map (B, C, h, w)
    can_cut: bool = True  # whether the blocks after it can be given a part of the batch
    lora_layers: tuple = UNET_LORA_LAYERS
    guidance: float = 1.0  # the default scale
    unguided: str = "guidance_scale=0"  # what the pipeline is called with to use none


# ----------------------------------------------------------------------------- Stable Diffusion


def encode_sd(model, prompts):
    """The last hidden states of all tokens, padding included. (B, tokens, width)"""
    text, _ = model.pipe.encode_prompt(prompts, model.encoder_device, 1, False)
    return {"encoder_hidden_states": text}


def call_sdxl_unet(network, x, time, cond):
    text = {"encoder_hidden_states": cond["encoder_hidden_states"]}
    added = {"text_embeds": cond["text_embeds"], "time_ids": cond["time_ids"]}
    return call_network(network, x, time, text | {"added_cond_kwargs": added})


def encode_sdxl(model, prompts):
    """Both encoders' hidden states (B, tokens, widths), the second's pooled text (B, width), and
    (B, 6): original height and width, crop from top and left, target height and width. The empty
    prompt is all zeros where the pipeline's configuration says so."""
    text, _, pooled, _ = model.pipe.encode_prompt(
        prompts, device=model.encoder_device, do_classifier_free_guidance=False
    )
    if model.pipe.config.force_zeros_for_empty_prompt:
        empty = torch.tensor([prompt == "" for prompt in prompts], device=text.device)
        text = text.masked_fill(empty[:, None, None], 0)
        pooled = pooled.masked_fill(empty[:, None], 0)
    size = model.image_size
    time_ids = torch.tensor([[size, size, 0, 0, size, size]] * len(prompts), dtype=torch.float32)
    return {"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": time_ids}


def encode_labels(model, prompts):
    """Classes by number or name; "" is none, the last row of the network's table."""
    return {"class_labels": torch.tensor([model.label(prompt) for prompt in prompts])}


# ----------------------------------------------------------------------------- flow models

# time is 1000 s, s the noise level; each class is told it in its own way. v = eps - x0.


def encode_sd3(model, prompts):
    """Three encoders' states (B, 77 + 256, 4096), zeros for a missing T5, and pooled text."""
    text, _, pooled, _ = model.pipe.encode_prompt(
        prompts, None, None, device=model.encoder_device, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


def call_sana(network, x, time, cond):
    output = call_network(network, x, time * network.config.timestep_scale, cond)
    return output[:, : x.shape[1]]  # the rest, where there is more, is a learnt variance


def encode_sana(model, prompts):
    """Gemma's states (B, 300, width) and mask. The pipeline's instruction precedes all prompts but
    the empty one."""
    call = inspect.signature(model.pipe.__call__)
    instruction = call.parameters["complex_human_instruction"].default
    return encode_gemma(model, prompts, complex_human_instruction=instruction)


def encode_gemma(model, prompts, **options):
    """What precedes other prompts does not precede the empty one, which the pipeline guides away
    from: it is encoded as the negative prompt."""
    text, mask, empty_text, empty_mask = model.pipe.encode_prompt(
        prompts, "" in prompts, device=model.encoder_device, **options
    )
    for i, prompt in enumerate(prompts):
        if prompt == "":
            text[i], mask[i] = empty_text[i], empty_mask[i]
    return {"encoder_hidden_states": text, "encoder_attention_mask": mask}


def encode_lumina2(model, prompts):
    """At most 256 tokens, or as many as its tokenizer takes."""
    length = min(256, model.pipe.tokenizer.model_max_length)
    return encode_gemma(model, prompts, max_sequence_length=length)


def call_z_image(network, x, time, cond):
    """It takes lists of images and of texts of their own lengths, time the other way round, and
    predicts x0 - eps."""
    lengths = cond["length"].tolist()
    texts = [text[:length] for text, length in zip(cond["text"], lengths)]
    output = network(list(x.unsqueeze(2)), 1 - time / 1000, texts, return_dict=False)[0]
    return -torch.stack(list(output)).squeeze(2)


def encode_z_image(model, prompts):
    """Qwen3's states of a prompt's own tokens, padded to 512, and how many there are."""
    texts, _ = model.pipe.encode_prompt(list(prompts), model.encoder_device, False)
    padded = [F.pad(text, (0, 0, 0, 512 - len(text))) for text in texts]
    lengths = torch.tensor([len(text) for text in texts])
    return {"text": torch.stack(padded), "length": lengths}


def z_image_features(output, x_t, cond):
    """Its sequences have the image first."""
    count = x_t.shape[-2] * x_t.shape[-1] // 4
    return as_map(output[:, :count])


def call_lumina2(network, x, time, cond):
    return -call_network(network, x, 1 - time / 1000, cond)


def lumina2_features(output, x_t, cond):
    """Its sequences have a text of its own length first."""
    count = x_t.shape[-2] * x_t.shape[-1] // 4
    starts = cond["encoder_attention_mask"].sum(1).long()
    places = starts[:, None] + torch.arange(count, device=output.device)
    tokens = output.gather(1, places[..., None].expand(-1, -1, output.shape[-1]))
    return as_map(tokens)


def packed(x):
    """2x2 latents as a token. (B, C, H, W) -> (B, H W / 4, 4 C)"""
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpacked(tokens, shape):
    b, c, h, w = shape
    return F.pixel_shuffle(tokens.transpose(1, 2).reshape(b, 4 * c, h // 2, w // 2), 2)


def grid_ids(height, width, columns, device):
    """Coordinates of image tokens, (h w, columns): row and column in columns 1 and 2."""
    ids = torch.zeros(height, width, columns, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return ids.flatten(0, 1)


def call_flux(network, x, time, cond):
    text = cond["encoder_hidden_states"]
    guidance = cond["guidance"] if network.config.guidance_embeds else None
    output = network(
        hidden_states=packed(x),
        timestep=time / 1000,
        guidance=guidance,
        pooled_projections=cond["pooled_projections"],
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
        img_ids=grid_ids(x.shape[2] // 2, x.shape[3] // 2, 3, x.device),
        return_dict=False,
    )[0]
    return unpacked(output, x.shape)


def encode_flux(model, prompts):
    """T5's states, CLIP's pooled text, and the guidance scale that the network is told: 3.5, the
    pipeline's own."""
    text, pooled, _ = model.pipe.encode_prompt(prompts, device=model.encoder_device)
    guidance = torch.full((len(prompts),), 3.5)
    return {"encoder_hidden_states": text, "pooled_projections": pooled, "guidance": guidance}


def flux_shape(pipe):
    size = pipe.default_sample_size
    return pipe.transformer.config.in_channels // 4, size, size


def call_flux2(network, x, time, cond):
    text = cond["encoder_hidden_states"]
    text_ids = torch.zeros(text.shape[1], 4, device=x.device)
    text_ids[:, 3] = torch.arange(text.shape[1], device=x.device)
    output = network(
        hidden_states=x.flatten(2).transpose(1, 2),
        timestep=time / 1000,
        encoder_hidden_states=text,
        txt_ids=text_ids.expand(len(x), -1, -1),
        img_ids=grid_ids(x.shape[2], x.shape[3], 4, x.device).expand(len(x), -1, -1),
        return_dict=False,
    )[0]
    return output.transpose(1, 2).reshape(x.shape)


def encode_flux2(model, prompts):
    text, _ = model.pipe.encode_prompt(prompts, device=model.encoder_device)
    return {"encoder_hidden_states": text}


def flux2_shape(pipe):
    size = pipe.default_sample_size // 2
    return pipe.transformer.config.in_channels, size, size


def flux2_norm(vae, x):
    """Mean and deviation of its latents, (C, 1, 1)."""
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return vae.bn.running_mean[:, None, None].to(x), deviation[:, None, None].to(x)


def flux2_decode(vae, x):
    mean, deviation = flux2_norm(vae, x)
    return vae.decode(F.pixel_shuffle(x * deviation + mean, 2)).sample


def flux2_encode_images(vae, images):
    x = F.pixel_unshuffle(encoded(vae, images), 2)
    mean, deviation = flux2_norm(vae, x)
    return (x - mean) / deviation


def call_qwen_image(network, x, time, cond):
    shape = (1, x.shape[2] // 2, x.shape[3] // 2)
    output = network(
        hidden_states=packed(x),
        timestep=time / 1000,
        encoder_hidden_states=cond["encoder_hidden_states"],
        encoder_hidden_states_mask=cond["mask"],
        img_shapes=[[shape]] * len(x),
        return_dict=False,
    )[0]
    return unpacked(output, x.shape)


QWEN_TOKENS = 512  # that prompts are padded to


def encode_qwen_image(model, prompts):
    """Qwen2.5-VL's states of a prompt's own tokens, and which of them are there."""
    text, mask = model.pipe.encode_prompt(prompts, device=model.encoder_device)
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
    missing = QWEN_TOKENS - text.shape[1]
    return {
        "encoder_hidden_states": F.pad(text, (0, 0, 0, missing)),
        "mask": F.pad(mask, (0, missing)),
    }


def qwen_norm(vae, x):
    config = vae.config
    mean, deviation = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    return mean.view(-1, 1, 1).to(x), deviation.view(-1, 1, 1).to(x)


def qwen_decode(vae, x):
    """Its VAE is of videos: here of one frame."""
    mean, deviation = qwen_norm(vae, x)
    return vae.decode((x * deviation + mean).unsqueeze(2)).sample.squeeze(2)


def qwen_encode_images(vae, images):
    x = encoded(vae, images.unsqueeze(2)).squeeze(2)
    mean, deviation = qwen_norm(vae, x)
    return (x - mean) / deviation


TRANSFORMER = dict(
    network="transformer",
    shape=transformer_shape,
    middle=transformer_middle,
    features=image_tokens,
    can_cut=False,
    lora_layers=TRANSFORMER_LORA_LAYERS,
    multiple=2,
)
SANA = TRANSFORMER | {"unguided": "guidance_scale=0, use_resolution_binning=False"}
Z_IMAGE = TRANSFORMER | {"features": z_image_features}
LUMINA2 = TRANSFORMER | {"features": lumina2_features}
FLUX = TRANSFORMER | {"shape": flux_shape, "unguided": "guidance_scale=3.5"}
FLUX2 = TRANSFORMER | {"shape": flux2_shape, "patch": 2, "multiple": 1}
FLUX2 |= {"decode": flux2_decode, "encode_images": flux2_encode_images}
QWEN = FLUX | {"decode": qwen_decode, "encode_images": qwen_encode_images}
QWEN |= {"unguided": "true_cfg_scale=1"}

# The class of a diffusers pipeline (for EDM's networks, of the network) -> how it is used. The
# default guidance is the pipeline's, in our convention, where 1 is none: Z-Image counts from 0.
FAMILIES = {
    "StableDiffusionPipeline": Family(call_network, encode_sd, guidance=7.5),
    "StableDiffusionXLPipeline": Family(call_sdxl_unet, encode_sdxl, guidance=5.0),
    "UNet2DModel": Family(call_network, encode_labels, reads="input"),
    "StableDiffusion3Pipeline": Family(call_network, encode_sd3, guidance=7.0, **TRANSFORMER),
    "SanaPipeline": Family(call_sana, encode_sana, guidance=4.5, **SANA),
    "ZImagePipeline": Family(call_z_image, encode_z_image, guidance=6.0, **Z_IMAGE),
    "Lumina2Pipeline": Family(call_lumina2, encode_lumina2, guidance=4.0, **LUMINA2),
    "FluxPipeline": Family(call_flux, encode_flux, **FLUX),
    "Flux2KleinPipeline": Family(call_flux2, encode_flux2, guidance=4.0, **FLUX2),
    "QwenImagePipeline": Family(call_qwen_image, encode_qwen_image, guidance=4.0, **QWEN),
}
