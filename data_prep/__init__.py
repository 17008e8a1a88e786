"""From data sets to shards with an index: prepare.py writes, index.py is the format, check.py re-reads."""
