"""Spoil every JSON file and header that we read, at random. Reading it has to give a value or one
line: never a traceback, never a hang, never a file written elsewhere.

    python -m lab.fuzz                       # 1,000 mutations a file, an hour on one core
    python -m lab.fuzz --mutations 20 --only run/config.json images/metadata.jsonl

What fails is kept in --work/failures, beside its traceback.
"""

import contextlib
import copy
import io
import json
import pickle
import random
import resource
import shutil
import signal
import traceback
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

import data
import models
import train
from lab import plane
from lab.faults import print_table
from support import checkpoint, cli, images, references, runlog, students
from support.cli import UserError
from support.prompt_files import read_prompts

SECONDS = 20  # that reading may take
MEMORY = 12 * 2**30  # bytes of address space that it may ask for
RUN = "--batch-size 8 --fake-updates 2 --warmup 0 --save-every 1 --iterations 2 --seed 1"
ODD = (
    *(None, True, False, 0, -1, 3, 2**31, 10**30, 0.5, -1e308, float("nan"), float("inf")),
    *("", "x", "../../x", "/etc/passwd", "\ud800", "\x00", "a\nb", "x" * 100_000, "cuda:9"),
    *([], {}, [None, None], [[[[1]]]], {"a": {"b": []}}, ["os", "system"], "__import__('os')"),
)


# ----------------------------------------------------------------------------- spoiling


def places_in(content):
    """(container, key) of everything in a JSON value."""
    keys = range(len(content)) if isinstance(content, list) else list(content)
    for key in keys:
        yield content, key
        if isinstance(content[key], (dict, list)):
            yield from places_in(content[key])


def spoil_json(text, numbers):
    """Another value, or none, at one to three places."""
    content = json.loads(text)
    for _ in range(numbers.randint(1, 3)):
        places = [*places_in(content)]
        if not places:
            break
        container, key = numbers.choice(places)
        if numbers.random() < 0.2:
            del container[key]
        else:
            container[key] = copy.deepcopy(numbers.choice(ODD))
    return json.dumps(content).encode()


def spoil_bytes(content, numbers, end):
    """Bits flipped, bytes taken out and others put in before `end`, or the end cut off."""
    content = bytearray(content)
    for _ in range(numbers.randint(1, 4)):
        at = numbers.randrange(max(1, min(end, len(content))))
        kind = numbers.random()
        if kind < 0.25 and content:
            content[at] ^= 1 << numbers.randrange(8)
        elif kind < 0.95:
            taken, put = numbers.choice([(1, 1), (numbers.randint(1, 20), 0), (0, 20)])
            content[at : at + taken] = numbers.randbytes(put)
        else:
            del content[at:]
    return bytes(content)


def spoil(content, name, numbers):
    if name.endswith(".json") and numbers.random() < 0.6:
        return spoil_json(content.decode(), numbers)
    if name.endswith(".jsonl") and numbers.random() < 0.6:
        lines = content.splitlines()
        k = numbers.randrange(len(lines))
        lines[k] = spoil_json(lines[k].decode(), numbers)
        return b"\n".join(lines)
    end = len(content)
    if name.endswith(".safetensors"):
        end = 8 + int.from_bytes(content[:8], "little")  # the header
    return spoil_bytes(content, numbers, end)


# ----------------------------------------------------------------------------- what is read


def make_files(work):
    """Small files of every kind that we read."""
    plane.main([*RUN.split(), "--out", str(work / "run")])
    shutil.copytree(data.EMBEDDED["world"], work / "teacher")
    shutil.copytree(work / "teacher" / "unet", work / "student")
    pixels = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    (work / "images").mkdir()
    rows = [{"file_name": f"{i}.png", "text": f"image {i}"} for i in range(3)]
    for row in rows:
        pixels.save(work / "images" / row["file_name"])
    lines = "\n".join(json.dumps(row) for row in rows)
    (work / "images" / "metadata.jsonl").write_text(lines)
    with zipfile.ZipFile(work / "images.zip", "w") as archive:
        archive.write(work / "images" / "0.png", "0.png")
        archive.writestr("dataset.json", json.dumps({"labels": [["0.png", 1]]}))
    prompts = ["tomato on red", "rainbow"]
    (work / "prompts.json").write_text(json.dumps([{"prompt": text} for text in prompts]))
    (work / "prompts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in prompts))
    (work / "prompts.csv").write_text("id,caption\n1,tomato on red\n2,rainbow\n")
    (work / "prompts.pkl").write_bytes(pickle.dumps(prompts))
    np.savez(work / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048), about='{"resize": 1}')
    lora = {f"lora_unet_mid_block_resnets_0_conv1.lora_{k}.weight": torch.ones(4, 4) for k in "ab"}
    save_file(lora, work / "lora.safetensors")
    config = {"images": str(work / "images"), "model": "world"}
    data.make_latents(work / "latents", config, models.load_model(work / "teacher"))


def readers_of(work):
    """{pattern of files: what reads them as a command does}"""
    model = models.load_model(work / "teacher")
    run, newest = work / "run", work / "run" / "checkpoints" / "000002"

    def resume():
        train.parse_arguments(["--resume", str(run)])
        students.run_config(run)

    def manifest():
        checkpoint.damage_in(newest, checkpoint.read_manifest(newest))

    def teacher():
        models.load_model(work / "teacher").encode(["cat"])

    def archive():
        files = images.ImageFiles(work / "images.zip")
        with contextlib.suppress(Exception):  # a bad image is counted, see ImageReader
            images.open_image(files.file(0))

    def prompts():
        for file in work.glob("prompts.*"):
            read_prompts(file)

    def statistics():
        setting = SimpleNamespace(inception=SimpleNamespace(about={}), protocol_name="as-is")
        references.of_file(work / "statistics.npz", setting)

    bias = {"student.network.enter.bias": torch.zeros(64)}
    return {
        "run/config.json": resume,
        "run/metrics.jsonl": lambda: runlog.Log(run, 1.0, 2),
        "run/checkpoints/000002/manifest.json": manifest,
        "run/checkpoints/000002/*.safetensors": lambda: checkpoint.load(newest, bias),
        "teacher/model_index.json": teacher,
        "teacher/*/*config.json": teacher,
        "teacher/*/*.safetensors": teacher,
        "student/config.json": lambda: students.load_student(work / "student", model),
        "lora.safetensors": lambda: students.load_student(work / "lora.safetensors", model),
        "latents/*": lambda: data.real_data(model, work / "latents").read([0]),
        "images/metadata.jsonl": lambda: data.ImageFolder(work / "images", model),
        "images.zip": archive,
        "statistics.npz": statistics,
        "prompts.*": prompts,
    }


# ----------------------------------------------------------------------------- trying


def try_once(read):
    """None, or what is wrong with how a spoilt file was read."""
    quiet = io.StringIO()
    signal.alarm(SECONDS)  # then it is interrupted
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            read()
    except UserError as error:
        return f"several lines: {error}" if "\n" in str(error) else None
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return None


def stamps(work):
    """{file: (size, time)} of all but what fails, and a run's metrics, which it writes anew."""
    found = {}
    for path in work.rglob("*"):
        if path.is_file() and "failures" not in path.parts and path.name != "metrics.jsonl":
            found[path] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


def fuzz(name, read, work, mutations, seed):
    """How many of the mutations were read badly."""
    numbers = random.Random(f"{name} {seed}")
    file, failed = work / name, 0
    whole = file.read_bytes()
    for k in tqdm(range(mutations), desc=name, unit="file"):
        content = spoil(whole, name, numbers)
        file.write_bytes(content)
        before = stamps(work)
        wrong = try_once(read)
        changed = dict(stamps(work).items() - before.items())
        if changed:
            wrong = f"{wrong or ''}\nwritten: {[*map(str, changed)]}"
        if wrong:
            failed += 1
            place = work / "failures" / f"{name.replace('/', '-')}-{k}"
            place.mkdir(parents=True)
            (place / file.name).write_bytes(content)
            (place / "traceback.txt").write_text(wrong)
            tqdm.write(f"{name}: {wrong.strip().splitlines()[-1]}")
    file.write_bytes(whole)
    return failed


def main(arguments=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--mutations", type=cli.positive, default=1000, help="of each file")
    parser.add_argument("--only", nargs="+", metavar="FILE", help="(default: every file)")
    parser.add_argument("--seed", type=cli.natural, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/fuzz"), help="where files go")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    work = args.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    make_files(work)
    readers = {}
    for pattern, read in readers_of(work).items():
        readers |= {str(file.relative_to(work)): read for file in sorted(work.glob(pattern))}
    for name in args.only or ():
        cli.check_choice("--only", name, readers)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limit[1]))
    try:
        rows = []
        for name in args.only or readers:
            failed = fuzz(name, readers[name], work, args.mutations, args.seed)
            rows.append((name, args.mutations, failed))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.signal(signal.SIGALRM, before)
    print_table("Spoilt at random", ("file", "mutations", "read badly"), rows)
    if any(failed for _, _, failed in rows):
        raise UserError(f"some were read badly: see {work}/failures", status=1)


if __name__ == "__main__":
    cli.run(main)
