"""Weights on disk and what identifies them. Nothing in a file is executed."""

import hashlib
import json
import pickle
import sys
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from support.cli import UserError, first_line

CONFIG_BYTES = 64 * 2**20  # the most that is read of a JSON file of settings
DATA_BYTES = 2**30  # and of a list of images or prompts


def fingerprint(module):
    """A short text that changes when a parameter does: a digest of the sums of their bits, which do
    not depend on the order of summation."""
    sums = []
    for parameter in module.parameters():
        bits = parameter.detach().float().contiguous().view(torch.int32)
        sums.append(bits.sum(dtype=torch.int64).item())
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def fingerprints(model):
    """Of what decides a model's images besides its network: {part: text that changes with it}."""
    parts = {}
    for i, encoder in enumerate(model.text_encoders, start=1):
        parts[f"text encoder {i}"] = fingerprint(encoder)
    if model.vae is not None:
        parts["decoder"] = fingerprint(model.vae)
    tables = torch.stack([model.schedule.alpha, model.schedule.sigma]).cpu().numpy().tobytes()
    digest = hashlib.sha256(tables).hexdigest()[:16]
    return parts | {"schedule": f"{model.prediction} {digest}"}


def read_text(path, limit=CONFIG_BYTES):
    """A file's text, UTF-8 with or without BOM. Raises OSError, or ValueError with the reason."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError("it is no regular file")
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"it has {size:,} bytes; at most {limit:,} are read")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    if "\0" in text:
        raise ValueError("it is not UTF-8 text: it holds zero bytes")
    return text


def read_json(path, limit=CONFIG_BYTES):
    """The object, {name: value}, in a JSON file."""
    try:
        content = json.loads(read_text(path, limit))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} should hold names and values, and holds a {type(content).__name__}"
        )
    return content


# Parts of names that wrappers of networks put there.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(weights, path):
    """The weights without the names that DistributedDataParallel, torch.compile and FSDP1 add."""
    found, seen = {}, set()
    for name, tensor in weights.items():
        parts = name.split(".")
        seen |= WRAPPERS.intersection(parts)
        found[".".join(part for part in parts if part not in WRAPPERS)] = tensor
    if seen and len(found) == len(weights):
        listed = ", ".join(sorted(seen))
        print(f"{path}: left out of the names of its weights: {listed}", file=sys.stderr)
        return found
    return weights


def check_finite(named, path):
    """Refuse weights that hold NaN or infinity. named: {name: tensor}."""
    for name, tensor in named.items():
        if tensor.is_meta:
            raise UserError(f"{path}: the weight {name} is missing")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{path}: the weight {name} holds NaN or infinity")


MOST_LAYERS, MOST = 1000, 10**8


def check_sizes(config, where):
    """Refuse a network whose configuration would take for ever to build."""
    for name, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        most = MOST_LAYERS if "layers" in name else MOST
        if any(isinstance(number, int) and number > most for number in numbers):
            raise UserError(f"{where}: {name} in its config.json is above {most:,}")


def load_pretrained(kind, path, subfolder=None, **options):
    """kind.from_pretrained of diffusers or transformers, held against its own report: a weight that
    is missing, unknown, of another shape or not finite is an error; the libraries only warn."""
    where = f"{path}/{subfolder}" if subfolder else str(path)
    if (Path(where) / "config.json").is_file():
        check_sizes(read_json(Path(where) / "config.json"), where)
    if subfolder:
        options["subfolder"] = subfolder
    network, report = kind.from_pretrained(path, output_loading_info=True, **options)
    if report["missing_keys"] or report["unexpected_keys"]:
        weights = unwrapped(weights_in_folder(where), where)
        expected = network.state_dict()
        known = {name: tensor for name, tensor in weights.items() if name in expected}
        if known.keys() == expected.keys() and report["missing_keys"]:
            network.load_state_dict(known)
            report = {"unexpected_keys": weights.keys() - expected.keys()}
    # Old files of CLIP hold a table of positions, which is no weight.
    unknown = [name for name in report.get("unexpected_keys", ()) if "position_ids" not in name]
    for problem, names in (
        ("lacks", report.get("missing_keys")),
        ("holds an unknown weight", unknown),
        ("has another shape of", report.get("mismatched_keys")),
    ):
        if names:
            first = min(map(str, names))
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{where} does not fit {kind.__name__}: it {problem} {first}{more}")
    check_finite(dict(network.named_parameters()), where)
    return network


def weights_in_folder(folder):
    """{name: tensor} of all .safetensors files of a folder; {} where it is a hub id."""
    weights = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def read_weights(path, what="the student"):
    """{name: tensor} of a .safetensors file or of a file that torch.save wrote."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{what} {path} cannot be loaded: it is no regular file")
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            with warnings.catch_warnings():  # of old storages with a type
                warnings.simplefilter("ignore")
                weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        why = "it holds more than weights, which is not loaded"
        raise UserError(f"{what} {path} cannot be loaded: {why}") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        why = "it is cut off or no file of weights" if path.is_file() else first_line(error)
        raise UserError(f"{what} {path} cannot be loaded: {why}") from None
    tensors = isinstance(weights, dict) and [isinstance(v, torch.Tensor) for v in weights.values()]
    if not tensors or not all(tensors):
        raise UserError(f"{what} {path} is no file of weights by name")
    check_finite(weights, f"{what} {path}")
    return unwrapped(weights, path)


def load_weights(network, weights, path, name):
    """Fill the network, which is of the model `name`, or say what does not fit."""
    own = network.state_dict()
    for key, tensor in own.items():
        if key not in weights:
            raise UserError(f"the student {path} does not fit {name}: it has no {key}")
        shape, wanted = tuple(weights[key].shape), tuple(tensor.shape)
        if shape != wanted:
            raise UserError(
                f"the student {path} does not fit {name}: {key} is {shape}, not {wanted}"
            )
    for key in weights:
        if key not in own:
            raise UserError(f"the student {path} does not fit {name}: {key} is not known there")
    network.load_state_dict(weights)
