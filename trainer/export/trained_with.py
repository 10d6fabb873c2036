"""The attention and quantisation of a model's last phase, which an export's config.json records."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from data.storage import AnyPath
from model.config import AttentionMode
from trainer.config import Phase, Quantisation
from trainer.export.hf_folder import CONFIG_JSON, read_object
from trainer.process.errors import ExportError

KEY = "trained_with"
"""Of config.json. Other readers ignore it."""


class TrainedWith(BaseModel):
    """Attention and quantisation of the phase of a model's last step."""

    attention: AttentionMode
    quantisation: Quantisation


def trained_with(phase: Phase) -> dict[str, dict[str, str]]:
    """Returns the key of config.json."""
    values = TrainedWith(attention=phase.attention, quantisation=phase.quantisation)
    return {KEY: values.model_dump()}


def read_trained_with(folder: AnyPath) -> tuple[TrainedWith, bool]:
    """Returns how a folder's model was trained, and whether its experts are stored in FP4.

    A folder without the key is treated as a release: its indexers are trained, and experts in FP4
    come from training that rounded keys and entries as well (report §3.4). Raises ExportError for
    unknown values.
    """
    values = read_object(folder / CONFIG_JSON) or {}
    in_fp4 = values.get("expert_dtype") == "fp4"
    if KEY not in values:
        quantisation: Quantisation = "mxfp4" if in_fp4 else "none"
        return TrainedWith(attention="select", quantisation=quantisation), in_fp4
    try:
        return TrainedWith.model_validate(values[KEY]), in_fp4
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in (KEY, *problem["loc"]))
        raise ExportError(f"{folder / CONFIG_JSON}: {name}: {problem['msg']}") from None
