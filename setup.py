"""Packaging. Exact versions stand in launch/constraints.txt; here is only what dscl needs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "dscl" / "__init__.py").read_text("utf-8"))
assert VERSION is not None

setup(
    name="dscl",
    version=VERSION.group(1),
    description="Continual learning of LLaMA-class language models with DeepSpeed",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["dscl", "dscl.*"]),
    install_requires=[
        "torch",
        "deepspeed",
        "transformers>=5",
        "peft",
        "datasets",
        "sentencepiece",
        "tensorboard",
        "pyyaml",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "mypy",
            "types-PyYAML",
            "kubeflow-trainer-api",
            "triton; platform_system == 'Linux'",  # as torch's builds for GPUs bring it
        ]
    },
    entry_points={"console_scripts": ["dscl=dscl.cli.app:run_and_exit"]},
)
