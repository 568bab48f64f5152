"""Metadata. The package pgolf.kernels is the folder kernels/, to which the symbolic link pgolf/kernels points."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
if not (ROOT / "pgolf" / "kernels").is_dir():
    sys.exit(
        "pgolf/kernels must be a symbolic link to kernels/, and this checkout has none: "
        "clone again with `git clone -c core.symlinks=true` (Windows needs Developer Mode for symbolic links)"
    )
EXTRAS = {
    "data": ["huggingface_hub", "zstandard"],
    "report": ["matplotlib"],
    "progress": ["tqdm"],
    "convert": ["safetensors"],
    "test": [
        "pytest>=8",
        "pytest-benchmark",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "mypy>=2.4,<3",
        "ruff>=0.17,<0.18",
    ],
}


def version() -> str:
    """Return the version that pgolf/__init__.py states, read without importing it."""
    text = (ROOT / "pgolf" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('pgolf/__init__.py has no line __version__ = "..."')
    return found[1]


class LinkedSdist(sdist):
    """Packs a source distribution that has kernels/ and the link pgolf/kernels, as a checkout has."""

    def make_release_tree(self, base_dir: str, files: Iterable[str]) -> None:
        """Copy the files, which setuptools finds through the link, and then put the link back."""
        super().make_release_tree(base_dir, files)
        package = Path(base_dir) / "pgolf" / "kernels"
        package.rename(Path(base_dir) / "kernels")
        package.symlink_to("../kernels")


setup(
    name="pgolf",
    version=version(),
    description="Train, quantise and score the best language model that fits in 16,000,000 bytes",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    cmdclass={"sdist": LinkedSdist},
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
