"""Weights on disk and what identifies them. Nothing in a file is executed."""

import hashlib
import json
import pickle
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from support.cli import UserError, first_line


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


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def read_weights(path, what="the student"):
    """{name: tensor} of a .safetensors file or of a file that torch.save wrote."""
    path = Path(path)
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
    return weights


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
