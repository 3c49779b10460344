"""Image files: finding them with their captions, opening and cropping them."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import fsdp
from support.cli import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BAD_SHARE = 0.01  # of a folder's images that may be damaged or without a caption


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
    elif labels:
        found = list_classes(folder)
    else:
        files = [file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES]
        found = [(file, caption_beside(file)) for file in files]
    if not found:
        where = "in folders, one for each class" if labels else "there"
        raise UserError(f"{folder} holds no images {where}")
    return found if labels else sorted(found, key=name_of)


def name_of(entry):
    return str(entry[0])


def list_classes(folder):
    classes = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    found = []
    for label, path in enumerate(sorted(classes)):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        found += [(file, str(label)) for file in files]
    return found


def caption_beside(file):
    text = file.with_suffix(".txt")
    if not text.is_file():
        return None
    return text.read_text(encoding="utf-8", errors="replace").strip()


def list_metadata(folder):
    found = []
    try:
        for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
            if not line.strip():
                continue
            row = json.loads(line)
            texts = [row.get(name) for name in ("text", "caption", "prompt")]
            captions = [text for text in texts if isinstance(text, str)]
            found.append((folder / row["file_name"], captions[0] if captions else None))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'metadata.jsonl'} should have lines with file_name and text: "
            f"{type(error).__name__} {error}"
        ) from None
    return found


def list_archive(path):
    """The same of EDM's zip: images and dataset.json, whose "labels" are [[name, label], ...] or
    null."""
    try:
        with zipfile.ZipFile(path) as archive:
            labels = json.loads(archive.read("dataset.json"))["labels"]
            if labels is None:
                names = [n for n in archive.namelist() if Path(n).suffix.lower() in SUFFIXES]
                return [(name, None) for name in sorted(names)]
            return sorted((str(name), str(int(label))) for name, label in labels)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is no archive of images with a dataset.json of labels: "
            f"{type(error).__name__} {error}"
        ) from None


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
    """Resized until the shorter side fits, then cut around the centre."""
    width, height = image.size
    if width <= height:
        fitted = (size, int(size * height / width))
    else:
        fitted = (int(size * width / height), size)
    left, top = round((fitted[0] - size) / 2), round((fitted[1] - size) / 2)
    resized = image.resize(fitted, Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + size, top + size))


def open_image(file):
    """PIL, RGB, upright. PIL has many errors for a damaged file."""
    with Image.open(file) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


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
        return io.BytesIO(self.archive.read(file)) if self.archive else file

    def stamp(self, i):
        """What changes when the file does."""
        file = self.entries[i][0]
        if self.archive:
            return self.archive.getinfo(file).CRC if file in self.archive.NameToInfo else 0
        return [file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else 0


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
