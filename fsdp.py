"""What training does to parameters besides computing gradients: clipping, saving and resuming. One process so far."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from errors import UserError

STATE = "state.pt"


class NotFinite(Exception):
    """A loss or gradient that is no number any more."""


def refuse_several_processes():
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training in several processes is not supported yet: start it as python train.py")


def sum_over_processes(tensor):
    """The tensor itself in a single process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def clip_gradients(module, max_norm, name):
    """Scale the gradients to a global norm of at most max_norm; returns the norm before. Raises NotFinite, before any
    optimizer has moved, so that the parameters are still the last good ones."""
    try:
        return torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm, error_if_nonfinite=True)
    except RuntimeError as error:
        if "non-finite" not in str(error):
            raise
        raise NotFinite(f"the gradient of the {name} is not finite") from None


def prepare_run_directory(out, resume, overwrite, bytes_needed):
    """Make sure that the run can be written to before anything is computed, and that no earlier run is lost."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file")
    if not resume and out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out} holds an earlier run: go on with --resume, replace it with --overwrite, or choose another --out")
        if not (out / "config.json").is_file():
            raise UserError(f"{out} is not empty and is no run directory, so --overwrite does not touch it")
    make_writable(out)
    free = shutil.disk_usage(out).free
    if free < bytes_needed:
        raise UserError(f"--out {out} has {free / 1e6:.0f} MB free, and this run needs {bytes_needed / 1e6:.0f} MB")
    if not resume:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return out


def make_writable(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.write_bytes(b"\0" * 65536)
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written to: {error.strerror}") from None


@contextlib.contextmanager
def explain_failed_write(path):
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own for a full disk
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}; "
                        "what was there before is untouched") from None


def replace_file(path, write):
    """write(temporary path), then swap it in: a run killed while saving, or a full disk, leaves the earlier file."""
    partial = Path(f"{path}.partial")
    with explain_failed_write(path):
        write(partial)
        os.replace(partial, path)


def replace_folder(path, write):
    """The same for a folder, with one moment in which the old one stands as PATH.old."""
    path, partial, old = Path(path), Path(f"{path}.partial"), Path(f"{path}.old")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    with explain_failed_write(path):
        write(partial)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def save_state(out, state):
    replace_file(out / STATE, lambda path: torch.save(state, path))


def load_state(out, device):
    """The state of a run to resume. Nothing in the file is executed."""
    path = Path(out) / STATE
    if not path.is_file():
        raise UserError(f"there is nothing to resume: {path} does not exist")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a truncated or foreign file shows itself as any of a dozen exceptions
        raise UserError(f"{path} cannot be resumed from, it is damaged or no state of ours: {type(error).__name__}") from None


def read_configuration(out):
    """The flags that the run in `out` was started with."""
    path = Path(out) / "config.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"there is no run to resume at {out}: {path} is missing or damaged") from None


def check_same_configuration(out, config, may_differ):
    """A resumed run must be the same run."""
    saved = read_configuration(out)
    differing = [f"{name} was {saved.get(name)}, is {value}" for name, value in config.items()
                 if name not in may_differ and saved.get(name) != value]
    if differing:
        raise UserError(f"{out} is a run of another configuration: " + "; ".join(differing))
