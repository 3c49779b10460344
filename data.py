"""Random numbers, prompts and real data of a run, and what is made of them beforehand.

    python data.py pairs --out pairs --count 4096        # then train.py --variant dmd --pairs pairs
    python data.py latents --images FOLDER --out latents --model DIR  # then train.py --real latents
    python data.py pixels --images imagenet/train --out imagenet64        # for EDM's networks
    python data.py prompts --prompts captions.txt --out encoded --model DIR  # --prompts encoded

A pair is noise and what the teacher's deterministic sampler makes of it. A folder of images has
captions in metadata.jsonl (lines with file_name and text) or in a .txt beside each image. Both
kinds lie in shards with checksums, the command goes on where it was interrupted, and under torchrun
the shards are shared out.
"""

import math
from pathlib import Path

from support import cli, flags

if __name__ == "__main__":
    cli.answer_early(flags.data_parser, __doc__)

import numpy as np
import torch

import fsdp
import models
from models import ASSETS
from support import embedded, images, shards, world
from support.cli import UserError
from support.lmdb_data import Lmdb
from support.precision import compute_in
from support.prompt_files import read_prompts
from support.shards import SHARD, Shards, as_sample
from support.weights import fingerprint

# Names for --model.
EMBEDDED = {
    "world": ASSETS / "world_teacher",
    "world-flow": ASSETS / "world_flow",
    "emoji-classes": ASSETS / "emoji_classes",
}
WORLD_PROMPTS = 20_000  # that students of the embedded world are trained on


def model_path(name):
    """What --model names: an embedded teacher, or a path or hub id as it is."""
    return str(EMBEDDED.get(name or "world", name))


def embedded_set(model):
    """What an embedded teacher has learnt: "world" or "emoji-classes"; None for another one."""
    for name, path in EMBEDDED.items():
        if Path(model.name).resolve() == path:
            return name.removesuffix("-flow")
    return None


# ----------------------------------------------------------------------------- random numbers


def mix_seed(seed, index):
    """One 32-bit seed from two numbers: torch's CPU generator uses no more bits of a seed."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


class Draws:
    """Random numbers for the samples of a batch, from a seed and an index (of the iteration) alone.

    All of them are one stream. Every call takes the whole batch's numbers off it and skips the
    other ranks': sample i gets the same numbers however many ranks there are. Since nothing but
    seed and index goes into it, a run can stop anywhere and go on bit for bit, without any state
    saved.
    """

    def __init__(self, seed, index, batch_size, local=None, device="cpu"):
        self.bits = np.random.PCG64(np.random.SeedSequence([seed, index]))
        self.stream = np.random.Generator(self.bits)
        self.batch_size, self.device = batch_size, device
        self.local = local or range(batch_size)  # this rank's samples

    def __len__(self):
        return len(self.local)

    def uniform(self, *shape):
        """(B, *shape) in [0, 1), float64, on the CPU; B is this rank's part of the batch."""
        each = math.prod(shape)
        self.bits.advance(self.local.start * each)
        u = torch.from_numpy(self.stream.random((len(self), *shape)))
        self.bits.advance((self.batch_size - self.local.stop) * each)
        return u

    def below(self, count):
        """One whole number below `count`, the same for all samples and ranks."""
        return int(self.stream.random() * count)

    def integers(self, low, high):
        """(B,) from low to high - 1, which are numbers or (B,)."""
        return (low + (high - low) * self.uniform()).long().to(self.device)

    def normal(self, *shape):
        """(B, *shape), float32. The inverse of the normal distribution takes one number of the
        stream for each, as many as are skipped for the other ranks."""
        u = 2 * self.uniform(*shape) - (1 - 2**-53)  # in (-1, 1)
        return (math.sqrt(2) * torch.erfinv(u)).float().to(self.device)


# ----------------------------------------------------------------------------- prompts


class Prompts:
    """What a student is trained on."""

    def __init__(self, texts):
        self.texts = texts

    def draw(self, draws):
        index = (draws.uniform() * len(self.texts)).long().tolist()
        return [self.texts[i] for i in index]


def warn_of_cut(model, prompts, most=100_000):
    """Say how many of the prompts are longer than the text encoder's input, which cuts them."""
    tokenizer = getattr(model.pipe, "tokenizer", None)
    prompts = list(prompts)[:most]
    if tokenizer is None or not prompts:
        return
    lengths = [len(tokens) for tokens in tokenizer(prompts, verbose=False).input_ids]
    longest = tokenizer.model_max_length
    cut = sum(length > longest for length in lengths)
    if cut:
        fsdp.print_main(
            f"{cut} of {len(prompts)} prompts are longer than {longest} tokens, the first and "
            "the last of which mark the ends: their rest is cut off"
        )


def training_prompts(path, model):
    """The prompts of a file; without one the model's own, else the embedded world's."""
    if model.conditions:
        texts = model.conditions.texts
    elif path:
        texts = read_prompts(path)
        warn_of_cut(model, texts)
    elif model.prompts:
        texts = model.prompts
    else:
        drawn = world.prompts(WORLD_PROMPTS, torch.Generator().manual_seed(0))
        texts = [str(prompt) for prompt in drawn]
    return Prompts(texts)


# ----------------------------------------------------------------------------- embedded sets


class Encoded:
    """Latents of images, each computed when it is first drawn and then kept, since the encoder is
    what costs time."""

    def __init__(self, model, count):
        need_encoder(model)
        self.model = model
        self.digests = []  # its files belong to the repository
        self.known = torch.zeros(count, dtype=torch.bool)
        self.x = torch.zeros(count, *model.sample_shape, device=model.device)

    def latents(self, index):
        """(B, C, h, w) of index (B,)."""
        for i in index[~self.known[index]].tolist():  # alone, so that rounding is the same
            image = self.image(i, torch.Generator().manual_seed(mix_seed(i, 0)))
            with compute_in(self.model.dtype, image):
                self.x[i] = self.model.encode_images(image)[0]
            self.known[i] = True
        return self.x[index]


class Scenes(Encoded):
    """Scenes of the embedded world."""

    count = 2048

    def __init__(self, model):
        super().__init__(model, self.count)
        self.captions = world.prompts(self.count, torch.Generator().manual_seed(1))

    def image(self, i, generator):
        return as_sample(world.scenes([self.captions[i]], generator))

    def draw(self, draws):
        """Latents (B, C, h, w) and B prompts."""
        index = draws.integers(0, self.count).cpu()
        return self.latents(index), [str(self.captions[i]) for i in index.tolist()]


class EmbeddedClasses(Encoded):
    """The images of the class-conditional teacher as it learnt them: classes equally often, and of
    each image some views, at random places and sizes."""

    views = 16

    def __init__(self, model):
        self.images, self.groups = embedded.images(), embedded.classes()
        super().__init__(model, len(self.images) * self.views)
        self.count = sum(map(len, self.groups)) * self.views

    def image(self, i, generator):
        return embedded.shift_and_scale(self.images[i // self.views, None], generator)

    def draw(self, draws):
        """Images (B, 3, 16, 16) and B classes."""
        views, prompts = [], []
        for u in draws.uniform().tolist():
            scaled = u * len(self.groups)
            number = int(scaled)
            place = int(scaled % 1 * len(self.groups[number]) * self.views)
            i = self.groups[number][place // self.views]
            views.append(i * self.views + place % self.views)
            prompts.append(str(number))
        return self.latents(torch.tensor(views)), prompts


# ----------------------------------------------------------------------------- real data


def real_data(model, path=None):
    """What the GAN takes for real, or noises as the student's input: an object with
    draw(draws) -> samples (B, C, H, W), B prompts."""
    if path is None:
        return own_real_data(model)
    path = Path(path)
    if not path.is_dir() and not (path.is_file() and path.suffix == ".zip"):
        raise UserError(f"--real {path}: there is no such directory or .zip")
    if (path / "data.mdb").is_file():
        real = Lmdb(path, model)
    elif (path / "config.json").is_file():
        real = Latents(path, model)
    else:
        real = ImageFolder(path, model)
    if model.labels is None:
        warn_of_cut(model, real.captions_in_all())
    else:
        check_labels(model, real)
    return real


def own_real_data(model):
    own = model.own_real_data()
    if own is not None:
        return own
    if embedded_set(model) == "world":
        return Scenes(model)
    if embedded_set(model) == "emoji-classes":
        return EmbeddedClasses(model)
    raise UserError(
        f"--gan-weight and --student-input data need real data, of which there is none for "
        f"{model.name}: name some by --real, or use --gan-weight 0 and --student-input backward"
    )


FEW = 1000  # real images that a critic, or a student trained on them, soon knows by heart


def warn_of_few(real):
    """real: where count is 0 there is no end of it."""
    if real is not None and 0 < real.count < FEW:
        fsdp.print_main(
            f"warning: --real holds {real.count} samples. With fewer than {FEW:,} the critic "
            "learns them by heart, and the student loses variety, which no metric shows"
        )


def check_labels(model, real):
    """Refuse class labels that the network does not know, before anything is trained."""
    found = [int(caption) for caption in real.captions_in_all() if caption.isdecimal()]
    most = max(found, default=0)
    if most >= model.labels:
        raise UserError(
            f"--real has labels up to {most}; the labels of {model.name} are 0 to "
            f"{model.labels - 1}"
        )
    if isinstance(real, ImageFolder) and most + 1 < model.labels:
        fsdp.print_main(
            f"warning: --real has {most + 1} classes, {model.name} has {model.labels}: the "
            f"folders, in the order of their names, are the labels 0 to {most}"
        )


def need_encoder(model):
    if not model.decodes:
        raise UserError(
            "--vae none leaves out the encoder that images need: make latents beforehand by "
            "`python data.py latents`"
        )


class ImageFolder:
    """A folder of images with captions, encoded as they are drawn. A bad one's place is taken by
    the next."""

    def __init__(self, folder, model):
        need_encoder(model)
        self.model = model
        self.reader = images.ImageReader(folder, model.image_size, labels=model.labels is not None)
        self.count = len(self.reader.entries)
        self.digests = [self.reader.digest()]
        self.read(0)

    def captions_in_all(self):
        return {caption for _, caption in self.reader.entries if caption}

    def read(self, i):
        found = self.reader.read(i)
        while found is None:
            i = (i + 1) % self.count
            found = self.reader.read(i)
        return found

    def draw(self, draws):
        """Latents (B, C, h, w) and B prompts."""
        x, prompts = [], []
        for i in (draws.uniform() * self.count).long().tolist():
            image, prompt = self.read(i)
            x.append(self.model.encode_images(as_sample(image[None])))  # alone: the same rounding
            prompts.append(prompt)
        return torch.cat(x), prompts


class Pairs(Shards):
    """Noise and what the teacher's deterministic sampler makes of it."""

    def __init__(self, folder, model, guidance):
        command = (
            f"python data.py pairs --out {folder} --model {model.name} --guidance {guidance:g}"
        )
        made_by = fingerprint(model.origin)
        names = ("noise", "x0")
        super().__init__(folder, names, "noise-image pairs", model, made_by, command)
        made_with = self.config.get("guidance", 0)
        if made_with != guidance:
            raise UserError(
                f"the pairs in {folder} were made with guidance {made_with:g}, the run has "
                f"{guidance:g}: make others with {command}"
            )
        norm = self.config.get("guidance_norm", "none")
        if norm != model.guidance_norm:
            raise UserError(
                f"the pairs in {folder} were made with --guidance-norm {norm}, the run has "
                f"{model.guidance_norm}: name the same in both"
            )


class Latents(Shards):
    """Encoded images, or pixels, with their prompts."""

    def __init__(self, folder, model):
        command = f"python data.py latents --images FOLDER --out {folder} --model {model.name}"
        super().__init__(folder, ("x0",), "latents", model, model.encoder_print, command)


# ----------------------------------------------------------------------------- made beforehand


def make_pairs(out, config, model, batch_size=64):
    """config: prompts, count, steps, guidance and seed, as the command takes them. Every shard has
    a seed of its own."""
    if config["steps"] > len(model.schedule):
        raise UserError(f"--steps {config['steps']}: {model.name} has {len(model.schedule)} levels")
    prompts = training_prompts(config["prompts"], model)
    timesteps = model.schedule.timesteps(config["steps"])

    def make(i, size, bar):
        draws = Draws(config["seed"], i, size)
        texts = prompts.draw(draws)
        noise = draws.normal(*model.sample_shape).half()  # as it is stored, so that the pair fits
        x0 = []
        for start in range(0, size, batch_size):
            part = slice(start, start + batch_size)
            cond = model.encode(texts[part])

            def x0_of(x_t, t, cond=cond):
                guidance = config["guidance"]
                return models.guided_x0(model.denoiser, x_t, t, cond, model.uncond, guidance)

            z = noise[part].float().to(model.device)
            with torch.no_grad():
                x = models.deterministic_sample(x0_of, z, timesteps, model.schedule)
            if not x.half().isfinite().all():
                raise UserError("the teacher's samples hold NaN or infinity", status=1)
            x0.append(x.half().cpu())
            bar.update(len(x))
        return {"noise": noise, "x0": torch.cat(x0)}, texts, {}

    config = config | {"what": "pairs", "made_by": fingerprint(model.origin)}
    shards.make_shards(out, config, make)


def make_prompts(out, config, model, batch_size=16):
    """Encode prompts, and the empty one. config: model and prompts, as the command takes them."""
    texts = ["", *dict.fromkeys(read_prompts(config["prompts"]))]
    warn_of_cut(model, texts)

    def make(i, size, bar):
        own = texts[i * SHARD : i * SHARD + size]
        parts = []
        for start in range(0, size, batch_size):
            cond = model.encode(own[start : start + batch_size])
            parts.append({name: stored(value, model.dtype) for name, value in cond.items()})
            bar.update(len(own[start : start + batch_size]))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return tensors, own, {}

    config = config | {"what": "prompts", "count": len(texts)}
    config["made_by"] = fingerprint(model.origin)
    shards.make_shards(out, config, make)


def stored(value, dtype):
    """Text states (B, tokens, width) in the dtype that their encoder gave them in, which loses
    nothing; the rest as it is."""
    return value.cpu().to(dtype) if value.dim() == 3 else value.cpu()


def make_latents(out, config, model, bad_share=images.BAD_SHARE):
    """config: model and images, as the command takes them."""
    reader = images.ImageReader(config["images"], model.image_size, bad_share)

    def encode(image):
        return model.encode_images(as_sample(image[None])).half().cpu()

    config = config | {"what": "latents", "made_by": model.encoder_print}
    return write_images(out, config, reader, encode)


def make_pixels(out, config, bad_share=images.BAD_SHARE):
    """config: images and size, as the command takes them."""
    reader = images.ImageReader(config["images"], config["size"], bad_share, labels=True)

    def keep(image):
        return image[None]

    return write_images(out, config | {"what": "pixels"}, reader, keep)


def write_images(out, config, reader, encode):
    def make(i, size, bar):
        x0, texts, before = [], [], len(reader.bad)
        for k in range(i * SHARD, i * SHARD + size):
            found = reader.read(k)
            if found:
                x0.append(encode(found[0]))
                texts.append(found[1])
            bar.update()
        if not x0:
            last = i * SHARD + size - 1
            raise UserError(f"images {i * SHARD} to {last} in {config['images']} are all bad")
        return {"x0": torch.cat(x0)}, texts, dict(list(reader.bad.items())[before:])

    return shards.make_shards(out, config | {"count": len(reader.entries)}, make)


def main(arguments=None):
    parser = flags.data_parser(__doc__)
    args = parser.parse_args(arguments)
    if args.what == "prompts" and not args.prompts:
        parser.error("prompts need --prompts FILE, which holds them")
    if args.what in ("latents", "pixels") and not args.images:
        parser.error(f"{args.what} need --images DIR, a folder of images")
    device, dtype = fsdp.device_and_dtype(args)
    bad = {}
    try:
        if args.what == "pixels":
            config = {"images": args.images, "size": args.size}
            bad = make_pixels(args.out, config, args.bad_share)
        else:
            vae = None if args.what == "latents" else "none"
            model = models.load_model(
                model_path(args.model),
                device,
                dtype,
                vae,
                image_size=args.image_size,
                guidance_norm=args.guidance_norm,
            )
        if args.what == "prompts":
            make_prompts(args.out, {"model": args.model, "prompts": args.prompts}, model)
        if args.what == "latents":
            config = {"model": args.model, "images": args.images}
            bad = make_latents(args.out, config, model, args.bad_share)
        if args.what == "pairs":
            names = ("model", "prompts", "count", "steps", "seed", "dtype")
            config = {name: getattr(args, name) for name in names}
            config["guidance"] = args.guidance or model.default_guidance
            if model.guidance_norm != "none":
                config["guidance_norm"] = model.guidance_norm
            make_pairs(args.out, config, model, args.batch_size)
    except KeyboardInterrupt:
        raise UserError(
            "interrupted; the finished shards are kept, and the same command goes on with the rest"
        ) from None
    for file, why in bad.items():
        print(f"left out: {file}: {why}")
    use = {"pairs": "--variant dmd --pairs", "prompts": "--prompts"}.get(args.what, "--real")
    fsdp.print_main(f"{args.what}: use them with: python train.py {use} {args.out}")


if __name__ == "__main__":
    fsdp.run(main)
