"""Nothing yet: pyproject.toml holds the whole build. This file is for what it cannot hold, a build of CUDA extensions."""

from setuptools import setup

setup()
