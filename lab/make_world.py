"""Make the teacher of the embedded world again.

    python -m lab.make_world                             # hours on two cores
    python -m lab.make_world --device cuda               # minutes

Stable Diffusion in miniature, written as a diffusers pipeline in float16. An interrupted command
goes on from --work. Its stages, each as its real counterpart is made:

  autoencoder  AutoencoderKL, 64x64x3 <-> 8x8x8, on a quarter of --batch-size. Its scaling_factor
               gives latents deviation 1.
  text         CLIPTextModel, alone: the state of a name's last token tells what the object looks
               like, and that of a colour its colour. Without it the next stages spend most of their
               time on names.
  objects      UNet2DConditionModel, v prediction, and the text encoder with it, on scenes of one
               object.
  scenes       the same on all scenes.
  decoder      the autoencoder's, alone and for longer, which makes pictures sharper.
"""

import functools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import data
import losses
import models
from fsdp import default_dtype
from lab.training import average_of, maker_parser, save_state, train
from support import cli, world
from support.families import FAMILIES
from support.precision import compute_in
from support.shards import as_sample

LATENTS = 8
KL_WEIGHT = 0.003  # leaves noise on the latents that makes the decoder forgive the sampler's errors
TEXT_WIDTH = 192
SCHEDULER = DDIMScheduler(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.02,
    prediction_type="v_prediction",
    clip_sample=False,
    timestep_spacing="trailing",
    set_alpha_to_one=True,
    steps_offset=1,
)
MAX_TOKENS = 12
TOKENS = dict(padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")


# ----------------------------------------------------------------------------- autoencoder


def reconstruction_error(generator, vae, args):
    """L1 and mean square error of scenes that are encoded and decoded, and the KL divergence of
    their posterior from a standard normal, a number an element."""
    prompts = world.prompts(args.batch_size // 4, generator)
    x = as_sample(world.scenes(prompts, generator)).to(args.device)  # (B, 3, 64, 64)
    posterior = vae.encode(x.to(memory_format=torch.channels_last)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(x)
    z = posterior.mean + posterior.std * noise  # (B, 8, 8, 8)
    error = vae.decode(z).sample.float() - x
    return error.abs().mean() + error.square().mean(), posterior.kl().mean() / z[0].numel()


def autoencoder_loss(generator, vae, args):
    """2112.10752 without its critic."""
    error, kl = reconstruction_error(generator, vae, args)
    return error + KL_WEIGHT * kl


def decoder_loss(generator, vae, args):
    return reconstruction_error(generator, vae, args)[0]


def make_autoencoder(args):
    torch.manual_seed(args.seed)
    channels = (16, 32, 64, 128)
    vae = AutoencoderKL(
        latent_channels=LATENTS,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    vae.to(args.device, memory_format=torch.channels_last)
    loss_of = functools.partial(autoencoder_loss, vae=vae, args=args)
    train("autoencoder", args.autoencoder_iterations, {"vae": vae}, loss_of, args)
    generator = torch.Generator().manual_seed(args.seed + 4)
    latents = latents_of(vae.eval(), world.prompts(256, generator), generator, args)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


def polish_decoder(vae, args):
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    loss_of = functools.partial(decoder_loss, vae=vae, args=args)
    train("decoder", args.decoder_iterations, {"decoder": vae.decoder}, loss_of, args)


@torch.no_grad()
def latents_of(vae, prompts, generator, args):
    """(N, 8, 8, 8) of a scene of each prompt, not scaled."""
    latents = []
    for start in tqdm(range(0, len(prompts), 64), desc="latents"):
        x = as_sample(world.scenes(prompts[start : start + 64], generator)).to(args.device)
        x = x.to(memory_format=torch.channels_last)
        with compute_in(getattr(torch, default_dtype(args.device)), x):
            latents.append(vae.encode(x).latent_dist.mode().float().cpu())
    return torch.cat(latents)


def make_latents(vae, args):
    """Prompts of args.scenes scenes, and their latents (N, 8, 8, 8) of deviation 1."""
    generator = torch.Generator().manual_seed(args.seed + 3)
    prompts = world.prompts(args.scenes, generator)
    path = Path(args.work) / f"latents-{args.scenes}-{args.seed}.pt"
    if not path.exists():
        save_state(path, latents=latents_of(vae, prompts, generator, args).half())
    latents = torch.load(path, weights_only=True)["latents"]
    return prompts, latents * vae.config.scaling_factor


# ----------------------------------------------------------------------------- text


def make_tokenizer(texts):
    """A CLIPTokenizer whose merges were learnt on the texts until every word is one token."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    words = Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [first + second for first, second in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def appearances():
    """What words look like, (32 + 10, 16 x 16 x 4): objects with alpha, and plain colours."""
    seen = []
    for i in range(world.OBJECTS):
        picture = world.object_of_edge(i, 16).convert("RGBa")
        seen.append(torch.tensor(picture.get_flattened_data()).flatten())
    for colour in world.COLOURS.values():
        seen.append(torch.tensor([(*colour, 255)] * 256).flatten())
    seen = torch.stack(seen) / 127.5 - 1
    return seen - seen.mean(0)


def named(prompt):
    """[(place of the last token, number), ...] of the objects and the colour that a prompt names.
    Every word is a token, and one stands before the first."""
    places, end = [], 0
    for i in prompt.objects:
        if places:
            end += len(prompt.relation.split())
        end += len(world.names()[i].split())
        places.append((end, i))
    if prompt.colour:
        places.append((end + 2, world.OBJECTS + list(world.COLOURS).index(prompt.colour)))
    return places


def encode_with_clip(texts, text_encoder, tokenizer):
    tokens = tokenizer(texts, **TOKENS).input_ids.to(text_encoder.device)
    return {"encoder_hidden_states": text_encoder(tokens).last_hidden_state}  # (B, tokens, width)


def text_loss(generator, encode, head, seen, args):
    """Mean square error of the appearances that the states of names and colours tell."""
    prompts = world.prompts(args.batch_size, generator)
    found = [(row, *place) for row, prompt in enumerate(prompts) for place in named(prompt)]
    rows, columns, numbers = torch.tensor(found).T.to(args.device)
    states = encode([str(prompt) for prompt in prompts])["encoder_hidden_states"]
    return F.mse_loss(head(states[rows, columns]), seen[numbers])


def teach_text(text_encoder, encode, args):
    """encode(texts) -> cond, with the text encoder."""
    seen = appearances().to(args.device)
    width = text_encoder.config.hidden_size
    head = torch.nn.Linear(width, seen.shape[1]).to(args.device)
    loss_of = functools.partial(text_loss, encode=encode, head=head, seen=seen, args=args)
    modules = {"text_encoder": text_encoder, "head": head}
    train("text", args.text_iterations, modules, loss_of, args)


def make_text_encoder(tokenizer, args):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config).to(args.device)


# ----------------------------------------------------------------------------- denoiser


def make_unet(args):
    torch.manual_seed(args.seed + 2)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENTS,
        out_channels=LATENTS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4),  # the number of heads, in this class
        cross_attention_dim=TEXT_WIDTH,
    )
    return unet.to(args.device)


def make_denoiser(pipeline, network, schedule, prediction, args):
    """As models.py makes it of such a pipeline."""
    dtype = getattr(torch, default_dtype(args.device))
    return models.Denoiser(network, schedule, prediction, FAMILIES[pipeline], dtype)


def draw_timesteps(count, T, generator):
    """(count,): three quarters of them mostly in the middle, where shapes are decided."""
    u = torch.rand(count, generator=generator)
    middle = torch.randn(count, generator=generator).sigmoid()
    anywhere = torch.rand(count, generator=generator)
    return (T * torch.where(u < 0.25, anywhere, middle)).long().clamp(max=T - 1)


def denoiser_loss(generator, denoiser, encode, prompts, latents, args):
    schedule = denoiser.schedule
    index = torch.randint(len(latents), (args.batch_size,), generator=generator)
    t = draw_timesteps(args.batch_size, len(schedule), generator)
    u = torch.rand(args.batch_size, 3, generator=generator).tolist()
    x0 = latents[index].float()  # (B, 8, 8, 8)
    eps = torch.randn(x0.shape, generator=generator)
    x0, eps, t = (tensor.to(args.device) for tensor in (x0, eps, t))
    cond = encode([world.shorten(prompts[i], u_i) for i, u_i in zip(index.tolist(), u)])
    x0_pred = denoiser(schedule.add_noise(x0, eps, t), t, cond)
    weight = losses.denoising_weight(denoiser.prediction, *schedule.at(t, x0))  # (B, 1, 1, 1)
    return losses.denoising_loss(x0_pred, x0, weight).mean()


def train_denoiser(networks, denoiser, encode, stages, vae, args):
    """The networks' average. stages {name: iterations}; "objects" has scenes of one object only."""
    average = average_of(networks)
    prompts, latents = make_latents(vae, args)
    single = [i for i, prompt in enumerate(prompts) if len(prompt.objects) == 1]
    for stage, iterations in stages.items():
        chosen = single if stage == "objects" else range(len(prompts))
        loss_of = functools.partial(
            denoiser_loss,
            denoiser=denoiser,
            encode=encode,
            prompts=[prompts[i] for i in chosen],
            latents=latents[list(chosen)],
            args=args,
        )
        train(stage, iterations, networks, loss_of, args, average)
    return average.module.eval()


# ----------------------------------------------------------------------------- the whole


def texts():
    """Every word of the world's prompts."""
    return [*world.names(), *world.RELATIONS, *(f"on {colour}" for colour in world.COLOURS)]


def write(out, vae, text_encoder, tokenizer, unet):
    pipe = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=SCHEDULER,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(out)


def main(arguments=None):
    parser = maker_parser(__doc__, "runs/world", 32)
    add = parser.add_argument
    add("--out", default=data.EMBEDDED["world"], metavar="DIR")
    add("--init", metavar="DIR", help="go on from this pipeline, with the stage of all scenes")
    add("--autoencoder-iterations", type=cli.positive, default=4000)
    add("--text-iterations", type=cli.positive, default=3000)
    add("--object-iterations", type=cli.positive, default=1200)
    add("--scene-iterations", type=cli.positive, default=8000)
    add("--decoder-iterations", type=cli.positive, default=3000)
    add("--scenes", type=cli.positive, default=40_000, help="whose latents are made once")
    args = parser.parse_args(arguments)
    if args.init:
        begun = StableDiffusionPipeline.from_pretrained(args.init, dtype=torch.float32)
        begun.to(args.device)
        vae, tokenizer, text_encoder, unet = (
            begun.components[name] for name in ("vae", "tokenizer", "text_encoder", "unet")
        )
    else:
        vae = make_autoencoder(args)
        tokenizer = make_tokenizer(texts())
        torch.manual_seed(args.seed + 1)
        text_encoder = make_text_encoder(tokenizer, args)
        unet = make_unet(args)
    encode = functools.partial(encode_with_clip, text_encoder=text_encoder, tokenizer=tokenizer)
    stages = {"scenes": args.scene_iterations}
    if not args.init:
        teach_text(text_encoder, encode, args)
        stages = {"objects": args.object_iterations} | stages
    schedule = models.vp_schedule(SCHEDULER.alphas_cumprod).to(args.device)
    denoiser = make_denoiser("StableDiffusionPipeline", unet, schedule, "v_prediction", args)
    networks = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    networks = train_denoiser(networks, denoiser, encode, stages, vae, args)
    polish_decoder(vae, args)
    write(args.out, vae, networks["text_encoder"], tokenizer, networks["unet"])
    print(f"{args.out}. Measure it: python eval.py --teacher-only --model world")


if __name__ == "__main__":
    cli.run(main)
