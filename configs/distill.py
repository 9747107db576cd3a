"""Distillation from a teacher that exists: Hugging Face folders in, a Hugging Face folder out."""

from __future__ import annotations

from dataclasses import replace

from configs import full
from llama4_jax.config import maverick, scout
from training.config import Distillation, MeshConfig, RunConfig


def scout_from_maverick() -> RunConfig:
    """A frozen Maverick teaches a Scout; rows of 8,192 tokens, 2.1M tokens a step (untuned).

    Command:  llama4 train distill:scout_from_maverick --learners.maverick.init hf:MAVERICK
              --learners.scout.init hf:SCOUT --data.sources text=DIR
              --data.tokenizer MAVERICK/tokenizer.model --out runs/mine, then
              llama4 export runs/mine --learner scout --to FOLDER
    Hardware: 256 H100 (h100:32x8)
    Result:   never run; llama4 plan distill:scout_from_maverick --topology h100:32x8
    """
    how = full.EXPERTS_TRAVEL
    learners = {
        "maverick": replace(full.learner("maverick", maverick(), **how), optimizer=None, init="hf:maverick"),
        "scout": full.learner("scout", scout(), distillation=Distillation("maverick"), **how),
    }
    mesh = MeshConfig(expert=8)
    return full.run("distill:scout_from_maverick", learners, full.DISTILLED_TOKENS, 256, 8192, mesh)


PRESETS = (scout_from_maverick,)
