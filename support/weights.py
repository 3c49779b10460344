"""Weights on disk and what identifies them. Nothing in a file is executed."""

import contextlib
import hashlib
import json
import pickle
import sys
import warnings
from pathlib import Path

import diffusers
import torch
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


@contextlib.contextmanager
def in_one_line(what):
    """Any error inside, of which libraries have many for a damaged or unfitting file, becomes a
    UserError: what, and the error's first line."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = getattr(error, "strerror", None) or first_line(error)[:300]
        raise UserError(f"{what}: {why}") from None


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
    with in_one_line(f"{path} cannot be read"):
        content = json.loads(read_text(path, limit))
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
    if issubclass(kind, diffusers.ModelMixin):
        options["low_cpu_mem_usage"] = False  # else a missing weight is left without values
    network, report = kind.from_pretrained(path, output_loading_info=True, **options)
    missing, unknown = report["missing_keys"], report["unexpected_keys"]
    if missing and Path(where).is_dir():
        weights = {}
        for file in sorted(Path(where).glob("*.safetensors")):
            weights |= load_file(file)
        missing, unknown = network.load_state_dict(unwrapped(weights, where), strict=False)
    # Old files of CLIP hold a table of positions, which is no weight.
    unknown = [name for name in unknown if "position_ids" not in name]
    for problem, names in (
        ("lacks", missing),
        ("holds an unknown weight", unknown),
        ("has another shape of", report.get("mismatched_keys")),
    ):
        if names:
            first = min(map(str, names))
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{where} does not fit {kind.__name__}: it {problem} {first}{more}")
    check_finite(dict(network.named_parameters()), where)
    return network


def load_tensors(file):
    """What torch.save wrote, as long as it is tensors and nothing that runs."""
    with warnings.catch_warnings():  # of old storages with a type
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)


class Unpickler(pickle.Unpickler):
    """Reads text, numbers, None, lists, tuples and dicts. Everything else in a pickle asks for a
    class or a function by name, and gets what stands for it in {(module, name): stand-in}."""

    def __init__(self, file, stands_for=None):
        super().__init__(file)
        self.stands_for = stands_for or {}

    def find_class(self, module, name):
        if (module, name) not in self.stands_for:
            message = f"it asks for {module}.{name}, and nothing in a file is executed"
            raise pickle.UnpicklingError(message)
        return self.stands_for[module, name]


def read_weights(path, what="the student"):
    """{name: tensor} of a .safetensors file or of a file that torch.save wrote."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} {path} cannot be loaded: it is no regular file")
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else load_tensors(path)
    except pickle.UnpicklingError:
        why = "it holds more than weights, which is not loaded"
        raise UserError(f"{what} {path} cannot be loaded: {why}") from None
    except Exception:
        why = "it is cut off or no file of weights"
        raise UserError(f"{what} {path} cannot be loaded: {why}") from None
    values = list(weights.values()) if isinstance(weights, dict) else []
    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        raise UserError(f"{what} {path} is no file of weights by name")
    check_finite(weights, f"{what} {path}")
    return unwrapped(weights, path)
