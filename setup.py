"""Find the packages: the library's under collections/, and the three folders of YAML beside it (see pyproject.toml)."""

from setuptools import find_packages, setup

setup(packages=[*find_packages("collections"), "nemotron_h.configs", "nemotron_h.data_blends", "nemotron_h.recipes"])
