"""What a run keeps on disk: its directory, files that are swapped in whole, and checkpoints.

    runs/x/config.json             flags
    runs/x/checkpoints/000300/     has this name only once it is whole
        shard-00001-....safetensors  what one rank held: trained parameters of student, averaged
                                     student and fake score, f-distill's running means, and the
                                     moments and step counts of both optimizers
        manifest.json              iteration, flags, the teacher's fingerprint, what the data were,
                                   and size and SHA-256 of every file

No state of a random generator or of a data set is kept: these follow from the seed and the
iteration (data.Draws). Nothing that is read here can execute anything: safetensors and JSON.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, no Exception

import fsdp
from support.cli import UserError, first_line
from support.weights import read_json

# What torch warns of when it saves or loads without a process group; here that is normal.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


# ----------------------------------------------------------------------------- files and folders


def prepare_run_directory(out, resume, bytes_needed):
    """Make sure, before anything is computed, that the run can be written and no run is lost."""
    out = Path(out)
    if not resume and out.is_dir() and any(path.name != ".lock" for path in out.iterdir()):
        raise UserError(
            f"{out} is not empty: go on with its run by --resume {out}, choose another --out, "
            "or delete it"
        )
    make_writable(out)
    for pattern in ("*.partial", "*.old", "checkpoints/*.partial", "checkpoints/*.old"):
        for path in out.glob(pattern):  # of a save that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    checkpoints = complete_checkpoints(out)
    replaced = sum(file.stat().st_size for folder in checkpoints for file in folder.iterdir())
    free = shutil.disk_usage(out).free + replaced
    if free < bytes_needed:
        raise UserError(
            f"--out {out} has {free / 1e6:.0f} MB free; this run needs {bytes_needed / 1e6:.0f} MB"
        )


@contextlib.contextmanager
def locked(out):
    """Hold a run directory for one run at a time, on the main rank. A run that was refused leaves
    no directory behind. A killed run's lock ends with its process."""
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None
    if not fsdp.is_main() or fcntl is None:
        yield
        return
    make_writable(out)
    path = Path(out) / ".lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(f"{out} is in use by another run, {file.read().strip()}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                Path(out).rmdir()


def make_writable(out):
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"--out {out} is a file; it should be a folder")
    probe = Path(out) / f".probe-{os.getpid()}"
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 65536)
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written to: {error.strerror}") from None


@contextlib.contextmanager
def explain_failed_write(path):
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        # torch and safetensors have errors of their own for a full disk.
        raise UserError(
            f"{path} cannot be written: {reason(error)}; what was there before is untouched"
        ) from None


def replace_file(path, write):
    """write(temporary path), then swap it in: a kill or a full disk leaves the earlier file."""
    partial = Path(f"{path}.partial")
    with explain_failed_write(path):
        write(partial)
        os.replace(partial, path)


def replace_text(path, text):
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


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


def reason(error):
    """One line; torch wraps what happened on each rank."""
    for failure, _ in getattr(error, "failures", {}).values():
        return reason(failure)
    return getattr(error, "strerror", None) or first_line(error)


def file_digest(file):
    sha = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 24):
            sha.update(block)
    return sha.hexdigest()


def text_digest(thing):
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()


def differing(saved, present):
    """["NAME was ..., is ...", ...]"""
    present = json.loads(json.dumps(present))  # as it looks when it is read again
    changed = [name for name, value in present.items() if saved.get(name) != value]
    return [f"{name} was {saved.get(name)}, is {present[name]}" for name in changed]


# ----------------------------------------------------------------------------- flags of a run


def launch_name():
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"{socket.gethostname()} {os.getppid()}"


def write_config(out, config):
    """config.json: the flags, and which launch wrote them, by which torchrun's restarts know it."""
    text = json.dumps(config | {"launch": launch_name()}, indent=2)
    replace_text(Path(out) / "config.json", text + "\n")


def read_config(out):
    """The flags in a run's config.json."""
    path = Path(out) / "config.json"
    if not path.exists():
        why = "it has no config.json" if path.parent.is_dir() else "there is no such directory"
        raise UserError(f"there is no run to resume at {out}: {why}")
    config = read_json(path)
    config.pop("launch", None)
    return config


def restarted_by_torchrun(out):
    """Whether torchrun restarts its processes (--max-restarts) and the run in `out` is theirs."""
    path = Path(out) / "config.json"
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not path.is_file():
        return False
    with contextlib.suppress(UserError):
        return read_json(path).get("launch") == launch_name()
    return False


# ----------------------------------------------------------------------------- checkpoints


def complete_checkpoints(out):
    """Newest first."""
    folders = (Path(out) / "checkpoints").glob("*")
    named = [path for path in folders if re.fullmatch(r"[0-9]+", path.name) and path.is_dir()]
    return sorted(named, key=lambda folder: int(folder.name), reverse=True)


def save(out, tensors, manifest, keep):
    """Write a checkpoint and delete all but the newest `keep`. Every rank calls this.

    tensors: {name: tensor}, sharded or the same on all ranks. manifest: what to know of them, the
    iteration first of all.
    """
    folder = Path(out) / "checkpoints" / f"{manifest['iteration']:06d}"
    partial = Path(f"{folder}.partial")
    fsdp.broadcast_from_main(shutil.rmtree, partial, True)
    writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
    with explain_failed_write(folder):
        dcp.save(tensors, storage_writer=writer)
        own_files = sorted(partial.glob(f"shard-{fsdp.rank() + 1:05d}-*"))
        own = {file.name: [file.stat().st_size, file_digest(file)] for file in own_files}
        files = {name: entry for part in fsdp.gather_objects(own) for name, entry in part.items()}
        fsdp.broadcast_from_main(finish, partial, folder, manifest | {"files": files}, keep)


def finish(partial, folder, manifest, keep):
    """The manifest, then the name; then older checkpoints go."""
    unlisted = {file.name for file in partial.glob("*.safetensors")} - manifest["files"].keys()
    if unlisted or not manifest["files"]:
        raise OSError(f"files without a checksum: {sorted(unlisted)}")
    manifest["sha256"] = text_digest(manifest)
    replace_text(partial / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one of this iteration
    partial.rename(folder)
    for old in complete_checkpoints(folder.parent.parent)[keep:]:
        old.rename(f"{old}.old")  # so that a half deleted one is never taken for a checkpoint
        shutil.rmtree(f"{old}.old", ignore_errors=True)


def newest_whole(out):
    """(folder, manifest) of the newest checkpoint that is whole; (None, None) if there is none
    yet. Damaged ones are passed over with a warning."""
    candidates = fsdp.broadcast_from_main(complete_checkpoints, out)
    for folder in candidates:
        manifest = fsdp.broadcast_from_main(read_manifest, folder)
        damage = damage_in(folder, manifest)
        if not damage:
            return folder, manifest
        fsdp.print_main(f"warning: {folder} is damaged ({damage}); trying the one before it")
    if candidates:
        raise UserError(f"there is nothing to resume at {out}: it has no checkpoint that is whole")
    return None, None


def read_manifest(folder):
    """None if it is not what was written."""
    try:
        manifest = read_json(folder / "manifest.json")
    except UserError:
        return None
    good = manifest.pop("sha256", None) == text_digest(manifest)
    good = good and manifest.get("iteration") == int(folder.name)
    for name, kind in (("files", dict), ("config", dict), ("network", dict), ("data", dict)):
        good = good and isinstance(manifest.get(name), kind)
    for entry in manifest["files"].values() if good else ():
        right = isinstance(entry, list) and [type(value) for value in entry] == [int, str]
        good = good and right
    return manifest if good else None


def damage_in(folder, manifest):
    """What is wrong with the checkpoint, or None. The ranks share the work of reading it all."""
    if not manifest:
        return "its manifest.json is missing or not what was written"
    own_files = list(manifest["files"].items())[fsdp.rank() :: fsdp.world_size()]
    own = [damage_of(folder / name, *entry) for name, entry in own_files]
    everyone = [damage for part in fsdp.gather_objects(own) for damage in part if damage]
    return everyone[0] if everyone else None


def damage_of(file, size, digest):
    try:
        found = file.stat().st_size
        if found != size:
            return f"{file.name} has {found} bytes, not {size}"
        return None if file_digest(file) == digest else f"{file.name} is not what was written"
    except OSError as error:
        return f"{file.name}: {error.strerror}"


def load(folder, tensors):
    """Fill the tensors, sharded or not, with what the checkpoint holds under their names."""
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        saved = reader.read_metadata().state_dict_metadata
        for name, tensor in tensors.items():
            found = tuple(saved[name].size) if name in saved else "not there"
            if found != tuple(tensor.shape):
                raise UserError(
                    f"the checkpoint {folder} does not fit this run: {name} is {found}, and should "
                    f"be {tuple(tensor.shape)}"
                )
        dcp.load(tensors, storage_reader=reader)
    except (
        CheckpointException,
        SafetensorError,
        OSError,
        KeyError,
        ValueError,
        TypeError,
    ) as error:
        raise UserError(f"the checkpoint {folder} cannot be read: {reason(error)}") from None


def names_in(folder):
    """The names of the tensors in a checkpoint."""
    return set(dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)
