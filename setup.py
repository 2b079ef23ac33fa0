"""The package and its dependencies as ranges; requirements.txt holds the one tested version of each."""

from setuptools import find_packages, setup

setup(
    name="megatron-klong",
    version="0.1.0",
    description="Training language-model agents for extremely long-horizon tasks, on Megatron-Core",
    license="Apache-2.0",
    # megatron-core 0.19 needs 3.12 or later; the GPU serving stack (megatron-bridge, nemo-export-deploy) has
    # wheels for 3.12 only.
    python_requires=">=3.12,<3.13",
    packages=find_packages(include=["megatron_klong", "megatron_klong.*"]),
    package_data={"megatron_klong.evaluate": ["*.jinja"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core>=0.19,<0.20",
        "triton>=3.4",
        "transformers>=5.8,<6",
        "safetensors>=0.6",
        "tokenizers>=0.22",
        "sentencepiece>=0.2",
        "numpy>=2.0",
        "pydantic>=2.13,<3",
        "tomli-w>=1.1",
        "jinja2>=3.1",
        "inspect-ai>=0.3.280,<0.4",
        "openai>=3.4",
        "mitmproxy>=12.3,<12.4",  # two of its private methods are wrapped (sandbox/egress/program.py)
        "pyseccomp>=0.1.2",
        "anyio>=4.14",
        "aiohttp>=3.12",
        "httpx>=0.28",
        "starlette>=1.0",
        "uvicorn>=0.40",
        "prometheus-client>=0.22",
        "matplotlib>=3.9",
        "psutil>=6.0",
        "einops>=0.8",
        "tqdm>=4.66",
        "wandb>=0.27.2",
        "PyYAML>=6.0",
        "pyarrow>=20",
        "zstandard>=0.23",
    ],
    extras_require={
        # one tested set of these: requirements-gpu.txt
        "gpu": [
            "transformer-engine[core_cu13,pytorch]>=2.16,<2.19",
            "megatron-bridge==0.6.0",
            "nemo-export-deploy==0.7.0",
        ],
        "nemo": ["nemo-toolkit[core,common-only]==3.0.0"],
        "dev": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "pytest-timeout>=2.4",
            "pytest-cov>=7",
            "hypothesis>=6.150",
            "ruff>=0.15",
            "mypy>=2.0",
            "import-linter>=2.16",
            "types-PyYAML>=6.0",
            "types-tqdm>=4.66",
        ],
    },
    entry_points={"inspect_ai": ["megatron_klong = megatron_klong.agent.registry"]},
)
