"""Tests; a package, so that no `tests` among the installed ones is taken for it."""
