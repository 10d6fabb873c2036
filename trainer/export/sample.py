"""Loads an exported folder with transformers and generates text."""

from pathlib import Path
from typing import Any

import torch

from trainer.process.errors import ExportError


def sample_text(folder: Path, prompt: str, new_tokens: int = 48) -> dict[str, Any]:
    """Returns greedily generated text after bos and `prompt`, and the number of parameters loaded.

    Raises ExportError when transformers reports missing or unexpected weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ExportError(f"{folder}: transformers reports {kind}: {sorted(info[kind])[:3]}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    inputs = torch.tensor([[model.config.bos_token_id, *ids]])
    with torch.no_grad():
        output = model.generate(input_ids=inputs, max_new_tokens=new_tokens, do_sample=False)
    return {
        "text": tokenizer.decode(output[0], skip_special_tokens=True),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
