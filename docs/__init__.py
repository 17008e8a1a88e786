"""The documentation, and what is needed to make it: pages from code (make_pages.py), pictures (make_screenshots.py)."""
