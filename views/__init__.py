"""What a view is: the one definition that teacher and student share.

view.py    Rows: which picture, which box, mirrored?, mixed with what
draw.py    the law: (seed, step) -> rows; pure numpy
setting.py the paper's view settings: what the student sees, and what its teacher
render.py  boxes -> uint8 pixels, by DALI
mix.py     uint8 views -> the network's mixed, normalised input
wire.py    rows <-> messages
"""
