"""Small flow pipelines of diffusers' real classes with random weights, written to disk in the real
format."""

import diffusers
import diffusers.schedulers.scheduling_flow_match_lcm
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from support.families import flux2_norm, packed
from support.pipelines import quiet_libraries
from tests.tiny import make_text_encoder

WORDS = "<pad> <unk> <s> </s> red apple cat face a heart with an arrow in it rocket user"
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def make_tokenizer(length=40):
    """Words are tokens, and letters of other words too."""
    words = dict.fromkeys([*WORDS.split(), *map(chr, range(33, 127))])
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    known = "|".join(WORDS.split()[4:])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(rf"\b(?:{known})\b|\S"), behavior="removed", invert=True
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT,
        model_max_length=length,
    )


def decoder_options(tokenizer, **more):
    """Of a small language model."""
    options = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        max_position_embeddings=2048,
    )
    return options | more


def make_vae(levels=2, channels=16):
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(16,) * levels,
        norm_num_groups=8,
        latent_channels=channels,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_clip(kind, tokenizer):
    return make_text_encoder(kind, 32, "quick_gelu", tokenizer)


def make_t5(tokenizer, width):
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
    )
    return transformers.T5EncoderModel(config)


def make_gemma(tokenizer):
    config = transformers.Gemma2Config(**decoder_options(tokenizer))
    return transformers.Gemma2Model(config)


def qwen3_config(tokenizer, layers=3):
    return transformers.Qwen3Config(**decoder_options(tokenizer, num_hidden_layers=layers))


def stable_diffusion_3():
    tokenizer = make_tokenizer()
    encoders = [make_clip(transformers.CLIPTextModelWithProjection, tokenizer) for _ in range(2)]
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=make_t5(tokenizer, 64),
        tokenizer_3=tokenizer,
    )


def sana():
    tokenizer = make_tokenizer(300)
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=make_gemma(tokenizer),
        vae=diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=8,
            attention_head_dim=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 16),
            decoder_block_out_channels=(8, 8, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41,
        ),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=3,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=8,
            patch_size=1,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        ),
    )


def z_image():
    tokenizer = make_tokenizer(512)
    return diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(),
        text_encoder=transformers.Qwen3Model(qwen3_config(tokenizer)),
        tokenizer=tokenizer,
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        ),
    )


def lumina2():
    tokenizer = make_tokenizer(300)
    pipe = diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            hidden_size=24,
            num_layers=3,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(300, 64, 64),
            cap_feat_dim=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=make_vae(levels=4),
        text_encoder=make_gemma(tokenizer),
        tokenizer=tokenizer,
    )
    return pipe


def flux():
    tokenizer = make_tokenizer()
    return diffusers.FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=make_vae(),
        text_encoder=make_clip(transformers.CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=make_t5(tokenizer, 32),
        tokenizer_2=tokenizer,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=64,
            num_layers=3,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def flux2_klein():
    tokenizer = make_tokenizer(512)
    return diffusers.Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            latent_channels=4,
        ),
        text_encoder=transformers.Qwen3ForCausalLM(qwen3_config(tokenizer, layers=28)),
        tokenizer=tokenizer,
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=3,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=96,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
    )


def qwen_image():
    tokenizer = make_tokenizer(1100)
    text = decoder_options(tokenizer)
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"}
    vision = dict(
        depth=1,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        out_hidden_size=32,
        patch_size=14,
    )
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=16,
            dim_mult=[1, 2],
            num_res_blocks=1,
            attn_scales=[],
            temperal_downsample=[False],
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
    )


MAKERS = {
    "sd3": stable_diffusion_3,
    "sana": sana,
    "z_image": z_image,
    "lumina2": lumina2,
    "flux": flux,
    "flux2": flux2_klein,
    "qwen": qwen_image,
}
IMAGE_SIZES = dict.fromkeys(MAKERS, 16) | {"sana": 32, "lumina2": 64}


def as_in_pipeline(name, x):
    """Latents as the pipeline takes them."""
    return packed(x) if name in ("flux", "qwen") else x


def latents_given(name, pipe, x):
    """Latents as the pipeline gives them: FLUX.2's are what its VAE decodes."""
    if name == "flux2":
        mean, deviation = flux2_norm(pipe.vae, x)
        return torch.nn.functional.pixel_shuffle(x * deviation + mean, 2)
    return as_in_pipeline(name, x)


def draw_with_lcm(name, pipe, model, prompts, noise, monkeypatch):
    """What FlowMatchLCMScheduler draws, given the very noise that our sampler gets."""
    levels = dict(shift=model.shift, use_dynamic_shifting=False, shift_terminal=None)
    pipe.scheduler = FlowMatchLCMScheduler.from_config(pipe.scheduler.config, **levels)
    rest = iter(noise[1:])

    def next_noise(*arguments, **options):
        x = as_in_pipeline(name, next(rest, noise[0]))  # the last step's counts nothing
        return x.flatten(2).transpose(1, 2) if name == "flux2" else x

    sigmas = [(t + 1) / len(model.schedule) for t in model.schedule.timesteps(len(noise))]
    options = dict(height=model.image_size, width=model.image_size, output_type="latent")
    with monkeypatch.context() as patch:
        module = diffusers.schedulers.scheduling_flow_match_lcm
        patch.setattr(module, "randn_tensor", next_noise)
        latents = as_in_pipeline(name, noise[0])
        options |= eval(f"dict({model.family.unguided})")  # as a model card says it
        return pipe(prompt=list(prompts), latents=latents, sigmas=sigmas, **options).images


def write_flow_pipeline(folder, name, seed=0):
    quiet_libraries()
    torch.manual_seed(seed)
    pipe = MAKERS[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    if name == "flux2":  # other latents than of mean 0 and variance 1
        pipe.vae.bn.running_mean.fill_(0.3)
        pipe.vae.bn.running_var.fill_(2.0)
    generator = torch.Generator().manual_seed(seed)
    for parameter in pipe.transformer.parameters():  # many start at zero, and would hide mistakes
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    pipe.save_pretrained(folder)
    return folder
