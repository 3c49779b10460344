"""Numbers for students, their teacher, and folders of images.

    python eval.py                                   # the student of `python train.py` and its teacher
    python eval.py --compare runs/a runs/b runs/c    # several students, from the same noise
    python eval.py --compare runs/a/checkpoints/*    # a run's checkpoints: a table and curves.png
    python eval.py --teacher-only --guidance 5       # a teacher at another guidance scale
    python eval.py --images FOLDER --reference FOLDER --inception FILE        # images on disk
    python eval.py --protocol coco30k-256 --write-reference coco.npz --reference val2014 --inception FILE
    torchrun --standalone --nproc_per_node=8 eval.py ...       # shared out; the numbers of one process

--out holds metrics.json, table.txt and parts/: what each image was judged to be, from which an
interrupted evaluation goes on. Delete parts/ when you are done: 50,000 images make 0.8 GB.

What is measured depends on the model, or on --protocol (support/protocols.py):

  alignment    (embedded set) share of samples whose nearest image of the set is right: it carries all
               words of the prompt, or is of the class (support/judges/emoji.py)
  coverage     (embedded set) distinct right images among 32 samples of a prompt, as a share of those
               that exist; mean over the words cat, heart, moon, or over the classes, three times
  frechet      (embedded set) Frechet distance of Gaussians fitted to samples and to the set, on 80
               features. Few samples raise it; the row of real images shows what is left at best
  fid, patch fid    the same of 2,048 Inception features, against --reference. 1706.08500
  kid, is, precision, recall    by torch-fidelity: 1801.01401, 1606.03498, 1904.06991 (3 neighbours);
               without --inception the latter two on the embedded set's 80 features
  clip, pickscore, image reward    of each image with its prompt
  mean, deviation, saturation   of an image's values in [0, 1]: over-saturation raises the latter two
  diversity    root mean square distance of two thumbnails of one prompt, mean over prompts

+- is a standard error: over samples where a metric is a mean, over 20 bootstrap draws for Frechet
distances, over 10 splits for is, over subsets of 1,000 for kid (of ten thousand images or more; else ?),
over three repetitions for coverage, over prompts for diversity; for precision and recall that of a
share. The second table has differences to the first row with 95 % intervals, 1.96 standard errors. For
means and Frechet distances of rows from the same noise they are of paired differences; for precision,
recall and coverage as if rows were independent, and coverage's, of three repetitions, are rather 80 %.
"""

import contextlib
import hashlib
import json
import math
import platform
import re
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support import cli, flags

if __name__ == "__main__":
    cli.answer_early(flags.eval_parser, __doc__)

import diffusers
import numpy as np
import torch
import transformers
from tqdm import tqdm

import data
import fsdp
import models
import sample
from support import images, judges, pictures, protocols, shards
from support.checkpoint import make_writable, replace_file, replace_text
from support.cli import UserError, first_line
from support.judges.emoji import EmojiJudge
from support.judges.gauges import Gauges
from support.judges.inception import Inception
from support.metrics import (
    COVERAGE_REPEATS,
    COVERAGE_SAMPLES,
    COVERAGE_WORDS,
    Gaussian,
    Metric,
    coverage_samples,
    fidelity_or_none,
    metrics_of,
)
from support.prompt_files import read_prompts
from support.protocols import PROTOCOLS
from support.weights import fingerprint, fingerprints

REFERENCE_FEATURES = 50_000  # the most of a reference's images for kid, precision and recall


# ----------------------------------------------------------------------------- what is judged


@dataclass
class Source:
    """A row of the table. draw(start, stop) -> [(index, (3, H, W) in [0, 1]), ...], {file that is
    bad: why}. prompts: a text for each image; those beyond the first `counted` are repeated prompts,
    for coverage and diversity. key: all that decides what the images are, a kind first of all."""

    label: str
    key: dict
    prompts: list
    counted: int
    draw: Callable


def model_source(setting, sampler, key):
    """Samples of a model. Every row gets the same noise at the same place among the prompts."""
    model, args, prompts = setting.model, setting.args, setting.prompts
    label = sampler.label.replace("\n", ", ")

    def draw(start, stop):
        noise = sample.column_noise(model, stop - start, sampler.noises, args.seed, first=start)
        made = model.decode(sampler.draw(noise, model.encode(prompts[start:stop])))
        if not made.isfinite().all():
            advice = " (--dtype float32 may help)" if args.dtype != "float32" else ""
            raise UserError(f"{label}: its samples hold NaN or infinity{advice}", status=1)
        return list(enumerate(made, start)), {}

    key = key | {"seed": args.seed, "dtype": args.dtype} | fingerprints(model)
    return Source(label, key, prompts, setting.counted, draw)


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
    digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    captions = [caption or "" for _, caption in entries]
    key = {"kind": "folder", "files": digest}
    return Source(label or str(folder), key, captions, len(entries), draw)


def real_source(setting):
    """What a perfect model of the embedded set would draw."""
    seed = setting.args.seed
    real = setting.emoji.real(setting.prompts, seed + 1)

    def draw(start, stop):
        return list(enumerate(real[start:stop], start)), {}

    key = {"kind": "real", "seed": seed}
    return Source("real images", key, setting.prompts, setting.counted, draw)


def judge_source(source, all_judges, setting):
    """Judge a source's images part by part, each rank its share. What is there already, whole, is
    kept. Returns the parts' files."""
    protocol, batch = setting.protocol, setting.args.batch_size
    names = [type(judge).__name__ for judge in all_judges]
    about = {"judges": names, "prompts": source.prompts, "views": list(protocol.views)}
    about |= {"protocol": protocol.about, "batch": batch}
    key = source.key | judges.about(all_judges) | about
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(setting.args.out) / "parts" / f"{source.key['kind']}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    count = len(source.prompts)
    starts = range(0, count, batch)
    files = [folder / f"{number:05d}.safetensors" for number in range(len(starts))]
    bar = tqdm(total=count, desc=source.label, unit="image", disable=not fsdp.is_main())
    for number in range(fsdp.rank(), len(starts), fsdp.world_size()):
        start, stop = starts[number], min(starts[number] + batch, count)
        if not shards.is_whole(files[number], None, 0, exact=False):
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


# ----------------------------------------------------------------------------- references


def reference_of_folder(path, setting):
    """{view: {"gaussian", "features"}} of all images in a folder, on the main rank, and what is to be
    said of them."""
    source = folder_source(path, "reference")
    files = judge_source(source, [Gauges(), setting.inception], setting)
    fsdp.gather_objects(None)  # all parts are there
    if not fsdp.is_main():
        return {}, {}
    judged, bad = read_parts(files)
    setting.check_bad(path, bad, len(source.prompts))
    count = len(judged["index"])
    if count < 2:
        raise UserError(f"--reference {path} holds {count} image: too few for statistics")
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(count, generator=generator)[:REFERENCE_FEATURES].sort().values
    reference = {}
    for name, features in judged.items():
        if name.startswith("features "):
            known = {"gaussian": Gaussian.of(features), "features": features[some]}
            reference[name.removeprefix("features ")] = known
    return reference, {"count": count, "left out": len(bad)}


def write_reference(path, setting):
    """EDM's .npz, mu and sigma, with features and what they are of besides."""
    reference, about = reference_of_folder(setting.args.reference, setting)
    if not fsdp.is_main():
        return
    arrays = {}
    for view, known in reference.items():
        end = "" if view == "whole" else f" {view}"
        arrays[f"mu{end}"] = known["gaussian"].mean.numpy()
        arrays[f"sigma{end}"] = known["gaussian"].covariance.numpy()
        arrays[f"features{end}"] = known["features"].numpy()
    text = json.dumps(setting.inception.about | {"protocol": setting.protocol_name} | about)

    def write(partial):
        with open(partial, "wb") as file:
            np.savez(file, about=text, **arrays)

    replace_file(path, write)
    setting.check_reference(about)
    print(f"reference: {path}, {about['count']} images" + warnings_text(setting.warnings))


def reference_of_file(path, setting):
    """The same of an .npz, EDM's or one that write_reference wrote."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        about = json.loads(str(arrays.pop("about"))) if "about" in arrays else {}
        arrays = {name: torch.from_numpy(values) for name, values in arrays.items()}
        mu, sigma = arrays["mu"], arrays["sigma"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        why = first_line(error)
        raise UserError(f"--reference {path} is no .npz with mu and sigma: {why}") from None
    if mu.shape != (2048,) or sigma.shape != (2048, 2048):
        shapes = f"mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}"
        raise UserError(
            f"--reference {path} is of another feature extractor: {shapes}; Inception's 2,048 "
            "features are expected"
        )
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise UserError(f"--reference {path} holds NaN or infinity")
    present = setting.inception.about | {"protocol": setting.protocol_name}
    for name, value in present.items():
        if name in about and about[name] != value:
            raise UserError(
                f"--reference {path} was made in another way: {name} was {about[name]}, is {value}"
            )
    reference = {"whole": {"gaussian": Gaussian(mu.double(), sigma.double())}}
    if "features" in arrays:
        reference["whole"]["features"] = arrays["features"]
    if "mu patch" in arrays:
        patch = Gaussian(arrays["mu patch"].double(), arrays["sigma patch"].double())
        reference["patch"] = {"gaussian": patch}
    return reference, about


# ----------------------------------------------------------------------------- the setting


class Setting:
    """Protocol, judges, reference and prompts: what is the same for all rows."""

    def __init__(self, args, model=None):
        self.args, self.model = args, model
        self.warnings, self.bad, self.counts = [], {}, {}
        if args.reference and not Path(args.reference).exists():
            raise UserError(f"--reference {args.reference}: there is no such file or folder")
        self.protocol_name = args.protocol or default_protocol(model)
        cli.check_choice("--protocol", self.protocol_name, PROTOCOLS)
        self.protocol = PROTOCOLS[self.protocol_name]
        self.check_model()
        fsdp.print_main("loading the judges")
        self.judges = judges.make(args, self)
        self.emoji = self.judge_of(EmojiJudge)
        self.inception = self.judge_of(Inception)
        self.prompts, self.counted = self.choose_prompts() if model else ([], 0)
        self.check_counts()
        self.reference = {}
        if self.emoji:
            features = self.emoji.reference()
            self.reference["layout"] = {"gaussian": Gaussian.of(features), "features": features}
        if args.reference and not args.write_reference:
            is_file = Path(args.reference).suffix == ".npz"
            read = reference_of_file if is_file else reference_of_folder
            found, about = read(args.reference, self)
            self.reference |= found
            self.check_reference(about)

    def judge_of(self, kind):
        found = [judge for judge in self.judges if isinstance(judge, kind)]
        return found[0] if found else None

    def warn(self, text):
        self.warnings.append(text)

    def check_model(self):
        model, name, own = self.model, self.protocol_name, self.protocol.size
        if model is None:
            return
        if own and own != model.image_size:
            size = model.image_size
            raise UserError(
                f"--protocol {name} is of images of {own}x{own}; {model.name} draws {size}x{size}"
            )
        labels, kind = model.labels is not None, self.protocol.prompts
        if kind != "a file" and (kind == "labels") != labels:
            raise UserError(
                f"--protocol {name} is of {kind}, which {model.name} does not take for prompts"
            )

    def require_captions(self, flag):
        """Called by judges of images by their captions, before they load anything."""
        if self.model and self.model.labels is not None:
            raise UserError(
                f"{flag} judges images by captions; the prompts of {self.model.name} are labels"
            )

    def check_counts(self):
        """Warn of numbers that compare with nothing."""
        args, protocol = self.args, self.protocol
        self.coverage_samples = coverage_samples(self.prompts[self.counted :] or self.prompts)
        if self.emoji and self.model and self.counted < protocol.samples:
            fewer = ""
            if self.coverage_samples < COVERAGE_SAMPLES and not args.no_coverage:
                fewer = f", {self.coverage_samples} of {COVERAGE_SAMPLES} a prompt for coverage"
            self.warn(
                f"{self.counted} of the protocol's {protocol.samples} samples{fewer}: frechet, "
                "recall and coverage compare within this table only"
            )
        if self.inception and not self.inception.published:
            self.warn(
                "the Inception weights are not the published ones: fid, kid, is, precision and "
                "recall compare with nothing"
            )

    def check_reference(self, about):
        """about: {"count", "left out"}, as far as that is known."""
        wanted = self.protocol.reference
        count = about.get("count")
        if wanted and count not in (None, wanted):
            name = self.protocol_name
            self.warn(f"the reference has {count:,} images; that of {name} has {wanted:,}")
        if count is not None and count < 2048:
            self.warn(f"a reference of {count:,} images, fewer than features, says little")
        if about.get("left out") and not self.bad:
            left_out = about["left out"]
            self.warn(f"the reference was made without {left_out} images that could not be used")
        if "whole" not in self.reference:
            return
        missing = [f"{view} fid" for view in self.protocol.views if view not in self.reference]
        if "features" not in self.reference["whole"]:
            missing.append("kid, precision and recall")
        if missing:
            listed = ", ".join(missing)
            self.warn(
                f"the reference does not hold what {listed} need: --reference FOLDER does, or a file "
                "that --write-reference makes"
            )

    def choose_prompts(self):
        """The prompts of all samples, and how many of them are the protocol's."""
        args, model = self.args, self.model
        count, repeated = args.samples or self.protocol.samples, []
        if args.prompts or self.protocol.prompts == "a file":
            if not args.prompts and model.labels is None:
                raise UserError(
                    f"--protocol {self.protocol_name} needs --prompts FILE; recipes/README.md says "
                    "where COCO's are"
                )
            known = read_prompts(args.prompts) if args.prompts else model.prompts
            if model.labels is not None:
                known = [str(model.label(prompt)) for prompt in known]
                prompts = [known[i % len(known)] for i in range(count)]
            else:
                prompts = known[:count]
                repeated = [prompt for prompt in prompts[:8] for _ in range(8)]
        elif self.protocol.prompts == "labels":
            prompts = [str(i % model.labels) for i in range(count)]
        else:
            captions = self.emoji.captions
            if count > len(captions):
                raise UserError(f"--samples {count}: the set has {len(captions)} captions")
            generator = torch.Generator().manual_seed(args.seed)
            chosen = torch.randperm(len(captions), generator=generator)[:count]
            prompts = [captions[i] for i in chosen]
            each = COVERAGE_SAMPLES * COVERAGE_REPEATS
            repeated = [word for word in COVERAGE_WORDS for _ in range(each)]
        return prompts + ([] if args.no_coverage else repeated), len(prompts)

    def check_captions(self, source):
        """Of a folder's images, before any of them is judged by its caption."""
        if source.key["kind"] != "folder":
            return
        needy = [judge.flag for judge in self.judges if hasattr(judge, "captions_needed")]
        without = sum(not prompt or prompt.isdecimal() for prompt in source.prompts)
        if needy and without:
            raise UserError(
                f"{needy[0]} judges images by their captions, and {without} of "
                f"{len(source.prompts)} in {source.label} have none: they stand in metadata.jsonl "
                "(file_name, text) or in a .txt beside each image"
            )
        try:
            for prompt in dict.fromkeys(source.prompts if self.emoji else ()):
                self.emoji.accepted(prompt)
        except UserError as error:
            raise UserError(f"{source.label}: {error}") from None

    def check_bad(self, where, bad, count):
        """Images that could not be used are named and counted; too many end the evaluation."""
        if len(bad) > images.BAD_SHARE * count:
            raise UserError(
                f"{len(bad)} of the {count} images in {where} cannot be used, more than one in a "
                f"hundred: {some_of(bad)}"
            )
        if bad:
            self.bad |= bad
            named = ", ".join(list(bad)[:3])
            self.warn(f"{len(bad)} of {count} images in {where} were left out as bad: {named}")

    def measure(self, sources):
        """[(label, {name: Metric}), ...] on the main rank, [] on the others."""
        for source in sources:
            self.check_captions(source)
        files = [judge_source(source, self.judges, self) for source in sources]
        fsdp.gather_objects(None)  # all parts are there
        table = []
        for source, parts in zip(sources, files) if fsdp.is_main() else ():
            judged, bad = read_parts(parts)
            self.check_bad(source.label, bad, len(source.prompts))
            self.counts[source.label] = len(judged["index"])
            prompts = [source.prompts[i] for i in judged["index"].tolist()]
            count = int((judged.pop("index") < source.counted).sum())
            metrics = metrics_of(judged, prompts, count, self.reference, self.emoji, self.args.seed)
            if self.protocol.published and count < self.protocol.samples:
                self.warn(
                    f"{source.label}: {count:,} of the {self.protocol.samples:,} images of "
                    f"{self.protocol_name} compare with nothing that is published"
                )
            elif "fid" in metrics and count < 2048:
                self.warn(
                    f"{source.label}: a fid of {count:,} images, fewer than features, says little"
                )
            table.append((source.label, metrics))
        return table


def default_protocol(model):
    place = model and Path(model.name).resolve()
    known = {data.EMBEDDED["emoji"]: "emoji", data.EMBEDDED["emoji-classes"]: "emoji-classes"}
    return known.get(place, "as-is")


# ----------------------------------------------------------------------------- tables


def cell(value, error):
    """As many places as the error has two digits of."""
    if not (error > 0 and math.isfinite(error)):
        return f"{value:.3f} +-" + ("?" if math.isnan(error) else f"{error:.3f}")
    places = min(4, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{places}f} +-{error:.{places}f}"


def metric_cell(metric):
    return cell(metric.value, metric.error)


def difference_cell(difference):
    value, error = difference
    low, high = value - 1.96 * error, value + 1.96 * error
    star = "*" if low > 0 or high < 0 else " "
    return f"{value:+.3g} [{low:.3g}, {high:.3g}]{star}"


def differences(table):
    """[(label, {name: (difference to the first row, its standard error)}), ...] of the others."""
    first = table[0][1]
    rows = []
    for label, metrics in table[1:]:
        own = {name: metric.minus(first[name]) for name, metric in metrics.items() if name in first}
        rows.append((label, own))
    return rows


def aligned(table, show, width=100):
    """[(label, {name: entry}), ...] as text, a column a name, in blocks of at most `width`."""
    names = list(dict.fromkeys(name for _, entries in table for name in entries))
    left = max(len(label) for label, _ in table)
    blocks, lines = [], None
    for name in names:
        cells = [name] + [show(row[name]) if name in row else "-" for _, row in table]
        wide = max(map(len, cells)) + 2
        if lines is None or len(lines[0]) + wide > width:
            lines = [label.ljust(left) for label in ("", *(label for label, _ in table))]
            blocks.append(lines)
        for i, text in enumerate(cells):
            lines[i] += text.rjust(wide)
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in blocks)


def warnings_text(warnings):
    return "".join(f"\nWARNING: {text}" for text in warnings)


# ----------------------------------------------------------------------------- the report


def versions():
    packages = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "numpy": np}
    if fidelity_or_none():
        packages["torch-fidelity"] = fidelity_or_none()
    found = {name: package.__version__ for name, package in packages.items()}
    return {"python": platform.python_version()} | found


def health_of(path):
    """Means of a run's own metrics, which know of the fake score, over the 50 rows before its end or
    before that checkpoint; {} for a student that is no run."""
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    last = int(path.name) if run != path else math.inf
    rows = []
    if (run / "metrics.jsonl").is_file():
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # a run may be writing its last line
                rows.append(json.loads(line))
    rows = [row for row in rows if row["iteration"] <= last][-50:]
    means = {}
    for name in ("std", "gap", "cosine", "dm", "ca", "logit_accuracy", "fake_loss"):
        values = [row[name] for row in rows if name in row]
        if values:
            means[name] = sum(values) / len(values)
    return means


def finite(number):
    """None for what JSON knows no number for."""
    return number if math.isfinite(number) else None


def interval(value, error):
    return [finite(value - 1.96 * error), finite(value + 1.96 * error)]


def json_metric(metric):
    return {
        "value": finite(metric.value),
        "standard_error": finite(metric.error),
        "interval_95": interval(metric.value, metric.error),
    }


def json_row(label, entries):
    row = {"label": label}
    for name, entry in entries.items():
        if isinstance(entry, Metric):
            row[name] = json_metric(entry)
        else:
            row[name] = {"value": finite(entry[0]), "interval_95": interval(*entry)}
    return row


def report_of(setting, table, weights, seconds, health):
    """All that metrics.json says."""
    args, prompts = setting.args, setting.prompts
    if setting.model:
        weights = weights | fingerprints(setting.model)
    weights = weights | judges.about(setting.judges)
    settings = ("seed", "guidance", "teacher_steps", "sampler", "dtype", "device", "batch_size")
    return {
        "protocol": setting.protocol_name,
        "about": setting.protocol.about,
        "command": sys.argv[1:],
        "model": setting.model and setting.model.name,
        "samples": setting.counted,
        "images": setting.counts,
        "repeated_prompts": len(prompts) - setting.counted,
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        **{name: getattr(args, name) for name in settings},
        "processes": fsdp.world_size(),
        "coverage_samples": setting.coverage_samples if setting.emoji else None,
        "coverage_repeats": COVERAGE_REPEATS if setting.emoji else None,
        "reference": args.reference,
        "weights": weights,
        "versions": versions(),
        "warnings": setting.warnings,
        "left_out": setting.bad,
        "health": health,
        "seconds": round(seconds, 1),
        "rows": [json_row(label, own) for label, own in table],
        "differences_to_first": [json_row(label, own) for label, own in differences(table)],
    }


def draw_curves(out, students, table):
    """curves.png, where all students are checkpoints of one run."""
    runs = {student.path.parent for student in students}
    names = [student.path.name for student in students]
    if len(runs) > 1 or len(names) < 2 or not all(re.fullmatch(r"\d+", name) for name in names):
        return
    points = {}
    for label, metrics in table:
        number = re.match(r"\d+", label)
        for name, metric in metrics.items() if number else ():
            points.setdefault(name, []).append((int(number[0]), metric.value))
    curves = [pictures.Curve(name, sorted(line)) for name, line in points.items()]
    pictures.draw_curves(curves, Path(out) / "curves.png")
    print(f"curves: {out}/curves.png")


# ----------------------------------------------------------------------------- command line


def parse_arguments(arguments=None):
    parser = flags.eval_parser(__doc__)
    args = parser.parse_args(arguments)
    ways = (args.student is not None) + (args.compare is not None) + args.teacher_only
    if ways > 1:
        parser.error("--student, --compare and --teacher-only say which students: use one")
    if args.write_reference:
        if not args.reference:
            parser.error("--write-reference FILE needs --reference FOLDER, which it is made of")
        if args.images or args.student or args.compare:
            parser.error(
                "--write-reference judges nothing: leave out --images, --student and --compare"
            )
        if Path(args.reference).suffix == ".npz":
            parser.error(f"--write-reference makes statistics of images; {args.reference} are some")
    return args


def teacher_samplers(model, guidance, few, args):
    """The teacher as it should be, and the undistilled network at a student's numbers of steps, with
    and without guidance."""
    made = []
    if not args.no_teacher:
        made.append(sample.TeacherSampler(model, args.teacher_steps, guidance, args.sampler))
    for scale in dict.fromkeys((guidance, 1.0)):
        for steps in few:
            made.append(sample.TeacherSampler(model, steps, scale, args.sampler))
    return made


def model_sources(setting, students, guidance):
    """The rows of teacher, students and real images."""
    args, model = setting.args, setting.model
    few = ()
    if setting.emoji and not args.compare:
        few = students[0].steps if students else args.steps or (4, 2, 1)
    sources = []
    key = {"kind": "teacher", "weights": fingerprint(model.denoiser)}
    for sampler in teacher_samplers(model, guidance, few, args):
        sources.append(model_source(setting, sampler, key | {"row": sampler.label}))
    for student in students:
        key = {"kind": "student", "weights": fingerprint(student.denoiser)}
        key["first timestep"] = student.first_timestep
        for steps, sampler in zip(student.steps, student.samplers(model)):
            sources.append(model_source(setting, sampler, key | {"steps": steps}))
    if setting.emoji:
        sources.append(real_source(setting))
    return sources


def evaluate(args):
    began = time.perf_counter()
    students, sources = [], []
    only_images = args.images and not (
        args.student or args.compare or args.teacher_only or args.model
    )
    if args.write_reference or only_images:
        models.device_and_dtype(args)
        setting = Setting(args)
        if args.write_reference:
            return write_reference(args.write_reference, setting)
    else:
        fsdp.print_main("loading the models")
        paths = [] if args.teacher_only else args.compare or [args.student or flags.DEFAULT_RUN]
        model, students, args.guidance = sample.load_teacher_and_students(args, paths)
        setting = Setting(args, model)
        if len({student.guidance for student in students}) > 1:
            theirs = ", ".join(f"{student.name} {student.guidance}" for student in students)
            setting.warn(
                f"the students were distilled with different guidance: {theirs}; the teacher's row "
                f"has {args.guidance:g}"
            )
        sources = model_sources(setting, students, args.guidance)
    sources += [folder_source(folder, most=args.samples) for folder in args.images or ()]
    if not sources:
        raise UserError("no row is left to judge: --teacher-only and --no-teacher leave out both")
    labels = [source.label for source in sources]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two rows of the table are {label}: name each once")
    table = setting.measure(sources)
    if fsdp.is_main():
        publish(setting, sources, students, table, time.perf_counter() - began)


def publish(setting, sources, students, table, seconds):
    """Print the tables; write them, metrics.json and the curves."""
    args, out = setting.args, Path(setting.args.out)
    text = aligned(table, metric_cell) + warnings_text(setting.warnings)
    judged = {source.label for source in sources if source.key["kind"] in ("student", "folder")}
    shown = [(label, own) for label, own in differences(table) if label in judged]
    if shown:
        text += f"\n\nless {table[0][0]}, 95 % intervals; * where 0 is outside\n"
        text += aligned(shown, difference_cell)
    health = {student.name: health_of(student.path) for student in students}
    health = {name: means for name, means in health.items() if means}
    for name, means in health.items():
        listed = ", ".join(f"{key} {value:.3g}" for key, value in means.items())
        text += f"\n\nhealth of {name} in its last rows: {listed}"
    if setting.protocol.published:
        text += f"\n\npublished: {setting.protocol.published}"
    weights = {source.label: source.key["weights"] for source in sources if "weights" in source.key}
    report = report_of(setting, table, weights, seconds, health)
    replace_text(out / "metrics.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    replace_text(out / "table.txt", text + "\n")
    count = setting.counted or max(setting.counts.values())
    repeated = len(setting.prompts) - setting.counted
    more = f"; {repeated} more of repeated prompts" if repeated else ""
    print(f"{count} images a row by {setting.protocol_name}{more}")
    print(text + f"\nnumbers: {args.out}/metrics.json")
    draw_curves(args.out, students, table)


def main(arguments=None):
    args = parse_arguments(arguments)
    args.device, _ = models.device_and_dtype(args)
    fsdp.start("none", args.device)
    if Path(args.out).is_file():
        raise UserError(f"--out {args.out} is a file; it should be a folder")
    fsdp.broadcast_from_main(make_writable, args.out)
    try:
        evaluate(args)
    except UserError:
        out = Path(args.out)
        for folder in (*out.glob("parts/*"), out / "parts", out):
            with contextlib.suppress(OSError):  # refused before anything was judged
                folder.rmdir()
        raise
    except KeyboardInterrupt:
        raise UserError(
            f"interrupted; what has been judged is kept in {args.out}/parts, and the same command "
            "goes on with the rest",
            status=130,
        ) from None


if __name__ == "__main__":
    fsdp.run(main)
