"""Flow models: seven families on tiny random networks, against diffusers' own pipelines."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import models
import sample
import train
from lab import faults, plane
from support import flags as cli_flags
from support import runs, shards, students
from support.networks import Networks, trained
from support.weights import fingerprint
from tests import flows
from tests.flows import IMAGE_SIZES
from tests.test_fsdp import check_same
from tests.tiny import call, edit_json, one_line, open_in_diffusers, refused, run_card

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


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


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


def test_a_guided_output_keeps_its_norm_if_that_is_asked_for(places, prompts_file, tmp_path):
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

    flags = f"--model {place} --image-size {size} --prompts {prompts_file} --guidance 2"
    made = f"pairs {flags} --count 2 --steps 2 --out {tmp_path}/pairs"
    call(data, f"{made} --guidance-norm row")
    data.Pairs(tmp_path / "pairs", load(places, "lumina2", guidance_norm="row"), 2.0)
    says = one_line(data.Pairs, tmp_path / "pairs", plain, 2.0)
    assert "with --guidance-norm row, the run has none" in says
    says = refused(data, f"pairs --out {tmp_path}/other --guidance-norm row")
    assert "--guidance-norm is for flow models" in says
    other = load(places, "flux2")
    size = 3 * other.image_size // other.sample_shape[1]
    says = one_line(models.load_model, places["flux2"], image_size=size, guidance_norm="token")
    assert "token is of 2x2 latents: 3 a side are odd" in says


def test_a_run_trains_with_the_norm_that_it_is_told_and_its_student_s_teacher_keeps_it(
    places, prompts_file
):
    flags = f"{flags_of_a_run(places, 'lumina2', prompts_file)} --guidance-norm row"
    args = train.parse_arguments(flags.split())
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
def run_of(places, prompts_file, tmp_path_factory):
    """run_of(name, kind): two iterations of Decoupled DMD of a family, of the whole student or of a
    LoRA, when first asked for."""
    place = tmp_path_factory.mktemp("runs")

    def run(name, kind):
        out = place / f"{name}-{kind}"
        if kind == "lora":
            pytest.importorskip("peft")
        if not out.exists():
            flags = flags_of_a_run(places, name, prompts_file)
            flags += " --iterations 2 --student-steps 2 --learning-rate 1e-2 --warmup 0 --ema 0"
            call(train, f"{flags} --out {out} {'--lora 2' if kind == 'lora' else ''}")
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


def test_a_lora_s_parts_for_text_encoders_are_left_out(places, run_of, tmp_path):
    """They would move the teacher, which encodes with the same ones."""
    model = load(places, "sd3")
    encoders = [fingerprint(encoder) for encoder in model.text_encoders]
    weights = load_file(run_of("sd3", "lora") / "student" / students.LORA_FILE)
    save_file(weights, tmp_path / "network.safetensors")
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    size = model.pipe.text_encoder.config.hidden_size
    weights |= {f"{layer}.lora_A.weight": torch.ones(2, size)}
    weights |= {f"{layer}.lora_B.weight": torch.ones(size, 2)}
    save_file(weights, tmp_path / "both.safetensors")
    loaded = [students.load_student(file, model) for file in sorted(tmp_path.iterdir())]
    assert fingerprint(loaded[0]) == fingerprint(loaded[1])
    assert [fingerprint(encoder) for encoder in model.text_encoders] == encoders


@pytest.mark.parametrize("name, kind", STUDENTS)
def test_the_model_card_s_code_draws(places, run_of, name, kind, tmp_path):
    """Its snippet, run as it stands, at the levels that the student was trained for."""
    space = run_card(run_of(name, kind) / "student", tmp_path / "image.png")
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
def test_encoded_prompts_take_the_place_of_text_encoders(places, name, prompts_file, tmp_path):
    folder = tmp_path / "encoded"
    command = f"prompts --prompts {prompts_file} --out {folder} --model {places[name]}"
    call(data, command)
    stamp = (folder / "00000.safetensors").stat().st_mtime_ns
    call(data, command)  # what is whole is not made again
    assert (folder / "00000.safetensors").stat().st_mtime_ns == stamp
    whole, model = load(places, name), load(places, name, conditions=folder)
    assert whole.text_encoders and not model.text_encoders
    for text in (*PROMPTS, ""):
        theirs = whole.encode([text])
        for key, value in model.encode([text]).items():
            torch.testing.assert_close(value, theirs[key], atol=1e-5, rtol=1e-5)
    flags = flags_of_a_run(places, name, folder)
    call(train, f"{flags} --iterations 2 --out {tmp_path}/run")
    says = one_line(model.encode, ["rocket"])
    assert "does not hold the prompt 'rocket' of the real data" in says
    other = places["sana" if name == "sd3" else "sd3"]
    says = one_line(models.load_model, other, conditions=folder)
    assert re.search("were made by the weights of .*, which are not those of", says)
    edit_json(folder / "config.json", what="pairs")
    says = one_line(models.load_model, places[name], conditions=folder)
    assert "there are no encoded prompts in" in says


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
def test_every_recipe_makes_two_iterations(places, recipe, prompts_file, tmp_path):
    name = TEACHERS[recipe]
    flags = f"@{RECIPES}/{recipe}.args --model {places[name]} --prompts {prompts_file}"
    flags += f" --dtype float32 --image-size {IMAGE_SIZES[name]} --out {tmp_path}/run"
    call(train, f"{flags} --iterations 2 --batch-size 2")
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
    if lora:
        pytest.importorskip("peft")
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
    pytest.importorskip("peft")
    says = refused(train, "--ida 0.9 --lora 4 --fake-lora 0")
    assert "--ida mixes student and fake score" in says


# ----------------------------------------------------------------------------- what goes wrong


def test_a_missing_text_encoder_is_one_line(places, tmp_path):
    shutil.copytree(places["sana"], tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "text_encoder")
    assert "text_encoder" in one_line(models.load_model, tmp_path / "model")


def test_latents_and_students_of_another_family_are_one_line(places, run_of, tmp_path):
    model = load(places, "sana")
    says = one_line(students.load_student, run_of("sd3", "whole"), model)
    assert "holds a SD3Transformer2DModel, not a SanaTransformer2DModel" in says
    latents = {"x0": torch.zeros(1, 16, 8, 8)}
    shards.write_shard(tmp_path / "00000.safetensors", latents, ["red apple"], {})
    (tmp_path / "config.json").write_text('{"what": "latents", "count": 1}')
    model.encoder_print = None
    says = one_line(data.real_data, model, tmp_path)
    assert "of shape (16, 8, 8)" in says and "has (8, 8, 8)" in says


def test_a_size_that_is_not_named_is_the_network_s_own(places):
    assert models.load_model(places["sd3"]).image_size == 16
    assert models.load_model(places["sana"]).image_size == 32


def test_a_size_that_does_not_fit_is_one_line(places):
    says = one_line(models.load_model, places["flux"], image_size=18)
    assert "--image-size 18 is no multiple of 4" in says


def test_a_distilled_teacher_is_said(places, prompts_file, tmp_path, capsys):
    shutil.copytree(places["flux2"], tmp_path / "model")
    edit_json(tmp_path / "model" / "model_index.json", is_distilled=True)
    flags = flags_of_a_run({"flux2": tmp_path / "model"}, "flux2", prompts_file)
    train.prepare(train.parse_arguments([*flags.split(), "--iterations", "1"]))
    assert "is distilled itself" in capsys.readouterr().out


# ----------------------------------------------------------------------------- runs

# One family of two streams and one of a single stream.
BOTH = ("sd3", "z_image")


def flags_of_a_run(places, name, prompts):
    flags = f"--model {places[name]} --prompts {prompts} --variant decoupled --batch-size 2"
    return f"{flags} --image-size {IMAGE_SIZES[name]} --fake-updates 1 --dtype float32"


@pytest.mark.parametrize("name", BOTH)
def test_a_resumed_run_is_an_undisturbed_one_bit_for_bit(places, name, prompts_file, tmp_path):
    flags = f"{flags_of_a_run(places, name, prompts_file)} --fake-updates 2 --out {tmp_path}"
    call(train, f"{flags}/whole --iterations 3")
    call(train, f"{flags}/halves --iterations 2")
    call(train, f"--resume {tmp_path}/halves --iterations 3")
    assert faults.same_state(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_two_ranks_make_the_same_run(places, name, prompts_file, tmp_path):
    flags = f"{flags_of_a_run(places, name, prompts_file)} --fake-updates 2 --iterations 4"
    call(train, f"{flags} --out {tmp_path}/alone")
    words = f"{flags} --out {tmp_path}/two".split()
    statuses, printed = faults.on_ranks(train.main, tmp_path / "log", *words)
    assert statuses == [0, 0], printed
    check_same(tmp_path / "two", tmp_path / "alone")
