"""References of eval.py: statistics and features of a folder of images, or a file of them."""

import json

import numpy as np
import torch

import fsdp
from support.checkpoint import replace_file
from support.cli import UserError
from support.judges.gauges import Gauges
from support.judging import folder_source, judge_source, read_parts
from support.metrics import Gaussian
from support.report import warnings_text
from support.weights import in_one_line

LARGEST_FILE = 2**32  # bytes that a file of statistics may unpack to
REFERENCE_FEATURES = 50_000  # the most of a reference's images for kid, precision and recall


def of_folder(path, setting):
    """{view: {"gaussian", "features"}} of all images in a folder, on the main rank, and what is to
    be said of them."""
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


def write(path, setting):
    """EDM's .npz, mu and sigma, with features and what they are of besides."""
    reference, about = of_folder(setting.args.reference, setting)
    if not fsdp.is_main():
        return
    arrays = {}
    for view, known in reference.items():
        end = "" if view == "whole" else f" {view}"
        arrays[f"mu{end}"] = known["gaussian"].mean.numpy()
        arrays[f"sigma{end}"] = known["gaussian"].covariance.numpy()
        arrays[f"features{end}"] = known["features"].numpy()
    text = json.dumps(setting.inception.about | {"protocol": setting.protocol_name} | about)

    def save(partial):
        with open(partial, "wb") as file:
            np.savez(file, about=text, **arrays)

    replace_file(path, save)
    warn_of_reference(setting, about)
    print(f"reference: {path}, {about['count']} images" + warnings_text(setting.warnings))


def of_file(path, setting):
    """The same of an .npz, EDM's or one that `write` wrote."""
    with in_one_line(f"--reference {path} is no .npz with mu and sigma"):
        with np.load(path, allow_pickle=False) as archive:
            if sum(entry.file_size for entry in archive.zip.infolist()) > LARGEST_FILE:
                raise ValueError(f"it unpacks to more than {LARGEST_FILE:,} bytes")
            arrays = {name: archive[name] for name in archive.files}
        about = json.loads(str(arrays.pop("about"))) if "about" in arrays else {}
        arrays = {name: torch.from_numpy(values) for name, values in arrays.items()}
        mu, sigma = arrays["mu"], arrays["sigma"]
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


def warn_of_reference(setting, about):
    """about: {"count", "left out"}, as far as that is known."""
    wanted = setting.protocol.reference
    count = about.get("count")
    if wanted and count not in (None, wanted):
        name = setting.protocol_name
        setting.warn(f"the reference has {count:,} images; that of {name} has {wanted:,}")
    if count is not None and count < 2048:
        setting.warn(f"a reference of {count:,} images, fewer than features, says little")
    if about.get("left out") and not setting.bad:
        left_out = about["left out"]
        setting.warn(f"the reference was made without {left_out} images that could not be used")
    if "whole" not in setting.reference:
        return
    missing = [f"{view} fid" for view in setting.protocol.views if view not in setting.reference]
    if "features" not in setting.reference["whole"]:
        missing.append("kid, precision and recall")
    if missing:
        listed = ", ".join(missing)
        setting.warn(
            f"the reference does not hold what {listed} need: --reference FOLDER does, or a file "
            "that --write-reference makes"
        )
