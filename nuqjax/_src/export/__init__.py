"""Programs that run without nuqjax."""
