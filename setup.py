"""Build entry point. What can be declared stands in pyproject.toml; what has to be computed belongs here."""

from setuptools import setup

setup()
