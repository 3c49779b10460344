"""What the tests share. pytest reads this before any test file, so before torch is imported."""

import os
import shutil

# xdist runs one worker for each core; more threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import data
import fsdp
import models
import train
from lab import health, plane, trials
from support import runlog
from support.judges import world
from tests import tiny


@pytest.fixture(scope="session", autouse=True)
def float32_and_small_measurements():
    """Training is in float32 here, whatever this processor has: equalities are to be seen. What
    would cost more than the rest of a tiny run is small: the teacher's images, the plane's fit and
    its table, the embedded world's reference, the images of a watched run. A claim's processes are
    forked, so that all this holds in them too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp, "default_dtype", float32_everywhere)
        patch.setattr(models.Model, "default_teacher_steps", 2)
        patch.setattr(models.ClassModel, "default_teacher_steps", 2)
        patch.setattr(runlog, "PATIENCE", 0)  # two samples of the teacher in place of eight
        patch.setattr(plane, "FIT_ITERATIONS", 100)
        patch.setattr(plane, "REPEATS", 2)
        patch.setattr(plane, "SAMPLES", 256)
        patch.setattr(trials, "SAMPLES", 256)
        patch.setattr(trials, "START", "fork")
        patch.setattr(world, "REFERENCE", 200)
        patch.setattr(health, "SAMPLES", 20)
        yield


# As they were before the above.
TEACHER_STEPS = [kind.default_teacher_steps for kind in (models.Model, models.ClassModel)]


def float32_everywhere(device):
    return "float32"


@pytest.fixture(scope="session")
def teacher():
    """The embedded teacher. It belongs to all tests: leave it as it is."""
    return models.load_model(data.model_path(None))


@pytest.fixture(scope="session")
def plane_model():
    """The plane's teacher, the same way."""
    return plane.PlaneModel("gmm")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny pipelines on disk, of Stable Diffusion 1.5's and XL's kinds; not to be changed."""
    place = tmp_path_factory.mktemp("pipelines")
    return {name: tiny.write_pipeline(place / name, name) for name in ("sd15", "sdxl")}


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(tiny.PROMPTS))
    return file


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def plane_run(tmp_path_factory):
    """A finished run of the plane; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "plane"
    tiny.call(plane, f"{tiny.PLANE} --iterations 4 --out {out}")
    return out


@pytest.fixture
def run(plane_run, tmp_path):
    """A copy of it to be spoilt."""
    return shutil.copytree(plane_run, tmp_path / "run")


@pytest.fixture(scope="session")
def lora_runs(folders, prompts, tmp_path_factory):
    """A finished run of a LoRA of each kind; not to be changed."""
    pytest.importorskip("peft")
    place = tmp_path_factory.mktemp("lora")
    for name in folders:
        flags = f"--model {folders[name]} --prompts {prompts} --gan-weight 0 {tiny.SMALL}"
        flags += " --iterations 4 --lora 4 --lora-alpha 2 --learning-rate 1e-2"
        tiny.call(train, flags, "--out", place / name)
    return place
