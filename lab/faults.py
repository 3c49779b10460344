"""Break tiny runs in the ways that runs break, and see that nothing is lost. Prints a table for each way.

    python -m lab.faults                          # all but the soak, half an hour on two CPU cores
    python -m lab.faults kill --kills 50          # kill -9 at random moments, then --resume
    python -m lab.faults damage                   # each file of a checkpoint cut short, with one bit flipped, deleted
    python -m lab.faults disk                     # a full disk, a directory that cannot be written to
    python -m lab.faults rank                     # under torchrun: one process gets a NaN, an exception, kill -9, or hangs
    python -m lab.faults soak                     # 2,000 iterations of the default run on two processes; an hour or two

The run is f-distill on the plane (lab/plane.py): it has a head, running means of the ratio, two optimizers and an average to lose.
"""

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

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # runs are forked from this process, which threads of its own do not survive

import torch
import torch.distributed.checkpoint as dcp

import fsdp
import train
from lab import plane
from support import checkpoint, cli, runlog

ROOT = Path(__file__).resolve().parents[1]
RUN = [
    "--variant",
    "fdistill",
    "--gan-weight",
    "0.005",
    "--batch-size",
    "8",
    "--fake-updates",
    "2",
    "--warmup",
    "0",
    "--save-every",
    "1",
]


# ----------------------------------------------------------------------------- runs


def fork_train(flags, log, processes=0, nodes=1, before=None):
    """train.py with these flags in forked processes, as a launcher would start them, or plainly if processes is 0; returns their
    pids. Forking saves the seconds that it takes to import all and to fit the plane's network, if this process has loaded the model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    Path(log).write_bytes(b"")
    for rank in range(max(processes, 1)):
        pid = os.fork()
        if pid == 0:
            if processes:
                in_node = processes // nodes
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank % in_node),
                    "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(in_node),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            stream = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.dup2(stream, 1), os.dup2(stream, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            sys.argv, status = ["plane.py", *map(str, flags)], 1
            try:
                if before:
                    before()
                fsdp.run(plane.main)
                status = 0
            except SystemExit as error:
                status = error.code or 0
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    return pids


def wait_for(pids):
    """Their exit statuses; minus the signal for one that was killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def train_tiny(out, *flags, **launch):
    """(exit status of the first process, what was printed)"""
    log = out.parent / f"{out.name}.log"
    status = wait_for(
        fork_train([*RUN, *flags] if "--resume" not in flags else flags, log, **launch)
    )[0]
    return status, log.read_text()


def state_of(folder):
    """{name: whole tensor} of a checkpoint, or of the newest one of a run."""
    folder = (
        Path(folder)
        if (Path(folder) / "manifest.json").is_file()
        else checkpoint.complete_checkpoints(folder)[0]
    )
    saved = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in saved.items()
    }
    checkpoint.load(folder, tensors)
    return tensors


def same_state(a, b):
    """Whether two runs' newest checkpoints and the students that they left are equal bit for bit."""
    student = Path("student", "diffusion_pytorch_model.safetensors")
    same_student = (Path(a) / student).read_bytes() == (Path(b) / student).read_bytes()
    a, b = state_of(a), state_of(b)
    return (
        same_student and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    )


def table(title, head, rows):
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)


# ----------------------------------------------------------------------------- the faults


def kill(work, kills=50, processes=0, iterations=30, seed=0):
    """Rows (moment, newest whole checkpoint, whether a save was under way, what --resume went on from, whether the end is the undisturbed
    run's)."""
    numbers, reference, out = (
        random.Random(seed),
        work / f"undisturbed-{processes}",
        work / f"killed-{processes}",
    )
    flags = ["--iterations", iterations]
    shutil.rmtree(reference, ignore_errors=True)
    start = time.perf_counter()
    status, printed = train_tiny(reference, *flags, "--out", reference, processes=processes)
    assert status == 0, printed
    duration, rows = time.perf_counter() - start, []
    for trial in range(kills):
        shutil.rmtree(out, ignore_errors=True)
        moment = numbers.uniform(0, duration)
        pids = fork_train([*RUN, *flags, "--out", out], work / "killed.log", processes)
        time.sleep(moment)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_for(pids)
        whole = [int(folder.name) for folder in checkpoint.complete_checkpoints(out)]
        saving = any((out / "checkpoints").glob("*.partial"))
        again = (
            ["--resume", out] if (out / "config.json").exists() else [*flags, "--out", out]
        )  # nothing to resume yet
        status, printed = train_tiny(out, *again, processes=processes)
        found = re.search(r"going on from \S*/(\d+)", printed)
        begun = int(found[1]) if found else 0
        good = status == 0 and begun == max(whole, default=0) and same_state(out, reference)
        rows.append(
            (
                f"{moment:.2f} s of {duration:.2f}",
                max(whole, default="none"),
                "yes" if saving else "no",
                begun,
                "yes" if good else "NO",
            )
        )
    return rows


def damages(file):
    """(name, what to do to the file)"""

    def flip():
        content = bytearray(file.read_bytes())
        content[random.Random(len(content)).randrange(len(content))] ^= 1
        file.write_bytes(content)

    return [
        ("half cut off", lambda: os.truncate(file, file.stat().st_size // 2)),
        ("one bit flipped", flip),
        ("deleted", file.unlink),
    ]


def damage(work, iterations=4, processes=2):
    """Rows (file, damage, what --resume does, whether it ends as the undisturbed run, what --resume CHECKPOINT says)."""
    reference, out, rows = work / "undamaged", work / "damaged", []
    shutil.rmtree(reference, ignore_errors=True)
    status, printed = train_tiny(
        reference, "--iterations", iterations, "--out", reference, processes=processes
    )
    assert status == 0, printed
    newest = checkpoint.complete_checkpoints(reference)[0].name
    for name in sorted(path.name for path in (reference / "checkpoints" / newest).iterdir()):
        for number in range(3):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(reference, out)
            what, spoil = damages(out / "checkpoints" / newest / name)[number]
            spoil()
            status, printed = train_tiny(out, "--resume", out, processes=processes)
            begun = re.search(r"going on from \S*/(\d+)", printed)
            good = (
                status == 0
                and "is damaged" in printed
                and int(begun[1]) < int(newest)
                and same_state(out, reference)
            )
            rows.append(
                (
                    name,
                    what,
                    f"says so, goes on from {begun[1] if begun else printed}",
                    "yes" if good else "NO",
                )
            )
    return rows


def disk(work):
    """Rows (fault, exit status, last line, whether a resume without the fault ends as the undisturbed run)."""

    def small_files():
        """No file can grow beyond 1 MB, as when the disk is full; a checkpoint of the plane has 1.8 MB."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))

    reference, out = work / "enough-disk", work / "full-disk"
    for folder, iterations in ((reference, 4), (out, 2)):
        shutil.rmtree(folder, ignore_errors=True)
        train_tiny(folder, "--iterations", iterations, "--out", folder)
    status, printed = train_tiny(out, "--resume", out, "--iterations", 4, before=small_files)
    after, _ = train_tiny(out, "--resume", out, "--iterations", 4)
    rows = [
        (
            "disk full while saving",
            status,
            printed.strip().splitlines()[-1],
            "yes" if after == 0 and same_state(out, reference) else "NO",
        )
    ]
    status, printed = train_tiny(work / "nowhere", "--out", "/proc/nowhere")
    return rows + [
        (
            "directory cannot be written to",
            status,
            printed.strip().splitlines()[-1],
            "nothing was begun",
        )
    ]


def plant(kind, rank=1, iteration=3):
    """In a process that torchrun started: let it happen in one process at one iteration, before the first restart only."""
    fsdp.TIMEOUT = 20
    if int(os.environ["RANK"]) != rank or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
    iterate, clip, reached = train.iterate, fsdp.clip_gradients, []

    def spoiled_iterate(networks, sources, number, args):
        if number == iteration:
            reached.append(True)
            if kind == "exception":
                raise ValueError("planted in one process")
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "hang":
                time.sleep(3600)
        return iterate(networks, sources, number, args)

    def spoiled_clip(module, *rest):
        if kind == "nan" and reached:
            next(module.parameters()).grad.to_local().view(-1)[0] = float("nan")
        return clip(module, *rest)

    train.iterate, fsdp.clip_gradients = spoiled_iterate, spoiled_clip


def torchrun(*arguments, processes=2, restarts=0):
    """(exit status, what was printed)"""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        f"--max-restarts={restarts}",
    ]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout


def rank(work, kinds=("nan", "exception", "kill", "hang")):
    """Rows (fault, restarts, exit status, seconds, what torchrun names as the cause, how often the error is printed)."""
    rows = []
    for kind, restarts in [(kind, 0) for kind in kinds] + [("kill", 1)]:
        start, out = time.perf_counter(), work / f"planted-{kind}-{restarts}"
        shutil.rmtree(out, ignore_errors=True)
        status, printed = torchrun(
            "-m",
            "lab.faults",
            "planted",
            kind,
            *RUN,
            "--iterations",
            6,
            "--out",
            out,
            restarts=restarts,
        )
        cause = re.findall(r"traceback : (.*)", printed)
        words = {"nan": "is not finite", "exception": "ValueError: planted"}.get(kind)
        went_on = re.search(r"going on from \S*/(\d+)", printed)
        rows.append(
            (
                kind,
                restarts,
                status,
                f"{time.perf_counter() - start:.0f}",
                cause[-1] if cause else f"none; went on from {went_on and went_on[1]}",
                printed.count(words) if words else "",
            )
        )
    return rows


# ----------------------------------------------------------------------------- a long run


def vital_signs(pid):
    """(resident memory in MiB, open files, threads) of a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return (
        int(status["VmRSS"].split()[0]) / 1024,
        len(list(Path(f"/proc/{pid}/fd").iterdir())),
        int(status["Threads"]),
    )


def slope(points):
    """Least squares, per unit of x."""
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum(
        (x - mean_x) ** 2 for x, _ in points
    )


def soak(work, iterations=2000, batch_size=32, every=10):
    """Rows (process, figure, at a quarter of the run, at its end, slope per 1,000 iterations of the last three quarters)."""
    out, samples = work / "soak", {}
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        ROOT / "train.py",
        "--out",
        out,
    ]
    with open(work / "soak.log", "w") as log:
        launcher = subprocess.Popen(
            [*command, "--iterations", str(iterations), "--batch-size", str(batch_size)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        while launcher.poll() is None:
            time.sleep(every)
            metrics = out / "metrics.jsonl"
            iteration = (
                runlog.LOG_EVERY * len(metrics.read_text().splitlines()) if metrics.exists() else 0
            )
            for pid in (
                Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            ):
                try:
                    samples.setdefault(pid, []).append((iteration, *vital_signs(pid)))
                except (OSError, KeyError):  # it has just ended
                    pass
    rows = [("both", "exit status", "", launcher.returncode, "")]
    for process, signs in enumerate(samples.values()):
        late = [row for row in signs if row[0] >= iterations / 4]
        for k, name in enumerate(("resident memory, MiB", "open files", "threads"), start=1):
            rows.append(
                (
                    process,
                    name,
                    f"{late[0][k]:.0f}",
                    f"{late[-1][k]:.0f}",
                    f"{1000 * slope([(row[0], row[k]) for row in late]):+.2f}",
                )
            )
    return rows


TABLES = {
    "kill": (
        "kill -9 at random moments",
        (
            "killed after",
            "newest whole checkpoint",
            "save under way",
            "resumed from",
            "as undisturbed, bit for bit",
        ),
    ),
    "damage": (
        "Damaged checkpoints of two processes",
        ("file", "damage", "--resume RUN", "as undisturbed"),
    ),
    "disk": ("The disk", ("fault", "exit status", "last line", "resumed as undisturbed")),
    "rank": (
        "One of two processes under torchrun",
        (
            "fault",
            "restarts allowed",
            "exit status",
            "seconds",
            "cause that torchrun names last",
            "times printed",
        ),
    ),
    "soak": (
        "A long run on two processes",
        ("process", "figure", "at a quarter", "at the end", "slope per 1,000 iterations"),
    ),
}


def main(arguments=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(TABLES))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument(
        "--processes",
        type=int,
        default=0,
        help="of the runs that are killed; 0 is one without a process group",
    )
    parser.add_argument("--iterations", type=int, default=2000, help="of the soak")
    parser.add_argument("--batch-size", type=int, default=32, help="of the soak")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, default=Path("runs/faults"), help="where the runs go")
    args = parser.parse_args(arguments)
    unknown = set(args.faults) - set(TABLES)
    if unknown:
        parser.error(f"there is no fault {unknown.pop()}: {', '.join(TABLES)}")
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    plane.PlaneModel(
        "gmm"
    )  # fits its network, and imports what diffusers imports late: the forked processes then have both
    options = {
        "kill": dict(kills=args.kills, processes=args.processes, seed=args.seed),
        "soak": dict(iterations=args.iterations, batch_size=args.batch_size),
    }
    failed = False
    for name in args.faults or [name for name in TABLES if name != "soak"]:
        rows = globals()[name](args.work.absolute(), **options.get(name, {}))
        table(*TABLES[name], rows)
        failed |= any("NO" in row for row in rows)
    sys.exit("something was lost: see NO above" if failed else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["planted"]:
        plant(sys.argv[2])
        sys.argv = ["plane.py", *sys.argv[3:]]
        fsdp.run(plane.main)
    else:
        main()
