"""Trains a student to be the same function as its teacher: train.py is the loop, recipes/ what can be run by name."""
