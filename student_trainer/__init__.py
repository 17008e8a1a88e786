"""Trains a student to be the same function as its teacher; see train.py for the loop, recipes.py for the runs."""
