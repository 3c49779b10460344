"""The networks of a run: how they are made of the teacher, sharded, and saved."""

import torch
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

import fsdp
import losses
import models
from support import students
from support.cli import UserError, import_package
from support.precision import checkpoint_activations, forget_casts
from support.weights import fingerprint, in_one_line


class Networks:
    """Teacher, student, its average and fake score, all of them copies of one network, and the two
    optimizers."""

    def __init__(self, model, args, mesh=None):
        self.model, self.schedule, self.uncond = model, model.schedule, model.uncond
        self.timesteps = model.schedule.timesteps(args.student_steps, args.first_timestep)
        self.teacher_print = fingerprint(model.denoiser)
        self.mean_variance_target = None
        self.regression_loss = losses.regression_loss
        if args.regression == "lpips" and args.regression_weight > 0:
            self.regression_loss = lpips_loss(model)

        # Copies are made before what they are copies of is sharded. Each is sharded before the next
        # is made, but for a whole fake score beside a LoRA, which changes the origin's dtype.
        origin = students.load_student(args.init, model) if args.init else model.origin
        fake_rank = args.lora if args.fake_lora is None else args.fake_lora
        lora = (args.lora, args.lora_alpha, args.seed)
        fake_lora = (fake_rank, args.lora_alpha, args.seed)
        place = (mesh, model.device, model.dtype)
        fake_denoiser = None
        if args.lora and fake_rank == 0:
            fake_denoiser = models.trainable_copy(model.origin)
        self.student = fsdp.shard(models.trainable_copy(origin, *lora), *place)
        self.averaged_student = self.student
        if args.ema > 0:
            average = models.trainable_copy(origin, *lora).requires_grad_(False)
            self.averaged_student = fsdp.shard(average, *place)
        if fake_denoiser is None:
            fake_denoiser = models.trainable_copy(model.origin, *fake_lora)
        head = None
        if args.gan_weight > 0:
            head = models.make_gan_head(self.student, self.uncond, model.sample_shape, args.seed)
        self.fake_score = models.FakeScore(fake_denoiser, head)
        if args.init:
            students.load_fake_score(args.init, self.fake_score)
        self.fake_score = fsdp.shard(self.fake_score, *place)
        self.teacher = fsdp.shard(model.denoiser.to(model.frozen_dtype), *place)
        if args.activation_checkpointing:
            checkpoint_activations(self.student, model.sample_shape)
            checkpoint_activations(self.fake_score.denoiser, model.sample_shape)

        self.student_optimizer = make_optimizer(self.student, args.learning_rate)
        self.fake_optimizer = make_optimizer(self.fake_score, args.fake_learning_rate)

    def tensors(self):
        """{name: tensor} of all that training changes: what a checkpoint holds."""
        options = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)
        named = {}
        for part, module, optimizer in (
            ("student", self.student, self.student_optimizer),
            ("fake_score", self.fake_score, self.fake_optimizer),
        ):
            state, optimizer_state = get_state_dict(module, optimizer, options=options)
            for name, tensor in state.items():
                named[f"{part}.{name}"] = tensor
            for name, value in optimizer_state.items():
                if isinstance(value, torch.Tensor):  # not the rates, which follow from the flags
                    named[f"{part}_optimizer.{name}"] = value
        if self.averaged_student is not self.student:
            state = self.averaged_student.state_dict()
            for name in trained(self.student):
                named[f"averaged_student.{name}"] = state[name]
        return named

    def move_average(self, decay):
        """decay: how much of the averaged student stays."""
        if self.averaged_student is not self.student:
            self.pull(self.averaged_student, decay)

    def pull_fake_score(self, keep):
        """IDA, fake <- keep fake + (1 - keep) student: what the fake score has to follow has just
        moved that way.                                                             2506.00523"""
        self.pull(self.fake_score.denoiser, keep)
        forget_casts()

    @torch.no_grad()
    def pull(self, denoiser, keep):
        """denoiser <- keep denoiser + (1 - keep) student, of what is trained."""
        latest = trained(self.student)
        own = dict(denoiser.named_parameters())
        torch._foreach_lerp_([own[name] for name in latest], list(latest.values()), 1 - keep)


def trained(module):
    """{name: parameter} of what is trained; of a LoRA that leaves the rest out."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def make_optimizer(module, learning_rate):
    parameters = list(trained(module).values())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=True)
    optimizer.register_step_post_hook(forget_casts)
    return optimizer


# ----------------------------------------------------------------------------- regression


def lpips_loss(model):
    """LPIPS (1801.03924): a function like losses.regression_loss, of the decoded images of two
    batches of latents."""
    if not model.decodes:
        raise UserError(
            "--regression lpips compares images, and --vae none leaves out their decoder: use "
            "--regression mse"
        )
    lpips = import_package("lpips", "--regression lpips")
    with in_one_line("--regression lpips cannot get VGG's weights"):  # torchvision fetches them
        distance = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)
    distance.to(model.encoder_device)

    def loss(x, x0_pair):
        """(B, ...), (B, ...) -> (B,)"""
        with torch.no_grad():
            target = enlarged(model.pixels(x0_pair))
        return distance(enlarged(model.pixels(x)), target).flatten()

    return loss


def enlarged(images):
    """VGG sees images of 224 pixels at least."""
    size = max(224, images.shape[-1])
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)
