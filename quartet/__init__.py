"""Quartet, a serving runtime for language models: every package of the repository under one import root.

In a checkout the entries beside this file are links to the packages at the top of the repository, so that Python,
type checkers and editors find `quartet.runtime` without an installation. An installed Quartet has the packages
themselves in their place (see `package-dir` in pyproject.toml).
"""
