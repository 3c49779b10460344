"""Make the embedded teachers again.

    python -m lab.make_teacher                           # text to image: 95 minutes on two cores
    python -m lab.make_teacher --device cuda             # minutes
    python -m lab.make_teacher classes --dtype float32   # EDM's ImageNet network in miniature

An interrupted command goes on from --work. The text-to-image teacher is Stable Diffusion in
miniature, written as a diffusers pipeline in float16. Its stages:

  autoencoder  AutoencoderTiny, 64x64x3 <-> 8x8x8. While it trains, a batch norm without parameters
               sits on the latents; it is folded into the encoder afterwards, so that the plain
               class gives latents of mean 0 and deviation 1. The decoder sees them with a little
               noise, which makes it forgive the sampler's small errors.
  denoiser     CLIPTextModel and UNet2DConditionModel, together and from scratch. The network
               predicts eps, as SD1.5's does. First on images that are hardly moved, which teaches
               the captions quickly, then on all places and sizes. Latents are encoded once,
               beforehand.
  decoder      the decoder alone, for longer: the latents are fixed now, and the colours of rare
               images want more time.

The class-conditional one is a UNet2DModel on 16x16 pixels with EDM's preconditioning, loss and
distribution of noise levels (2206.00364); its labels.txt names the classes.
"""

import functools
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import data
import losses
import models
from support import checkpoint, cli, edm, embedded
from support.families import FAMILIES

LEARNING_RATE = 1e-3
LATENT_NOISE = 0.1  # deviation of the noise on the latents while the autoencoder trains
WEIGHT_CAP = 5.0  # see denoiser_loss_weight
MAX_TOKENS = 16
CLASS_UNET = dict(
    size=16,
    channels=(32, 64, 128),
    layers=1,
    attends=(False, False, True),
    labels=len(embedded.CLASSES),
)


# ----------------------------------------------------------------------------- training a stage


def learning_rate_scale(iteration, iterations, warmup=200):
    """Linear warm-up, constant, and linear to zero over the last third."""
    return min(1.0, (iteration + 1) / warmup, 3 * (1 - iteration / iterations))


def save_state(path, **state):
    def write(partial):
        torch.save(state, partial)

    checkpoint.replace_file(path, write)


def average_of(networks):
    return AveragedModel(networks, multi_avg_fn=get_ema_multi_avg_fn(0.999))


def train(stage, iterations, modules, loss_of, args, average=None):
    """AdamW with clipping, warm-up and linear decay; a checkpoint every 500 iterations.
    loss_of(generator) draws a batch and returns its loss."""
    path = Path(args.work) / f"{stage}.pt"
    modules = torch.nn.ModuleDict(modules)
    parameters = list(modules.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.99), fused=True
    )
    generator = torch.Generator().manual_seed(args.seed)
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        if average:
            average.load_state_dict(state["average"])
        start = state["iteration"]
    progress = tqdm(range(start, iterations), initial=start, total=iterations, desc=stage)
    for iteration in progress:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_scale(iteration, iterations)
        with models.compute_in(getattr(torch, args.dtype), torch.empty(8, 8, device=args.device)):
            loss = loss_of(generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        if average:
            average.update_parameters(modules)
        if iteration % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (iteration + 1) % 500 == 0 or iteration + 1 == iterations:
            save_state(
                path,
                modules=modules.state_dict(),
                optimizer=optimizer.state_dict(),
                generator=generator.get_state(),
                average=average.state_dict() if average else {},
                iteration=iteration + 1,
            )


# ----------------------------------------------------------------------------- the pipeline


def make_scheduler(**options):
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        steps_offset=1,
        **options,
    )


def write(out, vae, text_encoder, tokenizer, unet, scheduler):
    pipe = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(out)


# ----------------------------------------------------------------------------- autoencoder


def reconstruction_loss(generator, encode, decoder, images, args):
    index = torch.randint(len(images), (args.batch_size // 2,), generator=generator)
    x = embedded.shift_and_scale(images[index], generator)  # (B, 3, 64, 64)
    x = x.to(args.device, memory_format=torch.channels_last)
    z = encode(x)  # (B, 8, 8, 8)
    z = z + LATENT_NOISE * torch.randn(z.shape, generator=generator).to(z)
    error = decoder(z).float() - x
    return error.abs().mean() + error.square().mean()


def make_autoencoder(images, args):
    torch.manual_seed(args.seed)
    vae = AutoencoderTiny(
        latent_channels=8,
        encoder_block_out_channels=(64,) * 4,
        decoder_block_out_channels=(64,) * 4,
        num_encoder_blocks=(1, 1, 1, 3),
        num_decoder_blocks=(3, 2, 1, 1),
    )
    vae.to(args.device, memory_format=torch.channels_last)
    norm = torch.nn.BatchNorm2d(8, affine=False, momentum=0.01).to(args.device)

    def encode(x):
        return norm(vae.encoder(x).float())

    loss_of = functools.partial(
        reconstruction_loss, encode=encode, decoder=vae.decoder, images=images, args=args
    )
    modules = {"vae": vae, "norm": norm}
    train("autoencoder", args.autoencoder_iterations, modules, loss_of, args)
    last = vae.encoder.layers[-1]
    deviation = (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        last.weight /= deviation[:, None, None, None]
        last.bias.sub_(norm.running_mean).div_(deviation)
    return vae.eval()


def polish_decoder(vae, images, args):
    @torch.no_grad()
    def encode(x):
        return vae.encoder(x).float()

    loss_of = functools.partial(
        reconstruction_loss, encode=encode, decoder=vae.decoder, images=images, args=args
    )
    train("decoder", args.decoder_iterations, {"decoder": vae.decoder}, loss_of, args)


@torch.no_grad()
def make_latents(vae, images, width, views, args):
    """Latents of `views` views of every image, (views, N, 8, 8, 8)."""
    path = Path(args.work) / f"latents-{width:g}.pt"
    if not path.exists():
        generator = torch.Generator().manual_seed(args.seed + 1)
        latents = []
        for _ in tqdm(range(views), desc=f"latents, width {width:g}"):
            x = embedded.shift_and_scale(images, generator, width)
            x = x.to(memory_format=torch.channels_last)
            parts = [vae.encoder(part.to(args.device)).cpu() for part in x.split(64)]
            latents.append(torch.cat(parts))
        save_state(path, latents=torch.stack(latents))
    return torch.load(path, weights_only=True)["latents"]


# ----------------------------------------------------------------------------- text and denoiser


def make_tokenizer(captions, folder, max_tokens=MAX_TOKENS):
    """A CLIPTokenizer whose merges were learnt on the captions until every word is one token."""
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
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [first + second for first, second in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=max_tokens)


def make_networks(tokenizer, args):
    torch.manual_seed(args.seed + 2)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    text_encoder = CLIPTextModel(config)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(96, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(3, 6),  # the number of heads, in this class
        cross_attention_dim=128,
    )
    networks = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    return networks.to(args.device)


def denoiser_loss_weight(alpha):
    """min(1/alpha_t^2, WEIGHT_CAP) on the eps error.

    1/alpha_t^2 would make it the v error. Plain eps error hardly asks for the caption: at the noise
    levels where x_t alone does not tell which image it is (t > 700) a wrong x0 costs at most
    alpha_t^2/sigma_t^2 < 0.1 of the noise's variance.
    """
    return (1 / alpha.square()).clamp(max=WEIGHT_CAP)


def denoiser_loss(generator, networks, schedule, latents, captions, tokenizer, args):
    view = torch.randint(len(latents), (args.batch_size,), generator=generator)
    index = torch.randint(len(captions), (args.batch_size,), generator=generator)
    t = torch.randint(len(schedule), (args.batch_size,), generator=generator)
    x0 = latents[view, index]  # (B, 8, 8, 8)
    eps = torch.randn(x0.shape, generator=generator)
    x_t = schedule.add_noise(x0, eps, t)
    u = torch.rand(args.batch_size, 2 + embedded.MAX_WORDS, generator=generator).tolist()
    texts = [captions[i] for i in index.tolist()]
    prompts = [embedded.drop_words(text, u_i, empty=0.10) for text, u_i in zip(texts, u)]
    options = dict(padding="max_length", truncation=True, max_length=MAX_TOKENS)
    tokens = tokenizer(prompts, return_tensors="pt", **options).input_ids
    text = networks["text_encoder"](tokens.to(args.device)).last_hidden_state  # (B, tokens, 128)
    x_t, t, eps = x_t.to(args.device), t.to(args.device), eps.to(args.device)
    output = networks["unet"](x_t, t, text, return_dict=False)[0].float()
    weight = denoiser_loss_weight(schedule.alpha[t.cpu()]).to(args.device)
    return (weight * (output - eps).square().mean((1, 2, 3))).mean()


def make_denoiser(vae, images, captions, tokenizer, args):
    scheduler = make_scheduler(beta_end=0.012, prediction_type="epsilon")
    schedule = models.vp_schedule(scheduler.alphas_cumprod)
    networks = make_networks(tokenizer, args)
    average = None
    for stage, width, views, iterations in (
        ("narrow", 0.2, 8, args.narrow_iterations),
        ("wide", 1.0, 24, args.wide_iterations),
    ):
        loss_of = functools.partial(
            denoiser_loss,
            networks=networks,
            schedule=schedule,
            latents=make_latents(vae, images, width, views, args),
            captions=captions,
            tokenizer=tokenizer,
            args=args,
        )
        if stage == "wide":
            average = average_of(networks)
        train(f"denoiser-{stage}", iterations, networks, loss_of, args, average)
    return average.module["text_encoder"].eval(), average.module["unet"].eval(), scheduler


def make_text_teacher(out, work, args):
    captions = embedded.captions()[: args.limit]
    images = embedded.images(128)[: args.limit]  # twice as large as needed, for clean shifts
    vae = make_autoencoder(images, args)
    tokenizer = make_tokenizer(captions, work / "tokenizer")
    text_encoder, unet, scheduler = make_denoiser(vae, images, captions, tokenizer, args)
    polish_decoder(vae, images, args)
    write(out, vae, text_encoder, tokenizer, unet, scheduler)


# ----------------------------------------------------------------------------- classes


def class_loss(generator, network, images, groups, args):
    labels = torch.randint(len(groups), (args.batch_size,), generator=generator)
    u = torch.rand(args.batch_size, generator=generator).tolist()
    index = []
    for label, u_i in zip(labels.tolist(), u):
        group = groups[label][: args.limit]
        index.append(group[int(u_i * len(group))])
    x0 = embedded.shift_and_scale(images[index], generator, embedded.CLASS_WIDTH).to(args.device)
    sigma = (1.2 * torch.randn(args.batch_size, generator=generator) - 1.2).exp().to(args.device)
    eps = torch.randn(x0.shape, generator=generator).to(args.device)
    levels = models.Schedule(torch.ones_like(sigma), sigma, sigma.log() / 4)  # one for each sample
    t = torch.arange(len(sigma))
    denoiser = models.Denoiser(network, levels, "edm", FAMILIES["UNet2DModel"])
    x_t = levels.add_noise(x0, eps, t)
    x0_pred = denoiser(x_t, t, {"class_labels": labels.to(args.device)})  # (B, 3, 16, 16)
    weight = losses.denoising_weight("edm", 1, sigma).view(-1, 1, 1, 1)
    return losses.denoising_loss(x0_pred, x0, weight).mean()


def make_class_teacher(out, work, args):
    torch.manual_seed(args.seed)
    network = edm.prepare_network(UNet2DModel(**edm.unet_options(**CLASS_UNET))).to(args.device)
    networks = torch.nn.ModuleDict({"unet": network})
    average = average_of(networks)
    images, groups = embedded.images(2 * CLASS_UNET["size"]), embedded.classes()
    loss_of = functools.partial(
        class_loss, network=network, images=images, groups=groups, args=args
    )
    train("classes", args.class_iterations, networks, loss_of, args, average)

    def write(folder):
        unet = average.module["unet"].eval()
        unet.class_embedding.weight.data[-1] = 0  # no label, never trained: EDM's adds nothing then
        unet.half().save_pretrained(folder)
        (folder / "labels.txt").write_text("".join(f"{name}\n" for name in embedded.CLASSES))

    checkpoint.replace_folder(out, write)


# ----------------------------------------------------------------------------- command line

MAKERS = {"text": (make_text_teacher, "emoji"), "classes": (make_class_teacher, "emoji-classes")}


def parse_arguments(arguments=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("what", nargs="?", choices=MAKERS, default="text")
    add("--out", metavar="DIR", help="(default: the embedded teacher's place in assets/)")
    add("--work", default="runs/teacher", metavar="DIR", help="where the state of a stage is kept")
    add("--autoencoder-iterations", type=cli.positive, default=2000)
    add("--narrow-iterations", type=cli.positive, default=5500)
    add("--wide-iterations", type=cli.positive, default=7500)
    add("--decoder-iterations", type=cli.positive, default=1500)
    add("--class-iterations", type=cli.positive, default=5000)
    add("--batch-size", type=cli.positive, default=64, help="the autoencoder's is half of it")
    add(
        "--limit",
        type=cli.positive,
        metavar="N",
        help="learn the first N images, for a quick trial",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of matrix products")
    add("--seed", type=cli.natural, default=0)
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse_arguments(arguments)
    make, name = MAKERS[args.what]
    work, out = Path(args.work), Path(args.out or data.EMBEDDED[name])
    work.mkdir(parents=True, exist_ok=True)
    make(out, work, args)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB. Measure it: python eval.py --teacher-only --model {out}")


if __name__ == "__main__":
    cli.run(main)
