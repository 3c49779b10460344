"""Make the embedded world's flow teacher again: Lumina-Image 2 in miniature.

    python -m lab.make_flow                    # hours on two cores
    python -m lab.make_flow --device cuda      # minutes

It draws what lab/make_world.py's teacher draws and has its autoencoder. Written as a diffusers
pipeline in float16. An interrupted command goes on from --work. Its stages:

  text    Gemma2Model, alone, as the other teacher's text encoder is taught; fixed from then on.
  scenes  Lumina2Transformer2DModel, a rectified flow with shift 3, on all scenes.
"""

import functools

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
)
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

import data
import models
from lab.make_world import LATENTS, MAX_TOKENS, make_denoiser, teach_text, texts, train_denoiser
from lab.training import maker_parser
from support import cli

TEXT_WIDTH = 96
SHIFT = 3.0


def make_tokenizer(texts):
    """Every word is a token. The pipeline writes an instruction before each prompt, which is left
    out: it says the same in all."""
    words = sorted({word for text in texts for word in text.split()})
    special = ["<pad>", "<bos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"^.*<Prompt Start> "), "")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=MAX_TOKENS,
    )


def make_text_encoder(tokenizer):
    """The pipeline reads the states before the last layer, so it has one more than it needs."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=TEXT_WIDTH // 3,
        query_pre_attn_scalar=TEXT_WIDTH // 3,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return Gemma2Model(config)


def encode_with_gemma(texts, text_encoder, tokenizer):
    """The pipeline pads them all to one length; the mask makes that the same."""
    tokens = tokenizer(texts, padding=True, return_tensors="pt").to(text_encoder.device)
    ids, mask = tokens.input_ids, tokens.attention_mask
    output = text_encoder(ids, attention_mask=mask, output_hidden_states=True)
    states = output.hidden_states[-2]  # (B, tokens, width)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def make_transformer():
    """6.7 million parameters. A token is 2x2 latents, 16x16 pixels."""
    return Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=LATENTS,
        hidden_size=256,
        num_layers=7,
        num_refiner_layers=0,
        num_attention_heads=8,
        num_kv_heads=8,
        multiple_of=32,
        ffn_dim_multiplier=0.5,
        axes_dim_rope=(16, 8, 8),
        axes_lens=(300, 64, 64),
        cap_feat_dim=TEXT_WIDTH,
    )


def main(arguments=None):
    parser = maker_parser(__doc__, "runs/world-flow", 32)
    add = parser.add_argument
    add("--out", default=data.EMBEDDED["world-flow"], metavar="DIR")
    add("--text-iterations", type=cli.positive, default=3000)
    add("--scene-iterations", type=cli.positive, default=9000)
    add("--scenes", type=cli.positive, default=40_000, help="whose latents are made once")
    args = parser.parse_args(arguments)
    vae = AutoencoderKL.from_pretrained(data.EMBEDDED["world"] / "vae", torch_dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0)
    vae.to(args.device, memory_format=torch.channels_last)
    tokenizer = make_tokenizer(texts())
    torch.manual_seed(args.seed)
    text_encoder = make_text_encoder(tokenizer).to(args.device)
    transformer = make_transformer().to(args.device)
    encode = functools.partial(encode_with_gemma, text_encoder=text_encoder, tokenizer=tokenizer)
    teach_text(text_encoder, encode, args)
    text_encoder.requires_grad_(False)
    schedule = models.flow_schedule(shift=SHIFT).to(args.device)
    denoiser = make_denoiser("Lumina2Pipeline", transformer, schedule, "flow", args)
    networks = torch.nn.ModuleDict({"transformer": transformer})
    stages = {"scenes": args.scene_iterations}
    networks = train_denoiser(networks, denoiser, encode, stages, vae, args)
    pipe = Lumina2Pipeline(
        transformer=networks["transformer"].half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
    )
    pipe.save_pretrained(args.out)
    print(f"{args.out}. Measure it: python eval.py --teacher-only --model world-flow")


if __name__ == "__main__":
    cli.run(main)
