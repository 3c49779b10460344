"""What a run keeps on disk: its directory, files that are swapped in whole, and checkpoints.

    runs/x/checkpoints/000300/       has this name only once it is whole
        shard-00001-....safetensors  what the first process held: parameters of student, averaged student and fake score with its
                                     head and f-distill's running means, and the moments and step counts of both optimizers
        manifest.json                iteration, flags, the teacher's fingerprint, the figures that metrics.jsonl does not have yet,
                                     size and SHA-256 of every file
    runs/x/checkpoints/000400.aside-1/   a damaged one, or one later than the one that the run went on from
    runs/x/config.json               flags, and under "began" from which checkpoint and how the run last went on

There is no state of a random generator, of a schedule or of a data set: all of them follow from the seed and the iteration
(data.Draws). Nothing that is read here can execute anything: safetensors and JSON.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import threading
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, no Exception

import fsdp
from errors import UserError

# What torch warns of when it saves or loads without a process group; here that is how one process works.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


# ---------------------------------------------------------------------------------------------------- files and folders

def prepare_run_directory(out, resume, overwrite, bytes_needed):
    """Make sure that the run can be written to before anything is computed, and that no earlier run is lost."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file")
    if not resume and out.is_dir() and any(not path.name.startswith(".probe") and path.suffix != ".partial" for path in out.iterdir()):
        if not overwrite:
            raise UserError(f"{out} holds an earlier run: go on with --resume, replace it with --overwrite, or choose another --out")
        if not (out / "config.json").is_file():
            raise UserError(f"{out} is not empty and is no run directory, so --overwrite does not touch it")
    make_writable(out)
    reused = sum(file.stat().st_size for folder in complete_checkpoints(out) for file in folder.iterdir())  # goes as new ones come
    free = shutil.disk_usage(out).free + reused
    if free < bytes_needed:
        raise UserError(f"--out {out} has {free / 1e6:.0f} MB free, and this run needs {bytes_needed / 1e6:.0f} MB")
    for path in out.iterdir() if not resume else leftovers(out):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def leftovers(out):
    """Of a save that was killed."""
    return [path for pattern in ("*.partial", "*.old", "checkpoints/*.partial", "checkpoints/*.old") for path in out.glob(pattern)]


def make_writable(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{os.getpid()}"
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


def read_configuration(out):
    """What config.json says."""
    path = Path(out) / "config.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        what = "it has no config.json, so no run has begun there" if path.parent.is_dir() else "there is no such directory"
        what = f"{path} is damaged" if path.is_file() else what
        raise UserError(f"there is no run to resume at {out}: {what}") from None


def differing(saved, present, may_differ=()):
    """["NAME was ..., is ...", ...]"""
    present = json.loads(json.dumps(present))  # as it looks when it is read again
    return [f"{name} was {saved.get(name)}, is {value}" for name, value in present.items() if name not in may_differ and saved.get(name) != value]


def check_same_configuration(out, config, may_differ):
    """What is gone on with must be the same thing."""
    fields = differing(read_configuration(out), config, may_differ)
    if fields:
        raise UserError(f"{out} is of another configuration: " + "; ".join(fields))


# ---------------------------------------------------------------------------------------------------- writing checkpoints

class Writer:
    """Writes checkpoints in the background, one at a time, and keeps the newest ones."""

    def __init__(self, out, keep):
        self.folder, self.keep, self.thread, self.error = Path(out) / "checkpoints", keep, None, None
        # A group of its own, since its messages must not mix with training's; an hour, since shared disks can be slow.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1)) if dist.is_initialized() else None

    def save(self, tensors, manifest, publish):
        """tensors: {name: tensor}, sharded or the same on all processes; they are copied before this returns. manifest: what to know
        of them, the iteration first of all. publish() is called in the first process once the checkpoint is whole."""
        self.wait()
        folder = self.folder / f"{manifest['iteration']:06d}"
        partial = Path(f"{folder}.partial")
        fsdp.from_first(lambda: shutil.rmtree(partial, ignore_errors=True))
        shards = dcp.async_save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True), process_group=self.group)
        self.thread = threading.Thread(target=self.finish, args=(shards, partial, folder, manifest, publish), daemon=True)
        self.thread.start()

    def finish(self, shards, partial, folder, manifest, publish):
        """Checksums, manifest and name, when the shards of all processes lie there."""
        own = f"shard-{fsdp.rank() + 1:05d}-*"
        try:
            self.together(shards.result)
            digests = self.together(lambda: {file.name: [file.stat().st_size, digest(file)] for file in sorted(partial.glob(own))})
            manifest = manifest | {"files": {name: entry for part in digests for name, entry in part.items()}}
            self.together(lambda: fsdp.first() and self.complete(partial, folder, manifest, publish))
        except BaseException as error:  # a thread has nobody above it who would see it
            self.error = UserError(f"the checkpoint {folder} cannot be written: {error}; those before it are untouched")

    def together(self, work):
        """What work() gives in each process. If it fails in one, all of them raise."""
        try:
            mine = work(), None
        except (Exception, CheckpointException) as error:
            mine = None, reason(error)
        everyone = fsdp.from_all(mine, self.group)
        for _, failure in everyone:
            if failure:
                raise UserError(failure)
        return [result for result, _ in everyone]

    def complete(self, partial, folder, manifest, publish):
        unlisted = {file.name for file in partial.glob("*.safetensors")} - manifest["files"].keys()
        if unlisted or not manifest["files"]:
            raise OSError(f"files without a checksum: {sorted(unlisted)}")
        manifest["sha256"] = text_digest(manifest)
        replace_file(partial / "manifest.json", lambda path: path.write_text(json.dumps(manifest, indent=1) + "\n"))
        partial.rename(folder)
        publish()
        for old in complete_checkpoints(folder.parent.parent)[self.keep:]:
            old.rename(f"{old}.old")  # so that one that is half deleted is never taken for a checkpoint
            shutil.rmtree(f"{old}.old", ignore_errors=True)

    def check(self):
        """Raise what went wrong in the background."""
        if self.error:
            raise self.error

    def wait(self):
        if self.thread:
            self.thread.join()
        self.check()


def digest(file):
    sha = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 24):
            sha.update(block)
    return sha.hexdigest()


def text_digest(manifest):
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def reason(error):
    """One line; torch wraps what happened in each process."""
    for failure, _ in getattr(error, "failures", {}).values():
        return reason(failure)
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------- reading checkpoints

def locate(path):
    """What --resume names: (run directory, checkpoint or None). A checkpoint is named by its folder."""
    path = Path(path)
    if path.name == "checkpoints":
        return path.parent, None
    return (path.parent.parent, path) if path.parent.name == "checkpoints" else (path, None)


def complete_checkpoints(out):
    """Newest first."""
    folders = [folder for folder in (Path(out) / "checkpoints").glob("*") if re.fullmatch(r"\d+", folder.name)]
    return sorted(folders, key=lambda folder: int(folder.name), reverse=True)


def saved_flags(out, named):
    """The flags to go on with, and what was allowed of them: {"allow_changes", "reset_optimizer"}. The run's are in config.json, with
    what was allowed as long as no save has followed; a named checkpoint's are in its manifest."""
    if named:
        if not named.is_dir():
            raise UserError(f"there is no checkpoint {named}")
        manifest = read_manifest(named)
        if not manifest:
            raise UserError(f"the checkpoint {named} is damaged: {NO_MANIFEST}")
        return manifest["config"], {}
    flags, found = read_configuration(out), complete_checkpoints(out)
    if not found and (Path(out) / "student").is_dir():
        raise UserError(f"there is nothing to resume at {out}: it has a student, but no complete checkpoint")
    began = flags.pop("began", {})
    return flags, began if not found or began.get("from") == found[0].name else {}


def choose(out, named):
    """The checkpoint to go on from, with its manifest: the named one, or the newest that is whole. (None, None) if there is none yet."""
    candidates = fsdp.from_first(lambda: [named] if named else complete_checkpoints(out))
    for folder in candidates:
        manifest = fsdp.from_first(lambda: read_manifest(folder))
        damage = damage_in(folder, manifest) if manifest else NO_MANIFEST
        if not damage:
            return folder, manifest
        if named:
            raise UserError(f"the checkpoint {folder} is damaged: {damage}")
        fsdp.say(f"warning: the checkpoint {folder} is damaged ({damage}); trying the one before it")
    if candidates:
        raise UserError(f"there is nothing to resume at {out}: it has no checkpoint that is whole")
    return None, None


def aside(path):
    """A free name under which no run goes on from it."""
    names = (Path(f"{path}.aside-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists() and not Path(f"{name}.jsonl").exists())


NO_MANIFEST = "its manifest.json is missing or not what was written"


def read_manifest(folder):
    """None if it is not what was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        good = manifest.pop("sha256") == text_digest(manifest) and manifest["iteration"] == int(folder.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        good = False
    return manifest if good else None


def damage_in(folder, manifest):
    """What is wrong with the checkpoint's files, or None. The processes share the work of reading it all."""
    mine = [damage for name, entry in list(manifest["files"].items())[fsdp.rank()::fsdp.world()] if (damage := damage_of(folder / name, *entry))]
    return next((damage for part in fsdp.from_all(mine) for damage in part), None)


def damage_of(file, size, sha):
    try:
        if file.stat().st_size != size:
            return f"{file.name} has {file.stat().st_size} bytes, not {size}"
        return None if digest(file) == sha else f"{file.name} is not what was written"
    except OSError as error:
        return f"{file.name}: {error.strerror}"


def load(folder, tensors, may_be_new=()):
    """Fill the tensors, sharded or not, with what the checkpoint holds under their names. Those whose names begin with one of
    may_be_new may be missing there, and stay as they are."""
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        saved = reader.read_metadata().state_dict_metadata
        missing = [name for name in tensors if name not in saved]
        lost = [name for name in missing if not name.startswith(tuple(may_be_new))]
        wrong = [f"{name} is {tuple(saved[name].size)}, not {tuple(tensor.shape)}" for name, tensor in tensors.items()
                 if name in saved and saved[name].size != tensor.shape]
        if not lost and not wrong:
            dcp.load({name: tensor for name, tensor in tensors.items() if name in saved}, storage_reader=reader)
    except (CheckpointException, SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"the checkpoint {folder} cannot be read: {reason(error)}") from None
    if lost or wrong:
        raise UserError(f"the checkpoint {folder} does not fit this run: " + (wrong or [f"it has no {lost[0]}"])[0])
    return missing


# ---------------------------------------------------------------------------------------------------- beginning, and torchrun's restarts

def launch_name():
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"{socket.gethostname()} {os.getppid()}"


def write_beginning(out, config, folder, allowed):
    """What a run, or its going on from a checkpoint, leaves before its first iteration. allowed: --allow-changes and --reset-optimizer,
    which hold again if this beginning comes to no first save.

    Checkpoints that are newer are set aside first, newest first: they are not of what comes now, and if this is killed halfway, what
    is left is still one run. The metrics are copied, since rows that are later than the checkpoint are dropped.
    """
    later = [newer for newer in complete_checkpoints(out) if not folder or int(newer.name) > int(folder.name)]
    if later:
        metrics = aside(out / "metrics")
        shutil.copy(out / "metrics.jsonl", f"{metrics}.jsonl") if (out / "metrics.jsonl").exists() else None
        names = [newer.rename(aside(newer)).name for newer in later]
        fsdp.say(f"set aside, since the run goes on from an earlier one: {', '.join(names)} in {out / 'checkpoints'}, and {metrics.name}.jsonl")
    began = {"from": folder and folder.name, "launch": launch_name()} | allowed
    replace_file(out / "config.json", lambda path: path.write_text(json.dumps(config | {"began": began}, indent=2) + "\n"))


def begun_by_this_launch(out):
    """Whether torchrun restarts its processes (--max-restarts) and the run in `out` is theirs, rather than an earlier one."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or not (out / "config.json").is_file():
        return False
    return read_configuration(out).get("began", {}).get("launch") == launch_name()
