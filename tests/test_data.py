"""Prompts and real data: text, pickles, folders of images, latents and pairs made beforehand,
DMD2's LMDBs. Damaged and unfitting ones are refused in one line."""

import pickle
import re
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import data
import models
import train
from lab import faults
from support import images as image_files
from support import shards
from support.prompt_files import read_prompts
from support.shards import as_sample
from tests.tiny import PROMPTS, SMALL, Trap, call, one_line, refused, write_pipeline


@pytest.fixture(scope="module")
def sd15(folders):
    """Its model belongs to all tests: leave it as it is."""
    return models.load_model(folders["sd15"])


@pytest.fixture
def shards_of_four(monkeypatch):
    monkeypatch.setattr(data, "SHARD", 4)
    monkeypatch.setattr(shards, "SHARD", 4)


# ----------------------------------------------------------------------------- prompts


def test_bad_prompt_files_are_refused_and_not_executed(tmp_path):
    file = tmp_path / "prompts.pkl"
    bad = {
        pickle.dumps(Trap(tmp_path / "sprung")): "nothing in a file is executed",
        pickle.dumps([torch.zeros(2)]): "nothing in a file is executed",
        pickle.dumps(["a", None]): "entry 2 is no text",
        pickle.dumps(PROMPTS)[:-20]: "pickle data was truncated|Ran out of input",
    }
    for content, says in bad.items():
        file.write_bytes(content)
        assert re.search(says, one_line(read_prompts, file))
    assert not (tmp_path / "sprung").exists()


# ----------------------------------------------------------------------------- folders of images


def load_image(file, size):
    image = image_files.crop_as_stable_diffusion(image_files.open_image(file), size)
    return as_sample(image_files.as_tensor(image))


def test_images_are_shrunk_and_cut_around_their_centre(tmp_path):
    """The middle third is white, and all that is left, but for the filter's rings."""
    wide = torch.zeros(20, 60, 3, dtype=torch.uint8)
    wide[:, 20:40] = 255
    Image.fromarray(wide.numpy()).save(tmp_path / "wide.png")
    image = load_image(tmp_path / "wide.png", 10)
    assert image.shape == (3, 10, 10) and image.min() > 0.5
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    tall = Image.fromarray(wide.permute(1, 0, 2).contiguous().numpy())
    tall.save(tmp_path / "tall.jpg", exif=exif)
    assert load_image(tmp_path / "tall.jpg", 10).min() > 0.5


def test_bad_images_are_named_and_left_out_up_to_a_share(folders, images, sd15, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "2.png").write_text("no image")
    flags = f"--model {folders['sd15']} --images {tmp_path}/images --out {tmp_path}/latents"
    says = refused(data, f"latents {flags}")
    assert "1 of the 6 images" in says and "2.png" in says
    assert not list((tmp_path / "latents").glob("*.safetensors"))
    for _ in range(2):  # named again when nothing is left to do
        call(data, f"latents {flags} --bad-share 0.2")
        printed = capsys.readouterr().out
        assert "left out: " in printed and "2.png" in printed
    assert data.real_data(sd15, tmp_path / "latents").count == 5


@pytest.mark.parametrize("what", ["latents", "pixels"])
def test_shards_that_lack_bad_images_are_not_made_again(folders, images, what, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(images, folder if what == "latents" else folder / "a class")
    next(folder.rglob("2.png")).write_text("no image")
    model = f"--model {folders['sd15']}" if what == "latents" else "--size 8"
    command = f"{what} {model} --images {folder} --out {tmp_path}/out --bad-share 0.5"
    call(data, command)
    file = tmp_path / "out" / "00000.safetensors"
    made = file.stat().st_mtime_ns
    call(data, command)
    assert file.stat().st_mtime_ns == made
    assert len(safe_open(file, "pt").get_slice("x0")[:]) == 5


# ----------------------------------------------------------------------------- made beforehand


def test_latents_are_made_once_and_gone_on_with_where_it_stopped(
    folders, images, tmp_path, shards_of_four
):
    model, out = models.load_model(folders["sdxl"]), tmp_path / "latents"
    config = {"model": str(folders["sdxl"]), "images": str(images)}
    data.make_latents(out, config, model)
    x, prompts = data.real_data(model, out).read(range(6))
    assert prompts == [PROMPTS[i % 4] for i in range(6)]
    pixels = torch.stack([load_image(images / f"{i}.png", 16) for i in range(6)])
    expected = model.vae.encode(pixels).latent_dist.mean * 0.13025
    torch.testing.assert_close(x, expected, rtol=2e-3, atol=2e-3)  # stored in float16

    first, second = sorted(out.glob("*.safetensors"))
    written = second.stat().st_mtime_ns
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    says = one_line(data.real_data, model, out)
    assert "00000.safetensors is damaged: it is not what was writt" in says
    data.make_latents(out, config, model)
    assert second.stat().st_mtime_ns == written
    assert torch.equal(data.real_data(model, out).read(range(6))[0], x)

    # The folder itself, encoded as it is drawn, is the same data.
    direct, captions = data.real_data(model, images).draw(data.Draws(0, 0, 8))
    stored, same = data.real_data(model, out).draw(data.Draws(0, 0, 8))
    torch.testing.assert_close(direct, stored, rtol=2e-3, atol=2e-3)
    assert captions == same


def test_pairs_are_what_the_teacher_s_sampler_makes_of_their_noise(
    folders, prompts, sd15, tmp_path, shards_of_four
):
    flags = f"--model {folders['sd15']} --prompts {prompts} --steps 3 --guidance 2"
    call(data, f"pairs {flags} --count 3 --out {tmp_path}/pairs")
    pairs = data.Pairs(tmp_path / "pairs", sd15, 2.0)
    noise, x0, texts = pairs.read(range(3))
    cond = sd15.encode(texts)

    def x0_of(x_t, t):
        return models.guided_x0(sd15.denoiser, x_t, t, cond, sd15.uncond, 2.0)

    expected = models.deterministic_sample(x0_of, noise, [999, 665, 332], sd15.schedule)
    torch.testing.assert_close(x0, expected, rtol=2e-3, atol=2e-3)
    call(data, f"pairs {flags} --count 6 --out {tmp_path}/pairs")  # there may be more of them
    more = data.Pairs(tmp_path / "pairs", sd15, 2.0)
    assert more.count == 6
    says = refused(data, f"pairs {flags} --count 6 --seed 1 --out {tmp_path}/pairs")
    assert "of another configuration: seed was 0, is 1" in says


def test_latents_and_pairs_of_other_weights_are_refused(folders, prompts, images, tmp_path):
    other = write_pipeline(tmp_path / "other", "sd15", seed=1)
    call(data, f"latents --model {other} --images {images} --out {tmp_path}/latents")
    made = f"--model {other} --prompts {prompts} --count 2 --steps 2"
    call(data, f"pairs {made} --out {tmp_path}/pairs")
    common = f"--prompts {prompts} --out {tmp_path}/run {SMALL}"
    real = f"--gan-weight 0.1 --real {tmp_path}/latents"
    pairs = f"--regression-weight 0.1 --pairs {tmp_path}/pairs"
    for flags in (real, f"--gan-weight 0 {pairs}"):
        says = refused(train, f"--model {folders['sd15']} {common} {flags}")
        assert f"were made by the weights of {other}" in says
        assert not (tmp_path / "run").exists()
    call(train, f"--model {other} {common} {real} {pairs} --vae none")


def test_real_data_that_do_not_fit_stop_before_training(folders, prompts, images, tmp_path):
    sd15 = folders["sd15"]
    call(data, f"latents --model {sd15} --images {images} --out {tmp_path}/latents")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    shutil.copy(images / "0.png", tmp_path / "bare")
    larger = write_pipeline(tmp_path / "larger", "sd15", sample_size=16)
    for flags, says in (
        (f"--model {larger} --real {tmp_path}/latents", "(4, 8, 8)"),
        (f"--model {sd15} --real {tmp_path}/absent", "no such directory"),
        (f"--model {sd15} --real {tmp_path}/empty", "holds no images"),
        (f"--model {sd15} --real {tmp_path}/bare", "has a caption"),
        (f"--model {sd15}", "name some by --real"),
        (f"--model {sd15} --real {images} --vae none", "leaves out the encoder"),
    ):
        flags += f" --prompts {prompts} --gan-weight 0.1 --out {tmp_path}/run {SMALL}"
        found = refused(train, flags)
        assert says in found and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_latents_and_pairs_are_shared_out_to_two_ranks(folders, prompts, images, sd15, tmp_path):
    latents = f"latents --model {folders['sd15']} --images {images} --out {tmp_path}/latents"
    statuses, printed = faults.on_ranks(data.main, tmp_path / "log", *latents.split())
    assert statuses == [0, 0], printed
    assert data.real_data(sd15, tmp_path / "latents").count == 6
    pairs = f"pairs --model {folders['sd15']} --prompts {prompts} --count 300 --steps 2"
    pairs += " --dtype float32"
    flags = [*pairs.split(), "--out", tmp_path / "shared"]
    statuses, printed = faults.on_ranks(data.main, tmp_path / "log", *flags)
    assert statuses == [0, 0], printed
    call(data, f"{pairs} --out {tmp_path}/alone")
    alone = data.Pairs(tmp_path / "alone", sd15, sd15.default_guidance)
    shared = data.Pairs(tmp_path / "shared", sd15, sd15.default_guidance)
    assert alone.count == 300 and alone.digests == shared.digests


# ----------------------------------------------------------------------------- DMD2's LMDBs


def write_lmdb(folder, x, prompts):
    lmdb = pytest.importorskip("lmdb")
    environment = lmdb.open(str(folder), map_size=1 << 24)
    with environment, environment.begin(write=True) as writer:
        for i, prompt in enumerate(prompts):
            writer.put(f"latents_{i}_data".encode(), x[i].half().numpy().tobytes())
            writer.put(f"prompts_{i}_data".encode(), prompt.encode())
        writer.put(b"latents_shape", " ".join(map(str, x.shape)).encode())


def test_latents_of_an_lmdb(sd15, tmp_path):
    x, prompts = torch.randn(50, 4, 8, 8).half().float(), [f"caption {i}" for i in range(50)]
    write_lmdb(tmp_path / "lmdb", x, prompts)
    drawn, captions = data.real_data(sd15, tmp_path / "lmdb").draw(data.Draws(0, 0, 64))
    index = [prompts.index(caption) for caption in captions]
    assert torch.equal(drawn, x[index]) and len(set(index)) > 30


def test_bad_lmdbs(sd15, tmp_path):
    lmdb = pytest.importorskip("lmdb")
    write_lmdb(tmp_path / "shape", torch.randn(4, 4, 16, 16), ["a"] * 4)
    write_lmdb(tmp_path / "cut", torch.randn(400, 4, 8, 8), ["a"] * 400)
    write_lmdb(tmp_path / "short", torch.randn(4, 4, 8, 8), ["a"] * 3)
    write_lmdb(tmp_path / "hole", torch.randn(40, 4, 8, 8), ["a"] * 40)
    with lmdb.open(str(tmp_path / "hole")) as environment, environment.begin(write=True) as writer:
        writer.put(b"latents_17_data", b"ab")
    file = tmp_path / "cut" / "data.mdb"
    file.write_bytes(file.read_bytes()[:200_000])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.mdb").write_text("no data base")
    for name, says in {
        "shape": r"of shape \(4, 16, 16\); .* has \(4, 8, 8\)",
        "cut": "is cut off",
        "short": "short: the LMDB has no latents_3_data",
        "hole": "hole: entry 17 of 40 has 2 bytes of latents, not 512",
        "text": "cannot be read",
    }.items():
        assert re.search(says, one_line(data.real_data, sd15, tmp_path / name))


def test_an_lmdb_without_the_package_is_one_line(sd15, tmp_path, monkeypatch):
    (tmp_path / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert re.search("--real .* pip install lmdb", one_line(data.real_data, sd15, tmp_path))
