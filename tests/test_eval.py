"""eval.py: metrics against closed form, hand computation and torch-fidelity's own command."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import data
import eval as evaluation
import models
import sample
import train
from lab import faults
from models import ASSETS
from support import edm, metrics, protocols, students
from support.judges.clip import Clip
from support.judges.gauges import Gauges
from support.judges.pickscore import PickScore
from support.judges.world import WorldJudge
from support.protocols import PROTOCOLS
from tests.tiny import Trap, call, edit_json, edm_denoiser, one_line, refused

ROOT = ASSETS.parent
CLASSES = "--model emoji-classes --samples 24 --batch-size 10 --teacher-steps 2 --device cpu"


def report(out):
    return json.loads((Path(out) / "metrics.json").read_text())


def rows(out):
    return {row.pop("label"): row for row in report(out)["rows"]}


def evaluated(flags, out):
    """The rows of a table that eval.py makes, by their labels."""
    call(evaluation, f"{flags} --out {out}")
    return rows(out)


@pytest.fixture(scope="module")
def class_runs(tmp_path_factory):
    """Two runs of the class-conditional teacher, of four iterations and of one."""
    folder = tmp_path_factory.mktemp("classes")
    flags = f"@{ROOT}/recipes/emoji-classes.args --gan-weight 0 --batch-size 4 --fake-updates 1"
    call(train, f"{flags} --iterations 4 --save-every 2 --out {folder}/0")
    call(train, f"{flags} --iterations 1 --out {folder}/1")
    return folder / "0", folder / "1"


def write_images(folder, count, size=32, seed=0):
    """Smooth random images, as PNGs."""
    folder.mkdir(parents=True)
    for i in range(count):
        coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1000 * seed + i))
        smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)[0]
        protocols.to_pil(smooth).save(folder / f"{i:03d}.png")
    return folder


# ----------------------------------------------------------------------------- metrics


def test_fid_of_two_gaussians_is_the_closed_form():
    """Diagonal covariances: |mean difference|^2 + sum of (deviation differences)^2; and the
    estimate from samples comes near."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    deviations = torch.rand(2, 6, generator=generator, dtype=torch.float64) + 0.5
    exact = (means.diff(dim=0).square() + deviations.diff(dim=0).square()).sum().item()
    gaussians = [metrics.Gaussian(m, torch.diag(d**2)) for m, d in zip(means, deviations)]
    assert metrics.frechet_distance(*gaussians) == pytest.approx(exact, rel=1e-12)
    noise = torch.randn(2, 100_000, 6, generator=generator, dtype=torch.float64)
    features = means[:, None] + deviations[:, None] * noise
    estimate = metrics.frechet_distance(*map(metrics.Gaussian.of, features))
    assert estimate == pytest.approx(exact, rel=0.02)


def test_fid_of_a_set_with_itself_is_zero_also_where_features_outnumber_images():
    features = torch.randn(30, 100, generator=torch.Generator().manual_seed(0))
    own = metrics.Gaussian.of(features)
    same = metrics.Gaussian.of(features)
    assert metrics.frechet_distance(own, same) == pytest.approx(0, abs=1e-5)


def test_frechet_distances_do_not_depend_on_which_matrices_are_small():
    """Few samples of many dimensions, against the distance by a root of the whole product."""
    generator = torch.Generator().manual_seed(0)
    few, many = (
        torch.randn(count, 12, generator=generator, dtype=torch.float64)
        @ torch.randn(12, 12, generator=generator, dtype=torch.float64)
        for count in (8, 200)
    )
    few, many, others = map(metrics.Gaussian.of, (few, many, many[:9]))
    assert few.factor is not None and many.factor is None and others.factor is not None
    for a, b in ((few, many), (many, few), (few, others), (many, many)):
        root = torch.linalg.eigvals(a.covariance @ b.covariance).sqrt().real.sum()
        expected = (a.mean - b.mean).square().sum() - 2 * root
        expected += a.covariance.trace() + b.covariance.trace()
        assert metrics.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)


def test_standard_errors_are_those_of_many_repetitions():
    """Of a mean, of a paired difference and of a Frechet distance, each against the spread over
    fresh sets."""
    generator = torch.Generator().manual_seed(0)
    reference = metrics.Gaussian(torch.zeros(2).double(), torch.eye(2).double())
    draws = {"mean": [], "difference": [], "frechet": []}
    for repeat in range(200):
        x = torch.randn(200, 2, generator=generator, dtype=torch.float64) + 0.5
        y = x + 0.1 * torch.randn(200, 2, generator=generator, dtype=torch.float64)
        found = [metrics.mean_metric(x[:, 0]), metrics.mean_metric(y[:, 0])]
        draws["mean"].append((found[0].value, found[0].error))
        draws["difference"].append(found[1].minus(found[0]))
        if repeat < 60:
            frechet = metrics.frechet_metric(x, reference, seed=repeat)
            draws["frechet"].append((frechet.value, frechet.error))
    for name, found in draws.items():
        values, errors = torch.tensor(found, dtype=torch.float64).T
        assert errors.mean() == pytest.approx(values.std().item(), rel=0.2), name


def test_a_frechet_difference_of_rows_from_the_same_noise_is_paired():
    features = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = metrics.Gaussian.of(
        torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    one, two = (metrics.frechet_metric(x, reference, seed=0) for x in (features, features + 0.01))
    assert two.minus(one)[1] < 0.3 * math.hypot(one.error, two.error)
    assert one.minus(one) == (0, 0)


def test_coverage_counts_distinct_right_images():
    class Judge:
        kinds = staticmethod(lambda prompt: 4)

    nearest = torch.tensor([0, 0, -1, 1, 1, 1, 0, 2, 3])  # three repetitions of three
    found = metrics.coverage_metric(nearest, ["a"] * 9, Judge)["coverage"]
    assert found.value == pytest.approx((1 / 4 + 1 / 4 + 3 / 4) / 3)
    assert metrics.coverage_metric(nearest[:2], ["a"] * 2, Judge) == {}


def test_diversity_is_the_distance_of_images_of_one_prompt():
    thumbnails = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    thumbnails[1] = 255
    found = metrics.diversity_metric(thumbnails, ["a", "a", "b", "b"])["diversity"]
    assert found.value == pytest.approx(0.5)  # 1 and 0
    assert metrics.diversity_metric(thumbnails, ["a", "b", "c", "d"]) == {}


def test_gauges_of_known_images():
    red, grey = torch.zeros(3, 8, 8), torch.full((3, 8, 8), 0.5)
    red[0] = 1
    found = Gauges()([red, grey], {"whole": torch.stack([red, grey])}, ["", ""])
    assert found["saturation"].tolist() == [1, 0]
    assert found["mean"].tolist() == [pytest.approx(1 / 3), 0.5]
    assert found["deviation"][1] == 0


# ----------------------------------------------------------------------------- protocols


def test_protocols_cut_and_resize_as_their_sources_do():
    """By hand with PIL: DMD2's CenterCropLongEdge and Lanczos; its 299x299 crop; clean-fid's float
    bicubic, channel by channel."""
    wide = torch.rand(3, 40, 71, generator=torch.Generator().manual_seed(0))
    pixels = np.asarray(protocols.to_pil(wide))
    views = {"whole": (protocols.square, 16), "patch": (protocols.patch, 20)}
    found = protocols.views_of([wide], protocols.Protocol(1, None, views, "clean", ""))
    # (71 - 40) / 2 = 15.5, which rounds to 16
    by_hand = Image.fromarray(pixels[:, 16:56]).resize((16, 16), Image.Resampling.LANCZOS)
    by_hand = np.asarray(by_hand)
    assert np.array_equal(protocols.to_pil(found["whole"][0]), by_hand)
    assert np.array_equal(protocols.to_pil(found["patch"][0]), pixels[10:30, 26:46])
    # An image that is smaller than the patch gives one of the same size as the others.
    assert protocols.patch(protocols.to_pil(wide), 60).size == (60, 60)
    clean = protocols.clean_resize(found["whole"])
    channel = Image.fromarray(by_hand[..., 1].astype(np.float32), "F")
    channel = np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
    assert clean.shape == (1, 3, 299, 299) and np.array_equal(clean[0, 1], channel)


def test_images_of_several_sizes_are_refused_unless_something_makes_them_alike():
    several = [torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)]
    says = one_line(protocols.views_of, several, PROTOCOLS["as-is"])
    assert "several sizes, such as 8x8 and 8x9" in says
    others = [torch.zeros(3, 64, 64), torch.zeros(3, 32, 32)]
    says = one_line(protocols.views_of, others, PROTOCOLS["imagenet64-50k"])
    assert "an image has 32x32 pixels; this protocol compares images of 64x64" in says
    assert protocols.views_of(several, PROTOCOLS["coco30k-256"])["whole"].shape == (2, 3, 256, 256)


# --------------------------------------------------------------------- Inception and torch-fidelity


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The network with small random weights, as a file."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.manual_seed(0)

    class Random(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return None

    torch.save({}, path)
    network = Random("random", ["2048"], feature_extractor_weights_path=str(path))
    for module in network.modules():  # so that features are of size 1 and differ
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    network.fc.weight.mul_(20)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return write_images(folder / "a", 12, seed=0), write_images(folder / "b", 10, seed=1)


def test_numbers_are_those_of_torch_fidelity_s_own_command(inception, two_folders, tmp_path):
    a, b = two_folders
    command = "-m torch_fidelity.fidelity --cpu --json --silent --fid --isc --kid --prc"
    command += " --kid-subset-size 10 --batch-size 12 --no-cache --feature-extractor"
    command += f" inception-v3-compat --feature-extractor-weights-path {inception}"
    words = [sys.executable, *command.split(), "--input1", a, "--input2", b]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    library = json.loads(printed)
    flags = f"--images {a} --reference {b} --inception {inception} --device cpu"
    own = evaluated(flags, tmp_path)[str(a)]
    assert own["fid"]["value"] > 1 and own["is"]["value"] > 1.001  # numbers that could be wrong
    # The library's root of a covariance of rank 11 is good to as much.
    fid = library["frechet_inception_distance"]
    assert own["fid"]["value"] == pytest.approx(fid, rel=1e-3)
    names = {"kid": "kernel_inception_distance_mean", "is": "inception_score_mean"}
    for name, theirs in (names | {"precision": "precision", "recall": "recall"}).items():
        assert own[name]["value"] == pytest.approx(library[theirs], rel=1e-4, abs=1e-9), name
    warnings = " ".join(report(tmp_path)["warnings"])
    assert "not the published ones" in warnings
    assert "a fid of 12 images, fewer than features" in warnings


def test_statistics_of_a_reference_give_what_its_folder_gives(inception, two_folders, tmp_path):
    a, b = two_folders
    flags = f"--inception {inception} --device cpu"
    write = f"--write-reference {tmp_path}/b.npz --reference {b}"
    call(evaluation, f"{write} {flags} --out {tmp_path}/write")

    def against(reference, name):
        found = evaluated(f"--images {a} --reference {reference} {flags}", tmp_path / name)
        return found[str(a)]

    folder, file = against(b, "folder"), against(tmp_path / "b.npz", "file")
    for name, metric in folder.items():
        for number in ("value", "standard_error"):
            expected = pytest.approx(file[name][number] or 0, rel=1e-6)
            assert (metric[number] or 0) == expected, name

    with np.load(tmp_path / "b.npz") as archive:  # EDM's format: mu and sigma alone
        np.savez(tmp_path / "edm.npz", mu=archive["mu"], sigma=archive["sigma"])
    own = against(tmp_path / "edm.npz", "edm")
    assert own["fid"] == file["fid"] and "kid" not in own
    warnings = " ".join(report(tmp_path / "edm")["warnings"])
    assert "does not hold what kid, precision and recall need" in warnings

    np.savez(tmp_path / "vgg.npz", mu=np.zeros(4096), sigma=np.eye(4096))
    other = inception.with_name("other.pth")
    weights = torch.load(inception, weights_only=True)
    for tensor in weights.values():
        if tensor.is_floating_point():
            tensor += 1e-3
    torch.save(weights, other)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:5000])
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(2))
    for reference, network, says in (
        ("vgg.npz", inception, "of another feature extractor: mu (4096,)"),
        ("b.npz", other, "made in another way: inception was"),
        ("cut.npz", inception, "no .npz with mu and sigma"),
        ("pickled.npz", inception, "no .npz with mu and sigma"),
        ("absent.npz", inception, "there is no such file"),
    ):
        bad = f"--images {a} --reference {tmp_path}/{reference} --inception {network} --device cpu"
        assert says in refused(evaluation, f"{bad} --out {tmp_path}/bad")
        assert not (tmp_path / "bad" / "metrics.json").exists()


def test_weights_that_are_missing_or_hold_code_are_one_line(two_folders, tmp_path):
    pytest.importorskip("torch_fidelity")
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "trap.pth")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    for name, says in (
        ("absent.pth", "curl -LO https://"),
        ("trap.pth", "holds more than weights"),
        ("other.pth", "is no network of torch-fidelity"),
    ):
        flags = f"--images {two_folders[0]} --inception {tmp_path}/{name} --out {tmp_path}/out"
        assert says in refused(evaluation, flags)
    assert not (tmp_path / "sprung").exists()


def test_patch_fid_reads_the_middle_of_the_image_as_it_was_drawn(inception, tmp_path):
    """coco10k-512, with a frame around the same middle: fid changes, patch fid does not."""
    write_images(tmp_path / "a", 4, size=320)
    (tmp_path / "b").mkdir()
    for file in (tmp_path / "a").iterdir():
        framed = Image.new("RGB", (320, 320), "red")
        framed.paste(Image.open(file).crop((10, 10, 309, 309)), (10, 10))
        framed.save(tmp_path / "b" / file.name)
    flags = f"--protocol coco10k-512 --inception {inception} --device cpu"
    flags += f" --images {tmp_path}/a --reference {tmp_path}/b"
    own = evaluated(flags, tmp_path / "out")[str(tmp_path / "a")]
    assert own["patch fid"]["value"] == pytest.approx(0, abs=1e-4)
    assert own["fid"]["value"] > 100 * abs(own["patch fid"]["value"]) + 0.01
    warnings = " ".join(report(tmp_path / "out")["warnings"])
    assert "4 of the 10,000 images of coco10k-512" in warnings
    assert "published: SDXL" in (tmp_path / "out" / "table.txt").read_text()


@pytest.mark.slow
def test_two_processes_write_the_reference_of_one_and_say_what_it_lacks(
    inception, two_folders, tmp_path, capsys
):
    flags = f"--protocol coco30k-256 --inception {inception} --device cpu"
    reference = f"--reference {two_folders[1]} --write-reference {tmp_path}"
    call(evaluation, f"{flags} {reference}/one.npz --out {tmp_path}/one")
    printed = capsys.readouterr().out
    assert "WARNING: the reference has 10 images; that of coco30k-256 has 40,504" in printed
    words = f"{flags} {reference}/two.npz --out {tmp_path}/two --batch-size 50".split()
    statuses, printed = faults.on_ranks(evaluation.main, tmp_path / "log", *words)
    assert statuses == [0, 0], printed
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert str(one["about"]) == str(two["about"])
        for name in ("mu", "sigma", "features"):  # the two have a thread each
            np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-4)
    again = f"{flags} --images {two_folders[0]} --reference {tmp_path}/one.npz"
    call(evaluation, f"{again} --out {tmp_path}/out")
    warnings = " ".join(report(tmp_path / "out")["warnings"])
    assert "that of coco30k-256 has 40,504" in warnings


# ----------------------------------------------------------------------------- CLIP and PickScore


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP model with small random weights and the embedded teacher's words."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    words = data.EMBEDDED["world"] / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(words, model_max_length=24)
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(
        vocab_size=len(tokenizer),
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    vision = dict(image_size=32, patch_size=8)
    config = CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=8)
    edges = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (CLIPModel(config), tokenizer, CLIPImageProcessorPil(**edges)):
        part.save_pretrained(folder)
    return folder


def clip_by_hand(folder, image, tokens):
    """(the cosine of an image of 32x32 pixels and of tokens, CLIP's scale)"""
    network = CLIPModel.from_pretrained(folder).eval()
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
    deviation = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
    pixels = (np.asarray(image).astype(np.float32) / 255 - mean) / deviation
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    end = tokens.index(network.config.text_config.eos_token_id)
    with torch.no_grad():
        pooled = network.vision_model(pixel_values=pixels).pooler_output
        image = network.visual_projection(pooled)[0]
        hidden = network.text_model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        text = network.text_projection(hidden[end])
    return (image @ text / image.norm() / text.norm()).item(), network.logit_scale.exp().item()


@pytest.mark.parametrize(
    "prompt", ["cat", "cat face with tears of joy and a red heart and a crescent moon and a rocket"]
)
def test_clip_score_and_pickscore_equal_a_hand_computation(clip_folder, prompt):
    """The longer prompt is cut, and its last token is the end token again."""
    tokenizer, length = CLIPTokenizer.from_pretrained(clip_folder), 24
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    words = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    cut = [start, *words(prompt)[: length - 2], end]
    image = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
    pil, two, prompts = protocols.to_pil(image), [image, image], ["cat face", prompt]
    tokens = [start, *words("A photo depicts "), *cut[1:]][:length]
    tokens[-1] = end
    square = pil.crop((5, 0, 45, 40)).resize((256, 256), Image.Resampling.LANCZOS)
    square = square.resize((32, 32), Image.Resampling.BICUBIC)
    cosine, scale = clip_by_hand(clip_folder, square, tokens)
    found = Clip(str(clip_folder), "clip", "cpu")(two, {}, prompts)["clip"]
    assert found[1].item() == pytest.approx(cosine, abs=1e-5) and found[0] != found[1]

    # PickScore: no prefix, the shorter side to 32, then the middle.
    middle = pil.resize((40, 32), Image.Resampling.BICUBIC).crop((4, 0, 36, 32))
    cosine, scale = clip_by_hand(clip_folder, middle, cut)
    found = PickScore(str(clip_folder), "pickscore", "cpu")(two, {}, prompts)["pickscore"]
    assert found[1].item() == pytest.approx(scale * cosine, abs=1e-4 * scale)


def test_text_scores_in_the_table_and_captions_of_folders(clip_folder, tmp_path):
    folder = write_images(tmp_path / "captioned", 4)
    for i in range(4):
        (folder / f"{i:03d}.txt").write_text("cat face")
    flags = f"--images {folder} --clip {clip_folder} --pickscore {clip_folder}"
    own = evaluated(flags, tmp_path / "out")[str(folder)]
    judge = Clip(str(clip_folder), "clip", "cpu")
    images = [protocols.from_pil(Image.open(file)) for file in sorted(folder.glob("*.png"))]
    by_hand = judge(images, {}, ["cat face"] * 4)["clip"].mean().item()
    assert report(tmp_path / "out")["images"] == {str(folder): 4}
    assert own["clip tiny-clip"]["value"] == pytest.approx(by_hand, abs=1e-6)
    assert own["pickscore"]["standard_error"] > 0


@pytest.mark.parametrize(
    "flags, says",
    [
        (
            "--clip no/such-clip-model",
            "hf download no/such-clip-model --local-dir DIR, then --clip",
        ),
        ("--pickscore /absent", "--pickscore /absent is not on this machine"),
        ("--image-reward", "--image-reward"),
    ],
)
def test_models_that_are_not_here_are_one_line(flags, says, tmp_path, capsys, monkeypatch):
    # Without this it tries for a minute.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    images = write_images(tmp_path / "some", 2)
    assert says in refused(evaluation, f"--images {images} {flags} --out {tmp_path}/out")
    assert not capsys.readouterr().err


# ----------------------------------------------------------------------------- whole evaluations


def test_class_conditional_students_are_compared_from_the_same_noise(class_runs, tmp_path):
    one, two = class_runs
    shutil.copytree(one, tmp_path / "copy")
    flags = f"--compare {one} {two} {tmp_path}/copy {CLASSES}"
    own = evaluated(flags, tmp_path / "out")
    teacher = "teacher, 2 steps, heun, 3 passes, guidance 1"
    labels = ["0, 1 step", "1, 1 step", "copy, 1 step"]
    assert list(own) == [teacher, *labels, "real images"]
    assert own[labels[0]] == own[labels[2]] != own[labels[1]]
    found = report(tmp_path / "out")
    assert found["versions"]["torch"] == torch.__version__ and found["seed"] == 0
    assert found["weights"][labels[0]] == found["weights"][labels[2]]
    assert {"0", "1"} <= set(found["health"]) and found["protocol"] == "emoji-classes"
    difference = own[labels[0]]["mean"]["value"] - own[teacher]["mean"]["value"]
    said = found["differences_to_first"][0]["mean"]["value"]
    assert said == pytest.approx(difference, abs=1e-9)
    assert "95 % intervals" in (tmp_path / "out" / "table.txt").read_text()


def test_an_evaluation_goes_on_where_it_was_and_mends_damaged_parts(class_runs, tmp_path):
    flags = f"--student {class_runs[0]} {CLASSES}"
    whole = evaluated(flags, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    parts = sorted((tmp_path / "parts" / "parts").rglob("*.safetensors"))
    times = {path: path.stat().st_mtime_ns for path in parts}
    parts[0].unlink()
    content = bytearray(parts[4].read_bytes())
    content[-1] ^= 1
    parts[4].write_bytes(content)
    parts[7].write_bytes(parts[7].read_bytes()[:50])
    assert evaluated(flags, tmp_path / "parts") == whole
    made_again = [i for i, path in enumerate(parts) if path.stat().st_mtime_ns != times[path]]
    assert made_again == [0, 4, 7]


@pytest.mark.slow
def test_two_processes_get_the_numbers_of_one(class_runs, tmp_path):
    """To rounding: a process under torchrun has one thread."""
    flags = f"--student {class_runs[0]} {CLASSES}"
    one = evaluated(flags, tmp_path / "one")
    words = f"{flags} --out {tmp_path}/two".split()
    statuses, printed = faults.on_ranks(evaluation.main, tmp_path / "log", *words)
    assert statuses == [0, 0], printed
    two = rows(tmp_path / "two")
    assert one.keys() == two.keys() and report(tmp_path / "two")["processes"] == 2
    for label in one:
        for name, metric in one[label].items():
            expected = pytest.approx(metric["value"], rel=1e-3, abs=1e-4)
            assert two[label][name]["value"] == expected, (label, name)


def test_other_settings_draw_other_images_and_keep_the_first_ones(class_runs, tmp_path):
    flags = f"--student {class_runs[0]} {CLASSES}"
    first = evaluated(flags, tmp_path)
    before = len(list((tmp_path / "parts").iterdir()))
    assert evaluated(f"{flags} --seed 1", tmp_path) != first
    assert len(list((tmp_path / "parts").iterdir())) > before
    assert evaluated(flags, tmp_path) == first


def test_a_checkpoint_is_a_student(class_runs, tmp_path):
    model = models.load_model(data.model_path("emoji-classes"))
    run = shutil.copytree(class_runs[0], tmp_path / "run")
    last, earlier = run / "checkpoints" / "000004", run / "checkpoints" / "000002"
    parts = (students.load_student(folder, model) for folder in (run, last, earlier))
    expected, same, other = (list(student.parameters()) for student in parts)
    assert all(map(torch.equal, same, expected)) and not all(map(torch.equal, other, expected))
    file = next(last.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert "is damaged" in one_line(students.load_student, last, model)


def test_images_of_no_numbers_are_one_line(class_runs, tmp_path):
    shutil.copytree(class_runs[0], tmp_path / "run")
    file = tmp_path / "run" / "student" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.weight"] = torch.full_like(weights["conv_out.weight"], 3e38)
    save_file(weights, file)
    flags = f"--student {tmp_path}/run {CLASSES} --no-teacher --out {tmp_path}/out"
    says = refused(evaluation, flags, status=1)
    assert "student, 1 step: the samples hold NaN or infinity" in says
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_prompts_of_a_class_conditional_model_are_labels_or_names(tmp_path):
    (tmp_path / "names.txt").write_text("cat\nFace\n7\n")
    (tmp_path / "bad.txt").write_text("12\n")
    flags = "--model emoji-classes --teacher-only --teacher-steps 2 --steps 1 --samples 6"
    flags += f" --device cpu --out {tmp_path}/out --prompts {tmp_path}"
    assert "'12' is no prompt of" in refused(evaluation, f"{flags}/bad.txt")
    assert not (tmp_path / "out" / "metrics.json").exists()
    call(evaluation, f"{flags}/names.txt")


def test_a_text_model_with_prompts_of_a_file(clip_folder, tmp_path):
    """A model that is not embedded: as-is, repeated prompts for diversity, and CLIP."""
    shutil.copytree(data.EMBEDDED["world"], tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("cat face\ntomato on blue\nrainbow\n")
    flags = f"--model {tmp_path}/model --teacher-only --teacher-steps 2 --device cpu"
    flags += f" --out {tmp_path}/out"
    assert "needs --prompts FILE" in refused(evaluation, flags)
    call(evaluation, f"{flags} --prompts {tmp_path}/prompts.txt --clip {clip_folder}")
    found = report(tmp_path / "out")
    assert (found["samples"], found["repeated_prompts"]) == (3, 24)
    assert {"clip tiny-clip", "diversity"} <= found["rows"][0].keys()


def test_names_of_classes(tmp_path):
    model = models.load_model(data.model_path("emoji-classes"))
    assert model.encode(["cat", "7", ""])["class_labels"].tolist() == [7, 7, 10]
    assert model.caption("7") == "7 cat"
    assert "Did you mean 'heart'" in one_line(model.encode, ["hart"])
    names = edm.label_names(tmp_path, 1001, ASSETS)
    assert names[207] == "golden retriever" and names[388] == "giant panda"
    assert len(set(names)) == 1000
    (tmp_path / "labels.txt").write_text("a\nb\n")
    says = one_line(edm.label_names, tmp_path, 11, ASSETS)
    assert "has 2 names for 10 labels" in says


BAD = [
    (
        "--protocol imagenet64-50k --model emoji-classes --teacher-only",
        "of images of 64x64; .* draws 16x16",
    ),
    ("--protocol emoji-classes --teacher-only", "of images of 16x16"),
    ("--protocol imagenet64-50k --teacher-only", "is of labels, which .* does not take"),
    ("--protocol as-is --teacher-only", "needs --prompts FILE"),
    ("--student a --compare b", "use one"),
    ("--write-reference x.npz", "needs --reference FOLDER"),
    ("--sampler heun --teacher-only", "--sampler heun is for EDM's networks"),
    ("--images absent", "there is no folder of images absent"),
    (
        f"--teacher-only --no-teacher --model {ASSETS}/edm/edm_tiny.pkl",
        "no row is left to judge",
    ),
    ("--write-reference x.npz --reference y --images z", "judges nothing"),
    (f"--images {ASSETS} --reference absent.npz", "--reference absent.npz: there is no such file"),
    (f"--images {ASSETS} {ASSETS}", "two rows of the table are .*assets"),
    (
        "--model emoji-classes --teacher-only --clip vit-b/32",
        "by captions; the prompts of .* are labels",
    ),
]


@pytest.mark.parametrize("flags, says", BAD)
def test_bad_input(flags, says, tmp_path):
    assert re.search(says, refused(evaluation, f"{flags} --out {tmp_path}/out"))
    assert not (tmp_path / "out").exists()


def test_the_embedded_set_judges_images_with_captions_only(tmp_path):
    folder = write_images(tmp_path / "some", 2, size=64)
    flags = f"--protocol world --images {folder}"
    says = refused(evaluation, f"{flags} --out {tmp_path}/out")
    assert "the embedded world has no scene ''" in says
    for i, caption in enumerate(("cat face", "guitar above rainbow")):
        own = WorldJudge().real([caption], seed=i)[0]
        protocols.to_pil(own).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption)
    assert evaluated(flags, tmp_path / "out")[str(folder)]["alignment"]["value"] == 1


def test_images_without_captions_are_not_judged_by_them(clip_folder, tmp_path):
    folder = write_images(tmp_path / "some", 3)
    flags = f"--images {folder} --clip {clip_folder} --out {tmp_path}/out"
    says = refused(evaluation, flags)
    assert "--clip judges images by their captions, and 3 of 3 in" in says
    assert not (tmp_path / "out").exists()


def test_a_teacher_is_the_same_whatever_it_is_called(class_runs, tmp_path):
    shutil.copytree(class_runs[0], tmp_path / "other")
    changes = {"model": str(data.EMBEDDED["emoji-classes"]), "guidance": 2.0}
    edit_json(tmp_path / "other" / "config.json", **changes)
    flags = f"--compare {class_runs[0]} {tmp_path}/other --no-teacher"
    flags += f" {CLASSES.removeprefix('--model emoji-classes')}"
    own = evaluated(flags, tmp_path / "out")
    assert list(own) == ["0, 1 step", "other, 1 step", "real images"]
    warnings = " ".join(report(tmp_path / "out")["warnings"])
    assert "distilled with different guidance: 0 1.0, other 2.0" in warnings


def test_students_of_different_teachers_need_one_to_be_named(class_runs, tmp_path):
    shutil.copytree(class_runs[0], tmp_path / "other")
    edit_json(tmp_path / "other" / "config.json", model="sd15")
    flags = f"--compare {class_runs[0]} {tmp_path}/other --out {tmp_path}/out"
    assert "the students have different teachers" in refused(evaluation, flags)


def test_corrupt_images_are_named_and_counted(tmp_path):
    folder = write_images(tmp_path / "some", 150)
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:40])
    flags = f"--images {folder}"
    mean = evaluated(flags, tmp_path / "out")[str(folder)]["mean"]["value"]
    found = report(tmp_path / "out")
    assert list(found["left_out"]) == [str(folder / "003.png")]
    assert "1 of 150 images" in " ".join(found["warnings"])
    assert "WARNING: 1 of 150 images" in (tmp_path / "out" / "table.txt").read_text()
    Image.new("RGB", (32, 32)).save(folder / "005.png")  # another image under the name is noticed
    assert evaluated(flags, tmp_path / "out")[str(folder)]["mean"]["value"] < mean
    (folder / "004.png").write_text("no image")
    says = refused(evaluation, f"{flags} --out {tmp_path}/bad")
    assert "2 of the 150 images in" in says
    assert not (tmp_path / "bad" / "metrics.json").exists()


# ----------------------------------------------------------------------- samplers of EDM's networks


def test_stochastic_sampler_is_edm_s():
    """Algorithm 2 of 2206.00364 as it is printed, with the paper's numbers for ImageNet-64, on the
    embedded teacher."""
    low, high = sample.stochastic_levels(256).sigma.split(256)
    assert high.max() == 80  # beyond S_max nothing is added; below it 40 / 256
    ratio = high / low
    assert (ratio[ratio > 1] - (1 + 40 / 256)).abs().max() < 1e-5
    assert 1 < (ratio == 1).sum() < 256
    model, steps = models.load_model(data.model_path("emoji-classes")), 6
    noise, cond = sample.column_noise(model, 2, steps, 0), model.encode(["0", "9"])
    sigma = [*models.edm_schedule(steps).sigma.double().flip(0), torch.tensor(0.0)]
    D = edm_denoiser(model, cond)
    with torch.no_grad():
        x = noise[0] * 80
        for i in range(steps):
            gamma = min(40 / steps, math.sqrt(2) - 1) if 0.05 <= sigma[i] <= 50 else 0
            raised = sigma[i] * (1 + gamma)
            eps = 1.003 * noise[min(i + 1, steps - 1)]
            x = (x + (raised**2 - sigma[i] ** 2).sqrt() * eps).float()
            d = (x - D(x, raised)) / raised
            x_next = x + (sigma[i + 1] - raised) * d
            if sigma[i + 1] > 0:
                d_next = (x_next - D(x_next.float(), sigma[i + 1])) / sigma[i + 1]
                x_next = x + (sigma[i + 1] - raised) * (d + d_next) / 2
            x = x_next.float()
    row = sample.TeacherSampler(model, steps, 1.0, "stochastic")
    assert row.noises == steps
    torch.testing.assert_close(row.draw(noise, cond), x, rtol=1e-3, atol=1e-3)
