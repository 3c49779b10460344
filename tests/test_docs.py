"""Every command that README.md, docs/ and recipes/README.md show is run here, tiny."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from support import flags

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Run elsewhere: by .ci/run itself, by tests of their own, or fetching from the hub.
NOT_RUN = ("pip", "pytest", "hf", "curl")
# These need published weights; test_eval.py runs the same flags on random ones.
NEED_WEIGHTS = ("--inception",)

# What stands in for the weights and data of the pages.
TEACHER = str(ROOT / "assets" / "world_teacher")
EDM = str(ROOT / "assets" / "edm" / "edm_tiny.pkl")
STANDS_FOR = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": TEACHER,
    "sd15": TEACHER,
    "MODEL": TEACHER,
    "edm-imagenet-64x64-cond-adm.pkl": EDM,
    "FILE.pkl": EDM,
    "imagenet-64x64_lmdb": "pixels",
    "imagenet/train": "classes",
    "DIR": "made",
    "FOLDER": "images",
    "my_images": "images",
    "/shared/run": "runs/shared",
    "20": "2",
    "207": "7",
    "giant panda": "8",
    **dict.fromkeys(("387", "974", "88", "979", "417", "279"), "3"),
}
# Flags that make a command tiny; they come last and override.
SMALL_RUN = "--iterations 2 --batch-size 2 --fake-updates 1 --save-every 2 --device cpu --ema 0"
SMALL_RUN += " --dtype fp32"
TINY = {
    "train": SMALL_RUN + " --micro-batch 2 --no-activation-checkpointing",
    "sample": "--teacher-steps 2 --dtype fp32",
    "eval": "--samples 4 --teacher-steps 2 --no-coverage",
    "data pairs": "--count 2 --steps 2",
    "data pixels": "--size 16",
    "lab.plane": "--iterations 2 --batch-size 4",
    "lab.claims": "--list",
    "lab.faults": "--help",
    "lab.fuzz": "--mutations 1",
    "lab.health": "--help",
    "lab.make_classes": "--help",
    "lab.make_flow": "--help",
    "lab.make_world": "--help",
    "support.costs flops": "--help",
    "support.benchmark": "--batch-size 2 --iterations 2 --device cpu --dtype fp32",
}


def commands_of(page):
    """Each command in indented blocks, without its comment, as a list of words."""
    text = page.read_text().replace("\\\n", " ")
    found = []
    for line in re.findall(
        r"^    ((?:python|torchrun|pip|pytest|hf|curl) .*|pytest)$", text, re.MULTILINE
    ):
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append(words[:end])
            words = words[end + 1 :]
    return found


def as_call(words):
    """The module that a command runs, and the arguments it gives it."""
    if words[0] == "torchrun":  # test_fsdp.py runs the launcher itself
        start = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
        words = ["python", *words[start:]]
    if words[1] == "-m":
        return words[2], words[3:]
    return words[1].removesuffix(".py"), words[2:]


def expanded(word, place):
    """What a shell makes of runs/a/checkpoints/*."""
    return [str(path) for path in sorted(place.glob(word))] if "*" in word else [word]


def stands_for(word):
    return STANDS_FOR.get(word, word)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with what the pages take for granted."""
    place = tmp_path_factory.mktemp("docs")
    (place / "recipes").symlink_to(ROOT / "recipes")
    for name in ("captions.txt", "prompts.txt"):
        (place / name).write_text("red apple\ncat face\n")
    rows = []
    for i in range(6):
        color = tuple((37 * i * k) % 255 for k in (1, 2, 3))
        for folder in ("images", f"classes/{i % 2}"):
            (place / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (70, 64), color).save(place / folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": "red apple"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "images" / "metadata.jsonl").write_text(lines)
    return place


def prepared(module, arguments, place):
    """What earlier commands of other pages would have made."""
    run = importlib.import_module
    if "latents" in arguments and not (place / "latents").exists():
        made = ["latents", "--images", "images", "--out", "latents", "--model", TEACHER]
        run("data").main(made)
    if "pixels" in arguments and not (place / "pixels").exists():
        made = ["pixels", "--images", "classes", "--out", "pixels", "--size", "16"]
        run("data").main(made)
    wanted = {"runs/sd15": [], "runs/a": [], "runs/b": [], "runs/dmd2": []}
    wanted[flags.DEFAULT_RUN] = []
    wanted["runs/imagenet"] = ["--model", EDM, "--guidance", "1"]
    made_here = arguments[arguments.index("--out") + 1] if "--out" in arguments else None
    for name, more in wanted.items():
        used = [word for word in arguments if word.startswith(name)]
        if used and name != made_here and not (place / name).exists():
            run("train").main([*SMALL_RUN.split(), "--out", name, *more])


def clear(module, arguments, place):
    """Earlier pages may have written the same run: a run does not replace another."""
    if "--resume" in arguments or "--help" in arguments:
        return
    words = [word for name in arguments if name[0] == "@" for word in recipe_words(name, place)]
    words += arguments
    out = flags.DEFAULT_RUN
    if "--variant" in words and "--out" not in words:
        out = f"runs/{words[words.index('--variant') + 1]}"
    if "--out" in words:
        out = words[len(words) - words[::-1].index("--out")]
    path = place / out
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def recipe_words(name, place):
    return shlex.split((place / name[1:]).read_text(), comments=True)


SLOW = ("running.md", "evaluation.md")
CASES = [
    pytest.param(
        page,
        id=str(page.relative_to(ROOT)),
        marks=[pytest.mark.slow] if page.name in SLOW else [],
    )
    for page in PAGES
]


@pytest.mark.parametrize("page", CASES)
def test_commands_of_the_pages_run(page, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    torch.set_num_threads(1)
    for words in commands_of(page):
        if words[0] in NOT_RUN or any(flag in words for flag in NEED_WEIGHTS):
            continue
        if any("lora" in word for word in words):
            pytest.importorskip("peft")
        module, arguments = as_call(words)
        arguments = [name for word in arguments for name in expanded(stands_for(word), place)]
        key = f"{module} {arguments[0]}" if module in ("data", "support.costs") else module
        prepared(module, arguments, place)
        if module in ("train", "support.export", "lab.plane"):
            clear(module, arguments, place)
        more = TINY.get(key, "").split()
        if "--resume" in arguments:
            more = ["--iterations", "3"]
        if "--help" in arguments:
            more = []
        try:
            importlib.import_module(module).main(arguments + more)
        except SystemExit as end:  # --help
            assert not end.code, words
        capsys.readouterr()
