"""EDM's networks: against the outputs of EDM's own code, as a model to train and to draw with, and
their data. Run with: pytest"""

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

import data
import models
import sample
import train
from lab import faults
from support import edm, students
from support.cli import UserError
from support.embedded import CLASSES
from support.families import FAMILIES
from tests.conftest import TEACHER_STEPS
from tests.tiny import run

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    ROOT / "assets" / "edm" / "edm_tiny.pkl"
)  # random weights in EDM's format; what EDM's code gives with them lies beside it
SMALL = [
    "--model",
    TINY,
    "--variant",
    "dmd2",
    "--batch-size",
    4,
    "--fake-updates",
    2,
    "--warmup",
    0,
    "--iterations",
    4,
    "--save-every",
    2,
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def fixture():
    with np.load(TINY.with_suffix(".npz")) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


@pytest.fixture(scope="module")
def model():
    return models.load_model(TINY)


def test_the_pickle_gives_edm_s_weights(fixture):
    expected = {
        name.removeprefix("sd/model."): tensor
        for name, tensor in fixture.items()
        if name.startswith("sd/")
    }
    tensors = edm.read_pickle(TINY)
    assert tensors.keys() == expected.keys() and all(
        torch.equal(tensors[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("labelled, name", [(True, "D_x"), (False, "D_x_no_label")])
def test_outputs_and_bottleneck_are_edm_s(fixture, model, labelled, name):
    """At noise levels between those of our table, so the denoiser gets a table of them."""
    sigma = fixture["sigma"]
    schedule = models.Schedule(torch.ones(len(sigma)), sigma, sigma.log() / 4)
    denoiser = models.Denoiser(model.denoiser.network, schedule, "edm", FAMILIES["UNet2DModel"])
    prompts = (
        [str(label) for label in fixture["class_labels"].argmax(1).tolist()]
        if labelled
        else [""] * len(sigma)
    )
    with torch.no_grad():
        x0, features = denoiser.x0_and_features(
            fixture["x"], torch.arange(len(sigma)), model.encode(prompts)
        )
    torch.testing.assert_close(x0, fixture[name], rtol=1e-5, atol=1e-5)
    if labelled:
        torch.testing.assert_close(features, fixture["bottleneck"], rtol=1e-5, atol=1e-5)


def test_the_full_size_network_has_edm_s_number_of_parameters():
    with torch.device("meta"):
        network = UNet2DModel(
            **edm.unet_options(64, (192, 384, 576, 768), 3, (False, True, True, True), 1000)
        )
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 295.9


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


class StorageOf:
    """What EDM's pickles hold a tensor in, whose bytes are a pickle themselves."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return (torch.storage._load_from_bytes, (self.content,))


def test_nothing_in_a_pickle_is_executed(tmp_path):
    inner = io.BytesIO()
    torch.save(Trap(tmp_path / "sprung"), inner, _use_new_zipfile_serialization=False)
    for name, thing in (
        ("outer", Trap(tmp_path / "sprung")),
        ("inner", StorageOf(inner.getvalue())),
    ):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps({"ema": thing}))
        with pytest.raises(UserError, match="is not one of EDM's pickles"):
            models.load_model(tmp_path / f"{name}.pkl")
    (tmp_path / "cut.pkl").write_bytes(TINY.read_bytes()[:100_000])
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"ema": {}}))
    for name in ("cut", "other", "absent"):
        with pytest.raises(UserError, match="not one of EDM's pickles|cannot be read"):
            models.load_model(tmp_path / f"{name}.pkl")
    assert not (tmp_path / "sprung").exists()


def test_a_tensor_beyond_its_storage_is_refused():
    storage = torch.zeros(6).storage()
    assert edm.rebuild_tensor(storage, 1, (2, 2), (2, 1)).shape == (2, 2)
    for offset, size, stride in ((3, (2, 2), (2, 1)), (0, (7,), (1,)), (-1, (2,), (1,))):
        with pytest.raises(pickle.UnpicklingError):
            edm.rebuild_tensor(storage, offset, size, stride)


def test_as_a_diffusers_folder_it_is_the_same_model(model, tmp_path):
    assert run("support.edm", TINY, "--out", tmp_path / "folder") == 0
    other = models.load_model(tmp_path / "folder")
    x, cond = torch.randn(2, *model.sample_shape), model.encode(["3", ""])
    assert (
        torch.equal(model.denoiser(x, 500, cond), other.denoiser(x, 500, cond))
        and other.labels == model.labels == 10
    )
    assert run("support.edm", TINY, "--out", tmp_path / "folder") == 2


def test_a_table_without_a_row_for_no_label_gets_one(model):
    network = UNet2DModel.from_config({**model.origin.network.config, "num_class_embeds": 10})
    assert (
        edm.with_row_for_no_label(network).class_embedding.weight.shape[0] == 11
        and not network.class_embedding.weight[10].any()
    )


def test_the_maker_of_the_class_conditional_teacher_resumes_and_writes_a_network(tmp_path):
    flags = [
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "teacher",
        "--batch-size",
        4,
        "--device",
        "cpu",
    ]
    assert run("lab.make_classes", *flags, "--iterations", 2) == 0
    assert run("lab.make_classes", *flags, "--iterations", 3) == 0
    assert torch.load(tmp_path / "work" / "classes.pt", weights_only=True)["iteration"] == 3
    made, embedded = (
        models.load_model(tmp_path / "teacher"),
        models.load_model(data.model_path("emoji-classes")),
    )
    assert made.labels == embedded.labels == 10 and made.names == list(CLASSES)
    assert {name: p.shape for name, p in made.denoiser.named_parameters()} == {
        name: p.shape for name, p in embedded.denoiser.named_parameters()
    }


def test_the_embedded_class_conditional_data_are_drawn_class_by_class():
    """Each class as often, whatever the number of its images; a view is the same image whenever it
    is drawn."""
    real = data.real_data(models.load_model(data.model_path("emoji-classes")))
    x, labels = real.draw(data.Draws(0, 0, 2000))
    counts = torch.bincount(torch.tensor([int(label) for label in labels]), minlength=10)
    assert counts.min() > 150 and counts.max() < 250 and x.shape == (2000, 3, 16, 16)
    again, same = data.real_data(models.load_model(data.model_path("emoji-classes"))).draw(
        data.Draws(0, 0, 2000)
    )
    assert torch.equal(x, again) and same == labels


# --------------------------------------------------------------------------- precision and samplers


def test_noise_levels_stay_apart_in_bfloat16(model):
    """The embedding of time is what float32 gives, so that neighbouring levels are as far apart as
    there."""
    seen = {}
    for dtype in (torch.float32, torch.bfloat16):
        network = models.load_model(TINY, dtype=dtype)
        linear = next(
            module
            for name, module in network.denoiser.named_modules()
            if name.endswith("time_emb_proj")
        )
        linear.register_forward_hook(
            lambda module, inputs, output, dtype=dtype: seen.setdefault(dtype, []).append(
                (inputs[0], output)
            )
        )
        with torch.no_grad():
            network.denoiser(
                torch.zeros(1000, *model.sample_shape)[:2],
                torch.tensor([500, 501]),
                network.encode(["", ""]),
            )
    (embedding, projected), (embedding_16, projected_16) = (
        seen[torch.float32][0],
        seen[torch.bfloat16][0],
    )
    assert embedding_16.dtype == projected_16.dtype == torch.float32
    assert (
        torch.equal(embedding, embedding_16)
        and torch.equal(projected, projected_16)
        and not torch.equal(embedding[0], embedding[1])
    )


@pytest.mark.parametrize("steps", [2, 18])
def test_the_teacher_s_sampler_is_edm_s(model, steps):
    """Algorithm 1 of 2206.00364 as it is printed, with its levels; S_churn 0."""
    rho, low, high = 7, 0.002, 80.0
    sigma = [
        (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        for i in range(steps)
    ] + [0.0]

    def D(x, level):
        table = models.Schedule(
            torch.ones(1), torch.tensor([level]), torch.tensor([level]).log() / 4
        )
        return models.Denoiser(model.denoiser.network, table, "edm", FAMILIES["UNet2DModel"])(
            x, 0, cond
        )

    noise, cond = sample.column_noise(model, 3, 1, 0), model.encode(["0", "5", "9"])
    with torch.no_grad():
        x = noise[0] * sigma[0]
        for i in range(steps):
            d = (x - D(x, sigma[i])) / sigma[i]
            euler = x + (sigma[i + 1] - sigma[i]) * d
            if sigma[i + 1] > 0:
                d_next = (euler - D(euler, sigma[i + 1])) / sigma[i + 1]
                euler = x + (sigma[i + 1] - sigma[i]) * (d + d_next) / 2
            x = euler
    torch.testing.assert_close(
        sample.TeacherSampler(model, steps, 1.0).draw(noise, cond), x, rtol=1e-3, atol=1e-3
    )


# ----------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Three folders with two images each, of different sizes."""
    folder = tmp_path_factory.mktemp("classes")
    for k, name in enumerate(("n01", "n02", "n03")):
        (folder / name).mkdir()
        for i in range(2):
            pixels = torch.randint(
                0,
                256,
                (40 + 10 * i, 33, 3),
                generator=torch.Generator().manual_seed(2 * k + i),
                dtype=torch.uint8,
            ).numpy()
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def adm_crop(file, size):
    """ADM's recipe, for one image whose sides are between two and four times the size."""
    image = Image.open(file)
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    pixels = np.array(
        image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
        )
    )
    y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return torch.from_numpy(pixels[y : y + size, x : x + size]).permute(2, 0, 1)


def test_pixels_of_class_folders_an_archive_and_an_lmdb_are_the_same(model, classes, tmp_path):
    lmdb = pytest.importorskip("lmdb")
    files = sorted(classes.rglob("*.png"))
    expected = torch.stack([adm_crop(file, 16) for file in files])
    assert (
        run("data", "pixels", "--images", classes, "--out", tmp_path / "pixels", "--size", 16) == 0
    )
    x, labels = data.real_data(model, tmp_path / "pixels").read(range(6))
    assert torch.equal(x, expected.float() / 127.5 - 1) and labels == ["0", "0", "1", "1", "2", "2"]

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for i, image in enumerate(expected):
            content = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, "PNG")
            archive.writestr(f"00000/img{i:08d}.png", content.getvalue())
        archive.writestr(
            "dataset.json",
            json.dumps({"labels": [[f"00000/img{i:08d}.png", i // 2] for i in range(6)]}),
        )
    with (
        lmdb.open(str(tmp_path / "lmdb"), map_size=1 << 24) as environment,
        environment.begin(write=True) as writer,
    ):
        for i, image in enumerate(expected):
            writer.put(f"images_{i}_data".encode(), image.numpy().tobytes())
            writer.put(f"labels_{i}_data".encode(), np.int64(i // 2).tobytes())
        writer.put(b"images_shape", b"6 3 16 16")
        writer.put(b"labels_shape", b"6")
    drawn = [
        data.real_data(model, path).draw(data.Draws(0, 0, 16))
        for path in (tmp_path / "pixels", tmp_path / "data.zip", tmp_path / "lmdb", classes)
    ]
    for other, captions in drawn[1:]:
        assert torch.equal(other, drawn[0][0]) and captions == drawn[0][1]
    assert (
        run(
            "data",
            "pixels",
            "--images",
            tmp_path / "data.zip",
            "--out",
            tmp_path / "again",
            "--size",
            16,
        )
        == 0
    )
    assert torch.equal(data.real_data(model, tmp_path / "again").read(range(6))[0], x)


def test_bad_archives_and_labels(model, classes, tmp_path, capsys):
    (tmp_path / "text.zip").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "bare.zip", "w") as archive:
        archive.writestr("0.png", b"")
    for name in ("text.zip", "bare.zip"):
        with pytest.raises(UserError, match="no archive of images with a dataset.json"):
            data.real_data(model, tmp_path / name)
    with pytest.raises(
        UserError, match="'10' is no prompt of .*: its prompts are the labels 0 to 9"
    ):
        model.encode(["10"])
    shutil.copytree(classes, tmp_path / "many")
    for k in range(12):
        shutil.copytree(classes / "n01", tmp_path / "many" / f"n1{k}")
    assert (
        run(
            "train",
            *SMALL,
            "--variant",
            "dmd2",
            "--guidance",
            1,
            "--student-steps",
            1,
            "--real",
            tmp_path / "many",
            "--out",
            tmp_path / "run",
        )
        == 2
    )
    assert (
        "has labels up to 14; the labels of" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )


# ----------------------------------------------------------------------------- training


@pytest.mark.parametrize("recipe", ["imagenet64_nogan", "imagenet64_dmd2", "imagenet64_fdistill"])
def test_every_recipe_trains_and_its_student_draws(classes, tmp_path, recipe):
    more = [] if recipe == "imagenet64_nogan" else ["--real", classes]
    assert (
        run(
            "train",
            f"@{ROOT / 'recipes' / recipe}.args",
            *SMALL,
            "--micro-batch",
            2,
            *more,
            "--out",
            tmp_path / "run",
        )
        == 0
    )
    if recipe == "imagenet64_nogan":  # on top of which the GAN comes, and with it real data
        resumed = [
            *SMALL,
            "--micro-batch",
            2,
            "--init",
            tmp_path / "run",
            "--real",
            classes,
            "--out",
            tmp_path / "next",
        ]
        assert run("train", f"@{ROOT / 'recipes' / 'imagenet64_dmd2_resume'}.args", *resumed) == 0
        assert json.loads((tmp_path / "next" / "config.json").read_text())["gan_weight"] == 3e-3
    assert (
        run(
            "sample",
            "--student",
            tmp_path / "run",
            "--prompts",
            "0",
            "5",
            "--teacher-steps",
            3,
            "--out",
            tmp_path / "grid.png",
            "--images",
            tmp_path / "images",
        )
        == 0
    )
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
    with pytest.raises(UserError, match="is not EDM's network"):
        edm.network_of(weights)


def test_names_of_labels_lie_beside_a_pickle(tmp_path):
    shutil.copy(TINY, tmp_path / "tiny.pkl")
    (tmp_path / "labels.txt").write_text(
        "\n".join(f"name {i}" for i in range(10))
    )  # no newline at its end
    assert models.load_model(tmp_path / "tiny.pkl").encode(["name 9"])["class_labels"].tolist() == [
        9
    ]


def test_what_only_stable_diffusion_has_is_refused(tmp_path, capsys):
    folder = tmp_path / "unet"
    models.load_model(TINY).origin.network.save_pretrained(folder)
    assert (
        run(
            "support.export",
            "--model",
            TINY,
            "--student",
            folder,
            "--out",
            tmp_path / "student.safetensors",
        )
        == 2
        and "name a folder" in capsys.readouterr().err
    )
    assert (
        run("support.export", "--model", TINY, "--student", folder, "--out", tmp_path / "copy") == 0
    )
    assert (
        run("train", *SMALL, "--lora", 4, "--gan-weight", 0, "--out", tmp_path / "run") == 2
        and "--lora needs a network" in capsys.readouterr().err
    )


def test_a_run_resumes_bit_for_bit(classes, tmp_path):
    flags = [*SMALL, "--guidance", 1, "--student-steps", 1, "--real", classes]
    assert run("train", *flags, "--out", tmp_path / "whole") == 0
    assert run("train", *flags, "--iterations", 2, "--out", tmp_path / "parts") == 0
    assert run("train", "--resume", tmp_path / "parts", "--iterations", 4) == 0
    assert faults.same_state(tmp_path / "whole", tmp_path / "parts")


def test_dmd2_s_students_have_edm_s_names(fixture, model, tmp_path):
    """pytorch_model.bin of its ImageNet students: the teacher's names, here with the teacher's
    weights."""
    torch.save(
        {
            name.removeprefix("sd/"): tensor
            for name, tensor in fixture.items()
            if name.startswith("sd/")
        },
        tmp_path / "pytorch_model.bin",
    )
    student = students.load_student(tmp_path / "pytorch_model.bin", model)
    x, cond = torch.randn(2, *model.sample_shape), model.encode(["1", "2"])
    assert torch.equal(student(x, 999, cond), model.denoiser(x, 999, cond))


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(classes, tmp_path):
    """Adam's first moment after one iteration, that is; its steps are the sign of gradients, many
    of which are next to nothing here. At the cleanest levels the loss divides by sigma = 0.002 what
    float32 knows to 1e-7."""
    flags = [*SMALL, "--guidance", 1, "--student-steps", 1, "--real", classes, "--iterations", 1]
    flags += ["--dtype", "float32"]
    assert run("train", *flags, "--out", tmp_path / "one") == 0
    flags += ["--out", tmp_path / "two"]
    statuses, printed = faults.on_ranks(train.main, tmp_path / "log", *flags)
    assert statuses == [0, 0], printed
    one, two = faults.state_of(tmp_path / "one"), faults.state_of(tmp_path / "two")
    for part in (
        "student_optimizer.",
        "fake_score_optimizer.state.denoiser",
        "fake_score_optimizer.state.head",
    ):
        names = [name for name in one if name.startswith(part) and name.endswith("exp_avg")]
        norm = lambda values: sum(value.double().square().sum() for value in values).sqrt()
        assert norm([one[name] - two[name] for name in names]) < 2e-3 * norm(
            [one[name] for name in names]
        )
