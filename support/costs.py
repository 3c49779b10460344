"""What full-size networks cost, computed without weights or a GPU.

python -m support.costs memory        # GiB of weights, gradients, optimizers and text encoders
python -m support.costs flops        # of an iteration, beside the passes of DMD2's released loop
"""

import collections
import weakref
from types import SimpleNamespace

from support import cli, flags

if __name__ == "__main__":
    cli.answer_early(flags.costs_parser, __doc__)

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import models
import train
from support.families import TRANSFORMER_LORA_LAYERS, UNET_LORA_LAYERS

# The UNets' configurations, as the hub has them.
FULL_SIZE = {
    "SD1.5 512": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "SDXL 1024": dict(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}
# Of each: its pipeline's class, and the shapes of one sample's condition.
CONDITIONS = {
    "SD1.5 512": ("StableDiffusionPipeline", {"encoder_hidden_states": (77, 768)}),
    "SDXL 1024": (
        "StableDiffusionXLPipeline",
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
    ),
}
# Parameters of the flow models' text encoders, by their configurations on the hub.
ENCODERS = {
    "CLIP-L": 123_650_304,
    "CLIP-G": 694_659_840,
    "T5-XXL": 4_762_310_656,
    "Gemma-2-2B": 2_614_341_888,
    "Qwen3-4B": 4_022_468_096,
    "Qwen2.5-VL-7B": 8_292_166_656,
}
# Flow models: their class, what their configuration on the hub has, their text encoders.
SANA_600M = dict(
    num_layers=28,
    num_attention_heads=36,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
)
SD35_MEDIUM = dict(
    num_layers=24,
    num_attention_heads=24,
    caption_projection_dim=1536,
    pos_embed_max_size=384,
    qk_norm="rms_norm",
    dual_attention_layers=tuple(range(13)),
)
KLEIN_4B = dict(
    num_layers=5,
    num_single_layers=20,
    num_attention_heads=24,
    joint_attention_dim=7680,
    guidance_embeds=False,
)
FLOW_MODELS = {
    "SANA 0.6B": ("SanaTransformer2DModel", SANA_600M, ["Gemma-2-2B"]),
    "SANA 1.6B": ("SanaTransformer2DModel", {}, ["Gemma-2-2B"]),
    "SD3.5-medium": ("SD3Transformer2DModel", SD35_MEDIUM, ["CLIP-L", "CLIP-G", "T5-XXL"]),
    "Lumina-Image 2.0": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, ["Gemma-2-2B"]),
    "FLUX.2-klein-base-4B": ("Flux2Transformer2DModel", KLEIN_4B, ["Qwen3-4B"]),
    "Z-Image": ("ZImageTransformer2DModel", {}, ["Qwen3-4B"]),
    "FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}, ["CLIP-L", "T5-XXL"]),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}, ["Qwen2.5-VL-7B"]),
}


# ----------------------------------------------------------------------------- passes


def draw_student_inputs(nets, batch, iteration, args):
    """The student's passes without a graph: its earlier steps, and on the fake score's turn the
    last one too."""
    earlier = 0 if batch.noise is None else batch.noise.shape[1] - 1
    with torch.no_grad():
        for _ in range(earlier + (not train.is_student_turn(iteration, args))):
            nets.student(batch.eps_fake, batch.t_fake, batch.cond)


def bare_iteration(nets, batch, iteration, args):
    """The passes through networks that train.iterate cannot avoid, and nothing else."""
    x, t, cond, has_gan = batch.eps_fake, batch.t_fake, batch.cond, args.gan_weight > 0
    draw_student_inputs(nets, batch, iteration, args)

    # The student's step.
    if train.is_student_turn(iteration, args):
        coupled = args.schedule == "coupled"
        scale = args.guidance if coupled or args.normaliser == "guided" else 1
        with torch.no_grad():
            models.cond_and_guided_x0(nets.teacher, x, t, cond, nets.uncond, scale)
            if not coupled:
                models.cond_and_guided_x0(nets.teacher, x, t, cond, nets.uncond, args.guidance)
        x_t = x.clone().requires_grad_()
        with torch.set_grad_enabled(has_gan):
            _, logit = nets.fake_score(x_t, t, cond, x0_graph=False)
        if has_gan:
            torch.autograd.grad(logit.sum(), x_t)
        for _ in range(1 + (args.regression_weight > 0)):
            nets.student(x, t, cond).backward(x)

    # The fake score's step.
    x_t, count = x, len(x)
    if has_gan:
        x_t, t, cond = torch.cat([x, x]), torch.cat([t, t]), models.join(cond, cond)
    x0_fake, logit = nets.fake_score(x_t, t, cond, count=count)
    loss = x0_fake.sum()
    if has_gan:
        loss = loss + logit.sum()
    loss.backward()


class Reached(Exception):
    """The middle of a network, with its output."""


def logit_alone(fake_score, x_t, t, cond):
    """The logit from a pass that ends behind the middle block."""

    def stop(block, inputs, output):
        raise Reached(output)

    network = fake_score.denoiser.network
    hook = network.mid_block.register_forward_hook(stop)
    try:
        fake_score.denoiser(x_t, t, cond)
    except Reached as reached:
        return fake_score.head(reached.args[0])
    finally:
        hook.remove()


def dmd2_iteration(nets, batch, iteration, args):
    """The passes of DMD2's released loop (2405.14867). Each logit has a pass of its own."""
    x, t, cond, has_gan = batch.eps_fake, batch.t_fake, batch.cond, args.gan_weight > 0
    draw_student_inputs(nets, batch, iteration, args)
    if train.is_student_turn(iteration, args):
        sample = nets.student(x, t, cond)
        with torch.no_grad():
            nets.fake_score.denoiser(x, t, cond)
            models.cond_and_guided_x0(nets.teacher, x, t, cond, nets.uncond, args.guidance)
        loss = sample.sum()
        if has_gan:
            nets.fake_score.requires_grad_(False)
            loss = loss + logit_alone(nets.fake_score, sample, t, cond).sum()
            nets.fake_score.requires_grad_(True)
        loss.backward()
        nets.student.zero_grad()
    loss = nets.fake_score.denoiser(x, t, cond).sum()
    if has_gan:
        for _ in ("samples", "real"):
            loss = loss + logit_alone(nets.fake_score, x, t, cond).sum()
    loss.backward()
    nets.fake_score.zero_grad()


# ----------------------------------------------------------------------------- FLOPs, activations


class Flops(TorchDispatchMode):
    """Within it, `total` counts FLOPs by torch's formulas, a product and a sum as two.
    torch's own FlopCounterMode cannot count torch.autograd.grad."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        result = function(*arguments, **options)
        formula = flop_registry.get(function._overloadpacket)
        if formula:
            self.total += formula(*arguments, **options, out_val=result)
        return result


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Within it, what the backward pass keeps besides parameters: `most`, in bytes, at a time.
    Saved tensors may share a storage, which counts once."""

    def __init__(self, *modules):
        super().__init__(self.pack, self.unpack)
        self.now = self.most = 0
        self.holders = collections.Counter()  # of each storage
        for module in modules:
            for parameter in module.parameters():
                self.holders[parameter.untyped_storage()._cdata] = 1  # so it is never counted

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if self.holders[storage._cdata] == 0:
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
        self.holders[storage._cdata] += 1
        saved = Saved(tensor)
        weakref.finalize(saved, self.release, storage._cdata, storage.nbytes())
        return saved

    def unpack(self, saved):
        return saved.tensor

    def release(self, storage, size):
        self.holders[storage] -= 1
        if self.holders[storage] == 0:
            self.now -= size


class Saved:
    """What stands for a saved tensor in the graph."""

    def __init__(self, tensor):
        self.tensor = tensor


def count_flops(step, nets, batch, iteration, args):
    """FLOPs, and bytes kept for the backward pass at most."""
    saved = SavedBytes(nets.teacher, nets.student, nets.fake_score)
    with Flops() as flops, saved:
        step(nets, batch, iteration, args)
    return flops.total, saved.most


def networks_without_weights(name, has_gan):
    """Teacher, student and fake score on the meta device, and a batch of one sample for them."""
    kind, shapes = CONDITIONS[name]
    with torch.device("meta"):
        schedule = models.vp_schedule(torch.linspace(0.999, 0.005, 1000, device="cpu")).to("meta")
        cond = {key: torch.zeros(1, *shape) for key, shape in shapes.items()}
        denoisers = []
        for _ in range(3):
            unet = UNet2DConditionModel(**FULL_SIZE[name])
            family = models.FAMILIES[kind]
            denoisers.append(models.Denoiser(unet, schedule, "epsilon", family))
        teacher, student, fake = denoisers
        size = FULL_SIZE[name]["sample_size"]
        head = models.make_gan_head(fake, cond, (4, size, size), seed=0) if has_gan else None
        fake_score = models.FakeScore(fake, head)
        batch = train.Batch(cond, torch.zeros(1, dtype=torch.long))
        batch.t_fake, batch.eps_fake = batch.t_in, torch.zeros(1, 4, size, size)
    teacher.requires_grad_(False)
    nets = SimpleNamespace(teacher=teacher, student=student, fake_score=fake_score, uncond=cond)
    return nets, batch


# What a student is trained by -> flags of train.py.
SETTINGS = {
    "DMD2 without GAN": "--variant dmd2 --gan-weight 0",
    "DMD2": "--variant dmd2",
    "Decoupled DMD": "--variant decoupled",
}


def mean_iteration(step, nets, batch, args):
    """FLOPs without the student's earlier steps, and the most bytes that any iteration keeps."""
    turn = count_flops(step, nets, batch, 0, args)
    other = count_flops(step, nets, batch, 1, args)
    share = 1 / args.fake_updates
    return share * turn[0] + (1 - share) * other[0], max(turn[1], other[1])


def print_row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def print_flops():
    beside = "of DMD2's order"
    print_row("", "TFLOPs a sample: 1 step", beside, "4 steps", beside, "GiB kept", beside)
    print(f"|{'---|' * 7}")
    for name in FULL_SIZE:
        for setting, words in SETTINGS.items():
            words = f"{words} --guidance 7.5 --fake-updates 5"
            args = train.parse_arguments(words.split())
            nets, batch = networks_without_weights(name, args.gan_weight > 0)
            flops, kept = mean_iteration(bare_iteration, nets, batch, args)
            dmd2_flops, dmd2_kept = float("nan"), float("nan")
            if args.schedule == "coupled":
                dmd2_flops, dmd2_kept = mean_iteration(dmd2_iteration, nets, batch, args)
            with Flops() as one_pass, torch.no_grad():
                nets.student(batch.eps_fake, batch.t_fake, batch.cond)
            cells = []
            for steps in (1, 4):  # a batch ends at each of them equally often
                earlier = (steps - 1) / 2 * one_pass.total
                cells.append(f"{(flops + earlier) / 1e12:.2f}")
                cells.append(f"{(flops + earlier) / (dmd2_flops + earlier):.3f}")
            cells += [f"{kept / 2**30:.2f}", f"{kept / dmd2_kept:.3f}"]
            print_row(f"{name}, {setting}", *(cell.replace("nan", "") for cell in cells))


# ----------------------------------------------------------------------------- memory


def parameters(kind, options, layers, rank=64):
    """How many a network has, and how many LoRAs of this rank on these of its layers."""
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**options)
    lora = 0
    for name, module in network.named_modules():
        if name.endswith(layers) and hasattr(module, "weight"):
            lora += rank * (len(module.weight) + module.weight[0].numel())
    return sum(parameter.numel() for parameter in network.parameters()), lora


def memory(count, student_lora, fake_lora, gpus=1, average=False):
    """GiB of parameters, gradients and optimizer state on each GPU with --shard full and bf16.

    What is trained has a float32 weight, gradient and two moments, 16 bytes; the average has 4;
    what is frozen 2. The LoRAs of one GPU share the teacher's parameters; under torchrun each
    network has shards of its own of them. count: a network's parameters; student_lora, fake_lora:
    those of LoRAs, 0 for none.
    """
    frozen = 1
    if gpus > 1 and student_lora:
        frozen += 1 + average
    if gpus > 1 and fake_lora:
        frozen += 1
    student, fake_score = student_lora or count, fake_lora or count
    total = 2 * count * frozen + 16 * (student + fake_score) + 4 * student * average
    return total / gpus / 2**30


def print_memory():
    print_row("", "1 GPU", "2 GPUs", "4 GPUs", "8 GPUs")
    print(f"|{'---|' * 5}")
    for name, options in FULL_SIZE.items():
        count, lora = parameters("UNet2DConditionModel", options, UNET_LORA_LAYERS)
        for title, student_lora, fake_lora, average in (
            ("whole, averaged", 0, 0, True),
            ("whole", 0, 0, False),
            ("LoRA student, whole fake score", lora, 0, False),
            ("LoRA student and fake score", lora, lora, False),
        ):
            row = [memory(count, student_lora, fake_lora, n, average) for n in (1, 2, 4, 8)]
            print_row(f"{name}, {title}", *(f"{gib:.1f}" for gib in row))


def print_memory_of_flow_models():
    """On one GPU, without an average. What is trained whole has 16 bytes a parameter."""
    whole_or_lora = ("both whole", "LoRA student, whole fake score", "both LoRA")
    print_row("", "billion parameters", *whole_or_lora, "text encoders", "of them")
    print(f"|{'---|' * 7}")
    for name, (kind, options, encoders) in FLOW_MODELS.items():
        count, lora = parameters(kind, options, TRANSFORMER_LORA_LAYERS)
        row = [memory(count, 0, 0), memory(count, lora, 0), memory(count, lora, lora)]
        row.append(2 * sum(ENCODERS[encoder] for encoder in encoders) / 2**30)
        cells = [f"{gib:.1f}" for gib in row]
        print_row(name, f"{count / 1e9:.2f}", *cells, ", ".join(encoders))


def main(arguments=None):
    args = flags.costs_parser(__doc__).parse_args(arguments)
    if args.what == "flops":
        print_flops()
    else:
        print_memory()
        print()
        print_memory_of_flow_models()


if __name__ == "__main__":
    cli.run(main)
