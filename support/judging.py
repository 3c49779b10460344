"""What eval.py judges: rows of images, judged part by part and kept on disk."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import fsdp
from support import images, judges, protocols, shards
from support.checkpoint import text_digest
from support.cli import UserError


@dataclass
class Source:
    """A row of the table. draw(start, stop) -> [(index, (3, H, W) in [0, 1]), ...], {file that is
    bad: why}. prompts: a text for each image; those beyond the first `counted` are repeated
    prompts, for coverage and diversity. key: all that decides what the images are, a kind first of
    all."""

    label: str
    key: dict
    prompts: list
    counted: int
    draw: Callable


def folder_source(folder, label=None, most=None):
    """Images of a folder or of EDM's .zip, with captions where there are any. Bad ones are left out
    and named."""
    files = images.ImageFiles(folder)
    entries = files.entries[:most]

    def draw(start, stop):
        found, bad = [], {}
        for i in range(start, stop):
            try:
                found.append((i, protocols.from_pil(images.open_image(files.file(i)))))
            except Exception as error:
                bad[str(entries[i][0])] = str(error) or type(error).__name__
        return found, bad

    stamps = [[str(file), files.stamp(i)] for i, (file, _) in enumerate(entries)]
    captions = [caption or "" for _, caption in entries]
    key = {"kind": "folder", "files": text_digest(stamps)}
    return Source(label or str(folder), key, captions, len(entries), draw)


def judge_source(source, all_judges, setting):
    """Judge a source's images part by part, each rank its share. What is there already, whole, is
    kept. Returns the parts' files."""
    protocol, batch = setting.protocol, setting.args.batch_size
    names = [type(judge).__name__ for judge in all_judges]
    about = {"judges": names, "prompts": source.prompts, "views": list(protocol.views)}
    about |= {"protocol": protocol.about, "batch": batch}
    digest = text_digest(source.key | judges.about(all_judges) | about)[:16]
    folder = Path(setting.args.out) / "parts" / f"{source.key['kind']}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    count = len(source.prompts)
    starts = range(0, count, batch)
    files = [folder / f"{number:05d}.safetensors" for number in range(len(starts))]
    bar = tqdm(total=count, desc=source.label, unit="image", disable=not fsdp.is_main())
    for number in range(fsdp.rank(), len(starts), fsdp.world_size()):
        start, stop = starts[number], min(starts[number] + batch, count)
        if not shards.is_whole(files[number]):
            found, bad = source.draw(start, stop)
            texts = [source.prompts[i] for i, _ in found]
            judged = judge_images([image for _, image in found], texts, all_judges, protocol)
            judged["index"] = torch.tensor([i for i, _ in found], dtype=torch.int64)
            judged = {name: values.contiguous() for name, values in judged.items()}
            shards.write_shard(files[number], judged, texts, bad)
        bar.update(min((stop - start) * fsdp.world_size(), bar.total - bar.n))
    bar.close()
    return files


def judge_images(found, texts, all_judges, protocol):
    judged = {}
    views = protocols.views_of(found, protocol) if found else {}
    for judge in all_judges if found else ():
        judged |= judge(found, views, texts)
    return judged


def read_parts(files):
    """{name: (N, ...)} of all parts, and {file: why} of the images that could not be used."""
    parts, bad = [], {}
    for file in files:
        tensors, _, left_out = shards.read_shard(file)
        bad |= left_out
        if len(tensors["index"]):
            parts.append(tensors)
    if not parts:
        raise UserError(f"none of the {len(bad)} images can be used: {some_of(bad)}")
    sizes = {tuple(size) for part in parts for size in part.pop("size").tolist()}
    if len(sizes) > 1:
        protocols.refuse_sizes(sizes)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, bad


def some_of(bad):
    return "; ".join(f"{file}: {why}" for file, why in list(bad.items())[:3])
