"""Stable Diffusion 1.5 and XL: pipelines of the real classes with small random weights, written to disk in the real format and read back
through the real code. Run with: pytest"""

import contextlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    KarrasVeScheduler,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import models
import sample
import train
from lab import faults
from support import checkpoint, export, images, shards, students
from support.cli import UserError
from support.networks import trained
from support.prompt_files import read_prompts
from support.shards import as_sample
from tests.tiny import diffusers_few_steps, moved_unet, opened, run, write_pipeline

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["red apple", "cat face with wry smile", "rocket", "a heart with an arrow in it"]
NAMES = ("sd15", "sdxl")
SMALL = [
    "--batch-size",
    2,
    "--fake-updates",
    2,
    "--warmup",
    0,
    "--iterations",
    2,
    "--save-every",
    2,
    "--device",
    "cpu",
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    work = tmp_path_factory.mktemp("pipelines")
    return {name: write_pipeline(work / name, name) for name in NAMES}


# ---------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("name", NAMES)
def test_encodings_are_those_of_diffusers(folders, name):
    model, pipe = models.load_model(folders[name]), opened(folders[name])
    cond = model.encode(PROMPTS)
    expected = pipe.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    torch.testing.assert_close(cond["encoder_hidden_states"], expected[0])
    torch.testing.assert_close(
        model.uncond["encoder_hidden_states"].expand_as(expected[1]), expected[1]
    )
    if name == "sdxl":
        torch.testing.assert_close(cond["text_embeds"], expected[2])
        assert (
            not model.uncond["text_embeds"].any()
            and not expected[3].any()
            and not model.uncond["encoder_hidden_states"].any()
        )
        ids = pipe._get_add_time_ids(
            (16, 16), (0, 0), (16, 16), torch.float32, text_encoder_projection_dim=48
        )
        assert torch.equal(cond["time_ids"], ids.expand(4, -1)) and torch.equal(
            model.uncond["time_ids"], ids
        )


def test_sdxl_without_zeros_for_no_text_takes_the_empty_prompt(folders, tmp_path):
    shutil.copytree(folders["sdxl"], tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False})
    )
    model = models.load_model(tmp_path / "model")
    torch.testing.assert_close(model.uncond, model.encode([""]))


# ---------------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", NAMES)
def test_teacher_row_is_ddim_of_diffusers(folders, name, guidance):
    model, pipe = models.load_model(folders[name]), opened(folders[name])
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    noise = sample.column_noise(model, 4, 1, 0)
    x = sample.TeacherSampler(model, 5, guidance).draw(noise, model.encode(PROMPTS))
    expected = pipe(
        PROMPTS,
        num_inference_steps=5,
        guidance_scale=guidance,
        latents=noise[0],
        output_type="latent",
    ).images
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)
    pictures = pipe(
        PROMPTS, num_inference_steps=5, guidance_scale=guidance, latents=noise[0], output_type="pt"
    ).images
    torch.testing.assert_close(model.decode(x), pictures, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_guidance_of_one_is_the_conditional_pass(folders, name):
    model = models.load_model(folders[name])
    x_t, cond = torch.randn(4, *model.sample_shape), model.encode(PROMPTS)
    x0_cond, x0_uncond = models.cond_and_uncond_x0(
        model.denoiser, x_t, 500, cond, model.uncond, 2.0
    )
    torch.testing.assert_close(
        models.guide(x0_cond, x0_uncond, 1.0), model.denoiser(x_t, 500, cond), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(x0_cond, x0_uncond)


@pytest.mark.parametrize("timesteps", [[999, 749, 499, 249], [999, 499], [999], [399]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_student_in_plain_diffusers_draws_what_our_sampler_draws(
    folders, tmp_path, name, timesteps
):
    unet, model = moved_unet(folders[name]), models.load_model(folders[name])
    unet.save_pretrained(tmp_path)
    noise = sample.column_noise(model, 4, len(timesteps), 0)
    x = sample.StudentSampler(students.load_student(tmp_path, model), timesteps).draw(
        noise, model.encode(PROMPTS)
    )
    pipe = opened(folders[name])
    pipe = type(pipe)(
        **pipe.components | {"unet": UNet2DConditionModel.from_pretrained(tmp_path)},
        **({"requires_safety_checker": False} if name == "sd15" else {}),
    )
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(
        x, diffusers_few_steps(pipe, PROMPTS, noise, timesteps), rtol=1e-3, atol=1e-3
    )


# ---------------------------------------------------------------------------------------------------- schedulers and networks


def test_v_prediction_and_zero_terminal_snr_follow_the_scheduler_s_configuration(tmp_path):
    folder = write_pipeline(
        tmp_path / "v",
        "sdxl",
        scheduler=dict(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    )
    model, pipe = models.load_model(folder), opened(folder)
    assert model.prediction == "v_prediction" and model.schedule.alpha[-1] < 1e-3
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=True
    )
    noise = sample.column_noise(model, 2, 1, 0)
    expected = pipe(
        PROMPTS[:2], num_inference_steps=4, guidance_scale=1, latents=noise[0], output_type="latent"
    ).images
    torch.testing.assert_close(
        sample.TeacherSampler(model, 4, 1.0).draw(noise, model.encode(PROMPTS[:2])),
        expected,
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize(
    "scheduler, says",
    [
        (DDIMScheduler(prediction_type="sample"), "prediction type 'sample'"),
        (
            DDIMScheduler(prediction_type="epsilon", rescale_betas_zero_snr=True),
            "zero terminal signal-to-noise",
        ),
        (KarrasVeScheduler(), "no noise schedule is known for the scheduler KarrasVe"),
    ],
)
def test_schedulers_that_are_not_known_are_refused_by_name(scheduler, says):
    with pytest.raises(UserError, match=says):
        models.read_scheduler(scheduler, "model")


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(in_channels=9), "out_channels 4"),
        (dict(time_cond_proj_dim=8), "time_cond_proj_dim 8"),
        (dict(class_embed_type="timestep"), "class_embed_type 'timestep'"),
    ],
)
def test_networks_that_want_something_else_are_refused_by_name(tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        models.load_model(write_pipeline(tmp_path, "sd15", **options))


def test_pipelines_of_another_class_are_refused_by_name(folders, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(
        UserError,
        match="is a FluxPipeline; supported are StableDiffusionPipeline, StableDiffusionXLPipeline",
    ):
        models.load_model(tmp_path)


def test_full_size_networks_have_the_published_numbers_of_parameters():
    from support import benchmark

    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in UNet2DConditionModel(**config).parameters())
            for name, config in benchmark.FULL_SIZE.items()
        }
    assert counts == {"SD1.5 512": 859_520_964, "SDXL 1024": 2_567_463_684}


# ---------------------------------------------------------------------------------------------------- training


def networks_of(folder, *flags):
    args = train.parse_arguments(
        [
            str(flag)
            for flag in (
                "--model",
                folder,
                "--batch-size",
                4,
                "--fake-updates",
                1,
                "--warmup",
                0,
                "--device",
                "cpu",
                "--out",
                "unused",
                *flags,
            )
        ]
    )
    args.model = folder
    args.prompts = write_prompts(folder)
    return *train.prepare(args), args


def write_prompts(folder):
    file = folder.parent / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return str(file)


@pytest.fixture(scope="session")
def pictures(folders, tmp_path_factory):
    """A folder of six pictures of different sizes and shapes, with metadata.jsonl."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i, (width, height) in enumerate(
        ((40, 30), (30, 40), (16, 16), (100, 17), (8, 9), (33, 33))
    ):
        pixels = torch.randint(
            0,
            256,
            (height, width, 3),
            generator=torch.Generator().manual_seed(i),
            dtype=torch.uint8,
        ).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": PROMPTS[i % 4]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def parameters_after(folder, *flags, iterations=2):
    """Every network's tensors, and the figures of the last iteration. The optimizers' eps is so large that a step is in proportion to its gradient:
    Adam's own first steps are the gradient's sign, which rounding decides where the gradient is near 0."""
    networks, sources, args = networks_of(folder, *flags)
    args.learning_rate = args.fake_learning_rate = 0.1
    for optimizer in (networks.student_optimizer, networks.fake_optimizer):
        for group in optimizer.param_groups:
            group |= {"eps": 1.0, "weight_decay": 0.0}
    figures = {}
    for iteration in range(iterations):
        figures = train.iterate(networks, sources, iteration, args)
    return {name: tensor.clone() for name, tensor in networks.tensors().items()}, figures


def difference(a, b, start):
    """How far a is from b, in units of how far b moved."""
    names = [
        name
        for name in b
        if name.startswith(("student.", "fake_score.denoiser")) and b[name].is_floating_point()
    ]
    norm = lambda x, y: sum((x[name] - y[name]).double().square().sum() for name in names).sqrt()
    return (norm(a, b) / norm(b, start)).item()


VARIANTS = {
    "dmd2": ["--variant", "dmd2"],
    "fdistill": ["--variant", "fdistill"],
    "decoupled": [
        "--variant",
        "decoupled",
        "--mean-variance-weight",
        0.1,
    ],
    "data": ["--variant", "dmd2", "--student-input", "data"],
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name, micro_batch", [("sd15", 3), ("sdxl", 1)])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    folders, pictures, name, micro_batch, variant
):
    flags = [*VARIANTS[variant], *(["--real", pictures] if variant != "decoupled" else [])]
    start, _ = parameters_after(folders[name], *flags, iterations=0)
    whole, figures = parameters_after(folders[name], *flags)
    parts, figures_of_parts = parameters_after(folders[name], *flags, "--micro-batch", micro_batch)
    assert difference(parts, whole, start) < 1e-4
    assert {name: value.item() for name, value in figures_of_parts.items()} == pytest.approx(
        {name: value.item() for name, value in figures.items()}, rel=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_changes_nothing_but_memory(folders, name):
    start, _ = parameters_after(folders[name], "--gan-weight", 0, iterations=0)
    plain, _ = parameters_after(folders[name], "--gan-weight", 0)
    again, _ = parameters_after(folders[name], "--gan-weight", 0, "--activation-checkpointing")
    assert difference(again, plain, start) < 1e-4
    networks, _, _ = networks_of(folders[name], "--gan-weight", 0, "--activation-checkpointing")
    assert (
        networks.student.network.is_gradient_checkpointing
        and networks.fake_score.denoiser.network.is_gradient_checkpointing
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_pass_computes_in_bfloat16_and_x0_in_float32(folders, name, monkeypatch):
    networks, sources, args = networks_of(
        folders[name], "--variant", "dmd2", "--gan-weight", 0, "--dtype", "bf16"
    )
    seen = {}
    for part, denoiser in (
        ("teacher", networks.teacher),
        ("student", networks.student),
        ("fake score", networks.fake_score.denoiser),
    ):
        attention = next(
            module for module in denoiser.modules() if type(module).__name__ == "Attention"
        )
        for kind, module in (
            ("convolution", denoiser.network.conv_in),
            ("projection", attention.to_q),
        ):
            module.register_forward_hook(
                lambda module, inputs, output, key=(part, kind): seen.setdefault(key, set()).add(
                    output.dtype
                )
            )
        real = denoiser.forward
        monkeypatch.setattr(
            denoiser,
            "forward",
            lambda *batch, real=real, part=part, **more: (
                lambda x0: seen.setdefault((part, "x0"), set()).add(x0.dtype) or x0
            )(real(*batch, **more)),
        )
    encoder = networks.model.text_encoders[0]
    encoder.register_forward_hook(
        lambda module, inputs, output: seen.setdefault(("text", "states"), set()).add(
            output[0].dtype
        )
    )
    train.iterate(networks, sources, 0, args)
    assert {key: value for key, value in seen.items() if key[1] != "x0"} == {
        key: {torch.bfloat16} for key in seen if key[1] != "x0"
    } and len(seen) == 10
    assert all(seen[part, "x0"] == {torch.float32} for part in ("teacher", "student", "fake score"))
    assert {p.dtype for p in networks.teacher.parameters()} == {torch.bfloat16} and not any(
        p.requires_grad for p in networks.teacher.parameters()
    )
    assert {
        p.dtype
        for module in (networks.student, networks.fake_score, networks.averaged_student)
        for p in module.parameters()
    } == {torch.float32}
    assert {tensor.dtype for name, tensor in networks.tensors().items() if "optimizer" in name} == {
        torch.float32
    }


def test_no_average_takes_no_memory(folders):
    networks, _, _ = networks_of(folders["sd15"], "--gan-weight", 0, "--ema", 0)
    assert networks.averaged_student is networks.student and not any(
        name.startswith("averaged") for name in networks.tensors()
    )


def write_tiny_vae(tmp_path):
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=2,
    ).save_pretrained(tmp_path / "tiny-vae")
    return tmp_path / "tiny-vae"


def recipes():
    return sorted(path.stem for path in (ROOT / "recipes").glob("sd*.args"))


def marked(names):
    """All but two of the recipes are slow."""
    quick = ("sd15_1step", "sdxl_decoupled_4step")
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("recipe", marked(recipes()))
def test_every_recipe_makes_two_iterations(folders, pictures, tmp_path, recipe):
    pytest.importorskip("peft") if "lora" in recipe else None
    folder = folders[recipe[:4]]
    flags = ["--real", pictures]
    if "pretrain" in recipe:
        guidance = "8"
        assert (
            run(
                "data",
                "pairs",
                "--model",
                folder,
                "--out",
                tmp_path / "pairs",
                "--count",
                4,
                "--steps",
                2,
                "--guidance",
                guidance,
                "--prompts",
                write_prompts(folder),
            )
            == 0
        )
        flags += [
            "--pairs",
            tmp_path / "pairs",
            "--regression",
            "mse",
            "--vae",
            write_tiny_vae(tmp_path),
        ]  # no VGG here
    assert (
        run(
            "train",
            f"@{ROOT / 'recipes' / recipe}.args",
            "--model",
            folder,
            "--prompts",
            write_prompts(folder),
            "--out",
            tmp_path / "run",
            *SMALL,
            "--batch-size",
            4,
            "--micro-batch",
            2,
            *flags,
        )
        == 0
    )
    assert (tmp_path / "run" / "student" / "README.md").is_file() and list(
        (tmp_path / "run" / "images").glob("*.png")
    )
    if recipe in ("sd15_1step", "sdxl_1step_pretrain"):  # the recipe that goes on from this one
        after = {"sd15_1step": "sd15_1step_gan", "sdxl_1step_pretrain": "sdxl_1step"}[recipe]
        more = ["--iterations", 4, "--real", pictures]
        assert (
            run(
                "train",
                f"@{ROOT / 'recipes' / after}.args",
                "--init",
                tmp_path / "run",
                "--model",
                folder,
                "--prompts",
                write_prompts(folder),
                "--out",
                tmp_path / "next",
                *SMALL,
                *more,
            )
            == 0
        )
        assert json.loads((tmp_path / "next" / "config.json").read_text())["gan_weight"] > 0


def test_text_encoder_and_decoder_elsewhere_or_left_out(folders, tmp_path):
    flags = [
        "--model",
        folders["sdxl"],
        "--prompts",
        write_prompts(folders["sdxl"]),
        "--gan-weight",
        0,
        *SMALL,
        "--encoder-device",
        "cpu",
    ]
    assert run("train", "--out", tmp_path / "a", *flags, "--vae", "none") == 0
    assert not (tmp_path / "a" / "images").exists() and (tmp_path / "a" / "student").is_dir()
    write_tiny_vae(tmp_path)
    assert (
        run(
            "train",
            "--out",
            tmp_path / "b",
            *flags,
            "--vae",
            tmp_path / "tiny-vae",
        )
        == 0
    )
    assert list((tmp_path / "b" / "images").glob("*.png"))


# ---------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture(scope="session")
def lora_runs(folders, tmp_path_factory):
    pytest.importorskip("peft")
    work = tmp_path_factory.mktemp("lora")
    for name in NAMES:
        flags = [
            "--model",
            folders[name],
            "--prompts",
            write_prompts(folders[name]),
            "--gan-weight",
            0,
            *SMALL,
            "--lora",
            4,
            "--lora-alpha",
            2,
            "--learning-rate",
            1e-2,
        ]
        assert run("train", "--out", work / name, *flags, "--iterations", 4) == 0
    return work


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_student_is_what_load_lora_weights_reads(folders, lora_runs, name):
    model = models.load_model(folders[name])
    noise = sample.column_noise(model, 4, 4, 0)
    x = sample.StudentSampler(
        students.load_student(lora_runs / name, model), [999, 749, 499, 249]
    ).draw(noise, model.encode(PROMPTS))
    with contextlib.nullcontext():
        pipe = type(opened(folders[name])).from_pretrained(folders[name], low_cpu_mem_usage=False)
        pipe.set_progress_bar_config(disable=True)
        undistilled = diffusers_few_steps(pipe, PROMPTS, noise, [999, 749, 499, 249])
        pipe.load_lora_weights(lora_runs / name / "student")
    drawn = diffusers_few_steps(pipe, PROMPTS, noise, [999, 749, 499, 249])
    torch.testing.assert_close(x, drawn, rtol=1e-3, atol=1e-3)
    assert (drawn - undistilled).abs().max() > 0.1


def test_a_lora_run_keeps_its_lora_only_and_resumes_bit_for_bit(folders, lora_runs, tmp_path):
    shutil.copytree(lora_runs / "sd15", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000004")
    assert run("train", "--resume", tmp_path / "run") == 0
    state = faults.state_of(tmp_path / "run")
    assert all(
        torch.equal(state[name], value)
        for name, value in faults.state_of(lora_runs / "sd15").items()
    )
    assert all("lora_" in name or name.endswith("ratio_means") for name in state)
    assert [file.name for file in sorted((tmp_path / "run" / "student").iterdir())] == [
        "README.md",
        students.LORA_FILE,
    ]


def test_a_lora_shares_the_teacher_s_parameters(folders):
    pytest.importorskip("peft")
    networks, sources, args = networks_of(
        folders["sdxl"], "--gan-weight", 0, "--lora", 4, "--dtype", "bf16"
    )
    base = {parameter.data_ptr() for parameter in networks.teacher.parameters()}
    for module in (networks.student, networks.fake_score, networks.averaged_student):
        frozen = [p for name, p in module.named_parameters() if "lora_" not in name]
        assert all(
            p.data_ptr() in base and p.dtype == torch.bfloat16 and not p.requires_grad
            for p in frozen
        ) and len(frozen) == len(base)
    assert {p.dtype for p in trained(networks.student).values()} == {torch.float32}
    before = {name: tensor.clone() for name, tensor in networks.teacher.state_dict().items()}
    train.iterate(networks, sources, 0, args)
    assert all(
        torch.equal(before[name], tensor) for name, tensor in networks.teacher.state_dict().items()
    )
    adapted = {
        name.split(".lora_")[0].removesuffix(".base_layer") for name in trained(networks.student)
    }
    assert {
        next(layer for layer in models.UNET_LORA_LAYERS if name.endswith(layer)) for name in adapted
    } == set(models.UNET_LORA_LAYERS)


def test_a_whole_fake_score_beside_a_lora_student(folders):
    pytest.importorskip("peft")
    networks, sources, args = networks_of(
        folders["sd15"], "--gan-weight", 0, "--lora", 4, "--fake-lora", 0, "--dtype", "bf16"
    )
    assert all(
        p.requires_grad and p.dtype == torch.float32 for p in networks.fake_score.parameters()
    )
    expected = opened(folders["sd15"]).unet.state_dict()
    assert all(
        torch.equal(tensor, expected[name])
        for name, tensor in networks.fake_score.denoiser.network.state_dict().items()
    )  # in float32, not rounded
    train.iterate(networks, sources, 0, args)


# ---------------------------------------------------------------------------------------------------- students in the wild


def test_students_as_files(folders, tmp_path):
    model, unet = models.load_model(folders["sdxl"]), moved_unet(folders["sdxl"])
    torch.save(unet.state_dict(), tmp_path / "pytorch_model.bin")
    save_file(
        {name: tensor.half() for name, tensor in unet.state_dict().items()},
        tmp_path / "dmd2_sdxl_4step_unet_fp16.safetensors",
    )
    unet.save_pretrained(tmp_path / "unet")
    for path, tolerance in (
        ("pytorch_model.bin", 0),
        ("dmd2_sdxl_4step_unet_fp16.safetensors", 1e-2),
        ("unet", 0),
    ):
        for name, tensor in (
            students.load_student(tmp_path / path, model).network.state_dict().items()
        ):
            torch.testing.assert_close(
                tensor, unet.state_dict()[name], rtol=tolerance, atol=tolerance
            )


class Trap:
    """A pickle of it would write a file when loaded plainly."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def bad_students(folders, tmp):
    torch.save({"weight": Trap(tmp / "sprung")}, tmp / "trap.bin")
    torch.save([1, 2], tmp / "list.bin")
    (tmp / "text.safetensors").write_text("no weights")
    whole = folders["sd15"] / "unet" / "diffusion_pytorch_model.safetensors"
    (tmp / "cut.safetensors").write_bytes(whole.read_bytes()[:5000])
    shutil.copy(whole, tmp / "other.safetensors")
    save_file(
        {
            "unet.nowhere.to_q.lora_A.weight": torch.zeros(4, 32),
            "unet.nowhere.to_q.lora_B.weight": torch.zeros(32, 4),
        },
        tmp / "lora.safetensors",
    )
    return {
        "trap.bin": "it holds more than weights",
        "list.bin": "no file of weights",
        "text.safetensors": "cannot be loaded",
        "cut.safetensors": "cannot be loaded",
        "other.safetensors": "does not fit",
        "absent.bin": "no student",
    } | ({"lora.safetensors": "nowhere.to_q is not known there"} if importable("peft") else {})


def importable(name):
    try:
        __import__(name)
        return True
    except ImportError:
        return False


def test_bad_student_files_are_one_line(folders, tmp_path, capsys):
    for file, says in bad_students(folders, tmp_path).items():
        assert (
            run(
                "sample",
                "--model",
                folders["sdxl"],
                "--student",
                tmp_path / file,
                "--prompts",
                "red apple",
                "--out",
                tmp_path / "x.png",
            )
            == 2
        ), file
        lines = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("sample:")
        ]
        assert len(lines) == 1 and says in lines[0], lines
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_single_file_has_the_original_s_names(folders, tmp_path, name):
    unet = moved_unet(folders[name])
    unet.save_pretrained(tmp_path / "student")
    assert (
        run(
            "support.export",
            "--student",
            tmp_path / "student",
            "--model",
            folders[name],
            "--out",
            tmp_path / "student.safetensors",
            "--dtype",
            "fp32",
        )
        == 0
    )
    back = convert_ldm_unet_checkpoint(
        load_file(tmp_path / "student.safetensors"), dict(unet.config)
    )
    expected = unet.state_dict()
    assert back.keys() == expected.keys() and all(
        torch.equal(back[key], expected[key]) for key in expected
    )


def test_full_size_networks_have_the_original_s_names():
    """As many names as weights, none twice, and diffusers converts them back."""
    from support import benchmark

    for config in benchmark.FULL_SIZE.values():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
        names = export.original_names(unet)
        back = convert_ldm_unet_checkpoint(
            {f"model.diffusion_model.{theirs}": ours for ours, theirs in names.items()},
            dict(unet.config),
        )
        assert len(set(names.values())) == len(names) and back == {
            name: name for name in unet.state_dict()
        }


def test_a_lora_is_merged_on_export(folders, lora_runs, tmp_path):
    assert (
        run(
            "support.export",
            "--student",
            lora_runs / "sdxl",
            "--out",
            tmp_path / "merged",
            "--dtype",
            "fp32",
        )
        == 0
    )
    model = models.load_model(folders["sdxl"])
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged").state_dict()
    ours = students.load_student(lora_runs / "sdxl", model).network.state_dict()
    assert merged.keys() == ours.keys() and all(
        torch.equal(merged[name], ours[name]) for name in ours
    )
    assert any(
        not torch.equal(ours[name], tensor)
        for name, tensor in model.denoiser.network.state_dict().items()
    )


def test_the_model_card_s_code_draws(folders, tmp_path):
    """Its snippet, run as it stands, from a run's student."""
    flags = [
        "--model",
        folders["sd15"],
        "--prompts",
        write_prompts(folders["sd15"]),
        "--gan-weight",
        0,
        *SMALL,
    ]
    assert run("train", "--out", tmp_path / "run", *flags) == 0
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    code = "\n".join(line[4:] for line in card.splitlines() if line.startswith("    "))
    with contextlib.nullcontext():
        exec(
            code.replace("path/to/this/folder", str(tmp_path / "run" / "student")).replace(
                '"image.png"', f'"{tmp_path / "image.png"}"'
            ),
            {},
        )
    assert Image.open(tmp_path / "image.png").size == (16, 16)


def test_sample_writes_single_images_that_say_how_they_were_made(folders, tmp_path):
    moved_unet(folders["sdxl"]).save_pretrained(tmp_path / "student")
    with open(tmp_path / "prompts.pkl", "wb") as file:
        pickle.dump(PROMPTS, file)
    flags = [
        "--model",
        folders["sdxl"],
        "--student",
        tmp_path / "student",
        "--prompts",
        tmp_path / "prompts.pkl",
        "--teacher-steps",
        4,
        "--steps",
        2,
    ]
    for folder, more in (
        ("all", []),
        ("parts", ["--batch-size", 3]),
        ("half", ["--dtype", "bf16", "--encoder-device", "cpu"]),
    ):
        assert (
            run(
                "sample",
                *flags,
                *more,
                "--out",
                tmp_path / f"{folder}.png",
                "--images",
                tmp_path / folder,
            )
            == 0
        )
    files = sorted((tmp_path / "all").iterdir())
    picture = Image.open(tmp_path / "all" / "001 student, 2 steps.png")
    assert len(files) == 4 * 4 - 4 and picture.size == (16, 16)
    assert (
        picture.text["prompt"] == PROMPTS[1]
        and picture.text["sampler"] == "student, 2 steps"
        and picture.text["seed"] == "0"
        and picture.text["column"] == "1"
    )
    pixels = lambda file: torch.tensor(np.asarray(Image.open(file)), dtype=torch.float32)
    assert (
        max((pixels(file) - pixels(tmp_path / "parts" / file.name)).abs().max() for file in files)
        <= 1
    )
    assert (
        0
        < max((pixels(file) - pixels(tmp_path / "half" / file.name)).abs().mean() for file in files)
        < 20
    )


# ---------------------------------------------------------------------------------------------------- prompts and real data


def test_prompts_from_pickles(tmp_path):
    for name, value in (
        ("list", PROMPTS),
        ("tuple", tuple(PROMPTS)),
        ("dict", dict(enumerate(PROMPTS))),
    ):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(value, protocol))
            assert read_prompts(tmp_path / f"{name}.pkl") == PROMPTS


@pytest.mark.parametrize(
    "value, says",
    [
        (lambda tmp: Trap(tmp / "sprung"), "asks for pathlib.Path.touch|asks for"),
        (lambda tmp: [1, 2], "no pickle of strings"),
        (lambda tmp: ["a", None], "no pickle of strings"),
        (lambda tmp: [Path("x")], "asks for"),
        (lambda tmp: [torch.zeros(2)], "asks for"),
    ],
)
def test_pickles_of_anything_else_are_refused_and_not_executed(tmp_path, value, says):
    (tmp_path / "prompts.pkl").write_bytes(pickle.dumps(value(tmp_path)))
    with pytest.raises(UserError, match=says):
        read_prompts(tmp_path / "prompts.pkl")
    assert not (tmp_path / "sprung").exists()


def test_a_truncated_pickle_is_refused(tmp_path):
    (tmp_path / "prompts.pkl").write_bytes(pickle.dumps(PROMPTS)[:-20])
    with pytest.raises(UserError, match="no pickle of strings"):
        read_prompts(tmp_path / "prompts.pkl")


def write_lmdb(folder, x, prompts):
    lmdb = pytest.importorskip("lmdb")
    with (
        lmdb.open(str(folder), map_size=1 << 24) as environment,
        environment.begin(write=True) as writer,
    ):
        for i, prompt in enumerate(prompts):
            writer.put(f"latents_{i}_data".encode(), x[i].half().numpy().tobytes())
            writer.put(f"prompts_{i}_data".encode(), prompt.encode())
        writer.put(b"latents_shape", " ".join(map(str, x.shape)).encode())


def test_latents_from_dmd2_s_lmdb(folders, tmp_path):
    x, model = torch.randn(50, 4, 8, 8).half().float(), models.load_model(folders["sd15"])
    prompts = [f"caption {i}" for i in range(50)]
    write_lmdb(tmp_path / "lmdb", x, prompts)
    drawn, captions = data.real_data(model, tmp_path / "lmdb").draw(data.Draws(0, 0, 64))
    index = [prompts.index(caption) for caption in captions]
    assert torch.equal(drawn, x[index]) and len(set(index)) > 30


def test_bad_lmdbs(folders, tmp_path):
    model = models.load_model(folders["sd15"])
    write_lmdb(tmp_path / "shape", torch.randn(4, 4, 16, 16), ["a"] * 4)
    write_lmdb(tmp_path / "cut", torch.randn(400, 4, 8, 8), ["a"] * 400)
    write_lmdb(tmp_path / "short", torch.randn(4, 4, 8, 8), ["a"] * 3)
    write_lmdb(tmp_path / "hole", torch.randn(40, 4, 8, 8), ["a"] * 40)
    import lmdb

    with lmdb.open(str(tmp_path / "hole")) as environment, environment.begin(write=True) as writer:
        writer.put(b"latents_17_data", b"ab")
    file = tmp_path / "cut" / "data.mdb"
    file.write_bytes(file.read_bytes()[:200_000])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.mdb").write_text("no data base")
    for name, says in (
        ("shape", r"of shape \(4, 16, 16\); .* has \(4, 8, 8\)"),
        ("cut", "is cut off"),
        ("short", "short: the LMDB has no latents_3_data"),
        ("hole", "hole: entry 17 of 40 has 2 bytes of latents, not 512"),
        ("text", "cannot be read"),
    ):
        with pytest.raises(UserError, match=says):
            data.real_data(model, tmp_path / name)


def load_image(file, size):
    return images.as_tensor(images.crop_as_stable_diffusion(images.open_image(file), size))


def test_pictures_are_shrunk_and_cut_around_their_centre(tmp_path):
    wide = torch.zeros(20, 60, 3, dtype=torch.uint8)
    wide[:, 20:40] = 255
    Image.fromarray(wide.numpy()).save(tmp_path / "wide.png")
    picture = as_sample(load_image(tmp_path / "wide.png", 10))
    assert (
        picture.shape == (3, 10, 10) and picture.min() > 0.5
    )  # the middle third is all that is left, rings of the filter apart
    rotated = Image.fromarray(wide.permute(1, 0, 2).contiguous().numpy())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter before it is looked at
    rotated.save(tmp_path / "tall.jpg", exif=exif)
    assert as_sample(load_image(tmp_path / "tall.jpg", 10)).min() > 0.5


def test_latents_of_a_folder_are_made_once_and_go_on_where_they_stopped(
    folders, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(data, "SHARD", 4)
    monkeypatch.setattr(shards, "SHARD", 4)
    model = models.load_model(folders["sdxl"])
    config = {"model": str(folders["sdxl"]), "images": str(pictures)}
    data.make_latents(tmp_path / "latents", config, model)
    latents = data.real_data(model, tmp_path / "latents")
    x, prompts = latents.read(range(6))
    expected = torch.stack([as_sample(load_image(pictures / f"{i}.png", 16)) for i in range(6)])
    torch.testing.assert_close(x, model.encode_images(expected), rtol=2e-3, atol=2e-3)
    posterior = model.vae.encode(expected).latent_dist.mean * 0.13025
    torch.testing.assert_close(x, posterior, rtol=2e-3, atol=2e-3)
    assert prompts == [PROMPTS[i % 4] for i in range(6)]
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "latents").glob("*.safetensors")}
    first = tmp_path / "latents" / "00000.safetensors"
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    with pytest.raises(UserError, match="00000.safetensors is damaged: it is not what was written"):
        data.real_data(model, tmp_path / "latents")
    data.make_latents(tmp_path / "latents", config, model)
    assert (tmp_path / "latents" / "00001.safetensors").stat().st_mtime_ns == times[
        tmp_path / "latents" / "00001.safetensors"
    ]
    assert torch.equal(data.real_data(model, tmp_path / "latents").read(range(6))[0], x)
    # The folder itself, encoded as it is drawn.
    direct, captions = data.real_data(model, pictures).draw(data.Draws(0, 0, 8))
    stored, same = data.real_data(model, tmp_path / "latents").draw(data.Draws(0, 0, 8))
    torch.testing.assert_close(direct, stored, rtol=2e-3, atol=2e-3)
    assert captions == same


def test_captions_beside_the_pictures(pictures, tmp_path):
    for i in range(3):
        shutil.copy(pictures / f"{i}.png", tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"caption {i}\n")
    assert [caption for _, caption in images.list_images(tmp_path)] == [
        "caption 0",
        "caption 1",
        "caption 2",
    ]


def test_bad_pictures_are_named_and_skipped_below_a_share_and_stop_the_run_above_it(
    folders, pictures, tmp_path, capsys
):
    shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "pictures" / "2.png").write_text("no picture")
    command = [
        "data",
        "latents",
        "--model",
        folders["sd15"],
        "--images",
        tmp_path / "pictures",
        "--out",
        tmp_path / "latents",
    ]
    assert run(*command) == 2
    assert (
        "1 of the 6 images" in (said := capsys.readouterr().err)
        and "2.png" in said
        and not list((tmp_path / "latents").glob("*.safetensors"))
    )
    assert run(*command, "--bad-share", 0.2) == 0
    assert "left out: " in (said := capsys.readouterr().out) and "2.png" in said
    assert (
        run(*command, "--bad-share", 0.2) == 0 and "2.png" in capsys.readouterr().out
    )  # named again when there is nothing left to do
    assert (
        len(data.real_data(models.load_model(folders["sd15"]), tmp_path / "latents").prompts) == 5
    )


@pytest.mark.slow
def test_latents_and_pairs_under_torchrun(folders, pictures, tmp_path):
    status, printed = faults.torchrun(
        ROOT / "data.py",
        "latents",
        "--model",
        folders["sd15"],
        "--images",
        pictures,
        "--out",
        tmp_path / "latents",
    )
    assert status == 0, printed
    assert (
        len(data.real_data(models.load_model(folders["sd15"]), tmp_path / "latents").prompts) == 6
    )
    words = ["pairs", "--count", 300, "--steps", 2, "--model", folders["sd15"]]
    words += ["--prompts", write_prompts(folders["sd15"]), "--device", "cpu"]
    status, printed = faults.torchrun(ROOT / "data.py", *words, "--out", tmp_path / "pairs")
    assert status == 0, printed
    assert run("data", *words, "--out", tmp_path / "alone") == 0
    for file in sorted((tmp_path / "alone").glob("*.safetensors")):
        (alone, prompts), (shared, same) = (
            shards.read_shard(path, ("noise", "x0"))[:2]
            for path in (file, tmp_path / "pairs" / file.name)
        )
        assert all(torch.equal(alone[name], shared[name]) for name in alone) and prompts == same


def test_latents_and_pairs_of_other_weights_are_refused(folders, pictures, tmp_path, capsys):
    other = write_pipeline(tmp_path / "other", "sd15", seed=1)
    model = models.load_model(other)
    config = {"model": str(other), "images": str(pictures)}
    data.make_latents(tmp_path / "latents", config, model)
    config = {"model": str(other), "prompts": write_prompts(folders["sd15"]), "count": 2}
    config |= {"steps": 2, "guidance": 3.0, "seed": 0}
    data.make_pairs(tmp_path / "pairs", config, model)
    flags = ["--prompts", write_prompts(folders["sd15"]), "--out", tmp_path / "run", *SMALL]
    for more in (
        ["--real", tmp_path / "latents"],
        ["--variant", "dmd", "--pairs", tmp_path / "pairs"],
    ):
        assert run("train", "--model", folders["sd15"], *flags, *more) == 2
        assert (
            f"were made by the weights of {other}" in capsys.readouterr().err
            and not (tmp_path / "run").exists()
        )
    assert (
        run(
            "train",
            "--model",
            other,
            *flags,
            "--real",
            tmp_path / "latents",
            "--regression-weight",
            0.1,
            "--pairs",
            tmp_path / "pairs",
            "--vae",
            "none",
        )
        == 0
    )


def test_a_decoder_that_is_needed_cannot_be_left_out(folders, pictures, tmp_path, capsys):
    flags = [
        "--model",
        folders["sd15"],
        "--prompts",
        write_prompts(folders["sd15"]),
        "--vae",
        "none",
    ]
    assert run("train", *flags, "--out", tmp_path / "run", *SMALL, "--real", pictures) == 2
    assert (
        "--vae none leaves out the encoder" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )
    assert (
        run(
            "sample",
            "--model",
            folders["sd15"],
            "--student",
            folders["sd15"] / "unet",
            "--vae",
            "none",
        )
        == 2
    )
    assert "without which there are no images" in capsys.readouterr().err


def test_a_run_s_student_folder_is_drawn_as_the_run_is(folders, tmp_path, capsys):
    flags = [
        "--model",
        folders["sdxl"],
        "--prompts",
        write_prompts(folders["sdxl"]),
        "--gan-weight",
        0,
        *SMALL,
        "--student-steps",
        1,
        "--first-timestep",
        399,
        "--guidance",
        8,
    ]
    assert run("train", *flags, "--out", tmp_path / "run") == 0
    for student in (tmp_path / "run", tmp_path / "run" / "student"):
        assert (
            run(
                "sample",
                "--student",
                student,
                "--prompts",
                "red apple",
                "--out",
                tmp_path / f"{student.name}.png",
                "--images",
                tmp_path / f"{student.name}-images",
            )
            == 0
        )
        printed = capsys.readouterr().out
        assert (
            "guidance 8" in printed and "student, 1 step," in printed and "2 steps" not in printed
        )
    names = sorted(file.name for file in (tmp_path / "run-images").iterdir())
    assert all(
        Image.open(tmp_path / "run-images" / name).tobytes()
        == Image.open(tmp_path / "student-images" / name).tobytes()
        for name in names
    )


def test_export_to_something_else_is_refused(folders, tmp_path, capsys):
    assert (
        run(
            "support.export",
            "--student",
            folders["sd15"] / "unet",
            "--model",
            folders["sd15"],
            "--out",
            tmp_path / "student.ckpt",
        )
        == 2
    )
    assert (
        "should end in .safetensors" in capsys.readouterr().err
        and not (tmp_path / "student.ckpt").exists()
    )


def test_real_data_of_the_wrong_shape_or_missing_stops_before_training(
    folders, pictures, tmp_path, capsys
):
    config = {"model": str(folders["sd15"]), "images": str(pictures)}
    data.make_latents(tmp_path / "latents", config, models.load_model(folders["sd15"]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "captionless").mkdir()
    shutil.copy(pictures / "0.png", tmp_path / "captionless")
    write_pipeline(tmp_path / "larger", "sd15", sample_size=16)
    prompts = write_prompts(folders["sd15"])
    for model, real, says in (
        (tmp_path / "larger", tmp_path / "latents", "holds samples of shape (4, 8, 8)"),
        (folders["sd15"], tmp_path / "absent", "no such directory"),
        (folders["sd15"], tmp_path / "empty", "no images"),
        (folders["sd15"], tmp_path / "captionless", "has a caption"),
        (folders["sd15"], None, "name some by --real"),
    ):
        assert (
            run(
                "train",
                "--model",
                model,
                "--prompts",
                prompts,
                "--out",
                tmp_path / "run",
                *SMALL,
                *(["--real", real] if real else []),
            )
            == 2
        )
        assert says in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "package, flags",
    [
        ("lmdb", ["--real", "{tmp}/lmdb"]),
        ("peft", ["--lora", "4", "--gan-weight", "0"]),
        ("wandb", ["--track", "wandb"]),
        ("trackio", ["--track", "trackio"]),
    ],
)
def test_a_package_that_is_not_installed_is_one_line_with_its_flag(
    folders, tmp_path, capsys, monkeypatch, package, flags
):
    (tmp_path / "lmdb").mkdir()
    (tmp_path / "lmdb" / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    assert (
        run(
            "train",
            "--model",
            folders["sd15"],
            "--prompts",
            write_prompts(folders["sd15"]),
            "--out",
            tmp_path / "run",
            *SMALL,
            *flags,
        )
        == 2
    )
    said = capsys.readouterr().err
    assert f"pip install {package}" in said and flags[0] in said and not (tmp_path / "run").exists()


def test_checkpoints_of_another_pipeline_are_refused(folders, tmp_path, capsys):
    prompts = write_prompts(folders["sd15"])
    assert (
        run(
            "train",
            "--model",
            folders["sd15"],
            "--prompts",
            prompts,
            "--out",
            tmp_path / "run",
            "--gan-weight",
            0,
            *SMALL,
        )
        == 0
    )
    write_pipeline(tmp_path / "other", "sd15", seed=1)
    assert (
        run("train", "--resume", tmp_path / "run", "--model", tmp_path / "other", "--iterations", 4)
        == 2
    )
    assert "the teacher's weights are others" in capsys.readouterr().err
    assert checkpoint.complete_checkpoints(tmp_path / "run")[0].name == "000002"
