"""From data sets to shards with an index: prepare.py is the command, index.py the format, check.py reads it again."""
