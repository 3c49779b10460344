"""Make the embedded teachers again. `text`: Stable Diffusion in miniature, trained on the embedded images in about 95 minutes on two cores.
`classes`: EDM's ImageNet network in miniature, trained on ten classes of it.

    python -m lab.make_teacher                           # two cores with bfloat16 in hardware
    python -m lab.make_teacher --device cuda             # minutes
    python -m lab.make_teacher                           # after an interruption: goes on where it was
    python -m lab.make_teacher classes --dtype float32   # two cores without it

Stages of `text`, each resumable from --work:
  autoencoder  AutoencoderTiny, 64x64x3 <-> 8x8x8. A batch norm without parameters sits on the latents while training and is
               folded into the encoder afterwards, so that the plain class gives latents of mean 0 and deviation 1. The decoder
               sees them with a little noise, which makes it forgive the sampler's small cli.
  denoiser     CLIPTextModel and UNet2DConditionModel from scratch, together. The network predicts eps, as SD1.5's does. First on
               pictures that are hardly moved, which teaches the captions quickly, then on all positions and sizes. The latents
               of either are encoded once, beforehand.
  decoder      the decoder alone, for longer: the latents are fixed now, and the colours of rare pictures want more time.

The result is a diffusers pipeline directory in float16 that StableDiffusionPipeline.from_pretrained reads.

`classes` has one stage: a UNet2DModel with EDM's preconditioning, loss and distribution of noise levels (2206.00364) on 16x16 pixels. The result is a
diffusers network's directory, whose labels.txt names the classes.
"""

import json
import math
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import data
import losses
import models
from models import FAMILIES
from support import checkpoint, cli, edm

NARROW, NARROW_VIEWS, WIDE_VIEWS = 0.2, 8, 24
LATENT_NOISE = 0.1  # deviation of the noise on the latents while the autoencoder trains
WEIGHT_CAP = 5.0  # see denoiser_loss_weight
MAX_TOKENS = 16
CLASS_UNET = dict(
    size=16,
    channels=(32, 64, 128),
    layers=1,
    attends=(False, False, True),
    labels=len(data.EMOJI_CLASSES),
)


def parse_arguments(arguments=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("what", nargs="?", choices=("text", "classes"), default="text")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where the teacher is written (default: assets/emoji_teacher, assets/emoji_classes)",
    )
    parser.add_argument("--work", default="runs/teacher", help="where the resumable state is kept")
    parser.add_argument("--autoencoder-iterations", type=cli.positive, default=2000)
    parser.add_argument("--narrow-iterations", type=cli.positive, default=5500)
    parser.add_argument("--wide-iterations", type=cli.positive, default=7500)
    parser.add_argument("--decoder-iterations", type=cli.positive, default=1500)
    parser.add_argument("--class-iterations", type=cli.positive, default=5000)
    parser.add_argument(
        "--batch-size",
        type=cli.positive,
        default=64,
        help="of the denoiser; the autoencoder's is half",
    )
    parser.add_argument(
        "--limit", type=cli.positive, help="learn the first N images only, for a quick trial"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="of matrix products in training",
    )
    parser.add_argument("--seed", type=cli.natural, default=0)
    return parser.parse_args(arguments)


def learning_rate_scale(iteration, iterations, warmup=200):
    """Linear warm-up, then half a cosine to zero."""
    return (
        min(1.0, (iteration + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * iteration / iterations))
    )


def save_state(path, **state):
    checkpoint.replace_file(path, lambda partial: torch.save(state, partial))


def train(stage, iterations, modules, lr, loss_of, args, ema=None):
    """The loop that all trained stages share: AdamW, clipping, warm-up and cosine, a checkpoint every 500 iterations.

    loss_of(generator) draws one batch and returns its loss. Returns once `iterations` are done, also when resumed.
    """
    path = Path(args.work) / f"{stage}.pt"
    modules = torch.nn.ModuleDict(modules)
    parameters = list(modules.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True
    )
    generator = torch.Generator().manual_seed(args.seed)
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        if ema:
            ema.load_state_dict(state["ema"])
        start = state["iteration"]
    progress = tqdm(
        range(start, iterations), initial=start, total=iterations, desc=stage, mininterval=5
    )
    for iteration in progress:
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate_scale(iteration, iterations)
        with models.compute_in(getattr(torch, args.dtype), torch.device(args.device)):
            loss = loss_of(generator)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.update_parameters(modules)
        if iteration % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}", norm=f"{norm.item():.2f}")
            if not math.isfinite(loss.item()):
                raise SystemExit(
                    f"{stage}: the loss is {loss.item()} at iteration {iteration}; the last good state is {path}"
                )
        if (iteration + 1) % 500 == 0 or iteration + 1 == iterations:
            save_state(
                path,
                modules=modules.state_dict(),
                optimizer=optimizer.state_dict(),
                generator=generator.get_state(),
                iteration=iteration + 1,
                ema=ema.state_dict() if ema else {},
            )


# ----------------------------------------------------------------------------- autoencoder


def reconstruction_loss(encode, decoder, pictures, generator, args):
    index = torch.randint(len(pictures), (args.batch_size // 2,), generator=generator)
    x = data.shift_and_scale(pictures[index], generator).to(
        args.device, memory_format=torch.channels_last
    )  # (B, 3, 64, 64)
    z = encode(x)  # (B, 8, 8, 8)
    z = z + LATENT_NOISE * torch.randn(z.shape, generator=generator).to(z)
    error = decoder(z).float() - x
    return error.abs().mean() + error.square().mean()


def make_autoencoder(pictures, args):
    torch.manual_seed(args.seed)
    vae = AutoencoderTiny(
        latent_channels=8,
        encoder_block_out_channels=(64,) * 4,
        decoder_block_out_channels=(64,) * 4,
        num_encoder_blocks=(1, 1, 1, 3),
        num_decoder_blocks=(3, 2, 1, 1),
    )
    vae = vae.to(args.device, memory_format=torch.channels_last)
    norm = torch.nn.BatchNorm2d(8, affine=False, momentum=0.01).to(args.device)

    encode = lambda x: norm(vae.encoder(x).float())
    train(
        "autoencoder",
        args.autoencoder_iterations,
        {"vae": vae, "norm": norm},
        1e-3,
        lambda generator: reconstruction_loss(encode, vae.decoder, pictures, generator, args),
        args,
    )
    last = vae.encoder.layers[-1]
    deviation = (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        last.weight /= deviation[:, None, None, None]
        last.bias.sub_(norm.running_mean).div_(deviation)
    return vae.eval()


def polish_decoder(vae, pictures, args):
    """Train the decoder alone for longer. The latents stay what they are, so this can be done at any time, again too."""
    encode = torch.no_grad()(lambda x: vae.encoder(x).float())
    train(
        "decoder",
        args.decoder_iterations,
        {"decoder": vae.decoder},
        1e-3,
        lambda generator: reconstruction_loss(encode, vae.decoder, pictures, generator, args),
        args,
    )


# ----------------------------------------------------------------------------- latents


@torch.no_grad()
def make_latents(vae, pictures, width, views, args):
    """(views, N, 8, 8, 8): what the denoiser trains on, so that the autoencoder runs once and not in every iteration."""
    path = Path(args.work) / f"latents-{width:g}.pt"
    if not path.exists():
        generator = torch.Generator().manual_seed(args.seed + 1)
        latents = []
        for _ in tqdm(range(views), desc=f"latents, width {width:g}"):
            x = data.shift_and_scale(pictures, generator, width).to(
                memory_format=torch.channels_last
            )
            latents.append(
                torch.cat([vae.encoder(part.to(args.device)).cpu() for part in x.split(64)])
            )
        save_state(path, latents=torch.stack(latents))
    return torch.load(path, weights_only=True)["latents"]


# ----------------------------------------------------------------------------- denoiser


def make_tokenizer(captions, folder):
    """A CLIPTokenizer whose merges were learnt on the captions until every word of theirs is one token."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True
            ),
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
    tokens = (
        alphabet
        + [a + "</w>" for a in alphabet]
        + [a + b for a, b in merges]
        + ["<|startoftext|>", "<|endoftext|>"]
    )
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8"
    )
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


def make_networks(vocabulary, bos, eos, args):
    torch.manual_seed(args.seed + 2)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(96, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(3, 6),
        cross_attention_dim=128,
    )  # "attention_head_dim" is the number of heads in this class
    return text_encoder.to(args.device), unet.to(args.device)


def denoiser_loss_weight(alpha):
    """min(1/alpha_t^2, WEIGHT_CAP) on the eps error.

    1/alpha_t^2 would make it the v error. Plain eps error hardly asks for the caption: at the noise levels where x_t alone
    does not tell which picture it is (t > 700) a wrong x0 costs at most alpha_t^2/sigma_t^2 < 0.1 of the noise's variance.
    """
    return (1 / alpha.square()).clamp(max=WEIGHT_CAP)


def make_denoiser(vae, pictures, captions, tokenizer, args):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="epsilon",
    )
    alpha, sigma = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    text_encoder, unet = make_networks(
        len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, args
    )
    networks = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})

    def loss_of(latents, generator):
        view = torch.randint(len(latents), (args.batch_size,), generator=generator)
        index = torch.randint(len(captions), (args.batch_size,), generator=generator)
        t = torch.randint(len(alpha), (args.batch_size,), generator=generator)
        x0 = latents[view, index]  # (B, 8, 8, 8)
        eps = torch.randn(x0.shape, generator=generator)
        x_t = alpha[t, None, None, None] * x0 + sigma[t, None, None, None] * eps
        u = torch.rand(args.batch_size, 2 + data.MAX_WORDS, generator=generator).tolist()
        prompts = [
            data.drop_words(captions[i], u_i, empty=0.10) for i, u_i in zip(index.tolist(), u)
        ]
        tokens = tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).input_ids
        text = text_encoder(tokens.to(args.device)).last_hidden_state  # (B, MAX_TOKENS, 128)
        error = unet(x_t.to(args.device), t.to(args.device), text, return_dict=False)[
            0
        ].float() - eps.to(args.device)
        return (
            denoiser_loss_weight(alpha[t]).to(args.device) * error.square().mean((1, 2, 3))
        ).mean()

    latents = make_latents(vae, pictures, NARROW, NARROW_VIEWS, args)
    train(
        "denoiser-narrow",
        args.narrow_iterations,
        networks,
        1e-3,
        lambda generator: loss_of(latents, generator),
        args,
    )
    latents = make_latents(vae, pictures, 1.0, WIDE_VIEWS, args)
    ema = torch.optim.swa_utils.AveragedModel(
        networks, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    train(
        "denoiser-wide",
        args.wide_iterations,
        networks,
        1e-3,
        lambda generator: loss_of(latents, generator),
        args,
        ema,
    )
    return ema.module["text_encoder"].eval(), ema.module["unet"].eval(), scheduler


# ----------------------------------------------------------------------------- classes


def make_class_denoiser(args):
    torch.manual_seed(args.seed)
    network = edm.prepare_network(UNet2DModel(**edm.unet_options(**CLASS_UNET))).to(args.device)
    networks = torch.nn.ModuleDict({"unet": network})
    pictures, groups = (
        data.emoji_images(2 * CLASS_UNET["size"]),
        [torch.tensor(group[: args.limit]) for group in data.emoji_classes()],
    )

    def loss_of(generator):
        labels = torch.randint(len(groups), (args.batch_size,), generator=generator)
        u = torch.rand(args.batch_size, generator=generator).tolist()
        index = torch.stack(
            [groups[label][int(u_i * len(groups[label]))] for label, u_i in zip(labels.tolist(), u)]
        )
        x0 = data.shift_and_scale(pictures[index], generator, data.CLASS_WIDTH).to(
            args.device
        )  # (B, 3, 16, 16)
        sigma = (
            (1.2 * torch.randn(args.batch_size, generator=generator) - 1.2).exp().to(args.device)
        )
        levels = models.Schedule(
            torch.ones_like(sigma), sigma, sigma.log() / 4
        )  # a level for each sample
        x_t = levels.add_noise(
            x0, torch.randn(x0.shape, generator=generator).to(args.device), torch.arange(len(sigma))
        )
        x0_pred = models.Denoiser(network, levels, "edm", FAMILIES["UNet2DModel"])(
            x_t, torch.arange(len(sigma)), {"class_labels": labels.to(args.device)}
        )
        return losses.denoising_loss(
            x0_pred, x0, losses.denoising_weight("edm", 1, sigma).view(-1, 1, 1, 1)
        ).mean()

    ema = torch.optim.swa_utils.AveragedModel(
        networks, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    train("classes", args.class_iterations, networks, 1e-3, loss_of, args, ema)
    return ema.module["unet"].eval()


# ----------------------------------------------------------------------------- all stages


def write_pipeline(out, vae, text_encoder, unet, tokenizer, scheduler):
    """A diffusers directory, float16, small enough for the repository."""
    for name, part in (("vae", vae), ("text_encoder", text_encoder), ("unet", unet)):
        part.half().save_pretrained(out / name)
    tokenizer.save_pretrained(out / "tokenizer")
    scheduler.save_pretrained(out / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }
    for name, part in (
        ("vae", vae),
        ("text_encoder", text_encoder),
        ("unet", unet),
        ("tokenizer", tokenizer),
        ("scheduler", scheduler),
    ):
        library = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
        index[name] = [library, type(part).__name__]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_text_teacher(out, work, args):
    captions = data.emoji_captions()[: args.limit]
    pictures = data.emoji_images(128)[
        : args.limit
    ]  # twice the size of what is made of them, for clean shifts and scales
    vae = make_autoencoder(pictures, args)
    tokenizer = make_tokenizer(captions, work / "tokenizer")
    text_encoder, unet, scheduler = make_denoiser(vae, pictures, captions, tokenizer, args)
    polish_decoder(vae, pictures, args)
    write_pipeline(out, vae, text_encoder, unet, tokenizer, scheduler)


def make_class_teacher(out, work, args):
    def write(folder):
        network = make_class_denoiser(args)
        network.class_embedding.weight.data[-1] = (
            0  # no label, which was never trained: EDM's network adds nothing then
        )
        network.half().save_pretrained(folder)
        (folder / "labels.txt").write_text("".join(f"{name}\n" for name in data.EMOJI_CLASSES))

    checkpoint.replace_folder(out, write)


def main(arguments=None):
    args = parse_arguments(arguments)
    make, default = {
        "text": (make_text_teacher, data.EMBEDDED["emoji"]),
        "classes": (make_class_teacher, data.EMBEDDED["emoji-classes"]),
    }[args.what]
    work, out = Path(args.work), Path(args.out or default)
    work.mkdir(parents=True, exist_ok=True)
    make(out, work, args)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB. Measure it: python eval.py --teacher-only --model {out}")


if __name__ == "__main__":
    cli.run(main)
