"""The lists of what servers read, derived from a wheel that is made here."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from docs import write_servers
from docs.write_servers import Wheel, derive

LOADER = """
def remap_weight_name_to_dpsk_hf_format(name):
    texts = "model.embed_tokens.", "lm_head.", "model.norm.weight", "hc_head_", ".weight_scale_inv"
    name = name.replace(".attn.", ".self_attn.")
    return name

STACKED_PARAMS_MAPPING: list = [("gate_up_proj", "gate_proj", 0), ("gate_up_proj", "up_proj", 1)]
"""
ATTENTION = """
        self.attn_sink = nn.Parameter(torch.empty(config.num_attention_heads))
        self.wq_a = ReplicatedLinear(quant_config=quant_config)
        if fused:
            self.wqkv_a = ReplicatedLinear(config.hidden_size, quant_config=quant_config)
        self.plain = ReplicatedLinear(quant_config=None)
        self.q_norm, self.kv_norm = RMSNorm(1), RMSNorm(getattr(config, "head_dim", 512))
"""


def wheel(folder: Path, loader: str = LOADER) -> Wheel:
    """A wheel with empty classes but for attention's, and a loader."""
    sources: dict[str, str] = {}
    for part in write_servers.SGLANG.parts:
        body = ATTENTION if part.name == "MqaAttentionBase" else "\n        pass\n"
        definition = f"class {part.name}:\n    def __init__(self, config):{body}"
        if definition not in sources.get(part.file, ""):
            sources[part.file] = sources.get(part.file, "") + definition
    sources[write_servers.SGLANG_MODEL] += loader
    path = folder / "sglang-9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, source in sources.items():
            archive.writestr(file, source)
    return Wheel(path)


def test_parameters_keys_and_renamings(tmp_path: Path) -> None:
    lists = derive(wheel(tmp_path))
    assert (lists["server"], lists["version"]) == ("SGLang", "9.9")
    place = "{layer}.self_attn"
    assert lists["parameters"][f"{place}.attn_sink"] == [False, "all"]
    assert lists["parameters"][f"{place}.wqkv_a.weight"] == [True, "all"]
    assert lists["parameters"][f"{place}.plain.weight"] == [False, "all"]
    assert lists["parameters"][f"{place}.kv_norm.weight"] == [False, "all"]
    assert f"{place}.wq_a.weight" not in lists["parameters"]  # the loader joins it
    assert lists["config_keys"] == ["head_dim", "hidden_size", "num_attention_heads"]
    assert [r"\.attn\.", ".self_attn."] in lists["renames"]
    assert lists["joined"]["gate_up_proj"] == ["gate_proj", "up_proj"]


def test_what_a_new_version_lacks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"sglang 9\.9: .* lacks \['hc_head_'\]"):
        derive(wheel(tmp_path, LOADER.replace('"hc_head_", ', "")))
    renamed = LOADER.replace("def remap", "def other")
    with pytest.raises(SystemExit, match=r"deepseek_v4\.py has no remap_weight_name"):
        derive(wheel(tmp_path, renamed))
