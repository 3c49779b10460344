"""README.md of a student, whose code draws with it in plain diffusers."""

NOT_SHOWN = ("keep", "save_every", "track", "device", "launch")

WHY_TIMESTEPS = """LCMScheduler may warn that these are not its own timesteps; they are those that
the student was trained for:"""
WHY_SIGMAS = """Its levels are given as sigmas, before the shift: from a number of steps diffusers'
schedulers would make others:"""


def model_card(model, timesteps, config):
    teacher = config["model"] or "assets/world_teacher"
    steps = f"{len(timesteps)} step" + "s" * (len(timesteps) > 1)
    pipeline = type(model.pipe).__name__
    if not pipeline.endswith("Pipeline"):  # the plane, EDM: no pipeline of diffusers draws with it
        return (
            f"A student of {teacher} for {steps}, timesteps {timesteps} of its "
            f"{len(model.schedule)} noise levels: `python sample.py --student RUN`.\n"
        )
    scheduler, change, levels, why = "LCMScheduler", "", f"timesteps={timesteps}", WHY_TIMESTEPS
    if model.prediction == "flow":
        sigmas = [round((t + 1) / len(model.schedule), 6) for t in timesteps]  # before the shift
        scheduler, levels, why = "FlowMatchLCMScheduler", f"sigmas={sigmas}", WHY_SIGMAS
        # The levels that it was trained for, whatever the pipeline would make of a size or number.
        change = f", shift={model.shift:.6g}, use_dynamic_shifting=False, shift_terminal=None"
    network, part = model.network_class.__name__, model.family.network
    if config["lora"]:
        imports = f"{scheduler}, {pipeline}"
        load = f"""pipe = {pipeline}.from_pretrained("{teacher}")
    pipe.load_lora_weights("path/to/this/folder")"""
    else:
        imports = f"{scheduler}, {network}, {pipeline}"
        load = f"""student = {network}.from_pretrained("path/to/this/folder")
    pipe = {pipeline}.from_pretrained("{teacher}", {part}=student)"""
    call = f"{levels}, {model.family.unguided}"
    if part == "transformer" or config["image_size"]:
        call += f", height={model.image_size}, width={model.image_size}"
    shown = [name for name in config if name not in NOT_SHOWN and config[name] not in (None, False)]
    flags = "\n".join(f"| {name} | {config[name]} |" for name in shown)
    return f"""---
base_model: {teacher}
pipeline_tag: text-to-image
tags: [distribution-matching-distillation, {"lora, " * bool(config["lora"])}few-step]
---

A student that draws in {steps} what `{teacher}` draws in 50, made by distribution matching
distillation (`--variant {config["variant"]}`).

It wants timesteps {timesteps}, no classifier-free guidance (`{model.family.unguided}` in
diffusers), and a scheduler that predicts x0 and adds new noise.
{why}

    from diffusers import {imports}
    {load}
    pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{change})
    pipe(prompt="a prompt", {call}).images[0].save("image.png")

| flag | value |
|---|---|
{flags}
"""
