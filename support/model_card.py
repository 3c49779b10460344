"""README.md of a student, whose code draws with it in plain diffusers."""

NOT_SHOWN = ("keep", "save_every", "track", "device", "launch")


def model_card(model, timesteps, config):
    teacher = config["model"] or "assets/emoji_teacher"
    steps = f"{len(timesteps)} step" + "s" * (len(timesteps) > 1)
    pipeline = type(model.pipe).__name__
    if not pipeline.endswith("Pipeline"):  # the plane, EDM: no pipeline of diffusers draws with it
        return (
            f"A student of {teacher} for {steps}, timesteps {timesteps} of its "
            f"{len(model.schedule)} noise levels: `python sample.py --student RUN`.\n"
        )
    if config["lora"]:
        imports = f"LCMScheduler, {pipeline}"
        load = f"""pipe = {pipeline}.from_pretrained("{teacher}")
    pipe.load_lora_weights("path/to/this/folder")"""
    else:
        imports = f"LCMScheduler, {model.network_class.__name__}, {pipeline}"
        load = f"""student = {model.network_class.__name__}.from_pretrained("path/to/this/folder")
    pipe = {pipeline}.from_pretrained("{teacher}", unet=student)"""
    shown = [name for name in config if name not in NOT_SHOWN and config[name] not in (None, False)]
    flags = "\n".join(f"| {name} | {config[name]} |" for name in shown)
    return f"""---
base_model: {teacher}
pipeline_tag: text-to-image
tags: [distribution-matching-distillation, {"lora, " * bool(config["lora"])}few-step]
---

A student that draws in {steps} what `{teacher}` draws in 50, made by distribution matching
distillation (`--variant {config["variant"]}`).

It wants timesteps {timesteps}, no guidance (`guidance_scale=0` in diffusers), and a scheduler that
predicts x0 and adds new noise. LCMScheduler may warn that these are not its own timesteps; they are
those that the student was trained for:

    from diffusers import {imports}
    {load}
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe("a prompt", timesteps={timesteps}, guidance_scale=0).images[0].save("image.png")

| flag | value |
|---|---|
{flags}
"""
