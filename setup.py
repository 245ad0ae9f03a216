"""Packaging. A setup.py because Dataflow's ``--setup_file`` takes one and stages what it builds."""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = "0.2.0"
# The release workflow says where the repository is: a fork's package links to the fork.
REPOSITORY_URL = os.environ.get("BEAM_TRITON_REPOSITORY_URL", "")


def description() -> str:
    """The README; with a repository, its relative links are those of this version there."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    if not REPOSITORY_URL:
        return text
    images = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{REPOSITORY_URL}/raw/v{VERSION}/", text)
    return re.sub(r"(\]\()(?!https?:|#)", rf"\1{REPOSITORY_URL}/blob/v{VERSION}/", images)


def links() -> dict[str, str]:
    pages = {"Source": "", "Issues": "/issues", "Changelog": f"/blob/v{VERSION}/CHANGELOG.md"}
    return {name: REPOSITORY_URL + path for name, path in pages.items()} if REPOSITORY_URL else {}


setup(
    name="beam-triton",
    version=VERSION,
    description="Score Apache Beam elements on an NVIDIA Triton Inference Server",
    long_description=description(),
    long_description_content_type="text/markdown",
    author="The beam_triton authors",
    url=REPOSITORY_URL or None,
    project_urls=links(),
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        *("apache beam", "dataflow", "flink", "triton inference server", "kserve", "open inference protocol"),
        *("machine learning", "batch inference"),
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX",
        "Programming Language :: Python",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: Implementation :: CPython",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Software Development :: Libraries :: Python Modules",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["beam_triton", "beam_triton.*"]),
    package_data={"beam_triton": ["py.typed", "yaml/providers.yaml"]},
    # Outside the package, which imports Beam: pytest imports its plugins at each start.
    py_modules=["pytest_beam_triton"],
    entry_points={"pytest11": ["beam_triton = pytest_beam_triton"]},
    zip_safe=False,
    python_requires=">=3.10",
    install_requires=[
        "apache-beam>=2.70",
        "numpy>=1.26",
        "requests>=2.32.4",
        "urllib3>=2.2",
    ],
    extras_require={
        # `make demo`: the picture.
        "demo": ["matplotlib"],
        # `tune --chart`.
        "charts": ["matplotlib"],
        # beam_triton.auth.GoogleCredentials, for Vertex AI and whatever else takes Google's tokens.
        "gcp": ["google-auth>=2.23", "requests"],
        # beam_triton.auth.AwsSignature, for SageMaker and whatever else takes AWS's signatures.
        "aws": ["botocore>=1.31"],
        # Pipelines of Beam YAML.
        "yaml": ["apache-beam[yaml]"],
        # A span a request; W3C trace context needs none of it with tracing=True.
        "tracing": ["opentelemetry-api>=1.20"],
        # `score` on files of images.
        "image": ["pillow>=9.1"],
        # beam_triton.watch, and `score`: the picture on a terminal.
        "live": ["rich>=13"],
        # For the fixtures fake_triton and local_triton.
        "test": ["pytest>=7"],
        # This project's own tests, benchmarks and documentation.
        "dev": [
            "apache-beam[gcp,yaml]",
            # Where it has wheels; elsewhere it needs a clang with libFuzzer.
            "atheris; sys_platform == 'linux' and platform_machine == 'x86_64' and "
            "python_version >= '3.11' and python_version < '3.14'",
            "botocore",
            "build",
            "check-jsonschema",
            "cryptography",
            "furo",
            "hypothesis",
            # The notebooks of the documentation.
            "ipykernel",
            "ml_dtypes",
            "mypy",
            "myst-parser",
            "nbclient",
            "opentelemetry-sdk",
            "pillow",
            "pyte",
            "pytest-timeout",
            "pytest-xdist",
            "rich",
            "ruff",
            "setuptools",
            "sphinx",
            "tritonclient[grpc,http]",
            "trustme",
            "twine",
            "types-requests",
            "websockets",
            "wheel",
            "zstandard",
        ],
    },
)
