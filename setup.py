"""Packaging. A setup.py because Dataflow's ``--setup_file`` takes one and stages what it builds."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="beam-triton",
    version="0.2.0",
    description="Score Apache Beam elements on an NVIDIA Triton Inference Server",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["apache beam", "triton inference server", "open inference protocol", "machine learning"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
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
            "cryptography",
            "furo",
            "hypothesis",
            "ml_dtypes",
            "mypy",
            "myst-parser",
            "opentelemetry-sdk",
            "pillow",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "setuptools",
            "sphinx",
            "tritonclient[grpc,http]",
            "trustme",
            "types-requests",
            "wheel",
            "zstandard",
        ],
    },
)
