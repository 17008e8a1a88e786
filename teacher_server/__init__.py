"""A frozen teacher behind gRPC: rows in, logits out.

main.py      the door: command line, signals, exit codes
config.py    every setting, with unit and range
server.py    what listens: life from loading to draining, health, reflection
service.py   the RPC methods; status codes live here
pictures.py  from a question to uint8 views: data sets, renderers
batcher.py   which rows run together
model.py     the network: precision, folding, fixed shapes
gate.py      is this network, in this precision, fit to be served?
"""
