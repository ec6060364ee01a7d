"""Runs the Python of a card that loads an adapter on its base."""

from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from test_precision import CPU

from workflow import params
from workflow.data import cards
from workflow.data.lineage import Lineage
from workflow.models import load


def run_card(variant: params.Variant, model_folder: Path, folder: Path) -> torch.nn.Module:
    """The model that the card's code makes of an adapter in `folder` that changes nothing."""
    base, found = load.load_base(model_folder, variant, hardware=CPU)
    get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(folder)
    code = cards.loading_adapter(
        variant.keeping(found.layers_in_16_bits), Lineage(), compute="float32", device="cpu", folder=folder
    )
    code = code.replace(cards.MODEL.as_posix(), str(model_folder))
    begin, names = bnb.nn.Linear4bit.__init__, {}
    try:
        exec(code.partition("\ntokenizer = ")[0], names)
    finally:
        bnb.nn.Linear4bit.__init__ = begin
    return names["model"]
