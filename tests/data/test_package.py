"""What `import data` offers, and what it must not cost."""

import subprocess
import sys

import data


def test_every_exported_name_is_the_thing_itself() -> None:
    for name in data.__all__:
        assert getattr(data, name).__name__ == name


def test_config_needs_neither_torch_nor_megatron() -> None:
    heavy = "{'torch', 'numpy', 'datasets', 'megatron', 'transformers', 'tokenizers'}"
    code = f"import sys, data, data.config; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
