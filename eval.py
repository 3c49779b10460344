"""Numbers for students, their teacher, and folders of pictures.

    python eval.py                                   # the student of `python train.py` beside its teacher, minutes on two CPU cores
    python eval.py --compare runs/a runs/b runs/c    # several students and their teacher, from the same noise
    python eval.py --teacher-only --guidance 5       # a teacher at another guidance scale
    python eval.py --pictures FOLDER --reference FOLDER --inception FILE       # pictures that lie on disk
    python eval.py --protocol imagenet64-50k --student runs/imagenet --inception FILE --reference imagenet-64x64.npz
    python eval.py --protocol coco30k-256 --write-reference coco.npz --reference val2014 --inception FILE       # once, then --reference coco.npz
    python eval.py --watch runs/mine                 # each new checkpoint of a run as it appears, and a curve
    torchrun --standalone --nproc_per_node=8 eval.py ...       # shared out; the numbers are those of one process, to rounding

--out holds metrics.json, table.txt and parts/: what each picture was judged to be, by which an interrupted evaluation goes on where it
was, and the same command, or one with other rows, does not draw the same pictures again. Delete parts/ when you are done: 50,000 pictures
make 0.8 GB.

What is measured depends on the model, or on --protocol; each row of the table is measured alike:

  alignment    (embedded set) share of samples whose nearest picture in the set is right: it carries all words of the prompt, or is of
               the class. Both are cut to the square around their ink and compared by mean colour and edge strength in 8x8 cells.
  coverage     (embedded set) distinct right pictures among 32 samples of a prompt, as a share of those that exist; mean over the words
               cat, heart and moon, or over the classes, three times 32 samples each.
  frechet      (embedded set) Frechet distance between Gaussians fitted to samples and to the set, on 80 features, mean colour and edge
               strength in each of 4x4 cells. Few samples raise it; the last row, real pictures, shows what is left for a perfect model.
  fid, patch fid    the same of 2,048 Inception features, against --reference. 1706.08500
  kid, is, precision, recall    kernel distance (1801.01401), Inception score (1606.03498), and shares of samples among the reference's
               and the reverse (1904.06991, 3 neighbours), by torch-fidelity: with --inception; without it the latter two on the embedded
               set's 80 features.
  clip, pickscore, image reward    of each picture with its prompt: --clip, --pickscore, --image-reward.
  mean, deviation, saturation   of a picture's values in [0, 1], averaged: over-saturation shows as a rising deviation.
  diversity    root mean square distance between two thumbnails of the same prompt, averaged over pairs, then over prompts.

A run on gmm.py's plane gets that file's figures instead, from four times 4096 samples; `measure` there says what they are.

+- is a standard error: over samples where a figure is a mean, over 20 bootstrap draws of the samples for Frechet distances, over 10 splits
for is, over subsets of 1,000 for kid (of ten thousand pictures or more; else ?), over three repetitions for coverage, over prompts for
diversity; for precision that of a share of the samples, for recall of a share of the reference's pictures. The second table has differences
to the teacher with 95 % intervals, 1.96 standard errors. For means over samples and Frechet distances of rows drawn from the same noise they
are of the paired differences; for precision, recall and coverage as if rows were independent, and coverage's, of three repetitions, are
rather 80 %.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import platform
import shutil
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import errors
import fsdp
import judges
import models
import sample
from errors import UserError

COVERAGE_WORDS = ("cat", "heart", "moon")
COVERAGE_SAMPLES, COVERAGE_REPEATS = 32, 3
DRAWS = 20  # of a bootstrap


# ---------------------------------------------------------------------------------------------------- figures

@dataclass
class Figure:
    """A number with its standard error. values: what it is the mean of, sample by sample; draws: what it is on bootstrap draws. From these
    comes the error of a difference: smaller for rows of the same noise, and right for rows that have nothing to do with each other."""
    value: float
    error: float
    values: torch.Tensor | None = None
    draws: torch.Tensor | None = None

    def minus(self, other):
        """(difference, its standard error)"""
        alike = lambda a, b: a is not None and b is not None and len(a) == len(b)
        if alike(self.values, other.values):
            return mean_figure(self.values - other.values).value, mean_figure(self.values - other.values).error
        if alike(self.draws, other.draws):
            return self.value - other.value, (self.draws - other.draws).std().item()
        return self.value - other.value, math.hypot(self.error, other.error)


def mean_figure(values):
    values = torch.as_tensor(values, dtype=torch.float64)
    return Figure(values.mean().item(), (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan, values=values)


@dataclass
class Gaussian:
    """Mean (D,) and covariance (D, D), float64. factor (N, D), where fewer samples than dimensions gave it: covariance = factor^T factor."""
    mean: torch.Tensor
    covariance: torch.Tensor
    factor: torch.Tensor | None = None

    @classmethod
    def of(cls, features):
        features = features.double()
        factor = (features - features.mean(0)) / math.sqrt(len(features) - 1)
        return cls(features.mean(0), factor.T @ factor, factor if len(factor) < features.shape[1] else None)

    @functools.cached_property
    def root(self):
        """The symmetric root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two Gaussians.    1706.08500, equation 6

    (C_a C_b)^(1/2) has the trace of (R_b C_a R_b)^(1/2), symmetric, R_b being C_b's root. Where C_a = F_a^T F_a that is the trace of
    (F_a C_b F_a^T)^(1/2), a smaller matrix, and where both have factors the sum of the singular values of F_a F_b^T.
    """
    if a.factor is None and b.factor is not None:
        a, b = b, a
    if a.factor is not None and b.factor is not None:
        cross = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    else:
        inner = b.root @ a.covariance @ b.root if a.factor is None else a.factor @ b.covariance @ a.factor.T
        cross = torch.linalg.eigvalsh(inner).clamp(min=0).sqrt().sum()
    return ((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()


def frechet_figure(features, reference, seed):
    generator = torch.Generator().manual_seed(seed)
    resampled = lambda: features[torch.randint(len(features), (len(features),), generator=generator)]
    draws = torch.tensor([frechet_distance(Gaussian.of(resampled()), reference) for _ in range(DRAWS)], dtype=torch.float64)
    return Figure(frechet_distance(Gaussian.of(features), reference), draws.std().item(), draws=draws)


def library_figures(features, logits, reference):
    """What torch-fidelity computes of features (N, D), Inception's logits (N, 1008) or None, and the reference's features or None."""
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_part
    figures = {}
    if reference is not None and logits is not None:  # kid's kernel is made for Inception's features
        most = min(len(features), len(reference))
        subset = min(1000, most)
        found = kid_features_to_metric(features, reference, kid_subset_size=subset, verbose=False)
        independent = min(100, most // subset)  # subsets; where they share most of their samples their spread says nothing
        error = found["kernel_inception_distance_std"] / math.sqrt(independent) if independent >= 10 else math.nan
        figures["kid"] = Figure(found["kernel_inception_distance_mean"], error)
    if reference is not None and min(len(features), len(reference)) > 3:
        for name, share, count in zip(("precision", "recall"), calculate_precision_recall_part(features, reference), (len(features), len(reference))):
            figures[name] = Figure(share, math.sqrt(share * (1 - share) / count))
    if logits is not None and len(logits) >= 10:
        found = isc_features_to_metric(logits)
        figures["is"] = Figure(found["inception_score_mean"], found["inception_score_std"] / math.sqrt(10))
    return figures


def has_fidelity():
    try:
        return judges.import_fidelity("")
    except UserError:
        return None


def places_of(prompts):
    """{prompt: [where it stands, ...]}"""
    places = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(i)
    return places


def coverage_samples(prompts):
    """How many samples of each prompt a repetition has: 32, or what there is."""
    return min([COVERAGE_SAMPLES, *(len(own) // COVERAGE_REPEATS for own in places_of(prompts).values())])


def coverage_figure(nearest, prompts, judge):
    """nearest (N,), -1 where it is wrong. The first 3 x 32 samples of each prompt that has so many; fewer where there are fewer."""
    places, each = places_of(prompts), coverage_samples(prompts)
    if each == 0:
        return {}
    share = lambda own, prompt: len(set(nearest[own].tolist()) - {-1}) / len(judge.accepted(prompt))
    repeats = [[share(own[k * each:(k + 1) * each], prompt) for prompt, own in places.items()] for k in range(COVERAGE_REPEATS)]
    figure = mean_figure([sum(shares) / len(shares) for shares in repeats])
    return {"coverage": dataclasses.replace(figure, values=None)}  # three numbers are no pairs


def diversity_figure(thumbnails, prompts):
    """Distances between the first 32 thumbnails of each prompt that has two or more."""
    several = [thumbnails[own[:32]].flatten(1).float() / 255 for prompt, own in places_of(prompts).items() if prompt and len(own) > 1]
    if not several:
        return {}
    return {"diversity": mean_figure([torch.nn.functional.pdist(x).mean().item() / math.sqrt(x.shape[1]) for x in several])}


def figures_of(judged, prompts, count, reference, judge, seed):
    """{name: Figure} of a row: judged {name: (N, ...)} and its prompts, of which the first `count` are the protocol's, the rest repeated."""
    figures, main = {}, {name: values[:count] for name, values in judged.items()}
    if judge:
        figures["alignment"] = mean_figure(main["nearest"] >= 0)
        several = slice(count if len(prompts) > count else 0, None)
        figures |= coverage_figure(judged["nearest"][several], prompts[several], judge)
    for name, features in main.items():
        kind, _, view = name.partition(" ")
        if kind != "features" or len(features) < 2:
            continue
        known, title = reference.get(view, {}), {"layout": "frechet", "whole": "fid"}.get(view, f"{view} fid")
        if "gaussian" in known:
            figures[title] = frechet_figure(features, known["gaussian"], seed)
        if view == ("whole" if "features whole" in main else "layout") and has_fidelity():
            figures |= library_figures(features, main.get(f"logits {view}"), known.get("features"))
    gauges = ("mean", "deviation", "saturation")
    scores = [name for name in main if main[name].dim() == 1 and name not in (*gauges, "nearest")]
    figures |= {name: mean_figure(main[name]) for name in (*scores, *gauges)}
    return figures | diversity_figure(judged["thumbnail"], prompts)


# ---------------------------------------------------------------------------------------------------- what is judged

@dataclass
class Source:
    """A row of the table. pictures(start, stop) -> [(index, (3, H, W) in [0, 1]), ...], {file that is bad: why}. prompts: a text for each
    picture; those beyond the first `counted` are repeated prompts, for coverage and diversity. key: all that decides what the pictures
    are, a kind first of all."""
    label: str
    key: dict
    prompts: list
    counted: int
    pictures: Callable


def drawn(setting, row, key):
    """Samples of a model. Every row gets the same noise for the same place among the prompts."""
    model, args, prompts = setting.model, setting.args, setting.prompts

    def pictures(start, stop):
        noise = sample.column_noise(model, stop - start, row.noises, args.seed, first=start)
        made = model.decode(row.draw(noise, model.encode(prompts[start:stop])))
        if not made.isfinite().all():
            advice = " (--dtype float32 may help)" if args.dtype != "float32" else ""
            raise UserError(f"{label}: what it draws holds values that are no numbers{advice}", status=1)
        return list(enumerate(made, start)), {}

    label = row.label.replace("\n", ", ")
    key = key | {"seed": args.seed, "dtype": args.dtype} | models.prints(model)
    return Source(label, key, prompts, setting.counted, pictures)


def on_disk(folder, label=None, most=None):
    """Pictures of a folder or of EDM's .zip, with captions where there are any. Bad ones are left out and named."""
    files = data.PictureFiles(folder)
    entries = files.entries[:most]

    def pictures(start, stop):
        found, bad = [], {}
        for i in range(start, stop):
            try:
                found.append((i, judges.from_pil(data.open_picture(files.file(i)))))
            except Exception as error:
                bad[str(entries[i][0])] = str(error) or type(error).__name__
        return found, bad

    digest = hashlib.sha256(json.dumps([[str(file), files.stamp(i)] for i, (file, _) in enumerate(entries)]).encode()).hexdigest()
    captions = [caption or "" for _, caption in entries]
    return Source(label or str(folder), {"kind": "folder", "files": digest}, captions, len(entries), pictures)


def real_pictures(setting):
    """What a perfect model of the embedded set would draw."""
    real = setting.judge.real(setting.prompts, setting.args.seed + 1)
    pictures = lambda start, stop: (list(enumerate(real[start:stop], start)), {})
    return Source("real pictures", {"kind": "real", "seed": setting.args.seed}, setting.prompts, setting.counted, pictures)


def judge_pictures(source, all_judges, protocol, folder, batch):
    """Judge a source's pictures part by part, each process its share; what is there already, whole, is kept. Returns the parts' files."""
    key = source.key | judges.about(all_judges) | {"judges": [type(judge).__name__ for judge in all_judges], "prompts": source.prompts,
                                                   "views": list(protocol.views), "protocol": protocol.about, "batch": batch}
    folder = folder / f"{source.key['kind']}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
    fsdp.from_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    starts = range(0, len(source.prompts), batch)
    files = [folder / f"{number:05d}.safetensors" for number in range(len(starts))]
    with tqdm(total=len(source.prompts), desc=source.label, unit="picture", disable=not fsdp.first()) as bar:
        for number in range(fsdp.rank(), len(starts), fsdp.world()):
            start = starts[number]
            stop = min(start + batch, len(source.prompts))
            if not is_whole(files[number]):
                found, bad = source.pictures(start, stop)
                indices, pictures = [i for i, _ in found], [picture for _, picture in found]
                texts, judged = [source.prompts[i] for i in indices], {"index": torch.tensor(indices, dtype=torch.int64)}
                views = judges.views_of(pictures, protocol) if found else {}
                for judge in all_judges if found else ():
                    judged |= judge(pictures, views, texts)
                data.write_shard(files[number], {name: values.contiguous() for name, values in judged.items()}, texts, bad)
            bar.update(min((stop - start) * fsdp.world(), bar.total - bar.n))
    return files


def is_whole(file):
    try:
        return file.is_file() and bool(data.read_shard(file))
    except UserError:
        return False


def read_parts(files):
    """{name: (N, ...)} of all parts, and {file: why} of the pictures that could not be used."""
    parts, bad = [], {}
    for file in files:
        tensors, _, left_out = data.read_shard(file)
        parts.append(tensors)
        bad |= left_out
    full = [part for part in parts if len(part["index"])]
    if not full:
        raise UserError(f"none of the {len(bad)} pictures can be used: {some_of(bad)}")
    sizes = {tuple(size) for part in full for size in part.pop("size").tolist()}
    if len(sizes) > 1:
        judges.refuse_sizes(sizes)
    return {name: torch.cat([part[name] for part in full]) for name in full[0]}, bad


def some_of(bad):
    return "; ".join(f"{file}: {why}" for file, why in list(bad.items())[:3])


# ---------------------------------------------------------------------------------------------------- references

REFERENCE_FEATURES = 50_000  # the most of a reference's pictures that kid, precision and recall are computed with


def reference_of_folder(path, setting):
    """{view: {"gaussian", "features"}} of all pictures in a folder, in the first process, and what is to be said of them."""
    source = on_disk(path, "reference")
    files = judge_pictures(source, [judges.Gauges(), setting.extractor], setting.protocol, setting.parts, setting.args.batch_size)
    fsdp.from_all(None)
    if not fsdp.first():
        return {}, {}
    judged, bad = read_parts(files)
    setting.check_bad(path, bad, len(source.prompts))
    count = len(judged["index"])
    if count < 2:
        raise UserError(f"--reference {path} holds {count} picture: no statistics can be made of it")
    found = {name.partition(" ")[2]: values for name, values in judged.items() if name.startswith("features ")}
    some = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:REFERENCE_FEATURES].sort().values
    reference = {view: {"gaussian": Gaussian.of(features), "features": features[some]} for view, features in found.items()}
    return reference, {"count": count, "left out": len(bad)}


def write_reference(path, setting):
    """EDM's .npz, mu and sigma, with features and what they are of besides."""
    reference, about = reference_of_folder(setting.args.reference, setting)
    if not fsdp.first():
        return
    arrays = {}
    for view, known in reference.items():
        end = "" if view == "whole" else f" {view}"
        arrays |= {f"mu{end}": known["gaussian"].mean.numpy(), f"sigma{end}": known["gaussian"].covariance.numpy(),
                   f"features{end}": known["features"].numpy()}
    text = json.dumps(setting.extractor.about | {"protocol": setting.name} | about)

    def write(partial):
        with open(partial, "wb") as file:
            np.savez(file, about=text, **arrays)

    checkpoint.replace_file(path, write)
    setting.check_reference(about)
    print(f"reference: {path}, {about['count']} pictures" + "".join(f"\nWARNING: {warning}" for warning in setting.warnings))


def reference_of_file(path, setting):
    """The same of an .npz, EDM's or one that write_reference wrote."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        about = json.loads(str(arrays.pop("about"))) if "about" in arrays else {}
        arrays = {name: torch.from_numpy(values) for name, values in arrays.items()}
        mu, sigma = arrays["mu"], arrays["sigma"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"--reference {path} is no .npz with mu and sigma, EDM's format: {models.first_line(error)}") from None
    if mu.shape != (2048,) or sigma.shape != (2048, 2048):
        raise UserError(f"--reference {path} is of another feature extractor: mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}; "
                        "Inception's 2,048 features are expected")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise UserError(f"--reference {path} has values that are no numbers")
    present = setting.extractor.about | {"protocol": setting.name}
    other = [f"{name} was {about[name]}, is {present[name]}" for name in about if name in present and about[name] != present[name]]
    if other:
        raise UserError(f"--reference {path} was made in another way: {'; '.join(other)}")
    reference = {"whole": {"gaussian": Gaussian(mu.double(), sigma.double())}}
    if "features" in arrays:
        reference["whole"]["features"] = arrays["features"]
    if "mu patch" in arrays:
        reference["patch"] = {"gaussian": Gaussian(arrays["mu patch"].double(), arrays["sigma patch"].double())}
    return reference, about


# ---------------------------------------------------------------------------------------------------- what is measured, and how

class Setting:
    """Protocol, judges, reference, prompts: what is the same for all rows."""

    def __init__(self, args, model=None):
        self.args, self.model, self.warnings, self.bad, self.counts = args, model, [], {}, {}
        if args.reference and not Path(args.reference).exists():
            raise UserError(f"--reference {args.reference}: there is no such file or folder")
        self.name = args.protocol or default_protocol(model)
        self.protocol, self.parts = judges.PROTOCOLS[self.name], Path(args.out) / "parts"
        self.check_model()
        embedded = {"emoji": judges.EmojiJudge, "emoji-classes": lambda: judges.EmojiJudge(16, data.emoji_classes())}
        self.judge = embedded[self.name]() if self.name in embedded else None
        self.prompts, self.counted = self.choose_prompts() if model else ([], 0)
        self.coverage_samples = coverage_samples(self.prompts[self.counted:] or self.prompts)
        if self.judge and model and self.counted < self.protocol.samples:
            fewer = f", and {self.coverage_samples} of {COVERAGE_SAMPLES} a prompt for coverage" if self.coverage_samples < COVERAGE_SAMPLES else ""
            self.warnings.append(f"{self.counted} of {self.name}'s {self.protocol.samples} samples{fewer}: frechet, recall and coverage compare "
                                 "within this table only")
        self.judges = [judges.Gauges()] + [self.judge] * (self.judge is not None)
        self.reference, self.extractor = {}, None
        if args.inception or args.reference:
            self.extractor = judges.Inception(args.inception or inception_in_cache(), self.protocol.resize, args.device)
            self.judges.append(self.extractor)
            if not self.extractor.published:
                self.warnings.append("the Inception weights are not the published ones: fid, kid, is, precision and recall compare with "
                                     "nothing")
        clips = {f"clip {Path(path).name if Path(path).is_dir() else path}": path for path in args.clip or ()}
        if len(clips) < len(args.clip or ()):
            raise UserError("--clip: two of these folders have the same name")
        self.judges += [judges.Clip(judges.CLIP_NAMES.get(path.lower(), path), name, args.device) for name, path in clips.items()]
        self.judges += [judges.PickScore(args.pickscore, "pickscore", args.device)] if args.pickscore else []
        self.judges += [judges.ImageReward(args.image_reward, args.device)] if args.image_reward else []
        if self.judge:
            features = self.judge.reference()
            self.reference["layout"] = {"gaussian": Gaussian.of(features), "features": features}
        if args.reference and not args.write_reference:
            found, about = (reference_of_file if Path(args.reference).suffix == ".npz" else reference_of_folder)(args.reference, self)
            self.reference |= found
            self.check_reference(about)

    def check_reference(self, about):
        """What is to be said of a reference: {"count", "left out"}, as far as that is known."""
        if self.protocol.reference and about.get("count", self.protocol.reference) != self.protocol.reference:
            self.warnings.append(f"the reference has {about['count']:,} pictures; that of {self.name} has {self.protocol.reference:,}")
        if about.get("count", 2048) < 2048:
            self.warnings.append(f"a reference of {about['count']:,} pictures, fewer than features, says little")
        if about.get("left out") and not self.bad:
            self.warnings.append(f"the reference was made without {about['left out']} pictures that could not be used")
        missing = [f"{view} fid" for view in self.protocol.views if "whole" in self.reference and view not in self.reference]
        missing += ["kid, precision and recall"] * ("whole" in self.reference and "features" not in self.reference["whole"])
        if missing:
            self.warnings.append(f"the reference does not hold what {', '.join(missing)} need: --reference FOLDER, or --write-reference makes "
                                 "a file that does")

    def check_model(self):
        size = getattr(self.model, "picture_size", None)
        if self.protocol.size and size and size != self.protocol.size:
            own = self.protocol.size
            raise UserError(f"--protocol {self.name} is of pictures of {own}x{own}; {self.model.name} draws {size}x{size}")
        if self.model and (self.protocol.prompts == "labels") != hasattr(self.model, "labels") and self.protocol.prompts != "a file":
            raise UserError(f"--protocol {self.name} is of {self.protocol.prompts}, which {self.model.name} does not take for prompts")
        if hasattr(self.model, "labels") and (self.args.clip or self.args.pickscore or self.args.image_reward):
            raise UserError(f"--clip, --pickscore and --image-reward judge pictures by captions; the prompts of {self.model.name} are labels")

    def choose_prompts(self):
        """The prompts of all samples, and how many of them are the protocol's."""
        args, protocol = self.args, self.protocol
        count, repeated = args.samples or protocol.samples, []
        if args.prompts or protocol.prompts == "a file":
            if not args.prompts and not hasattr(self.model, "labels"):
                raise UserError(f"--protocol {self.name} needs --prompts FILE, a line each or a pickled list. recipes/README.md says where "
                                "COCO's are")
            known = data.read_prompts(args.prompts) if args.prompts else self.model.prompts
            if hasattr(self.model, "labels"):
                known = [str(label) for label in self.model.encode(known)["class_labels"].tolist()]
                prompts = [known[i % len(known)] for i in range(count)]
            else:
                prompts = known[:count]
                repeated = [prompt for prompt in prompts[:8] for _ in range(8)]
        elif protocol.prompts == "labels":
            prompts = [str(i % self.model.labels) for i in range(count)]
        else:
            if count > len(self.judge.captions):
                raise UserError(f"--samples {count}: the set has {len(self.judge.captions)} captions")
            chosen = torch.randperm(len(self.judge.captions), generator=torch.Generator().manual_seed(args.seed))[:count]
            prompts = [self.judge.captions[i] for i in chosen]
            repeated = [word for word in COVERAGE_WORDS for _ in range(COVERAGE_SAMPLES * COVERAGE_REPEATS)]
        return prompts + ([] if args.no_coverage else repeated), len(prompts)

    def check_captions(self, source):
        """Of a folder's pictures, before any of them is judged by its caption."""
        if source.key["kind"] != "folder":
            return
        flags = [judge.flag for judge in self.judges if getattr(judge, "flag", None)]
        without = sum(not prompt or prompt.isdecimal() for prompt in source.prompts)
        if flags and without:
            raise UserError(f"{flags[0]} judges pictures by their captions, and {without} of {len(source.prompts)} in {source.label} have none: "
                            "they stand in metadata.jsonl (file_name, text) or in a .txt beside each picture")
        try:
            for prompt in dict.fromkeys(source.prompts if self.judge else ()):
                self.judge.accepted(prompt)
        except UserError as error:
            raise UserError(f"{source.label}: {error}") from None

    def check_bad(self, where, bad, count):
        """Pictures that could not be used are named and counted; too many end the evaluation."""
        if len(bad) > data.BAD_SHARE * count:
            raise UserError(f"{len(bad)} of the {count} pictures in {where} cannot be used, more than one in a hundred: {some_of(bad)}")
        if bad:
            self.bad |= bad
            named = ", ".join(list(bad)[:3]) + (", ..." if len(bad) > 3 else "")
            self.warnings.append(f"{len(bad)} of {count} pictures in {where} could not be used and were left out: {named}")

    def measure(self, sources):
        """[(label, {name: Figure}), ...] in the first process, [] in the others."""
        for source in sources:
            self.check_captions(source)
        files = [judge_pictures(source, self.judges, self.protocol, self.parts, self.args.batch_size) for source in sources]
        fsdp.from_all(None)  # all parts are there
        table = []
        for source, parts in zip(sources, files) if fsdp.first() else ():
            judged, bad = read_parts(parts)
            self.check_bad(source.label, bad, len(source.prompts))
            self.counts[source.label] = len(judged["index"])
            prompts = [source.prompts[i] for i in judged["index"].tolist()]
            count = int((judged.pop("index") < source.counted).sum())
            figures = figures_of(judged, prompts, count, self.reference, self.judge, self.args.seed)
            if self.protocol.published and count < self.protocol.samples:
                self.warnings.append(f"{source.label}: {count:,} of the {self.protocol.samples:,} pictures of {self.name} compare with nothing "
                                     "that is published")
            elif "fid" in figures and count < 2048:
                self.warnings.append(f"{source.label}: a fid of {count:,} pictures, fewer than features, says little")
            table.append((source.label, figures))
        return table


def default_protocol(model):
    place = model and Path(model.name).resolve()
    return {data.EMOJI_TEACHER: "emoji", data.CLASS_TEACHER: "emoji-classes"}.get(place, "as-is")


def inception_in_cache():
    """Where torch-fidelity keeps what it has fetched."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(judges.INCEPTION_URL).name


# ---------------------------------------------------------------------------------------------------- tables

def cell(value, error):
    """As many places as the error has two figures of."""
    places = 3 if not (error > 0 and math.isfinite(error)) else min(4, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{places}f} +-" + (f"{error:.{places}f}" if math.isfinite(error) else "?")


def table_text(table, warnings):
    show = lambda figure: cell(figure.value, figure.error)
    return aligned(table, show) + "".join(f"\nWARNING: {text}" for text in warnings)


def differences(table):
    """[(label, {name: (difference to the first row, its standard error)}), ...] of every other row."""
    first = table[0][1]
    return [(label, {name: figure.minus(first[name]) for name, figure in figures.items() if name in first}) for label, figures in table[1:]]


def differences_text(rows, first):
    def show(difference):
        value, error = difference
        low, high = value - 1.96 * error, value + 1.96 * error
        return f"{value:+.3g} [{low:.3g}, {high:.3g}]" + ("*" if low > 0 or high < 0 else " ")

    return f"less {first}, 95 % intervals; * where 0 is outside\n" + aligned(rows, show)


def aligned(table, show):
    """[(label, {name: entry}), ...] as text, a column for each name."""
    names = list(dict.fromkeys(name for _, entries in table for name in entries))
    rows = [["", *names]] + [[label, *(show(entries[name]) if name in entries else "-" for name in names)] for label, entries in table]
    first, *others = [max(map(len, column)) for column in zip(*rows)]
    lines = (row[0].ljust(first) + "".join("  " + text.rjust(width) for text, width in zip(row[1:], others)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def versions():
    import diffusers
    import transformers
    packages = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "numpy": np}
    packages |= {"torch-fidelity": has_fidelity()} if has_fidelity() else {}
    return {"python": platform.python_version()} | {name: package.__version__ for name, package in packages.items()}


def health_of(path):
    """Means of the run's own figures, which know of the fake score, over the 50 rows before its end or before that checkpoint; nothing of a
    student that is no run."""
    run, named = checkpoint.locate(path)
    rows = []
    for line in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else ():
        with contextlib.suppress(ValueError):  # a run that goes on may be writing its last line
            rows.append(json.loads(line))
    rows = [row for row in rows if not named or row["iteration"] <= int(named.name)][-50:]
    names = [name for name in ("std", "gap", "cosine", "dm", "ca", "logit_accuracy", "fake_loss") if rows and name in rows[-1]]
    return {name: sum(row[name] for row in rows if name in row) / sum(name in row for row in rows) for name in names}


def finite(number):
    """None for what JSON knows no number for."""
    return number if math.isfinite(number) else None


def interval(value, error):
    return [finite(value - 1.96 * error), finite(value + 1.96 * error)]


def json_figures(figures):
    return {name: {"value": finite(figure.value), "standard_error": finite(figure.error), "interval_95": interval(figure.value, figure.error)}
            for name, figure in figures.items()}


def json_differences(own):
    return {name: {"value": finite(value), "interval_95": interval(value, error)} for name, (value, error) in own.items()}


def report_of(setting, table, weights, seconds, health):
    """All that metrics.json says."""
    args = setting.args
    weights = weights | (models.prints(setting.model) if setting.model else {}) | judges.about(setting.judges)
    return {
        "protocol": setting.name, "about": setting.protocol.about, "command": sys.argv[1:], "model": setting.model and setting.model.name,
        "samples": setting.counted, "pictures": setting.counts, "repeated_prompts": len(setting.prompts) - setting.counted,
        "prompts_sha256": hashlib.sha256("\n".join(setting.prompts).encode()).hexdigest(),
        "seed": args.seed, "guidance": args.guidance, "teacher_steps": args.teacher_steps, "sampler": args.sampler, "dtype": args.dtype,
        "device": args.device, "processes": fsdp.world(), "batch_size": args.batch_size,
        "coverage_samples": setting.coverage_samples if setting.judge else None, "coverage_repeats": COVERAGE_REPEATS if setting.judge else None,
        "reference": args.reference, "weights": weights, "versions": versions(),
        "warnings": setting.warnings, "left_out": setting.bad, "health": health, "seconds": round(seconds, 1),
        "rows": [{"label": label} | json_figures(own) for label, own in table],
        "differences_to_first": [{"label": label} | json_differences(own) for label, own in differences(table)],
    }


def write_report(out, report, text):
    checkpoint.replace_file(out / "metrics.json", lambda path: path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n"))
    checkpoint.replace_file(out / "table.txt", lambda path: path.write_text(text + "\n"))


# ---------------------------------------------------------------------------------------------------- command line

def parse_arguments():
    parser = errors.Parser(__doc__)
    sample.add_common_flags(parser)
    parser.add_argument("--compare", nargs="+", metavar="PATH",
                        help="several students, as --student takes them, in one table with their teacher")
    parser.add_argument("--teacher-only", action="store_true", help="no student is needed")
    parser.add_argument("--no-teacher", action="store_true",
                        help="leave out the teacher's row, which costs the most; differences are then to the first student")
    parser.add_argument("--pictures", nargs="+", metavar="DIR", help="folders of pictures (or EDM's .zip), a row each; without --student, "
                                                                     "--compare or --model no model is loaded")
    parser.add_argument("--watch", metavar="RUN", help="evaluate each new checkpoint of this run until it ends")
    parser.add_argument("--protocol", choices=judges.PROTOCOLS, help="what is drawn, how it is cut and resized, and what a number compares "
                                                                     "with (default: by the model); judges.py has the sources")
    parser.add_argument("--samples", type=errors.positive, help="(default: the protocol's)")
    parser.add_argument("--prompts", metavar="FILE",
                        help=".txt, one a line, or a pickled list; labels or their names for class-conditional models")
    parser.add_argument("--no-coverage", action="store_true",
                        help="leave out the repeated prompts, by which coverage and diversity are measured")
    parser.add_argument("--reference", metavar="PATH", help="for fid: a folder of pictures, EDM's .zip, or statistics (.npz, EDM's too)")
    parser.add_argument("--write-reference", metavar="FILE", help="write the statistics of --reference to an .npz, and no more")
    parser.add_argument("--inception", metavar="FILE", help=f"the Inception network's weights, {Path(judges.INCEPTION_URL).name} "
                                                            "(default: where torch-fidelity has it)")
    parser.add_argument("--clip", nargs="+", metavar="NAME", help="CLIP score: vit-b/32, vit-g/14, or a folder or hub id of a CLIP model")
    parser.add_argument("--pickscore", nargs="?", const=judges.PICKSCORE, metavar="PATH",
                        help=f"folder or hub id (default {judges.PICKSCORE})")
    parser.add_argument("--image-reward", nargs="?", const="ImageReward-v1.0", metavar="PATH",
                        help="its file of weights, or what its package fetches (pip install image-reward)")
    parser.add_argument("--batch-size", type=errors.positive, default=50, help="pictures drawn and judged at once")
    parser.add_argument("--out", metavar="DIR", help="(default: evaluation, or RUN/evaluation with --watch)")
    args = parser.parse_args()
    if args.write_reference and not args.reference:
        parser.error("--write-reference FILE needs --reference FOLDER, which it is made of")
    if args.write_reference and (args.pictures or args.student or args.compare or args.watch):
        parser.error("--write-reference writes statistics of --reference and judges nothing: leave out --pictures, --student, --compare and --watch")
    if args.watch and (args.pictures or args.no_teacher or args.guidance or args.teacher_steps or args.sampler):
        parser.error("--watch judges a run's students alone: leave out --pictures, --no-teacher, --guidance, --teacher-steps and --sampler")
    if (args.student is not None) + (args.compare is not None) + args.teacher_only + (args.watch is not None) > 1:
        parser.error("--student, --compare, --teacher-only and --watch are four ways to say which students: use one")
    args.out = args.out or (str(Path(args.watch) / "evaluation") if args.watch else "evaluation")
    return args


def teacher_rows(model, guidance, steps, args):
    """The teacher as it should be, and the undistilled network at a student's numbers of steps, with and without guidance."""
    rows = [] if args.no_teacher else [sample.teacher_row(model, args.teacher_steps, guidance, args.sampler)]
    return rows + [sample.teacher_row(model, few, scale, args.sampler) for scale in dict.fromkeys((guidance, 1.0)) for few in steps]


def student_rows(setting, students):
    rows = []
    for student in students:
        key = {"kind": "student", "weights": models.fingerprint(student.denoiser), "first timestep": student.first_timestep}
        rows += [drawn(setting, row, key | {"steps": steps}) for steps, row in zip(student.steps, student.rows(setting.model))]
    return rows


def evaluate(args):
    began = time.perf_counter()
    paths = [] if args.teacher_only else args.compare or [args.student or sample.DEFAULT_RUN]
    if args.write_reference or args.pictures and not (args.student or args.compare or args.teacher_only or args.model):
        model, students, sources = None, [], []
        setting = Setting(args)
        if args.write_reference:
            if Path(args.reference).suffix == ".npz":
                raise UserError(f"--write-reference makes statistics of pictures; {args.reference} are statistics already")
            return write_reference(args.write_reference, setting)
    else:
        model, students, guidance = sample.load_teacher_and_students(args, paths)
        if hasattr(model, "measure_rows"):
            return measure_plane(args, model, students, guidance)
        setting = Setting(args, model)
        args.guidance = guidance
        if len({student.guidance for student in students}) > 1:
            theirs = ", ".join(f"{student.name} {student.guidance}" for student in students)
            setting.warnings.append(f"the students were distilled with different guidance: {theirs}; the teacher's row has {guidance:g}")
        few = few_steps(args, students) if setting.judge and not args.compare else ()
        key = {"kind": "teacher", "weights": models.fingerprint(model.teacher)}
        sources = [drawn(setting, row, key | {"row": row.label}) for row in teacher_rows(model, guidance, few, args)]
        sources += student_rows(setting, students) + ([real_pictures(setting)] if setting.judge else [])
    sources += [on_disk(folder, most=args.samples) for folder in args.pictures or ()]
    if not sources:
        raise UserError("no row is left to judge: --teacher-only and --no-teacher leave out both")
    labels = [source.label for source in sources]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise UserError(f"two rows of the table are {twice[0]}: name each once")
    table = setting.measure(sources)
    if not fsdp.first():
        return
    weights = {source.label: source.key["weights"] for source in sources if "weights" in source.key}
    health = {student.name: found for student in students if (found := health_of(student.path))}
    judged = {source.label for source in sources if source.key["kind"] in ("student", "folder")}
    shown = [(label, own) for label, own in differences(table) if label in judged]
    text = table_text(table, setting.warnings) + ("\n\n" + differences_text(shown, table[0][0]) if shown else "")
    for name, figures in health.items():
        told = ", ".join(f"{key} {value:.3g}" for key, value in figures.items())
        text += f"\n\nhealth of {name} while it trained, over its last rows: {told}"
    if setting.protocol.published:
        text += f"\n\npublished: {setting.protocol.published}"
    write_report(Path(args.out), report_of(setting, table, weights, time.perf_counter() - began, health), text)
    repeated = len(setting.prompts) - setting.counted
    print(f"{setting.counted or max(setting.counts.values())} pictures a row by {setting.name}"
          + (f"; {repeated} more of repeated prompts" if repeated else ""))
    print(text + f"\nnumbers: {args.out}/metrics.json")


def few_steps(args, students):
    return students[0].steps if students else args.steps or (4, 2, 1)


def measure_plane(args, model, students, guidance):
    rows = teacher_rows(model, guidance, few_steps(args, students), args) + [row for student in students for row in student.rows(model)]
    measured = model.measure_rows(rows, guidance, max(row.noises for row in rows), args.seed)
    table = [(label, {name: Figure(value, error) for name, (value, error) in own.items()}) for label, own in measured]
    if fsdp.first():
        report = {"model": model.name, "command": sys.argv[1:], "guidance": guidance, "seed": args.seed, "versions": versions(),
                  "rows": [{"label": label} | json_figures(own) for label, own in table]}
        write_report(Path(args.out), report, table_text(table, []))
        print(table_text(table, []) + f"\nnumbers: {args.out}/metrics.json")


# ---------------------------------------------------------------------------------------------------- watching a run

WATCHED = ("model", "protocol", "samples", "prompts", "no_coverage", "reference", "inception", "clip", "pickscore", "image_reward", "steps",
           "first_timestep", "seed", "dtype", "vae", "batch_size")


def watch(args, pause=5.0):
    """Evaluate a run's checkpoints as they appear, until it has made all its iterations."""
    run, out = Path(args.watch), Path(args.out)
    config, asked = checkpoint.read_configuration(run), {name: getattr(args, name) for name in WATCHED}
    rows = read_rows(out / "watch.jsonl")
    if any(row["asked"] != asked for row in rows):
        raise UserError(f"{out}/watch.jsonl holds numbers of other settings than these: name another --out, or delete it")
    model, setting, passed = None, None, set()
    while True:
        found = {int(folder.name): (folder, checkpoint.read_manifest(folder)) for folder in checkpoint.complete_checkpoints(run)}
        known = {(row["iteration"], row["checkpoint"]) for row in rows} | passed
        whole = [(number, folder, checkpoint.text_digest(manifest)) for number, (folder, manifest) in sorted(found.items()) if manifest]
        new = [(number, folder, digest) for number, folder, digest in whole if (number, digest) not in known]
        for number, folder, digest in new:
            if model is None:
                model = sample.load_teacher(args, config)
                if hasattr(model, "measure_rows"):
                    raise UserError(f"--watch draws pictures, and {model.name} has none: its runs are quickly evaluated at their end")
                setting = Setting(args, model)
            said = len(setting.warnings)
            try:
                student = sample.Student.load(folder, model, args, steps=args.steps or [config["student_steps"]])
                (_, figures), = setting.measure(student_rows(setting, [student])[:1])
            except UserError as error:
                if folder.is_dir() and error.status == 2:
                    raise
                print(f"passed over {folder.name}: {error}")  # --keep has deleted it meanwhile, or what it draws is no picture
                passed.add((number, digest))
                continue
            new_row = {"iteration": number, "checkpoint": digest, "asked": asked, "figures": json_figures(figures)}
            rows = sorted([row for row in rows if row["iteration"] != number] + [new_row], key=lambda row: row["iteration"])
            checkpoint.replace_file(out / "watch.jsonl", lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)))
            shutil.rmtree(setting.parts)  # of a checkpoint that is evaluated once
            draw_watched(rows, out / "curves.png")
            print(f"iteration {number}: " + ", ".join(f"{name} {cell(figure.value, figure.error)}" for name, figure in figures.items())
                  + "".join(f"\nWARNING: {text}" for text in setting.warnings[0 if len(rows) == 1 else said:]))
        if max([row["iteration"] for row in rows] + [number for number, _ in passed], default=0) >= config["iterations"]:
            print(f"the run has made its {config['iterations']} iterations; numbers: {out}/watch.jsonl, curves: {out}/curves.png")
            return
        if not new:
            time.sleep(pause)


def draw_watched(rows, path):
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    curve = lambda name: [(row["iteration"], row["figures"][name]["value"]) for row in rows if name in row["figures"]]
    sample.draw_curves({name: curve(name) for name in names}, path)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def main():
    args = parse_arguments()
    if args.watch and fsdp.launched():
        raise UserError("--watch is for one process: without torchrun")
    args.device = fsdp.own_device(args.device)
    fsdp.start("none", args.device, timeout=3600)
    if Path(args.out).is_file():
        raise UserError(f"--out {args.out} is a file; it should be a folder")
    fsdp.from_first(lambda: checkpoint.make_writable(Path(args.out)))
    try:
        watch(args) if args.watch else evaluate(args)
    except UserError:
        for folder in (*Path(args.out).glob("parts/*"), Path(args.out) / "parts", Path(args.out)):
            with contextlib.suppress(OSError):  # refused before anything was judged: leave no empty folder
                folder.rmdir()
        raise
    except KeyboardInterrupt:
        raise UserError(f"interrupted; what has been judged is kept in {args.out}/parts, and the same command goes on with the rest",
                        status=130) from None


if __name__ == "__main__":
    fsdp.run(main)
