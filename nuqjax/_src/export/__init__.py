"""Exports models as programs that run without nuqjax."""
