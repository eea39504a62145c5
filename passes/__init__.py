"""The FX passes. ``pipeline.py`` is the ordered list."""
