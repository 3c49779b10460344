"""Files and commands as people really have them: each is read rightly, or refused in one line."""

import csv
import json
import os
import pickle
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

import data
import eval as evaluation
import models
import sample
import train
from lab import plane
from support import checkpoint, cli, export, flags, images, runlog, students, weights
from support.families import UNET_LORA_LAYERS
from support.prompt_files import read_prompts
from tests.tiny import (
    PLANE,
    PROMPTS,
    call,
    edit_json,
    make_student,
    one_line,
    original_file,
    random_image,
    refused,
    write_tiny_vae,
)


def edit_weights(folder, change):
    """Rewrite the weights of a folder: change({name: tensor}) -> {name: tensor}."""
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.fixture
def teacher(folders, tmp_path):
    """A pipeline to be spoilt."""
    return shutil.copytree(folders["sd15"], tmp_path / "teacher")


# ------------------------------------------------------------------ 1. files of a run directory

SAVED = [
    ({"track": "runs.x.evil"}, "invalid choice: 'runs.x.evil'"),
    ({"batch_size": -8}, "not a whole number above 0"),
    ({"batch_size": 2.5}, "not a whole number above 0"),
    ({"variant": "dmd9"}, "is not one of"),
    ({"variant": ["dmd"]}, "should be numbers"),
    ({"device": "meta"}, "cannot be used"),
    ({"device": "cpu:x"}, "cannot be used"),
    ({"iterations": "many"}, "not a whole number above 0"),
    ({"learning_rate": float("nan")}, "not a number above 0"),
    ({"noise_levels": [0.9, 0.1]}, "is not below"),
    ({"noise_levels": "0.1 0.9"}, "expected 2 arguments"),
    ({"noise_levels": ["@/etc/passwd", 1]}, "should be numbers"),
    ({"divergence": "kl"}, "is not one of"),
    ({"seed": {"a": 1}}, "should be a word or a number"),
    ({"shard": "__import__"}, "invalid choice"),
    ({"prompts": "/etc/hostname"}, "none of .txt"),
    ({"nonsense": 1}, "a flag that is not known"),
]


@pytest.mark.parametrize(("change", "says"), SAVED, ids=str)
def test_saved_flags_go_through_the_command_line_s_parser(change, says, run):
    edit_json(run / "config.json", **change)
    assert says in refused(plane, f"--resume {run}")


def test_a_student_s_run_is_read_by_the_same_parser(run):
    edit_json(run / "config.json", student_steps=-1)
    assert "not a whole number above 0" in refused(sample, f"--student {run} --model world")
    edit_json(run / "config.json", student_steps="4", of_an_older_version=True)
    assert students.run_config(run)["student_steps"] == 4


CONFIGS = [
    ("[1, 2]", "should hold names and values"),
    ("[" * 100_000, "cannot be read"),
    ('{"variant": ', "cannot be read"),
    ("\ud800", "not UTF-8"),
    ("", "cannot be read"),
]


@pytest.mark.parametrize(("text", "says"), CONFIGS, ids=range(len(CONFIGS)))
def test_a_damaged_config_is_one_line(text, says, run):
    (run / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert says in refused(plane, f"--resume {run}")


def test_a_pipe_or_a_giant_in_place_of_a_file_is_not_read(run, monkeypatch):
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")
    assert "no regular file" in refused(plane, f"--resume {run}")
    (run / "config.json").unlink()
    (run / "config.json").write_text(" " * 1000)
    monkeypatch.setattr(weights.read_text, "__defaults__", (100,))
    assert "1,000 bytes" in one_line(weights.read_json, run / "config.json", 100)


def test_other_things_among_checkpoints_are_passed_over(run):
    (run / "checkpoints" / "000009").write_text("a plain file")
    (run / "checkpoints" / "notes").mkdir()
    (run / "checkpoints" / "000003").symlink_to("nowhere")
    call(plane, f"--resume {run} --iterations 5")
    assert (run / "checkpoints" / "000005").is_dir()


MANIFESTS = [
    [],
    {"files": 3},
    {"files": {"../../x": [1, "a"]}},
    {"network": None},
    {"iteration": "4"},
]


@pytest.mark.parametrize("change", MANIFESTS, ids=str)
def test_a_manifest_of_other_types_is_damage(change, run, capsys):
    file = run / "checkpoints" / "000004" / "manifest.json"
    manifest = change
    if change:
        manifest = json.loads(file.read_text()) | change
        manifest.pop("sha256")
        manifest["sha256"] = checkpoint.text_digest(manifest)  # as a hostile one would be
    file.write_text(json.dumps(manifest))
    call(plane, f"--resume {run}")
    printed = capsys.readouterr().out
    assert "is damaged" in printed and "going on from" in printed and "000002" in printed


def test_unfinished_and_odd_rows_of_metrics_are_left_out(run):
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n{"iteration": "x"}\n\xff\xfe\n{"iteration": 5, "std": null}\n{"iter')
    call(plane, f"--resume {run} --iterations 6")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 4, 6]
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert "metrics.jsonl cannot be written" in refused(plane, f"--resume {run} --iterations 8")


# ------------------------------------------------------------------ 2. weights in folders


def with_prefix(prefix):
    def change(tensors):
        return {prefix + name: tensor for name, tensor in tensors.items()}

    return change


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_names_of_wrappers_are_stripped_and_said(part, prefix, teacher, folders, capsys):
    edit_weights(teacher / part, with_prefix(prefix))
    expected, model = models.load_model(folders["sd15"]), models.load_model(teacher)
    assert "left out of the names" in capsys.readouterr().err
    own, other = getattr(model.pipe, part).state_dict(), getattr(expected.pipe, part).state_dict()
    assert all(torch.equal(own[name], other[name]) for name in other)


def without_first(tensors):
    return dict(list(tensors.items())[1:])


def without_some(tensors):
    return dict(list(tensors.items())[:-5])


def with_another(tensors):
    return tensors | {"a.stranger": torch.zeros(2)}


def with_nan(tensors):
    name = next(iter(tensors))
    return tensors | {name: tensors[name] * float("nan")}


def of_another_shape(tensors):
    name = next(iter(tensors))
    return tensors | {name: tensors[name][:1].contiguous()}


SPOILT = [
    (without_first, "it lacks"),
    (with_another, "an unknown weight a.stranger"),
    (with_nan, "holds NaN or infinity"),
    (of_another_shape, "size mismatch|ignore_mismatched_sizes|another shape"),
    (with_prefix("teacher_net."), "it lacks .* and [0-9]+ more"),
]


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize(("change", "says"), SPOILT, ids=range(len(SPOILT)))
def test_spoilt_weights_of_a_part_are_refused(part, change, says, teacher):
    edit_weights(teacher / part, change)
    assert re.search(says, one_line(models.load_model, teacher))


@pytest.mark.parametrize(("change", "says"), SPOILT[:3], ids=range(3))
def test_spoilt_students_decoders_and_judges_are_refused(change, says, folders, tmp_path):
    model = models.load_model(folders["sd15"])
    make_student(folders["sd15"]).save_pretrained(tmp_path / "student")
    edit_weights(tmp_path / "student", change)
    assert says in one_line(students.load_student, tmp_path / "student", model)
    write_tiny_vae(tmp_path / "vae")
    edit_weights(tmp_path / "vae", change)
    load = [folders["sd15"], "cpu", torch.float32, str(tmp_path / "vae")]
    assert says in one_line(models.load_model, *load)
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = CLIPConfig(text_config=small, vision_config=small | {"image_size": 8, "patch_size": 4})
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    edit_weights(tmp_path / "clip", change)
    assert says in one_line(weights.load_pretrained, CLIPModel, tmp_path / "clip")


ONE_FILE = [
    ("diffusion_model", without_some, "lacks some of its network's weights"),
    ("cond_stage_model", without_some, "is missing"),
    ("diffusion_model", with_nan, "holds NaN or infinity"),
    ("cond_stage_model", with_nan, "holds NaN or infinity"),
    ("diffusion_model", with_prefix("module."), "cannot be loaded"),
]


@pytest.mark.parametrize(("part", "change", "says"), ONE_FILE, ids=range(len(ONE_FILE)))
def test_one_file_of_a_pipeline_that_is_spoilt_is_refused(part, change, says, folders, tmp_path):
    if change is without_some:
        pytest.importorskip("accelerate")  # without it there is a warning of what may be missing
    original_file(folders["sd15"], tmp_path / "whole.safetensors")
    tensors = load_file(tmp_path / "whole.safetensors")
    spoilt = change({name: tensor for name, tensor in tensors.items() if part in name})
    rest = {name: tensor for name, tensor in tensors.items() if part not in name}
    save_file(rest | spoilt, tmp_path / "spoilt.safetensors")
    options = [tmp_path / "spoilt.safetensors", "cpu", torch.float32, "none", folders["sd15"]]
    assert says in one_line(models.load_model, *options)


def test_old_clip_files_hold_a_table_of_positions(teacher):
    positions = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    edit_weights(teacher / "text_encoder", lambda tensors: tensors | positions)
    models.load_model(teacher)


def test_samples_that_are_not_finite_are_an_error(teacher, tmp_path):
    def far_too_large(tensors):
        tensors["conv_out.bias"] = tensors["conv_out.bias"] + 1e38
        return tensors

    edit_weights(teacher / "unet", far_too_large)
    flags_ = f"--model {teacher} --teacher-steps 2 --steps 1 --prompts cat"
    says = "hold NaN or infinity"
    student = f"--student {teacher}/unet --out {tmp_path}/x.png"
    assert says in refused(sample, f"{flags_} {student}", status=1)
    assert not (tmp_path / "x.png").exists()
    make = f"pairs --model {teacher} --count 2 --steps 2 --out {tmp_path}/pairs"
    assert says in refused(data, make, status=1)
    judge = f"--model {teacher} --teacher-only --teacher-steps 2 --samples 2 --out {tmp_path}/e"
    (tmp_path / "p.txt").write_text("cat\nrocket")
    assert says in refused(evaluation, f"{judge} --prompts {tmp_path}/p.txt", status=1)


# ------------------------------------------------------------------ 3. prompts and captions

TEXTS = ["red apple", "a heart, an arrow", 'a "rocket"', "café"]


def write_table(file, delimiter, header):
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["id", header])
        writer.writerows([[i, text] for i, text in enumerate(TEXTS)])


def write_json(file, content):
    file.write_text(json.dumps(content), encoding="utf-8")


def write_lines(file, rows, before=b""):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_bytes(before + lines.encode())


WRITERS = {
    "plain.txt": lambda file: file.write_text("\n".join(TEXTS), encoding="utf-8"),
    "bom.txt": lambda file: file.write_text("\n".join(TEXTS), encoding="utf-8-sig"),
    "windows.txt": lambda file: file.write_bytes("\r\n".join(TEXTS).encode()),
    "PLAIN.TXT": lambda file: file.write_text("\n\n".join(TEXTS), encoding="utf-8"),
    "a.csv": lambda file: write_table(file, ",", "caption"),
    "b.tsv": lambda file: write_table(file, "\t", "Text"),
    "list.json": lambda file: write_json(file, TEXTS),
    "objects.json": lambda file: write_json(file, [{"prompt": text} for text in TEXTS]),
    "values.json": lambda file: write_json(file, dict(enumerate(TEXTS))),
    "named.json": lambda file: write_json(file, {"about": "x", "prompts": TEXTS}),
    "objects.jsonl": lambda file: write_lines(file, [{"id": 1, "text": text} for text in TEXTS]),
    "texts.jsonl": lambda file: write_lines(file, TEXTS, b"\xef\xbb\xbf"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_prompts_are_read_as_what_the_file_is(name, tmp_path):
    WRITERS[name](tmp_path / name)
    assert read_prompts(tmp_path / name) == TEXTS


@pytest.mark.parametrize("kind", [list, tuple, lambda texts: dict(enumerate(texts))])
def test_prompts_of_every_pickle_protocol(kind, tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for name in ("a.pkl", "a.pickle"):
            (tmp_path / name).write_bytes(pickle.dumps(kind(TEXTS), protocol))
            assert read_prompts(tmp_path / name) == TEXTS


def test_prompts_of_a_parquet_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"url": ["x"] * 4, "caption": TEXTS})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    assert read_prompts(tmp_path / "a.parquet") == TEXTS


BAD_TEXTS = {
    "lines.txt": (b'{"prompt": "cat"}\n{"prompt": "dog"}', "name it .jsonl"),
    "latin.txt": ("café".encode("latin-1"), "not UTF-8"),
    "wide.txt": ("cat".encode("utf-16"), "not UTF-8"),
    "wide2.txt": ("cat".encode("utf-16-le"), "zero bytes"),
    "x.csv": (b"id,url\n1,2", "none of prompt, caption, text"),
    "ragged.csv": (b"id,text\n1,a,b", "row 2 has 3 columns"),
    "quote.csv": (b'id,text\n1,"a', "unexpected end of data"),
    "n.json": (b"[1, 2]", "entry 1 is no text but a int"),
    "none.jsonl": (b'{"prompt": null}', "entry 1 is no text"),
    "cut.jsonl": (b'{"prompt": "a"}\n{"pro', "cannot be read"),
    "deep.json": (b"[" * 100_000, "cannot be read"),
    "prompts.yaml": (b"- cat", "none of .txt"),
    "prompts": (b"cat", "none of .txt"),
    "blank.txt": (b" \n\n", "holds no prompt"),
    "a.parquet": (b"PAR1", "cannot be read|pip install pyarrow"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_text_that_is_something_else_is_refused(name, tmp_path):
    content, says = BAD_TEXTS[name]
    (tmp_path / name).write_bytes(content)
    message = one_line(read_prompts, tmp_path / name)
    assert re.search(says, message) and name in message


def test_only_line_feeds_end_a_line_and_blank_entries_are_counted(tmp_path, capsys):
    text = "one\u2028still one\x0bstill\x85one\ntwo"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert len(read_prompts(tmp_path / "a.txt")) == 2
    write_json(tmp_path / "a.json", ["cat", "", " "])
    assert read_prompts(tmp_path / "a.json") == ["cat"]
    assert "2 of 3 prompts are blank" in capsys.readouterr().out


def test_prompts_that_the_tokenizer_cuts_are_counted_once(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("cat\n" + "red apple " * 20)
    data.training_prompts(tmp_path / "a.txt", models.load_model(data.model_path(None)))
    assert "1 of 2 prompts are longer than 12 tokens" in capsys.readouterr().out


def test_captions_are_utf8_or_refused_by_name(tmp_path):
    random_image(8, 8, 0).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\n")
    assert images.list_images(tmp_path)[0][1] == "café"
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    message = one_line(images.list_images, tmp_path)
    assert "a.txt" in message and "not UTF-8" in message


# ------------------------------------------------------------------ 4. images


def gradient():
    """(8, 8) from 0 to 255"""
    return np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def write_16_bit(file):
    Image.fromarray(gradient().astype(np.uint16) * 257).save(file)


def write_float(file):
    Image.fromarray(gradient().astype(np.float32) / 255, "F").save(file)


def write_transparent(file):
    """What lies under full transparency does not show: white does."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(file)


def write_palette(file):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.paste(0, (0, 4, 8, 8))
    image.save(file, transparency=0)


def write_animation(file):
    first, second = Image.new("RGB", (8, 8), (10, 20, 30)), Image.new("RGB", (8, 8), "red")
    first.save(file, save_all=True, append_images=[second])


def write_turned(file):
    image = Image.new("RGB", (8, 4), "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(file, exif=exif)


GREY = np.repeat(gradient()[:, :, None], 3, 2)
PART = np.full((8, 8, 3), 255, np.uint8)
PART[:4] = (10, 20, 30)
ALL = np.full((8, 8, 3), (10, 20, 30), np.uint8)
IMAGES = {
    "16.png": (write_16_bit, GREY),
    "16.tif": (write_16_bit, GREY),
    "16.pgm": (write_16_bit, GREY),
    "float.tiff": (write_float, GREY),
    "8.png": (lambda file: Image.fromarray(gradient()).save(file), GREY),
    "alpha.png": (write_transparent, PART),
    "alpha.webp": (lambda file: write_webp(file), PART),
    "palette.png": (write_palette, PART),
    "palette.gif": (write_palette, PART),
    "two.png": (lambda file: Image.new("1", (8, 8), 1).save(file), np.full((8, 8, 3), 255)),
    "cmyk.tif": (lambda file: Image.new("CMYK", (8, 8)).save(file), np.full((8, 8, 3), 255)),
    "frames.gif": (write_animation, ALL),
    "frames.webp": (lambda file: write_frames(file), ALL),
    "small.qoi": (lambda file: Image.fromarray(ALL).save(file), ALL),
    "turned.jpg": (write_turned, np.full((8, 4, 3), 255)),
}


def write_webp(file):
    write_transparent(file.with_suffix(".png"))
    Image.open(file.with_suffix(".png")).save(file, lossless=True)
    file.with_suffix(".png").unlink()


def write_frames(file):
    first, second = Image.new("RGB", (8, 8), (10, 20, 30)), Image.new("RGB", (8, 8), "red")
    first.save(file, save_all=True, append_images=[second], lossless=True)


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_what_a_viewer_shows(name, tmp_path):
    write, expected = IMAGES[name]
    write(tmp_path / name)
    ((file, _),) = images.list_images(tmp_path)
    seen = np.asarray(images.open_image(file)).astype(int)
    assert seen.shape == expected.shape and abs(seen - expected).max() <= 1


def test_thin_images_and_odd_values_are_left_out_with_a_reason(tmp_path, capsys):
    for i in range(3):
        random_image(32, 32, i).save(tmp_path / f"{i}.png")
    Image.new("RGB", (2, 60_000)).save(tmp_path / "thin.png")
    Image.fromarray(np.full((8, 8), 7.0, np.float32), "F").save(tmp_path / "float.tif")
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f.name, "text": "x"}) for f in tmp_path.glob("*.*"))
    )
    reader = images.ImageReader(tmp_path, 16, bad_share=1)
    read = [reader.read(i) for i in range(5)]
    assert sum(found is not None for found in read) == 3
    printed = capsys.readouterr().out
    assert "2x60000 is thinner than 20 to 1" in printed and "0 to 1 are understood" in printed


def test_a_crop_is_what_resizing_and_cutting_gives():
    image = random_image(90, 60, 0)
    resized = image.resize((48, 32), Image.Resampling.LANCZOS).crop((8, 0, 40, 32))
    ours = np.asarray(images.crop_as_stable_diffusion(image, 32)).astype(int)
    assert abs(ours - np.asarray(resized)).max() <= 1


def test_linked_folders_are_followed_and_what_is_left_out_is_named(tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    random_image(8, 8, 0).save(tmp_path / "elsewhere" / "a.jfif", "JPEG")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "loop").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "b.heic").write_bytes(b"x")
    (tmp_path / "here" / "._c.png").write_bytes(b"a Mac's notes")
    assert [file.name for file, _ in images.list_images(tmp_path / "here")] == ["a.jfif"]
    printed = capsys.readouterr().out
    assert "1 files are no images by their names and left out: b.heic" in printed


def test_an_archive_s_list_of_other_types_is_one_line(tmp_path):
    for number, content in enumerate(("[]", '{"labels": 3}', '{"labels": [["a"]]}', "[" * 10**5)):
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as archive:
            archive.writestr("dataset.json", content)
        assert "no archive of images" in one_line(images.list_images, tmp_path / f"{number}.zip")


# ------------------------------------------------------------------ 5. data swapped between runs


@pytest.fixture
def latent_run(folders, images, tmp_path):
    """A run with a folder of real images, its flags."""
    shutil.copytree(images, tmp_path / "real")
    flags_ = f"--model {folders['sd15']} --real {tmp_path}/real --gan-weight 1e-3 --batch-size 2"
    flags_ += f" --fake-updates 1 --warmup 0 --iterations 1 --out {tmp_path}/run --device cpu"
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    call(train, f"{flags_} --prompts {tmp_path}/p.txt")
    return tmp_path


def test_real_data_of_the_same_count_but_other_contents_are_noticed(latent_run, capsys):
    real, again = latent_run / "real", f"--resume {latent_run}/run --iterations 2"
    random_image(40, 30, seed=99).save(real / "0.png")
    assert "--real holds other data than before" in refused(train, again)
    random_image(40, 30, seed=0).save(real / "0.png")
    captions = (real / "metadata.jsonl").read_text()
    (real / "metadata.jsonl").write_text(captions.replace("tomato", "potato"))
    assert "--real holds other data than before" in refused(train, again)


def test_a_copy_of_the_data_and_a_moved_teacher_are_the_same(latent_run, folders, capsys):
    shutil.copytree(latent_run / "real", latent_run / "copy")
    shutil.copytree(folders["sd15"], latent_run / "moved")
    again = f"--resume {latent_run}/run --iterations 2"
    call(train, f"{again} --real {latent_run}/copy --model {latent_run}/moved")
    assert "changed: model was" in capsys.readouterr().out
    shutil.copytree(folders["sd15"], latent_run / "other")
    edit_weights(
        latent_run / "other" / "unet", lambda t: t | {"conv_in.bias": t["conv_in.bias"] + 1}
    )
    says = refused(train, f"{again[:-1]}3 --model {latent_run}/other")
    assert "the teacher's weights are others" in says


def test_a_small_real_set_is_warned_of(latent_run, capsys):
    model = models.load_model(json.loads((latent_run / "run" / "config.json").read_text())["model"])
    data.warn_of_few(data.real_data(model, latent_run / "real"))
    assert "--real holds 6 samples. With fewer than 1,000" in capsys.readouterr().out


# ------------------------------------------------------------------ 6. LoRAs


@pytest.fixture(scope="module")
def lora(folders, lora_runs):
    """{kind of pipeline: (its model, a LoRA student's folder)}"""
    made = {}
    for name, folder in folders.items():
        made[name] = (models.load_model(folder), lora_runs / name / "student")
    return made


def adapted(model):
    """Names of the modules that a LoRA adapts."""
    network = model.origin.network
    return [
        name
        for name, module in network.named_modules()
        if name.endswith(UNET_LORA_LAYERS) and hasattr(module, "weight")
    ]


def written(folder):
    return load_file(folder / students.LORA_FILE)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_comfyui_and_kohya_know_every_module_of_our_lora(name, lora):
    """ComfyUI (comfy/lora.py, model_lora_keys_unet) maps lora_unet_ + diffusers' name with
    underscores, and lora_unet_ + the original name; kohya's sd-scripts (networks/lora.py) names the
    modules of SD1.5 so, and convert_diffusers_to_sai_if_needed turns ours into SDXL's."""
    model, folder = lora[name]
    original = export.original_names(model.origin.network)
    known = set()
    for weight, theirs in original.items():
        for spelt in (weight, theirs):
            known.add(f"lora_unet_{spelt.removesuffix('.weight').replace('.', '_')}")
    ours = {key.split(".")[0] for key in written(folder)}
    assert ours <= known and len(ours) == len(adapted(model))
    parts = {key.split(".", 1)[1] for key in written(folder)}
    assert parts == {"lora_down.weight", "lora_up.weight", "alpha"}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_other_spellings_of_a_lora_are_the_same_student(name, lora, tmp_path):
    model, folder = lora[name]
    expected = students.load_student(folder, model)
    spelt = {module.replace(".", "_"): module for module in adapted(model)}
    peft, old, sgm = {}, {}, {}
    original = export.original_names(model.origin.network)
    for key, tensor in written(folder).items():
        stem, part = key.split(".", 1)
        module = spelt[stem.removeprefix("lora_unet_")]
        theirs = original[f"{module}.weight"].removesuffix(".weight").replace(".", "_")
        sgm[f"lora_unet_{theirs}.{part}"] = tensor
        if part == "alpha":
            continue
        side = "A" if "down" in part else "B"
        scaled = tensor * (1 if side == "A" else 0.5)  # alpha / rank
        peft[f"unet.{module}.lora_{side}.weight"] = scaled
        old[f"unet.{module}.lora.{part[5:]}"] = scaled
    files = {"peft": peft, "old": old}
    if name == "sdxl":  # kohya trains SD1.5 under diffusers' names, and SDXL under the original's
        files["sgm"] = sgm
    for kind, tensors in files.items():
        save_file(tensors, tmp_path / f"{kind}.safetensors")
        got = students.load_student(tmp_path / f"{kind}.safetensors", model)
        for own, other in zip(got.parameters(), expected.parameters()):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6, msg=kind)


def test_incomplete_and_foreign_loras_are_refused(lora, tmp_path, capsys):
    model, folder = lora["sd15"]
    whole = written(folder)
    first = next(key for key in whole if key.endswith("lora_up.weight"))
    half = {key: tensor for key, tensor in whole.items() if key != first}
    stem = first.split(".")[0]
    dora = whole | {f"{stem}.dora_scale": torch.ones(1)}
    hada = {f"{stem}.hada_w1_a": torch.ones(2, 2)}
    stranger = {"lora_unet_nowhere.lora_down.weight": torch.ones(4, 8)}
    stranger["lora_unet_nowhere.lora_up.weight"] = torch.ones(8, 4)
    for tensors, says in (
        (half, "is incomplete"),
        (dora, "of a kind that is not supported"),
        (hada, "of a kind that is not supported"),
        (stranger, "is not known there"),
    ):
        save_file(tensors, tmp_path / "lora.safetensors")
        assert says in one_line(students.load_student, tmp_path / "lora.safetensors", model)
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 32)}
    text["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.ones(64, 4)
    save_file(whole | text, tmp_path / "lora.safetensors")
    students.load_student(tmp_path / "lora.safetensors", model)
    assert "2 weights of text encoders are left out" in capsys.readouterr().out


# ------------------------------------------------------------------ 7. recipes

LINES = {
    "--out runs/a#1": ["--out", "runs/a#1"],
    "--out 'my runs/a' # where": ["--out", "my runs/a"],
    '--prompts "a #1 b.txt"': ["--prompts", "a #1 b.txt"],
    "\ufeff--seed 3": ["--seed", "3"],
    "   # nothing": [],
    "--out a\\ b": ["--out", "a b"],
    "--out it\\'s": ["--out", "it's"],
    "--prompts a#b.txt --seed 3#x": ["--prompts", "a#b.txt", "--seed", "3#x"],
}


@pytest.mark.parametrize("line", LINES)
def test_a_recipe_s_line_is_a_shell_s(line):
    assert cli.Parser("").convert_arg_line_to_args(line) == LINES[line]


def test_recipes_that_cannot_be_read_and_empty_words_are_one_line(tmp_path):
    (tmp_path / "self.args").write_text(f"@{tmp_path / 'self.args'}")
    assert "it names itself" in refused(train, f"@{tmp_path / 'self.args'}")
    (tmp_path / "cut.args").write_text("--out 'my runs\n")
    says = refused(train, f"@{tmp_path / 'cut.args'}")
    assert re.search("a line that cannot be read .*: --out 'my runs", says)
    (tmp_path / "wide.args").write_bytes("--seed 3".encode("utf-16"))
    assert "not UTF-8" in refused(train, f"@{tmp_path / 'wide.args'}")
    assert refused(train, "--seed 3 --out", "") == "--out is empty"  # as of an unset variable


# ------------------------------------------------------------------ 8. odd files of models


def test_a_tokenizer_without_a_length_takes_the_text_encoder_s(teacher, folders):
    config = json.loads((teacher / "tokenizer" / "tokenizer_config.json").read_text())
    config.pop("model_max_length")
    (teacher / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    own = models.load_model(teacher).encode(PROMPTS)
    expected = models.load_model(folders["sd15"]).encode(PROMPTS)
    torch.testing.assert_close(own["encoder_hidden_states"], expected["encoder_hidden_states"])


NUMBERS = [
    ("unet", "sample_size", -4),
    ("unet", "sample_size", "8"),
    ("vae", "scaling_factor", 0),
    ("vae", "scaling_factor", float("nan")),
    ("vae", "scaling_factor", "1"),
]


@pytest.mark.parametrize(("part", "name", "value"), NUMBERS, ids=str)
def test_sizes_and_scales_of_other_kinds_are_one_line(part, name, value, teacher):
    edit_json(teacher / part / "config.json", **{name: value})
    assert f"the {name} of its" in one_line(models.load_model, teacher)


INDEXES = [
    ({"_class_name": ["StableDiffusionPipeline"]}, "supported are"),
    ({"_class_name": None}, "supported are"),
    ({"_class_name": {"a": 1}}, "supported are"),
    ({"unet": ["os", "system"]}, "of an unknown class, os system"),
    ({"tokenizer": ["subprocess", "Popen"]}, "of an unknown class, subprocess Popen"),
    ({"vae": 3}, "cannot be loaded"),
    ({"scheduler": [1, 2, 3]}, "of an unknown class"),
]


@pytest.mark.parametrize(("change", "says"), INDEXES, ids=str)
def test_a_pipeline_s_index_of_other_types_is_one_line(change, says, teacher):
    edit_json(teacher / "model_index.json", **change)
    assert says in one_line(models.load_model, teacher)


def test_pipes_in_place_of_weights_and_prompts_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "no regular file" in one_line(weights.read_weights, tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "pipe.txt")
    assert "no regular file" in one_line(read_prompts, tmp_path / "pipe.txt")


# ------------------------------------------------------------------ 9. messages

MEANT = [
    (train, "recipes/short.args", "did you mean @recipes/short.args?"),
    (train, "--lr 1e-4", "did you mean --learning-rate?"),
    (train, "--learning_rate 1e-4", "did you mean --learning-rate?"),
    (train, "--cfg 7", "did you mean --guidance?"),
    (train, "--max-train-steps 7", "did you mean --iterations?"),
    (train, "--gradient_checkpointing", "did you mean --activation-checkpointing?"),
    (sample, "--output x.png", "did you mean --out?"),
    (train, "--model nobody/nothing-there", "hub"),
    (train, "--model nowhere/at/all", "there is no model directory"),
    (sample, "--student runs/none", "there is no student"),
]


@pytest.mark.parametrize(("command", "line", "says"), MEANT, ids=[line for _, line, _ in MEANT])
def test_mistakes_are_answered_with_what_was_meant(command, line, says, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert says in refused(command, line)


def test_without_a_network_it_says_so(monkeypatch):
    import huggingface_hub

    def no_network(*arguments, **options):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "model_info", no_network)
    message = one_line(models.load_model, "nobody/nothing-there")
    assert "the hub cannot be reached (Name or service not known)" in message


def rename_to_fp16(teacher):
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (teacher / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))


def test_the_one_variant_that_is_there_is_used_and_said(teacher, capsys):
    rename_to_fp16(teacher)
    models.load_model(teacher)
    assert "only its fp16 variant is there" in capsys.readouterr().err


def test_weights_in_a_bin_file_are_named(teacher):
    (file,) = (teacher / "unet").glob("*.safetensors")
    torch.save(load_file(file), teacher / "unet" / "diffusion_pytorch_model.bin")
    file.unlink()
    assert "diffusion_pytorch_model.bin is not read" in one_line(models.load_model, teacher)


def test_two_runs_in_one_directory_are_refused(run):
    with checkpoint.locked(run):
        says = refused(plane, f"--resume {run} --iterations 5")
    assert "is in use by another run, process" in says
    call(plane, f"--resume {run} --iterations 5")


def test_out_of_memory_names_the_flags(capsys):
    def too_much():
        torch.empty(10**15)

    with pytest.raises(SystemExit) as end:
        cli.run(too_much)
    assert end.value.code == 1
    assert "out of memory: train with a smaller --micro-batch" in capsys.readouterr().err


def test_a_teacher_that_is_gone_is_asked_for(run, tmp_path):
    edit_json(run / "config.json", model=str(tmp_path / "gone"))
    assert "is gone: name its new place by --model" in refused(sample, f"--student {run}")


def test_a_collapse_stops_the_run_unless_it_is_told_to_go_on(tmp_path):
    hot = f"{PLANE} --iterations 20 --learning-rate 0.2"
    says = refused(plane, f"{hot} --out {tmp_path}/a", status=1)
    assert "the student has collapsed" in says and "--keep-going" in says
    call(plane, f"{hot} --out {tmp_path}/b --keep-going")
    assert json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[-1])


def test_known_flags_include_every_alias():
    known = {
        a
        for parser in (flags.train_parser, flags.sample_parser, flags.eval_parser)
        for action in parser("")._actions
        for a in action.option_strings
    }
    assert set(cli.ALIASES.values()) <= known and not set(cli.ALIASES) & (known - {"--steps"})
    assert runlog.COLLAPSED == 10
