"""Metadata. The package pgolf.kernels is the folder kernels/, to which the symbolic link pgolf/kernels points."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
EXTRAS = {
    "data": ["huggingface_hub", "zstandard"],
    "report": ["matplotlib"],
    "progress": ["tqdm"],
    "test": ["pytest>=8", "pytest-benchmark", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff>=0.17,<0.18"],
}


def version() -> str:
    """The version that pgolf/__init__.py states, read without importing it."""
    text = (ROOT / "pgolf" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('pgolf/__init__.py has no line __version__ = "..."')
    return found[1]


def long_description() -> str:
    """README.md, where there is one."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="pgolf",
    version=version(),
    description="Train, quantise and score the best language model that fits in 16,000,000 bytes",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["pgolf", "pgolf.*"]),
    package_dir={"": "."},  # so that an editable install is a plain path, which editors and type checkers follow
    package_data={"pgolf": ["py.typed"], "pgolf.kernels": ["tuned/*.json"]},
    entry_points={"console_scripts": ["pgolf = pgolf.cli:main"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux" and platform_machine == "x86_64"',
        "numpy",
        "sentencepiece",
        "brotli>=1.2",
    ],
    extras_require={**EXTRAS, "all": sorted({name for names in EXTRAS.values() for name in names})},
)
