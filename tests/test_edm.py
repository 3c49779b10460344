"""EDM's networks: against the outputs of EDM's own code, as a model to train and to draw with, and
their data. Run with: pytest"""

import io
import json
import pickle
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

import data
import models
import sample
import train
from lab import faults, make_classes
from models import ASSETS
from support import edm, export, students
from support.embedded import CLASSES
from tests.conftest import TEACHER_STEPS
from tests.tiny import Trap, call, edm_denoiser, one_line, random_image, refused

RECIPES = ASSETS.parent / "recipes"
# Random weights in EDM's format; what EDM's code gives with them lies beside it.
TINY = ASSETS / "edm" / "edm_tiny.pkl"
SMALL = f"--model {TINY} --variant dmd2 --batch-size 4 --fake-updates 2 --warmup 0"


@pytest.fixture(scope="module")
def fixture():
    with np.load(TINY.with_suffix(".npz")) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


@pytest.fixture(scope="module")
def model():
    return models.load_model(TINY)


def test_the_pickle_gives_edm_s_weights(fixture):
    tensors = edm.read_pickle(TINY)
    expected = {name for name in fixture if name.startswith("sd/")}
    assert {f"sd/model.{name}" for name in tensors} == expected
    for name, tensor in tensors.items():
        assert torch.equal(tensor, fixture[f"sd/model.{name}"]), name


@pytest.mark.parametrize("labelled, name", [(True, "D_x"), (False, "D_x_no_label")])
def test_outputs_and_bottleneck_are_edm_s(fixture, model, labelled, name):
    """At noise levels between those of our table, so the denoiser gets a table of them."""
    sigma = fixture["sigma"]
    schedule = models.Schedule(torch.ones(len(sigma)), sigma, sigma.log() / 4)
    denoiser = models.Denoiser(model.denoiser.network, schedule, "edm", model.family)
    prompts = [""] * len(sigma)
    if labelled:
        prompts = [str(label) for label in fixture["class_labels"].argmax(1).tolist()]
    t, cond = torch.arange(len(sigma)), model.encode(prompts)
    with torch.no_grad():
        x0, features = denoiser.x0_and_features(fixture["x"], t, cond)
    torch.testing.assert_close(x0, fixture[name], rtol=1e-5, atol=1e-5)
    if labelled:
        torch.testing.assert_close(features, fixture["bottleneck"], rtol=1e-5, atol=1e-5)


def test_the_full_size_network_has_edm_s_number_of_parameters():
    options = edm.unet_options(64, (192, 384, 576, 768), 3, (False, True, True, True), 1000)
    with torch.device("meta"):
        network = UNet2DModel(**options)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 295.9


class StorageOf:
    """What EDM's pickles hold a tensor in, whose bytes are a pickle themselves."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return (torch.storage._load_from_bytes, (self.content,))


def test_nothing_in_a_pickle_is_executed(tmp_path):
    trap, inner = Trap(tmp_path / "sprung"), io.BytesIO()
    torch.save(trap, inner, _use_new_zipfile_serialization=False)
    for thing in (trap, StorageOf(inner.getvalue())):
        (tmp_path / "trap.pkl").write_bytes(pickle.dumps({"ema": thing}))
        says = one_line(models.load_model, tmp_path / "trap.pkl")
        assert "is not one of EDM's pickles" in says
    (tmp_path / "cut.pkl").write_bytes(TINY.read_bytes()[:100_000])
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"ema": {}}))
    for name in ("cut", "other", "absent"):
        says = one_line(models.load_model, tmp_path / f"{name}.pkl")
        assert re.search("not one of EDM's pickles|cannot be read", says)
    assert not (tmp_path / "sprung").exists()


def test_a_tensor_beyond_its_storage_is_refused():
    storage = torch.zeros(6).storage()
    assert edm.rebuild_tensor(storage, 1, (2, 2), (2, 1)).shape == (2, 2)
    for offset, size, stride in ((3, (2, 2), (2, 1)), (0, (7,), (1,)), (-1, (2,), (1,))):
        with pytest.raises(pickle.UnpicklingError):
            edm.rebuild_tensor(storage, offset, size, stride)


def test_as_a_diffusers_folder_it_is_the_same_model(model, tmp_path):
    call(edm, f"{TINY} --out {tmp_path}/folder")
    other = models.load_model(tmp_path / "folder")
    x, cond = torch.randn(2, *model.sample_shape), model.encode(["3", ""])
    assert torch.equal(model.denoiser(x, 500, cond), other.denoiser(x, 500, cond))
    assert other.labels == model.labels == 10
    refused(edm, f"{TINY} --out {tmp_path}/folder")


def test_a_table_without_a_row_for_no_label_gets_one(model):
    network = UNet2DModel.from_config({**model.origin.network.config, "num_class_embeds": 10})
    table = edm.with_row_for_no_label(network).class_embedding.weight
    assert len(table) == 11 and not table[10].any()


def test_the_maker_of_the_class_conditional_teacher_resumes_and_writes_a_network(tmp_path):
    flags = f"--work {tmp_path}/work --out {tmp_path}/teacher --batch-size 4 --device cpu"
    call(make_classes, f"{flags} --iterations 2")
    call(make_classes, f"{flags} --iterations 3")
    assert torch.load(tmp_path / "work" / "classes.pt", weights_only=True)["iteration"] == 3
    made = models.load_model(tmp_path / "teacher")
    embedded = models.load_model(data.model_path("emoji-classes"))
    assert made.labels == embedded.labels == 10 and made.names == list(CLASSES)
    shapes, expected = (
        {name: p.shape for name, p in model.denoiser.named_parameters()}
        for model in (made, embedded)
    )
    assert shapes == expected


def test_the_embedded_class_conditional_data_are_drawn_class_by_class():
    """Each class as often, whatever the number of its images; a view is the same image whenever it
    is drawn."""
    model = models.load_model(data.model_path("emoji-classes"))
    draws = [data.real_data(model).draw(data.Draws(0, 0, 2000)) for _ in range(2)]
    (x, labels), (again, same) = draws
    counts = torch.bincount(torch.tensor([int(label) for label in labels]), minlength=10)
    assert counts.min() > 150 and counts.max() < 250 and x.shape == (2000, 3, 16, 16)
    assert torch.equal(x, again) and same == labels


# --------------------------------------------------------------------------- precision and samplers


def test_noise_levels_stay_apart_in_bfloat16(model):
    """The embedding of time is what float32 gives, so that neighbouring levels are as far apart as
    there."""
    found, t = [], torch.tensor([500, 501])
    for dtype in (torch.float32, torch.bfloat16):
        own, seen = models.load_model(TINY, dtype=dtype), []
        named = own.denoiser.named_modules()
        linear = next(module for name, module in named if name.endswith("time_emb_proj"))
        linear.register_forward_hook(
            lambda _, inputs, output, seen=seen: seen.extend([*inputs, output])
        )
        with torch.no_grad():
            own.denoiser(torch.zeros(2, *model.sample_shape), t, own.encode(["", ""]))
        found.append(seen)
    for in_32, in_16 in zip(*found):
        assert in_16.dtype == torch.float32 and torch.equal(in_32, in_16)
        assert not torch.equal(in_32[0], in_32[1])


@pytest.mark.parametrize("steps", [2, 18])
def test_the_teacher_s_sampler_is_edm_s(model, steps):
    """Algorithm 1 of 2206.00364 as it is printed, with its levels; S_churn 0."""
    rho, low, high = 7, 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)] + [0.0]
    noise, cond = sample.column_noise(model, 3, 1, 0), model.encode(["0", "5", "9"])
    D = edm_denoiser(model, cond)
    with torch.no_grad():
        x = noise[0] * sigma[0]
        for i in range(steps):
            d = (x - D(x, sigma[i])) / sigma[i]
            euler = x + (sigma[i + 1] - sigma[i]) * d
            if sigma[i + 1] > 0:
                d_next = (euler - D(euler, sigma[i + 1])) / sigma[i + 1]
                euler = x + (sigma[i + 1] - sigma[i]) * (d + d_next) / 2
            x = euler
    drawn = sample.TeacherSampler(model, steps, 1.0).draw(noise, cond)
    torch.testing.assert_close(drawn, x, rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Three folders with two images each, of different sizes."""
    folder = tmp_path_factory.mktemp("classes")
    for k, name in enumerate(("n01", "n02", "n03")):
        (folder / name).mkdir()
        for i in range(2):
            random_image(33, 40 + 10 * i, seed=2 * k + i).save(folder / name / f"{i}.png")
    return folder


def adm_crop(file, size):
    """ADM's recipe, for one image whose sides are between two and four times the size."""
    image = Image.open(file)
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    edges = (round(image.width * scale), round(image.height * scale))
    pixels = np.array(image.resize(edges, Image.Resampling.BICUBIC))
    y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return torch.from_numpy(pixels[y : y + size, x : x + size]).permute(2, 0, 1)


def test_pixels_of_class_folders_an_archive_and_an_lmdb_are_the_same(model, classes, tmp_path):
    lmdb = pytest.importorskip("lmdb")
    expected = torch.stack([adm_crop(file, 16) for file in sorted(classes.rglob("*.png"))])
    call(data, f"pixels --images {classes} --out {tmp_path}/pixels --size 16")
    x, labels = data.real_data(model, tmp_path / "pixels").read(range(6))
    assert torch.equal(x, expected.float() / 127.5 - 1) and labels == ["0", "0", "1", "1", "2", "2"]

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        listed = [[f"00000/img{i:08d}.png", i // 2] for i in range(6)]
        archive.writestr("dataset.json", json.dumps({"labels": listed}))
        for (name, _), image in zip(listed, expected):
            content = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, "PNG")
            archive.writestr(name, content.getvalue())
    environment = lmdb.open(str(tmp_path / "lmdb"), map_size=1 << 24)
    with environment, environment.begin(write=True) as writer:
        for i, image in enumerate(expected):
            writer.put(f"images_{i}_data".encode(), image.numpy().tobytes())
            writer.put(f"labels_{i}_data".encode(), np.int64(i // 2).tobytes())
        writer.put(b"images_shape", b"6 3 16 16")
        writer.put(b"labels_shape", b"6")
    drawn, captions = data.real_data(model, classes).draw(data.Draws(0, 0, 16))
    for name in ("pixels", "data.zip", "lmdb"):
        other, same = data.real_data(model, tmp_path / name).draw(data.Draws(0, 0, 16))
        assert torch.equal(other, drawn) and same == captions
    call(data, f"pixels --images {tmp_path}/data.zip --out {tmp_path}/again --size 16")
    assert torch.equal(data.real_data(model, tmp_path / "again").read(range(6))[0], x)


def test_bad_archives_and_labels(model, classes, tmp_path):
    (tmp_path / "text.zip").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "bare.zip", "w") as archive:
        archive.writestr("0.png", b"")
    for name in ("text.zip", "bare.zip"):
        says = one_line(data.real_data, model, tmp_path / name)
        assert "no archive of images with a dataset.json" in says
    says = one_line(model.encode, ["10"])
    assert re.search("'10' is no prompt of .*: its prompts are the labels 0 to 9", says)
    shutil.copytree(classes, tmp_path / "many")
    for k in range(12):
        shutil.copytree(classes / "n01", tmp_path / "many" / f"n1{k}")
    flags = f"{SMALL} --guidance 1 --student-steps 1 --real {tmp_path}/many --out {tmp_path}/run"
    assert "has labels up to 14; the labels of" in refused(train, flags)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------- training


@pytest.mark.parametrize("recipe", ["imagenet64_nogan", "imagenet64_dmd2", "imagenet64_fdistill"])
def test_every_recipe_trains_and_its_student_draws(classes, tmp_path, recipe):
    flags = f"{SMALL} --iterations 2 --micro-batch 2"
    real = "" if recipe == "imagenet64_nogan" else f"--real {classes}"
    call(train, f"@{RECIPES}/{recipe}.args {flags} {real} --out {tmp_path}/run")
    if recipe == "imagenet64_nogan":  # on top of which the GAN comes, and with it real data
        more = f"--init {tmp_path}/run --real {classes} --out {tmp_path}/next"
        call(train, f"@{RECIPES}/imagenet64_dmd2_resume.args {flags} {more}")
        assert json.loads((tmp_path / "next" / "config.json").read_text())["gan_weight"] == 3e-3
    draw = f"--student {tmp_path}/run --prompts 0 5 --teacher-steps 3"
    call(sample, f"{draw} --out {tmp_path}/grid.png --images {tmp_path}/images")
    assert Image.open(tmp_path / "images" / "001 student, 1 step.png").size == (16, 16)
    assert UNet2DModel.from_pretrained(tmp_path / "run" / "student").config.num_class_embeds == 11


def test_the_teacher_s_steps_are_those_of_its_family(model, monkeypatch):
    assert TEACHER_STEPS == [50, 18]
    monkeypatch.setattr(models.ClassModel, "default_teacher_steps", 18)
    assert sample.teacher_steps(model) == 18
    assert sample.teacher_steps(model, asked=3) == 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda weights: weights.pop("map_label.weight"),
        lambda weights: weights.pop("out_norm.bias"),
        lambda weights: weights.update({"map_layer0.weight": torch.zeros(3, 3)}),
    ],
)
def test_weights_that_do_not_fit_are_refused(spoil):
    weights = edm.read_pickle(TINY)
    spoil(weights)
    assert "is not EDM's network" in one_line(edm.network_of, weights)


def test_names_of_labels_lie_beside_a_pickle(tmp_path):
    shutil.copy(TINY, tmp_path / "tiny.pkl")
    names = "\n".join(f"name {i}" for i in range(10))  # no newline at its end
    (tmp_path / "labels.txt").write_text(names)
    cond = models.load_model(tmp_path / "tiny.pkl").encode(["name 9"])
    assert cond["class_labels"].tolist() == [9]


def test_what_only_stable_diffusion_has_is_refused(tmp_path):
    folder = tmp_path / "unet"
    models.load_model(TINY).origin.network.save_pretrained(folder)
    flags = f"--model {TINY} --student {folder} --out {tmp_path}"
    assert "name a folder" in refused(export, f"{flags}/student.safetensors")
    call(export, f"{flags}/copy")
    pytest.importorskip("peft")
    says = refused(train, f"{SMALL} --lora 4 --gan-weight 0 --out {tmp_path}/run")
    assert "--lora needs a network" in says


def test_a_run_resumes_bit_for_bit(classes, tmp_path):
    flags = f"{SMALL} --guidance 1 --student-steps 1 --real {classes} --out {tmp_path}"
    call(train, f"{flags}/whole --iterations 3")
    call(train, f"{flags}/parts --iterations 2")
    call(train, f"--resume {tmp_path}/parts --iterations 3")
    assert faults.same_state(tmp_path / "whole", tmp_path / "parts")


def test_dmd2_s_students_have_edm_s_names(fixture, model, tmp_path):
    """pytorch_model.bin of its ImageNet students: the teacher's names, here with the teacher's
    weights."""
    names = [name for name in fixture if name.startswith("sd/")]
    weights = {name.removeprefix("sd/"): fixture[name] for name in names}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    student = students.load_student(tmp_path / "pytorch_model.bin", model)
    x, cond = torch.randn(2, *model.sample_shape), model.encode(["1", "2"])
    assert torch.equal(student(x, 999, cond), model.denoiser(x, 999, cond))


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(classes, tmp_path):
    """Adam's first moment after one iteration, that is; its steps are the sign of gradients, many
    of which are next to nothing here. At the cleanest levels the loss divides by sigma = 0.002 what
    float32 knows to 1e-7."""
    flags = f"{SMALL} --guidance 1 --student-steps 1 --real {classes} --iterations 1"
    flags += f" --dtype float32 --out {tmp_path}"
    call(train, f"{flags}/one")
    statuses, printed = faults.on_ranks(train.main, tmp_path / "log", *f"{flags}/two".split())
    assert statuses == [0, 0], printed
    one, two = faults.state_of(tmp_path / "one"), faults.state_of(tmp_path / "two")
    fake_score = "fake_score_optimizer.state."
    for part in ("student_optimizer.", f"{fake_score}denoiser", f"{fake_score}head"):
        names = [name for name in one if name.startswith(part) and name.endswith("exp_avg")]
        own = torch.cat([one[name].double().flatten() for name in names])
        theirs = torch.cat([two[name].double().flatten() for name in names])
        assert (own - theirs).norm() < 2e-3 * own.norm()
