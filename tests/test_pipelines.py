"""Stable Diffusion 1.5 and XL: tiny pipelines of the real classes, written to disk in the real
format and read back through the real code, beside plain diffusers."""

import json
import pickle
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, KarrasVeScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import models
import sample
import train
from lab import faults
from models import ASSETS
from support import benchmark, costs, export, students
from support.cli import UserError
from support.families import UNET_LORA_LAYERS
from support.networks import trained
from tests.tiny import (
    COMMON,
    PROMPTS,
    SD15,
    SMALL,
    Trap,
    call,
    draw_with_lcm,
    keep_gradients,
    make_student,
    one_line,
    open_in_diffusers,
    original_file,
    refused,
    run_card,
    write_pipeline,
    write_tiny_vae,
)

RECIPES = ASSETS.parent / "recipes"
NAMES = ("sd15", "sdxl")
FOUR = [999, 749, 499, 249]


@pytest.fixture(scope="module")
def runs(folders, prompts, tmp_path_factory):
    """A finished run of each kind of pipeline; not to be changed."""
    place = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        flags = f"--model {folders[name]} --prompts {prompts} --gan-weight 0 {SMALL}"
        flags += " --student-steps 1 --first-timestep 399 --guidance 8"
        call(train, flags, "--out", place / name)
    return place


# ----------------------------------------------------------------------------- text


@pytest.mark.parametrize("name", NAMES)
def test_encodings_are_those_of_diffusers(name, folders):
    model, pipe = models.load_model(folders[name]), open_in_diffusers(folders[name])
    cond = model.encode(PROMPTS)
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    expected = pipe.encode_prompt(PROMPTS, device="cpu", **options)
    text, no_text = cond["encoder_hidden_states"], model.uncond["encoder_hidden_states"]
    torch.testing.assert_close(text, expected[0])
    torch.testing.assert_close(no_text.expand_as(expected[1]), expected[1])
    if name == "sdxl":
        torch.testing.assert_close(cond["text_embeds"], expected[2])
        assert not no_text.any() and not model.uncond["text_embeds"].any()
        ids = pipe._get_add_time_ids(
            (16, 16), (0, 0), (16, 16), torch.float32, text_encoder_projection_dim=48
        )
        assert torch.equal(cond["time_ids"], ids.expand(4, -1))
        assert torch.equal(model.uncond["time_ids"], ids)
    half = models.load_model(folders[name], dtype=torch.bfloat16).encode(PROMPTS)
    for key, value in half.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, cond[key], atol=0.1, rtol=0.1)


def test_sdxl_may_encode_the_empty_prompt(folders, tmp_path):
    """Where its configuration does not ask for zeros."""
    shutil.copytree(folders["sdxl"], tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    config = json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False}
    index.write_text(json.dumps(config))
    model, pipe = models.load_model(tmp_path / "model"), open_in_diffusers(tmp_path / "model")
    _, text, _, pooled = pipe.encode_prompt("a", device="cpu", do_classifier_free_guidance=True)
    torch.testing.assert_close(model.uncond["encoder_hidden_states"], text)
    torch.testing.assert_close(model.uncond["text_embeds"], pooled)
    assert text.any() and pooled.any()


# ----------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_s_sampler_is_ddim_of_diffusers(name, guidance, folders):
    model, pipe = models.load_model(folders[name]), open_in_diffusers(folders[name])
    options = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)
    noise = sample.column_noise(model, 4, 1, 0)
    x = sample.TeacherSampler(model, 5, guidance).draw(noise, model.encode(PROMPTS))
    options = {"num_inference_steps": 5, "guidance_scale": guidance, "latents": noise[0]}
    expected = pipe(PROMPTS, output_type="latent", **options).images
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)
    images = pipe(PROMPTS, output_type="pt", **options).images
    torch.testing.assert_close(model.decode(x), images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_in_plain_diffusers_draws_what_our_sampler_draws(
    name, folders, tmp_path, monkeypatch
):
    make_student(folders[name]).save_pretrained(tmp_path)
    model = models.load_model(folders[name])
    student = students.load_student(tmp_path, model)
    pipe = open_in_diffusers(folders[name], unet=UNet2DConditionModel.from_pretrained(tmp_path))
    for timesteps in (FOUR, [999, 499], [999], [399]):
        noise = sample.column_noise(model, 4, len(timesteps), 0)
        x = sample.StudentSampler(student, timesteps).draw(noise, model.encode(PROMPTS))
        expected = draw_with_lcm(pipe, PROMPTS, noise, timesteps, monkeypatch)
        torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)


def check_v_prediction(model, pipe):
    """Rescaled betas too, which end in pure noise."""
    assert model.prediction == "v_prediction" and model.schedule.alpha[-1] < 1e-3
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    options |= {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)
    noise = sample.column_noise(model, 2, 1, 0)
    x = sample.TeacherSampler(model, 4, 1.0).draw(noise, model.encode(PROMPTS[:2]))
    options = {"num_inference_steps": 4, "guidance_scale": 1, "output_type": "latent"}
    expected = pipe(PROMPTS[:2], latents=noise[0], **options).images
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)


def test_v_prediction_and_zero_terminal_snr_follow_the_scheduler(tmp_path):
    scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    folder = write_pipeline(tmp_path / "v", "sdxl", scheduler=scheduler)
    check_v_prediction(models.load_model(folder), open_in_diffusers(folder))


# ----------------------------------------------------------------------------- what is opened


def test_one_file_says_how_it_was_trained_and_takes_another_s_configuration(folders, tmp_path):
    original_file(folders["sd15"], tmp_path / "plain.safetensors")
    original_file(folders["sd15"], tmp_path / "v.safetensors", "v_pred", "ztsnr")
    options = {"vae": "none", "config": str(folders["sd15"])}  # no decoder in these files
    plain = models.load_model(tmp_path / "plain.safetensors", **options)
    whole = models.load_model(folders["sd15"])
    x_t, cond = torch.randn(2, *whole.sample_shape), whole.encode(PROMPTS[:2])
    assert torch.equal(plain.denoiser(x_t, 500, cond), whole.denoiser(x_t, 500, cond))
    assert torch.equal(plain.encode(PROMPTS[:2])["encoder_hidden_states"], *cond.values())
    told = models.load_model(tmp_path / "v.safetensors", **options)
    check_v_prediction(told, open_in_diffusers(folders["sd15"]))


def test_one_file_offline_asks_for_a_configuration(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    original_file(folders["sd15"], tmp_path / "plain.safetensors")
    says = refused(train, f"--model {tmp_path}/plain.safetensors --out {tmp_path}/run")
    assert "its configuration cannot be fetched" in says and "--config DIR" in says
    flags = f"--model {tmp_path}/plain.safetensors --config {tmp_path}/absent"
    says = refused(train, f"{flags} --out {tmp_path}/run")
    assert says == f"--config {tmp_path}/absent: there is no such directory"


@pytest.mark.parametrize(
    "scheduler, says",
    [
        (DDIMScheduler(prediction_type="sample"), "prediction type 'sample'"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "zero terminal signal-to-noise"),
        (KarrasVeScheduler(), "no noise schedule is known for the scheduler KarrasVe"),
    ],
)
def test_unknown_schedulers_are_refused_by_name(scheduler, says):
    with pytest.raises(UserError, match=says):
        models.read_scheduler(scheduler, "model")


@pytest.mark.parametrize(
    "options, says",
    [
        ({"in_channels": 9}, "out_channels 4"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim 8"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
    ],
)
def test_networks_with_other_inputs_are_refused_by_name(options, says, tmp_path):
    with pytest.raises(UserError, match=says):
        models.load_model(write_pipeline(tmp_path, "sd15", **options))


def test_pipelines_of_other_classes_are_refused_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(UserError, match="is a WanPipeline; supported are StableDiffusionPipe"):
        models.load_model(tmp_path)


# ----------------------------------------------------------------------------- training


def prepared(folder, prompts, *flags):
    start = ["--batch-size", "4", "--fake-updates", "1", "--device", "cpu"]
    words = [*start, "--model", folder, "--prompts", prompts, *flags]
    args = train.parse_arguments([str(word) for word in words])
    return *train.prepare(args), args


def check_same_gradients(folder, prompts, flags, more, monkeypatch):
    """Of student and fake score, with and without more flags; metrics too."""
    found, metrics = keep_gradients(monkeypatch), []
    for words in (flags, [*flags, *more]):
        nets, sources, args = prepared(folder, prompts, *words)
        metrics.append(train.iterate(nets, train.draw_batch(nets, sources, 0, args), 0, args))
    for a, b in ((found[0], found[2]), (found[1], found[3])):
        largest = max(gradient.abs().max() for gradient in a.values())
        assert a.keys() == b.keys() and largest > 0
        for name in a:
            torch.testing.assert_close(b[name], a[name], atol=1e-4 * largest, rtol=0)
    for name, value in metrics[0].items():
        torch.testing.assert_close(metrics[1][name], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "name, variant, size", [("sd15", "fdistill", 3), ("sdxl", "dmd2", 1), ("sdxl", "decoupled", 2)]
)
def test_micro_batches_have_the_gradients_of_the_whole_batch(
    name, variant, size, folders, prompts, images, monkeypatch
):
    flags = ["--variant", variant, "--gan-weight", 0.5, "--real", images]
    more = ["--micro-batch", size]
    check_same_gradients(folders[name], prompts, flags, more, monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_changes_nothing_but_memory(
    name, folders, prompts, images, monkeypatch
):
    flags, more = ["--gan-weight", 0.5, "--real", images], ["--activation-checkpointing"]
    check_same_gradients(folders[name], prompts, flags, more, monkeypatch)
    nets, _, _ = prepared(folders[name], prompts, "--gan-weight", 0, *more)
    assert nets.student.network.is_gradient_checkpointing
    assert nets.fake_score.denoiser.network.is_gradient_checkpointing


@pytest.mark.parametrize("name", NAMES)
def test_passes_are_in_bfloat16_and_x0_and_what_is_kept_in_float32(name, folders, prompts):
    flags = ["--gan-weight", 0, "--dtype", "bf16"]
    nets, sources, args = prepared(folders[name], prompts, *flags)
    seen = {}

    def watch(module, *key):
        def note(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            seen.setdefault(key, set()).add(output.dtype)

        module.register_forward_hook(note)

    parts = {"teacher": nets.teacher, "student": nets.student, "fake": nets.fake_score.denoiser}
    for part, denoiser in parts.items():
        kinds = {type(module).__name__: module for module in denoiser.modules()}
        watch(denoiser, part, "x0")
        watch(denoiser.network.conv_in, part, "convolution")
        watch(kinds["Attention"].to_q, part, "projection")
    for encoder in nets.model.text_encoders:
        layers = [module for module in encoder.modules() if type(module).__name__ == "CLIPMLP"]
        watch(layers[-1], "text", "layer")
    train.iterate(nets, train.draw_batch(nets, sources, 0, args), 0, args)
    for key, dtypes in seen.items():
        assert dtypes == {torch.float32 if key[1] == "x0" else torch.bfloat16}, key
    assert len(seen) == 10
    assert {p.dtype for p in nets.teacher.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in nets.teacher.parameters())
    assert {tensor.dtype for tensor in nets.tensors().values()} == {torch.float32}


def test_no_average_takes_no_memory(folders, prompts):
    nets, _, _ = prepared(folders["sd15"], prompts, "--gan-weight", 0, "--ema", 0)
    assert nets.averaged_student is nets.student
    assert not any(name.startswith("averaged") for name in nets.tensors())


def test_a_run_without_a_decoder_and_with_a_small_one(folders, prompts, tmp_path):
    flags = f"--model {folders['sd15']} --prompts {prompts} --gan-weight 0 {SMALL}"
    flags += f" --encoder-device cpu --out {tmp_path}"
    call(train, f"{flags}/none --vae none")
    assert (tmp_path / "none" / "student").is_dir() and not (tmp_path / "none" / "images").exists()
    call(train, f"{flags}/small --vae {write_tiny_vae(tmp_path / 'vae')}")
    assert len(list((tmp_path / "small" / "images").glob("*.png"))) == 2


# ----------------------------------------------------------------------------- recipes


class Lpips(torch.nn.Module):
    """Stands in for lpips.LPIPS, whose VGG weights cannot be had here: the same call, a simple
    distance. What is tested is all that leads to it."""

    sizes = set()

    def __init__(self, net, verbose):
        super().__init__()
        assert net == "vgg" and not verbose

    def forward(self, a, b):
        assert a.requires_grad and not b.requires_grad and a.shape == b.shape
        self.sizes.add(tuple(a.shape[1:]))
        return (a - b).square().mean((1, 2, 3), keepdim=True)


def recipes():
    """All but two of them are slow."""
    names = []
    for path in sorted([*RECIPES.glob("sd15*.args"), *RECIPES.glob("sdxl*.args")]):
        quick = path.stem in ("sd15_1step_gan", "sdxl_1step_pretrain")
        names.append(path.stem if quick else pytest.param(path.stem, marks=pytest.mark.slow))
    return names


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_makes_two_iterations(
    recipe, folders, prompts, images, runs, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Lpips))
    text = (RECIPES / f"{recipe}.args").read_text()
    if "--lora" in text:
        pytest.importorskip("peft")
    folder, out = folders[recipe[:4]], tmp_path / "run"
    flags = f"--model {folder} --prompts {prompts} --out {out} {SMALL} --micro-batch 1"
    if "--real" in text:
        flags += f" --real {images}"
    if "--init" in text:
        flags += f" --init {runs / recipe[:4]}"
    if "--pairs" in text:
        made = f"--model {folder} --prompts {prompts} --count 4 --steps 2 --guidance 8"
        call(data, f"pairs {made} --out {tmp_path}/pairs")
        flags += f" --pairs {tmp_path}/pairs --vae {write_tiny_vae(tmp_path / 'vae')}"
    call(train, f"@{RECIPES}/{recipe}.args {flags}")
    assert (out / "student" / "README.md").is_file() and (out / "images" / "000002.png").is_file()
    if "--regression lpips" in text:
        assert Lpips.sizes == {(3, 224, 224)}


# ----------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_student_is_what_load_lora_weights_reads(name, folders, lora_runs, monkeypatch):
    model, pipe = models.load_model(folders[name]), open_in_diffusers(folders[name])
    noise = sample.column_noise(model, 4, 4, 0)
    student = students.load_student(lora_runs / name, model)
    x = sample.StudentSampler(student, FOUR).draw(noise, model.encode(PROMPTS))
    before = draw_with_lcm(pipe, PROMPTS, noise, FOUR, monkeypatch)
    pipe.load_lora_weights(lora_runs / name / "student")
    drawn = draw_with_lcm(pipe, PROMPTS, noise, FOUR, monkeypatch)
    torch.testing.assert_close(x, drawn, rtol=1e-3, atol=1e-3)
    assert (drawn - before).abs().max() > 0.1


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_lora_run_keeps_its_lora_only_and_resumes_bit_for_bit(lora_runs, tmp_path):
    shutil.copytree(lora_runs / "sd15", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000004")
    call(train, f"--resume {tmp_path}/run")
    own, expected = faults.state_of(tmp_path / "run"), faults.state_of(lora_runs / "sd15")
    assert own.keys() == expected.keys()
    for name in own:
        assert torch.equal(own[name], expected[name])
        assert "lora_" in name or name.endswith("ratio_means")
    files = sorted(file.name for file in (tmp_path / "run" / "student").iterdir())
    assert files == ["README.md", students.LORA_FILE]


def test_a_lora_may_be_a_run_a_checkpoint_or_a_file_of_its_own_teacher(
    folders, lora_runs, tmp_path
):
    model, run = models.load_model(folders["sdxl"]), lora_runs / "sdxl"
    file = run / "student" / students.LORA_FILE
    expected = students.load_student(run, model)
    assert not same_weights(expected, model.denoiser)
    assert same_weights(students.load_student(file, model), expected)
    x_t, cond = torch.randn(2, *model.sample_shape), model.encode(PROMPTS[:2])
    checkpoint = run / "checkpoints" / "000004"
    of_checkpoint = students.load_student(checkpoint, model)
    torch.testing.assert_close(of_checkpoint(x_t, 500, cond), expected(x_t, 500, cond))
    call(export, f"--student {run} --out {tmp_path}/merged --dtype fp32")
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged")
    assert same_weights(merged, expected.network)
    with torch.no_grad():
        next(model.denoiser.parameters()).add_(1e-3)
    says = one_line(students.load_student, checkpoint, model)
    assert "holds a LoRA of another teacher" in says


def test_a_lora_shares_the_teacher_s_parameters(folders, prompts):
    pytest.importorskip("peft")
    flags = ["--gan-weight", 0, "--lora", 4, "--dtype", "bf16"]
    nets, sources, args = prepared(folders["sdxl"], prompts, *flags)
    teacher = {p.data_ptr() for p in nets.teacher.parameters()}
    for module in (nets.student, nets.fake_score, nets.averaged_student):
        frozen = [p for name, p in module.named_parameters() if "lora_" not in name]
        assert {p.data_ptr() for p in frozen} == teacher
        assert {p.dtype for p in frozen} == {torch.bfloat16}
        assert not any(p.requires_grad for p in frozen)
    assert {p.dtype for p in trained(nets.student).values()} == {torch.float32}
    before = {name: tensor.clone() for name, tensor in nets.teacher.state_dict().items()}
    train.iterate(nets, train.draw_batch(nets, sources, 0, args), 0, args)
    for name, tensor in nets.teacher.state_dict().items():
        assert torch.equal(tensor, before[name])
    layers = {name.split(".lora_")[0] for name in trained(nets.student)}
    for kind in UNET_LORA_LAYERS:
        assert any(layer.endswith(kind) for layer in layers), kind


def test_a_whole_fake_score_beside_a_lora_student_is_not_rounded(folders, prompts):
    pytest.importorskip("peft")
    flags = ["--gan-weight", 0, "--lora", 4, "--fake-lora", 0, "--dtype", "bf16"]
    nets, sources, args = prepared(folders["sd15"], prompts, *flags)
    assert all(p.requires_grad for p in nets.fake_score.parameters())
    unet = open_in_diffusers(folders["sd15"]).unet
    assert same_weights(nets.fake_score.denoiser.network, unet)  # float32
    train.iterate(nets, train.draw_batch(nets, sources, 0, args), 0, args)


# ----------------------------------------------------------------------------- students


def test_students_as_files(folders, tmp_path):
    model, unet = models.load_model(folders["sdxl"]), make_student(folders["sdxl"])
    half = {name: tensor.half() for name, tensor in unet.state_dict().items()}
    torch.save(unet.state_dict(), tmp_path / "pytorch_model.bin")
    save_file(half, tmp_path / "dmd2_sdxl_4step_unet_fp16.safetensors")
    unet.save_pretrained(tmp_path / "unet")
    for name in ("pytorch_model.bin", "unet"):
        assert same_weights(students.load_student(tmp_path / name, model).network, unet)
    unet.half()
    path = tmp_path / "dmd2_sdxl_4step_unet_fp16.safetensors"
    assert same_weights(students.load_student(path, model).network, unet.float())


def test_bad_student_files_are_one_line_and_execute_nothing(folders, tmp_path):
    whole = folders["sd15"] / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({"weight": Trap(tmp_path / "sprung")}, tmp_path / "trap.bin")
    torch.save([1, 2], tmp_path / "list.bin")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:5000])
    shutil.copy(whole, tmp_path / "other.safetensors")
    shutil.copytree(whole.parent, tmp_path / "other")
    says = {
        "trap.bin": "it holds more than weights",
        "list.bin": "no file of weights",
        "text.safetensors": "cannot be loaded",
        "cut.safetensors": "cannot be loaded",
        "other.safetensors": "does not fit",
        "other": "has another architecture",
        "absent.bin": "no student",
    }
    flags = f"--model {folders['sdxl']} --prompts cat --out {tmp_path}/x.png"
    for file, words in says.items():
        assert words in refused(sample, f"{flags} --student {tmp_path / file}"), file
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_exported_file_has_the_original_s_names(name, folders, tmp_path):
    """diffusers' own conversion gives the student back."""
    unet = make_student(folders[name])
    unet.save_pretrained(tmp_path / "student")
    flags = f"--student {tmp_path}/student --model {folders[name]} --dtype fp32"
    call(export, f"{flags} --out {tmp_path}/student.safetensors")
    exported = load_file(tmp_path / "student.safetensors")
    back = convert_ldm_unet_checkpoint(exported, dict(unet.config))
    assert back.keys() == unet.state_dict().keys()
    for key, tensor in unet.state_dict().items():
        assert torch.equal(back[key], tensor)
    for out, says in (("x.ckpt", "should end in"), ("student", "exists"), ("a/b", "no directory")):
        assert says in refused(export, f"{flags} --out {tmp_path / out}")


@pytest.mark.parametrize("name, count", [("SD1.5 512", 859_520_964), ("SDXL 1024", 2_567_463_684)])
def test_full_size_networks_have_the_published_size_and_the_original_s_names(name, count):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**costs.FULL_SIZE[name])
    assert sum(p.numel() for p in unet.parameters()) == count
    names = export.original_names(unet)
    assert len(set(names.values())) == len(names)
    swapped = {f"model.diffusion_model.{theirs}": ours for ours, theirs in names.items()}
    back = convert_ldm_unet_checkpoint(swapped, dict(unet.config))
    assert back == {name: name for name in unet.state_dict()}


def test_the_benchmark_times_iterations(folders, prompts, images, capsys):
    flags = f"--model {folders['sd15']} --prompts {prompts} --real {images} {SMALL}"
    call(benchmark, f"2 {flags} --variant decoupled --gan-weight 0.1 --fake-updates 1")
    printed = capsys.readouterr().out
    assert "times the bare network calls and AdamW" in printed and "waiting for data: " in printed
    assert "begin with the number of iterations" in refused(benchmark, "--seed 1 2")


def test_memory_of_full_size_networks(capsys):
    call(costs, "memory")
    printed = capsys.readouterr().out
    assert "| SDXL 1024, whole | 81.3 | 40.6 | 20.3 | 10.2 |" in printed
    assert "| SD3.5-medium | 2.24 | 71.0 | 39.0 | 7.0 | 10.4 | CLIP-L, CLIP-G, T5-XXL |" in printed


SETTINGS = [*costs.SETTINGS.values(), "--variant fdistill", "--variant decoupled --gan-weight 1"]


@pytest.mark.parametrize("flags", SETTINGS)
def test_an_iteration_computes_what_it_cannot_avoid_and_no_more(flags, folders, prompts, images):
    """Its FLOPs are those of the bare passes, in each of K iterations, for each of the student's
    steps that a batch may end at."""
    given = f"--model {folders['sd15']} --prompts {prompts} --real {images} {SMALL} {flags}"
    args = train.parse_arguments(given.split())
    nets, sources = train.prepare(args)
    for iteration in range(4):
        batch = train.draw_batch(nets, sources, iteration, args)
        counts = []
        for step in (train.iterate, costs.bare_iteration):
            with costs.Flops() as flops:
                step(nets, batch, iteration, args)
            counts.append(flops.total)
        assert counts[0] == counts[1] > 0


def test_flops_beside_dmd2_s_order_of_passes(monkeypatch, capsys):
    """Of a small network: less with the GAN, as much without."""
    config = SD15 | COMMON | {"sample_size": 16, "cross_attention_dim": 768}
    monkeypatch.setattr(costs, "FULL_SIZE", {"SD1.5 512": config})
    call(costs, "flops")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    plain, gan, decoupled = rows
    assert plain[2] == plain[4] == "1.000" and 0.5 < float(gan[2]) < float(gan[4]) < 0.95
    assert 0.5 < float(gan[6].strip(" |")) < 0.9 and decoupled[2] == ""


# ----------------------------------------------------------------------------- after a run


@pytest.mark.parametrize("kind", ["runs", "lora_runs"])
def test_the_model_card_s_code_draws(kind, tmp_path, request):
    """Its snippet, run as it stands."""
    folder = request.getfixturevalue(kind) / "sd15" / "student"
    run_card(folder, tmp_path / "image.png")
    assert Image.open(tmp_path / "image.png").size == (16, 16)


def pixels(file):
    return np.asarray(Image.open(file), dtype=np.float32)


def test_sample_writes_single_images_that_say_how_they_were_made(folders, tmp_path):
    make_student(folders["sdxl"]).save_pretrained(tmp_path / "student")
    (tmp_path / "prompts.pkl").write_bytes(pickle.dumps(PROMPTS))
    flags = f"--model {folders['sdxl']} --student {tmp_path}/student --teacher-steps 4 --steps 2"
    flags += f" --prompts {tmp_path}/prompts.pkl --out {tmp_path}/grid.png --images {tmp_path}"
    call(sample, f"{flags}/all")
    call(sample, f"{flags}/parts --batch-size 3")
    call(sample, f"{flags}/half --dtype bf16 --encoder-device cpu")
    files = sorted((tmp_path / "all").iterdir())
    assert len(files) == 3 * 4
    image = Image.open(tmp_path / "all" / "001 student, 2 steps.png")
    assert image.size == (16, 16) and image.text["prompt"] == PROMPTS[1]
    assert image.text["sampler"] == "student, 2 steps" and image.text["column"] == "1"
    rounded = 0
    for file in files:
        whole = pixels(file)
        assert abs(whole - pixels(tmp_path / "parts" / file.name)).max() <= 1
        rounded = max(rounded, abs(whole - pixels(tmp_path / "half" / file.name)).mean())
    assert 0 < rounded < 20


def test_a_run_and_its_student_folder_are_drawn_as_the_run_says(runs, tmp_path, capsys):
    for student in (runs / "sdxl", runs / "sdxl" / "student", runs / "sdxl/checkpoints/000002"):
        flags = f"--student {student} --prompts cat --out {tmp_path}/x.png"
        call(sample, f"{flags} --images {tmp_path / student.name}")
        printed = capsys.readouterr().out
        assert "guidance 8" in printed and "student, 1 step," in printed
        assert "student, 2 steps" not in printed
    for file in (tmp_path / "sdxl").iterdir():
        for other in ("student", "000002"):
            assert (pixels(file) == pixels(tmp_path / other / file.name)).all()


@pytest.mark.parametrize(
    "package, flags",
    [("peft", "--lora 4"), ("wandb", "--track wandb"), ("trackio", "--track trackio")],
)
def test_a_missing_package_is_one_line_with_its_flag(
    package, flags, folders, prompts, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    common = f"--model {folders['sd15']} --prompts {prompts} --gan-weight 0 {SMALL}"
    says = refused(train, f"{common} --out {tmp_path}/run {flags}")
    assert f"pip install {package}" in says and flags.split()[0] in says
    assert not (tmp_path / "run").exists()
