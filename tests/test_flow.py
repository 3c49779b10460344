"""Flow models: seven families on tiny random networks, against diffusers' own pipelines."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from PIL import Image

import data
import models
import sample
import train
from lab import faults, plane
from support import flags as cli_flags
from support import runs, shards, students
from support.cli import UserError
from support.networks import Networks, trained
from tests import flows
from tests.flows import IMAGE_SIZES
from tests.test_fsdp import check_same
from tests.tiny import open_in_diffusers

PROMPTS = ["red apple", "a heart with an arrow in it"]
SIGMAS = [1.0, 0.75, 0.5, 0.25]  # of four steps, before the shift
# How each pipeline is called to draw with guidance 2 in our convention.
GUIDED = {
    "sd3": {"guidance_scale": 2.0},
    "sana": {"guidance_scale": 2.0, "use_resolution_binning": False},
    "z_image": {"guidance_scale": 1.0},
    "lumina2": {"guidance_scale": 2.0},
    "flux": {},
    "flux2": {"guidance_scale": 2.0},
    "qwen": {"negative_prompt": ["", ""], "true_cfg_scale": 2.0},
}
UNGUIDED = ("flux",)  # it is told its scale
NORMS = {"lumina2": "row", "qwen": "token"}  # which their pipelines keep


def some(*quick, of=flows.MAKERS):
    """All names, of which all but these are slow."""
    return [pytest.param(n, marks=[] if n in quick else [pytest.mark.slow]) for n in of]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    place = tmp_path_factory.mktemp("flows")
    return {name: flows.write_flow_pipeline(place / name, name) for name in flows.MAKERS}


def load(places, name, **options):
    return models.load_model(places[name], image_size=IMAGE_SIZES[name], **options)


@pytest.mark.parametrize("name", flows.MAKERS)
def test_a_teacher_draws_what_its_pipeline_draws(places, name):
    model = load(places, name, guidance_norm=NORMS.get(name))
    noise = sample.column_noise(model, 2, 1, seed=0)
    guidance = 1.0 if name in UNGUIDED else 2.0
    x = sample.TeacherSampler(model, 4, guidance).draw(noise, model.encode(PROMPTS))
    pipe = open_in_diffusers(places[name])
    if name == "sana":  # its own is a solver of second order
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents = flows.as_in_pipeline(name, noise[0])
    options = dict(sigmas=SIGMAS, height=IMAGE_SIZES[name], width=IMAGE_SIZES[name])
    options |= GUIDED[name]
    theirs = pipe(prompt=list(PROMPTS), latents=latents, output_type="latent", **options).images
    torch.testing.assert_close(flows.latents_given(name, pipe, x), theirs, atol=1e-4, rtol=1e-4)
    images = pipe(prompt=list(PROMPTS), latents=latents, output_type="pt", **options).images
    torch.testing.assert_close(model.decode(x), images, atol=1e-3, rtol=1e-3)


def test_a_guided_output_keeps_its_norm_if_that_is_asked_for(places, tmp_path):
    """Without the flag Lumina 2's is that of its pipeline without cfg_normalization; pairs that
    were made otherwise are refused."""
    place, size = places["lumina2"], IMAGE_SIZES["lumina2"]
    plain = load(places, "lumina2")
    noise = sample.column_noise(plain, 2, 1, seed=0)
    x = sample.TeacherSampler(plain, 4, 2.0).draw(noise, plain.encode(PROMPTS))
    options = dict(sigmas=SIGMAS, height=size, width=size, output_type="latent")
    options |= {"guidance_scale": 2.0, "cfg_normalization": False, "latents": noise[0]}
    theirs = open_in_diffusers(place)(prompt=list(PROMPTS), **options).images
    torch.testing.assert_close(x, theirs, atol=1e-4, rtol=1e-4)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    flags = f"--model {place} --image-size {size} --prompts {prompts} --guidance 2"
    made = f"pairs {flags} --count 2 --steps 2 --out {tmp_path}/pairs"
    data.main(f"{made} --guidance-norm row".split())
    data.Pairs(tmp_path / "pairs", load(places, "lumina2", guidance_norm="row"), 2.0)
    with pytest.raises(UserError, match="with --guidance-norm row, the run has none"):
        data.Pairs(tmp_path / "pairs", plain, 2.0)
    with pytest.raises(UserError, match="--guidance-norm is for flow models"):
        data.main(["pairs", "--out", str(tmp_path / "other"), "--guidance-norm", "row"])
    other = load(places, "flux2")
    size = 3 * other.image_size // other.sample_shape[1]
    with pytest.raises(UserError, match="token is of 2x2 latents: 3 a side are odd"):
        models.load_model(places["flux2"], image_size=size, guidance_norm="token")


def test_a_run_trains_with_the_norm_that_it_is_told_and_its_student_s_teacher_keeps_it(
    places, tmp_path
):
    flags = [*flags_of_a_run(places, "lumina2", tmp_path), "--guidance-norm", "row"]
    args = train.parse_arguments([str(word) for word in flags])
    nets, _ = train.prepare(args)
    asked = cli_flags.sample_parser("").parse_args(["--device", "cpu"])
    model = sample.load_teacher(asked, runs.configuration(args))
    assert nets.teacher.guidance_norm == model.denoiser.guidance_norm == "row"


@pytest.mark.parametrize("name", flows.MAKERS)
def test_a_batch_of_prompts_equals_each_alone(places, name):
    model = load(places, name)
    x_t = torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    together = model.denoiser(x_t, 500, model.encode(PROMPTS))
    for i, prompt in enumerate(PROMPTS):
        alone = model.denoiser(x_t[i : i + 1], 500, model.encode([prompt]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", flows.MAKERS)
def test_features_are_a_map_of_each_sample_s_own(places, name):
    """Another noise in one corner changes the corner of the map most; another sample does not."""
    model = load(places, name)
    cond = model.encode(PROMPTS)
    x_t = torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    x0, features = model.denoiser.x0_and_features(x_t, 500, cond)
    torch.testing.assert_close(x0, model.denoiser(x_t, 500, cond))
    changed = x_t.clone()
    changed[0, :, -2:, -2:] += 1
    _, others = model.denoiser.x0_and_features(changed, 500, cond)
    difference = (others - features).abs().mean(1)  # (2, h, w)
    assert difference[1].max() < 1e-5
    side = difference.shape[1]
    assert difference[0].argmax() // side >= side - 2
    assert difference[0].argmax() % side >= side - 2


@pytest.mark.parametrize("name", flows.MAKERS)
def test_images_are_encoded_as_they_are_decoded(places, name):
    """Of random autoencoders only the scaling can be tried: the mode of an image's posterior,
    scaled and back, is what the VAE itself decodes."""
    model = load(places, name)
    size = model.image_size
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = model.encode_images(images)
    assert x.shape[1:] == model.sample_shape
    z = images.unsqueeze(2) if name == "qwen" else images
    with torch.no_grad():
        encoded = model.vae.encode(z)
        z = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        theirs = model.vae.decode(z).sample
    ours = model.pixels(x)
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------- students


@pytest.fixture(scope="module")
def run_of(places, tmp_path_factory):
    """run_of(name, kind): two iterations of Decoupled DMD of a family, of the whole student or of a
    LoRA, when first asked for."""
    place = tmp_path_factory.mktemp("runs")
    (place / "prompts.txt").write_text("\n".join(PROMPTS))

    def run(name, kind):
        out = place / f"{name}-{kind}"
        if not out.exists():
            flags = ["--model", places[name], "--prompts", place / "prompts.txt", "--ema", 0]
            flags += ["--variant", "decoupled", "--fake-updates", 1, "--batch-size", 2]
            flags += ["--iterations", 2, "--student-steps", 2, "--learning-rate", 1e-2]
            flags += ["--image-size", IMAGE_SIZES[name], "--warmup", 0, "--out", out]
            train.main([*map(str, flags), *(["--lora", "2"] if kind == "lora" else [])])
        return out

    return run


# The whole student of one dual-stream and of one single-stream family, and one LoRA; the rest is
# slow.
STUDENTS = []
for family in flows.MAKERS:
    for kind in ("whole", "lora"):
        quick = (family, kind) in (("sd3", "whole"), ("z_image", "whole"), ("sd3", "lora"))
        STUDENTS.append(pytest.param(family, kind, marks=[] if quick else [pytest.mark.slow]))


@pytest.mark.parametrize("name, kind", STUDENTS)
def test_a_student_draws_the_same_in_its_pipeline(places, run_of, name, kind, monkeypatch):
    model = load(places, name)
    folder = run_of(name, kind) / "student"
    student = students.load_student(folder, model)
    timesteps = model.schedule.timesteps(2)
    noise = sample.column_noise(model, 2, 2, seed=0)
    ours = sample.StudentSampler(student, timesteps).draw(noise, model.encode(PROMPTS))
    parts = {}
    if kind == "whole":
        network = model.network_class.from_pretrained(folder, low_cpu_mem_usage=False)
        parts = {"transformer": network}
    pipe = open_in_diffusers(places[name], **parts)
    if kind == "lora":
        pipe.load_lora_weights(folder)
    theirs = flows.draw_with_lcm(name, pipe, model, PROMPTS, noise, monkeypatch)
    torch.testing.assert_close(flows.latents_given(name, pipe, ours), theirs, atol=1e-3, rtol=1e-3)
    untrained = sample.StudentSampler(model.denoiser, timesteps).draw(noise, model.encode(PROMPTS))
    assert (ours - untrained).abs().max() > 1e-2


@pytest.mark.parametrize("name, kind", STUDENTS)
def test_the_model_card_s_code_draws(places, run_of, name, kind, tmp_path):
    """Its snippet, run as it stands, at the levels that the student was trained for."""
    folder = run_of(name, kind) / "student"
    lines = (folder / "README.md").read_text().splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    "))
    code = code.replace("path/to/this/folder", str(folder))
    code = code.replace("image.png", str(tmp_path / "image.png"))
    space = {}
    exec(code, space)
    assert Image.open(tmp_path / "image.png").width == IMAGE_SIZES[name]
    schedule = load(places, name).schedule
    levels = schedule.sigma[schedule.timesteps(2)]
    torch.testing.assert_close(space["pipe"].scheduler.sigmas[:2], levels, atol=1e-5, rtol=1e-5)


def test_a_card_s_levels_are_the_student_s_whatever_the_pipeline_would_choose(places, run_of):
    """Qwen-Image's scheduler stretches its levels to end at a value, FLUX.2's pipeline gives it a
    shift that grows with the number of steps."""
    model = load(places, "sd3")
    card = (run_of("sd3", "whole") / "student" / "README.md").read_text()
    line = next(line for line in card.splitlines() if "pipe.scheduler =" in line).strip()
    config = dict(model.pipe.scheduler.config) | {"shift_terminal": 0.02}
    config["use_dynamic_shifting"] = True
    pipe = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler.from_config(config))
    exec(line, {"pipe": pipe, "FlowMatchLCMScheduler": FlowMatchLCMScheduler})
    timesteps = model.schedule.timesteps(2)
    sigmas = [(t + 1) / len(model.schedule) for t in timesteps]
    pipe.scheduler.set_timesteps(sigmas=sigmas, mu=2.0)
    torch.testing.assert_close(
        pipe.scheduler.sigmas[:2], model.schedule.sigma[timesteps], atol=1e-5, rtol=1e-5
    )


# ----------------------------------------------------------------------------- encoded prompts


@pytest.mark.parametrize("name", some("sd3", "z_image"))
def test_encoded_prompts_take_the_place_of_text_encoders(places, name, tmp_path):
    file, folder = tmp_path / "prompts.txt", tmp_path / "encoded"
    file.write_text("\n".join(PROMPTS))
    size = ["--image-size", IMAGE_SIZES[name]]
    command = ["prompts", "--prompts", file, "--out", folder, "--model", places[name]]
    data.main([*map(str, command)])
    stamp = (folder / "00000.safetensors").stat().st_mtime_ns
    data.main([*map(str, command)])  # what is whole is not made again
    assert (folder / "00000.safetensors").stat().st_mtime_ns == stamp
    whole = load(places, name)
    model = models.load_model(places[name], image_size=IMAGE_SIZES[name], conditions=folder)
    assert whole.text_encoders and not model.text_encoders
    for text in (*PROMPTS, ""):
        theirs = whole.encode([text])
        for key, value in model.encode([text]).items():
            torch.testing.assert_close(value, theirs[key], atol=1e-5, rtol=1e-5)
    flags = ["--model", places[name], "--prompts", folder, "--variant", "decoupled", *size]
    flags += ["--iterations", 2, "--batch-size", 2, "--out", tmp_path / "run"]
    train.main([*map(str, flags)])
    with pytest.raises(UserError, match="does not hold the prompt 'rocket' of the real data"):
        model.encode(["rocket"])
    with pytest.raises(UserError, match="were made by the weights of .*, which are not those of"):
        models.load_model(places["sana" if name == "sd3" else "sd3"], conditions=folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"what": "pairs"}))
    with pytest.raises(UserError, match="there are no encoded prompts in"):
        models.load_model(places[name], conditions=folder)


# ----------------------------------------------------------------------------- recipes and switches

RECIPES = models.ASSETS.parent / "recipes"
TEACHERS = {
    "sd35m_decoupled_4step": "sd3",
    "sd35m_decoupled_4step_lora": "sd3",
    "sana_decoupled_4step": "sana",
    "zimage_decoupled_8step": "z_image",
    "lumina2_decoupled_4step": "lumina2",
    "flux2klein_4step": "flux2",
    "qwenimage_4step": "qwen",
}
RECIPES_TRIED = some("sd35m_decoupled_4step", of=TEACHERS)


@pytest.mark.parametrize("recipe", RECIPES_TRIED)
def test_every_recipe_makes_two_iterations(places, recipe, tmp_path):
    name = TEACHERS[recipe]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = [f"@{RECIPES / recipe}.args", "--model", places[name], "--out", tmp_path / "run"]
    flags += ["--prompts", tmp_path / "prompts.txt", "--iterations", 2, "--batch-size", 2]
    flags += ["--dtype", "float32", "--image-size", IMAGE_SIZES[name]]
    train.main([*map(str, flags)])
    assert (tmp_path / "run" / "student" / "README.md").is_file()


def test_a_shift_of_timesteps_is_that_of_a_flow_schedule():
    t = torch.arange(1000)
    assert torch.equal(models.shift_timesteps(t, 1000, 1.0), t)
    plain, shifted = models.flow_schedule(1000, 3.0), models.flow_schedule(1000, 15.0)
    moved = models.shift_timesteps(t, 1000, 5.0)
    torch.testing.assert_close(plain.sigma[moved], shifted.sigma[t], atol=2e-3, rtol=0)
    draws = data.Draws(0, 0, 20_000)
    t_in = torch.full((20_000,), 999)
    t_dm, t_ca = train.draw_levels("hybrid", (0.0, 1.0), t_in, 1000, draws, renoise_shift=5.0)
    assert t_dm.float().mean() > 700 and abs(t_ca.float().mean() - 500) < 20


def test_a_dynamic_shift_is_diffusers_own():
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens in (256, 1024, 4096):
        scheduler.set_timesteps(sigmas=SIGMAS, mu=calculate_shift(tokens))
        schedule, _ = models.read_scheduler(scheduler, "a model", tokens)
        ours = schedule.sigma[[999, 749, 499, 249]]
        torch.testing.assert_close(ours, scheduler.sigmas[:4], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lora", [0, 2])
def test_ida_moves_the_fake_score_towards_the_student(places, lora):
    flags = f"--ida 0.9 --lora {lora} --gan-weight 0 --ema 0 --iterations 1 --model {places['sd3']}"
    args = train.parse_arguments([*flags.split(), "--dtype", "float32"])
    nets = Networks(load(places, "sd3"), args)
    with torch.no_grad():
        for parameter in trained(nets.student).values():
            parameter += 1.0
    before = {name: p.clone() for name, p in trained(nets.fake_score.denoiser).items()}
    nets.pull_fake_score(args.ida)
    latest = trained(nets.student)
    assert before.keys() == latest.keys()
    for name, parameter in trained(nets.fake_score.denoiser).items():
        torch.testing.assert_close(parameter, 0.9 * before[name] + 0.1 * latest[name])


def on_the_plane(*flags):
    args = train.parse_arguments([f"@{plane.RECIPE}", *flags])
    return *train.prepare(args, plane.load_model), args


def test_ida_follows_the_student_s_step():
    """All of the student, and next to no step of its own: the fake score is the student."""
    rates = ("--learning-rate", "0.1", "--fake-learning-rate", "1e-12", "--warmup", "0")
    nets, sources, args = on_the_plane("--ida", "0", "--gan-weight", "0", *rates)
    start = {name: p.clone() for name, p in trained(nets.student).items()}
    train.iterate(nets, train.draw_batch(nets, sources, 0, args), 0, args)
    fake = trained(nets.fake_score.denoiser)
    for name, parameter in trained(nets.student).items():
        torch.testing.assert_close(fake[name], parameter, atol=1e-6, rtol=0)
    assert any((p - start[name]).abs().max() > 0.01 for name, p in trained(nets.student).items())


def test_dm_s_levels_are_shifted_where_batches_are_drawn():
    flags = ("--variant", "decoupled", "--guidance", "1.5", "--renoise-shift", "100")
    nets, sources, args = on_the_plane(*flags)
    batch = train.draw_batch(nets, sources, 0, args)
    assert batch.t_dm.float().mean() > 900 and batch.t_ca.float().mean() < 700


def test_ida_wants_two_networks_of_a_kind():
    with pytest.raises(UserError, match="--ida mixes student and fake score"):
        train.parse_arguments(["--ida", "0.9", "--lora", "4", "--fake-lora", "0"])


# ----------------------------------------------------------------------------- what goes wrong


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_text_encoder_is_one_line(places, tmp_path):
    shutil.copytree(places["sana"], tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "text_encoder")
    with pytest.raises(UserError) as error:
        models.load_model(tmp_path / "model")
    assert "text_encoder" in one_line(error)


def test_latents_and_students_of_another_family_are_one_line(places, run_of, tmp_path):
    model = load(places, "sana")
    with pytest.raises(UserError) as error:
        students.load_student(run_of("sd3", "whole"), model)
    assert "holds a SD3Transformer2DModel, not a SanaTransformer2DModel" in one_line(error)
    latents = {"x0": torch.zeros(1, 16, 8, 8)}
    shards.write_shard(tmp_path / "00000.safetensors", latents, ["red apple"], {})
    (tmp_path / "config.json").write_text('{"what": "latents", "count": 1}')
    model.encoder_print = None
    with pytest.raises(UserError) as error:
        data.real_data(model, tmp_path)
    assert "of shape (16, 8, 8)" in one_line(error) and "has (8, 8, 8)" in one_line(error)


def test_a_size_that_is_not_named_is_the_network_s_own(places):
    assert models.load_model(places["sd3"]).image_size == 16
    assert models.load_model(places["sana"]).image_size == 32


def test_a_size_that_does_not_fit_is_one_line(places):
    with pytest.raises(UserError) as error:
        models.load_model(places["flux"], image_size=18)
    assert "--image-size 18 is no multiple of 4" in one_line(error)


def test_a_distilled_teacher_is_said(places, tmp_path, capsys):
    shutil.copytree(places["flux2"], tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ["--model", tmp_path / "model", "--image-size", 16, "--variant", "decoupled"]
    flags += ["--prompts", tmp_path / "prompts.txt", "--iterations", 1, "--batch-size", 2]
    train.main([*map(str, flags), "--out", str(tmp_path / "run")])
    assert "is distilled itself" in capsys.readouterr().out


# ----------------------------------------------------------------------------- runs

# One family of two streams and one of a single stream.
BOTH = ("sd3", "z_image")


def flags_of_a_run(places, name, place):
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ["--model", places[name], "--prompts", place / "prompts.txt", "--variant", "decoupled"]
    flags += ["--image-size", IMAGE_SIZES[name], "--batch-size", 2, "--fake-updates", 2]
    return [*flags, "--dtype", "float32"]


@pytest.mark.parametrize("name", BOTH)
def test_a_resumed_run_is_an_undisturbed_one_bit_for_bit(places, name, tmp_path):
    flags = flags_of_a_run(places, name, tmp_path)
    train.main([*map(str, [*flags, "--iterations", 4, "--out", tmp_path / "whole"])])
    train.main([*map(str, [*flags, "--iterations", 2, "--out", tmp_path / "halves"])])
    train.main(["--resume", str(tmp_path / "halves"), "--iterations", "4"])
    assert faults.same_state(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_two_ranks_make_the_same_run(places, name, tmp_path):
    flags = flags_of_a_run(places, name, tmp_path)
    train.main([*map(str, [*flags, "--iterations", 4, "--out", tmp_path / "alone"])])
    flags += ["--iterations", 4, "--out", tmp_path / "two"]
    statuses, printed = faults.on_ranks(train.main, tmp_path / "log", *flags)
    assert statuses == [0, 0], printed
    check_same(tmp_path / "two", tmp_path / "alone")
