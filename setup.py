import re
from pathlib import Path

from setuptools import find_packages, setup

train = [
    "accelerate>=1.2",
    "gguf>=0.19",
    "matplotlib>=3.8",
    "peft>=0.18",
    "pyarrow>=15",
    "safetensors>=0.4.3",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "transformers>=5.7",
    "tyro>=0.9.20",
]

version = re.search('"(.+)"', Path(__file__).with_name("dpo_wrapper").joinpath("version.py").read_text())

setup(
    name="dpo-wrapper",
    version=version[1],
    description="Train any autoregressive PyTorch transformer on human preferences",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    keywords=["dpo", "preference optimization", "rlhf", "language models", "pytorch"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["dpo_wrapper", "dpo_wrapper.*"]),
    package_data={"dpo_wrapper": ["py.typed"]},
    install_requires=[
        "torch>=2.9",
        "einops>=0.8.1",
        "numpy>=1.26",
        "x-transformers>=2.31",
        "beartype>=0.19",
        "jaxtyping>=0.2.36",
        "typing-extensions>=4.12",
    ],
    extras_require={
        "train": train,
        "test": [
            *train,
            "hypothesis>=6.100",
            "mypy>=1.18",
            "pytest>=8",
            "pytest-xdist>=3.6.1",
            "pytorch-lightning>=2.6",
            "ruff>=0.14.9",
            'triton>=3.5; platform_system == "Linux"',
            'trl>=1.16; python_version >= "3.11"',
        ],
    },
    entry_points={"console_scripts": ["dpo-wrapper = dpo_wrapper.cli:main"]},
)
