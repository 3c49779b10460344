"""Break tiny runs in the ways that runs break, and see that nothing is lost. A table for each way.

    python -m lab.faults                     # all of them, about ten minutes on two cores
    python -m lab.faults kill --kills 50     # kill -9 at random moments, then --resume
    python -m lab.faults damage            # each file of a checkpoint cut, one bit flipped, deleted
    python -m lab.faults disk                # a full disk, a directory that cannot be written to
    python -m lab.faults rank         # under torchrun a rank gets NaN, an exception, kill -9, hangs

The run is f-distill on the plane (lab/plane.py): it has a head, running means of the ratio, two
optimizers and an average to lose.
"""

import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # runs are forked, which threads do not survive

import torch
import torch.distributed.checkpoint as dcp

import fsdp
import train
from lab import plane
from support import checkpoint, cli
from support.cli import UserError

ROOT = Path(__file__).resolve().parents[1]
RUN = (
    "--variant fdistill --gan-weight 0.005 --batch-size 8 --fake-updates 2 --warmup 0 "
    "--save-every 1"
)


# ----------------------------------------------------------------------------- runs


def start(main, flags, log, processes=0, nodes=1, before=None):
    """A command's main with these flags in forked processes, as a launcher would start them, or
    plainly if processes is 0. Forking saves importing all, and fitting the plane's network if this
    process has done so."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path(log).write_bytes(b"")
    children, in_node = [], processes // nodes
    for rank in range(max(processes, 1)):
        variables = {}
        if processes:
            variables = {"RANK": rank, "LOCAL_RANK": rank % in_node, "WORLD_SIZE": processes}
            variables |= {"LOCAL_WORLD_SIZE": in_node}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments = (main, flags, log, variables, before)
        child = multiprocessing.get_context("fork").Process(target=run_child, args=arguments)
        child.start()
        children.append(child)
    return children


def run_child(main, flags, log, variables, before):
    os.environ |= {name: str(value) for name, value in variables.items()}
    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = [f"{main.__module__}.py", *map(str, flags)]
    if before:
        before()
    fsdp.run(main)


def wait_for(children):
    """Their exit statuses; minus the signal for one that was killed."""
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def on_ranks(main, log, *flags, processes=2, **launch):
    """([exit statuses], what was printed) of a command that so many ranks run together."""
    statuses = wait_for(start(main, flags, log, processes=processes, **launch))
    return statuses, Path(log).read_text()


def train_tiny(out, *flags, processes=0, before=None):
    """(exit status of the first process, what was printed)"""
    log = out.parent / f"{out.name}.log"
    flags = flags if "--resume" in flags else [*RUN.split(), "--out", out, *flags]
    statuses, printed = on_ranks(plane.main, log, *flags, processes=processes, before=before)
    return statuses[0], printed


def undisturbed(out, iterations, **launch):
    """A run to compare with."""
    shutil.rmtree(out, ignore_errors=True)
    status, printed = train_tiny(out, "--iterations", iterations, **launch)
    if status:
        raise UserError(f"the undisturbed run failed: {printed}")


def resumed_from(printed):
    found = re.search(r"going on from \S*/(\d+)", printed)
    return int(found[1]) if found else 0


def state_of(folder):
    """{name: whole tensor} of a checkpoint, or of the newest one of a run."""
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        folder = checkpoint.complete_checkpoints(folder)[0]
    saved = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {}
    for name, entry in saved.items():
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    checkpoint.load(folder, tensors)
    return tensors


def same_state(a, b):
    """Whether two runs' newest checkpoints and students are equal bit for bit."""
    student = Path("student", "diffusion_pytorch_model.safetensors")
    if (Path(a) / student).read_bytes() != (Path(b) / student).read_bytes():
        return False
    a, b = state_of(a), state_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def verdict(good):
    return "yes" if good else "NO"


# ---------------------------------------------------------------------------- one process, one disk


def kill(work, kills=50, processes=0, iterations=30, seed=0):
    numbers = random.Random(seed)
    reference, out = work / f"undisturbed-{processes}", work / f"killed-{processes}"
    begun = time.perf_counter()
    undisturbed(reference, iterations, processes=processes)
    duration, rows = time.perf_counter() - begun, []
    for _ in range(kills):
        shutil.rmtree(out, ignore_errors=True)
        moment = numbers.uniform(0, duration)
        flags = [*RUN.split(), "--iterations", iterations, "--out", out]
        children = start(plane.main, flags, work / "killed.log", processes)
        time.sleep(moment)
        for child in children:
            child.kill()
        wait_for(children)
        whole = [int(folder.name) for folder in checkpoint.complete_checkpoints(out)]
        saving = any((out / "checkpoints").glob("*.partial"))
        again = ["--resume", out]
        if not (out / "config.json").exists():  # nothing to resume yet
            shutil.rmtree(out, ignore_errors=True)
            again = ["--iterations", iterations]
        status, printed = train_tiny(out, *again, processes=processes)
        newest = max(whole, default=0)
        good = status == 0 and resumed_from(printed) == newest and same_state(out, reference)
        save = "yes" if saving else "no"
        rows.append((f"{moment:.2f} s of {duration:.2f}", newest or "none", save, verdict(good)))
    return rows


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    content = bytearray(file.read_bytes())
    content[random.Random(len(content)).randrange(len(content))] ^= 1
    file.write_bytes(content)


def damage(work, iterations=4, processes=2):
    reference, out, rows = work / "undamaged", work / "damaged", []
    undisturbed(reference, iterations, processes=processes)
    newest = checkpoint.complete_checkpoints(reference)[0]
    for name in sorted(path.name for path in newest.iterdir()):
        for what, spoil in (("half cut off", cut), ("bit flipped", flip), ("deleted", Path.unlink)):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(reference, out)
            spoil(out / "checkpoints" / newest.name / name)
            status, printed = train_tiny(out, "--resume", out, processes=processes)
            begun = resumed_from(printed)
            good = status == 0 and "is damaged" in printed and begun < int(newest.name)
            good = good and same_state(out, reference)
            rows.append((name, what, f"says so, goes on from {begun}", verdict(good)))
    return rows


def small_files():
    """No file can grow beyond 1 MB, as on a full disk; a checkpoint of the plane has 1.8 MB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))


def disk(work):
    reference, out = work / "enough-disk", work / "full-disk"
    undisturbed(reference, 4)
    undisturbed(out, 2)
    again = ("--resume", out, "--iterations", 4)
    status, printed = train_tiny(out, *again, before=small_files)
    after, _ = train_tiny(out, *again)
    good = after == 0 and same_state(out, reference)
    rows = [("disk full while saving", status, printed.strip().splitlines()[-1], verdict(good))]
    status, printed = train_tiny(work / "nowhere", "--out", "/proc/nowhere")
    says = printed.strip().splitlines()[-1]
    return [*rows, ("directory cannot be written to", status, says, verdict(status == 2))]


# ----------------------------------------------------------------------------- one of two ranks


def plant(kind, rank=1, iteration=3):
    """In a process that torchrun started: let it happen on one rank, before the first restart."""
    fsdp.TIMEOUT = 20
    if int(os.environ["RANK"]) != rank or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
    iterate = train.iterate

    def spoiled_iterate(nets, batch, number, args):
        if number == iteration and kind == "nan":
            next(nets.student.parameters()).to_local().data.view(-1)[0] = float("nan")
        if number == iteration and kind == "exception":
            raise ValueError("planted on one rank")
        if number == iteration and kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if number == iteration and kind == "hang":
            time.sleep(3600)
        return iterate(nets, batch, number, args)

    train.iterate = spoiled_iterate


def torchrun(*arguments, restarts=0):
    """(exit status, what was printed) of a command on two ranks"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", f"--max-restarts={restarts}", *map(str, arguments)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=ROOT, check=False, **output)
    return done.returncode, done.stdout


SAYS = {  # planted -> what is printed
    "nan": "is not finite",
    "exception": "ValueError: planted",
    "kill": "Signal 9",
    "hang": "Timed out|lost|closed",
}


def rank(work, cases=(*((kind, 0) for kind in SAYS), ("kill", 1))):
    """cases: what is planted, and how many restarts are allowed."""
    rows = []
    for kind, restarts in cases:
        begun, out = time.perf_counter(), work / f"planted-{kind}-{restarts}"
        shutil.rmtree(out, ignore_errors=True)
        words = ("-m", "lab.faults", "planted", kind, *RUN.split(), "--iterations", 6, "--out", out)
        status, printed = torchrun(*words, restarts=restarts)
        seconds = f"{time.perf_counter() - begun:.0f}"
        if restarts:
            good, what = status == 0, f"went on from {resumed_from(printed)}"
        else:
            good, what = re.search(SAYS[kind], printed) and status == 1, "stopped, cause named"
        rows.append((kind, restarts, status, seconds, what, verdict(good)))
    return rows


# ----------------------------------------------------------------------------- command line

FAULTS = {  # name -> function, title, columns
    "kill": (
        kill,
        "kill -9 at random moments",
        ("killed after", "newest whole checkpoint", "save under way", "ends as undisturbed"),
    ),
    "damage": (
        damage,
        "Damaged checkpoints of two ranks",
        ("file", "damage", "--resume", "ends as undisturbed"),
    ),
    "disk": (disk, "The disk", ("fault", "status", "last line", "ends as undisturbed")),
    "rank": (
        rank,
        "One of two ranks under torchrun",
        ("fault", "restarts", "status", "seconds", "what happened", "as it should be"),
    ),
}


def print_table(title, columns, rows):
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def main(arguments=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--kills", type=cli.positive, default=50)
    parser.add_argument(
        "--processes", type=cli.natural, default=0, help="of the runs that are killed; 0 is one"
    )
    parser.add_argument("--seed", type=cli.natural, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, default=Path("runs/faults"), help="where runs go")
    args = parser.parse_args(arguments)
    for name in args.faults:
        cli.check_choice("FAULT", name, FAULTS)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    plane.PlaneModel("gmm")  # fitted once, before the forks
    failed = False
    for name in args.faults or FAULTS:
        function, title, columns = FAULTS[name]
        options = {}
        if name == "kill":
            options = {"kills": args.kills, "processes": args.processes, "seed": args.seed}
        rows = function(args.work.absolute(), **options)
        print_table(title, columns, rows)
        failed |= any("NO" in row for row in rows)
    if failed:
        raise UserError("something was lost: see NO above", status=1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["planted"]:
        plant(sys.argv[2])
        sys.argv = ["plane.py", *sys.argv[3:]]
        fsdp.run(plane.main)
    else:
        cli.run(main)
