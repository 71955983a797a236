"""Where the rooms of the house are installed; everything else is in pyproject.toml.

``app``, ``data`` and ``kernels`` would collide with other people's packages under their bare names, so
they are installed as ``saebench_app``, ``saebench_data`` and ``saebench_kernels``.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = {
    "saebench": "saebench",
    "saebench_app": "app",
    "saebench_data": "data",
    "saebench_kernels": "kernels",
}

here = Path(__file__).parent
rooms = {name: folder for name, folder in ROOMS.items() if (here / folder / "__init__.py").exists()}

setup(
    package_dir=rooms,
    packages=[
        package
        for name, folder in rooms.items()
        for package in (name, *(f"{name}.{inner}" for inner in find_packages(here / folder)))
    ],
    package_data={
        "saebench": ["explaining/prompts/*.txt"],
        "saebench_app": ["*.css", "static/*", ".streamlit/*"],
        "saebench_kernels": ["*.md", "results/*.json"],
        "saebench_data": ["*.md", "LICENSES/*", "demo_model/*", "text/*"],
    },
)
