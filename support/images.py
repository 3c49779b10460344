"""Image files: finding them with their captions, opening and cropping them."""

import hashlib
import io
import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import fsdp
from support.cli import UserError
from support.weights import DATA_BYTES, in_one_line, read_text

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".qoi"),
)
BESIDES = (".txt", ".json", ".jsonl", ".csv", ".md", ".html", ".parquet")  # of what lies there too
BAD_SHARE = 0.01  # of a folder's images that may be damaged or without a caption
LARGEST_RATIO = 20  # of an image's sides
LARGEST_FILE = 2**28  # bytes that a file in an archive may unpack to


def files_in(folder):
    """All files below a folder, linked folders too, but none that is hidden, as a Mac's ._x.png."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [Path(place) / name for name in sorted(names) if name[0] != "."]
    return found


def images_in(folder):
    """The image files below a folder. What else is there is counted and named."""
    files = files_in(folder)
    found = [file for file in files if file.suffix.lower() in SUFFIXES]
    others = [file for file in files if file.suffix.lower() not in (*SUFFIXES, *BESIDES)]
    say_left_out(folder, others, "are no images by their names")
    return found


def say_left_out(folder, files, why):
    if files:
        listed = ", ".join(file.name for file in files[:3]) + ", ..." * (len(files) > 3)
        fsdp.print_main(f"{folder}: {len(files)} files {why} and left out: {listed}")


def list_images(folder, labels=False):
    """[(file, caption or None), ...] by name. With labels, an image's caption is the number of its
    folder among the folder's sorted neighbours."""
    folder = Path(folder)
    if folder.suffix == ".zip":
        return list_archive(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder of images {folder}")
    if (folder / "metadata.jsonl").is_file():
        found = list_metadata(folder)
        listed = {file for file, _ in found}
        rest = [file for file in images_in(folder) if file not in listed]
        say_left_out(folder, rest, "are not in metadata.jsonl")
    elif labels:
        found = list_classes(folder)
    else:
        found = [(file, caption_beside(file)) for file in images_in(folder)]
    if not found:
        where = "in folders, one for each class" if labels else "there"
        raise UserError(f"{folder} holds no images {where}")
    return found if labels else sorted(found, key=lambda entry: str(entry[0]))


def list_classes(folder):
    classes = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    found = []
    for label, path in enumerate(sorted(classes)):
        found += [(file, str(label)) for file in images_in(path)]
    return found


def caption_beside(file):
    text = file.with_suffix(".txt")
    if not text.is_file():
        return None
    with in_one_line(f"the caption {text} cannot be read"):
        return read_text(text).strip()


def list_metadata(folder):
    file, found = folder / "metadata.jsonl", []
    with in_one_line(f"{file} should have lines with file_name and text"):
        for number, line in enumerate(read_text(file, DATA_BYTES).split("\n"), start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise ValueError(f"line {number} has no file_name")
            texts = [row.get(name) for name in ("text", "caption", "prompt")]
            captions = [text for text in texts if isinstance(text, str)]
            found.append((folder / row["file_name"], captions[0] if captions else None))
    return found


def list_archive(path):
    """The same of EDM's zip: images and dataset.json, whose "labels" are [[name, label], ...] or
    null."""
    what = f"{path} is no archive of images with a dataset.json of labels"
    with in_one_line(what), zipfile.ZipFile(path) as archive:
        if archive.getinfo("dataset.json").file_size > DATA_BYTES:
            raise ValueError(f"its dataset.json unpacks to more than {DATA_BYTES:,} bytes")
        labels = json.loads(archive.read("dataset.json"))["labels"]
        if labels is None:
            names = [n for n in archive.namelist() if Path(n).suffix.lower() in SUFFIXES]
            return [(name, None) for name in sorted(names)]
        return sorted((str(name), str(int(label))) for name, label in labels)


def crop_as_adm(image, size):
    """As ImageNet is prepared for ADM and EDM: halved by means of four pixels as often as it can
    be, then bicubic to the size."""
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    fitted = (round(image.width * scale), round(image.height * scale))
    image = image.resize(fitted, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_as_stable_diffusion(image, size):
    """The largest square around the centre, by Lanczos."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def open_image(file):
    """PIL, RGB, as a viewer shows it: upright, 16 bits as 8, transparency over white, of several
    frames the first. PIL has many errors for a damaged file; ValueError where it is too thin."""
    if isinstance(file, Path) and not file.is_file():
        raise ValueError("it is no regular file")
    with Image.open(file) as opened:
        if max(opened.size) > LARGEST_RATIO * min(opened.size):
            width, height = opened.size
            raise ValueError(f"{width}x{height} is thinner than {LARGEST_RATIO} to 1")
        image = ImageOps.exif_transpose(opened)
    if image.mode == "F" or image.mode[0] == "I":
        image = eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def eight_bits(image):
    """Grey of 16 bits, which Pillow may hold in 32, or of floats from 0 to 1 -> grey of 8."""
    values = np.asarray(image).astype(np.float64)
    most = 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= most):
        low, high = values.min(), values.max()
        raise ValueError(f"its values are {low:g} to {high:g}; 0 to {most} are understood")
    return Image.fromarray((values * 255 / most).round().astype(np.uint8))


def as_tensor(image):
    """PIL -> uint8 (3, H, W)"""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


class ImageFiles:
    """The images of a folder, or of EDM's .zip, as they lie there."""

    def __init__(self, folder, labels=False):
        self.folder = folder
        self.entries = list_images(folder, labels)
        self.archive = zipfile.ZipFile(folder) if Path(folder).suffix == ".zip" else None

    def file(self, i):
        """What PIL can open."""
        file = self.entries[i][0]
        if not self.archive:
            return file
        if self.archive.getinfo(file).file_size > LARGEST_FILE:
            raise ValueError(f"it unpacks to more than {LARGEST_FILE:,} bytes")
        return io.BytesIO(self.archive.read(file))

    def measure(self, i):
        """A file's bytes, or the checksum of an archive's; 0 where there is no such file, or no
        file can have such a name."""
        file = self.entries[i][0]
        if self.archive:
            return self.archive.getinfo(file).CRC if file in self.archive.NameToInfo else 0
        try:
            return file.stat().st_size if file.is_file() else 0
        except (OSError, ValueError):
            return 0

    def stamp(self, i):
        """What changes when the file does."""
        size = self.measure(i)
        if self.archive or not size:
            return size
        return [size, self.entries[i][0].stat().st_mtime_ns]

    def digest(self):
        """What changes when the images do: names, sizes and captions of all, and the contents of
        sixteen. A copy of the folder has the same."""
        sha, count = hashlib.sha256(), len(self.entries)
        for i, (file, caption) in enumerate(self.entries):
            name = file if self.archive else os.path.relpath(file, self.folder)
            sha.update(json.dumps([name, self.measure(i), caption]).encode())
        for i in range(0, count, math.ceil(count / 16)):
            if not self.archive and self.measure(i):
                sha.update(self.entries[i][0].read_bytes())
        return sha.hexdigest()


class ImageReader(ImageFiles):
    """Reads images with captions at one size. Bad ones are counted; too many stop the run."""

    def __init__(self, folder, size, bad_share=BAD_SHARE, labels=False):
        super().__init__(folder, labels)
        if all(caption is None for _, caption in self.entries):
            raise UserError(
                f"none of the {len(self.entries)} images in {folder} has a caption: they stand in "
                "metadata.jsonl (file_name, text) or in a .txt beside each image"
            )
        self.size = size
        self.crop = crop_as_adm if labels else crop_as_stable_diffusion
        self.allowed = bad_share * len(self.entries)
        self.bad = {}  # file -> why

    def read(self, i):
        """uint8 (3, size, size) and its caption, or None for a bad one."""
        file, caption = self.entries[i]
        try:
            if caption is None:
                raise ValueError("it has no caption")
            return as_tensor(self.crop(open_image(self.file(i)), self.size)), caption
        except Exception as error:
            why = str(error) or type(error).__name__
            if str(file) not in self.bad:
                fsdp.print_main(f"warning: {file} cannot be used: {why}")
            self.bad[str(file)] = why
        if len(self.bad) > self.allowed:
            some = "; ".join(f"{name}: {why}" for name, why in list(self.bad.items())[:3])
            raise UserError(
                f"{len(self.bad)} of the {len(self.entries)} images in {self.folder} cannot be "
                f"used, more than the share that is allowed: {some}"
            )
        return None
